"""Rows of one's own: what a column means, what is said of rows that do not fit, and what a mixture makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from punster.cli import main
from punster.data import corpus
from punster.data.check import check, told
from punster.data.files import read_rows, read_texts
from punster.data.mix import build
from punster.data.prepare import prepare
from punster.data.recipe import Ingredient, Recipe, load_mixture
from punster.data.schema import check_row
from punster.errors import UserError
from punster.train.rows import load_rows
from tests.data.mini import make


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def no_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNSTER_DATA", str(tmp_path / "nowhere"))


def test_what_a_csv_calls_no_pun_is_not_learned(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,is_pun\nBees hum and it stings.,true\nIt rains today.,false\nIt snows today.,False\n")
    assert [row["is_pun"] for row in read_rows(path, "written")] == [True, False, False]
    assert [row["completion"] for row in load_rows([str(path)], "sft", list, quiet=True)] == ["Bees hum and it stings."]


def test_rated_texts_that_a_mixture_wrote_are_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "p", "completion": f"text {n}", "label": None, "rating": n - 1.0, "source": "x"} for n in range(3)]
    file = write(tmp_path / "rated.jsonl", rows)
    assert [row["rating"] for row in load_rows([str(file)], "judged", list)] == [-1.0, 0.0, 1.0]
    for use in ("", "labels"):
        made, _ = build(Recipe(parts=[Ingredient(file=str(file), use=use)]))
        assert sorted(row["rating"] for row in made) == [-1.0, 0.0, 1.0]
    with pytest.raises(UserError, match="field 'chosen' is missing"):
        check_row({"prompt": "p", "completion": "c"}, "judged", "here")
    with pytest.raises(UserError, match="label must be true or false"):
        check_row({"prompt": "p", "completion": "c", "label": "maybe", "rating": 1.0}, "judged", "here")


def test_a_files_texts_can_be_taken_as_they_are(tmp_path: Path) -> None:
    file = str(write(tmp_path / "g.jsonl", [{"text": "It rains today in the town.", "is_pun": False}]))
    assert len(build(Recipe("sft", parts=[Ingredient(file=file, use="texts")]))[0]) == 1
    with pytest.raises(UserError, match="1 no pun"):
        build(Recipe("sft", parts=[Ingredient(file=file, use="puns")]))


def test_pairs_of_a_group_have_its_weight(tmp_path: Path) -> None:
    group = {"prompt": "p", "completions": ["one word", "two words", "three"], "scores": [3, 2, 1], "id": "a", "weight": 5}
    file = str(write(tmp_path / "own.jsonl", [group]))
    for use, count in (("", 3), ("groups", 3), ("ranked", 1)):
        made, _ = build(Recipe(parts=[Ingredient(file=file, use=use)]))
        assert [row["weight"] for row in made] == [5] * count


def test_columns_that_mean_nothing_to_a_kind_may_hold_anything() -> None:
    others = {"weight": 0, "margin": "wide", "pass_share": "x"}
    assert check_row({"prompt": "p", "completion": "c", **others}, "sft", "here")["completion"] == "c"
    assert check_row({"prompt": "p", **others}, "prompt", "here")["prompt"] == "p"
    for name, value in others.items():
        with pytest.raises(UserError, match=name):
            check_row({"prompt": "p", "chosen": "a", "rejected": "b", name: value}, "preference", "here")


def test_a_file_is_looked_for_beside_its_recipe_and_else_named_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixes").mkdir()
    write(tmp_path / "mixes" / "here.jsonl", [{"prompt": "p", "completion": "c"}])
    recipe = tmp_path / "mixes" / "m.yaml"
    recipe.write_text("kind: sft\nparts: [{file: here.jsonl}, {file: owner/puns}]")
    assert [part.file for part in load_mixture("mixes/m.yaml").parts] == ["mixes/here.jsonl", "owner/puns"]


def test_check_says_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("text,source\nBees hum.,\nIt rains.,\n")
    lines = "\n".join(told(check(file)))
    assert "prompts: 0" in lines and "sources: no source given 2" in lines
    weak = next(record["weak"] for record in corpus.part("test") if record["weak"])
    assert len(check(write(tmp_path / "leak.jsonl", [{"text": weak}])).leaks) == 1, "as a mixture's guard has it"
    with pytest.raises(UserError, match=r"nosuch\.jsonl: no such file or folder"):
        check(tmp_path / "nosuch.jsonl")


def test_an_empty_field_is_not_called_found() -> None:
    with pytest.raises(UserError, match=re.escape("field 'completion' is missing (found: prompt; expected: prompt, completion)")):
        check_row({"prompt": "p", "completion": None}, "sft", "here")


def test_texts_to_be_scored_are_read_as_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "a pun"}, {"prompt": "p", "text": "b"}, {"prompt": [{"role": "user", "content": "q"}], "completion": "c"}]
    rows += [{"prompt": "p", "completion": "d", "text": "not this"}]
    file = write(tmp_path / "t.jsonl", rows)
    assert read_texts(file) == [
        {"completion": "a pun", "_place": f"{file}, line 1"}, {"completion": "b", "prompt": "p", "_place": f"{file}, line 2"},
        {"completion": "c", "prompt": [{"role": "user", "content": "q"}], "_place": f"{file}, line 3"},
        {"completion": "d", "prompt": "p", "_place": f"{file}, line 4"},
    ]  # fmt: skip
    for row, message in (
        ({"text": " "}, "field 'text' is empty"),
        ({"prompt": "p"}, r"expected: prompt, completion \(or text alone\)"),
    ):
        with pytest.raises(UserError, match=f"line 1: .*{message}"):
            read_texts(write(tmp_path / "bad.jsonl", [row]))


def test_dialogues_that_share_no_beginning_are_told_so() -> None:
    dialogue = lambda asked: [{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(UserError, match="here: chosen and rejected begin differently"):
        check_row({"chosen": dialogue("x"), "rejected": dialogue("y")}, "preference", "here")


def test_a_column_that_was_renamed_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "c.csv"
    file.write_text("completion\nBees hum in the garden.\n")
    (row,) = read_rows(file, "written", ["text=completion"])
    assert row["text"] == "Bees hum in the garden." and "completion" not in row


def test_a_sources_own_folder_may_be_the_working_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "sources")
    said: list[str] = []
    monkeypatch.chdir(root / "short_jokes")
    report = prepare("short_jokes", tmp_path / "out", Path("."), said.append)
    assert not said and "unguarded" not in str(report["files"])
    monkeypatch.setenv("PUNSTER_DATA", str(root / "short_jokes"))
    assert main(["data", "list"]) == 0


def test_a_source_whose_folder_is_named_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PUNSTER_DATA", str(make(tmp_path / "sources") / "puneval"))
    assert main(["data", "list"]) == 0
    assert re.search(r"^puneval: [^(]*$", capsys.readouterr().out, re.MULTILINE)


def test_every_pair_of_a_group_is_asked_for_alike(punster_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNSTER_DATA", str(punster_data))
    asked: dict[str, set[str]] = {}
    recipe = Recipe(parts=[Ingredient("puneval", use="groups", gap=0.5, cap=20)], guard=False)
    for row in build(recipe, punster_data)[0]:
        asked.setdefault(row["group"], set()).add(str(row["prompt"]))
    assert len(asked) > 100 and all(len(prompts) == 1 for prompts in asked.values())
    assert any(prompts == {"make a pun"} for prompts in asked.values()), "groups on held-out topics"
