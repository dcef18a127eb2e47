"""The best-of-n estimator against the enumeration of all subsets, and the KL bound's figures."""

from __future__ import annotations

from itertools import combinations

import pytest

from punster.algorithms.bestofn import best_of_n, kl_bound, selection_weights

POOLS = {
    "distinct": [0.3, -1.0, 2.0, 0.7, 1.1, -0.2],
    "ties": [1.0, 0.0, 1.0, 2.0, 2.0, 0.0],
    "top tie": [5.0, 1.0, 5.0, 5.0, 2.0, 3.0],
    "all equal": [4.0] * 6,
}
GOLD = [0.9, -2.0, 3.5, 0.1, 7.0, -1.3]


def enumerated(proxy: list[float], gold: list[float], n: int) -> float:
    """Mean over all n-subsets of the mean gold value of those that the proxy ranks first in the subset."""
    total, count = 0.0, 0
    for subset in combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        winners = [gold[i] for i in subset if proxy[i] == best]
        total, count = total + sum(winners) / len(winners), count + 1
    return total / count


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("n", range(1, 7))
def test_estimator_equals_enumeration(pool: str, n: int) -> None:
    assert best_of_n(POOLS[pool], GOLD, n) == pytest.approx(enumerated(POOLS[pool], GOLD, n), abs=1e-12)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("n", range(1, 7))
def test_weights_are_a_distribution_and_ties_share(pool: str, n: int) -> None:
    scores = POOLS[pool]
    weights = selection_weights(scores, n)
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    for i in range(6):
        for j in range(6):
            if scores[i] == scores[j]:
                assert weights[i] == weights[j]
            elif scores[i] > scores[j]:
                assert weights[i] >= weights[j]


def test_ends_are_the_mean_and_the_maximum() -> None:
    proxy = POOLS["distinct"]
    assert best_of_n(proxy, GOLD, 1) == pytest.approx(sum(GOLD) / 6)
    assert best_of_n(proxy, GOLD, 6) == GOLD[proxy.index(max(proxy))]
    figures = [best_of_n(proxy, proxy, n) for n in range(1, 7)]
    assert figures == sorted(figures)


@pytest.mark.parametrize("n", [0, 7])
def test_a_pool_that_is_too_small_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="pool"):
        selection_weights(GOLD, n)


@pytest.mark.parametrize(("n", "figure"), [(1, 0.0), (2, 0.19), (4, 0.64), (8, 1.20), (16, 1.84)])
def test_kl_bound_figures(n: int, figure: float) -> None:
    assert kl_bound(n) == pytest.approx(figure, abs=0.005)
