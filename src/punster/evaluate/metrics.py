"""What can be counted in texts: diversity, copying, length, ends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import correlation

from punster.data.leakage import jaccard

_WORD = re.compile(r"[a-z0-9']+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("’", "'"))


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Unique n-grams over all n-grams of the texts (Li et al. 2016). Falls with the number of texts: compare equal counts only."""
    grams = [tuple(w[i : i + n]) for w in map(words, texts) for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def copy_rate(texts: Sequence[str], training: Sequence[str], threshold: float = 0.6) -> float:
    """Share of texts whose token set has Jaccard >= threshold with any training text."""
    known = [set(words(text)) for text in training]
    by_word: dict[str, list[int]] = {}
    for index, tokens in enumerate(known):
        for word in tokens:
            by_word.setdefault(word, []).append(index)
    copies = 0
    for text in texts:
        tokens = set(words(text))
        candidates = {index for word in tokens for index in by_word.get(word, ())}
        copies += any(jaccard(tokens, known[index]) >= threshold for index in candidates)
    return copies / len(texts) if texts else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in range(start, end):
            found[order[place]] = (start + 1 + end) / 2
        start = end
    return found


def auc(labelled: Sequence[tuple[float, bool]]) -> float:
    """Area under the ROC curve by ranks, ties half (Mann-Whitney); nan where all labels are alike."""
    rank_sum = sum(rank for rank, (_, label) in zip(ranks([score for score, _ in labelled]), labelled, strict=True) if label)
    good = sum(label for _, label in labelled)
    bad = len(labelled) - good
    return (rank_sum - good * (good + 1) / 2) / (good * bad) if good and bad else float("nan")


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties shared; nan where one side is constant or there are fewer than two values."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}")
    if len(set(a)) < 2 or len(set(b)) < 2:
        return float("nan")
    return correlation(ranks(a), ranks(b))
