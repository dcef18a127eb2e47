"""rJokes: Reddit jokes with the logarithm of their votes (0 to 11)."""

from __future__ import annotations

from pathlib import Path

from punster.data.schema import Row
from punster.data.sources.reading import BadRecord, Located, Place, Skips, each, lines, number
from punster.data.sources.wording import clean


def read(folder: Path, skips: Skips) -> Located:
    """text rows with rating (log score)."""
    for name in ("dev", "test"):
        located = ((place, (place, line)) for place, line in lines(folder / f"{name}.tsv.gz"))
        yield from each(located, _row, skips, name)


def _row(item: tuple[Place, str], name: str) -> list[Row]:
    place, line = item
    score, tab, text = line.partition("\t")
    if not tab:
        raise BadRecord("no tab between score and text")
    rating = number(score, "score")
    if not 0 <= rating <= 11:
        raise BadRecord("the score is not within 0 and 11")
    return [{"id": f"{name}/{place.line}", "text": clean(text), "rating": rating}]
