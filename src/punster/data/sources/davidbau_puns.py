"""Cloze puns: one sentence with a blank that a punny or a straight word fills; written and rated by LLMs."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from punster.data.prompts import request, topic_of
from punster.data.schema import Row
from punster.data.sources.reading import BadRecord, Located, Skips, each, json_values, need
from punster.data.sources.wording import clean, filled

RATERS = ("gemini", "openai", "anthropic", "claudecode")


def read(folder: Path, skips: Skips) -> Located:
    """preference rows: every punny word against every straight word of a sentence; rating is the mean of the LLMs'."""
    for name in ("annotated_samples", "annotated_new_jokes"):
        yield from each(json_values(folder / f"{name}.json"), _rows, skips, name)


def _rows(record: Any, part: str) -> list[Row]:
    sentence, key = clean(need(record, "sentence")), need(record, "id", int)
    straight, punny = need(record, "straight", list), need(record, "punny", list)
    if not straight or not punny or not all(isinstance(word, str) and word.strip() for word in [*straight, *punny]):
        raise BadRecord("a list of words is empty or holds something else than words")
    ratings = [record[f"{rater}_rating"] for rater in RATERS if isinstance(record.get(f"{rater}_rating"), int | float)]
    rated = {"rating": statistics.fmean(ratings), "raters": len(ratings)} if ratings else {}
    topic = topic_of(sentence, punny[0])
    shared = {"prompt": request(topic), "topic": topic, "sentence": sentence, **rated}
    return [
        {"id": f"{part}/{key}/{p}-{s}", **shared, "chosen": clean(filled(sentence, punny[p])),
         "rejected": clean(filled(sentence, straight[s])), "pun_word": punny[p].lower()}
        for p in range(len(punny)) for s in range(len(straight))
    ]  # fmt: skip
