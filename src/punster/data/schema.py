"""Rows in TRL's schemas, validated with errors that name file and line.

text | prompt, completion | prompt, chosen, rejected [, margin] | prompt, completion, label | prompt alone; and ranked groups:
prompt, completions, scores (best first). A prompt is a string or a list of chat messages; so may be a completion, of which
the assistant's text is taken. Chat rows may leave the prompt implicit, as TRL's do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from punster.errors import UserError

Row = dict[str, Any]

FIELDS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt",), "sft": ("prompt", "completion"), "preference": ("prompt", "chosen", "rejected"), "text": ("text",),
    "unpaired": ("prompt", "completion", "label"), "group": ("prompt", "completions", "scores"),
}  # fmt: skip

ROLES = ("system", "user", "assistant", "tool")
NAMES = ("id", "source", "group", "pun_word", "alternative_word")  # texts that are kept and written with a row
_HALF = re.compile("[\ud800-\udfff]")


def kind_of(row: Any) -> str:
    """The schema that a row's fields suggest."""
    telling = {"chosen": "preference", "completions": "group", "label": "unpaired", "completion": "sft", "text": "text",
               "messages": "sft"}  # fmt: skip
    return next((kind for field, kind in telling.items() if isinstance(row, dict) and row.get(field) is not None), "prompt")


def texts_of(row: Row) -> list[str]:
    """The texts that a row offers as answers."""
    single = [row[name] for name in ("text", "completion", "chosen", "rejected") if row.get(name) is not None]
    return single + list(row.get("completions") or ())


def explicit(row: Row, kind: str, where: str = "") -> Row:
    """Chat rows get their prompt from `messages`, or from two dialogues that share their beginning.

    A text beside two dialogues must be a user's turn of that beginning, which stays the prompt; UserError if it is not.
    """
    if kind == "sft" and row.get("completion") is None and _is_chat(row.get("messages")):
        return {**row, "prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    chosen, rejected, told = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if kind == "preference" and isinstance(told, str | None) and _is_chat(chosen) and _is_chat(rejected):
        assert isinstance(chosen, list) and isinstance(rejected, list)
        turns = zip(chosen[:-1], rejected[:-1], strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], turns)))
        if told is None and not shared:
            raise UserError(f"{where}: chosen and rejected begin differently; what both begin with is their prompt")
        asked = [str(turn.get("content")).strip() for turn in chosen[:shared] if turn.get("role") == "user"]
        if told is not None and told.strip() not in asked:
            raise UserError(
                f"{where}: prompt {told[:60]!r} is no user's turn of what chosen and rejected both begin with (found: {str(asked)[:80]}); "
                "leave the prompt out, or give the answers without it"
            )
        return {**row, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    return row


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(message, dict) for message in value)


def check_row(row: Any, kind: str, where: str) -> Row:
    """The row with its texts as plain strings (prompts may stay chat messages); UserError if it does not fit.

    kind "judged": a pair, a ranked group or a labelled text, whichever the row's fields suggest; "written": prompt and completion,
    or a text, perhaps with a prompt.
    """
    expected = {"judged": "preference", "written": "sft"}.get(kind, kind)
    if not isinstance(row, dict):
        raise UserError(f"{where}: found {type(row).__name__}, expected an object with {', '.join(FIELDS[expected])}")
    alone = " (or text alone)" * (kind == "written")
    rated = kind == "judged" and row.get("completion") is not None and is_number(row.get("rating"))  # which needs no label
    if kind == "judged":
        kind = found if (found := kind_of(row)) in ("group", "unpaired") else "unpaired" if rated else "preference"
    if kind == "written":
        whole = row.get("completion") is not None or _is_chat(row.get("messages"))
        kind = "text" if row.get("text") is not None and not whole else "sft"
    given, row = row, explicit(row, kind, where)
    for name in FIELDS[kind]:
        if row.get(name) is None and not (rated and name == "label"):
            present = ", ".join(sorted(str(key) for key, value in row.items() if value is not None)) or "nothing"
            raise UserError(f"{where}: field {name!r} is missing (found: {present}; expected: {', '.join(FIELDS[kind])}{alone})")
    checked = dict(row)
    if kind == "text" and row.get("prompt") is not None:
        checked["prompt"] = _prompt(row["prompt"], where)
    for name in FIELDS[kind]:
        value = row[name]
        if name == "label":
            if not isinstance(value, bool) and not (rated and value is None):
                raise UserError(f"{where}: label must be true or false, found {value!r}")
        elif name == "prompt":
            checked[name] = _prompt(value, where)
        elif name == "scores":
            fits = isinstance(value, list) and all(map(is_number, value)) and len(value) == len(row["completions"]) >= 2
            if not fits or value != sorted(value, reverse=True):
                raise UserError(f"{where}: scores must be a number for each completion (at least two), best first")
        elif name == "completions":
            if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
                raise UserError(f"{where}: completions must be a list of texts")
            for text in value:
                _whole(text, f"{where}, field {name!r}")
        else:
            field = "messages" if name == "completion" and given.get(name) is None else name
            checked[name] = _text(value, f"{where}, field {field!r}")
            if not checked[name].strip():
                raise UserError(f"{where}: field {name!r} is empty")
    for name in NAMES:
        if isinstance(row.get(name), str):
            _whole(row[name], f"{where}, field {name!r}")
        elif isinstance(row.get(name), list | dict):  # another's column of this name
            del checked[name]
    weighed = kind in ("preference", "group", "unpaired")  # elsewhere these are another's columns
    if weighed and (share := row.get("pass_share")) is not None and not (is_number(share) and 0.01 <= share <= 1):
        raise UserError(f"{where}: pass_share must be a number from .01 to 1, found {share!r}")
    for name in ("margin", "weight", *(["rating"] if kind == "unpaired" else [])) if weighed else ():
        if (value := row.get(name)) is not None and not (is_number(value) and (name != "weight" or value > 0)):
            raise UserError(f"{where}: {name} must be a number{' above 0' * (name == 'weight')}, found {value!r}")
    for name in ("text", "completion", "completions", "chosen", "rejected", "scores"):
        # A further column with texts, or with scores of such, is none of this row's; of a prompt's answers mixtures look at texts.
        given_there = checked.get(name)
        listed = isinstance(given_there, list) and all(isinstance(text, str) for text in given_there)
        offers = listed if name == "completions" else isinstance(given_there, str)
        if name not in FIELDS[kind] and not (offers and kind in ("prompt", "text")):
            checked.pop(name, None)
    return checked


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(text: str, where: str) -> str:
    """The text, unless it holds half of a surrogate pair, which JSON can escape but no file or tokenizer can take."""
    if not text.isascii() and (half := _HALF.search(text)):
        found = f"half of a surrogate pair (\\u{ord(half[0]):04x})"
        raise UserError(f"{where}: found {found}, which is no character; write the whole pair, or leave the row out")
    return text


def _prompt(value: Any, where: str) -> Any:
    if isinstance(value, str):
        return _whole(value, f"{where}, field 'prompt'")
    good = isinstance(value, Sequence) and value and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )  # fmt: skip
    if not good:
        raise UserError(f"{where}: prompt must be text or chat messages with role and content, found {str(value)[:80]!r}")
    if unknown := [m["role"] for m in value if m["role"] not in ROLES]:
        raise UserError(f"{where}: unknown role {unknown[0]!r} in the chat messages (one of {', '.join(ROLES)})")
    return [{"role": m["role"], "content": _whole(m["content"], f"{where}, field 'prompt'")} for m in value]


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return _whole(value, where)
    message = value[0] if isinstance(value, Sequence) and len(value) == 1 else None
    if isinstance(message, dict) and isinstance(content := message.get("content"), str):
        if (role := message.get("role")) != "assistant":
            raise UserError(
                f"{where}: found a last message of the role {role!r}, expected 'assistant', whose text alone counts as an answer; "
                "leave that message out, or the row"
            )
        return _whole(content, where)
    raise UserError(f"{where}: expected text or one chat message, found {str(value)[:80]!r}")
