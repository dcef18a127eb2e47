"""1,000 malformed inputs: each gives one clear error with file and line, or counted and logged skips; never a traceback."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mini import make

from punster.cli import main
from punster.data.files import read_rows
from punster.data.prepare import prepare
from punster.data.sources import SOURCES
from punster.errors import UserError

EXAMPLES = 64  # a source: 14 x 64 = 896; own files: 4 x 26 = 104
Mutation = Callable[[bytes, float], bytes]


def at(content: bytes, share: float) -> int:
    return int(share * len(content))


def one_match(pattern: bytes, new: bytes) -> Mutation:
    """Replace one match of a pattern, drawn by `share`."""

    def mutate(content: bytes, share: float) -> bytes:
        found = list(re.finditer(pattern, content))
        if not found:
            return content
        match = found[min(int(share * len(found)), len(found) - 1)]
        return content[: match.start()] + match.expand(new) + content[match.end() :]

    return mutate


def insert(piece: bytes) -> Mutation:
    return lambda content, share: content[: at(content, share)] + piece + content[at(content, share) :]


def twice(content: bytes, share: float) -> bytes:
    lines = content.split(b"\n")
    number = min(int(share * len(lines)), len(lines) - 1)
    return b"\n".join([*lines[: number + 1], *lines[number:]])


# What damages a file as a whole, or may remove records without a trace in the file itself.
COARSE: dict[str, Mutation] = {
    "cut off": lambda content, share: content[: at(content, share)],
    "empty": lambda content, share: b"",
    "a byte that is not UTF-8": insert(b"\xff"),
    "Latin-1": lambda content, share: content.replace(b"e", b"\xe9"),
    "UTF-16": lambda content, share: content.decode().encode("utf-16"),
    "a delimiter lost": one_match(rb'[<>"{}\[\],:\t/]', b""),
    "another format": lambda content, share: b"<html><body>Not found</body></html>",
    "a wrong column": one_match(rb"\A(\w*),(\w+)", rb"\1,x\2"),
    "an entity defined": one_match(rb"<corpus", b'<!DOCTYPE c [<!ENTITY a "aaa">]><corpus'),
    "an unknown entity": one_match(rb">(\w)", rb">&nowhere;\1"),
    "nested without end": lambda content, share: b"[" * 100_000,
    "a line lost": one_match(rb"\n[^\n]*(?=\n)", b""),
    "a number without end": one_match(rb": \d+", b": " + b"9" * 5_000),
}
# What spoils single records: then no row may be missing without a logged skip.
FINE: dict[str, Mutation] = {
    "a null": one_match(rb'(": )("[^"\n]*"|\d+)', rb"\1null"),
    "a list for a value": one_match(rb'(": )("[^"\n]*"|\d+)', rb"\1[1, {}]"),
    "an object for a list": one_match(rb"\[[^\[\]{}]*\]", b"{}"),
    "half a surrogate pair": one_match(rb'(": ")', rb"\1\\ud800"),
    "a repeated record": twice,
    "an empty cell": one_match(rb",[^,\n\"]+(?=,)", b","),
    "words for a number": one_match(rb"(?<=[,\t])\d+(?=[,\r\n\t])", b"many"),
    "NUL": insert(b"\x00"),
    "not a number": one_match(rb"(?<=[,\t])\d+(?=[,\r\n\t])", b"nan"),
    "a line of 10 MB": one_match(rb"(?<=[a-z])( )(?=[a-z])", b" " + b"a" * 10_000_000 + b" "),
}


def run(arguments: list[str]) -> tuple[int, str]:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    return code, errors.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("sources"))


def prepared(name: str, root: Path, out: Path) -> tuple[int, str, dict]:
    """What the verb does, without its parsing: any other exception than UserError would be a traceback."""
    try:
        prepare(name, out, root, say=lambda _: None)
    except UserError as error:
        return 2, f"{error}\n", {}
    return 0, "", json.loads((out / f"{name}.report.json").read_text())


def clear(folder: Path) -> None:
    for file in folder.glob("*") if folder.exists() else ():
        file.unlink()


@pytest.mark.parametrize("name", SOURCES)
def test_sources(name: str, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, errors, sound = prepared(name, root, out)
    assert (code, errors) == (0, "")

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(sorted(SOURCES[name].files)),
        st.sampled_from(sorted(COARSE) + [kind for kind in sorted(FINE) for _ in (1, 2) if _ == 1 or "10 MB" not in kind]),
        st.floats(0, 1, exclude_max=True),
        st.booleans(),
    )
    def malformed(file: str, kind: str, share: float, compressed: bool) -> None:
        clear(out)
        path = root / name / file
        original = path.read_bytes()
        zipped = file.endswith(".gz")
        outside = zipped and compressed and kind in ("cut off", "a byte that is not UTF-8", "empty", "another format")
        content = original if outside or not zipped else gzip.decompress(original)
        changed = (COARSE | FINE)[kind](content, share)
        path.write_bytes(changed if outside or not zipped else gzip.compress(changed, 1))
        try:
            code, errors, report = prepared(name, root, out)
        finally:
            path.write_bytes(original)
        event = (file, kind, share, code, errors[:300])
        assert code in (0, 2), event
        if code == 2:
            assert not out.exists() or not any(out.iterdir()), event
            assert errors.count("\n") == 1 and "Traceback" not in errors, event
            assert "no usable rows; skipped:" in errors or (file in errors and re.search(r"line \d+", errors)), event
        else:
            where = report["skipped_where"]
            assert sum(report["skipped"].values()) >= len(where) and all(
                re.match(r".+, line \d+: .+", entry) for entry in where
            ), event
            if kind in FINE and name != "pungen_he2019":  # there records are ratings, and rows their means
                lost = sound["rows"] - sound["in_neither_part"] - (report["rows"] - report["in_neither_part"])
                more = sum(report["skipped"].values()) - sum(sound["skipped"].values())
                assert lost <= 0 or more > 0 or report["in_neither_part"] > sound["in_neither_part"], event

    malformed()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_own_files(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNSTER_DATA", str(tmp_path / "nowhere"))
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"prompt": f"make a pun about number {i}", "chosen": f"a good one {i}", "rejected": f"a bad one {i}"} for i in range(6)
    ]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        original = path.read_bytes()
    elif suffix == ".csv":
        original = ("prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in rows)).encode()
    else:
        original = (
            json.dumps(rows, indent=1).encode()
            if suffix == ".json"
            else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        )

    @settings(max_examples=26, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(COARSE | FINE)), st.floats(0, 1, exclude_max=True))
    def malformed(kind: str, share: float) -> None:
        if suffix == ".parquet" and kind == "UTF-16":
            return
        path.write_bytes((COARSE | FINE)[kind](original, share))
        try:
            found = read_rows(path, "preference")
        except UserError as error:
            message = str(error)
            assert message.startswith(str(path)) and "\n" not in message, (kind, message)
            assert re.search(r"line \d+|no rows in this file|row \d+|cannot be read as parquet", message), (kind, message)
        else:
            removed = kind in ("cut off", "a line lost", "a delimiter lost")
            assert len(found) >= len(rows) or removed, kind
        code, errors = run(["data", "check", str(path)])
        assert code in (0, 2) and "Traceback" not in errors

    malformed()
