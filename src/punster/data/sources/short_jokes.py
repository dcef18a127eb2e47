"""Clean jokes of Reddit: many puns, no votes."""

from __future__ import annotations

from pathlib import Path

from punster.data.schema import Row
from punster.data.sources.reading import Located, Skips, each, need, table
from punster.data.sources.wording import clean


def read(folder: Path, skips: Skips) -> Located:
    """text rows."""
    records = table(folder / "reddit-cleanjokes.csv", ("ID", "Joke"), skips)
    yield from each(records, _row, skips)


def _row(record: dict[str, str]) -> list[Row]:
    return [{"id": need(record, "ID"), "text": clean(need(record, "Joke"))}]
