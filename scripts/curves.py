"""The measured curves of the method pages: docs/curves/PAGE.png, out of the metrics of cells that scripts/results.py has trained.

python scripts/results.py ppo-1 ppo-2 ppo-3      # for instance
python scripts/curves.py                         # every page whose cells are there
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RL = {
    "objective/scores": "score of the samples (proxy)", "objective/exact_kl": "exact KL to SFT, nats a response",
    "objective/entropy_per_token": "entropy, nats a token", "eos_rate": "EOS rate",
}  # fmt: skip
PAGES: dict[str, tuple[list[str], dict[str, str]]] = {
    "ppo": (["ppo-1", "ppo-2", "ppo-3", "ppo-beta-0.02"], {**RL, "val/explained_variance": "explained variance of the critic", "policy/clipfrac_avg": "share of clipped ratios"}),
    "grpo": (["grpo-1", "grpo-2", "grpo-3", "rloo-1", "rloo-2", "rloo-3"], RL),
    "dpo": (
        ["dpo-1", "dpo-2", "dpo-3", "online-dpo-1", "online-dpo-2", "online-dpo-3", "kto"],
        {
            "loss": "loss", "rewards/margins": "margin of the implicit rewards", "rewards/accuracies": "accuracy on pairs not yet seen",
            "eval/score": "held-out score (proxy)", "eval/exact_kl": "held-out exact KL, nats a response", "eval/eos_rate": "held-out EOS rate",
        },
    ),
}  # fmt: skip


def points(run: Path, key: str) -> tuple[list[float], list[float]]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in kept], [row[key] for row in kept]


def draw(page: str, runs: Path, folder: Path) -> bool:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells, keys = PAGES[page]
    there = [cell for cell in cells if (runs / cell / "summary.json").exists()]
    if not there:
        return False
    columns = len(keys) // 2
    figure, axes = pyplot.subplots(2, columns, figsize=(3.6 * columns, 5), squeeze=False)
    for axis, (key, title) in zip(axes.flat, keys.items(), strict=True):
        for cell in there:
            steps, values = points(runs / cell, key)
            axis.plot(steps, values, label=cell, linewidth=1.2, marker="o" if len(steps) == 1 else None)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{page}.png", dpi=80, metadata={"Software": None})
    pyplot.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "results", help="folder of the trained cells")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "curves", help="folder of the pictures")
    options = parser.parse_args()
    for page in PAGES:
        print(f"{page}: {'drawn' if draw(page, options.runs, options.out) else 'no cell of it is there'}")


if __name__ == "__main__":
    main()
