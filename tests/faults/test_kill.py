"""SIGKILL at 20 seeded moments a stage: half of them at a file operation, half at any call; then resumed, bit for bit the same."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from punster.train.run import damage, newest_step

STAGES = ("sft", "reward", "ppo", "grpo", "dpo")
TRIALS = 20
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def watch(folder: Path, on_file: Callable[[], None], on_call: Callable[[], None]) -> None:
    """Call back before every file operation in a folder, and at every Python call. For child processes: it cannot be undone."""
    inside = str(folder)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and arguments and str(arguments[0]).startswith(inside):
            on_file()

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            on_call()

    sys.addaudithook(audit)
    sys.setprofile(profile)


class Count:
    """A counter that does something when it gets to a number."""

    def __init__(self, at: int = -1):
        self.count, self.at = 0, at

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_and_resumed(stage: str, jobs: Any, child: Any, reader: Any, tmp_path: Path) -> None:
    config, train = jobs(tmp_path)[stage]
    config = replace(config, name="run")
    out = tmp_path / "whole"

    def whole() -> None:
        files, calls = Count(), Count()
        watch(out, files, calls)
        train(replace(config, out=str(out)))
        sys.setprofile(None)
        (tmp_path / "counts").write_text(f"{files.count} {calls.count}")

    code, errors = child(whole)
    assert code == 0, errors
    files, calls = map(int, (tmp_path / "counts").read_text().split())
    assert files > 100 and calls > 1000
    whole_run = out / "run"
    expected = [
        reader.tensor_bytes(whole_run),
        *(text_of(reader, whole_run, name) for name in ("metrics.jsonl", "samples.jsonl")),
    ]
    draw = random.Random(f"kill/{stage}")
    killed = 0
    for trial in range(TRIALS):
        place = tmp_path / f"trial-{trial}"
        moment = draw.randrange(1, (calls if trial % 2 else files) + 1)

        def interrupted(place: Path = place, trial: int = trial, moment: int = moment) -> None:
            on_file, on_call = (Count(), Count(moment)) if trial % 2 else (Count(moment), Count())
            watch(place, on_file, on_call)
            train(replace(config, out=str(place)))

        code, errors = child(interrupted)
        killed += code == -signal.SIGKILL
        run = place / "run"
        noted = [0]
        if (run / "run.log").exists():
            lines = [json.loads(line) for line in (run / "run.log").read_text().splitlines()]
            noted += [line["step"] for line in lines if line["event"] == "checkpoint"]
        if run.exists():
            assert all(damage(found) == "" for found in (run / "checkpoints").glob("step-*")), (trial, moment)
            assert (newest_step(run) or 0) >= max(noted), "a checkpoint that was saved is gone"
            assert not (run / "summary.json").exists() or newest_step(run) == config.steps
        again = train(replace(config, out=str(place), resume=run.exists()))
        found = [reader.tensor_bytes(again), *(text_of(reader, again, name) for name in ("metrics.jsonl", "samples.jsonl"))]
        assert found == expected, (trial, moment)
        ours, theirs = reader.summary(again), reader.summary(whole_run)
        assert {**ours, "wall_seconds": 0} == {**theirs, "wall_seconds": 0}
        assert not [path for path in run.rglob("*") if path.name.endswith(".part") or path.name == "run.lock"]
    assert killed >= TRIALS - 2  # a moment near the end may come after it: a resumed run counts its calls a little differently


def text_of(reader: Any, run: Path, name: str) -> Any:
    return reader.lines(run, name) if (run / name).exists() else []
