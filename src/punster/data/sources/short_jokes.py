"""Clean jokes of Reddit: many puns, no votes."""

from __future__ import annotations

from pathlib import Path

from punster.data.sources.reading import Located, Skips, each, need, table
from punster.data.sources.wording import clean


def read(folder: Path, skips: Skips) -> Located:
    """text rows."""
    records = table(folder / "reddit-cleanjokes.csv", ("ID", "Joke"), skips)
    yield from each(records, lambda record: [{"id": need(record, "ID"), "text": clean(need(record, "Joke"))}], skips)
