"""The original project's puns: a direct request and a remark of a conversation, with the same answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from punster.data.schema import Row
from punster.data.sources.reading import Located, Skips, each, json_items, need
from punster.data.sources.wording import clean


def read(folder: Path, skips: Skips) -> Located:
    """sft rows, two a record: kind direct, and kind conversation in the form "Human: … Assistant:"."""
    for kind in ("Direct", "Conversation"):
        yield from each(json_items(folder / "Pun_Dataset.json", "["), _row, skips, kind)


def _row(item: tuple[str, Any], kind: str) -> list[Row]:
    key, record = item
    prompt = clean(need(record, f"{kind} Prompt"))
    prompt = prompt if kind == "Direct" else f"Human: {prompt} Assistant:"
    row = {"id": f"{key}/{kind.lower()}", "prompt": prompt, "completion": clean(need(record, "Example Response"))}
    return [{**row, "is_pun": True, "original": need(record, "Original").strip().lower() == "yes", "kind": kind.lower()}]
