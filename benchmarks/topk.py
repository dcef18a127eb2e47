"""How many top layers to adapt: reward reached by PPO in equal wall time, for k of them and for all.

    python -m benchmarks.topk --runs runs/demo --seconds 300 [--layers 2,5,10,all] [--seeds 1,2,3]

`--runs` is a folder of `punster run` with sft and reward. Each k gets as many rollouts as fit into the time (a short probe
tells), with the learning-rate schedule of that length; PPO's other settings are those of the recipe demo.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.__main__ import LATEST, PAGE, provenance
from benchmarks.line import BENCH, say


def train(runs: Path, layers: str, seed: int, steps: int) -> dict[str, float]:
    """One PPO run: seconds of its rollouts and updates, scores of the last three, held-out score at the end."""
    from punster.config import PpoConfig
    from punster.train.pipeline import load_recipe
    from punster.train.ppo import ppo

    name, out = f"topk-{layers}-{seed}", BENCH / "work"
    shutil.rmtree(out / name, ignore_errors=True)
    history: list[dict[str, float]] = []
    started, ends = time.perf_counter(), []

    def note(step: int, metrics: dict[str, float]) -> None:
        ends.append(time.perf_counter() - started)
        history.append(metrics)

    section = {**load_recipe("demo").ppo, "steps": steps, "top_layers": layers, "seed": seed, "eval_prompts": 64}
    shared = {"name": name, "out": str(out), "actor": str(runs / "sft"), "reward_model": str(runs / "reward"), "quiet": True}
    ppo(PpoConfig(**{**section, **shared}), callback=note)
    summary = json.loads((out / name / "summary.json").read_text())
    last = history[-3:]
    return {
        "seconds": ends[-1], "step_seconds": (ends[-1] - ends[0]) / max(1, len(ends) - 1), "eval_score": summary["eval/score"],
        "score": statistics.mean(m["objective/scores"] for m in last), "exact_kl": last[-1]["objective/exact_kl"], "steps": steps,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.topk", description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--layers", default="2,5,10,all")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", type=Path, default=LATEST)
    arguments = parser.parse_args()
    for layers in arguments.layers.split(","):
        probe = train(arguments.runs, layers, 0, 3)
        steps = max(2, round(arguments.seconds / probe["step_seconds"]))
        rows = [train(arguments.runs, layers, int(seed), steps) for seed in arguments.seeds.split(",")]
        found: dict[str, Any] = {key: results.rounded(statistics.mean(row[key] for row in rows)) for key in rows[0]}
        found["eval_scores"] = [results.rounded(row["eval_score"]) for row in rows]
        held = results.merge(arguments.out, {"topk": {layers: found}, "measured": {"topk": provenance(len(rows), {})}})
        say(f"top {layers}: {steps} rollouts, held-out score {found['eval_score']:+.3f} {found['eval_scores']}")
        if arguments.out == LATEST:
            results.write_page(PAGE, held)


if __name__ == "__main__":
    main()
