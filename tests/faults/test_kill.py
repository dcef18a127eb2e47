"""SIGKILL at 20 seeded moments of every stage and of a whole pipeline, and resumed: bit for bit the same.

Half of the moments are at a file operation, half at any call.
"""

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

from punster.train.checkpoint import damage, newest_step

STAGES = ("sft", "reward", "ppo", "grpo", "dpo", "run")
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


def runs_in(run: Path) -> list[Path]:
    """The run itself, or the runs of a pipeline."""
    return sorted(place.parent for place in run.glob("**/checkpoints"))


def outcome(reader: Any, run: Path) -> dict[str, Any]:
    """All that must be equal: tensors, logs and summaries, times aside."""
    found = {}
    for place in {run, *runs_in(run)}:
        texts = [reader.lines(place, name) if (place / name).exists() else [] for name in ("metrics.jsonl", "samples.jsonl")]
        known = json.loads((place / "summary.json").read_text().replace(str(run), "run"))
        summary = {key: value for key, value in known.items() if key not in ("wall_seconds", "stages", "commit")}
        found[str(place.relative_to(run))] = [*texts, summary, reader.tensor_bytes(place) if place in runs_in(run) else {}]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_and_resumed(stage: str, jobs: Any, pipeline: Any, child: Any, reader: Any, tmp_path: Path) -> None:
    config, train = pipeline(tmp_path) if stage == "run" else jobs(tmp_path)[stage]
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
    expected = outcome(reader, out / "run")
    assert len(expected) == (5 if stage == "run" else 1)
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
        for part in runs_in(run):
            log = part / "run.log"
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            noted = [line["step"] for line in lines if line["event"] == "checkpoint"]
            assert all(damage(found) == "" for found in (part / "checkpoints").glob("step-*")), (trial, moment)
            assert (newest_step(part) or 0) >= max(noted, default=0), "a checkpoint that was saved is gone"
            assert not (part / "summary.json").exists() or newest_step(part) == newest_step(out / part.relative_to(place))
        again = train(replace(config, out=str(place), resume=run.exists()))
        assert outcome(reader, again) == expected, (trial, moment)
        assert not [path for path in run.rglob("*") if path.name.endswith(".part") or path.name == "run.lock"]
    assert killed >= TRIALS - 2  # a moment near the end may come after it: a resumed run counts its calls a little differently
