"""Kao et al.: funniness of puns and plain sentences, z-scored, with ambiguity and distinctiveness. Validates metrics only."""

from __future__ import annotations

from pathlib import Path

from punster.data.schema import Row
from punster.data.sources.reading import Located, Skips, choice, each, need, number, table
from punster.data.sources.wording import clean

COLUMNS = ("", "punType", "sentenceType", "entropy", "KL", "homophoneID", "sentence", "m1", "m2", "funniness")


def read(folder: Path, skips: Skips) -> Located:
    """text rows: is_pun, rating (z), ambiguity, distinctiveness, pun_word (in the text), alternative_word."""
    yield from each(table(folder / "data-agg.csv", COLUMNS, skips), _row, skips)


def _row(record: dict[str, str]) -> list[Row]:
    is_pun = choice(need(record, "sentenceType"), {"pun": True, "nonpun": False}, "sentenceType")
    row = {"id": need(record, ""), "text": clean(need(record, "sentence").replace("#", "")), "is_pun": is_pun}
    row |= {"pun_word": need(record, "m1").lower(), "alternative_word": need(record, "m2").lower(), "kind": record["punType"]}
    row |= {"rating": number(record["funniness"], "funniness"), "ambiguity": number(record["entropy"], "entropy")}
    return [{**row, "distinctiveness": number(record["KL"], "KL"), "homophone": need(record, "homophoneID")}]
