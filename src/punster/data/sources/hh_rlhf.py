"""Anthropic HH-RLHF (harmless-base, test part): dialogues of which people preferred one. For loaders and format tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from punster.data.schema import Row
from punster.data.sources.reading import MAX_TEXT, BadRecord, Located, Place, Skips, each, lines, need

TURN = re.compile(r"\n\n(Human|Assistant): ?")


def read(folder: Path, skips: Skips) -> Located:
    """preference rows: the common turns as chat messages, the two last answers as texts."""
    located = ((place, (place, line)) for place, line in lines(folder / "test.jsonl.gz"))
    yield from each(located, _row, skips)


def _row(item: tuple[Place, str]) -> list[Row]:
    place, line = item
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise BadRecord("not JSON") from None
    chosen, rejected = (turns(need(record, side)) for side in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    rest = chosen[shared:], rejected[shared:]
    if not shared or any(len(side) != 1 or side[0]["role"] != "assistant" or not side[0]["content"] for side in rest):
        raise BadRecord("the dialogues do not differ in one last answer only")
    if rest[0] == rest[1]:
        raise BadRecord("both answers are the same")
    row = {"id": str(place.line), "prompt": chosen[:shared]}
    return [{**row, "chosen": rest[0][0]["content"], "rejected": rest[1][0]["content"]}]


def turns(text: str) -> list[dict[str, Any]]:
    """ "\\n\\nHuman: … \\n\\nAssistant: …" as chat messages."""
    if len(text) > MAX_TEXT:
        raise BadRecord(f"the dialogue is longer than {MAX_TEXT} characters")
    before, *parts = TURN.split(text)
    if before.strip() or not parts:
        raise BadRecord("the dialogue does not begin with a turn")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
