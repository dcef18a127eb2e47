"""Intervals and win rates. The unit of resampling is the prompt: samples of one prompt are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def bootstrap(per_prompt: Sequence[float], seed: int = 1, resamples: int = 2000, level: float = 0.95) -> dict[str, float]:
    """Mean over prompts with its percentile bootstrap interval."""
    values = torch.tensor(list(per_prompt), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values[drawn].mean(1)
    edges = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return {"mean": float(values.mean()), "low": float(edges[0]), "high": float(edges[1])}


def win_share(a: Sequence[float], b: Sequence[float]) -> float:
    """P(a random sample of a scores above a random sample of b), ties half."""
    mine, theirs = torch.tensor(list(a)), torch.tensor(list(b))
    return float(((mine[:, None] > theirs) + 0.5 * (mine[:, None] == theirs)).double().mean())
