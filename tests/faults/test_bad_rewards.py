"""Python rewards that hang, raise, or return something else than a finite number for each text."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from punster.cli import main
from punster.errors import UserError
from punster.rewards import call_reward
from punster.train.checkpoint import newest_step
from punster.train.grpo import grpo
from punster.train.ppo import ppo

FAULTS = {
    "raises": ("raise KeyError('taste')", "raised KeyError"),
    "leaves": ("raise SystemExit(3)", "raised SystemExit"),
    "hangs": ("import time\n    while True: time.sleep(1)", "gave no answer in 0.2 seconds (--reward-timeout)"),
    "hangs and catches": (
        "import time\n    while True:\n        try: time.sleep(1)\n        except Exception: pass",
        "gave no answer in 0.2 seconds",
    ),
    "spins": ("n = 0\n    while True: n += 1", "gave no answer in 0.2 seconds"),
    "NaN": ("return [float('nan')] * len(completions)", "returned nan"),
    "infinite": ("return [float('inf')] * len(completions)", "returned inf"),
    "too few": ("return [1.0]", "returned 1 numbers for 4 completions"),
    "too many": ("return [1.0] * 5", "returned 5 numbers for 4 completions"),
    "a number beyond all floats": ("return [10**400] * 4", "expected a number"),
    "two numbers a text": ("import torch; return torch.ones(4, 2)", "expected a number"),
    "words": ("return ['good'] * 4", "returned 'good'"),
    "nothing": ("return None", "raised TypeError"),
    "one number": ("return 1.0", "raised TypeError"),
    "nested": ("return [[1.0]] * 4", "returned [1.0]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_rewards_on_the_command_line(
    fault: str, sft_run: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body, expected = FAULTS[fault]
    (tmp_path / "taste.py").write_text(f"def taste(prompts, completions):\n    {body}\n")
    before = signal.getsignal(signal.SIGALRM)
    code = main(["ppo", "-n", "x", "-b", "4", "-a", sft_run, "--reward", f"{tmp_path / 'taste.py'}:taste", "--out", str(tmp_path / "runs"),
                 "--steps", "1", "--max-new-tokens", "3", "--reward-timeout", "0.2", "--quiet", "--dtype", "fp32"])  # fmt: skip
    said = capsys.readouterr().err
    assert code == 2 and expected in said and "taste.py:taste" in said
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "runs" / "x").exists()
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


class Moody:
    """Counts vowels, and raises at one of its calls (0: never)."""

    __name__ = "moody"

    def __init__(self, fails_at: int):
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, prompts: Any, completions: Any) -> list[float]:
        self.calls += 1
        if self.calls == self.fails_at:
            raise ValueError("no taste today")
        return [sum(letter in "aeiou" for letter in text) / 10 for text in completions]


def test_a_reward_that_fails_late_leaves_the_checkpoints_and_the_log(jobs: Any, reader: Any, tmp_path: Path) -> None:
    config, _ = jobs(tmp_path)["ppo"]
    config = replace(config, steps=4)
    whole = ppo(replace(config, name="whole"), None, Moody(fails_at=0))
    with pytest.raises(UserError, match="raised ValueError: no taste today"):
        ppo(replace(config, name="run", save_every=2), None, Moody(fails_at=4))
    run = tmp_path / "run"
    assert newest_step(run) == 2 and [line["step"] for line in reader.lines(run)] == [1, 2]
    crash = json.loads((run / "crash.json").read_text())
    assert "no taste today" in crash["error"] and crash["metrics"]["step"] == 2
    again = ppo(replace(config, name="run", resume=True), None, Moody(fails_at=0))
    assert whole is not None and again is not None
    assert reader.tensor_bytes(again) == reader.tensor_bytes(whole) and reader.lines(again) == reader.lines(whole)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_reward_that_fails_late_costs_one_step(
    stage: str, jobs: Any, reader: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --save-every: the state in which the failed rollout began is saved, and the run goes on from it bit for bit."""
    config, train = jobs(tmp_path, save_every=0)[stage][0], {"ppo": ppo, "grpo": grpo}[stage]
    whole = train(replace(config, name="whole"), None, Moody(fails_at=0))
    capsys.readouterr()
    with pytest.raises(UserError, match="raised ValueError: no taste today"):
        train(replace(config, name="run"), None, Moody(fails_at=4))  # in the third rollout, after an evaluation
    assert capsys.readouterr().err == "what was learned until step 2 is saved: --resume goes on from there\n"
    assert newest_step(tmp_path / "run") == 2
    again = train(replace(config, name="run", resume=True), None, Moody(fails_at=0))
    assert whole is not None and again is not None
    assert reader.tensor_bytes(again) == reader.tensor_bytes(whole)
    assert all(reader.lines(again, log) == reader.lines(whole, log) for log in ("metrics.jsonl", "samples.jsonl"))
    assert {**reader.summary(again), "wall_seconds": 0} == {**reader.summary(whole), "wall_seconds": 0}

    def full(*rest: Any, **options: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr("punster.train.guard.save_checkpoint", full)
    with pytest.raises(UserError, match="raised ValueError: no taste today"):  # and not that it could not be saved
        train(replace(config, name="full"), None, Moody(fails_at=4))
    assert newest_step(tmp_path / "full") is None and not capsys.readouterr().err
    assert "no room" in (tmp_path / "full" / "run.log").read_text()


def test_a_failure_of_the_first_step_saves_nothing(jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(step: int, metrics: dict[str, float]) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        ppo(replace(jobs(tmp_path, save_every=0)["ppo"][0], name="run"), None, Moody(fails_at=0), broken)
    assert newest_step(tmp_path / "run") is None and not capsys.readouterr().err


def sleepy(prompts: list[str], completions: list[str]) -> list[float]:
    time.sleep(60)
    return [0.0] * len(completions)


def test_a_quick_reward_is_left_alone() -> None:
    assert call_reward("r", lambda p, c: [0.5] * len(c), ["p"], ["c"], 5.0) == [0.5]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    started = time.monotonic()
    with pytest.raises(UserError, match="gave no answer"):
        call_reward("r", sleepy, ["p"], ["c"], 0.1)
    assert time.monotonic() - started < 50
