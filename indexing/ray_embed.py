"""Embedding on many machines with Ray Data; this machine stores what comes back.

    walk here -> [Ray: read, hash, decode, model, quantise] -> write here: shards, Milvus, catalog

The workers run the steps of a run on one machine and need the picture files under the same paths,
mmsearch[ray] and the model's weights. A batch is stored whole, in the order that lets a kill lose
nothing; one that Ray computes twice overwrites itself.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import MmsearchError, StorageError, UsageError
from .catalog import Catalog, Entry
from .encoder import EncoderSpec, encoder_for
from .pipeline import Encoded, Events, Job, Tally, Writer, load
from .shards import RowFormat, Shards
from .vectors import VectorStore

if TYPE_CHECKING:
    from .encoder import Encoder

LOCAL = "local"  # what to call a Ray of this run's own, on this machine
_FILES_AT_ONCE = 200_000  # listed in one data set, so that memory here does not grow


@dataclass(frozen=True, slots=True)
class RayCluster:
    """Where to embed.

    Attributes:
        address: "local", "auto" (the cluster this machine is part of), host:port, ray://host:port.
        workers: models at work; None for one a GPU, or one for every four cores without GPUs.
        device: as in ``choose_device``, on the workers.
        precision: as in ``choose_dtype``, on the workers.
    """

    address: str = LOCAL
    workers: int | None = None
    device: str | None = None
    precision: str = "auto"


def run_on_ray(
    jobs: Iterable[Job],
    cluster: RayCluster,
    spec: EncoderSpec,
    shards: Shards,
    vectors: VectorStore,
    catalog: Catalog,
    *,
    batch_size: int,
    stopped: Callable[[], bool],
    events: Events,
) -> Tally:
    """Take files through the workers' models into the index; see ``pipeline.run``.

    Raises:
        UsageError: Ray is not installed, or not to be reached at the address.
        StorageError: workers fail, the disk is full or Milvus fails; what was stored is kept.
    """
    tally = Tally()
    with (
        _Session(cluster) as session,
        Writer(shards, vectors, catalog) as writer,
    ):
        make = partial(encoder_for, spec, cluster.device, cluster.precision)
        for entries, encoded in session.embed(jobs, make, shards.row, batch_size):
            batch = [replace(entry, id=catalog.id_for(entry.path)) for entry in entries]
            for entry in batch:
                content = entry.content
                reason = entry.trouble or (content.failure if content else None)
                if reason is not None:
                    tally.failed += 1
                    events.failed(entry.path, reason)
                    continue
                tally.stored += 1
                if content and catalog.content(content.hash) is not None:
                    tally.found_again.append(entry.id)
            if encoded is not None:
                tally.encoded += len(encoded.pooled)
                if not np.isfinite(encoded.pooled).all():
                    raise MmsearchError(
                        "the model gave features that are no numbers",
                        "Try --precision fp32, or another model.",
                    )
            writer.put(batch, encoded)
            events.advanced(len(batch))
            if stopped():
                break
    return tally


class Embedder:
    """One worker of the cluster: holds the model and embeds batch by batch."""

    def __init__(self, make: Callable[[], Encoder], row: RowFormat, threads: int) -> None:
        self._model = make().drop_text()
        self._row = row
        self._threads = ThreadPoolExecutor(threads, "decode")
        # Nothing is known here of other files; the writer sorts out what it has already.
        self._catalog = Catalog(":memory:")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        """Take {"job": pickled jobs} to {"block": one pickled (entries, features or None)}."""
        spec = self._model.spec.input_spec
        jobs = [pickle.loads(job) for job in batch["job"]]
        loaded = list(self._threads.map(lambda job: load(job, spec, self._catalog), jobs))
        pixels = [each.picture.pixels for each in loaded if each.picture is not None]
        encoded = None
        if pixels:
            features = self._model.encode_images(np.stack(pixels))
            encoded = Encoded.of(features, self._row)
        return {"block": [pickle.dumps(([each.entry for each in loaded], encoded))]}


class _Session:
    """A connection to Ray, begun and ended with the run unless the caller had one."""

    def __init__(self, cluster: RayCluster) -> None:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise UsageError("--ray needs Ray", 'pip install "mmsearch[ray]"') from error
        self._ray: Any = ray
        self._cluster = cluster
        self._ours = not ray.is_initialized()

    def __enter__(self) -> _Session:
        if self._ours:
            address = self._cluster.address
            try:
                self._ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UsageError(
                    f"cannot reach Ray at {address}: {str(error).splitlines()[0]}",
                    "Is it running (ray start --head)? --ray local needs none.",
                ) from error
        return self

    def __exit__(self, *error: object) -> None:
        if self._ours:
            self._ray.shutdown()

    def embed(
        self, jobs: Iterable[Job], make: Callable[[], Encoder], row: RowFormat, batch_size: int
    ) -> Iterator[tuple[list[Entry], Encoded | None]]:
        """Yield the batches of entries and features as the workers finish them."""
        data = self._ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        workers, resources = self._share()
        source = iter(jobs)
        while some := list(itertools.islice(source, _FILES_AT_ONCE)):
            rows = [{"job": pickle.dumps(job)} for job in some]
            blocks = data.from_items(rows, override_num_blocks=-(-len(rows) // batch_size))
            embedded = blocks.map_batches(
                Embedder,
                fn_constructor_args=(make, row, int(resources["num_cpus"])),
                batch_size=batch_size,
                compute=data.ActorPoolStrategy(size=workers),
                **resources,
            )
            try:
                for result in embedded.iter_rows():
                    yield pickle.loads(result["block"])
            except self._ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, MmsearchError):
                    raise cause from error
                raise StorageError(
                    f"a Ray worker failed: {str(error).strip().splitlines()[-1]}",
                    "What was embedded before is kept; run the same command again.",
                ) from error

    def _share(self) -> tuple[int, dict[str, float]]:
        """Return how many models to run and what each may use."""
        there = self._ray.cluster_resources()
        gpus, cores = int(there.get("GPU", 0)), int(there.get("CPU", 1))
        if gpus:
            workers = self._cluster.workers or gpus
            return workers, {"num_gpus": 1, "num_cpus": max(1, min(8, cores // workers))}
        workers = self._cluster.workers or max(1, cores // 4)
        return workers, {"num_cpus": max(1, min(4, cores // workers))}
