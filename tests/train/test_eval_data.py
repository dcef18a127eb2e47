"""Held-out rows of one's own (--eval-data, eval_rows): what is measured on them, and that nothing else changes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import punster.train.dpo as dpo_module
from punster.config import DistillConfig, DpoConfig, GrpoConfig, PipelineConfig, PpoConfig, RewardConfig, SftConfig
from punster.data.batch import collate
from punster.data.corpus import unpaired
from punster.errors import UserError
from punster.evaluate.figures import curves_of
from punster.evaluate.folder import read_run
from punster.rollout.logprobs import token_log_probs
from punster.train.checkpoint import load_run
from punster.train.distill import distill
from punster.train.dpo import dpo, encode_given
from punster.train.grpo import grpo
from punster.train.pipeline import run_pipeline
from punster.train.ppo import ppo
from punster.train.reward import train_reward
from punster.train.rows import encode
from punster.train.sft import sft

Make = Callable[..., Any]
ROWS = [{"prompt": f"pun: bee {i}", "completion": f"the bee made {i} honey."} for i in range(12)]
PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": f"a dull fact {i}."} for i, r in enumerate(ROWS)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def nll(run: Path | None, rows: list[dict[str, Any]]) -> float:
    """Cross-entropy a response token, text by text, without the trunk."""
    role, tokenizer = load_run(str(run))
    found = []
    with torch.no_grad():
        for row in rows:
            batch = collate([encode(tokenizer, role.model, row)])
            found.append(token_log_probs(role.response_hidden(batch), role.model.head, batch.targets()))
    return -float(torch.cat(found).mean())


def test_sft_is_measured_on_rows_of_ones_own(
    tiny_llama: Path, tmp_path: Path, make: Make, reader: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {"out": str(tmp_path), "model": str(tiny_llama), "steps": 4, "lr": 1e-2, "eval_every": 2, "eval_prompts": 3}
    plain = sft(make(SftConfig, name="plain", **shared), ROWS[:8])
    file = write(tmp_path / "mine.jsonl", [{"question": r["prompt"], "answer": r["completion"]} for r in ROWS[8:]])
    named = {"data": [write(tmp_path / "rows.jsonl", ROWS[:8])], "eval_data": [file]}
    with pytest.raises(UserError, match=r"mine\.jsonl, line 1: field 'prompt' is missing"):
        sft(make(SftConfig, name="wrong", **shared, **named))
    columns = ["prompt=question", "completion=answer"]  # which all files of a command have
    question = write(tmp_path / "train.jsonl", [{"question": r["prompt"], "answer": r["completion"]} for r in ROWS[:8]])
    both = sft(make(SftConfig, name="both", **shared, data=[question], eval_data=[file], columns=columns))
    assert reader.summary(both)["eval_loss"] == pytest.approx(nll(both, ROWS[8:]), rel=1e-5)
    renamed = write(tmp_path / "mine.jsonl", ROWS[8:])
    run = sft(make(SftConfig, name="own", **shared, data=named["data"], eval_data=[renamed]))
    assert reader.tensor_bytes(run) == reader.tensor_bytes(plain)  # what is looked at changes nothing
    assert reader.summary(run)["eval_loss"] == pytest.approx(nll(run, ROWS[8:]), rel=1e-5)
    assert reader.summary(plain)["eval_loss"] != pytest.approx(reader.summary(run)["eval_loss"], rel=1e-2)
    shown = [row["prompt"] for row in reader.lines(run, "samples.jsonl")]
    assert shown == [row["prompt"] for row in ROWS[8:11]] * 2
    assert "eval_loss" in {curve.metric for curve, _ in curves_of(read_run(Path(str(run))))}
    capsys.readouterr()
    from_python = sft(make(SftConfig, name="python", **{**shared, "quiet": False}), ROWS[:8], eval_rows=ROWS[6:])
    assert "note: 2 of 6 rows of --eval-data are trained on, too" in capsys.readouterr().err
    assert reader.summary(from_python)["eval_loss"] == pytest.approx(nll(from_python, ROWS[6:]), rel=1e-5)
    assert (
        "(given from Python)"
        in (Path(str(from_python)) / "config.yaml").read_text().split("eval_data:")[1].split("eval_every")[0]
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_dpo_is_measured_on_held_out_pairs(
    loss_type: str, tiny_llama: Path, sft_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    """As TRL names them; the sigmoid loss and the accuracy against sums over single texts, without the trunk."""
    shared = {"out": str(tmp_path), "model": str(tiny_llama), "actor": sft_run, "steps": 6, "batch_size": 4, "lr": 1e-2,
              "eval_every": 1, "save_every": 1, "keep": 1, "eval_prompts": 2, "loss_type": loss_type}  # fmt: skip
    # What is held out wants the opposite, so that its loss is best at the first step and that of training is not.
    rows, held_out = PAIRS[:8], [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS[8:]]
    if loss_type == "kto":
        rows, held_out = unpaired(rows), unpaired(held_out)
    plain = dpo(make(DpoConfig, name="plain", **shared), rows)
    run = dpo(make(DpoConfig, name="own", **shared, eval_data=[write(tmp_path / "mine.jsonl", held_out)]), rows)
    assert reader.tensor_bytes(run) == reader.tensor_bytes(plain)
    lines = reader.lines(run)
    names = {"eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins"}
    assert names <= lines[0].keys() and not any(key.startswith("eval_") for key in reader.lines(plain)[0])
    summary = reader.summary(run)
    assert {name: summary[name] for name in names} == {name: lines[-1][name] for name in names}
    assert {row["prompt"] for row in reader.lines(run, "samples.jsonl")} == {row["prompt"] for row in PAIRS[8:10]}
    losses = {line["step"]: line["eval_loss"] for line in lines}
    kept = {int(p.name[5:]) for p in (Path(str(run)) / "checkpoints").iterdir()}
    best = min(losses, key=lambda step: (losses[step], -step))
    assert kept == {6, best} and best != min(lines, key=lambda line: line["loss"])["step"]
    once = dpo(make(DpoConfig, name="once", **{**shared, "eval_every": 0}, eval_data=[str(tmp_path / "mine.jsonl")]), rows)
    training = {line["step"]: line["loss"] for line in reader.lines(once)}  # a held-out loss of the last step chooses nothing
    assert {int(p.name[5:]) for p in (Path(str(once)) / "checkpoints").iterdir()} == {6, min(training, key=lambda s: training[s])}
    if loss_type == "kto":
        return
    policy, reference = (lambda row, path=path: -nll(path, [row]) for path in (run, Path(sft_run)))
    _, tokenizer = load_run(sft_run)
    gaps = []
    for row in held_out:
        sums = []
        for side in ("chosen", "rejected"):
            text = {"prompt": row["prompt"], "completion": row[side]}
            sums.append((policy(text) - reference(text)) * len(tokenizer.response_ids(row[side])))
        gaps.append(0.1 * (sums[0] - sums[1]))
    assert summary["eval_loss"] == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps), rel=1e-4)
    assert summary["eval_rewards/accuracies"] == sum(gap > 0 for gap in gaps) / len(gaps)


def test_a_resumed_run_has_the_same_held_out_figures(
    tiny_llama: Path, sft_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    shared = {"model": str(tiny_llama), "actor": sft_run, "steps": 4, "batch_size": 4, "save_every": 1, "keep": 4, "eval_every": 2,
              "eval_prompts": 2, "eval_data": [write(tmp_path / "mine.jsonl", PAIRS[8:])]}  # fmt: skip
    (tmp_path / "again").mkdir()
    whole = dpo(make(DpoConfig, name="x", out=str(tmp_path), **shared), PAIRS[:8])
    part = reader.interrupted_copy(whole, tmp_path / "again" / "x", 2)
    assert dpo(make(DpoConfig, name="x", out=str(tmp_path / "again"), resume=True, **shared), PAIRS[:8]) == part
    assert reader.lines(part) == reader.lines(Path(str(whole)))
    same = [{k: v for k, v in reader.summary(run).items() if k != "wall_seconds"} for run in (part, whole)]
    assert same[0] == same[1]


@pytest.mark.parametrize("verb", ["ppo", "grpo", "dpo"])
def test_policies_show_what_they_write_to_ones_own_prompts(
    verb: str, tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    kinds: dict[str, tuple[type, Callable[..., Path | None], dict[str, Any]]] = {
        "ppo": (PpoConfig, ppo, {}), "grpo": (GrpoConfig, grpo, {"samples": 2}),
        "dpo": (DpoConfig, dpo, {"online": True, "samples": 2}),
    }  # fmt: skip
    kind, train, more = kinds[verb]
    asked = [{"prompt": f"pun: moon {i}"} for i in range(5)]
    config = make(kind, name=verb, out=str(tmp_path), model=str(tiny_llama), actor=sft_run, reward_model=reward_run, steps=2,
                  batch_size=4, max_new_tokens=6, eval_prompts=3, eval_data=[write(tmp_path / "asked.jsonl", asked)], **more)  # fmt: skip
    run = train(config)
    held_out = [row["prompt"] for row in reader.lines(run, "samples.jsonl") if row.get("held_out")]
    assert held_out == ["pun: moon 0", "pun: moon 1", "pun: moon 2"]


def test_reward_models_are_measured_on_what_is_named_alone(tiny_llama: Path, tmp_path: Path, make: Make, reader: Any) -> None:
    shared = {
        "out": str(tmp_path),
        "model": str(tiny_llama),
        "steps": 2,
        "batch_size": 4,
        "normalise_samples": 0,
        "test_limit": 1,
    }
    own = [{**pair, "source": "mine"} for pair in PAIRS[8:]]
    run = train_reward(make(RewardConfig, name="own", **shared, eval_data=[write(tmp_path / "mine.jsonl", own)]), PAIRS[:8])
    both = train_reward(
        make(RewardConfig, name="both", **shared, eval_data=["embedded", str(tmp_path / "mine.jsonl")]), PAIRS[:8]
    )
    python = train_reward(make(RewardConfig, name="python", **shared), PAIRS[:8], eval_rows=own)
    unnamed = train_reward(make(RewardConfig, name="unnamed", **shared), PAIRS[:8], eval_rows=PAIRS[8:])
    lengths = {"longer right", "shorter right", "equally long"}
    sources = [set(reader.summary(run)["reliability"]) - lengths for run in (run, both, python, unnamed)]
    assert sources == [{"mine"}, {"mine", "embedded"}, {"mine"}, {"no source named"}]
    assert reader.values(run, "eval_accuracy") == reader.values(python, "eval_accuracy")


def test_too_long_pairs_of_a_reward_models_eval_data_are_said(
    tiny_llama: Path, tmp_path: Path, make: Make, reader: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {
        "out": str(tmp_path),
        "model": str(tiny_llama),
        "steps": 1,
        "batch_size": 4,
        "normalise_samples": 0,
        "test_limit": 1,
    }
    long = {"prompt": "pun: " + "sea " * 150, "chosen": "tide", "rejected": "dull"}
    train_reward(make(RewardConfig, name="some", **{**shared, "quiet": False}), PAIRS[:8], eval_rows=[long, *PAIRS[6:]])
    told = capsys.readouterr().err
    assert (
        "1 of 7 pairs of --eval-data left out: longer" in told and "note: 2 of 7 rows of --eval-data are trained on, too" in told
    )
    with pytest.raises(UserError, match="--eval-data: none of its pairs fits"):
        train_reward(make(RewardConfig, name="none", **shared), PAIRS[:8], eval_rows=[long])


@pytest.mark.parametrize("verb", ["sft", "reward", "distill", "dpo", "sampled", "ppo", "run"])
def test_a_mistake_in_eval_data_costs_no_work(
    verb: str, tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found before anything is sampled, trained or written, --dry-run and sections of a recipe included."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("sampled")

    for module in ("distill", "dpo", "experience", "lessons"):
        monkeypatch.setattr(f"punster.train.{module}.generate", never)
    missing = [str(tmp_path / "nowhere.jsonl")]
    shared = {"name": "x", "out": str(tmp_path / "runs"), "model": str(tiny_llama), "eval_data": missing}
    policy = {**shared, "actor": sft_run, "reward_model": reward_run}
    calls: dict[str, Callable[[], Any]] = {
        "sft": lambda: sft(make(SftConfig, **shared, dry_run=True)),
        "reward": lambda: train_reward(make(RewardConfig, **shared, pretrained=sft_run, negatives=["sampled"])),
        "distill": lambda: distill(make(DistillConfig, **policy)),
        "dpo": lambda: dpo(make(DpoConfig, **{**policy, "reward_model": None}, dry_run=True)),
        "sampled": lambda: dpo(make(DpoConfig, **policy, pairs="sampled")),
        "ppo": lambda: ppo(make(PpoConfig, **policy, dry_run=True)),
        "run": lambda: run_pipeline(PipelineConfig(name="x", out=str(tmp_path / "runs"), model=str(tiny_llama), stages=["sft", "gold"],
                                                   gold={"eval_data": missing}, dtype="fp32", quiet=True)),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file"):
        calls[verb]()
    assert not (tmp_path / "runs").exists()


def test_eval_data_of_a_stage_that_is_done_may_be_gone(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "x" / "gold"
    place.mkdir(parents=True)
    missing = {"eval_data": [str(tmp_path / "nowhere.jsonl")]}
    config = PipelineConfig(name="x", out=str(tmp_path), model=str(tiny_llama), stages=["sft", "gold"], gold=missing, dtype="fp32",
                            resume=True, dry_run=True)  # fmt: skip
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file"):
        run_pipeline(config)
    (place / "summary.json").write_text(json.dumps({"wall_seconds": 1.0}))
    run_pipeline(config)
    assert "sft" in capsys.readouterr().out


def test_labels_of_texts_follow_the_rows_that_are_kept(tiny_llama: Path, sft_run: str, make: Make) -> None:
    role, tokenizer = load_run(sft_run)
    rows = [
        {"prompt": "sea", "completion": text, "label": wanted}
        for text, wanted in (("tide", True), ("dull " * 60, True), ("dull", False))
    ]
    examples, labels = encode_given(make(DpoConfig, name="x", loss_type="kto", max_length=40), rows, role.model, tokenizer)
    assert labels is not None and labels.tolist() == [True, False] and len(examples) == 2


def test_held_out_texts_of_kto_are_drawn(tiny_llama: Path, sft_run: str, tmp_path: Path, make: Make, reader: Any) -> None:
    """Its z puts each text beside another's prompt; rows of pairs stand together in a file, with one prompt."""
    shared = {
        "out": str(tmp_path),
        "model": str(tiny_llama),
        "actor": sft_run,
        "steps": 2,
        "batch_size": 4,
        "lr": 3e-2,
        "loss_type": "kto",
    }
    seen: list[list[str]] = []
    real = dpo_module.mismatched_kl

    def spied(policy: Any, reference: Any, examples: Any, max_tokens: int) -> Any:
        seen.append([example.prompt for example in examples])
        return real(policy, reference, examples, max_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo_module, "mismatched_kl", spied)
        dpo(make(DpoConfig, name="x", **shared), unpaired(PAIRS[:8]), eval_rows=unpaired(PAIRS))
    held_out = next(prompts for prompts in seen if len(prompts) == 2 * len(PAIRS))
    same = sum(a == b for a, b in pairwise(held_out))
    assert same < len(PAIRS) / 2
