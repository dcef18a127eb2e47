"""Texts to many prompts as a file that the other verbs read, and files that no verb writes over."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from punster.api import load
from punster.cli import main
from punster.errors import UserError
from punster.rollout import sampler

PROMPTS = [f"pun: {word}" for word in ("sea", "bread", "time", "sea and bread", "a fish in the bank")]
SHORT = ["--max-new-tokens", "8", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# ---- generate ---------------------------------------------------------------------------------------------------
def test_texts_to_all_prompts_of_a_file(
    sft_run: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []
    original = sampler.generate

    def counted(role: Any, ids: Any, *rest: Any) -> Any:
        asked.append(len(ids))
        return original(role, ids, *rest)

    monkeypatch.setattr("punster.api.generate", counted)
    out = tmp_path / "texts.jsonl"
    command = ["generate", sft_run, "--prompts", str(prompts), "-k", "3", *SHORT]
    assert main([*command, "--out", str(out)]) == 0
    assert asked[0] == len(PROMPTS) and len(asked) <= 5, "not one call for each prompt"
    found = rows(out.read_text())
    assert all(set(row) == {"prompt", "completion"} and row["completion"] for row in found)
    assert [row["prompt"] for row in found] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({tuple(row.values()) for row in found}) == len(found), "the texts of a prompt differ"
    said = capsys.readouterr()
    assert said.out == "" and "generate" in said.err
    assert main([*command, "--quiet"]) == 0  # to the terminal, and the same again
    said = capsys.readouterr()
    assert said.out == out.read_text() and said.err == ""
    assert main([*command, "--seed", "2", "--quiet"]) == 0
    assert capsys.readouterr().out != out.read_text()


def test_one_prompt_is_written_as_it_was_printed(sft_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", sft_run, "-k", "3", *SHORT]
    assert main([*command, PROMPTS[0], "--out", str(tmp_path / "one.jsonl")]) == 0
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": PROMPTS[0]}) + "\n")
    assert main([*command, "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "many.jsonl"), "--quiet"]) == 0
    model = load(sft_run, device="cpu", dtype="fp32")
    texts = model.generate(PROMPTS[0], k=3, max_new_tokens=8)
    expected = [{"prompt": PROMPTS[0], "completion": text} for text in texts]
    assert rows((tmp_path / "one.jsonl").read_text()) == rows((tmp_path / "many.jsonl").read_text()) == expected
    assert model.generate_many(PROMPTS[:1], k=3, max_new_tokens=8) == [texts]


def test_many_prompts_are_sampled_in_parts(sft_run: str, reward_run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many prompts together as fill the sampler; each text is the best of its own block."""
    monkeypatch.setattr(sampler, "ROWS", 8)
    monkeypatch.setattr("punster.api.ROWS", 8)
    model, judge = load(sft_run, device="cpu", dtype="fp32"), load(reward_run, device="cpu", dtype="fp32")
    plain = model.generate_many(PROMPTS, 2, max_new_tokens=8, distinct=False)
    assert [len(texts) for texts in plain] == [2] * len(PROMPTS)
    best = model.generate_many(PROMPTS, 2, best_of=6, judge=judge, max_new_tokens=8, distinct=False)
    scores = [judge.score([p for p in PROMPTS for _ in range(2)], [t for own in texts for t in own]) for texts in (plain, best)]
    assert sum(scores[1]) > sum(scores[0])
    with pytest.raises(UserError, match="prompt 2 has"):
        model.generate_many([PROMPTS[0], "sea " * 200], 1)


def test_embedded_prompts_are_those_of_the_test_part(sft_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    from punster.data import corpus

    assert main(["generate", sft_run, "--prompts", "embedded", *SHORT, "--quiet"]) == 0
    assert [row["prompt"] for row in rows(capsys.readouterr().out)] == corpus.prompts("test")


def test_what_is_missing_is_said(sft_run: str, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", sft_run, "--prompts", str(prompts), "-k", "3", "--temperature", "0", "--quiet", *SHORT]
    assert main(command) == 0
    said = capsys.readouterr()
    found = Counter(row["prompt"] for row in rows(said.out))
    assert set(found.values()) == {3}, "greedy: thrice the same, or nothing"
    assert all(row["completion"] for row in rows(said.out))
    assert (len(found) < len(PROMPTS)) == (f"{len(PROMPTS) - len(found)} of 5 prompts have fewer than 3 texts" in said.err)
    assert main([*command, "--temperature", "0.01"]) == 0
    said = capsys.readouterr()
    assert len(rows(said.out)) < 3 * len(PROMPTS) and "of 5 prompts have fewer than 3 texts" in said.err


def test_other_verbs_read_the_file(sft_run: str, reward_run: str, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "texts.jsonl"
    assert main(["generate", sft_run, "--prompts", str(prompts), "-k", "2", "--out", str(out), "--quiet", *SHORT]) == 0
    assert main(["score", reward_run, str(out), "--out", str(tmp_path / "scores.jsonl"), "--device", "cpu"]) == 0
    assert len(rows((tmp_path / "scores.jsonl").read_text())) == 2 * len(PROMPTS)
    assert main(["data", "check", str(out)]) == 0
    command = ["evaluate", str(out), "--reference", sft_run, "--gold", reward_run, "--prompts", str(prompts), "--samples", "2"]
    assert main([*command, "--out", str(tmp_path / "e"), "--max-new-tokens", "8", "--device", "cpu", "--quiet"]) == 0
    assert set(json.loads((tmp_path / "e" / "summary.json").read_text())["models"]) == {"sft", "texts"}


@pytest.mark.parametrize("order", [0, 1, 2])
def test_one_prompt_or_many_but_not_both(order: int, sft_run: str, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [[sft_run, "make a pun", "--prompts", str(prompts)], ["--prompts", str(prompts), sft_run, "make a pun"],
             [sft_run, "--prompts", str(prompts), "-k", "2", "make a pun"]]  # fmt: skip
    assert main(["generate", *parts[order]]) == 2
    assert "give one prompt, or many by --prompts, not both" in capsys.readouterr().err
    for wrong, expected in (([sft_run], "prompt"), ([sft_run, "--prompts", "none.jsonl"], "no such file"),
                            ([sft_run, "--prompts", str(prompts), "-k", "many"], "many")):  # fmt: skip
        assert main(["generate", *wrong]) == 2
        assert expected in capsys.readouterr().err


# ---- what is written over nothing ---------------------------------------------------------------------------------
def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_verb_writes_over_what_it_reads(
    sft_run: str, reward_run: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "samples.jsonl"
    texts.write_text("".join(json.dumps({"prompt": p, "completion": "the tide."}) + "\n" for p in PROMPTS))
    recipe = tmp_path / "p.yaml"
    recipe.write_text("kind: prompt\nguard: false\nparts: [{file: prompts.jsonl}]\n")
    (tmp_path / "link.jsonl").symlink_to(texts)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    before = contents(tmp_path)
    judged = ["--reference", sft_run, "--gold", reward_run, "--samples", "1", "--out", str(tmp_path)]
    for command in (
        ["score", reward_run, str(texts), "--out", str(texts)],
        ["score", reward_run, str(tmp_path / "link.jsonl"), "--out", str(texts)],
        ["score", reward_run, str(texts), "--out", str(tmp_path / "link.jsonl")],
        ["score", reward_run, str(tmp_path), "--out", str(texts)],
        ["generate", sft_run, "--prompts", str(prompts), "--out", str(prompts)],
        ["generate", sft_run, "--prompts", str(recipe), "--out", str(prompts)],
        ["evaluate", str(texts), "--prompts", str(prompts), *judged],
        ["evaluate", "base", "--prompts", str(texts), *judged],
    ):
        assert main(command) == 2, command
        assert "this file is read here, and would be overwritten" in capsys.readouterr().err
    for command in (["score", reward_run, str(texts)], ["generate", sft_run, "pun"]):
        assert main([*command, "--out", str(tmp_path / "no" / "x.jsonl")]) == 2
        assert "its folder does not exist" in capsys.readouterr().err
        assert main([*command, "--out", str(tmp_path)]) == 2
        assert "is a folder" in capsys.readouterr().err
        for device in ("/dev/null", str(pipe)):
            assert main([*command, "--out", device]) == 2
            assert "no regular file; leave --out away" in capsys.readouterr().err and not Path(device).is_file()
    for out, words in ((texts, "is no folder"), (texts / "e", "is no folder")):
        assert main(["evaluate", "base", *judged[:-1], str(out)]) == 2
        assert words in capsys.readouterr().err
    for page in (Path(sft_run) / "summary.json", tmp_path / "no" / "x.html"):
        kept = page.read_bytes() if page.exists() else b""
        assert main(["report", sft_run, reward_run, "--out", str(page)]) == 2
        assert (page.read_bytes() if page.exists() else b"") == kept
    capsys.readouterr()
    assert contents(tmp_path) == before
    other = tmp_path / "other.jsonl"
    other.symlink_to(tmp_path / "target.jsonl")
    assert main(["score", reward_run, str(texts), "--out", str(other)]) == 0
    assert other.is_symlink() and len((tmp_path / "target.jsonl").read_text().splitlines()) == len(PROMPTS)


@pytest.mark.parametrize("verb", ["ppo", "run"])
def test_an_evaluation_is_not_written_into_a_run(
    verb: str, sft_run: str, reward_run: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    command = ["evaluate", "base", "--reference", sft_run, "--gold", reward_run, "--prompts", str(prompts), "--samples", "1", "--quiet",
               "--max-new-tokens", "4", "--device", "cpu", "--out"]  # fmt: skip
    (folder / "config.yaml").write_text(f"# punster {verb}\nname: run\n")
    for name in ("summary.json", "samples.jsonl"):
        (folder / name).write_text('{"mine": 1}\n')
    before = contents(folder)
    for place in (str(folder), sft_run):
        given = contents(Path(place))
        assert main([*command, place]) == 2
        assert f"--out {place}" in capsys.readouterr().err and contents(Path(place)) == given
    assert contents(folder) == before
    (folder / "config.yaml").write_text("# punster evaluate\nsamples: 1\n")
    for _ in range(2):
        assert main([*command, str(folder)]) == 0
    assert "models" in json.loads((folder / "summary.json").read_text())


def test_python_is_told_what_a_list_is(sft_run: str, reward_run: str) -> None:
    """A text is a sequence of letters, too."""
    writer, judge = load(sft_run, device="cpu", dtype="fp32"), load(reward_run, device="cpu", dtype="fp32")
    with pytest.raises(UserError, match="generate_many takes a list of prompts"):
        writer.generate_many("pun")
    for prompts, completions in (("pun", "dough"), (["pun"], "d"), (["pun", "pun"], ["dough"])):
        with pytest.raises(UserError, match="two lists of the same length"):
            judge.score(prompts, completions)
