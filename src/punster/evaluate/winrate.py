"""Intervals, win rates, tests and ratings. The unit of resampling is the prompt: samples of one prompt are not independent.

A share is what one side won of a comparison: 1, 0, one half for a tie, or a mean of such over samples of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, pstdev
from typing import Any

import torch
from torch import Tensor

Interval = dict[str, float]
LEVEL = 0.95  # of every interval and test
ELO = 400 / math.log(10)  # points of a logit


def percentiles(mean: float, drawn: Tensor) -> Interval:
    """An interval out of resampled values (B,)."""
    edges = torch.quantile(drawn, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=drawn.dtype))
    return {"mean": mean, "low": float(edges[0]), "high": float(edges[1])}


def bootstrap(per_prompt: Sequence[float], seed: int = 1, resamples: int = 2000) -> Interval:
    """Mean over prompts with its percentile bootstrap interval."""
    values = torch.tensor(list(per_prompt), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    return percentiles(float(values.mean()), values[drawn].mean(1))


def win_share(a: Sequence[float], b: Sequence[float]) -> float:
    """P(a random sample of a scores above a random sample of b), ties half."""
    mine, theirs = torch.tensor(list(a)), torch.tensor(list(b))
    return float(((mine[:, None] > theirs) + 0.5 * (mine[:, None] == theirs)).double().mean())


def wilson(shares: Sequence[float]) -> Interval:
    """Wilson's score interval (1927) of a mean share, one share a prompt; ties count half, which makes it conservative.

    It is made for tosses: where shares are means over samples of a prompt, they vary less, and it is too wide (`versus`).
    """
    count, mean = len(shares), sum(shares) / len(shares)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return {"mean": mean, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact sign test on the prompts that one side won; on the discordant pairs of two yes-no outcomes it is McNemar's."""
    count, extreme = wins + losses, max(wins, losses)
    tail = sum(math.comb(count, k) for k in range(extreme, count + 1)) / 2**count
    return float(min(1.0, 2 * tail))


def prompts_needed(rate: float, deviation: float | None = None) -> int | None:
    """Prompts at which a two-sided test against 50 % finds a true win rate with 80 % power (normal approximation); of 50 %, None.

    deviation: of the shares over prompts; by default that of prompts that are won or lost, sqrt(rate (1 - rate)).
    """
    if rate == 0.5:
        return None
    z = NormalDist().inv_cdf
    deviation = math.sqrt(rate * (1 - rate)) if deviation is None else deviation
    root = z((1 + LEVEL) / 2) * math.hypot(deviation, rate - 0.5) + z(0.8) * deviation  # hypot: about the 50 % of the null
    return max(1, math.ceil(math.pow(root / (rate - 0.5), 2)))


def kappa(a: Sequence[object], b: Sequence[object], seed: int = 1, resamples: int = 2000) -> Interval:
    """Cohen's kappa (1960) of two raters' labels of the same items, with a bootstrap interval over items."""
    labels = {label: index for index, label in enumerate(dict.fromkeys([*a, *b]))}
    mine, theirs = (torch.nn.functional.one_hot(torch.tensor([labels[x] for x in side]), len(labels)).double() for side in (a, b))

    def of(rows: Tensor) -> Tensor:
        """(B,) kappas of resampled rows (B, N)."""
        first, second = mine[rows], theirs[rows]
        agreed = (first * second).sum(-1).mean(-1)
        chance = (first.mean(1) * second.mean(1)).sum(-1)
        return torch.where(chance < 1, (agreed - chance) / (1 - chance).clamp(min=1e-12), 0.0)

    drawn = torch.randint(len(mine), (resamples, len(mine)), generator=torch.Generator().manual_seed(seed))
    return percentiles(float(of(torch.arange(len(mine))[None])[0]), of(drawn))


def logistic_fit(inputs: Tensor, shares: Tensor, weights: Tensor, ridge: float | Tensor = 0.01) -> Tensor:
    """(B, K) coefficients that maximise sum w [y log p + (1 - y) log(1 - p)] - sum ridge c^2 / 2, p = sigmoid(inputs c).

    inputs (N, K), shares (N,) in [0, 1], weights (B, N): one fit for each row of weights, by Newton's method. ridge, one or (K,):
    keeps the coefficients finite where one side won everything.
    """
    width = inputs.shape[1]
    coefficients = torch.zeros(len(weights), width, dtype=torch.float64)
    squares = (inputs[:, :, None] * inputs[:, None, :]).flatten(1)
    penalty = ridge * torch.eye(width, dtype=torch.float64)
    for _ in range(100):
        p = torch.sigmoid(coefficients @ inputs.T)
        gradient = (weights * (shares - p)) @ inputs - ridge * coefficients
        curvature = ((weights * p * (1 - p)) @ squares).unflatten(1, (width, width)) + penalty
        # With the ridge the objective is strictly concave; capped steps keep Newton from overshooting where p saturates.
        step = torch.linalg.solve(curvature, gradient).clamp(-2, 2)
        coefficients += step
        if float(step.abs().max()) < 1e-10:
            break
    return coefficients


def resampled_weights(prompts: Sequence[int], resamples: int, seed: int) -> Tensor:
    """(1 + resamples, N) weights of N comparisons: first all ones, then how often each one's prompt was drawn."""
    names, index = torch.tensor(list(prompts)).unique(return_inverse=True)
    drawn = torch.randint(len(names), (resamples, len(names)), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, len(names), dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    return torch.cat([torch.ones(1, len(index), dtype=torch.float64), counts[:, index]])


def length_controlled(shares: Sequence[float], longer: Sequence[float], seed: int = 1, resamples: int = 500) -> Interval:
    """Win rate at equal length (Dubois et al. 2024): sigmoid(c) of the fit share ~ sigmoid(c + g tanh(longer / sd)).

    One share a prompt; longer: by how many words the side is longer than its opponent. Bootstrap interval over prompts.
    """
    gap = torch.tensor(list(longer), dtype=torch.float64)
    scale = gap.square().mean().sqrt().clamp(min=1e-9)
    inputs = torch.stack([torch.ones_like(gap), torch.tanh(gap / scale)], 1)
    weights = resampled_weights(range(len(gap)), resamples, seed)
    fitted = torch.sigmoid(logistic_fit(inputs, torch.tensor(list(shares), dtype=torch.float64), weights)[:, 0])
    return percentiles(float(fitted[0]), fitted[1:])


def versus(shares: Sequence[float], longer: Sequence[float], seed: int = 1) -> dict[str, Any]:
    """What shares won against one opponent, one a prompt, amount to."""
    rate = bootstrap(shares, seed)
    wins, losses = sum(share > 0.5 for share in shares), sum(share < 0.5 for share in shares)
    tosses = all(share in (0, 0.5, 1) for share in shares)
    return {
        "win_rate": rate, "wilson": wilson(shares) if tosses else None, "length_controlled": length_controlled(shares, longer, seed),
        "wins": wins, "ties": sum(share == 0.5 for share in shares), "losses": losses, "sign_test": sign_test(wins, losses),
        "prompts_needed": prompts_needed(rate["mean"], pstdev(shares)),
    }  # fmt: skip


def bradley_terry_ratings(
    games: Sequence[tuple[str, str, float, int]], seed: int = 1, resamples: int = 500
) -> dict[str, Interval]:
    """Elo-like ratings, mean 1000, of all models in games (a, b, a's share, prompt): 1000 + 173.7 times Bradley-Terry's logits.

    One maximum-likelihood fit of all games, so their order does not matter; bootstrap intervals over prompts.
    """
    names = sorted({name for a, b, *_ in games for name in (a, b)})
    place = {name: i for i, name in enumerate(names)}
    inputs = torch.zeros(len(games), len(names), dtype=torch.float64)
    for row, (a, b, *_) in enumerate(games):
        inputs[row, place[a]] += 1
        inputs[row, place[b]] -= 1
    shares = torch.tensor([share for _, _, share, _ in games], dtype=torch.float64)
    fitted = logistic_fit(inputs, shares, resampled_weights([prompt for *_, prompt in games], resamples, seed))
    fitted = 1000 + ELO * (fitted - fitted.mean(1, keepdim=True))
    return {name: percentiles(float(fitted[0, i]), fitted[1:, i]) for name, i in place.items()}
