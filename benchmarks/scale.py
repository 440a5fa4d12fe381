"""How search behaves as an index grows, on Milvus Lite and on a server: when to move.

    python benchmarks/scale.py [--lite 1e3 1e4 1e5] [--server 1e3 1e4 1e5 1e6]
        [--plot docs/scale.png]

Vectors are 512-d, normal with variances that fall as k^-0.8 from direction to direction: an
effective dimension of 75, where the bundled encoder's vectors of 1,000 photographs have 78 (the
square of the sum of the covariance's eigenvalues over the sum of their squares). Queries are
drawn alike, 100 candidates each, one query at a time. Exact search over the same vectors in NumPy
is the truth for the recall. Memory is resident: of this process for Milvus Lite (each size in one
of its own), of the server's process for the server (the PyPI package ``milvus``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.milvus_server import MilvusServer, why_no_server

DIM, LIMIT, QUERIES, STEP = 512, 100, 50, 10_000


def make_vectors(count: int, seed: int = 0):
    """Yield (start, (n, 512) float32 unit vectors), the same ones every time."""
    random = np.random.default_rng(seed)
    spread = np.arange(1, DIM + 1, dtype=np.float32) ** -0.4  # (D,)
    for start in range(0, count, STEP):
        vectors = random.standard_normal((min(STEP, count - start), DIM), dtype=np.float32)
        vectors *= spread  # (n, D)
        yield start, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_queries() -> np.ndarray:
    """Return (Q, 512): drawn like the vectors, but none of them."""
    return next(vectors for _, vectors in make_vectors(QUERIES, seed=1))


def exact(queries: np.ndarray, count: int) -> np.ndarray:
    """Return the true nearest (Q, LIMIT) ids, going through the vectors once."""
    best_ids = np.full((len(queries), 0), -1, np.int64)
    best = np.full((len(queries), 0), -np.inf, np.float32)
    for start, vectors in make_vectors(count):
        scores = np.concatenate([best, queries @ vectors.T], axis=1)
        ids = np.broadcast_to(np.arange(start, start + len(vectors)), (len(queries), len(vectors)))
        ids = np.concatenate([best_ids, ids], axis=1)
        keep = np.argsort(-scores, axis=1)[:, :LIMIT]
        best, best_ids = np.take_along_axis(scores, keep, 1), np.take_along_axis(ids, keep, 1)
    return best_ids


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(uri: str, count: int, index_type: str, server: MilvusServer | None) -> dict:
    """Fill a collection through mmsearch's own store and search it."""
    from mmsearch.indexing.catalog import Content, Entry
    from mmsearch.indexing.facts import Facts
    from mmsearch.indexing.vectors import VectorStore

    queries = make_queries()
    truth = exact(queries, count)
    bare = server.memory() / 1e6 if server else resident()
    store = VectorStore(uri, "scale", DIM, index_type=index_type)
    store.create()
    facts = Facts(4000, 3000)
    begin = time.perf_counter()
    for start, vectors in make_vectors(count):
        entries = [
            Entry(number, "/photos/", f"{number:08d}.jpg", 1, 1, Content(b"", (0, 0), facts, None))
            for number in range(start, start + len(vectors))
        ]
        store.upsert(entries, vectors)
    written = time.perf_counter()
    store.flush()
    if server is not None:
        wait_until_indexed(store, count)
    built = time.perf_counter()
    store.close()
    store = VectorStore(uri, "scale", DIM, index_type=index_type)
    opened = time.perf_counter()
    store.search(queries[:1], LIMIT, None)
    first = time.perf_counter() - opened
    if server is not None:
        time.sleep(10)  # let it swap the segments it was filled with for the built ones
    took, found = [], []
    for query in queries:
        begin_query = time.perf_counter()
        found.append(store.search(query[None], LIMIT, None).ids[0])
        took.append((time.perf_counter() - begin_query) * 1000)
    recall = np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, truth, strict=True)])
    memory = (server.memory() / 1e6 if server else resident()) - (0 if server else bare)
    took.sort()
    result = {
        "where": "server" if server else "lite",
        "index": index_type,
        "vectors": count,
        "write_s": round(written - begin, 1),
        "build_s": round(built - written, 1),
        "open_s": round(first, 2),
        "p50_ms": round(statistics.median(took), 1),
        "p95_ms": round(took[int(0.95 * len(took))], 1),
        "recall": round(float(recall), 4),
        "memory_mb": round(memory),
    }
    if server is not None:
        store.drop()
    store.close()
    return result


def wait_until_indexed(store, count: int) -> None:
    """The server builds indexes beside searches; wait for it to be done."""
    client = store._open()
    while True:
        state = client.describe_index(store.collection, "vector")
        if int(state["pending_index_rows"]) == 0 and int(state["indexed_rows"]) >= count * 0.99:
            return
        time.sleep(1)


def show(row: dict) -> None:
    print(json.dumps(row), flush=True)


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    measures = (
        ("p50_ms", "one query, p50 (ms)", "log"),
        ("memory_mb", "resident memory (MB)", "log"),
        ("recall", "recall@100 against exact search", "linear"),
    )
    names = {"lite": "Milvus Lite", "server": "Milvus server"}
    series = sorted({(row["where"], row["index"]) for row in rows})
    for axis, (key, title, scale) in zip(axes, measures, strict=True):
        for where, kind in series:
            some = [row for row in rows if (row["where"], row["index"]) == (where, kind)]
            axis.plot(
                [row["vectors"] for row in some],
                [row[key] for row in some],
                marker="o",
                label=f"{names[where]}, {kind}",
            )
        axis.set(xscale="log", yscale=scale, xlabel="vectors (512-d)", title=title)
        axis.grid(alpha=0.3)
    axes[2].set_ylim(0.8, 1.005)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lite", type=float, nargs="*", default=[1e3, 1e4, 1e5])
    parser.add_argument("--server", type=float, nargs="*", default=[1e3, 1e4, 1e5, 1e6])
    parser.add_argument("--index-types", nargs="+", default=["HNSW"])
    parser.add_argument("--results", type=Path, help="append rows here, as JSON lines")
    parser.add_argument("--plot", type=Path, help="draw all rows of --results, or of this run")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one Milvus Lite size, in this process
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            kind, count = options.one.split(":")
            show(measure(str(Path(folder) / "vectors.db"), int(float(count)), kind, None))
        return
    rows = []
    for kind in options.index_types:
        for count in options.lite:
            command = [sys.executable, __file__, "--one", f"{kind}:{count}"]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(answer.stdout.splitlines()[-1]))
            show(rows[-1])
    if options.server and (reason := why_no_server()):
        print(f"no server: {reason}")
    elif options.server:
        for kind in options.index_types:
            for count in options.server:
                with tempfile.TemporaryDirectory() as folder:
                    server = MilvusServer(Path(folder))
                    server.start()
                    try:
                        rows.append(measure(server.uri, int(count), kind, server))
                    finally:
                        server.kill()
                    show(rows[-1])
    if options.results:
        with options.results.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
