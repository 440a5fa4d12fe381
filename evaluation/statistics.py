"""How sure a figure is: bootstrap intervals and a paired randomisation test, both by cluster.

The five captions of one photograph are not five independent queries: where a photograph is hard,
it is hard for all five. So whole clusters (images) are resampled, and whole clusters swap sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2_000
PERMUTATIONS = 10_000
_CHUNK = 4 << 20  # numbers drawn at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """How much a figure changed, the 95% interval of that, and how likely chance explains it."""

    value: float
    low: float
    high: float
    p: float


class Clusters:
    """Q queries in G clusters, and the same random draws of them for every figure.

    Args:
        labels: (Q,) the cluster of each query, any integers.
        seed: of the draws.
        resamples: how many bootstrap samples.
        permutations: how many random flips a test makes.
    """

    def __init__(
        self,
        labels: np.ndarray,
        seed: int,
        resamples: int = RESAMPLES,
        permutations: int = PERMUTATIONS,
    ) -> None:
        _, self.rows, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        self.sizes = sizes.astype(np.float64)  # (G,)
        self.seed = seed
        self.resamples = resamples
        self.permutations = permutations

    def estimates(self, columns: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
        """Mean and percentile bootstrap interval of each column of (Q,) values."""
        sums = self._sums(columns)  # (G, V)
        means = np.concatenate(
            [counts @ sums / (counts @ self.sizes)[:, None] for counts in self._samples()]
        )  # (resamples, V)
        low, high = np.quantile(means, (0.025, 0.975), axis=0)  # (V,), (V,)
        return {
            name: Estimate(float(np.mean(values)), float(low[at]), float(high[at]))
            for at, (name, values) in enumerate(columns.items())
        }

    def median(self, values: np.ndarray) -> Estimate:
        """Median of (Q,) values; of an even number the lower of the two in the middle."""
        order = np.argsort(values, kind="stable")
        ordered, rows = values[order], self.rows[order]
        medians = []
        for counts in self._samples():
            reached = counts[:, rows].cumsum(axis=1)  # (B, Q) queries drawn up to each value
            medians.append(ordered[(2 * reached >= reached[:, -1:]).argmax(axis=1)])
        low, high = np.quantile(np.concatenate(medians), (0.025, 0.975))
        return Estimate(float(ordered[(len(ordered) - 1) // 2]), float(low), float(high))

    def differences(
        self, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
    ) -> dict[str, Difference]:
        """Mean of ``after - before`` over pairs of (Q,) values, with interval and p, by column.

        p is that of a two-sided randomisation test in which clusters change sides at random:
        ``(1 + draws at least as far from zero) / (1 + draws)``, so never 0, and 1 if nothing
        changed.
        """
        changes = {name: after[name] - before[name] for name in before}
        p = self._randomisation(self._sums(changes))
        return {
            name: Difference(each.value, each.low, each.high, float(p[at]))
            for at, (name, each) in enumerate(self.estimates(changes).items())
        }

    def _sums(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Add up by cluster, (G, V)."""
        groups = len(self.sizes)
        return np.stack(
            [np.bincount(self.rows, weights=each, minlength=groups) for each in columns.values()],
            axis=1,
        )

    def _randomisation(self, sums: np.ndarray) -> np.ndarray:
        """Two-sided p of each column of (G, V) summed differences, (V,)."""
        sums = sums[(sums != 0).any(axis=1)]  # (H, V): flipping a zero changes nothing
        observed = np.abs(sums.sum(axis=0)) * (1 - 1e-12)  # (V,), rounding must not break a tie
        rng = np.random.default_rng(self.seed)
        extreme = np.zeros(sums.shape[1])
        for count in _portions(self.permutations, len(sums)):
            signs = rng.integers(0, 2, (count, len(sums))) * 2.0 - 1  # (B, H)
            extreme += (np.abs(signs @ sums) >= observed).sum(axis=0)
        return (1 + extreme) / (1 + self.permutations)

    def _samples(self) -> Iterator[np.ndarray]:
        """How often each cluster was drawn, (B, G), all resamples in portions."""
        rng = np.random.default_rng(self.seed)
        groups = len(self.sizes)
        for count in _portions(self.resamples, len(self.rows)):
            drawn = rng.integers(0, groups, (count, groups))  # (B, G)
            drawn += groups * np.arange(count)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=count * groups)
            yield counts.reshape(count, groups).astype(np.float64)


def _portions(total: int, width: int) -> Iterator[int]:
    """Split `total` draws of `width` numbers each so that a portion stays small."""
    size = max(1, _CHUNK // max(width, 1))
    for start in range(0, total, size):
        yield min(size, total - start)
