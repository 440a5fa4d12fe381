"""Fixtures: real pictures, and tiny models with random weights that need no download."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .milvus_server import MilvusServer, why_no_server

# Before any test imports a hub client: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
_VIT = {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16, "head_width": 32}

TINY_MODELS: dict[str, dict] = {
    "vit": {"embed_dim": 32, "vision_cfg": _VIT, "text_cfg": _TEXT},
    "vit-wide": {
        "embed_dim": 32,
        "vision_cfg": _VIT | {"image_size": [48, 80]},
        "text_cfg": _TEXT,
    },
    "timm-conv": {
        "embed_dim": 32,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": _TEXT,
    },
    "siglip": {
        "embed_dim": 192,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_pool": "map",
            "timm_proj": "none",
            "image_size": 224,
        },
        "text_cfg": _TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "resnet": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": _TEXT,
    },
    "coca": {
        "embed_dim": 32,
        "vision_cfg": _VIT | {"attentional_pool": True, "output_tokens": True},
        "text_cfg": _TEXT | {"context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {
            "context_length": 76,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
        "custom_text": True,
    },
}


def save_tiny_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny open_clip model with random weights as a ``local-dir:`` folder."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": TINY_MODELS[kind], "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    checkpoint = folder / "open_clip_model.safetensors"
    checkpoint.unlink(missing_ok=True)  # else open_clip would load it instead of drawing anew
    torch.manual_seed(seed)
    net = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    weights = {name: value.contiguous().clone() for name, value in net.state_dict().items()}
    save_file(weights, checkpoint)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny model by its kind (see TINY_MODELS)."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_tiny_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_model: Callable[[str], Path]) -> Path:
    """The tiny ViT, the one most tests want: 64 px, 4 x 4 patches, D = 32."""
    return tiny_model("vit")


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    """A running Milvus server that asks for a token; one for the whole session."""
    if reason := why_no_server():
        pytest.skip(reason)
    server = MilvusServer(tmp_path_factory.mktemp("milvus"), authorization=True)
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _private_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Keep every test away from the user's own index and caches."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    for name in ("MMSEARCH_INDEX", "MMSEARCH_MILVUS_URI", "MMSEARCH_MILVUS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
