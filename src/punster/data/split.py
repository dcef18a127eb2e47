"""Which part of the data a row belongs to: train, val, or neither.

The table ships with the package (ids and lemmas only). A row tied to a SemEval id follows the id, a row tied to a pun word
follows its lemma; what the table does not name belongs to neither part, nor does anything near to such a text. Any other row
is val if it is near to a held-out text or shares a held-out pun word, and of the rated ones a tenth is held back by text.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Literal

from punster.data.leakage import Index, near_groups, words
from punster.data.schema import Row, texts_of

Part = Literal["train", "val"]


@cache
def table() -> dict[str, dict[str, Part]]:
    """{"semeval": id -> part, "pun_word_lemma": lemma -> part}"""
    found: dict[str, dict[str, Part]] = json.loads((files("punster") / "data" / "split.json").read_text(encoding="utf-8"))
    return found


@cache
def lemma(word: str) -> str:
    """The shortest dictionary form of a word, ties alphabetical; the word itself where the dictionary has none."""
    from lemminflect import getAllLemmas  # the look-up only: its guesses for unknown words would open a pickle

    word = word.lower()
    if len(word) > 40:  # no word; the dictionary takes long over it
        return word
    forms = {form.lower() for found in getAllLemmas(word).values() for form in found}
    return min(forms, key=lambda form: (len(form), form)) if forms else word


def part_of_id(semeval_id: str | None) -> Part | None:
    return table()["semeval"].get(semeval_id or "")


def part_of_lemma(word: str | None) -> Part | None:
    return table()["pun_word_lemma"].get(lemma(word)) if word else None


def assign(rows: Sequence[Row], tie: str, semeval: tuple[Index, Index] | None) -> list[Part | None]:
    """The part of every row of a source with this `tie`; semeval: the texts of the val part and those in neither (where rows follow
    their text).
    """
    if tie == "none":
        return ["val"] * len(rows)
    if tie == "id":
        return [part_of_id(row.get("semeval_id")) for row in rows]
    if tie == "lemma":
        return [part_of_lemma(row.get("pun_word")) for row in rows]
    if semeval is None:
        raise ValueError("rows that follow their text need the held-out texts")
    held_out, unnamed = semeval
    tenth = held_back([row for row in rows if _rated(row)])

    def part(row: Row) -> Part | None:
        texts = texts_of(row)
        if any(map(unnamed.has_near, texts)):
            return None
        back = _rated(row) and _key(row) in tenth
        return "val" if back or part_of_lemma(row.get("pun_word")) == "val" or any(map(held_out.has_near, texts)) else "train"

    return [part(row) for row in rows]


def _rated(row: Row) -> bool:
    return "rating" in row or "rejected" in row


def _key(row: Row) -> str:
    return str(row.get("sentence") or row.get("text") or row.get("prompt"))


def held_back(rows: Sequence[Row]) -> set[str]:
    """A tenth of the texts, drawn by hash; all versions of a sentence together (for long lists: equal token sets only)."""
    keys = list(dict.fromkeys(_key(row) for row in rows))
    pun_words = {_key(row): row.get("pun_word") for row in rows}
    if len(keys) <= 5_000:
        groups = near_groups(keys, [lemma(word) if (word := pun_words[key]) else None for key in keys])
        names = [keys[place] for place in groups]
    else:  # the guard drops their near-duplicates from training later
        names = keys
    return {key for key, name in zip(keys, names, strict=True) if zlib.crc32(" ".join(sorted(words(name))).encode()) % 10 == 0}
