"""Grapheme to phoneme: pronunciations of words that the dictionary lacks, from a joint n-gram model of the dictionary.

Every letter of a dictionary word is aligned with 0 to 2 phonemes (Viterbi training); such a pair is a *unit*. An n-gram
model of units with absolute discounting and Kneser-Ney counts (Bisani & Ney 2008; Chen & Goodman 1999) then spells and
pronounces at once, and a beam search finds the most probable pronunciation of a spelling. numpy alone, deterministic.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)
Array = NDArray[Any]
Entry = tuple[str, tuple[str, ...]]  # a word of a-z and its phonemes

ORDER = 7  # units of an n-gram
DISCOUNT = 0.8
ROUNDS = 4  # of Viterbi training
SAMPLE = 8  # every eighth word of a length is trained on
BEAM = 12
WIDTH = 8.0  # nats; paths worse than the best by more are dropped
RARE = 5  # words with a unit that occurs less often are not learned from
START, END = 0, 1  # units before and behind every word
BITS = 12  # of a unit's number in a key


def align(entries: list[Entry]) -> list[list[str]]:
    """Each word as units "letter:PHONEME PHONEME"; entries that do not fit 2 phonemes to a letter become empty lists.

    Hard EM over log p(phonemes | letter), begun from phonemes spread evenly; one batch for each length of word.
    """
    names = ["", *sorted({phoneme for _, sounds in entries for phoneme in sounds})]
    number = {phoneme: index for index, phoneme in enumerate(names)}  # 0: no phoneme
    groups: dict[int, list[int]] = {}
    for index, (word, phonemes) in enumerate(entries):
        if len(phonemes) <= 2 * len(word):
            groups.setdefault(len(word), []).append(index)
    batches, widths = [], []
    for length, members in sorted(groups.items()):
        letters = np.array([[ord(letter) - ord("a") for letter in entries[i][0]] for i in members])
        lengths = np.array([len(entries[i][1]) for i in members])
        sounds = np.zeros((len(members), 2 * length + 2), np.int64)
        for row, i in enumerate(members):
            sounds[row, : lengths[row]] = [number[phoneme] for phoneme in entries[i][1]]
        batches.append((letters, sounds, lengths))
        widths.append(np.diff(np.arange(length + 1) * lengths[::SAMPLE, None] // length))
    samples = [tuple(part[::SAMPLE] for part in batch) for batch in batches]
    for last in [False] * ROUNDS + [True]:  # a sample is enough to train on; the last round aligns all
        counts = np.full((26, len(names), len(names)), 0.1)
        for (letters, sounds, _), width in zip(samples, widths):
            first, second = _chunks(sounds, width)
            flat = (letters * len(names) + first) * len(names) + second
            counts += np.bincount(flat.ravel(), minlength=counts.size).reshape(counts.shape)
        table = np.log(counts / counts.sum((1, 2), keepdims=True)).astype(np.float32)
        widths = [_viterbi(table, *batch) for batch in (batches if last else samples)]
    result: list[list[str]] = [[] for _ in entries]
    for members, (_, sounds, _), width in zip((group for _, group in sorted(groups.items())), batches, widths):
        for i, *pair in zip(members, *(part.tolist() for part in _chunks(sounds, width))):
            result[i] = [f"{letter}:{names[a]} {names[b]}".rstrip() for letter, a, b in zip(entries[i][0], *pair)]
    return result


def _viterbi(table: Array, letters: Array, sounds: Array, lengths: Array) -> Array:
    """(W, L) number of phonemes of each letter on the best path; table (26, P, P), letters (W, L), sounds (W, S)."""
    words, columns = letters.shape
    width = sounds.shape[1]
    score = np.full((words, width), -np.inf, np.float32)
    score[:, 0] = 0
    back = np.zeros((words, columns, width), np.int8)
    for column in range(columns):
        at = letters[:, column, None]
        options = np.full((3, words, width), -np.inf, np.float32)
        options[0] = score + table[letters[:, column], 0, 0][:, None]
        options[1, :, 1:] = score[:, :-1] + table[at, sounds[:, :-1], 0]
        options[2, :, 2:] = score[:, :-2] + table[at, sounds[:, :-2], sounds[:, 1:-1]]
        back[:, column] = options.argmax(0)
        score = options.max(0)
    widths = np.zeros((words, columns), np.int64)
    place, rows = lengths.copy(), np.arange(words)
    for column in reversed(range(columns)):
        widths[:, column] = back[rows, column, place]
        place -= widths[:, column]
    return widths


def _chunks(sounds: Array, widths: Array) -> tuple[Array, Array]:
    """First and second phoneme of each letter, 0 where it has none; sounds (W, S), widths (W, L)."""
    starts = np.cumsum(widths, 1) - widths
    rows = np.arange(len(sounds))[:, None]
    return np.where(widths > 0, sounds[rows, starts], 0), np.where(widths > 1, sounds[rows, starts + 1], 0)


@dataclass
class Model:
    """Kneser-Ney model as an automaton. Node 0 is the empty context; `keys` (sorted) are context << BITS | unit."""

    units: list[str]
    keys: Array  # (E,) int64
    targets: Array  # (E,) int32 node reached by the edge: the longest context that the model knows
    scores: Array  # (E,) float32 log p(unit | context)
    fallback: Array  # (N,) int32 node of the context without its oldest unit
    penalty: Array  # (N,) float32 log weight of falling back

    def __post_init__(self) -> None:
        # Plain memory is read several times faster, one number at a time, than numpy arrays.
        self._keys, self._scores, self._targets = self.keys.data, self.scores.data, self.targets.data
        self._fallback, self._penalty = self.fallback.tolist(), self.penalty.tolist()
        self._choices: dict[str, list[int]] = {}
        for index, unit in enumerate(self.units[2:], 2):
            self._choices.setdefault(unit[0], []).append(index)

    def step(self, node: int, unit: int) -> tuple[float, int]:
        """log p(unit | context of the node) and the next node."""
        total = 0.0
        while True:
            key = node << BITS | unit
            edge = bisect_left(self._keys, key)
            if edge < len(self._keys) and self._keys[edge] == key:
                return total + self._scores[edge], self._targets[edge]
            if node == 0:
                return total - 20.0, 0
            total += self._penalty[node]
            node = self._fallback[node]

    def pronounce(self, word: str) -> tuple[str, ...]:
        """Phonemes of a word of a-z: the best of a beam search over the units of its letters."""
        paths: list[tuple[float, int, tuple[int, ...]]] = [(0.0, self.step(0, START)[1], ())]
        for letter in word:
            floor = paths[0][0] - WIDTH
            grown = []
            for score, node, path in paths:
                if score < floor:
                    break
                for unit in self._choices.get(letter, ()):
                    gain, target = self.step(node, unit)
                    grown.append((score + gain, target, (*path, unit)))
            paths = sorted(grown, key=lambda item: (-item[0], item[2]))[:BEAM]
        best = max(paths, key=lambda item: (item[0] + self.step(item[1], END)[0], item[2]), default=(0.0, 0, ()))
        return tuple(phoneme for unit in best[2] for phoneme in self.units[unit].split(":")[1].split())

    def save(self, handle: IO[bytes]) -> None:
        np.savez(
            handle, units=np.array(self.units), keys=self.keys, targets=self.targets, scores=self.scores,
            fallback=self.fallback, penalty=self.penalty,
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Model:
        with np.load(path, allow_pickle=False) as stored:
            return cls(stored["units"].tolist(), *(stored[name] for name in ("keys", "targets", "scores", "fallback", "penalty")))


def fit(entries: Iterable[Entry]) -> Model:
    """The model of the given words and pronunciations (all of CMUdict: about 5 s)."""
    aligned = align(sorted(set(entries)))
    seen = Counter(unit for units in aligned for unit in units)
    aligned = [units for units in aligned if units and min(seen[unit] for unit in units) >= RARE]
    names = ["<", ">", *sorted({unit for units in aligned for unit in units})]
    if len(names) >= 1 << BITS:
        raise ValueError(f"{len(names)} units of letters and phonemes are more than the keys have room for")
    number = {name: index for index, name in enumerate(names)}
    stream = np.array([number[unit] for units in aligned for unit in ("<", *units, ">")], np.int64)
    depth = np.concatenate([np.arange(1, len(units) + 3) for units in aligned])  # place in the word, its mark being 1
    # Node 0 is the empty gram; those of length k are numbered after those of length k - 1.
    parts: list[tuple[Array, ...]] = [tuple(np.zeros(1, kind) for kind in (int, int, int, bool))]
    offsets = [0, 1]
    here = np.zeros(len(stream), np.int64)  # node of the gram of the current length that ends at each place
    for length in range(1, ORDER + 1):
        inside = depth >= length  # of one word
        key, inverse, count = np.unique((np.roll(here, 1) << BITS | stream)[inside], return_inverse=True, return_counts=True)
        shorter, start = np.zeros(len(key), np.int64), np.zeros(len(key), bool)
        shorter[inverse], start[inverse] = here[inside], (depth == length)[inside]
        parts.append((key, count, shorter, start))
        here[inside] = offsets[-1] + inverse
        offsets.append(offsets[-1] + len(key))
    key, count, shorter, start = (np.concatenate(column) for column in zip(*parts))
    total, parent = len(key), key >> BITS
    # Kneser-Ney: grams that can be longer count the different units before them, not their occurrences.
    tally = np.where(start | (np.arange(total) >= offsets[ORDER]), count, np.bincount(shorter[1:], minlength=total))
    tally[:2] = 0  # the mark of a word's start is never predicted
    sums, kinds = np.bincount(parent[1:], tally[1:], total), np.bincount(parent[1:], minlength=total)
    weight = np.minimum(DISCOUNT * kinds / np.maximum(sums, 1), 1)
    p = np.full(total, 1 / len(names))
    for low, high in pairwise(offsets[1:]):
        span = slice(low, high)
        p[span] = np.maximum(tally[span] - DISCOUNT, 0) / sums[parent[span]] + weight[parent[span]] * p[shorter[span]]
    target = np.arange(total)  # grams that nothing follows are no contexts: on to a shorter one
    for _ in range(ORDER):
        target = np.where(kinds[target] > 0, target, shorter[target])
    rank = 1 + np.argsort(key[1:])
    contexts = offsets[ORDER]
    return Model(
        names, key[rank], target[rank].astype(np.int32), np.log(p[rank]).astype(np.float32),
        shorter[:contexts].astype(np.int32), np.log(np.maximum(weight[:contexts], 1e-9)).astype(np.float32),
    )  # fmt: skip


@lru_cache(maxsize=1)
def trained() -> Model:
    """The model of the whole pronouncing dictionary; fitted on first use and kept in the cache folder."""
    from punster.disk import cache_folder
    from punster.puns.phonetics import dictionary

    source = Path(__file__).read_bytes() + repr(sorted(dictionary().items())).encode()
    path = cache_folder() / f"g2p-{hashlib.sha256(source).hexdigest()[:16]}.npz"
    if path.is_file():
        try:
            return Model.load(path)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            pass  # damaged: fitted anew
    model = fit((word, tuple(sounds.split())) for word, found in dictionary().items() if word.isalpha() for sounds in found)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as handle:
            model.save(handle)
        os.replace(part, path)
    except OSError as error:
        log.warning("the pronunciation model is not kept in %s: %s", path.parent, error)
    finally:
        with suppress(OSError):
            part.unlink()
    return model
