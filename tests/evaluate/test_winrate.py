"""Intervals, win rates and text metrics against hand values and enumeration."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from punster.algorithms.bestofn import best_of_win_share
from punster.evaluate.metrics import copy_rate, distinct_n
from punster.evaluate.winrate import bootstrap, win_share


def test_win_share_by_hand() -> None:
    assert win_share([1.0, 3.0], [2.0]) == 0.5
    assert win_share([2.0], [2.0, 1.0]) == 0.75
    assert win_share([0.0], [1.0]) + win_share([1.0], [0.0]) == 1.0


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_win_share_is_the_enumeration(n: int) -> None:
    """Best of n by a proxy against a sample that is not among the n, over all choices."""
    proxy, gold = [0.1, 0.9, 0.4, 0.7, 0.2], [0.3, 0.1, 0.9, 0.5, 0.2]
    wins = []
    for subset in combinations(range(5), n):
        best = max(subset, key=lambda i: proxy[i])
        wins += [float(gold[best] > gold[other]) for other in range(5) if other not in subset]
    assert best_of_win_share(proxy, gold, n) == pytest.approx(sum(wins) / len(wins))
    assert best_of_win_share(gold, gold, n) == pytest.approx(n / (n + 1))


def test_best_of_win_share_needs_an_opponent() -> None:
    with pytest.raises(ValueError, match="more than 3"):
        best_of_win_share([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 3)


def test_bootstrap_covers_a_planted_mean() -> None:
    source = random.Random(3)
    inside = 0
    for trial in range(300):
        value = bootstrap([float(source.random() < 0.6) for _ in range(100)], seed=trial, resamples=400)
        inside += value["low"] <= 0.6 <= value["high"]
    assert 0.91 <= inside / 300 <= 0.98


def test_bootstrap_is_seeded_and_ordered() -> None:
    value = bootstrap([0.0, 1.0, 2.0, 3.0], seed=5)
    assert value == bootstrap([0.0, 1.0, 2.0, 3.0], seed=5)
    assert value["low"] < value["mean"] == 1.5 < value["high"]
    assert bootstrap([2.0, 2.0, 2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0}


def test_distinct_and_copies_by_hand() -> None:
    assert distinct_n(["a b c", "a b d"], 2) == 3 / 4
    assert distinct_n([], 2) == 0
    training = ["the cat sat on the mat", "dogs bark at night"]
    assert copy_rate(["The cat sat on a mat!", "dogs sing at dawn", "dogs bark at night."], training) == pytest.approx(2 / 3)
    assert copy_rate(["something else"], training) == 0
