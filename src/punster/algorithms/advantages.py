"""From rewards to advantages. B rows, R response tokens; masks (B, R) are true on real response tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over true entries (a scalar); raises ValueError if there are none."""
    count = mask.sum()
    if int(count) == 0:
        raise ValueError("masked mean over an empty mask")
    return (x * mask).sum() / count


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over true entries, unbiased variance; 0 elsewhere. Without shift_mean the mean stays."""
    mean = masked_mean(x, mask)
    whitened = (x - mean) * inverse_std(x, mask)
    return (whitened if shift_mean else whitened + mean) * mask


def inverse_std(x: Tensor, mask: Tensor) -> Tensor:
    """1 / sqrt(var + 1e-8) over true entries (a scalar), unbiased variance."""
    variance = ((x - masked_mean(x, mask)).square() * mask).sum() / (mask.sum() - 1).clamp(min=1)
    return torch.rsqrt(variance + 1e-8)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16) and returns, both (B, R).

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = sum_l (gamma lam)^l delta_{t+l}; return = A + V. The value after the last
    response token is 0: a response ends there, whether by EOS or by length (the missing-EOS penalty is in the reward).
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(running)
    for t in range(rewards.shape[1] - 1, -1, -1):
        live = mask[:, t].to(rewards.dtype)
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * live
        following = values[:, t] * live
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Per-token rewards (B, R): -beta * kl everywhere, plus the score (B,) on the last response token of each row."""
    rewards = -beta * kl * mask
    last = mask.sum(1) - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


@dataclass
class RunningScale:
    """Standard deviation of all scores seen so far (Welford 1962, merged by batches as in Chan et al. 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def update(self, scores: Tensor) -> float:
        """Take in a rollout's scores (B,); returns the unbiased deviation, or 1 while there is none."""
        count, mean = float(len(scores)), float(scores.double().mean())
        between = (mean - self.mean) ** 2 * self.count * count / (self.count + count)
        self.squares += float((scores.double() - mean).square().sum()) + between
        self.count += count
        self.mean += (mean - self.mean) * count / self.count
        deviation = math.sqrt(self.squares / max(1.0, self.count - 1))
        return deviation if deviation > 1e-8 else 1.0


def group_advantages(rewards: Tensor, samples: int, variant: str = "grpo") -> Tensor:
    """Advantages (B,) of whole responses; rows of one prompt stand together, `samples` of them.

    grpo, dapo: (r - mean) / (std + 1e-4) in the group, unbiased std (Shao et al. 2024, arXiv 2402.03300, section 4.1).
    dr_grpo: r - mean (Liu et al. 2025, arXiv 2503.20783). rloo: r minus the mean of the others (Ahmadian et al. 2024,
    arXiv 2402.14740). Raises ValueError for a single sample a prompt, which has no baseline.
    """
    if samples < 2:
        raise ValueError("group advantages need at least two samples a prompt")
    groups = rewards.view(-1, samples)
    centred = groups - groups.mean(1, keepdim=True)
    if variant == "rloo":
        advantages = centred * samples / (samples - 1)  # r_i - mean of the others
    elif variant == "dr_grpo":
        advantages = centred
    elif variant in ("grpo", "dapo"):
        advantages = centred / (groups.std(1, keepdim=True) + 1e-4)
    else:
        raise ValueError(f"unknown variant {variant!r}")
    return advantages.reshape(-1)


def reinforce_pp_advantages(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): return-to-go of (terminal score - beta k1), whitened over the batch."""
    rewards = shaped_rewards(scores, kl, mask, beta)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    return masked_whiten(to_go, mask)
