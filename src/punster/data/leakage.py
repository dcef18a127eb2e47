"""Near-duplicates by token sets: an inverted index over the rarer half of every text's words, exact for its threshold."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set

import numpy as np
from numpy.typing import NDArray

Words = frozenset[str]
NEAR = 0.5  # token-set Jaccard from which two texts count as versions of one

_WORD = re.compile(r"[^\W_]+")
_BITS = 256  # of a text's signature, four words of 64


def words(text: str) -> Words:
    """The token set of a text: lower-case runs of letters and digits, so "don't", "don ' t" and "don t" are alike."""
    return frozenset(_WORD.findall(text.lower()))


def jaccard(a: Set[str], b: Set[str]) -> float:
    """Shared over all elements; 0 of two empty sets."""
    return len(a & b) / len(a | b) if a or b else 0.0


class Index:
    """Token sets in which those near to another one are found.

    Two sets of Jaccard >= t share at least ceil(t * size) words, so they share one of the size - ceil(t * size) + 1 rarest
    words of each. Only those are indexed; candidates are then sieved by size and by a bit signature, and the rest compared.
    """

    def __init__(self, sets: Sequence[Words], threshold: float = NEAR) -> None:
        self.threshold = threshold
        self.order = sorted(range(len(sets)), key=lambda i: len(sets[i]))  # by size, so that a range of sizes is a slice
        self.sets = [sets[i] for i in self.order]
        frequency = Counter(word for members in sets for word in members)
        ranked = sorted(frequency, key=lambda word: (frequency[word], word))
        self.rank = {word: place for place, word in enumerate(ranked)}
        self.sizes = np.array([len(members) for members in self.sets], dtype=np.int64)
        self.signatures = np.zeros((4, len(sets)), dtype=np.uint64)
        postings: dict[str, list[int]] = {}
        for number, members in enumerate(self.sets):
            self.signatures[:, number] = self._signature(members)
            for word in self._prefix(members):
                postings.setdefault(word, []).append(number)
        self.postings = {word: np.array(numbers, dtype=np.int64) for word, numbers in postings.items()}

    def _prefix(self, members: Words) -> list[str]:
        keep = len(members) - math.ceil(self.threshold * len(members) - 1e-9) + 1
        return sorted(members, key=lambda word: self.rank.get(word, -1))[: max(0, keep)]

    def _signature(self, members: Words) -> NDArray[np.uint64]:
        bits = 0
        for word in members:
            bits |= 1 << (self.rank.get(word, 0) % _BITS)
        return np.array([(bits >> shift) & 0xFFFFFFFFFFFFFFFF for shift in range(0, _BITS, 64)], dtype=np.uint64)

    def _near(self, members: Words, before: int | None = None) -> Iterator[int]:
        """Places (in order of size) of the sets near to `members`; only those before the given place."""
        size, t = len(members), self.threshold
        first = int(np.searchsorted(self.sizes, math.ceil(t * size - 1e-9)))
        last = int(np.searchsorted(self.sizes, math.floor(size / t + 1e-9), side="right"))
        last = last if before is None else min(last, before)
        found = []
        for word in self._prefix(members):
            numbers = self.postings.get(word)
            if numbers is not None:
                found.append(numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, last)])
        candidates = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
        if not len(candidates):
            return
        own = self._signature(members)
        # A bit that only this set has stands for at least one word that the other lacks.
        lacking = np.zeros(len(candidates), dtype=np.int64)
        for part in range(4):
            lacking += np.bitwise_count(own[part] & ~self.signatures[part, candidates])
            enough = (size - lacking) * (1 + t) + 1e-9 >= t * (size + self.sizes[candidates])
            candidates, lacking = candidates[enough], lacking[enough]
        for number in sorted(set(candidates.tolist())):
            if jaccard(members, self.sets[number]) >= t:
                yield number

    def near(self, members: Words) -> list[int]:
        """Places, in the sequence given, of the sets near to this one."""
        return sorted(self.order[number] for number in self._near(members)) if members else []

    def has_near(self, text: str) -> bool:
        members = words(text)
        return bool(members) and next(self._near(members), None) is not None

    def pairs(self) -> Iterator[tuple[int, int]]:
        """All pairs of near sets, each once, as places in the sequence given."""
        for number, members in enumerate(self.sets):
            if members:
                for other in self._near(members, before=number):
                    yield self.order[other], self.order[number]


def near_groups(texts: Sequence[str], lemmas: Sequence[str | None] | None = None, threshold: float = NEAR) -> list[int]:
    """For each text the lowest place of its group: texts near to each other, or of the same pun-word lemma, and so on."""
    parent = list(range(len(texts)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = place = parent[parent[place]]
        return place

    def unite(a: int, b: int) -> None:
        low, high = sorted((root(a), root(b)))
        parent[high] = low

    for a, b in Index([words(text) for text in texts], threshold).pairs():
        unite(a, b)
    first: dict[str, int] = {}
    for place, lemma in enumerate(lemmas or ()):
        if lemma:
            unite(first.setdefault(lemma, place), place)
    return [root(place) for place in range(len(texts))]


def without_repeats(texts: Sequence[str], threshold: float) -> list[int]:
    """Places of the texts that remain when every text near to an earlier remaining one is dropped."""
    neighbours: dict[int, list[int]] = {}
    for a, b in Index([words(text) for text in texts], threshold).pairs():
        neighbours.setdefault(max(a, b), []).append(min(a, b))
    kept: set[int] = set()
    for place in range(len(texts)):
        if not any(earlier in kept for earlier in neighbours.get(place, ())):
            kept.add(place)
    return sorted(kept)
