"""KL estimators and controllers.

With samples y from pi and x = log ref(y) - log pi(y): k1 = -x, k2 = x^2 / 2, k3 = e^x - 1 - x (Schulman 2020).
E[k1] = E[k3] = KL(pi || ref); k2 is biased.
"""

from __future__ import annotations

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


@dataclass
class AdaptiveKL:
    """Coefficient controller of Ziegler et al. 2019: beta grows while the sequence KL is above target."""

    beta: float
    target: float  # nats a sequence
    horizon: int = 10_000

    def update(self, kl: float, sequences: int) -> None:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * sequences / self.horizon


@dataclass
class FixedKL:
    beta: float

    def update(self, kl: float, sequences: int) -> None:
        """The coefficient stays."""
