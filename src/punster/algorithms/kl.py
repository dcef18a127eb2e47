"""KL estimators, penalties and controllers.

With samples y from pi and x = log ref(y) - log pi(y): k1 = -x, k2 = x^2 / 2, k3 = e^x - 1 - x (Schulman 2020).
E[k1] = E[k3] = KL(pi || ref); k2 is biased.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def kl_estimate(log_prob: Tensor, ref_log_prob: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimate of KL(pi || ref) from samples of pi, same shape as the inputs; kind is k1, k2 or k3."""
    ratio = ref_log_prob - log_prob
    if kind == "k1":
        return -ratio
    if kind == "k2":
        return ratio.square() / 2
    if kind == "k3":
        return torch.expm1(ratio) - ratio
    raise ValueError(f"unknown KL estimator {kind!r}: k1, k2 or k3")


def kl_penalty(log_prob: Tensor, ref_log_prob: Tensor, exact: Tensor, kind: str = "k1") -> Tensor:
    """Per-token penalty in PPO's reward, same shape as the inputs; `exact` is the full-vocabulary KL at each token's state.

    The regularisers that Sun et al. 2023 (arXiv 2309.09055, section 4) compare, in the notation above: k1; clamped:
    max(k1, 0), biased upwards; k2, half the square; k3, their Bregman divergence; js, with m = (pi + ref) / 2:
    (max(log pi / m, 0) + max(log ref / m, 0)) / 2; none. exact is the expectation of k1 over the next token: it says what earlier
    tokens led to, but is the same for every token of a state, so the token's own advantage needs -beta (k1 - exact) on top
    (PPO's loop adds it).
    """
    if kind == "exact":
        return exact
    if kind == "none":
        return torch.zeros_like(log_prob)
    if kind == "clamped":
        return (log_prob - ref_log_prob).clamp(min=0)
    if kind == "js":
        middle = torch.logaddexp(log_prob, ref_log_prob) - math.log(2)
        return ((log_prob - middle).clamp(min=0) + (ref_log_prob - middle).clamp(min=0)) / 2
    return kl_estimate(log_prob, ref_log_prob, kind)


def kl_loss(log_prob: Tensor, old_log_prob: Tensor, ref_log_prob: Tensor, corrected: bool = False) -> Tensor:
    """Per-token k3 as GRPO has it in its loss (Shao et al. 2024, eq. 4), differentiable in log_prob.

    Its gradient on samples of pi is that of KL(ref || pi). Corrected: times the ratio pi / pi_old, through which the gradient
    flows too, so that it is that of KL(pi || ref) (DeepSeek-V3.2, arXiv 2512.02556; TRL's default).
    """
    k3 = kl_estimate(log_prob, ref_log_prob, "k3")
    return k3 * (log_prob - old_log_prob).clamp(-20, 20).exp() if corrected else k3


@dataclass
class AdaptiveKL:
    """Coefficient controller of Ziegler et al. 2019: beta grows while the sequence KL is above target; without one it stays."""

    beta: float
    target: float | None = None  # nats a sequence
    horizon: int = 10_000  # sequences

    def update(self, kl: float, sequences: int) -> None:
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * sequences / self.horizon
