"""Context-situated puns (CUP): people wrote a pun for given context words and a pun word."""

from __future__ import annotations

from pathlib import Path

from punster.data.prompts import request, topic_of_context
from punster.data.schema import Row
from punster.data.sources.reading import BadRecord, Located, Place, Skips, choice, each, need, table
from punster.data.sources.wording import clean, detokenise

COLUMNS = ("context", "pun_word", "alter_word", "pun_word_sense", "alter_word_sense", "new_pun", "user_pun")


def read(folder: Path, skips: Skips) -> Located:
    """sft rows with prompt and topic from the context words; a row without a pun is a counted skip."""
    records = table(folder / "context_situated_pun.csv", COLUMNS, skips)
    yield from each(((place, (place, record)) for place, record in records), _row, skips)


def _row(item: tuple[Place, dict[str, str]]) -> list[Row]:
    place, record = item
    if not choice(need(record, "new_pun"), {"yes": True, "no": False}, "new_pun"):
        raise BadRecord("the writer found no pun (new_pun is no)")
    if record["user_pun"].strip() in ("", "{}"):
        raise BadRecord("no pun was written")
    context = [detokenise(phrase) for phrase in need(record, "context").split(",") if phrase.strip()]
    words = {"pun_word": need(record, "pun_word").lower(), "alternative_word": need(record, "alter_word").lower()}
    topic = topic_of_context(context, words["pun_word"])
    row = {"id": f"line{place.line}", "prompt": request(topic), "completion": clean(record["user_pun"]), **words, "topic": topic}
    senses = {"pun_senses": [record["pun_word_sense"]], "alternative_senses": [record["alter_word_sense"]]}
    return [{**row, **senses, "keywords": context, "is_pun": True}]
