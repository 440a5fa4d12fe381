"""How fast pictures get into an index, beside clip-retrieval, a plain loop and the limit.

    python benchmarks/indexing.py --source PHOTOS --work DIR [--clip-retrieval PYTHON]

One run measures, on the same files and the same ViT-B/32 (random weights: speed does not mind):

    ours            ImageIndex.add, into Milvus Lite and shards
    clip-retrieval  `clip-retrieval inference` from PyPI, run by the Python given (its own venv)
    plain loop      Pillow full decode, open_clip preprocess, fp32 forward, nothing stored
    model alone     the fast precision on ready pixels
    decode alone    all cores, nothing else

The limit is 1 / (1/decode + 1/model) where both share the cores, the lesser one on a GPU.
``--memory N`` indexes N files and prints how resident memory grows, then an unchanged second run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from mmsearch.indexing.encoder import Encoder, load_encoder
from mmsearch.indexing.images import decode
from mmsearch.indexing.index import Events, ImageIndex
from PIL import Image

PICTURES = (".jpg", ".jpeg", ".png")


def make_collection(source: Path, folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Make ``count`` different JPEGs of quality 90 from the photographs of a folder."""
    paths = [folder / f"{number:05d}.jpg" for number in range(count)]
    photos = sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURES)
    if not photos:
        sys.exit(f"no photographs in {source}")
    folder.mkdir(parents=True, exist_ok=True)

    def make(number: int) -> None:
        if not paths[number].exists():
            image = Image.open(photos[number % len(photos)]).convert("RGB")
            image = image.resize(size, Image.Resampling.BICUBIC)
            image.putpixel((0, 0), (number % 256, number // 256 % 256, 7))  # no two alike
            image.save(paths[number], quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, range(count)))
    return paths


def make_checkpoint(work: Path) -> Path:
    """Save a randomly initialised ViT-B/32."""
    import open_clip

    path = work / "vit-b-32.pt"
    if not path.exists():
        torch.manual_seed(0)
        torch.save(open_clip.create_model("ViT-B-32").state_dict(), path)
    return path


CLOCK = "wall"


def now() -> float:
    """Seconds on the wall, or seconds of all cores together where others use the machine too."""
    if CLOCK == "wall":
        return time.perf_counter()
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) / (os.cpu_count() or 1)


def seconds(action: Callable[[], object]) -> float:
    started = now()
    action()
    return now() - started


def ours(paths: Path, encoder: Encoder, work: Path) -> float:
    shutil.rmtree(work / "index", ignore_errors=True)
    with ImageIndex.create(work / "index", encoder.spec) as index:
        return seconds(lambda: index.add([paths], encoder))


def plain_loop(paths: list[Path], checkpoint: Path, batch_size: int) -> float:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(
        "ViT-B-32", pretrained=str(checkpoint)
    )
    model.eval()

    def loop() -> None:
        with torch.inference_mode():
            for start in range(0, len(paths), batch_size):
                batch = [preprocess(Image.open(path)) for path in paths[start : start + batch_size]]
                model.encode_image(torch.stack(batch))

    return seconds(loop)


def model_alone(encoder: Encoder, count: int, batch_size: int) -> float:
    """Run the model on ready pixels: all cores on one batch, or a batch a core; the faster."""
    pixels = np.random.default_rng(0).integers(
        0, 256, (batch_size, *encoder.spec.input_size, 3), dtype=np.uint8
    )
    batches = max(2, count // batch_size)
    encoder.encode_images(pixels)

    def encode(_: int) -> None:
        encoder.encode_images(pixels).pooled.cpu()

    together = seconds(lambda: [encode(number) for number in range(batches)])
    if encoder.device.type != "cpu":
        return together / (batches * batch_size)
    before = torch.get_num_threads()
    with ThreadPoolExecutor(os.cpu_count(), initializer=lambda: torch.set_num_threads(1)) as pool:
        apart = seconds(lambda: list(pool.map(encode, range(batches))))
    torch.set_num_threads(before)
    return min(together, apart) / (batches * batch_size)


def decode_alone(paths: list[Path], encoder: Encoder) -> float:
    spec = encoder.spec.input_spec
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return seconds(lambda: list(pool.map(lambda path: decode(path, spec), paths))) / len(paths)


def clip_retrieval(python: Path, folder: Path, checkpoint: Path, work: Path) -> float:
    """Run clip-retrieval's inference; loading is left out by its own run over one picture."""
    one = work / "one-picture"
    one.mkdir(exist_ok=True)
    shutil.copy(next(folder.iterdir()), one)

    def run(source: Path) -> float:
        output = work / "clip-retrieval"
        shutil.rmtree(output, ignore_errors=True)
        command = [
            *(python, "-m", "clip_retrieval.cli", "inference"),
            *("--input_dataset", source, "--output_folder", output),
            *("--input_format", "files", "--enable_text", "False", "--batch_size", "256"),
            *("--num_prepro_workers", os.cpu_count() or 1, "--cache_path", "None"),
            *("--clip_model", f"open_clip:ViT-B-32/{checkpoint}"),
        ]
        log = work / "clip-retrieval.log"
        with log.open("w") as file:
            took = seconds(
                lambda: subprocess.run(
                    list(map(str, command)), check=True, stdout=file, stderr=subprocess.STDOUT
                )
            )
        if not list(output.rglob("*.npy")):
            sys.exit(f"clip-retrieval wrote nothing, see {log}")
        return took

    return run(folder) - run(one)


def compare(arguments: argparse.Namespace, name: str, count: int, size: tuple[int, int]) -> dict:
    work: Path = arguments.work
    folder = work / name
    paths = make_collection(arguments.source, folder, count, size)
    checkpoint = make_checkpoint(work)
    encoder = load_encoder("ViT-B-32", str(checkpoint), device=arguments.device)
    batch_size = 16 if encoder.device.type == "cpu" else 256
    rounds = arguments.rounds
    took = {"ours": statistics.median(ours(folder, encoder, work) for _ in range(rounds)) / count}
    took["decode alone"] = statistics.median(decode_alone(paths, encoder) for _ in range(rounds))
    took["model alone"] = statistics.median(
        model_alone(encoder, max(256, min(count, 1024)), batch_size) for _ in range(rounds)
    )
    took["plain loop"] = plain_loop(paths, checkpoint, batch_size) / count
    if arguments.clip_retrieval:
        took["clip-retrieval"] = (
            clip_retrieval(arguments.clip_retrieval, folder, checkpoint, work) / count
        )
    both = (took["decode alone"], took["model alone"])
    took["limit"] = sum(both) if encoder.device.type == "cpu" else max(both)
    print(
        f"\n{count:,} pictures of {size[0]} x {size[1]}, {encoder.dtype}, {encoder.device}, {CLOCK}"
    )
    sys.stdout.flush()
    for what, one in sorted(took.items(), key=lambda item: item[1]):
        print(f"  {what:16} {1 / one:8.1f} pictures/s   ours is {one / took['ours']:6.2f} x")
    print(f"  ours reaches {100 * took['limit'] / took['ours']:.0f}% of the limit")
    return {"pictures": count, "size": size, "per_second": {k: 1 / v for k, v in took.items()}}


def resident() -> float:
    """Resident memory in MB; the peak where the system does not say the present."""
    try:
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) / 1000
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def memory(arguments: argparse.Namespace) -> dict:
    """Index many files, watch memory, then index them again unchanged."""
    work: Path = arguments.work
    folder = work / "many"
    make_collection(arguments.source, folder, arguments.memory, (224, 224))
    checkpoint = make_checkpoint(work)
    shutil.rmtree(work / "index", ignore_errors=True)
    code = (
        "import sys; from pathlib import Path; from benchmarks.indexing import watched;"
        "watched(*map(Path, sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, folder, checkpoint, work / "index"]
    output = subprocess.run(
        list(map(str, command)), check=True, text=True, stdout=subprocess.PIPE, cwd=Path.cwd()
    ).stdout
    print(output)
    return json.loads(output.splitlines()[-1])


def watched(folder: Path, checkpoint: Path, index_folder: Path) -> None:
    """In a process of its own: index a folder twice and tell memory and time."""
    held = [load_encoder("ViT-B-32", str(checkpoint)).drop_text()]  # as the command does
    print(f"{resident():7.0f} MB with the model loaded")
    done, samples = 0, []
    peak = [0.0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            peak[0] = max(peak[0], resident())

    def advanced(files: int) -> None:
        nonlocal done
        before, done = done, done + files
        if done // 2000 > before // 2000:
            samples.append(round(resident()))
            print(f"{resident():7.0f} MB after {done:,}", flush=True)

    thread = threading.Thread(target=watch)
    thread.start()
    with ImageIndex.create(index_folder, held[0].spec) as index:
        first = index.add([folder], held.pop, on_event=Events(advanced=advanced))
        print(f"{resident():7.0f} MB after flush and index; peak {peak[0]:.0f} MB")
        over.set()
        thread.join()
        again = index.add([folder], held.pop)  # nothing to embed, so nobody asks for the model
    print(f"{first.added:,} in {first.seconds:.1f} s; unchanged again in {again.seconds:.2f} s")
    result = {
        "peak_mb": round(peak[0]),
        "samples_mb": samples,
        "first_seconds": first.seconds,
        "unchanged_seconds": again.seconds,
        "files": first.added,
    }
    print(json.dumps(result))


def main(words: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--clip-retrieval", type=Path, help="Python of a venv that has it")
    parser.add_argument("--small", type=int, default=2000, help="pictures of 224 px")
    parser.add_argument("--large", type=int, default=300, help="pictures of 12 megapixels")
    parser.add_argument("--memory", type=int, default=0, help="files of the memory run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu on a machine others use too"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args(words)
    global CLOCK
    CLOCK = arguments.clock
    arguments.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {}
    if arguments.small:
        results["small"] = compare(arguments, "small", arguments.small, (224, 224))
    if arguments.large:
        results["large"] = compare(arguments, "large", arguments.large, (4000, 3000))
    if arguments.memory:
        results["memory"] = memory(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
