"""HaHackathon (SemEval-2021 Task 7): is it humour, how funny (1-5), how offensive (0-5), by 20 people each."""

from __future__ import annotations

from pathlib import Path

from punster.data.schema import Row
from punster.data.sources.reading import Located, Skips, choice, each, need, number, table
from punster.data.sources.wording import clean

COLUMNS = ("id", "text", "is_humor", "humor_rating", "humor_controversy", "offense_rating")


def read(folder: Path, skips: Skips) -> Located:
    """text rows: is_humour, offence, and for humour rating and controversial."""
    for name in ("train8000.csv", "dev1000.csv"):
        yield from each(table(folder / name, COLUMNS, skips), _row, skips)


def _row(record: dict[str, str]) -> list[Row]:
    humour = choice(need(record, "is_humor"), {"0": False, "1": True}, "is_humor")
    row = {"id": need(record, "id"), "text": clean(need(record, "text")), "is_humour": humour}
    row["offence"] = number(need(record, "offense_rating"), "offense_rating")
    if humour:
        controversial = choice(record["humor_controversy"], {"0": False, "1": True}, "humor_controversy")
        row |= {"rating": number(need(record, "humor_rating"), "humor_rating"), "controversial": controversial}
    return [row]
