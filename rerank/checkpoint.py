"""A trained head on disk: a folder with ``head.safetensors`` and ``config.json``.

The folder names the encoder whose features the head was trained on by the hash of that encoder's
weights; with any other encoder the numbers would mean nothing, so it is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ModelError
from ..core.writing import write_tensors, write_whole

if TYPE_CHECKING:
    from .heads import Head, HeadConfig
    from .querybank import Querybank

FORMAT = 1
WEIGHTS, CONFIG = "head.safetensors", "config.json"


@dataclass(frozen=True)
class Fusion:
    """How the head's rank term joins the cosine.

    ``scale * (cosine - popularity_weight * popularity) + weight * rank``; see ``querybank``.
    """

    scale: float  # what the cosine similarity is multiplied by
    weight: float = 1.0
    popularity_weight: float = 0.0  # with 0 the bank is not read
    offset: float = 0.0  # mean on val of what is added to ``scale * cosine``; stands in for
    # candidates without patches


@dataclass(frozen=True)
class Calibration:
    """Probability of a match: ``sigmoid(slope * score + bias)`` of the fused score.

    It is the probability for a text met with its picture or with another candidate at even odds,
    and it falls from hit to hit as the score does.
    """

    slope: float = 1.0
    bias: float = 0.0


@dataclass(frozen=True)
class HeadCard:
    """What a head folder says besides the weights."""

    name: str
    encoder_weights_hash: str  # sha256 hex, as in EncoderSpec
    patch_kind: str  # "aligned" | "penultimate"
    fusion: Fusion
    calibration: Calibration = field(default_factory=Calibration)
    figures: dict[str, float] = field(default_factory=dict)  # e.g. {"r1_coarse": ..., "p": ...}


def save_head(folder: Path, head: Head, card: HeadCard, bank: Querybank | None = None) -> None:
    """Write a head, its bank and its card; the config comes last, so half a folder is no head."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # of an earlier head
    state = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    write_tensors(folder / WEIGHTS, state)
    if bank is not None:
        bank.save(folder)
    values = {"format": FORMAT, "head": head.config.to_dict(), **asdict(card)}
    write_whole(folder / CONFIG, (json.dumps(values, indent=2) + "\n").encode())


def read_card(folder: Path) -> tuple[HeadConfig, HeadCard]:
    """Read a head's shape and card, without its weights.

    Raises:
        ModelError: the folder holds no head, or one this version cannot read.
    """
    from .heads import HeadConfig

    try:
        values: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ModelError(
                f"the head in {folder} was written by a newer mmsearch", "Upgrade mmsearch."
            )
        config = HeadConfig.from_dict(values.pop("head"))
        values["fusion"] = Fusion(**values["fusion"])
        values["calibration"] = Calibration(**values["calibration"])
        return config, HeadCard(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder} holds no readable head: {error}", "Train one with mmsearch train."
        ) from error


def load_head(folder: Path) -> tuple[Head, HeadCard, Querybank | None]:
    """Read a head and its bank, ready to score (evaluation mode, float32, on the CPU).

    Raises:
        ModelError: the folder holds no head, or its weights do not fit its config.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from .heads import build_head
    from .querybank import Querybank

    config, card = read_card(folder)
    head = build_head(config)
    try:
        state = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
        head.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"the weights in {folder / WEIGHTS} do not fit: {error}", "Train the head again."
        ) from error
    bank = Querybank.load(folder) if card.fusion.popularity_weight else None
    return head.eval(), card, bank
