"""Proxy and gold reward against exact KL over the checkpoints of a PPO or GRPO run: is its proxy over-optimised, and where to stop?

    python scripts/over_optimisation.py runs/demo/ppo [--prompts 64] [--samples 2]

The run must have kept its checkpoints (--save-every 1 --keep 100). SFT, reward and gold runs are taken from beside it. The result goes into
the run's summary.json as over_optimisation, and punster report RUN draws it. With a reward model of the other half of the data as --gold this
is the train-RM / test-RM split of Bai et al. 2022.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from punster.algorithms.bestofn import kl_bound
from punster.data import corpus
from punster.disk import write_json
from punster.evaluate.compare import best_of_curve, by_prompt, exact_kl, shared_depths
from punster.evaluate.metrics import spearman
from punster.model.role import score_examples
from punster.model.saved import load_role
from punster.rollout.sampler import Decoding, generate
from punster.train.optim import seeded
from punster.train.rows import check_prompts
from punster.train.setup import open_policy_role, open_reward_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--proxy", type=Path)
    parser.add_argument("--gold", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--best-of", type=int, default=8, help="samples a prompt of the reference for the best-of-n curve")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args()
    where = SimpleNamespace(device="auto", dtype="auto", quiet=False)
    beside = options.run.parent
    reference, tokenizer = open_policy_role(str(options.reference or beside / "sft"), where)
    proxy, gold = (
        open_reward_model(str(given or beside / name), where, reference, tokenizer)
        for given, name in ((options.proxy, "reward"), (options.gold, "gold"))
    )
    ids = check_prompts(tokenizer, reference.model, corpus.prompts("test")[: options.prompts], options.max_new_tokens)
    decoding = Decoding(options.max_new_tokens)
    rows = []
    folders = sorted((options.run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    for folder in [None, *folders]:
        role = reference
        if folder is not None:
            role = load_role(
                folder, device=reference.model.device, dtype=reference.model.dtype, base=reference.model, tokenizer=tokenizer
            )[0]
        count = options.samples if folder else max(options.samples, options.best_of)
        keep = shared_depths(role, reference) | {proxy.first_layer, gold.first_layer}
        rollout = generate(role, ids, decoding, tokenizer.eos_id, seeded(1, "over-optimisation"), count, keep=keep)
        scores = [score_examples(model, rollout.closed, rollout.trunk) for model in (proxy, gold)]
        means = [sum(values) / len(values) for values in scores]
        kls = exact_kl(role, reference, rollout, 1.0) if folder else [0.0]
        length = sum(len(example.response) for example in rollout.examples) / len(rollout.examples)
        step = int(folder.name.removeprefix("step-")) if folder else 0
        rows.append({"step": step, "kl": sum(kls) / len(kls), "proxy": means[0], "gold": means[1], "length": length})
        print(json.dumps(rows[-1]), flush=True)
        if folder is None:
            best = best_of_curve(*(by_prompt(values, count) for values in scores))
    found = summary_of(rows, best)
    found["split_at"] = split_at([k**0.5 for k in found["kl"]], found["proxy"], found["gold"], 0.5)
    summary = json.loads((options.run / "summary.json").read_text()) if (options.run / "summary.json").is_file() else {}
    write_json(options.run / "summary.json", summary | {"over_optimisation": found})
    print(json.dumps(found, indent=1))


# ---- laws -----------------------------------------------------------------------------------------------------------
# Gao, Schulman & Hilton 2022 (arXiv 2210.10760): proxy and gold reward against d = sqrt(KL). Best of n: R(d) = d (a - b d).
# RL: R(d) = d (a - b log d). R(0) = 0: rewards are taken relative to the start.
Law = Literal["best_of_n", "rl"]


@dataclass(frozen=True)
class Fit:
    law: Law
    a: float
    b: float
    r2: float  # share of the variance about the mean; 1 is a perfect fit

    def __call__(self, d: float) -> float:
        if d <= 0:
            return 0.0
        return d * (self.a - self.b * (d if self.law == "best_of_n" else math.log(d)))

    @property
    def peak(self) -> float:
        """The d at which the reward is greatest; infinite where the law does not turn."""
        if self.b <= 0 or (self.law == "best_of_n" and self.a <= 0):
            return math.inf
        return self.a / (2 * self.b) if self.law == "best_of_n" else math.exp(min(self.a / self.b - 1, 700))


def fit_law(kl: Sequence[float], reward: Sequence[float], law: Law) -> Fit:
    """Least squares for a and b, in which both laws are linear; reward is relative to KL = 0. At least 3 points with KL > 0."""
    points = [(math.sqrt(k), r) for k, r in zip(kl, reward, strict=True) if k > 0 and math.isfinite(r)]
    if len({d for d, _ in points}) < 3:
        raise ValueError(f"a fit needs at least 3 different KLs above 0, got {len(points)} points")
    d, y = torch.tensor(points, dtype=torch.float64).T
    design = torch.stack((d, -d * (d if law == "best_of_n" else d.log())), 1)
    a, b = torch.linalg.lstsq(design, y[:, None]).solution[:, 0].tolist()
    total = float((y - y.mean()).square().sum())
    rest = float((y - design @ torch.tensor([a, b], dtype=torch.float64)).square().sum())
    return Fit(law, a, b, 1 - rest / total if total > 0 else float("nan"))


def stop_step(steps: Sequence[int], gold: Sequence[float], reach: int = 1) -> int | None:
    """The step of the highest gold reward after a running mean over up to `reach` points on either side: where to stop."""
    reaches = [min(reach, i, len(gold) - 1 - i) for i in range(len(gold))]
    smooth = [sum(gold[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reaches)]
    return steps[max(range(len(smooth)), key=lambda i: smooth[i])] if smooth else None


def split_at(d: Sequence[float], train: Sequence[float], test: Sequence[float], tolerance: float) -> float | None:
    """Bai et al. 2022: the first d from which on the reward models of the two halves of the data stay apart by more than `tolerance`."""
    order = sorted(range(len(d)), key=lambda i: d[i])
    apart = [train[i] - test[i] > tolerance for i in order]
    tail = next((k for k in range(len(apart)) if all(apart[k:])), None)
    return None if tail is None else d[order[tail]]


def summary_of(rows: Sequence[Mapping[str, Any]], best_of: Mapping[str, Sequence[float]] | None = None) -> dict[str, Any]:
    """What a run's evaluations say: rows with step, kl, proxy, gold (and length); best_of with n and gold, n = 1 first."""
    start = {key: float(rows[0][key]) for key in ("proxy", "gold")} if rows else {}
    gains = {key: [float(row[key]) - start[key] for row in rows] for key in start}
    found: dict[str, Any] = {"kl": [float(row["kl"]) for row in rows], **gains}
    for key, values in gains.items():
        try:
            law = fit_law(found["kl"], values, "rl")
        except ValueError:
            continue
        found[f"fit_{key}"] = {"a": law.a, "b": law.b, "r2": law.r2, "peak": law.peak if math.isfinite(law.peak) else None}
    if rows:
        found["stop"] = stop_step([int(row["step"]) for row in rows], gains["gold"])
        if all("length" in row for row in rows):
            rank = spearman([float(row["length"]) for row in rows], gains["proxy"])
            found["length_proxy_spearman"] = rank if math.isfinite(rank) else None
    if best_of:
        kl = [kl_bound(int(n)) for n in best_of["n"]]
        gold = [float(g) - float(best_of["gold"][0]) for g in best_of["gold"]]
        found["best_of_n"] = {"kl": kl, "gold": gold}
        if len(kl) > 3:
            law = fit_law(kl, gold, "best_of_n")
            found["best_of_n"]["fit"] = {"a": law.a, "b": law.b, "r2": law.r2}
    return found


if __name__ == "__main__":
    main()
