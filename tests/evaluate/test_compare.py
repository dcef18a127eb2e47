"""punster evaluate with a judge, and without, on tiny models, from the command line to summary.json and the table."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fake_judge import FakeJudge, by

import punster
from punster.cli import main
from punster.config import EvaluateConfig
from punster.data import corpus
from punster.data.batch import Example
from punster.evaluate.compare import best_of_row, exact_kl, labels_of, picked, shared_depths
from punster.evaluate.folder import read_config
from punster.evaluate.lineage import not_held_out, training_texts
from punster.evaluate.table import judge_sentences
from punster.model.role import score_examples
from punster.rollout.sampler import Decoding, Rollout, generate
from punster.train.setup import open_policy_role, open_reward_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    out = tmp_path_factory.mktemp("runs")
    common = ["--out", str(out), "--model", str(tiny_llama), "--steps", "2", "--quiet", "--eval-prompts", "0", "-b", "4"]
    assert main(["sft", "-n", "sft", *common]) == 0
    assert main(["reward", "-n", "gold", "-p", str(out / "sft"), "--normalise-samples", "8", "--test-limit", "2", *common]) == 0
    assert main(["sft", "-n", "more", "-p", str(out / "sft"), "--lr", "0.01", *common]) == 0
    return out


def command(runs: Path, *more: str) -> list[str]:
    return ["evaluate", "base", str(runs / "more"), str(runs / "sft"), "--limit", "6", "--samples", "2", "--max-new-tokens", "8", "--quiet",
            "--best-of", "2", "--proxy", str(runs / "gold"), *more]  # fmt: skip


def test_a_judge_on_the_command_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A judge who likes long texts; its table stands below the other, and its length-controlled win rate is nearer to half."""
    out = tmp_path / "e"
    with FakeJudge(by(len)) as server:
        judge = ["--judge", server.url, "--judge-model", "fake", "--judge-cache", str(tmp_path / "j.sqlite"), "--out", str(out)]
        assert main(command(runs, *judge)) == 0
        printed = capsys.readouterr().out
        first = (out / "summary.json").read_text()
        paid = len(server.requests)
        assert main(command(runs, *judge)) == 0
        assert len(server.requests) == paid
    assert (out / "summary.json").read_text() == first
    assert "Judged by fake" in printed and "(consistency): 100%" in printed
    summary = json.loads(first)
    assert summary["judge"]["answers"] == paid
    samples: dict[str, list[str]] = {}
    for line in (out / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        samples.setdefault(row["model"], []).append(row["completions"][0])
    assert list(samples) == list(summary["models"]) == ["base", "sft", "more", "best_of_2"]
    for name in ("base", "more", "best_of_2"):
        shares = [(len(a) > len(b)) + 0.5 * (len(a) == len(b)) for a, b in zip(samples[name], samples["sft"], strict=True)]
        assert summary["models"][name]["judge"]["win_rate"]["mean"] == pytest.approx(sum(shares) / 6)
    assert "win_rate" not in summary["models"]["sft"]["judge"]
    for entry in (summary["models"][name] for name in ("base", "more")):
        assert entry["versus_sft"]["wilson"] is None  # shares of several samples are no tosses
        assert entry["versus_sft"]["wins"] + entry["versus_sft"]["ties"] + entry["versus_sft"]["losses"] == 6
    ratings = [summary["models"][name]["rating"]["mean"] for name in ("base", "sft", "more")]
    assert sum(ratings) == pytest.approx(3000)


def test_what_was_found_without_the_judge_stays_when_the_judge_fails(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused: Any = lambda number, body: (401, {}, b'{"error": {"message": "no"}}')
    with FakeJudge(by(len), refused) as server:
        judge = [
            "--judge",
            server.url,
            "--judge-model",
            "fake",
            "--judge-cache",
            str(tmp_path / "j.sqlite"),
            "--out",
            str(tmp_path / "e"),
        ]
        assert main(command(runs, *judge)) == 2
    error = capsys.readouterr().err
    assert "key was not accepted" in error and "Traceback" not in error
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert "judge" not in summary and set(summary["models"]) == {"base", "sft", "more", "best_of_2"}


def test_texts_of_a_file_stand_beside_the_models(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "others.jsonl"
    rows = [{"prompt": p, "completion": f"{word} rose twice"} for p in corpus.prompts("test")[:6] for word in ("dough", "fares")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["evaluate", str(file), *command(runs, "--out", str(tmp_path / "e"))[1:]]
    assert main(asked) == 0
    entry = json.loads((tmp_path / "e" / "summary.json").read_text())["models"]["others"]
    assert (entry["length"], entry["exact_kl"], entry["unique_share"]) == (3, None, 1)
    assert 0 <= entry["win_rate_vs_sft"]["mean"] <= 1
    assert "perplexity_plain" not in entry and entry["eos_rate"] is None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert main(asked) == 2
    assert "fewer than 2 completions" in capsys.readouterr().err


def test_a_prompt_that_is_given_twice_is_one_prompt(runs: Path, tmp_path: Path) -> None:
    """The unit of resampling: rows of few prompts would else look like many."""
    file = tmp_path / "prompts.jsonl"
    asked = ["make a pun", "make a pun about bees", "make a pun"] * 4
    file.write_text("".join(json.dumps({"prompt": prompt, "completion": f"text {i}"}) + "\n" for i, prompt in enumerate(asked)))
    given = [
        "evaluate",
        "base",
        str(runs / "sft"),
        "--gold",
        str(runs / "gold"),
        "--samples",
        "2",
        "--max-new-tokens",
        "8",
        "--quiet",
    ]
    assert main([*given, "--prompts", str(file), "--out", str(tmp_path / "e"), "--temperature", "0.7"]) == 0
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert summary["prompts"] == 2 and summary["models"]["base"]["exposure_gap"] is None


def test_the_plain_base_as_what_others_are_compared_with(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(runs / "sft"), "--reference", "base", "--gold", str(runs / "gold"), "--limit", "4", "--samples", "2"]
    assert main(["evaluate", *given, "--max-new-tokens", "8", "--quiet", "--out", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "win rate vs base" in printed and "Against base, prompt by prompt" in printed and "exact KL to base in nats" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    models = summary["models"]
    assert list(models) == ["base", "sft"] and summary["reference"] == "base"
    assert models["base"]["exact_kl"] == 0 < models["sft"]["exact_kl"]
    assert 0 <= models["sft"]["win_rate_vs_sft"]["mean"] <= 1 and models["base"]["win_rate_vs_sft"]["mean"] == 0.5


def test_states_kept_while_sampling_change_no_figure(runs: Path) -> None:
    where = EvaluateConfig()
    reference, tokenizer = open_policy_role(str(runs / "sft"), where)
    role = open_policy_role(str(runs / "more"), where, tokenizer)[0]
    gold = open_reward_model(str(runs / "gold"), where, reference, tokenizer)
    prompts = [tokenizer.prompt_ids(prompt) for prompt in corpus.prompts("test")[:4]]
    keep = {gold.first_layer, *shared_depths(role, reference)}
    rollout = generate(role, prompts, Decoding(8), tokenizer.eos_id, torch.Generator().manual_seed(1), 2, keep=keep)
    assert rollout.trunk is not None
    assert score_examples(gold, rollout.closed, rollout.trunk) == pytest.approx(score_examples(gold, rollout.closed), abs=1e-4)
    rows = picked(rollout, [1, 4, 7])
    assert rows.examples == [rollout.examples[i] for i in (1, 4, 7)]
    kl = exact_kl(role, reference, rows, 1.0)
    assert len(kl) == 3 and min(kl) > 1e-5
    assert kl == pytest.approx(exact_kl(role, reference, replace(rows, trunk=None), 1.0), rel=1e-3)
    alone = [exact_kl(role, reference, picked(rollout, [i]), 1.0)[0] for i in (1, 4, 7)]
    assert kl == pytest.approx(alone, rel=1e-3)  # each response has its own


def policy_of_gold(runs: Path, ppo: Path) -> Path:
    """A run that says it was trained against the yardstick."""
    shutil.copytree(runs / "more", ppo)
    settings = yaml.safe_load((ppo / "config.yaml").read_text())
    settings = {key: value for key, value in settings.items() if key not in ("data", "pretrained")}
    told = settings | {"actor": str(runs / "sft"), "reward_model": str(runs / "gold")}
    (ppo / "config.yaml").write_text("# punster ppo\n" + yaml.safe_dump(told))
    return ppo


def test_a_model_that_learned_from_the_yardstick_is_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ppo = policy_of_gold(runs, runs / "ppo")
    asked = ["evaluate", str(ppo), str(runs / "more"), "--limit", "2", "--samples", "1", "--max-new-tokens", "4", "--quiet"]
    try:
        assert main([*asked, "--out", str(tmp_path / "e")]) == 0
    finally:
        shutil.rmtree(ppo)
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert summary["not_held_out"] == ["ppo"]
    assert "NOT held out: PPO" in " ".join(capsys.readouterr().out.split())
    interval = summary["models"]["more"]["exact_kl_interval"]
    assert interval["low"] <= interval["mean"] <= interval["high"]
    assert interval["mean"] == pytest.approx(summary["models"]["more"]["exact_kl"])
    assert summary["models"]["more"]["unique_share"] is None  # one text a prompt

    # What the folder says of itself: how it came about, and that no model lies in it.
    settings, verb = read_config(tmp_path / "e" / "config.yaml")
    assert verb == "evaluate" and settings["models"] == [str(ppo), str(runs / "more")] and settings["limit"] == 2
    assert main(["report", str(tmp_path / "e")]) == 0
    card = (tmp_path / "e" / "README.md").read_text()
    assert "A comparison of models" in card and "punster evaluate --config" in card
    assert "text-classification" not in card and "Embedded corpus" not in card


def test_a_reference_that_learned_from_the_yardstick_is_named(runs: Path, tmp_path: Path) -> None:
    ppo = policy_of_gold(runs, tmp_path / "ppo")
    asked = [
        "evaluate",
        str(runs / "more"),
        "--reference",
        str(ppo),
        "--gold",
        str(runs / "gold"),
        "--limit",
        "2",
        "--samples",
        "1",
    ]
    assert main([*asked, "--max-new-tokens", "4", "--quiet", "--out", str(tmp_path / "e")]) == 0
    assert json.loads((tmp_path / "e" / "summary.json").read_text())["not_held_out"] == ["ppo"]


def test_a_checkpoint_has_the_neighbours_of_its_run_and_a_base_many_spellings(
    runs: Path, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """runs/more/checkpoints/step-2 is compared with runs/sft by runs/gold; its base is theirs, however its path was given."""
    monkeypatch.chdir(tiny_llama.parent)
    common = [
        "--model",
        f"./{tiny_llama.name}",
        "--steps",
        "1",
        "--quiet",
        "--eval-prompts",
        "0",
        "-b",
        "4",
        "--out",
        str(tmp_path),
    ]
    assert main(["sft", "-n", "relative", *common]) == 0
    few = ["--limit", "2", "--samples", "1", "--max-new-tokens", "4", "--quiet"]
    place = str(runs / "more" / "checkpoints" / "step-2")
    assert main(["evaluate", place, str(tmp_path / "relative"), *few, "--out", str(tmp_path / "e")]) == 0
    assert set(json.loads((tmp_path / "e" / "summary.json").read_text())["models"]) == {"sft", "step-2", "relative"}
    chosen = punster.load(str(tmp_path / "relative")).generate("a", best_of=2, judge=punster.load(str(runs / "gold")))
    assert len(chosen) == 1


def test_the_folder_one_stands_in_has_a_name() -> None:
    assert labels_of([".", "runs/latest", "runs/x.jsonl"]) == {".": Path.cwd().name, "runs/latest": "latest", "runs/x.jsonl": "x"}


def test_copies_are_of_all_that_any_model_was_taught(tmp_path: Path) -> None:
    def run(name: str, verb: str, **settings: Any) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"# punster {verb}\n" + yaml.safe_dump(settings))
        return str(tmp_path / name)

    def rows(name: str, *given: dict[str, str]) -> list[str]:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in given))
        return [str(tmp_path / name)]

    sft = run("sft", "sft", data=rows("a.jsonl", {"prompt": "p", "completion": "first"}), pretrained=None)
    more = run("more", "sft", data=rows("b.jsonl", {"prompt": "p", "completion": "second"}), pretrained=sft)
    ppo = run("ppo", "ppo", actor=more, sft_coef=0.1, sft_data=rows("c.jsonl", {"prompt": "p", "completion": "third"}))
    given = rows("d.jsonl", {"prompt": "p", "chosen": "fourth", "rejected": "never", "label": None})  # as Parquet has columns
    dpo = run("dpo", "dpo", actor=sft, loss_type="sigmoid", online=False, pairs="data", data=given)
    online = run("online", "dpo", actor=sft, loss_type="sigmoid", online=True, pairs="data", data=["no such file"])
    assert training_texts([sft, online]) == ["first"]
    assert training_texts(["base", ppo]) == ["third", "second", "first"]
    assert set(training_texts([sft, ppo, dpo]) or []) == {"first", "second", "third", "fourth"}
    assert training_texts([run("lost", "ppo", actor="runs/nowhere")]) is None
    assert training_texts([run("odd", "sft", data=["no such file"])]) is None
    assert training_texts(["base"]) is None  # nothing that could be copied

    labels = rows("e.jsonl", *({"prompt": "p", "completion": text, "label": text == "fifth"} for text in ("fifth", "worse")))
    kto = run("kto", "dpo", actor=sft, loss_type="kto", online=False, pairs="data", data=labels)
    assert training_texts([kto]) == ["fifth", "first"]
    own = run("own", "dpo", actor=sft, loss_type="sigmoid", online=False, pairs="data", data=["embedded"])
    found = training_texts([own])
    assert found is not None and found[-1] == "first" and {r["pun"] for r in corpus.part("train")} == set(found[:-1])
    own = run("own-kto", "dpo", actor=sft, loss_type="kto", online=False, pairs="data", data=["embedded"])
    assert training_texts([own]) == found

    # Checkpoints, and a pipeline that has another name now.
    assert training_texts([f"{sft}/checkpoints/step-4"]) == ["first"]
    assert training_texts([run("late", "ppo", actor=f"{more}/checkpoints/step-2")]) == ["second", "first"]
    pipeline = tmp_path / "renamed"
    pipeline.mkdir()
    (pipeline / "config.yaml").write_text("# punster run\nname: demo\n")
    run("renamed/sft", "sft", data=[str(tmp_path / "a.jsonl")])
    assert training_texts([run("renamed/ppo", "ppo", actor="runs/demo/sft", reward_model="runs/demo/gold")]) == ["first"]
    named = lambda path, **settings: not_held_out({"it": path}, str(pipeline / "gold"), EvaluateConfig(**settings))
    run("renamed/gold", "reward")
    assert named(str(pipeline / "ppo")) == named(str(pipeline / "ppo" / "checkpoints" / "step-3")) == {"not_held_out": ["it"]}
    assert named(sft) == named("base") == {}
    shows = {"actor": sft, "loss_type": "sigmoid", "reward_model": str(pipeline / "gold" / "checkpoints" / "step-9")}
    assert named(run("shows", "dpo", online=False, pairs="data", **shows)) == {}
    assert named(run("learns", "dpo", online=False, pairs="sampled", **shows)) == {"not_held_out": ["it"]}
    assert named(sft, best_of=4, proxy=str(pipeline / "gold")) == {"not_held_out": ["best_of_4"]}
    orphan = run("orphan", "ppo", actor=str(tmp_path / "gone" / "sft"))  # which may have begun with anything
    assert named(orphan) == {"lineage_unknown": ["it"]}
    assert "PPO, as the settings of a run that this began with" in judge_sentences({"lineage_unknown": ["ppo"]})[0]


def test_a_best_text_is_never_the_one_that_a_judge_compares_it_with(runs: Path) -> None:
    """Texts of best-of-n come from blocks at the end of the pool; the judge's opponent is its first sample."""
    tokenizer = open_policy_role(str(runs / "sft"), EvaluateConfig())[1]
    examples = [Example((1,), (10 + i,)) for i in range(5)]
    pool = Rollout(examples, [], [True] * 5, tokenizer.eos_id)
    scores = [[9.0, 1.0, 2.0, 4.0, 3.0]]  # the first is the best of all
    _, sampled = best_of_row(EvaluateConfig(best_of=2), pool, scores, scores, tokenizer, None)
    assert sampled.gold == [[4.0, 2.0]] and sampled.rollout.examples == [examples[3], examples[2]]


def test_the_script_for_overoptimisation_runs(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "more"
    shutil.copytree(runs / "more", run)
    for step in (1, 3):
        shutil.copytree(run / "checkpoints" / "step-2", run / "checkpoints" / f"step-{step}")
    path = Path(__file__).resolve().parents[2] / "scripts" / "over_optimisation.py"
    given = ["--reference", str(runs / "sft"), "--proxy", str(runs / "gold"), "--gold", str(runs / "gold"), "--prompts", "3"]
    monkeypatch.setattr(sys, "argv", [str(path), str(run), *given, "--best-of", "2", "--max-new-tokens", "6"])
    runpy.run_path(str(path), run_name="__main__")
    found = json.loads((run / "summary.json").read_text())["over_optimisation"]
    assert found["kl"][0] == 0 < found["kl"][1] and len(found["kl"]) == 4


def test_nothing_is_called_or_imported_without_a_judge(runs: Path, tmp_path: Path) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('a connection was opened')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "from punster.cli import main\n"
        f"code = main({command(runs)!r})\n"
        "assert 'openai' not in sys.modules and code == 0, code\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_mistakes_in_the_models_are_found_before_anything_is_sampled(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("punster.evaluate.compare.generate", lambda *_: pytest.fail("sampled"))
    file = tmp_path / "few.csv"
    file.write_text("prompt,completion\n" + "".join(f"{prompt},so few\n" for prompt in corpus.prompts("test")[:6]))
    for name, words in (
        (str(runs / "moer"), "no such run. Did you mean"),
        (str(file), "fewer than 2 completions"),
        ("x.jsonl", "no such file"),
    ):
        assert main([*command(runs)[:3], name, *command(runs)[3:]]) == 2
        assert words in capsys.readouterr().err


def test_texts_of_a_table(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "others.csv"
    file.write_text("prompt,completion\n" + "".join(f"{prompt},it rose\n" for prompt in corpus.prompts("test")[:6] * 2))
    assert main(["evaluate", str(file), *command(runs, "--out", str(tmp_path / "e"))[1:]]) == 0
    assert json.loads((tmp_path / "e" / "summary.json").read_text())["models"]["others"]["length"] == 2
