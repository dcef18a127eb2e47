"""Evaluation while training: every trainer shows what its model writes to held-out prompts, in figures and in words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from punster.config import DistillConfig, DpoConfig, GrpoConfig, PpoConfig, RewardConfig, SftConfig
from punster.data import corpus
from punster.evaluate.metrics import distinct_n, words
from punster.train.checkpoint import load_run
from punster.train.distill import distill
from punster.train.dpo import dpo
from punster.train.grpo import grpo
from punster.train.held_out import first, own_rows
from punster.train.ppo import ppo
from punster.train.reward import train_reward
from punster.train.rows import load_prompts
from punster.train.sft import sft

Make = Callable[..., Any]
VERBS = {
    "sft": (SftConfig, sft),
    "dpo": (DpoConfig, dpo),
    "ppo": (PpoConfig, ppo),
    "grpo": (GrpoConfig, grpo),
    "distill": (DistillConfig, distill),
}
COMMON = {"eval/eos_rate", "eval/length", "eval/distinct_2"}
MORE = {"sft": {"eval/copy_rate"}, "distill": {"eval/copy_rate"}}


def events(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "events"), size_guidance={"tensors": 0})
    found.Reload()
    return found


def texts_of(found: Any, tag: str) -> dict[int, str]:
    return {event.step: event.tensor_proto.string_val[0].decode() for event in found.Tensors(f"{tag}/text_summary")}


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_trainer_samples_held_out_prompts(
    verb: str,
    tiny_llama: Path,
    sft_run: str,
    reward_run: str,
    make: Make,
    reader: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    kind, train = VERBS[verb]
    shared = {"name": verb, "out": str(tmp_path), "model": str(tiny_llama), "steps": 4, "eval_every": 2, "eval_prompts": 6, "quiet": False,
              "batch_size": 8}  # fmt: skip
    more = {} if verb == "sft" else {"actor": sft_run, "reward_model": reward_run, "max_new_tokens": 8}
    if verb == "distill":
        more["best_of"] = 2
    run = train(make(kind, **shared, **more))
    wanted = COMMON | MORE.get(verb, {"eval/score", "eval/exact_kl"})
    held_out = list(corpus.prompts("val"))[:6]
    rows = [row for row in reader.lines(run, "samples.jsonl") if row.get("held_out")]
    assert [row["prompt"] for row in rows] == held_out * 2  # after steps 2 and 4, and the last one once only
    assert [row["step"] for row in rows] == [2] * 6 + [4] * 6
    summary = reader.summary(run)
    last = [row["completion"] for row in rows[6:]]
    assert summary["eval/distinct_2"] == pytest.approx(distinct_n(last, 2))
    assert summary["eval/length"] == pytest.approx(sum(len(words(text)) for text in last) / 6)
    assert {key for key in summary if key.startswith("eval/")} == wanted
    if "eval/score" in wanted:
        assert summary["eval/score"] == pytest.approx(sum(row["score"] for row in rows[6:]) / 6, abs=1e-4)
        assert summary["eval/exact_kl"] >= 0
    board = events(run)
    for key in wanted:
        assert {event.step for event in board.Scalars(key)} == {2, 4}
        assert board.Scalars(key)[-1].value == pytest.approx(summary[key], abs=1e-5)
    tables = texts_of(board, "samples to evaluation prompts")
    assert set(tables) == {2, 4}
    assert all(prompt in tables[4] for prompt in held_out)
    printed = capfd.readouterr().err
    assert "step 4: samples to evaluation prompts" in printed
    assert held_out[0] in printed and held_out[5] not in printed  # five rows on the screen


def test_the_reward_model_shows_pairs(
    tiny_llama: Path, sft_run: str, make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train_reward(make(RewardConfig, name="r", out=str(tmp_path), model=str(tiny_llama), steps=2, batch_size=4, test_limit=2,
                            normalise_samples=0, quiet=False))  # fmt: skip
    assert run is not None
    table = texts_of(events(run), "held-out pairs")[2]
    row = corpus.preference_rows(("literal", "off_topic"), "val")[0]
    assert row["chosen"] in table and row["rejected"] in table
    assert "held-out pairs" in capfd.readouterr().err


def test_quiet_runs_print_no_table_and_no_prompts_mean_no_samples(
    tiny_llama: Path, make: Make, reader: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = sft(make(SftConfig, name="q", out=str(tmp_path), model=str(tiny_llama), steps=1, eval_prompts=0))
    assert not (Path(str(run)) / "samples.jsonl").exists()
    assert "eval/length" not in reader.summary(run)
    sft(make(SftConfig, name="p", out=str(tmp_path), model=str(tiny_llama), steps=1, eval_prompts=2))
    assert capfd.readouterr().err == ""


def test_text_of_samples_does_not_drive_the_terminal(
    tiny_llama: Path, make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control sequences, rich's mark-up and HTML in a sample arrive as text or not at all."""
    from punster.model.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "\x1b]0;owned\x07[bold]b[/bold] <b>|x|</b> [/nope]")
    run = sft(make(SftConfig, name="h", out=str(tmp_path), model=str(tiny_llama), steps=1, eval_prompts=2, quiet=False))
    printed = capfd.readouterr().err
    assert "owned" not in printed
    assert "[bold]b[/bold]" in printed.replace("\n", "")
    table = texts_of(events(Path(str(run))), "samples to evaluation prompts")[1]
    assert "<b>" not in table and "&lt;b&gt;" in table and "\\|x\\|" in table


def test_own_prompts_are_the_held_out_ones_of_people_who_bring_them(sft_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    role, tokenizer = load_run(sft_run)
    asked = partial(first, tokenizer=tokenizer, model=role.model, new_tokens=8)
    mine = ["a", [{"role": "user", "content": "b"}], "a", "c"]
    assert asked(mine, 2) == ["a", [{"role": "user", "content": "b"}]]
    assert asked(load_prompts("embedded", "val"), 3) == list(corpus.prompts("val"))[:3]
    assert capsys.readouterr().err == ""
    assert asked(["sea " * 200, "a"], 1) == ["a"] and asked(["sea " * 200], 0) == []
    told = "  1 of 2 prompts to evaluate on left out: no room for 8 new tokens in the context of 128\n"
    assert capsys.readouterr().err == told


def test_embedded_rows_to_evaluate_on_are_the_held_out_part(make: Make) -> None:
    for kind, rows in (
        (SftConfig, corpus.sft_rows("val")), (RewardConfig, corpus.pairs("val")), (DpoConfig, corpus.pairs("val")),
    ):  # fmt: skip
        found = own_rows(make(kind, name="x", eval_data=["embedded"]))
        assert [row["prompt"] for row in found] == [row["prompt"] for row in rows] and found
