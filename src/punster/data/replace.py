"""Negatives that differ from a pun in the pun word alone: another pun's word, or one that was chosen for it."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from punster.data.schema import Row
from punster.data.split import lemma
from punster.errors import UserError
from punster.puns.phonetics import pronunciations

ENDINGS = ("ing", "ed", "ly", "er", "s")  # words with one of these are replaced by words with the same


@dataclass(frozen=True)
class Blank:
    """A text with its pun word taken out, and the lemmas that must not be put back."""

    before: str
    word: str
    after: str
    avoid: frozenset[str]

    @property
    def _shouted(self) -> bool:
        return len(self.word) > 1 and self.word.isupper()

    @property
    def _free(self) -> bool:
        """The place decides how a word is written there: at the beginning of a sentence, or where the pun word is in capitals."""
        return self._shouted or self.before.rstrip(" \"'(")[-1:] in (".", "!", "?", "")

    def filled(self, word: str) -> str:
        """The text with another word, as it is written, in the case of the one that was there where the place decides it."""
        if self._free and self.word[0].isupper():
            word = word.upper() if self._shouted else word[0].upper() + word[1:]
        return self.before + word + self.after

    def takes(self, word: str) -> bool:
        """As many words, after "a" and "an" alike, a name for a name, and in no form the pun word nor what it sounds like (raise, raising)."""
        alike = lemma(word) in self.avoid or word[:4].lower() == self.word[:4].lower()
        article = self.before.lower().split()[-1:] in (["a"], ["an"])
        return (
            not alike
            and len(word.split()) == len(self.word.split())
            and (self._free or word[0].isupper() == self.word[0].isupper())
            and (not article or _begins_with_vowel(word) == _begins_with_vowel(self.word))
        )


class Replacement(NamedTuple):
    """Words that were chosen for a pun of a public source and, outside SemEval, its pun word as it stands in the text."""

    words: Sequence[str]
    pun_word: str | None = None


def blank_of(row: Row) -> Blank | None:
    """Where the pun word of a row stands last in its text, as a whole word that begins it or follows a space; None if it does not."""
    text, word = str(row.get("completion") or row["text"]), str(row.get("pun_word") or "")
    hits = list(re.finditer(rf"(?:^|(?<=\S )){re.escape(word)}(?![\w'])", text, re.IGNORECASE)) if word else []
    if not hits:
        return None
    first, last = hits[-1].span()
    others = {str(row[name]).lower() for name in ("pun_word", "alternative_word") if row.get(name)}
    return Blank(text[:first], text[first:last], text[last:], frozenset(map(lemma, others)))


def chosen_pairs(rows: Sequence[Row], cap: int, prompt: str, draw: random.Random, chosen: Mapping[str, Replacement]) -> list[Row]:
    """Each pun against at most `cap` versions with a word that was chosen for it (by its "source/id")."""
    pairs = []
    for row in rows:
        found = chosen.get(f"{row['source']}/{row['id']}")
        if found is None:
            continue
        if found.pun_word and lemma(found.pun_word) != lemma(str(row.get("pun_word") or "")):
            row = {**row, "alternative_word": None}  # it belongs to another pun word
        located = {**row, "pun_word": found.pun_word or row.get("pun_word")}
        if blank := blank_of(located):
            fitting = list(filter(blank.takes, found.words))
            pairs += [_pair(located, blank, word, prompt) for word in draw.sample(fitting, min(cap, len(fitting)))]
    return pairs


def foreign_pairs(rows: Sequence[Row], cap: int, prompt: str, draw: random.Random) -> list[Row]:
    """Each located pun against versions of it with the words of other puns, which have the same ending."""
    found = [(row, blank) for row in rows if (blank := blank_of(row))]
    by_ending: dict[str, list[str]] = {}
    for _, blank in found:
        by_ending.setdefault(_ending(blank.word), []).append(blank.word.lower())
    pairs = []
    for row, blank in found:
        words = by_ending[_ending(blank.word)]
        fitting = filter(blank.takes, (draw.choice(words) for _ in range(8 * cap)))
        pairs += [_pair(row, blank, word, prompt) for word in list(dict.fromkeys(fitting))[:cap]]
    return pairs


@cache
def _begins_with_vowel(word: str) -> bool:
    """By the sound of it (an hour, a unit); by the letter where it cannot be spoken (4th)."""
    try:
        return pronunciations(word.split()[0])[0][0][-1:].isdigit()  # of phonemes, vowels bear a stress digit
    except (UserError, IndexError):
        return word[0].lower() in "aeiou8"


def _ending(word: str) -> str:
    return next((ending for ending in ENDINGS if word.lower().endswith(ending)), "")


def _pair(row: Row, blank: Blank, word: str, prompt: str) -> Row:
    shared = {name: row[name] for name in ("source", "licence", "pun_word", "alternative_word") if row.get(name)}
    asked = {"prompt": row.get("prompt") or prompt, "topic": row.get("topic")}
    texts = {"chosen": blank.filled(blank.word), "rejected": blank.filled(word)}
    return {**shared, **asked, **texts, "replaced_by": word, "id": f"{row['id']}/{word}"}
