"""500 rollouts of PPO: memory and open files stay where they are after the warm-up."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


def open_files() -> list[str]:
    """What each open descriptor leads to; the one that reads the list itself is closed by then."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(links)


def vowels(prompts: Any, completions: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / 10 for text in completions]


def soak(settings: dict[str, Any], figures: Path) -> None:
    """Means over 50 steps, so that one rollout's size does not count."""
    import torch

    from punster.config import PpoConfig
    from punster.train.ppo import ppo

    torch.set_num_threads(1)
    memory: list[int] = []
    files: list[list[str]] = []

    def look(step: int, metrics: dict[str, float]) -> None:
        gc.collect(0)
        memory.append(resident())
        files.append(open_files())

    ppo(PpoConfig(**settings), None, vowels, look)
    first, last = sum(memory[100:150]) / 50, sum(memory[450:]) / 50
    # TensorBoard's own thread opens its event file for the moment of each write: it may be there once or not at all.
    events = max(sum("tfevents" in name for name in names) for names in files)
    kinds = sorted({tuple(name for name in names if "tfevents" not in name) for names in files[100:]})
    figures.write_text(json.dumps([len(memory), first, last, kinds, events]))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads the process's memory and files from /proc")
def test_500_steps_of_ppo(jobs: Callable[..., Any], tmp_path: Path) -> None:
    """In a fresh process: a fork of this one would hold what earlier tests opened. Reported for the table of the docs."""
    config, _ = jobs(tmp_path, steps=500, save_every=50, lr=1e-4)["ppo"]
    settings = json.dumps(asdict(replace(config, name="soak", eval_every=50)))
    done = subprocess.run(
        [sys.executable, __file__, settings, str(tmp_path / "figures")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    steps, first, last, files, events = json.loads((tmp_path / "figures").read_text())
    print(
        f"soak: {steps} steps, {first / 1e6:.1f} MB -> {last / 1e6:.1f} MB ({last / first - 1:+.2%}), {len(files[0])} open files"
    )
    assert steps == 500
    assert last < 1.01 * first, f"{first / 1e6:.1f} MB at 100 to 150 steps, {last / 1e6:.1f} MB at the end"
    assert len(files) == 1, f"{files[0]}, then {files[1:]}"  # the same files at every step
    assert events <= 1


if __name__ == "__main__":
    soak(json.loads(sys.argv[1]), Path(sys.argv[2]))
