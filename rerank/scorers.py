"""Scorers behind one protocol: what decides the final order of the coarse stage's candidates.

    coarse   the cosine similarity of the pooled vectors: the order as it came
    cross    a trained head; ``co``, ``shared`` and any name given to ``mmsearch train`` likewise;
             ``cross:local`` and ``cross:hierarchical`` read a part of the patches (``sparse``)
    late     training-free: phrases of the query against text-aligned patches
    itm      ``itm:MODEL``, a Hugging Face cross-encoder over the candidates' pixels

A scorer looks at each pair of a text and a picture alone: no score depends on what else is asked
or found at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ..core.device import choose_device
from ..core.errors import ModelError, UsageError
from .checkpoint import CONFIG, HeadCard, load_head, read_card

if TYPE_CHECKING:
    from ..core.types import Grid, PatchBatch, TextFeatures
    from ..indexing.encoder import EncoderSpec
    from .heads import Head
    from .querybank import Querybank

SHIPPED = Path(__file__).parent.parent / "indexing" / "bundled" / "heads"


class Scores(NamedTuple):
    """A scorer's verdict on Q queries with N candidates each; padding scores -inf."""

    rank: Tensor  # (Q, N) float32: orders the candidates of one query
    probability: Tensor | None  # (Q, N) float32: that the text describes the picture


class Scorer(Protocol):
    """Anything that can order candidates."""

    name: str
    needs_patches: bool

    def score(
        self, text: TextFeatures, patches: PatchBatch | None, rows: Tensor, coarse: Tensor
    ) -> Scores:
        """Score every candidate of every query.

        Args:
            text: Q encoded queries.
            patches: the M distinct pictures among the candidates; None if not needed.
            rows: (Q, N) long, the row in ``patches`` of each candidate; -1 where there is none.
            coarse: (Q, N) float32, cosine similarity; -inf on padding.
        """
        ...


@dataclass(frozen=True)
class Place:
    """Where a scorer is to work: the encoder it must fit, the device, and its index's heads."""

    encoder: EncoderSpec
    device: torch.device
    heads: Path | None  # <index>/heads


# Patch values widened at once: near a CPU's cache (measured), and enough to keep a GPU busy.
VALUES_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 27}


def pictures_at_once(device: torch.device, values: int) -> int:
    """Return how many pictures to judge at once if ``values`` patch values are widened of each."""
    return max(1, VALUES_AT_ONCE.get(device.type, 1 << 22) // values)


Factory = Callable[[str, Place], Scorer]  # (what stands behind "name:", place)
REGISTRY: dict[str, Factory] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Make a scorer known by name: decorate a function from (argument, place) to a scorer."""

    def add(factory: Factory) -> Factory:
        REGISTRY[name] = factory
        return factory

    return add


class CoarseScorer:
    """The identity: the first row of every table."""

    name = "coarse"
    needs_patches = False

    def score(
        self, text: TextFeatures, patches: PatchBatch | None, rows: Tensor, coarse: Tensor
    ) -> Scores:
        """Return the coarse scores as they are."""
        return Scores(coarse, None)


class HeadScorer:
    """A trained head beside the cosine (see ``Fusion``), and a calibrated probability.

    Args:
        head: in evaluation mode; moved to the device and its dtype in place, as modules are.
        card: its fusion and calibration.
        device: where to compute. On CUDA the head runs in bfloat16: int8 codes reach 127, and
            their products would leave the range of float16.
        bank: what popularity is measured by; needed if the fusion gives it a weight.
        grid: of the pictures' patches; None if it is the one the head was trained on.
    """

    needs_patches = True

    def __init__(
        self,
        head: Head,
        card: HeadCard,
        device: torch.device,
        bank: Querybank | None = None,
        grid: Grid | None = None,
    ) -> None:
        self.name = card.name
        self.card = card
        self.bank = bank
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.trained = head.to(device, self.dtype)
        self.head = self.trained if grid is None else self.trained.for_grid(grid)
        self._of_cells: dict[Grid, Head] = {}

    def score(
        self, text: TextFeatures, patches: PatchBatch | None, rows: Tensor, coarse: Tensor
    ) -> Scores:
        """Fuse the head's terms with the cosine; a picture without patches gets a mean term."""
        assert patches is not None
        fusion, calibration = self.card.fusion, self.card.calibration
        head, codes = self.without_repeats(patches)  # codes (M, P', C)
        rank, _ = self.judge(text, codes, rows, head)  # (Q, N)
        added = fusion.weight * rank  # (Q, N)
        if self.bank is not None and len(patches.codes):
            assert patches.pooled is not None
            added = added - self.held_back(patches.pooled)[rows.clamp_min(0)]  # (Q, N)
        there = rows >= 0  # (Q, N)
        fused = fusion.scale * coarse + torch.where(there, added, fusion.offset)  # (Q, N)
        logit = calibration.slope * fused + calibration.bias  # (Q, N)
        return Scores(fused, torch.where(there, logit.sigmoid(), torch.nan))

    @torch.inference_mode()
    def judge(
        self, text: TextFeatures, codes: Tensor, rows: Tensor, head: Head | None = None
    ) -> tuple[Tensor, Tensor]:
        """Judge pairs, texts of one length together, so that nothing is padded.

        Args:
            text: Q texts.
            codes: (M, P, C) stored patches.
            rows: (Q, N) long, the picture of each pair; -1 for none.
            head: for a grid of patches other than the scorer's own.

        Returns:
            Rank term and match logit on the CPU, (Q, N) each; zero where there is no picture.
        """
        head = head or self.head
        rank = torch.zeros(rows.shape, device=self.device)  # (Q, N)
        match = torch.zeros_like(rank)  # (Q, N)
        if len(codes) == 0 or rows.numel() == 0:
            return rank.cpu(), match.cpu()
        codes = codes.to(self.device)  # (M, P, C)
        tokens = text.tokens.to(self.device, self.dtype)  # (Q, T, C_text)
        safe = rows.clamp_min(0).to(self.device)  # (Q, N)
        room = pictures_at_once(self.device, head.patches_read() * codes.shape[-1])
        for queries, length, columns in _batches(text.mask, rows.shape[1], room):
            queries = queries.to(self.device)  # (G,)
            said = tokens[queries, :length]  # (G, T, C_text), T = length: no padding
            mask = said.new_ones(said.shape[:2], dtype=torch.bool)  # (G, T)
            output = head.judge(said, mask, codes[safe[queries, columns]])
            rank[queries, columns] = output.rank.float()  # (G, n)
            match[queries, columns] = output.match.float()  # (G, n)
        return rank.cpu(), match.cpu()

    def held_back(self, pooled: Tensor) -> Tensor:
        """Return what popularity takes off the score of pictures (M, D), (M,)."""
        if self.bank is None:
            return torch.zeros(len(pooled))  # (M,)
        fusion = self.card.fusion
        popularity = self.bank.popularity(pooled, fusion.scale)  # (M,)
        return fusion.scale * fusion.popularity_weight * popularity  # (M,)

    def without_repeats(self, patches: PatchBatch) -> tuple[Head, Tensor]:
        """Return the head and codes (M, P', C) to judge: one patch a cell where one stands for all.

        The scores are those of all P patches, at a fraction of the cost (``Head.for_grid``). A
        selection reads a part of them by rules of its own, so it is given them all.
        """
        cells = patches.alike
        selective = getattr(self.trained, "selection", None) is not None
        if cells is None or selective or not self.trained.config.grid.divides(cells):
            return self.head, patches.codes
        if cells not in self._of_cells:
            self._of_cells[cells] = self.trained.for_grid(cells)
        return self._of_cells[cells], patches.one_per_cell()


def _batches(mask: Tensor, candidates: int, room: int) -> Iterator[tuple[Tensor, int, slice]]:
    """Yield (queries (G,), their common length, candidate columns): at most ``room`` pairs."""
    step = min(room, max(candidates, 1))
    lengths = mask.sum(dim=1).cpu()  # (Q,)
    for length in lengths.unique().tolist():
        queries = (lengths == length).nonzero().squeeze(1)  # (count,)
        for some in queries.split(max(1, room // step)):
            for start in range(0, candidates, step):
                yield some, length, slice(start, start + step)


def refuse_argument(name: str, argument: str) -> None:
    """Refuse what stands behind "name:" where nothing may.

    Raises:
        UsageError: something does.
    """
    if argument:
        raise UsageError(f"scorer {name!r} takes no {argument!r}", f"Say --scorer {name}.")


@register("coarse")
def _coarse(argument: str, place: Place) -> Scorer:
    refuse_argument("coarse", argument)
    return CoarseScorer()


def load_scorer(
    name: str,
    encoder: EncoderSpec,
    *,
    device: str | torch.device | None = None,
    folder: Path | None = None,
) -> Scorer:
    """Return the scorer called ``name`` for pictures encoded by ``encoder``.

    Args:
        name: a registered name (``coarse``, ``late``, ``itm:MODEL``), the name of a head that
            ships with mmsearch or lies in ``folder``, or the path of a head's folder; a cross
            head's may be followed by ``:local`` or ``:hierarchical``.
        encoder: the index's encoder.
        device: None takes the best there is.
        folder: where the index keeps its heads, ``<index>/heads``; looked into first.

    Raises:
        ModelError: the head was trained on another encoder, or on a grid that does not divide
            the encoder's.
        UsageError: no scorer of that name, or none that reads patches in the way named.
    """
    from . import itm, late  # noqa: F401  both register themselves

    place = Place(encoder, choose_device(str(device) if device else None), folder)
    kind, _, argument = name.partition(":")
    if kind in REGISTRY and not (Path(name) / CONFIG).is_file():
        return REGISTRY[kind](argument, place)
    name, rule = _split_rule(name)
    path = _find_head(name, place)
    head, card, bank = load_head(path)
    if rule:
        card = replace(card, name=f"{card.name}:{rule}")
        _read_part(head, rule, name)
    return HeadScorer(head, card, place.device, bank, encoder.grid)


def _split_rule(name: str) -> tuple[str, str]:
    """Split "cross:local" into the head's name and how it is to read patches, "" for all."""
    head, colon, rule = name.rpartition(":")
    whole = not colon or (Path(name) / CONFIG).is_file()  # a folder's own name may hold a colon
    return (name, "") if whole else (head, rule)


def _read_part(head: Head, rule: str, name: str) -> None:
    """Let a head read a part of the patches, by the rule named.

    Raises:
        UsageError: there is no such rule, or it is not for this kind of head.
    """
    from .heads import CrossHead
    from .sparse import SELECTIONS

    if not isinstance(head, CrossHead):
        raise UsageError(
            f"scorer {name!r} is a {head.config.kind} head, and those read all patches",
            f"Say --scorer {name}; only cross heads know {', '.join(SELECTIONS)}.",
        )
    if rule not in SELECTIONS:
        known = ", ".join(f"{name}:{each}" for each in SELECTIONS)
        raise UsageError(f"scorer {name!r} knows no way {rule!r} to read patches", f"Say {known}.")
    head.selection = SELECTIONS[rule]()


def default_scorer_name(encoder: EncoderSpec, folder: Path | None = None) -> str:
    """Return "cross" when a head of that name fits the encoder and can be read, else "coarse"."""
    for path in _folders_of("cross", folder):
        try:
            if _fits(path, encoder):
                return "cross"
        except ModelError:
            break  # damaged: by its name it would be an error, whatever comes after it
    return "coarse"


@dataclass(frozen=True)
class ScorerInfo:
    """One line of ``mmsearch models --scorers``."""

    name: str
    needs: str
    fits: bool  # whether it can be used with the given encoder
    figures: dict[str, float]  # as measured when trained; empty when untrained


def list_scorers(
    encoder: EncoderSpec | None = None, folder: Path | None = None
) -> list[ScorerInfo]:
    """List the registered scorers, then an index's heads and those that ship, if readable."""
    infos = [
        ScorerInfo("coarse", "nothing", True, {}),
        ScorerInfo("late", "text-aligned patches", _aligned(encoder), {}),
        ScorerInfo("itm:MODEL", "the pictures and mmsearch[transformers]", True, {}),
    ]
    for root in filter(None, (folder, SHIPPED)):
        for config in sorted(root.glob(f"*/{CONFIG}")):
            try:
                _, card = read_card(config.parent)
            except ModelError:
                continue  # damaged: one head must not hide the others
            fits = encoder is None or _fits(config.parent, encoder)
            infos.append(ScorerInfo(card.name, "patches of its own encoder", fits, card.figures))
    return infos


def _aligned(encoder: EncoderSpec | None) -> bool:
    return encoder is None or encoder.patch_kind == "aligned"


def _folders_of(name: str, folder: Path | None) -> list[Path]:
    """Return the folders that could hold the head ``name``, an index's own before shipped ones."""
    roots = [root for root in (folder, SHIPPED) if root is not None]
    return [root / name for root in roots if (root / name / CONFIG).is_file()]


def _fits(path: Path, encoder: EncoderSpec) -> bool:
    return _same_patches(path, encoder) and read_card(path)[0].grid.divides(encoder.grid)


def _same_patches(path: Path, encoder: EncoderSpec) -> bool:
    """Whether a head was trained on patches of this encoder, whatever their grid."""
    _, card = read_card(path)
    same = card.encoder_weights_hash == encoder.weights_hash
    return same and card.patch_kind == encoder.patch_kind


def _find_head(name: str, place: Place) -> Path:
    """Return the first folder of that name whose head fits the encoder."""
    if (Path(name) / CONFIG).is_file():
        found = [Path(name)]
    elif "/" in name or "\\" in name:
        raise ModelError(f"no head in {name}", "Give the folder that mmsearch train wrote.")
    else:
        found = _folders_of(name, place.heads)
    if not found:
        known = sorted({info.name for info in list_scorers(folder=place.heads)})
        raise UsageError(f"unknown scorer {name!r}", f"Known here: {', '.join(known)}.")
    for path in found:
        if _fits(path, place.encoder):
            return path
    for path in found:
        if _same_patches(path, place.encoder):
            return path  # its grid does not fit, which ``Head.for_grid`` says best
    raise ModelError(
        f"scorer {name!r} was trained on another encoder than this index's {place.encoder.model}",
        "Use --no-rerank, or train one: mmsearch train CAPTIONS --index DIR.",
    )
