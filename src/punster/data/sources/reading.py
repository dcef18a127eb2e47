"""What the readers of public sources share: text, tables, JSON and XML with file and line, and a record of what is passed over.

A file that is damaged as a whole (not UTF-8, broken XML or JSON, a truncated gzip, wrong columns) raises UserError with
file and line. A single record that does not fit is passed over and counted in Skips, with file, line and reason.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from punster.data.schema import Row
from punster.errors import UserError

MAX_BYTES = 500_000_000  # of a file after decompression: a gzip bomb must not fill the memory
MAX_TEXT = 20_000  # characters of one text; far above any joke or dialogue of the sources
csv.field_size_limit(2**31 - 1)  # an overlong field is a record to pass over, not the end of the file


class BadRecord(ValueError):
    """One record does not fit; the message is the reason that is logged."""


@dataclass(frozen=True)
class Place:
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


Skips = list[tuple[Place, str]]  # records that were passed over: where and why
Located = Iterator[tuple[Place, Row]]
XmlText = tuple[str, tuple[tuple[str, str], ...]]  # id, and (word id, token) of each word


def each(records: Iterable[tuple[Place, Any]], convert: Callable[..., Iterable[Row]], skips: Skips, *more: Any) -> Located:
    """The rows of convert(record, *more) for each record; a BadRecord becomes a counted skip."""
    for place, record in records:
        try:
            rows = list(convert(record, *more))
        except BadRecord as error:
            skips.append((place, str(error)))
            continue
        for row in rows:
            yield place, row


def need(record: Any, name: str, kind: type = str) -> Any:
    """A field of a record, of the given type (str must not be blank); BadRecord says what is wrong."""
    if not isinstance(record, dict):
        raise BadRecord("the record is not an object")
    value = record.get(name)
    if value is None:
        raise BadRecord(f"field {name!r} is missing or null")
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind:
        raise BadRecord(f"field {name!r} is not {kind.__name__}")
    if isinstance(value, str) and not value.strip():
        raise BadRecord(f"field {name!r} is empty")
    return value


def number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise BadRecord(f"field {name!r} is not a number") from None
    if not abs(value) < 1e9:
        raise BadRecord(f"field {name!r} is not a finite number")
    return value


def choice(text: str, known: dict[str, Any], name: str) -> Any:
    if text not in known:
        raise BadRecord(f"field {name!r} is none of {', '.join(map(repr, known))}")
    return known[text]


# ---- files --------------------------------------------------------------------------------------------------------
def read_text(path: Path) -> str:
    """The text of a file in UTF-8, a .gz decompressed."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; 'punster data list' says where each source comes from")
    content = bytearray()
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            while part := handle.read(1 << 20):
                content += part
                if path.suffix == ".gz" and len(content) > MAX_BYTES:
                    raise UserError(f"{path}: more than {MAX_BYTES} bytes after decompression; refused")
        return content.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        line = 1 + content.count(b"\n")
        raise UserError(f"{path}, line {line}: damaged or truncated gzip ({error}); fetch the file again") from None
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None


def lines(path: Path) -> Iterator[tuple[Place, str]]:
    """Lines that are not blank. Not splitlines: U+2028 may stand inside a text."""
    for line_number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield Place(str(path), line_number), line.rstrip("\r")


def table(
    path: Path, skips: Skips, columns: Sequence[str] = (), header: bool = True, distinct: Collection[str] = ()
) -> Iterator[tuple[Place, dict[str, str]]]:  # fmt: skip
    """Records of a CSV file with at least these columns (without a header: exactly these); other widths are skips.

    Of columns of one name the last counts; those that must be `distinct` are refused.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    names = list(columns)
    try:
        if header:
            names = [name.strip() for name in next((cells for cells in reader if cells), [])]
            if twice := [name for name in names if name in distinct and names.count(name) > 1]:
                raise UserError(f"{path}, line {reader.line_num}: two columns are called {twice[0]!r}; rename one")
            if missing := [name for name in columns if name not in names]:
                found = f"(found: {', '.join(names)[:200] or 'nothing'}; expected: {', '.join(columns)})"
                raise UserError(f"{path}, line {max(1, reader.line_num)}: column {missing[0]!r} is missing {found}")
        for cells in reader:
            place = Place(str(path), reader.line_num)
            if len(cells) == len(names):
                yield place, dict(zip(names, cells, strict=True))
            elif cells:
                skips.append((place, f"{len(names)} columns expected, another number found"))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: broken CSV ({error})") from None


def line_at(content: str) -> Callable[[int], int]:
    """The line, from 1, of a place in a text."""
    ends = [match.start() for match in re.finditer("\n", content)]
    return lambda at: 1 + bisect_left(ends, at)


def json_items(path: Path, opening: str = "{") -> Iterator[tuple[Place, tuple[str, Any]]]:
    """(key, value) of a file that is one object, or with opening "[" (number, value) of an array; and the line of each."""
    content = read_text(path)
    line, decode = line_at(content), json.JSONDecoder().raw_decode

    def skip(at: int) -> int:
        while content[at] in " \t\r\n,:":
            at += 1
        return at

    try:
        json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from None
    except (RecursionError, ValueError):
        pass  # a value is too deep or too long: found again below, with its place
    at, number = skip(0), 0
    if content[at] != opening:
        raise UserError(f"{path}, line {line(at)}: broken JSON (expected {opening}, found {content[at]})")
    at = skip(at + 1)
    while content[at] not in "]}":
        key, start = str(number), at
        try:
            if opening == "{":
                key, at = decode(content, at)
            value, at = decode(content, skip(at))
        except (RecursionError, ValueError) as error:
            raise UserError(f"{path}, line {line(at)}: unreadable JSON ({error})") from None
        yield Place(str(path), line(start)), (key, value)
        at, number = skip(at), number + 1


def json_values(path: Path) -> Iterator[tuple[Place, Any]]:
    return ((place, value) for place, (_, value) in json_items(path, "["))


def by_key(items: Iterable[tuple[Place, tuple[str, Any]]], skips: Skips) -> dict[str, Any]:
    """A lookup table; a repeated key keeps its first value and is logged."""
    found: dict[str, Any] = {}
    for place, (key, value) in items:
        if key in found:
            skips.append((place, "repeated key"))
        else:
            found[key] = value
    return found


def xml_texts(path: Path) -> Iterator[tuple[Place, XmlText]]:
    """The <text id><word id>token</word>…</text> elements; a document type, which may define entities, is refused."""
    content = read_text(path)
    line = line_at(content)
    if (declared := content.find("<!DOCTYPE")) >= 0:
        raise UserError(f"{path}, line {line(declared)}: a document type declaration is not accepted")
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise UserError(f"{path}, line {error.position[0]}: broken XML ({expat.ErrorString(error.code)})") from None
    for text, opened in zip(root.iter("text"), re.finditer(r"<text[\s/>]", content), strict=False):
        words = tuple((word.get("id", ""), word.text or "") for word in text.iter("word"))
        yield Place(str(path), line(opened.start())), (text.get("id", ""), words)
