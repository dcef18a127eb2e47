"""Halves of judged rows, for two reward models that share no text and no pun word that a row names: one to train against, one to judge."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from punster.data import corpus
from punster.data.leakage import Ties, words
from punster.data.schema import Row, texts_of
from punster.data.split import lemma
from punster.train.judged import family, source_of


def halves_of(rows: Sequence[Row]) -> list[int]:
    """Of each row its half, 1 or 2, whatever their order; the halves are of the whole set, so two models must name the same data.

    Drawn together are rows of one family, rows with a text in common (the same set of words), and rows with a word in common, as
    pun word or as what that evokes (in dictionary forms), as far as the rows name them. Texts that are alike, but no more, may fall
    apart. Pairs whose rejected text is preferred or labelled in another family (ExPUN's, off-topic ones) tie nothing: they stay
    where both texts are in one half, and are in neither (0) otherwise.
    """
    preferred: dict[str, set[str]] = {}
    for row in rows:
        if "completions" not in row:
            preferred.setdefault(text_key(texts_of(row)[0]), set()).add(family(row))

    def apart(row: Row) -> bool:
        return "chosen" in row and "group" not in row and bool(preferred.get(text_key(row["rejected"]), set()) - {family(row)})

    own, ties = corpus.by_id(), Ties[str]()
    for row in rows:
        texts = texts_of(row)[:1] if apart(row) else texts_of(row)
        for key in (*map(text_key, texts), *(f"word {word}" for word in row_words(row, own))):
            ties.tie(f"family {family(row)}", key)

    def half(row: Row) -> int:
        found = {zlib.crc32(ties.root(text_key(text)).encode()) % 2 + 1 for text in texts_of(row)}
        return found.pop() if len(found) == 1 else 0

    return [half(row) for row in rows]


def row_words(row: Row, own: Mapping[str, Row]) -> set[str]:
    """Lemmas of the pun word of a row and of what it evokes; pairs of the embedded corpus bear its records' ids, which `own` has."""
    told = own.get(str(row.get("id")), row) if source_of(row) == "embedded" else row
    return {lemma(str(told[name])) for name in ("pun_word", "alternative_word") if told.get(name)}


def text_key(text: str) -> str:
    return f"text {' '.join(sorted(words(text))) or text}"
