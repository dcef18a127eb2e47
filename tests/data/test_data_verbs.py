"""punster data: list, prepare, check, mix; their exit codes and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mini import PUNS, make

from punster.cli import main
from punster.data.sources import SOURCES


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def copies(mini: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PUNSTER_DATA", str(mini))
    return mini


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts), error


def test_list(copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list", "--names"]) == 0
    assert capsys.readouterr().out.splitlines() == list(SOURCES) and len(SOURCES) == 14
    assert main(["data", "list"]) == 0
    told = capsys.readouterr().out
    assert told.count("** not cleared for commercial use **") == 12 and told.count("licence ") == 14
    assert "by hand: upstream has pickle files" in told and "no local copy" not in told
    assert main(["data"]) == 0 and "data mix" in capsys.readouterr().out


def test_prepare_with_the_folder_of_all_or_the_sources_own(
    copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, given in enumerate((copies, copies / "puneval")):
        out = tmp_path / str(number)
        assert main(["data", "prepare", "puneval", "--from", str(given), "--out", str(out)]) == 0
        assert "puneval.group.train.jsonl: 2 rows" in capsys.readouterr().out
        assert {path.name for path in out.iterdir()} == {
            *(f"puneval.{kind}.{part}.jsonl" for kind in ("text", "preference", "group") for part in ("train", "val")),
            "puneval.report.json",
        }
    (out / "puneval.short.jsonl").write_text("mine")
    (out / "puneval.group.unguarded.jsonl").write_text("of an earlier preparation")
    assert main(["data", "prepare", "puneval", "--from", str(copies), "--out", str(out)]) == 0
    assert (out / "puneval.short.jsonl").read_text() == "mine" and not (out / "puneval.group.unguarded.jsonl").exists()
    assert main(["data", "check", str(out / "puneval.group.train.jsonl")]) == 0
    report = json.loads((out / "puneval.report.json").read_text())
    assert report["licence"] == SOURCES["puneval"].licence and report["in_neither_part"] == 1


def test_prepare_refuses(copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    refused(
        ["data", "prepare", "punevil", "--from", str(copies), "--out", out],
        capsys,
        "unknown source 'punevil'. Did you mean puneval",
    )
    refused(["data", "prepare", "puneval", "--from", str(copies)], capsys, "--out DIR is needed")
    refused(["data", "prepare", "puneval", "--from", str(tmp_path / "no"), "--out", out], capsys, "no: no such folder")
    refused(["data", "prepare", "puneval", "--from", str(tmp_path), "--out", out], capsys, "hom_dataset.json is missing")
    refused(["data", "prepare", "crowdtruth_shorttext", "--out", out], capsys, "cannot be downloaded as it is", "pickle")
    refused(["data", "sort"], capsys, "unknown action 'sort'")
    assert not Path(out).exists()


def test_check_names_every_problem(copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    pair = {"prompt": "make a pun", "chosen": "a longer text", "rejected": "a text", "id": "1", "source": "mine"}
    leak = {"prompt": "make a pun", "completion": PUNS["hom_1013"][0].replace(" ,", ","), "id": "2"}
    path.write_text("".join(line + "\n" for line in (
        json.dumps(pair), json.dumps({**pair, "id": "1"}), json.dumps(leak), json.dumps({**leak, "id": "3", "split": "val", "prompt": "x"}))))  # fmt: skip
    assert main(["data", "check", str(path)]) == 0
    told = capsys.readouterr().out
    for part in ("rows: 4 (2 preference, 2 sft)", "chosen one in 100.0%", "duplicates: 2", f"{path}, line 2: the same texts as {path}, line 1",
                 f"{path}, line 2: the id '1' again", "suspected leakage: 1", f"{path}, line 3: near to a held-out text", "problems: 0",
                 "SemEval evaluation texts"):  # fmt: skip
        assert part in told, part
    path.write_text('{"prompt": "x", "completion": ""}\nnot json\n{"prompt": "x", "completion": "fine"}\n')
    refused(["data", "check", str(path)], capsys, f"{path}, line 1: field 'completion' is empty (and 1 more)")
    path.write_text('{"prompt": "x", "completion": "ha \\ud83d"}\n')
    refused(["data", "check", str(path)], capsys, f"{path}, line 1, field 'completion': found half of a surrogate pair")
    path.write_text('{"text": "It snows.", "label": false}\n')  # SFT takes such a file, and leaves this row out
    assert main(["data", "check", str(path)]) == 0 and "rows: 1 (1 text)" in capsys.readouterr().out
    path.write_text("\n")
    refused(["data", "check", str(path)], capsys, "no rows in this file")


def test_mix_writes_rows_and_a_statement_or_nothing(copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mixed.jsonl"
    assert main(["data", "mix", "puns", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "NOT cleared for commercial use" in told and str(out) in told
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    statement = json.loads((tmp_path / "mixed.jsonl.statement.json").read_text())
    assert statement["rows"] == len(rows) == 5 and {row["source"] for row in rows} <= set(SOURCES)
    assert main(["data", "check", str(out)]) == 0
    recipe = tmp_path / "r.yaml"
    recipe.write_text("kind: sft\nparts: [{source: embedded, colour: red}]\n")
    refused(["data", "mix", str(recipe), "--out", str(tmp_path / "new.jsonl")], capsys, "unknown key 'colour'")
    refused(["data", "mix", "puns"], capsys, "--out FILE is needed")
    refused(["data", "mix", "puns", "--out", str(tmp_path / "no" / "x.jsonl")], capsys, "its folder does not exist")
    assert not (tmp_path / "new.jsonl").exists()


def test_mix_never_writes_over_what_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, folder, recipe = tmp_path / "mine.csv", tmp_path / "more", tmp_path / "r.yaml"
    folder.mkdir()
    mine.write_text("prompt,completion\nmake a pun,a text of mine\n")
    (folder / "x.jsonl").write_text(json.dumps({"prompt": "make a pun", "completion": "another text"}) + "\n")
    recipe.write_text("kind: sft\nguard: false\nparts: [{file: mine.csv}, {file: more}]\n")
    (tmp_path / "link.csv").symlink_to(mine)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for target in (mine, folder / "x.jsonl", recipe, tmp_path / "link.csv", folder / ".." / "mine.csv"):
        refused(["data", "mix", str(recipe), "--out", str(target)], capsys, f"--out {target}: this file is read here")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for _ in range(2):  # its own result may be made again
        assert main(["data", "mix", str(recipe), "--out", str(tmp_path / "new.jsonl")]) == 0
    assert len((tmp_path / "new.jsonl").read_text().splitlines()) == 2


def test_training_takes_puns_and_mixtures(copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from punster.data import corpus
    from punster.train.rows import load_prompts, load_rows

    assert len(load_rows(["puns", "embedded"], "sft", corpus.sft_rows)) == 5 + len(corpus.part("train"))
    assert "of which:" in capsys.readouterr().err
    recipe = tmp_path / "p.yaml"
    recipe.write_text("kind: preference\nguard: false\nparts: [{source: puneval, use: groups, gap: .5}]\n")
    assert len(load_rows([str(recipe)], "preference", None)) == 2
    assert load_prompts("puns") and load_prompts("puns", "test")
    capsys.readouterr()
    assert len(load_rows(["puns"], "sft", None, quiet=True)) == 5 and load_prompts("puns", quiet=True)
    assert capsys.readouterr().err == ""


def test_quiet_training_on_a_mixture_prints_its_folder_alone(
    copies: Path, tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sft", "-n", "x", "--model", str(tiny_llama), "--out", str(tmp_path), "--data", "puns", "-b", "4", "--steps", "1"]
    assert main([*command, "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.split() == [str(tmp_path / "x")]
