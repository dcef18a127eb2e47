"""Rows in TRL's schemas, read from files with errors that name file and line.

text | prompt, completion | prompt, chosen, rejected [, margin] | prompt, completion, label | prompt alone. A prompt is a
string or a list of chat messages; so may be a completion, of which the assistant's text is taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from punster.errors import UserError

Row = dict[str, Any]

FIELDS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "sft": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
}

ROLES = ("system", "user", "assistant", "tool")


def read_rows(path: str | Path, kind: str) -> list[Row]:
    """All rows of a .jsonl, .json, .csv or .parquet file, validated; raises UserError naming the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    rows = [check_row(row, kind, f"{path}, {where}") for where, row in _rows_of(path)]
    if not rows:
        raise UserError(f"{path}: no rows in this file")
    return rows


def _rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 may stand inside a JSON string
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: not JSON ({error}); expected one JSON object a line") from None
        return
    if path.suffix not in (".json", ".csv", ".parquet"):
        raise UserError(f"{path}: unknown kind of file; expected .jsonl, .json, .csv or .parquet")
    import datasets

    datasets.disable_progress_bars()
    builder = path.suffix[1:]
    try:
        table = datasets.load_dataset(builder, data_files=str(path), split="train", cache_dir=None)
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as {builder} ({(str(error).strip().splitlines() or [type(error).__name__])[-1]})"
        ) from None
    for number, row in enumerate(table, 1):
        yield f"row {number}", row


def check_row(row: Any, kind: str, where: str) -> Row:
    """The row with its texts as plain strings (prompts may stay chat messages); UserError if it does not fit."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: found {type(row).__name__}, expected an object with {', '.join(FIELDS[kind])}")
    for name in FIELDS[kind]:
        if row.get(name) is None:
            present = ", ".join(sorted(str(key) for key in row)) or "nothing"
            raise UserError(f"{where}: field {name!r} is missing (found: {present}; expected: {', '.join(FIELDS[kind])})")
    checked = dict(row)
    for name in FIELDS[kind]:
        value = row[name]
        if name == "label":
            if not isinstance(value, bool):
                raise UserError(f"{where}: label must be true or false, found {value!r}")
        elif name == "prompt":
            checked[name] = _prompt(value, where)
        else:
            checked[name] = _text(value, f"{where}, field {name!r}")
            if not checked[name].strip():
                raise UserError(f"{where}: field {name!r} is empty")
    if "margin" in row and row["margin"] is not None and not isinstance(row["margin"], int | float):
        raise UserError(f"{where}: margin must be a number, found {row['margin']!r}")
    return checked


def _prompt(value: Any, where: str) -> Any:
    if isinstance(value, str):
        return value
    good = isinstance(value, Sequence) and value and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )  # fmt: skip
    if not good:
        raise UserError(f"{where}: prompt must be text or chat messages with role and content, found {str(value)[:80]!r}")
    if unknown := [m["role"] for m in value if m["role"] not in ROLES]:
        raise UserError(f"{where}: unknown role {unknown[0]!r} in the chat messages (one of {', '.join(ROLES)})")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if (
        isinstance(value, Sequence)
        and len(value) == 1
        and isinstance(value[0], dict)
        and isinstance(value[0].get("content"), str)
    ):
        return str(value[0]["content"])
    raise UserError(f"{where}: expected text or one chat message, found {str(value)[:80]!r}")


def read_texts(path: str | Path) -> list[Row]:
    """Rows to be scored: {"text"} or {"prompt", "completion"}; always with "completion"."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    rows = []
    for where, row in _rows_of(path):
        place = f"{path}, {where}"
        if isinstance(row, dict) and row.get("text") is not None and row.get("completion") is None:
            rows.append({"completion": _text(row["text"], f"{place}, field 'text'")})
        else:
            rows.append(check_row(row, "sft", place))
    if not rows:
        raise UserError(f"{path}: no rows in this file")
    return rows
