"""What a head is trained on: features of captioned pictures, computed once.

Patches stay in the codes of the index; token states are kept in half precision, without padding.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.errors import InputError
from ..core.types import Grid, TextFeatures
from .negatives import wrong_captions
from .querybank import LARGEST, Querybank

if TYPE_CHECKING:
    from ..indexing.encoder import TextEncoder
    from ..indexing.index import ImageIndex

FEWEST_PICTURES = 50
FEWEST_VALIDATION = 20  # of them; on fewer, fusion and calibration cannot be fitted
TEXTS_AT_ONCE = 256


class Captioned(NamedTuple):
    """One caption of one picture, as a caption file gives it."""

    path: Path
    text: str
    split: str | None


@dataclass(frozen=True, slots=True)
class TextStore:
    """Encoded texts without padding."""

    texts: tuple[str, ...]
    pooled: Tensor  # (K, D) float32
    tokens: tuple[Tensor, ...]  # K times (T_k, C_text) float16

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return tokens (B, T, C_text) float32 and their mask (B, T)."""
        chosen = [self.tokens[row] for row in rows]
        lengths = torch.tensor([len(each) for each in chosen])  # (B,)
        padded = pad_sequence(chosen, batch_first=True).float()  # (B, T, C_text)
        return padded, torch.arange(padded.shape[1]) < lengths.unsqueeze(1)

    def features(self, rows: Sequence[int]) -> TextFeatures:
        """Return some texts as a scorer takes them."""
        tokens, mask = self.batch(rows)  # (B, T, C_text), (B, T)
        texts = tuple(self.texts[row] for row in rows)
        words = tuple(("",) * len(self.tokens[row]) for row in rows)
        return TextFeatures(texts, self.pooled[list(rows)], tokens, mask, words)


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """M pictures and K captions, split by picture."""

    codes: Tensor  # (M, P, C) as stored, one patch a cell where cells hold one vector each
    grid: Grid  # of these P patches
    pooled: Tensor  # (M, D) float32, unit
    captions: TextStore
    owner: np.ndarray  # (K,) picture row of each caption
    wrong: TextStore  # captions broken by a rule
    wrong_of: np.ndarray  # (K,) row in ``wrong`` of a caption, -1 where no rule applied
    train: np.ndarray  # picture rows
    val: np.ndarray  # picture rows

    def bank(self, seed: int) -> Querybank:
        """Return a bank of training captions, drawn by ``seed``."""
        rows = self.captions_of(self.train)
        if len(rows) > LARGEST:
            rows = np.sort(np.random.default_rng(seed).choice(rows, LARGEST, replace=False))
        return Querybank(self.captions.pooled[rows])

    def captions_of(self, pictures: np.ndarray) -> np.ndarray:
        """Return the caption rows of some pictures, in order."""
        return np.flatnonzero(np.isin(self.owner, pictures))

    def fingerprint(self) -> str:
        """Return a sha256 (hex) that is another if captions, split or pictures are others.

        Of the pictures it takes the pooled vectors: the patches come from the same pass of the
        encoder, and reading all of them would take long.
        """
        rows = (self.owner, self.wrong_of, self.train, self.val)
        listed = [self.captions.texts, self.wrong.texts, *(each.tolist() for each in rows)]
        found = hashlib.sha256(json.dumps(listed).encode())
        found.update(self.pooled.contiguous().numpy().tobytes())
        return found.hexdigest()


def build_training_set(
    index: ImageIndex,
    captions: Sequence[Captioned],
    encoder: TextEncoder,
    *,
    val_share: float,
    text_negatives: bool,
    seed: int,
    on_texts: Callable[[int, int], None] | None = None,
) -> TrainingSet:
    """Gather the features of all captioned pictures that the index holds.

    Args:
        index: holds the pictures; those it does not hold are left out.
        captions: as read. If some are of split "val", these are the validation pictures and
            those of "test" are left out; else a share of the pictures is drawn.
        encoder: the text half of the index's encoder.
        val_share: share of the pictures to validate on, if the captions name no split.
        text_negatives: make wrong captions by rule.
        seed: for what is drawn.
        on_texts: called with (encoded, of all) texts.

    Raises:
        InputError: fewer than FEWEST_PICTURES captioned pictures are in the index, or the split
            that the captions name leaves too few to train or to validate on.
    """
    used = [each for each in captions if each.split != "test" and each.text.strip()]
    ids = {path: index.id_of(path) for path in dict.fromkeys(each.path for each in used)}
    there = [path for path, id_ in ids.items() if id_ is not None]
    rows = {path: row for row, path in enumerate(there)}
    if len(rows) < FEWEST_PICTURES:
        raise InputError(
            f"{len(rows)} of {len(ids)} captioned pictures are in the index; training needs "
            f"at least {FEWEST_PICTURES}",
            "Index the folder that the captions speak of: mmsearch index FOLDER.",
        )
    used = [each for each in used if each.path in rows]
    wanted = [ids[path] for path in rows]
    known, vectors = index.pooled()
    order = np.argsort(known)
    at = order[np.searchsorted(known[order], np.asarray(wanted))]
    owner = np.array([rows[each.path] for each in used])
    train, val = _split(used, rows, val_share, seed)
    rng = random.Random(seed)
    wrong = [wrong_captions(each.text, rng)[:1] if text_negatives else [] for each in used]
    flat = [each.text for each in used] + [text for texts in wrong for text in texts]
    store = _encode(flat, encoder, on_texts)
    wrong_of = np.where([bool(each) for each in wrong], np.cumsum([len(w) for w in wrong]) - 1, -1)
    patches = index.patches([id_ for id_ in wanted if id_ is not None])
    return TrainingSet(
        codes=patches.codes if patches.alike is None else patches.one_per_cell(),
        grid=patches.alike or patches.grid,
        pooled=torch.from_numpy(np.ascontiguousarray(vectors[at])),
        captions=_part(store, slice(0, len(used))),
        owner=owner,
        wrong=_part(store, slice(len(used), None)),
        wrong_of=wrong_of,
        train=train,
        val=val,
    )


def _split(
    used: Sequence[Captioned], rows: dict[Path, int], share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return training and validation pictures; no picture is in both.

    Raises:
        InputError: too few are left for either.
    """
    named = {rows[each.path] for each in used if each.split in ("val", "validation", "dev")}
    everything = np.arange(len(rows))
    if not named:
        count = min(1000, max(FEWEST_VALIDATION, round(share * len(rows))))
        named = set(np.random.default_rng(seed).permutation(everything)[:count].tolist())
    val = np.array(sorted(named))
    if len(val) < FEWEST_VALIDATION:
        raise InputError(
            f"{len(val)} pictures of split val are in the index; validation needs at least "
            f"{FEWEST_VALIDATION}",
            "Mark captions of more pictures as split val, or none, so that a share is drawn.",
        )
    train = np.setdiff1d(everything, val)
    if len(train) < FEWEST_PICTURES // 2:
        raise InputError(
            f"only {len(train)} pictures are left to train on; {len(val)} are for validation",
            "Give captions of more pictures, or some that are not of split val.",
        )
    return train, val


def _encode(
    texts: Sequence[str], encoder: TextEncoder, on_texts: Callable[[int, int], None] | None
) -> TextStore:
    pooled, tokens = [], []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        features = encoder.encode_texts(texts[start : start + TEXTS_AT_ONCE])
        pooled.append(features.pooled.cpu().clone())  # (B, D); a clone may be trained on
        for states, mask in zip(features.tokens.cpu(), features.mask.cpu(), strict=True):
            tokens.append(states[mask].half())  # (T_k, C_text)
        if on_texts:
            on_texts(len(tokens), len(texts))
    return TextStore(tuple(texts), torch.cat(pooled), tuple(tokens))


def _part(store: TextStore, some: slice) -> TextStore:
    return TextStore(store.texts[some], store.pooled[some], store.tokens[some])
