"""Which models there are: names, tags, what is cached, published figures, nearest names.

Reads open_clip's registries and the Hugging Face cache folder; loads no weights.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ModelError
from ..core.settings import cache_dir

BUNDLED = "bundled"
BUNDLED_DIR = Path(__file__).parent / "bundled"

# The hub model that ``--model auto`` prefers: small enough for a laptop, strong enough to notice.
RECOMMENDED = ("ViT-B-32", "laion2b_s34b_b79k")


@dataclass(frozen=True)
class PublishedModel:
    """A model worth choosing, with zero-shot text-to-image recall as published."""

    model: str
    pretrained: str | None
    megabytes: int  # of the weights file
    embed_dim: int
    flickr30k_r1: float | None  # per cent, text to image, 1K test
    coco_r5: float | None  # per cent, text to image, 5K test
    source: str


def is_local_dir(model: str) -> bool:
    """Whether ``model`` names a folder with an open_clip config and weights."""
    return model.startswith("local-dir:") or model == BUNDLED


def local_dir(model: str) -> Path:
    """Return the folder behind "bundled" or "local-dir:PATH"."""
    return BUNDLED_DIR if model == BUNDLED else Path(model.removeprefix("local-dir:"))


def find_weights(folder: Path) -> Path:
    """Return the weights file of a local model folder, by open_clip's order of preference.

    Raises:
        ModelError: there is none.
    """
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"):
        if (folder / name).is_file():  # the usual names, without open_clip's slow import
            return folder / name
    from open_clip.factory import _find_checkpoint_in_dir

    found = _find_checkpoint_in_dir(folder)
    if found is None:
        raise ModelError(
            f"no weights in {folder}",
            "Put open_clip_model.safetensors beside open_clip_config.json.",
        )
    return Path(found)


def hash_weights(path: Path) -> str:
    """Return the sha256 of a weights file in hex; remembered by path, size and mtime.

    Hashing a gigabyte takes a second or more, and each query asks for it.
    """
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    memory = cache_dir() / "weights-hashes.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if key in known:
        return known[key]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    known[key] = digest.hexdigest()
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(known), encoding="utf-8")
        partial.replace(memory)
    except OSError:
        pass  # a cache that cannot be written costs time, nothing else
    return known[key]


def unknown_model(model: str) -> ModelError:
    """Return the error for a model name open_clip does not know, with the nearest that it does."""
    import open_clip

    names = [BUNDLED, *open_clip.list_models()]
    near = _nearest(model, names)
    return ModelError(
        f"unknown model {model!r}",
        f"Did you mean {' or '.join(near)}? See `mmsearch models`, or give hf-hub:ORG/NAME, "
        "local-dir:FOLDER.",
    )


def unknown_tag(model: str, tag: str | None) -> ModelError:
    """Return the error for a pretrained tag that ``model`` does not have."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    if not tags:
        return ModelError(
            f"model {model} has no published weights",
            "Give --pretrained FILE, a local checkpoint of that architecture.",
        )
    if tag is None:
        return ModelError(
            f"model {model} needs weights",
            f"Give --pretrained one of: {', '.join(tags)}; or a file.",
        )
    near = [*_nearest(tag, tags), *tags]
    listed = ", ".join(dict.fromkeys(near))
    return ModelError(
        f"model {model} has no weights called {tag!r}, and no such file exists",
        f"Give --pretrained one of: {listed}; or the path of a local checkpoint.",
    )


def _nearest(name: str, names: list[str]) -> list[str]:
    lowered = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.4)
    return [lowered[each] for each in near] or [BUNDLED]


def is_cached(model: str, pretrained: str | None) -> bool:
    """Whether the weights lie in the local Hugging Face cache, so that no network is needed."""
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    if model.startswith("hf-hub:"):
        repos = [model.removeprefix("hf-hub:")]
    else:
        config = open_clip.get_pretrained_cfg(model, pretrained or "")
        repo = config.get("hf_hub", "").strip("/")
        repos = [repo] if repo else []
    names = (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
    )
    return any(
        isinstance(try_to_load_from_cache(repo, name), str) for repo in repos for name in names
    )


def resolve_auto() -> tuple[str, str | None, str]:
    """Decide what ``--model auto`` means here: (model, pretrained, one line that says why).

    The recommended hub model when its weights are cached or the hub answers, else the bundled one.
    """
    model, pretrained = RECOMMENDED
    if is_cached(model, pretrained):
        return model, pretrained, f"model {model} ({pretrained}), from the local cache"
    if _hub_answers():
        return model, pretrained, f"model {model} ({pretrained}), downloading 605 MB once"
    return BUNDLED, None, "model bundled (no model hub in reach)"


def _hub_answers(seconds: float = 1.5) -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    from urllib.parse import urlsplit

    from huggingface_hub.constants import ENDPOINT

    address = urlsplit(ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=seconds):
            return True
    except OSError:
        return False


_SOURCE = "open_clip, docs/openclip_retrieval_results.csv"

# megabytes from the parameter counts of the same table (fp32 weights, four bytes a parameter)
PUBLISHED = (
    PublishedModel("ViT-B-32", "laion2b_s34b_b79k", 605, 512, 66.78, 65.43, _SOURCE),
    PublishedModel("ViT-B-32", "datacomp_xl_s13b_b90k", 605, 512, 61.08, 62.35, _SOURCE),
    PublishedModel("ViT-B-16", "laion2b_s34b_b88k", 598, 512, 69.84, 67.70, _SOURCE),
    PublishedModel("ViT-B-16-SigLIP", "webli", 813, 768, 74.68, 72.44, _SOURCE),
    PublishedModel("ViT-B-16-SigLIP-384", "webli", 814, 768, 78.48, 73.66, _SOURCE),
    PublishedModel("convnext_base_w", "laion2b_s13b_b82k", 718, 640, 72.14, 68.05, _SOURCE),
    PublishedModel("ViT-L-14", "datacomp_xl_s13b_b90k", 1710, 768, 73.38, 70.03, _SOURCE),
    PublishedModel("ViT-L-16-SigLIP-384", "webli", 2610, 1024, 81.42, 76.57, _SOURCE),
    PublishedModel("ViT-SO400M-14-SigLIP-384", "webli", 3512, 1152, 82.96, 76.78, _SOURCE),
)


def bundled_model() -> PublishedModel:
    """Return the line about the model in the package; its figures stand in its own card."""
    weights = find_weights(BUNDLED_DIR)
    config = json.loads((BUNDLED_DIR / "open_clip_config.json").read_text(encoding="utf-8"))
    return PublishedModel(
        BUNDLED,
        None,
        round(weights.stat().st_size / 1e6),
        config["model_cfg"]["embed_dim"],
        None,
        None,
        "trained on Flickr8k for machines without a model hub, see docs/bundled-model.md",
    )


def every_pretrained() -> list[tuple[str, str]]:
    """Return every (model, pretrained tag) that open_clip knows."""
    import open_clip

    return [(model, tag) for model, tag in open_clip.list_pretrained()]
