"""ExPUNations: five people's ratings, explanations and keywords of SemEval texts; z-scored for each annotator."""

from __future__ import annotations

import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

from punster.data.schema import Row
from punster.data.sources import semeval2017_task7
from punster.data.sources.reading import BadRecord, Located, Skips, each, json_values, need
from punster.data.sources.wording import clean

FILES = ("expunations_annotated_full.json", "expunations_annotated_pilot_100.json")
RATING = "Funniness (1-5)"  # 0: not a joke


def read(folder: Path, skips: Skips) -> Located:
    """text rows (the text is SemEval's): rating (mean of 0 to 5), rating_z, raters, joke_rate, offensive (votes), keywords."""
    texts = {row["id"]: row for _, row in semeval2017_task7.read(folder.parent / "semeval2017_task7", [])}
    records = [item for name in FILES for item in json_values(folder / name)]
    given: dict[str, list[float]] = {}
    for _, record in records:
        with suppress(BadRecord):  # counted when the record itself is converted
            for person, rating in _ratings(record):
                given.setdefault(person, []).append(rating)
    norms = {person: (statistics.fmean(values), statistics.pstdev(values) or 1.0) for person, values in given.items()}
    yield from each(records, _row, skips, texts, norms)


def _ratings(record: Any) -> list[tuple[str, float]]:
    """(annotator, rating) pairs."""
    ratings, people = need(record, RATING, list), need(record, "Annotator_IDs", list)
    if not ratings or len(ratings) != len(people):
        raise BadRecord("not as many ratings as annotators")
    if not all(isinstance(r, int) and 0 <= r <= 5 for r in ratings):
        raise BadRecord("a rating is not a whole number from 0 to 5")
    return [(str(person), float(rating)) for person, rating in zip(people, ratings, strict=True)]


def _row(record: Any, texts: dict[str, Row], norms: dict[str, tuple[float, float]]) -> list[Row]:
    key = need(record, "ID")
    if key not in texts:
        raise BadRecord("its text is not in the SemEval files")
    ratings = _ratings(record)
    z = [(rating - norms[person][0]) / norms[person][1] for person, rating in ratings]
    known = ("text", "is_pun", "kind", "pun_word", "alternative_word")
    row: Row = {"id": key, "semeval_id": key, **{name: value for name, value in texts[key].items() if name in known}}
    row["rating"] = statistics.fmean(rating for _, rating in ratings)
    row |= {"rating_z": round(statistics.fmean(z), 4), "raters": len(ratings)}
    if jokes := [vote for vote in record.get("Is a Joke?") or [] if vote in (0, 1)]:
        row["joke_rate"] = statistics.fmean(jokes)
    row["offensive"] = sum(str(vote) == "1" for vote in need(record, "Offensive/Inappropriate?", list))
    lists = [words for words in need(record, "Joke keywords", list) if isinstance(words, list)]
    row["keywords"] = list(dict.fromkeys(w.strip().lower() for words in lists for w in words if isinstance(w, str) and w.strip()))
    explanations = need(record, "Natural language explanation", list)
    row["explanations"] = [clean(e) for e in explanations if isinstance(e, str) and any(map(str.isalnum, e))]
    return [row]
