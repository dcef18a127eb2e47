"""How words sound: pronunciations, homophones, and near-homophones by a distance over phonetic features.

The pronunciations are CMUdict's (General American), as the package `punsy` ships them; words that it lacks are pronounced by
punster.puns.g2p. Phonemes are ARPAbet with stress digits on vowels ("AH0"). The distance is a weighted edit distance:
alike sounds replace each other cheaply, weak ones come and go cheaply, at the ends more so than within.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import islice, pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from punster.errors import UserError

Array = NDArray[Any]
Phonemes = tuple[str, ...]

COMMON = 20_000  # candidates of `nearest`: this many of the most frequent words
VARIANTS = 8  # pronunciations of one word or phrase at most


class Costs:
    """Costs of edits, in units of one stressed vowel lost or gained; tuned on the train part of SemEval-2017 task 7."""

    voice = 0.3  # t for d
    place = 0.25  # one step from the lips backwards, at most two
    manner = 0.4  # stop for nasal; half of it between NEAR_MANNERS
    vowel = 0.2  # one step of height, a third of the way from front to back, rounding, r-colour
    twin = 0.3  # a vowel for its glide
    obstruent = 0.7  # gap of h, t, d, s, z
    sonorant = 0.5  # gap of l, r, n, ng, w, y
    schwa = 0.4  # gap of an unstressed vowel
    edge = 0.5  # factor on gaps before the first and behind the last common sound
    ending = 0.5  # factor on gaps inside one of ENDINGS
    spelling = 0.15  # `nearest` only: share of letter pairs that differ
    rarity = 0.02  # `nearest` only: for each power of 10 by which a word is rarer than one in a hundred


# Place of articulation in steps from the lips; manner; voice.
CONSONANTS = {
    "P": (0, "stop", 0), "B": (0, "stop", 1), "M": (0, "nasal", 1), "F": (0.5, "fricative", 0), "V": (0.5, "fricative", 1),
    "TH": (1, "fricative", 0), "DH": (1, "fricative", 1), "T": (1.5, "stop", 0), "D": (1.5, "stop", 1), "N": (1.5, "nasal", 1),
    "S": (1.5, "sibilant", 0), "Z": (1.5, "sibilant", 1), "L": (1.5, "liquid", 1), "R": (2, "liquid", 1),
    "SH": (2, "sibilant", 0), "ZH": (2, "sibilant", 1), "CH": (2, "affricate", 0), "JH": (2, "affricate", 1),
    "Y": (2.5, "glide", 1), "W": (0, "glide", 1), "K": (3, "stop", 0), "G": (3, "stop", 1), "NG": (3, "nasal", 1),
    "HH": (4, "breath", 0),
}  # fmt: skip
NEAR_MANNERS = {frozenset(pair) for pair in (
    ("stop", "affricate"), ("affricate", "sibilant"), ("fricative", "sibilant"), ("liquid", "glide"), ("fricative", "stop"),
    ("fricative", "breath"),
)}  # fmt: skip
# Where a vowel begins and ends: height 0 (open) to 3 (close), backness 0 to 2, rounding; then length and r-colour.
VOWELS = {
    "IY": (3, 0, 0, 3, 0, 0, 1, 0), "IH": (2.5, 0.3, 0, 2.5, 0.3, 0, 0, 0), "EH": (1.5, 0.2, 0, 1.5, 0.2, 0, 0, 0),
    "AE": (0.5, 0.3, 0, 0.5, 0.3, 0, 0, 0), "AA": (0, 1.7, 0, 0, 1.7, 0, 1, 0), "AO": (1, 2, 1, 1, 2, 1, 1, 0),
    "AH": (1.2, 1.2, 0, 1.2, 1.2, 0, 0, 0), "UH": (2.5, 1.7, 1, 2.5, 1.7, 1, 0, 0), "UW": (3, 2, 1, 3, 2, 1, 1, 0),
    "ER": (1.5, 1, 0, 1.5, 1, 0, 1, 1), "EY": (2, 0, 0, 2.8, 0, 0, 1, 0), "AY": (0, 1, 0, 2.5, 0.2, 0, 1, 0),
    "OY": (1, 2, 1, 2.5, 0.2, 0, 1, 0), "AW": (0, 1, 0, 2.5, 1.7, 1, 1, 0), "OW": (2, 2, 1, 2.8, 2, 1, 1, 0),
}  # fmt: skip
VOWEL_WEIGHTS = (0.5, 0.75, 0.5, 0.5, 0.75, 0.5, 0.5, 1)  # the mean of beginning and end; backness counts more
TWINS = {frozenset(pair) for pair in (("Y", "IY"), ("Y", "IH"), ("W", "UW"), ("W", "UH"), ("R", "ER"))}
WEAK = dict.fromkeys(("HH", "T", "D", "S", "Z"), Costs.obstruent) | dict.fromkeys(("L", "R", "N", "NG", "W", "Y"), Costs.sonorant)
ENDINGS = tuple(tuple(text.split()) for text in ("L IY", "IH NG", "AH D", "IH D", "AH Z", "IH Z", "ER", "IY", "Z", "S", "D", "T"))
SYMBOLS = ("", *CONSONANTS, *(vowel + stress for vowel in VOWELS for stress in "01"))  # "": padding; 1 stands for 1 and 2
NUMBER = {symbol: index for index, symbol in enumerate(SYMBOLS)} | {vowel + "2": SYMBOLS.index(vowel + "1") for vowel in VOWELS}


def plain(sounds: Iterable[str]) -> Phonemes:
    """Phonemes without stress digits."""
    return tuple(sound.rstrip("012") for sound in sounds)


@lru_cache(maxsize=1)
def dictionary() -> dict[str, list[str]]:
    """CMUdict: lower-case word (letters and apostrophes) -> pronunciations, phonemes separated by blanks."""
    words: dict[str, list[str]] = {}
    for line in (files("punsy") / "data" / "cmudict-0.7b.utf8").read_text(encoding="utf-8").splitlines():
        word, _, sounds = line.partition("|")
        words.setdefault(word.split("(")[0].lower(), []).append(sounds)
    return {word: found for word, found in words.items() if word.isascii() and word.replace("'", "").isalpha()}


def parts_of(text: str) -> tuple[str, ...]:
    """Lower-case words of a-z and apostrophes; hyphens, blanks and underscores separate, accents are dropped."""
    flat = unicodedata.normalize("NFKD", text.replace("’", "'")).lower()
    parts = tuple(part for part in re.split(r"[\s_-]+", "".join(c for c in flat if not unicodedata.combining(c))) if part)
    if not parts:
        raise UserError("a word is needed, found an empty text")
    for part in parts:
        if not re.fullmatch(r"'?[a-z][a-z']*", part):
            raise UserError(f"cannot pronounce {text!r}: expected letters, apostrophes and hyphens alone; spell out the rest")
    return parts


def g2p(word: str) -> Phonemes:
    """Phonemes by the spelling alone, whether or not the dictionary has the word."""
    from punster.puns.g2p import trained

    return tuple(sound for part in parts_of(word) for sound in trained().pronounce(part.replace("'", "")))


@lru_cache(maxsize=50_000)
def _of_part(part: str) -> tuple[Phonemes, ...]:
    found = dictionary().get(part) or dictionary().get(part.strip("'"))
    return tuple(dict.fromkeys(tuple(sounds.split()) for sounds in found)) if found else (g2p(part),)


def pronunciations(word: str) -> list[Phonemes]:
    """Every pronunciation of a word or phrase, the dictionary's first one first; by its spelling if it is not there."""
    combined = product(*(_of_part(part) for part in parts_of(word)))
    return [tuple(sound for piece in pieces for sound in piece) for pieces in islice(combined, VARIANTS)]


@lru_cache(maxsize=1)
def _by_sound() -> dict[Phonemes, list[str]]:
    index: dict[Phonemes, list[str]] = {}
    for word, found in dictionary().items():
        for sounds in {plain(text.split()) for text in found}:
            index.setdefault(sounds, []).append(word)
    return index


def frequency(word: str) -> float:
    """Zipf frequency: log10 of occurrences in a billion words, 0 for unknown; of a phrase, that of wordfreq's estimate."""
    from wordfreq import zipf_frequency

    return float(zipf_frequency(" ".join(parts_of(word)), "en"))


def homophones(word: str) -> list[str]:
    """Dictionary words that share a pronunciation with it, stress apart; the most frequent first."""
    own = " ".join(parts_of(word))
    found = {other for sounds in pronunciations(word) for other in _by_sound().get(plain(sounds), ())} - {own}
    return sorted(found, key=lambda other: (-frequency(other), other))


def lemma(word: str) -> str:
    """The word without a regular ending (-s, -ed, -ing) where the rest is a dictionary word; irregular forms stay."""
    for pattern, replacements in (
        (r"ies$", ("y", "ie")), (r"(?<=[sxzo])es$|(?<=[cs]h)es$", ("", "e")), (r"(?<![su])s$", ("",)), (r"ied$", ("y", "ie")),
        (r"([bdgkmnprtv])\1(ed|ing)$", (r"\1", r"\1\1")),
        (r"([lz])\1(ed|ing)$", (r"\1\1", r"\1")), (r"(?<=[aeiouy])([bcdgkmnprstvz])(ed|ing)$", (r"\1e", r"\1")),
        (r"(ed|ing)$", ("", "e")),
    ):  # fmt: skip
        if re.search(pattern, word):
            options = (re.sub(pattern, replacement, word) for replacement in replacements)
            return next((stem for stem in options if len(stem) > 2 and stem in dictionary()), word)
    return word


@lru_cache(maxsize=1)
def _matrices() -> tuple[Array, Array]:
    """Costs of replacing (P, P) and of losing (P,) each of SYMBOLS; replacing costs at most as much as losing both."""
    gaps = np.array([_gap(symbol) for symbol in SYMBOLS], np.float32)
    swaps = np.array([[_swap(a, b) for b in SYMBOLS] for a in SYMBOLS], np.float32)
    swaps = np.minimum(swaps, gaps[:, None] + gaps[None])
    swaps[0] = swaps[:, 0] = np.inf
    return swaps, gaps


def _gap(symbol: str) -> float:
    if not symbol:
        return 0.0
    return WEAK.get(symbol, Costs.schwa if symbol.endswith("0") else 1.0)


def _swap(a: str, b: str) -> float:
    """What tells two sounds apart, added up; infinite for a vowel and a consonant unless they are twins."""
    one, two = a.rstrip("01"), b.rstrip("01")
    if one in VOWELS and two in VOWELS:
        return Costs.vowel * float(np.dot(np.abs(np.subtract(VOWELS[one], VOWELS[two])), VOWEL_WEIGHTS))
    if one in CONSONANTS and two in CONSONANTS:
        (place, manner, voice), (place2, manner2, voice2) = CONSONANTS[one], CONSONANTS[two]
        unlike = 0.0 if manner == manner2 else 0.5 if frozenset((manner, manner2)) in NEAR_MANNERS else 1.0
        return Costs.place * min(abs(place - place2), 2) + Costs.manner * unlike + Costs.voice * (voice != voice2)
    return Costs.twin if frozenset((one, two)) in TWINS else np.inf


@dataclass(frozen=True)
class Table:
    """R pronunciations as columns of at most L sounds."""

    owner: Array  # (R,) index of the word
    sounds: Array  # (L, R) index into SYMBOLS, 0 behind the last
    ending: Array  # (L, R) true inside an ending
    lengths: Array  # (R,)


def _table(words: Sequence[str]) -> Table:
    rows = [(index, sounds) for index, word in enumerate(words) for sounds in dict.fromkeys(pronunciations(word))]
    sounds = np.zeros((max(len(row) for _, row in rows), len(rows)), np.int64)
    ending = np.zeros(sounds.shape, bool)
    for column, (_, row) in enumerate(rows):
        sounds[: len(row), column] = [NUMBER[sound] for sound in row]
        bare = plain(row)
        size = next((len(tail) for tail in ENDINGS if bare[-len(tail) :] == tail and len(bare) > len(tail) + 1), 0)
        ending[len(row) - size : len(row), column] = True
    owner, lengths = np.array([index for index, _ in rows]), np.array([len(row) for _, row in rows])
    return Table(owner, sounds, ending, lengths)


def _edits(query: Table, column: int, table: Table) -> Array:
    """(R,) cost of turning one pronunciation of `query` into each of the table's; Wagner & Fischer 1974, row by row."""
    swaps, gaps = _matrices()
    own = query.sounds[: query.lengths[column], column]
    losses = gaps[own] * np.where(query.ending[: len(own), column], Costs.ending, 1)
    gains = np.zeros((len(table.sounds) + 1, len(table.owner)), np.float32)  # running sum over a candidate's sounds
    np.cumsum(gaps[table.sounds] * np.where(table.ending, np.float32(Costs.ending), 1), 0, out=gains[1:])
    left = np.concatenate([[0], np.cumsum(losses)])
    state = gains * Costs.edge
    best = state[-1] + left[-1] * Costs.edge
    for row, sound in enumerate(own):
        fresh = np.empty_like(state)
        fresh[0] = left[row + 1] * Costs.edge
        np.minimum(state[:-1] + swaps[sound][table.sounds], state[1:] + losses[row], out=fresh[1:])
        state = np.minimum.accumulate(fresh - gains) + gains
        np.minimum(best, state[-1] + (left[-1] - left[row + 1]) * Costs.edge, out=best)
    best = np.minimum(best, (state + (gains[-1] - gains) * Costs.edge).min(0))
    result: Array = best / ((len(own) + table.lengths) / 2)
    return result


def _distances(word: str, table: Table) -> Array:
    """(words,) distance of each word of the table: the least over all pairs of pronunciations."""
    query = _table([word])
    best = np.full(int(table.owner.max()) + 1, np.inf)
    for column in range(len(query.owner)):
        np.minimum.at(best, table.owner, _edits(query, column, table))
    return best


def distance(a: str, b: str) -> float:
    """How differently two words sound: costs of the cheapest edits for each phoneme of their mean length; 0 for homophones.

    Symmetric; no metric in the strict sense, since each pair may choose other pronunciations and is divided by its own length.
    """
    first, second = sorted((a, b))  # so that rounding is the same both ways
    return float(_distances(first, _table([second]))[0])


@lru_cache(maxsize=1)
def common_words() -> tuple[str, ...]:
    """The 20,000 most frequent English words of letters a-z alone, the most frequent first."""
    from wordfreq import top_n_list

    words = (word for word in top_n_list("en", COMMON * 2) if word.isascii() and word.isalpha())
    return tuple(islice(words, COMMON))


def _letter_pairs(word: str) -> list[int]:
    """Numbers of the different pairs of neighbouring letters, the word's ends being letters too."""
    codes = [0, *(ord(letter) - 96 for letter in word if "a" <= letter <= "z"), 0]
    return sorted({one * 27 + two for one, two in pairwise(codes)})


@dataclass(frozen=True)
class Lexicon:
    """Candidates of `nearest` and what does not depend on the question."""

    table: Table
    pairs: Array  # (words, 27 * 27) true where a word has the pair of letters
    rarity: Array  # (words,) powers of 10 below one word in a hundred
    lemmas: tuple[str, ...]


@lru_cache(maxsize=4)
def _lexicon(words: tuple[str, ...]) -> Lexicon:
    spellings = [" ".join(parts_of(word)) for word in words]
    pairs = np.zeros((len(words), 27 * 27), bool)
    for row, spelling in zip(pairs, spellings):
        row[_letter_pairs(spelling)] = True
    return Lexicon(
        _table(words), pairs, np.array([max(0.0, 7 - frequency(word)) for word in words]), tuple(map(lemma, spellings))
    )


def nearest(word: str, k: int = 10, candidates: Iterable[str] | None = None) -> list[tuple[str, float]]:
    """The k candidates (default: COMMON words) that are most easily taken for it; other forms of the same word are left out.

    The score is the distance, plus a little for a different spelling (Dice's coefficient of letter pairs) and for rarity.
    The first call with other candidates takes 2 s for 20,000 of them, every further one 50 ms.
    """
    if k < 1:
        raise UserError(f"k must be at least 1, found {k}")
    words = common_words() if candidates is None else tuple(dict.fromkeys(candidates))
    if not words:
        return []
    lexicon = _lexicon(words)
    own = " ".join(parts_of(word))
    letters = _letter_pairs(own)
    unlike = 1 - 2 * lexicon.pairs[:, letters].sum(1) / (lexicon.pairs.sum(1) + len(letters))
    scores = _distances(word, lexicon.table) + Costs.spelling * unlike + Costs.rarity * lexicon.rarity
    order = (int(index) for index in np.argsort(scores, kind="stable"))
    return [(words[i], float(scores[i])) for i in islice((i for i in order if lexicon.lemmas[i] != lemma(own)), k)]
