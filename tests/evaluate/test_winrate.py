"""Intervals, win rates and text metrics against hand values and enumeration."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from punster.algorithms.bestofn import selection_weights
from punster.evaluate.metrics import copy_rate, distinct_n
from punster.evaluate.winrate import bootstrap, win_share, win_share_in_pool


def test_win_share_by_hand() -> None:
    assert win_share([1.0, 3.0], [2.0]) == 0.5
    assert win_share([2.0], [2.0, 1.0]) == 0.75
    assert win_share([0.0], [1.0]) + win_share([1.0], [0.0]) == 1.0


def test_win_share_in_pool_is_the_enumeration() -> None:
    """Best of 2 by a proxy against a third sample drawn from the rest, over all choices."""
    proxy, gold = [0.1, 0.9, 0.4, 0.7, 0.2], [0.3, 0.1, 0.9, 0.5, 0.2]
    share = win_share_in_pool(gold, selection_weights(proxy, 2))
    wins = []
    for pair in combinations(range(5), 2):
        best = max(pair, key=lambda i: proxy[i])
        wins += [float(gold[best] > gold[other]) for other in range(5) if other != best]
    assert share == pytest.approx(sum(wins) / len(wins))


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
