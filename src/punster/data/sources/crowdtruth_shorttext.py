"""Proverbs and plain sentences of Wikipedia: texts that are no puns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from punster.data.schema import Row
from punster.data.sources.reading import BadRecord, Located, Skips, each, json_items
from punster.data.sources.wording import clean, detokenise


def read(folder: Path, skips: Skips) -> Located:
    """text rows with is_pun false."""
    for name in ("proverbs", "wiki_sentences"):
        yield from each(json_items(folder / f"{name}.json", "["), _row, skips, name)


def _row(item: tuple[str, Any], name: str) -> list[Row]:
    key, text = item
    if not isinstance(text, str):
        raise BadRecord("not a text")
    return [{"id": f"{name}/{key}", "text": detokenise(clean(text)), "is_pun": False, "kind": name}]
