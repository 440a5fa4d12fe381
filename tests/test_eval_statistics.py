"""Intervals that cover, tests that hold their level, and clusters that count."""

import numpy as np
import pytest
from mmsearch.evaluation.statistics import Clusters
from scipy import stats


def test_interval_of_a_proportion_is_the_binomial_one() -> None:
    values = np.repeat([1.0, 0.0], [300, 700])
    found = Clusters(np.arange(1000), seed=0).estimates({"hit": values})["hit"]
    spread = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert found.value == 0.3
    assert found.low == pytest.approx(0.3 - spread, abs=0.004)
    assert found.high == pytest.approx(0.3 + spread, abs=0.004)


def test_copies_of_a_query_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(0)
    once = rng.random(200)
    alone = Clusters(np.arange(200), seed=1).estimates({"x": once})["x"]
    copied = Clusters(np.repeat(np.arange(200), 5), seed=1).estimates({"x": np.repeat(once, 5)})[
        "x"
    ]
    naive = Clusters(np.arange(1000), seed=1).estimates({"x": np.repeat(once, 5)})["x"]
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low)
    assert naive.high - naive.low < 0.6 * (alone.high - alone.low)


def test_intervals_cover_the_truth() -> None:
    """Over many draws of clustered data, 95% intervals hold the mean about 95% of the time."""
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        chance = rng.beta(2, 3, 80)  # an image's difficulty; the mean is 0.4
        hits = (rng.random((80, 5)) < chance[:, None]).astype(float).ravel()
        labels = np.repeat(np.arange(80), 5)
        found = Clusters(labels, seed, resamples=400).estimates({"hit": hits})["hit"]
        covered += found.low <= 0.4 <= found.high
    assert covered / 200 > 0.89


def test_randomisation_agrees_with_scipy() -> None:
    rng = np.random.default_rng(3)
    before, change = rng.random(60), rng.normal(0.1, 0.4, 60)
    ours = Clusters(np.arange(60), seed=0).differences({"x": before}, {"x": before + change})["x"]
    theirs = stats.permutation_test(
        (change,), np.mean, permutation_type="samples", n_resamples=20_000, rng=rng
    )
    assert ours.p == pytest.approx(theirs.pvalue, abs=0.012)
    assert ours.value == pytest.approx(change.mean())
    assert ours.low < ours.value < ours.high


def test_randomisation_holds_its_level() -> None:
    """Without a difference, p < 0.05 comes up in about 5% of experiments, also in clusters."""
    rng = np.random.default_rng(4)
    labels = np.repeat(np.arange(40), 5)
    rejected = naive = 0
    for seed in range(300):
        change = np.repeat(rng.normal(size=40), 5)
        zero = np.zeros(200)
        by_image = Clusters(labels, seed, resamples=2, permutations=500)
        by_query = Clusters(np.arange(200), seed, resamples=2, permutations=500)
        rejected += by_image.differences({"x": zero}, {"x": change})["x"].p < 0.05
        naive += by_query.differences({"x": zero}, {"x": change})["x"].p < 0.05
    assert rejected / 300 < 0.09
    assert naive / 300 > 0.25  # what would be claimed if captions were taken as independent


def test_no_change_and_large_change() -> None:
    clusters = Clusters(np.arange(50), seed=0)
    values = np.linspace(0, 1, 50)
    found = clusters.differences({"a": values, "b": values}, {"a": values, "b": values + 1})
    assert found["a"].p == 1.0 and found["a"].value == 0
    assert found["b"].p == 1 / 10_001 and found["b"].value == pytest.approx(1)


def test_median() -> None:
    found = Clusters(np.arange(4), seed=0).median(np.array([9, 1, 3, 7]))
    assert found.value == 3 and found.low >= 1 and found.high <= 9
    skewed = Clusters(np.repeat(np.arange(100), 5), seed=0).median(np.arange(500))
    assert skewed.value == 249 and skewed.low < 249 < skewed.high


def test_same_seed_same_figures() -> None:
    values = np.random.default_rng(0).random(30)
    once, again = (Clusters(np.arange(30) // 3, 7).estimates({"x": values}) for _ in range(2))
    assert once == again
