"""People's own data: JSONL, JSON, CSV, Parquet, texts a line, a folder of files, or a data set of the hub; rows with their places."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from punster.data.schema import FIELDS, NAMES, Row, check_row
from punster.data.sources import SOURCES
from punster.data.sources.reading import Skips, json_values, lines, read_text, table
from punster.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:\w+)?")  # owner/name or owner/name:split
Say = Callable[[str], None]  # takes a line for people


def read_rows(
    path: str | Path, kind: str, columns: Sequence[str] = (), training: bool | None = None, say: Say | None = None,
    placed: bool = False,
) -> list[Row]:  # fmt: skip
    """All rows of a file, a folder of files or a hub data set, validated; raises UserError naming the file and the line.

    The lines of a .txt file are texts, or prompts where these are wanted, and have no columns. columns: "FIELD=COLUMN" for fields
    that have another name there. training, say: as in `located_rows`.
    """
    located = located_rows(path, training, say)
    if str(path).endswith(".txt") and Path(path).is_file():
        columns = ()  # which it has none of: those of another file of the same command
        located = ((place, {"prompt": row["text"]} if kind == "prompt" else row) for place, row in located)
    checked = ((place, check_row(renamed(row, columns, place), kind, place)) for place, row in located)
    rows = [{**row, "_place": place} if placed else row for place, row in checked]
    if not rows:
        raise UserError(f"{path}: no rows in this file")
    return rows


def read_texts(path: str | Path) -> list[Row]:
    """Rows to be scored: {"text"}, perhaps with "prompt", or {"prompt", "completion"}; always with "completion", and their "_place"."""
    asked = lambda row: {} if row.get("prompt") is None else {"prompt": row["prompt"]}
    text = lambda row: row["text"] if row.get("completion") is None else row["completion"]
    return [{"completion": text(row), "_place": row["_place"], **asked(row)} for row in read_rows(path, "written", placed=True)]


def is_file_of_rows(path: str) -> bool:
    """Whether a name that may be that of a run is that of a file of rows."""
    return Path(path).suffix in SUFFIXES and not Path(path).is_dir()


def is_held_out(name: str, parts: Sequence[str] = ("val", "unguarded")) -> bool:
    """Whether `prepare` calls so what nothing may learn from: SOURCE.KIND.val.jsonl, SOURCE.KIND.unguarded.jsonl."""
    source, *rest = name.split(".")
    return source in SOURCES and rest in [[kind, part, "jsonl"] for kind in FIELDS for part in parts]


def located_rows(path: str | Path, training: bool | None = None, say: Say | None = None) -> Iterator[tuple[str, Any]]:
    """(place, row) of everything under a path; place is "FILE, line N" (Parquet, hub: "row N"). UserError if unreadable.

    Of a folder into which `prepare` wrote, training takes what it did not hold out, and what is no training (False) the val files
    alone, where there are such; None takes all. Either is said. A file that is named itself is taken.
    """
    given, path = str(path), Path(path)
    if path.is_dir():
        ours = (".report.json", ".statement.json")  # what prepare and mix write beside their rows
        hidden = lambda file: any(part.startswith(".") for part in file.relative_to(path).parts)  # an editor's copies, say
        files = (file for file in path.rglob("*") if file.suffix in SUFFIXES and not hidden(file))
        found = sorted(file for file in files if not file.name.endswith(ours))
        if not found:
            raise UserError(f"{path}: no {', '.join(SUFFIXES)} files in this folder")
        kept = found
        if training:
            kept = [file for file in found if not is_held_out(file.name)]
        elif training is False:
            kept = [file for file in found if is_held_out(file.name, ("val",))] or found
        left = [file.name for file in found if file not in kept]
        some = f"{', '.join(left[:3])}{', ...' * (len(left) > 3)}"
        if not kept:
            raise UserError(f"{path}: the files in this folder are all held out ({some}); name one itself to train on it")
        if left and say:
            what = "held out and not read" if training else "no val files and not read"
            say(f"  {path}: {len(left)} of {len(found)} files are {what} ({some}); a file that is named itself is")
        for file in kept:
            yield from _rows_of(file)
    elif path.exists():
        yield from _rows_of(path)
    elif path.suffix not in (*SUFFIXES, ".txt") and not path.parent.is_dir() and HUB_ID.fullmatch(given):
        yield from hub_rows(given)
    else:
        raise UserError(f"{path}: no such file or folder")


def _rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".json" and read_text(path).lstrip()[:1] == "[":
        yield from ((str(place), value) for place, value in json_values(path))
    elif path.suffix in (".json", ".jsonl"):  # one object a line is also called .json
        yield from ((str(place), json_row(line, str(place))) for place, line in lines(path))
    elif path.suffix == ".csv":
        yield from _csv_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".txt":  # named itself: in a folder it may be anything
        for place, line in lines(path):
            if re.match(r'\s*(\{\s*("|$)|\[\s*(\{|$))', line):
                raise UserError(f"{place}: this looks like JSON; name the file .jsonl (of a .txt each line is a text)")
            yield str(place), {"text": line.strip()}
    else:
        raise UserError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)} or .txt")


def json_row(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}); expected one JSON object a line") from None


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    skips: Skips = []
    for place, cells in table(path, skips, distinct={*chain(*FIELDS.values()), *NAMES}):
        yield str(place), {name: _cell(name, value) for name, value in cells.items()}
    if skips:
        place, reason = skips[0]
        raise UserError(f"{place}: {reason}; quote texts that contain commas or line ends")


def _cell(name: str, value: str) -> Any:
    """CSV knows texts only: label and is_pun are read as true or false, margin, weight, pass_share and rating as numbers, nothing as missing."""
    if name in ("label", "is_pun") and value.strip().lower() in ("true", "false", "1", "0"):
        return value.strip().lower() in ("true", "1")
    if name in ("margin", "weight", "pass_share", "rating"):
        try:
            return float(value) if value.strip() else None
        except ValueError:
            return value
    return value or None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches()
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as parquet ({reason})") from None


def not_written(row: Row) -> str | None:
    """Why a text is not learned to be written: "labelled false", and of one that is no completion "no pun", "a machine's"; else None."""
    if row.get("label") in (False, 0):
        return "labelled false"
    if row.get("completion") is not None:
        return None
    if row.get("is_pun") is False:
        return "no pun"
    return "a machine's" if row.get("source") in SOURCES and row.get("system", "human") != "human" else None


def hub_rows(name: str) -> Iterator[tuple[str, Row]]:
    """Rows of a data set of the hub (or of a local folder in the hub's form); NAME:SPLIT for another split than train."""
    import datasets

    datasets.disable_progress_bars()
    base, _, split = name.partition(":") if not Path(name).is_dir() else (name, "", "")
    try:
        rows: Iterable[Row] = datasets.load_dataset(base, split=split or "train")
    except Exception as error:  # the hub's library raises a dozen kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{name}: not a file here, and the hub's data set cannot be loaded ({reason})") from None
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", dict(row)


def renamed(row: Any, columns: Sequence[str], place: str) -> Any:
    """The row with FIELD taken from COLUMN for each "FIELD=COLUMN"."""
    if not columns or not isinstance(row, dict):
        return row
    found = {name: value for name, value in row.items() if name not in {pair.partition("=")[2] for pair in columns}}
    for pair in columns:
        field, equals, column = pair.partition("=")
        if not (equals and field and column):
            raise UserError(f"--columns {pair}: expected FIELD=COLUMN, for example prompt=question")
        if column not in row:
            raise UserError(f"{place}: no column {column!r} (found: {', '.join(map(str, row))})")
        found[field] = _cell(field, row[column]) if isinstance(row[column], str) else row[column]
    return found
