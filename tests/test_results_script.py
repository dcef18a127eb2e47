"""scripts/results.py on a tiny model at a hundredth of the cost: cells are made once, are small, and become a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "results.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_cells_are_those_of_the_plan() -> None:
    done = run("--list", "--results", "nowhere")
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(names) == len(set(names)) > 30
    for method in ("ppo", "grpo", "rloo", "dpo", "online-dpo"):
        assert {f"{method}-{seed}" for seed in (1, 2, 3)} <= set(names)
    assert {"base", "sft", "kto", "distill", "direct", "ppo-all-layers", "ppo-joined-critic", "ppo-kl-js"} <= set(names)
    assert run("no-such-cell").returncode == 2


@pytest.mark.slow
def test_a_cell_is_made_once_and_shown(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("llama", max_position_embeddings=512)
    where = ["--model", str(model), "--dtype", "fp32", "--device", "cpu", "--scale", "0.01", "--runs", str(tmp_path / "runs"),
             "--results", str(tmp_path / "results")]  # fmt: skip
    done = run("sft", "ppo-1", *where)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = {name: tmp_path / "results" / name / "summary.json" for name in ("sft", "ppo-1")}
    first = {name: path.read_bytes() for name, path in cells.items()}
    assert all(len(text) < 20_000 for text in first.values())
    found = json.loads(first["ppo-1"])
    assert found["sampled"]["tokens"] > 0 and found["peak_memory_gb"] > 0 and found["aborted"] is None
    assert {"held_out_reward", "win_rate_vs_sft", "exact_kl", "distinct_2", "eos_rate", "copy_rate"} <= set(found["row"])
    assert json.loads(first["sft"])["best_of_n"]["n"][:5] == [1, 2, 4, 8, 16]
    again = run("sft", "ppo-1", *where)
    assert again.returncode == 0 and again.stdout == "" and {n: p.read_bytes() for n, p in cells.items()} == first
    table = run("--table", *where)
    assert table.returncode == 0, table.stderr[-2000:]
    lines = (tmp_path / "results" / "table.md").read_text().splitlines()
    heads, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:4]))
    assert [row[0] for row in rows] == ["sft", "ppo-1"]
    assert all(float(row[heads.index("self-BLEU")]) >= 0 for row in rows)  # each column finds its key in the summaries
    assert (tmp_path / "results" / "gold-against-kl.png").stat().st_size > 5000
