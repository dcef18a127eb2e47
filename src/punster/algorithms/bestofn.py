"""Best-of-n from one pool of samples: unbiased for every n, with its KL bound."""

from __future__ import annotations

import math
from collections.abc import Sequence


def kl_bound(n: int) -> float:
    """Upper bound log n - (n - 1) / n on KL(best-of-n || base) (Beirami et al. 2024, arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def selection_weights(scores: Sequence[float], n: int) -> list[float]:
    """P(sample i is the best of n drawn without replacement from the pool by score), ties shared; sums to 1.

    Sorted ascending, the i-th of N (1-based) wins with C(i - 1, n - 1) / C(N, n).
    """
    size = len(scores)
    if not 1 <= n <= size:
        raise ValueError(f"best of {n} needs a pool of at least {n} samples, got {size}")
    order = sorted(range(size), key=lambda i: scores[i])
    by_rank = [math.comb(rank, n - 1) / math.comb(size, n) for rank in range(size)]
    weights = [0.0] * size
    start = 0
    while start < size:
        end = start
        while end < size and scores[order[end]] == scores[order[start]]:
            end += 1
        share = sum(by_rank[start:end]) / (end - start)
        for rank in range(start, end):
            weights[order[rank]] = share
        start = end
    return weights


def best_of_n(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    """Expected gold value of the sample that the proxy prefers among n: the unbiased estimator over all subsets."""
    return sum(w * g for w, g in zip(selection_weights(proxy, n), gold, strict=True))


def best_of_win_share(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    """P(the proxy's best of n has more gold than a sample outside those n), ties half, over all subsets of the pool.

    Unbiased; needs a pool larger than n. With proxy = gold it is n / (n + 1). Ties of the proxy are broken by place.
    """
    size = len(proxy)
    if size <= n:
        raise ValueError(f"the win rate of best of {n} needs a pool of more than {n} samples, got {size}")
    order = sorted(range(size), key=lambda i: proxy[i])
    total = 0.0
    for rank_i, i in enumerate(order):
        for rank_j, j in enumerate(order):
            if i != j:  # i wins its n-subset, j is not in it: n - 1 others from below i, j excluded
                subsets = math.comb(rank_i - 1, n - 1) if rank_j < rank_i else math.comb(rank_i, n - 1)
                total += subsets * ((gold[i] > gold[j]) + 0.5 * (gold[i] == gold[j]))
    return total / (math.comb(size, n) * (size - n))
