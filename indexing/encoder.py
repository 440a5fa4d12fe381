"""Images and texts to features, for any open_clip model.

    encoder = load_encoder("ViT-B-32", "laion2b_s34b_b79k")
    encoder.encode_images(pixels)   # pooled (N, D) and patches (N, P, C)
    encoder.encode_texts(["a red car"])   # pooled (Q, D), tokens (Q, T, C) and their mask

Pooled vectors equal open_clip's own ``encode_image`` and ``encode_text``, L2-normalised. Weights
that did not load are an error: open_clip alone would only warn, and search would answer nonsense.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.device import choose_device, choose_dtype
from ..core.errors import BadIndex, ModelError
from ..core.types import Grid, ImageFeatures, TextFeatures
from . import models

UNTILED = Grid(1, 1)
TILES = {"1x1": UNTILED, "2x2": Grid(2, 2), "3x3": Grid(3, 3)}  # what to offer, by name

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from .images import InputSpec


@dataclass(frozen=True)
class EncoderSpec:
    """What an index must remember of its encoder to answer queries with the very same one."""

    model: str  # "bundled", "ViT-B-32", "hf-hub:org/name", "local-dir:/folder"
    pretrained: str | None  # tag or absolute path of a checkpoint; None where the model says it all
    weights_hash: str  # sha256 of the weights file, hex
    patch_kind: str  # "aligned" | "penultimate"
    embed_dim: int  # D
    patch_dim: int  # C of the patches
    text_dim: int  # C of the text tokens
    grid: Grid  # of the patches of a picture, all tiles together
    input_size: tuple[int, int]  # height, width in pixels, all tiles together
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]
    interpolation: str  # "bicubic" | "bilinear"
    resize_mode: str  # "shortest" | "longest" | "squash"
    tiles: Grid = UNTILED  # parts of the view that are encoded one by one, see ``tiled``

    @property
    def input_spec(self) -> InputSpec:
        """What a decoded picture must look like to be fed to this encoder."""
        from .images import InputSpec

        return InputSpec(self.input_size, self.resize_mode, self.interpolation)

    @property
    def display_name(self) -> str:
        """How to call the model in a message."""
        return f"{self.model} ({self.pretrained})" if self.pretrained else self.model

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        grids = {"grid": list(self.grid), "tiles": list(self.tiles)}
        return dataclasses.asdict(self) | grids

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EncoderSpec:
        """Read what ``to_dict`` wrote.

        Raises:
            KeyError, TypeError: a field is missing or of the wrong kind.
        """
        fields = {"tiles": (1, 1)} | fields  # early indexes do not say
        known = {field.name: fields[field.name] for field in dataclasses.fields(cls)}
        for name in ("grid", "tiles"):
            known[name] = Grid(*known[name])
        for name in ("input_size", "mean", "std"):
            known[name] = tuple(known[name])
        return cls(**known)


class TextEncoder:
    """The text half of a model: all that a query needs.

    Args:
        tower: maps token ids (Q, L) to pooled (Q, D) and token states (Q, L, C).
        tokenizer: maps texts to ids (Q, L), a mask (Q, L) and the token strings of each text.
        device: where the tower lies.
    """

    def __init__(self, tower: Any, tokenizer: Any, device: torch.device) -> None:
        self._tower = tower
        self._tokenize = tokenizer
        self.device = device

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> TextFeatures:
        """Encode texts; the result is padded to the longest of them, not to the model's context."""
        import torch
        import torch.nn.functional as F

        pooled_parts, token_parts, mask_parts, words = [], [], [], []
        for start in range(0, len(texts), batch_size):
            ids, mask, batch_words = self._tokenize(list(texts[start : start + batch_size]))
            with torch.inference_mode():
                pooled, tokens = self._tower(ids.to(self.device))  # (q, D), (q, L, C)
            pooled_parts.append(F.normalize(pooled.float(), dim=-1))  # (q, D)
            longest = int(mask.sum(1).max())
            token_parts.append(tokens[:, :longest].float())  # (q, T, C)
            mask_parts.append(mask[:, :longest].to(self.device))  # (q, T)
            words.extend(batch_words)
        longest = max(part.shape[1] for part in mask_parts)
        return TextFeatures(
            texts=tuple(texts),
            pooled=torch.cat(pooled_parts),
            tokens=torch.cat([F.pad(t, (0, 0, 0, longest - t.shape[1])) for t in token_parts]),
            mask=torch.cat([F.pad(m, (0, longest - m.shape[1])) for m in mask_parts]),
            words=tuple(words),
        )


class Encoder:
    """Both halves of a model. Make one with ``load_encoder``."""

    def __init__(
        self, spec: EncoderSpec, model: nn.Module, text: TextEncoder, device: torch.device
    ) -> None:
        from .image_tower import image_tower, tiled

        self.spec = spec
        self.device = device
        self._visual: Any = model.visual
        tower = image_tower(self._visual, spec.patch_kind)
        self._tower = tiled(tower, spec.tiles, spec.interpolation)
        self._text: TextEncoder | None = text
        self.dtype: torch.dtype = next(self._visual.parameters()).dtype
        import torch

        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(spec.mean, device=device).view(shape) * 255  # (1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(shape) * 255  # (1, 3, 1, 1)

    def encode_images(self, pixels: np.ndarray) -> ImageFeatures:
        """Encode decoded pictures.

        Args:
            pixels: (N, H, W, 3) uint8 RGB at ``spec.input_size``.

        Returns:
            Pooled vectors and patch features as float32 on the encoder's device.
        """
        import numpy as np
        import torch
        import torch.nn.functional as F

        # torch warns of arrays it could not write to; few are, and those few are copied
        batch = torch.from_numpy(np.require(pixels, requirements="W"))  # (N, H, W, 3) uint8
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)  # (N, H, W, 3)
        images = batch.to(self.device).permute(0, 3, 1, 2)  # (N, 3, H, W), channels-last strides
        images = ((images.float() - self._mean) / self._std).to(self.dtype)  # (N, 3, H, W)
        with torch.inference_mode():
            pooled, patches, grid = self._tower(images)  # (N, D), (N, P, C)
        return ImageFeatures(F.normalize(pooled.float(), dim=-1), patches.float(), grid)

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Encode texts; see TextEncoder.encode_texts."""
        return self.text.encode_texts(texts)

    @property
    def text(self) -> TextEncoder:
        """The text half.

        Raises:
            ValueError: it was dropped.
        """
        if self._text is None:
            raise ValueError("this encoder has no text half any more")
        return self._text

    def drop_text(self) -> Encoder:
        """Free the text half's memory, where nothing but pictures is left to encode."""
        self._text = None
        return self


def load_encoder(
    model: str = "auto",
    pretrained: str | None = None,
    *,
    device: str | None = None,
    precision: str = "auto",
    patch_kind: str = "aligned",
    tiles: Grid = UNTILED,
) -> Encoder:
    """Load any open_clip model with all its weights.

    Args:
        model: "auto", "bundled", an open_clip name, "hf-hub:ORG/NAME" or "local-dir:FOLDER".
        pretrained: a tag of that model or the path of a checkpoint; only with a plain name.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        precision: "auto", "fp32", "bf16" or "fp16", for the image tower.
        patch_kind: "aligned" or "penultimate", see ``image_tower``.
        tiles: finer patches from a view so many times larger in height and width, see ``tiled``.

    Raises:
        ModelError: unknown name or tag (the nearest valid ones are listed), weights that cannot
            be had, or weights that do not fill the model (what is missing is listed).
    """
    where = choose_device(device)
    dtype = choose_dtype(where, precision)
    if model == "auto":
        model, pretrained, _ = models.resolve_auto()
    name, pretrained, weights = _locate(model, pretrained)
    net, preprocess = _create(name, pretrained)
    import torch

    net = net.eval().requires_grad_(False)
    text = _text_encoder(name, net, where)
    visual: Any = net.visual
    visual.to(device=where, dtype=dtype, memory_format=torch.channels_last)
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    shapes = _probe(visual, text, patch_kind, where, dtype, (height, width))
    spec = EncoderSpec(
        model=name,
        pretrained=pretrained,
        weights_hash=models.hash_weights(weights),
        patch_kind=patch_kind,
        **shapes | {"grid": shapes["grid"].refine(tiles)},
        input_size=(height * tiles.height, width * tiles.width),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        interpolation=preprocess["interpolation"],
        resize_mode=preprocess["resize_mode"],
        tiles=tiles,
    )
    return Encoder(spec, net, text, where)


def encoder_for(spec: EncoderSpec, device: str | None = None, precision: str = "auto") -> Encoder:
    """Load the encoder an index was made with.

    Raises:
        ModelError: it cannot be had any more, or its weights have changed since.
    """
    encoder = load_encoder(
        spec.model,
        spec.pretrained,
        device=device,
        precision=precision,
        patch_kind=spec.patch_kind,
        tiles=spec.tiles,
    )
    _refuse_other_weights(spec, encoder.spec.weights_hash)
    return encoder


def load_text_encoder(spec: EncoderSpec, device: str | None = None) -> TextEncoder:
    """Load the text half of an index's encoder, without open_clip's import where that can be.

    Raises:
        ModelError: it cannot be had any more, or its weights have changed since.
    """
    if models.is_local_dir(spec.model):
        folder = models.local_dir(spec.model)
        weights = models.find_weights(folder)
        _refuse_other_weights(spec, models.hash_weights(weights))
        if fast := _bert_text_encoder(folder, choose_device(device)):
            return fast
    encoder = encoder_for(spec, device)
    return encoder.text


def refuse_other_model(spec: EncoderSpec, model: str, pretrained: str | None) -> None:
    """See that a model asked for by name is the one an index was made with, without loading it.

    Raises:
        BadIndex: it is another.
        ModelError: there is no such model, or its weights cannot be had.
    """
    name, pretrained, weights = _locate(model, pretrained)
    if models.hash_weights(weights) != spec.weights_hash:
        asked = f"{name} ({pretrained})" if pretrained else name
        raise BadIndex(
            f"the index was made with {spec.display_name}, not {asked}",
            "Leave --model out, or use another --index.",
        )


def _refuse_other_weights(spec: EncoderSpec, found: str) -> None:
    if found != spec.weights_hash:
        raise ModelError(
            f"the weights of {spec.display_name} are not those the index was made with "
            f"(sha256 {found[:12]}…, index {spec.weights_hash[:12]}…)",
            "Bring the old weights back, or make the index anew with `mmsearch index --rebuild`.",
        )


def _locate(model: str, pretrained: str | None) -> tuple[str, str | None, Path]:
    """Check the names and return them, made absolute, with the weights file."""
    if models.is_local_dir(model):
        folder = models.local_dir(model).expanduser().resolve()
        if not (folder / "open_clip_config.json").is_file():
            raise ModelError(
                f"no open_clip_config.json in {folder}",
                "local-dir: takes a folder with open_clip_config.json and its weights.",
            )
        name = model if model == models.BUNDLED else f"local-dir:{folder}"
        return name, None, models.find_weights(folder)
    if model.startswith("hf-hub:"):
        from open_clip.pretrained import download_pretrained_from_hf

        try:
            return model, None, Path(download_pretrained_from_hf(model.removeprefix("hf-hub:")))
        except Exception as error:  # the hub's client raises dozens of kinds
            raise _unreachable(model, error) from error
    import open_clip

    if open_clip.get_model_config(model) is None:
        raise models.unknown_model(model)
    if pretrained and Path(pretrained).expanduser().is_file():
        file = Path(pretrained).expanduser().resolve()
        return model, str(file), file
    config = open_clip.get_pretrained_cfg(model, pretrained or "")
    if not config:
        raise models.unknown_tag(model, pretrained)
    from open_clip.pretrained import download_pretrained

    try:
        return model, pretrained, Path(download_pretrained(config))
    except Exception as error:
        raise _unreachable(f"{model} ({pretrained})", error) from error


def _unreachable(name: str, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"cannot fetch the weights of {name}: {reason}",
        "Check the name and the network, give a local checkpoint, or use --model bundled.",
    )


def _create(name: str, pretrained: str | None) -> tuple[Any, dict[str, Any]]:
    """Let open_clip build the model and load all its weights."""
    import open_clip

    extra: dict[str, Any] = {}
    source = name
    if models.is_local_dir(name):
        folder = models.local_dir(name)
        source = f"local-dir:{folder}"
        try:
            config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
            text_cfg = config["model_cfg"]["text_cfg"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{folder / 'open_clip_config.json'} is no open_clip config: {error}",
                "It must hold model_cfg with vision_cfg and text_cfg.",
            ) from error
        if (folder / text_cfg.get("hf_model_name", "-")).is_dir():
            # A text tower described inside the folder: open_clip wants a path that holds from
            # anywhere, and its weights come from the checkpoint, not from a hub.
            where = str(folder / text_cfg["hf_model_name"])
            extra["text_cfg"] = text_cfg | {"hf_model_name": where, "hf_model_pretrained": False}
    try:
        with _quiet():
            net: Any = open_clip.create_model(
                source,
                pretrained=pretrained,
                precision="fp32",
                pretrained_image=False,
                pretrained_text=False,
                force_custom_text=True,
                require_pretrained=True,
                weights_only=True,
                **extra,
            )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"the weights do not fill model {name}: {_first_lines(error)}",
            "The checkpoint is of another architecture or damaged.",
        ) from error
    return net, dict(open_clip.get_model_preprocess_cfg(net))


def _first_lines(error: Exception, limit: int = 600) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]}…"


@contextmanager
def _quiet():
    """Keep open_clip's log and warnings off the screen; what matters is raised as an error."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _probe(visual, text, patch_kind, device, dtype, size) -> dict[str, Any]:
    """Learn the shapes by encoding one grey picture and one word."""
    import torch

    from .image_tower import image_tower

    with torch.inference_mode():
        blank = torch.zeros(1, 3, *size, device=device, dtype=dtype)  # (1, 3, H, W)
        pooled, patches, grid = image_tower(visual, patch_kind)(blank)
    words = text.encode_texts(["a"])
    return {
        "embed_dim": pooled.shape[-1],
        "patch_dim": patches.shape[-1],
        "text_dim": words.tokens.shape[-1],
        "grid": grid,
    }


def _text_encoder(name: str, net: Any, device: torch.device) -> TextEncoder:
    if models.is_local_dir(name) and (fast := _bert_text_encoder(models.local_dir(name), device)):
        return fast
    import open_clip

    source = f"local-dir:{models.local_dir(name)}" if models.is_local_dir(name) else name
    with _quiet():
        tokenizer = open_clip.get_tokenizer(source)
    tower = net.text.to(device)
    tower.output_tokens = True
    return TextEncoder(tower, _OpenClipTokenizer(tokenizer, tower), device)


def _bert_text_encoder(folder: Path, device: torch.device) -> TextEncoder | None:
    """Return a fast text half for a folder whose text tower is a plain BERT, else None."""
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    text_cfg = config["text_cfg"]
    text_dir = folder / text_cfg.get("hf_model_name", "-")
    tokenizer_file = folder / "tokenizer.json"
    weights = models.find_weights(folder)
    is_plain_bert = (
        (text_dir / "config.json").is_file()
        and json.loads((text_dir / "config.json").read_text(encoding="utf-8"))["model_type"]
        == "bert"
        and text_cfg.get("hf_pooler_type") == "mean_pooler"
        and text_cfg.get("hf_proj_type") == "linear"
        and weights.suffix == ".safetensors"
    )
    if not is_plain_bert or not tokenizer_file.is_file():
        return None
    from .text_tower import load_bert_tower

    try:
        tower = load_bert_tower(text_dir / "config.json", weights, config["embed_dim"])
    except KeyError as error:
        raise ModelError(
            f"the weights in {weights} lack {error.args[0]}",
            "The checkpoint is of another architecture or damaged.",
        ) from error
    tokenizer = _WordPieceTokenizer(tokenizer_file, text_cfg.get("context_length", 77))
    return TextEncoder(tower.to(device), tokenizer, device)


class _WordPieceTokenizer:
    """A ``tokenizer.json``, padded to the longest text of the batch."""

    def __init__(self, file: Path, context_length: int) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.enable_truncation(context_length)
        self._tokenizer.enable_padding(pad_id=self._tokenizer.token_to_id("[PAD]") or 0)

    def __call__(
        self, texts: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, list[tuple[str, ...]]]:
        import torch

        encoded = self._tokenizer.encode_batch([" ".join(text.split()) for text in texts])
        ids = torch.tensor([each.ids for each in encoded])  # (Q, T)
        mask = torch.tensor([each.attention_mask for each in encoded]).bool()  # (Q, T)
        words = [tuple(each.tokens[: sum(each.attention_mask)]) for each in encoded]
        return ids, mask, words


class _OpenClipTokenizer:
    """open_clip's tokenizers, with the mask and the token strings they do not give."""

    def __init__(self, tokenizer: Any, tower: Any) -> None:
        self._tokenizer = tokenizer
        inner: Any = getattr(tokenizer, "tokenizer", None)
        if hasattr(inner, "pad_token_id"):
            self._pad = inner.pad_token_id or 0
            self._word = inner.convert_ids_to_tokens
        else:
            self._pad = getattr(tower, "pad_id", 0)
            decoder = getattr(tokenizer, "decoder", {})
            self._word = lambda ids: [decoder.get(each, str(each)) for each in ids]

    def __call__(
        self, texts: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, list[tuple[str, ...]]]:
        ids = self._tokenizer(texts)  # (Q, L)
        # Up to the last token that is no padding: CLIP's padding has the number of its token "!".
        mask = (ids != self._pad).flip(1).cumsum(1).flip(1) > 0  # (Q, L)
        mask[:, 0] = True  # an empty text still has its first position
        words = [
            tuple(self._word(row[: int(kept.sum())].tolist()))
            for row, kept in zip(ids, mask, strict=True)
        ]
        return ids, mask, words
