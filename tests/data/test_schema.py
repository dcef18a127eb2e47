"""Rows from files: every kind is read, every mistake is named with its file and line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from punster.data.files import read_rows, read_texts
from punster.data.schema import FIELDS, check_row, texts_of
from punster.errors import UserError

PAIR = {"prompt": "make a pun about bakers", "chosen": "He kneads the dough.", "rejected": "He bakes bread."}
ROWS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "make a pun about bakers"},
    "sft": {"prompt": "make a pun about bakers", "completion": "He kneads the dough."},
    "preference": PAIR,
    "unpaired": {"prompt": "make a pun about bakers", "completion": "He kneads the dough.", "label": True},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps converted tables; not in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def jsonl(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def refused(path: Path, kind: str, *parts: str) -> str:
    with pytest.raises(UserError) as raised:
        read_rows(path, kind)
    message = str(raised.value)
    assert message.startswith(str(path)), message
    for part in parts:
        assert part in message, message
    return message


@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_from_jsonl(kind: str, tmp_path: Path) -> None:
    row = {**ROWS[kind], "pun_word": "kneads", "id": "x-1"}  # further fields are kept
    path = jsonl(tmp_path / "rows.jsonl", row, "", "   ", row)
    assert read_rows(path, kind) == [row, row]


def write_as(suffix: str, path: Path, rows: list[dict[str, Any]]) -> Path:
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        jsonl(path, *rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("kind", ROWS)
def test_formats_give_the_same_rows(suffix: str, kind: str, tmp_path: Path) -> None:
    tricky = {
        key: (value + ', "quoted"\nsecond line – ünïcode' if isinstance(value, str) else not value)
        for key, value in ROWS[kind].items()
    }
    rows = [ROWS[kind], tricky]
    assert read_rows(write_as(suffix, tmp_path / f"rows{suffix}", rows), kind) == rows


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_a_mistake_in_a_table_is_named_by_its_place(suffix: str, tmp_path: Path) -> None:
    path = write_as(suffix, tmp_path / f"rows{suffix}", [PAIR, {**PAIR, "chosen": "" if suffix == ".csv" else " "}])
    # The second record: in the only line of a JSON array here, in the third of a CSV with a header; Parquet has no lines.
    where = {".json": ", line 1: ", ".csv": ", line 3: ", ".parquet": ", row 2: "}[suffix]
    refused(path, "preference", where, "'chosen'")


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_a_changed_table_is_read_anew(suffix: str, tmp_path: Path) -> None:
    path = write_as(suffix, tmp_path / f"rows{suffix}", [PAIR])
    assert len(read_rows(path, "preference")) == 1
    write_as(suffix, path, [PAIR, {**PAIR, "chosen": "Another one."}])
    assert [row["chosen"] for row in read_rows(path, "preference")] == ["He kneads the dough.", "Another one."]


def test_not_json(tmp_path: Path) -> None:
    refused(
        jsonl(tmp_path / "a.jsonl", PAIR, "", '{"prompt": "cut'),
        "preference",
        ", line 3: not JSON",
        "expected one JSON object a line",
    )
    refused(jsonl(tmp_path / "b.jsonl", "a plain text"), "preference", ", line 1: not JSON")


def test_not_an_object(tmp_path: Path) -> None:
    refused(
        jsonl(tmp_path / "a.jsonl", PAIR, ["a", "list"]),
        "preference",
        ", line 2: found list, expected an object with prompt, chosen, rejected",
    )
    refused(jsonl(tmp_path / "b.jsonl", "3"), "sft", ", line 1: found int")


@pytest.mark.parametrize("kind", ROWS)
def test_missing_field(kind: str, tmp_path: Path) -> None:
    for name in FIELDS[kind]:
        row = {key: value for key, value in ROWS[kind].items() if key != name}
        message = refused(
            jsonl(tmp_path / "a.jsonl", ROWS[kind], row),
            kind,
            f", line 2: field '{name}' is missing",
            f"expected: {', '.join(FIELDS[kind])}",
        )
        assert all(key in message for key in row)  # what was found
    refused(jsonl(tmp_path / "b.jsonl", {}), kind, "found: nothing")
    refused(jsonl(tmp_path / "c.jsonl", {**ROWS[kind], "prompt": None}), kind, "line 1: field 'prompt' is missing")


@pytest.mark.parametrize(
    ("kind", "change", "part"),
    [
        ("sft", {"completion": 3}, "field 'completion': expected text or one chat message, found '3'"),
        ("sft", {"completion": ["a", "b"]}, "field 'completion': expected text or one chat message"),
        ("sft", {"completion": "  \n"}, "field 'completion' is empty"),
        ("sft", {"prompt": 3}, "prompt must be text or chat messages with role and content, found '3'"),
        ("sft", {"prompt": []}, "prompt must be text or chat messages"),
        ("sft", {"prompt": [{"role": "user"}]}, "prompt must be text or chat messages"),
        ("sft", {"prompt": [{"role": "user", "content": None}]}, "prompt must be text or chat messages"),
        ("preference", {"rejected": {"content": "x"}}, "field 'rejected': expected text or one chat message"),
        ("preference", {"chosen": ""}, "field 'chosen' is empty"),
        ("preference", {"margin": "wide"}, "margin must be a number, found 'wide'"),
        ("preference", {"weight": 0}, "weight must be a number above 0, found 0"),
        ("preference", {"pass_share": 0}, "pass_share must be a number from .01 to 1, found 0"),
        ("preference", {"pass_share": "half"}, "pass_share must be a number from .01 to 1, found 'half'"),
        ("preference", {"weight": "2"}, "weight must be a number above 0, found '2'"),
        ("unpaired", {"label": 1}, "label must be true or false, found 1"),
        ("unpaired", {"label": "true"}, "label must be true or false, found 'true'"),
    ],
)  # fmt: skip
def test_wrong_type(kind: str, change: dict[str, Any], part: str, tmp_path: Path) -> None:
    refused(
        jsonl(tmp_path / "rows.jsonl", ROWS[kind], {**ROWS[kind], **change}),
        kind,
        f", line 2: {part}" if "field" not in part else ", line 2",
        part,
    )


def test_chat_messages() -> None:
    turns = [{"role": "system", "content": "Be brief.", "name": "x"}, {"role": "user", "content": "a pun"}]
    answer = [{"role": "assistant", "content": "two tired"}]
    row = check_row({"prompt": turns, "chosen": answer, "rejected": "tired", "margin": 2}, "preference", "here")
    assert row["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a pun"}]
    assert (row["chosen"], row["rejected"], row["margin"]) == ("two tired", "tired", 2)


def test_files_that_are_not_there_or_empty_or_of_another_kind(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.jsonl", "sft", "no such file")
    refused(tmp_path, "sft", "files in this folder")
    refused(jsonl(tmp_path / "empty.jsonl"), "sft", "no rows in this file")
    refused(jsonl(tmp_path / "blank.jsonl", "", " "), "sft", "no rows in this file")
    refused(jsonl(tmp_path / "rows.md", "x"), "sft", "unknown kind of file; expected .jsonl, .json, .csv, .parquet or .txt")
    for line in ('{"text": "x"}', ' { "text": "x"}', '[{"text": "x"}]', '[\n  {\n    "text": "x"\n  }\n]', '{\n"text": "x"}'):
        (tmp_path / "rows.txt").write_text(line)
        refused(tmp_path / "rows.txt", "sft", "line 1: this looks like JSON; name the file .jsonl")
    (tmp_path / "folder.txt").mkdir()
    refused(tmp_path / "folder.txt", "prompt", "files in this folder")
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(ROWS["sft"], ensure_ascii=False).replace("dough", "d\xf6ugh").encode("latin-1"))
    refused(path, "sft", "not UTF-8 text")


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_empty_tables(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b"")
    refused(path, "sft")


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_damaged_tables(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b'[{"prompt": "cut')
    refused(path, "sft", ", line 1: broken JSON" if suffix == ".json" else "cannot be read as parquet")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_line_separators_inside_a_text_do_not_end_a_line(mark: str, tmp_path: Path) -> None:
    row = {"prompt": "make a pun", "completion": f"two{mark}tired"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(path, "sft") == [row]


def test_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((json.dumps(ROWS["sft"]) + "\r\n").encode() * 2)
    assert read_rows(path, "sft") == [ROWS["sft"]] * 2


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"completions": ["a", "b", "c"], "scores": [2.0, float("nan"), 1.0]}, "scores must be a number"),
        ({"completions": ["a", "b"], "scores": [float("inf"), 1.0]}, "scores must be a number"),
        ({"chosen": "a", "rejected": "b", "margin": float("nan")}, "margin must be a number"),
        ({"chosen": "a", "rejected": "b", "margin": True}, "margin must be a number"),
        ({"completion": "a", "label": True, "rating": "good"}, "rating must be a number"),
    ],
)
def test_numbers_of_judged_rows_are_finite(row: dict, named: str) -> None:
    with pytest.raises(UserError, match=f"here: {named}"):
        check_row({"prompt": "p", **row}, "judged", "here")


def test_further_columns_with_texts_are_no_answers() -> None:
    pair = check_row(
        {"prompt": "p", "chosen": "a", "rejected": "b", "completion": "c", "text": "d", "note": "e"}, "judged", "here"
    )
    assert texts_of(pair) == ["a", "b"] and pair["note"] == "e"
    scored = check_row({"prompt": "p", "chosen": "a", "rejected": "b", "scores": [1, 5]}, "judged", "here")
    assert "scores" not in scored  # of a group alone: here they would have turned the pair round
    group = check_row({"prompt": "p", "completions": ["a", "b"], "scores": [2, 1], "text": "d"}, "judged", "here")
    assert texts_of(group) == ["a", "b"]


def test_a_prompt_beside_a_text_to_be_scored_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "about bakers", "text": "dough"}\n{"text": "dough"}\n')
    assert [(row.get("prompt"), row["completion"]) for row in read_texts(file)] == [("about bakers", "dough"), (None, "dough")]


def test_numbers_of_a_csv_file_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("prompt,completion,label,rating,weight\np,a,true,0.5,2\np,b,false,,\n")
    first, second = read_rows(file, "judged")
    assert (first["rating"], first["weight"], second["rating"], second["weight"]) == (0.5, 2.0, None, None)


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        ("sft", {"completion": "ha \ud83d"}, "completion"),
        ("sft", {"prompt": "ha \ude00"}, "prompt"),
        ("sft", {"prompt": [{"role": "user", "content": "ha \ud83d"}]}, "prompt"),
        ("sft", {"completion": [{"role": "assistant", "content": "ha \ud83d"}]}, "completion"),
        ("sft", {"id": "\ud83d"}, "id"),
        ("preference", {"rejected": "ha \ud83d"}, "rejected"),
        ("judged", {"completions": ["a", "ha \ud83d"], "scores": [2, 1]}, "completions"),
    ],
)
def test_half_a_surrogate_pair_is_named_by_its_place(kind: str, change: dict[str, Any], field: str, tmp_path: Path) -> None:
    """JSON can escape it, but nothing that is written or tokenised can hold it."""
    row = ROWS.get(kind, {"prompt": "a pun"})
    path = jsonl(tmp_path / "rows.jsonl", {**PAIR, **row, "pun_word": "\U0001f600"}, {**row, **change})
    refused(path, kind, f", line 2, field {field!r}: found half of a surrogate pair (\\ud", "leave the row out")


def test_half_a_surrogate_pair_in_a_text_to_be_scored(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"text": "fine"}, {"text": "ha \ud83d"})
    with pytest.raises(UserError, match="line 2, field 'text': found half of a surrogate pair"):
        read_texts(path)
