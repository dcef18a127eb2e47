"""Near-duplicates by token sets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Generic, TypeVar

import numpy as np

Key = TypeVar("Key", int, str)
Words = frozenset[str]
NEAR = 0.5  # token-set Jaccard from which two texts count as versions of one

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> Words:
    """The token set of a text: lower-case runs of letters and digits, so "don't", "don ' t" and "don t" are alike."""
    return frozenset(_WORD.findall(text.lower()))


def jaccard(a: Set[str], b: Set[str]) -> float:
    """Shared over all elements; 0 of two empty sets."""
    return len(a & b) / len(a | b) if a or b else 0.0


class Index:
    """Token sets in which those near to another one are found: an inverted index counts what it shares with each of them."""

    def __init__(self, sets: Iterable[Words], threshold: float = NEAR) -> None:
        self.threshold = threshold
        self.sets = list(sets)
        self._known: dict[str, bool] = {}  # what `has_near` has found: a text is in many rows
        self.sizes = np.array([len(members) for members in self.sets], dtype=np.int64)
        postings: dict[str, list[int]] = {}
        for place, members in enumerate(self.sets):
            for word in members:
                postings.setdefault(word, []).append(place)
        self.postings = {word: np.array(places, dtype=np.int64) for word, places in postings.items()}

    def near(self, members: Words) -> list[int]:
        """Places of the sets near to this one, in order."""
        found = [self.postings[word] for word in members if word in self.postings]
        needed = max(1, math.ceil(self.threshold * len(members) - 1e-9))  # so many words a set this near shares at least
        if len(found) < needed:
            return []
        counts = np.bincount(np.concatenate(found))
        places = np.flatnonzero(counts >= needed)
        shared = counts[places]
        near: list[int] = places[shared / (self.sizes[places] + len(members) - shared) >= self.threshold].tolist()
        return near

    def has_near(self, text: str) -> bool:
        if text not in self._known:
            self._known[text] = bool(self.near(words(text)))
        return self._known[text]

    def pairs(self) -> Iterator[tuple[int, int]]:
        """All pairs of near sets, each once, as places, the lower first."""
        for place, members in enumerate(self.sets):
            yield from ((other, place) for other in self.near(members) if other < place)


class Ties(Generic[Key]):
    """Keys that were tied, directly or through others, have one root: the least of them, in whatever order they were tied."""

    def __init__(self) -> None:
        self.above: dict[Key, Key] = {}

    def root(self, key: Key) -> Key:
        while (above := self.above.setdefault(key, key)) != key:
            self.above[key] = self.above[above]
            key = above
        return key

    def tie(self, a: Key, b: Key) -> None:
        low, high = sorted((self.root(a), self.root(b)))
        self.above[high] = low


def near_groups(texts: Sequence[str], lemmas: Sequence[str | None] = ()) -> list[int]:
    """For each text the lowest place of its group: texts near to each other, or of the same pun-word lemma, and so on."""
    ties: Ties[int] = Ties()
    for a, b in Index(map(words, texts)).pairs():
        ties.tie(a, b)
    first: dict[str, int] = {}
    for place, lemma in enumerate(lemmas):
        if lemma:
            ties.tie(first.setdefault(lemma, place), place)
    return [ties.root(place) for place in range(len(texts))]


def without_repeats(texts: Sequence[str], threshold: float) -> list[int]:
    """Places of the texts that remain when every text near to an earlier remaining one is dropped."""
    index = Index(map(words, texts), threshold)
    kept: set[int] = set()
    for place, members in enumerate(index.sets):
        if kept.isdisjoint(index.near(members)):
            kept.add(place)
    return sorted(kept)
