"""What can be counted in texts: diversity, copying, length, ends."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from statistics import correlation

import numpy as np

from punster.data.leakage import Index

_WORD = re.compile(r"(?:[^\W_]|')+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("’", "'"))


def ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Unique n-grams over all n-grams of the texts (Li et al. 2016). Falls with the number of texts: compare equal counts only."""
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def copy_rate(texts: Sequence[str], training: Sequence[str], threshold: float = 0.6) -> float:
    """Share of texts whose token set has Jaccard >= threshold with any training text."""
    known = Index([frozenset(words(text)) for text in training], threshold)
    copies = sum(bool(known.near(frozenset(words(text)))) for text in texts)
    return copies / len(texts) if texts else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: list[float] = (counts.cumsum() - (counts - 1) / 2)[place].tolist()
    return found


def auc(labelled: Sequence[tuple[float, bool]]) -> float:
    """Area under the ROC curve by ranks, ties half (Mann-Whitney); nan where all labels are alike."""
    rank_sum = sum(rank for rank, (_, label) in zip(ranks([score for score, _ in labelled]), labelled, strict=True) if label)
    good = sum(label for _, label in labelled)
    bad = len(labelled) - good
    return (rank_sum - good * (good + 1) / 2) / (good * bad) if good and bad else float("nan")


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties shared; nan where one side is constant or there are fewer than two values."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return float("nan")
    return correlation(ranks(a), ranks(b))
