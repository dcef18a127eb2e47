"""Halves of judged rows, for two reward models that share no text and no pun word that a row names: one to train against, one to judge."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from punster.data import corpus
from punster.data.leakage import words
from punster.data.schema import Row, texts_of
from punster.data.split import lemma
from punster.train.judged import family, source_of


def half_of(rows: Sequence[Row], half: int) -> list[Row]:
    """Half 1 or 2 of the rows, whatever their order; the halves are of the whole set, so two models must name the same data.

    Drawn together are rows of one family, rows with a text in common (the same set of words), and rows with a word in common, as
    pun word or as what that evokes (in dictionary forms), as far as the rows name them. Texts that are alike, but no more, may fall
    apart. Pairs whose rejected text is preferred or labelled in another family (ExPUN's, off-topic ones) tie nothing: they stay
    where both texts are in the half, and are in neither half otherwise.
    """
    own = {record["id"]: record for record in corpus.records()}  # pairs of the embedded corpus bear its records' ids
    preferred: dict[str, set[str]] = {}
    for row in rows:
        if "completions" not in row:
            preferred.setdefault(text_key(texts_of(row)[0]), set()).add(family(row))

    def apart(row: Row) -> bool:
        return "chosen" in row and "group" not in row and bool(preferred.get(text_key(row["rejected"]), set()) - {family(row)})

    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while (above := parent.setdefault(key, key)) != key:
            parent[key] = parent[above]
            key = above
        return key

    for row in rows:
        texts = texts_of(row)[:1] if apart(row) else texts_of(row)
        told = own.get(str(row.get("id")), row) if source_of(row) == "embedded" else row
        evoked = [str(told[name]) for name in ("pun_word", "alternative_word") if told.get(name)]
        keys = [f"family {family(row)}", *map(text_key, texts), *(f"word {lemma(word)}" for word in evoked)]
        for key in keys[1:]:  # the least key of all that is tied is its root, in whatever order it is tied
            low, high = sorted((root(keys[0]), root(key)))
            parent[high] = low
    return [row for row in rows if all(zlib.crc32(root(text_key(text)).encode()) % 2 + 1 == half for text in texts_of(row))]


def text_key(text: str) -> str:
    return f"text {' '.join(sorted(words(text))) or text}"
