"""Pun of the Day (Yang et al. 2015): lower-case puns without punctuation, and sentences of the news."""

from __future__ import annotations

from pathlib import Path

from punster.data.schema import Row
from punster.data.sources.reading import Located, Skips, choice, each, need, table
from punster.data.sources.wording import clean, restored

COLUMNS = ("index", "label", "a", "text")


def read(folder: Path, skips: Skips) -> Located:
    """text rows with is_pun; apostrophes, capitals and full stops are put back. The unlabelled third file is not read."""
    for name in ("train", "dev"):
        records = table(folder / f"puns_{name}.tsv", COLUMNS, skips, header=False)
        yield from each(records, _row, skips, name)


def _row(record: dict[str, str], name: str) -> list[Row]:
    is_pun = choice(need(record, "label"), {"0": False, "1": True}, "label")
    return [{"id": f"{name}/{need(record, 'index')}", "text": restored(clean(need(record, "text"))), "is_pun": is_pun}]
