"""Loss functions. B rows, R response tokens, P pairs; log-probs and losses are fp32; masks (B, R) mark real tokens.

Every function returns sums or per-row values, so that the caller normalises once by what the whole optimizer step
holds, however it was split into micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


# ---- reward models ------------------------------------------------------------------------------------------------
def plackett_luce(scores: Tensor, ratings: Tensor) -> Tensor:
    """-log of the probability of ranked groups, (G,), from scores and people's ratings, both (G, K); rating NaN: no text there.

    A text of the group beats all that are rated below it with probability exp(s_k) / (exp(s_k) + sum_j exp(s_j)), j over those
    below; the product over k is Plackett's (1975) and Luce's (1959), texts of one rating left uncompared (Breslow's ties).
    K = 2 is -log sigmoid(s_w - s_l) (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1); a group without two ratings has loss 0.
    """
    below = ratings[:, None, :] < ratings[:, :, None]  # (G, K, K); false wherever a NaN is
    rivals = torch.where(below, scores[:, None, :], -torch.inf)
    stages = torch.logsumexp(torch.cat((scores[:, :, None], rivals), 2), 2) - scores
    return torch.where(below.any(2), stages, 0.0).sum(1)


# ---- PPO ----------------------------------------------------------------------------------------------------------
def clipped_policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2, clip_high: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of max(-rho A, -clip(rho, 1 - clip, 1 + clip_high) A) (Schulman et al. 2017, eq. 7).

    All (B, R). Also sums of: clipfrac, approx_kl ((log rho)^2 / 2) and ratio, and the largest |rho - 1|.
    """
    log_ratio = ((log_prob - old_log_prob) * mask).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    plain, bounded = -advantages * ratio, -advantages * clipped
    loss = (torch.maximum(plain, bounded) * mask).sum()
    with torch.no_grad():
        statistics = {
            "clipfrac": ((bounded > plain) * mask).sum().float(),
            "approx_kl": (log_ratio.square() / 2 * mask).sum(),
            "ratio": (ratio * mask).sum(),
            "ratio_gap": ((ratio - 1) * mask).abs().max(),
        }
    return loss, statistics


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of 1/2 max((V - ret)^2, (clip(V, V_old +- clip) - ret)^2), and the number of clipped tokens."""
    bounded = torch.clamp(values, old_values - clip, old_values + clip)
    plain_error, bounded_error = (values - returns).square(), (bounded - returns).square()
    loss = 0.5 * (torch.maximum(plain_error, bounded_error) * mask).sum()
    return loss, ((bounded_error > plain_error) * mask).sum().float()


# ---- DPO and its family -------------------------------------------------------------------------------------------
PAIR_LOSSES = ("sigmoid", "robust", "ipo", "hinge", "orpo", "simpo")


def preference_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, chosen_length: Tensor,
    rejected_length: Tensor, kind: str = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0, gamma: float = 0.5,
) -> Tensor:  # fmt: skip
    """Per-pair loss (P,) from summed log-probs of whole responses (P,) and their lengths in tokens.

    With h = (chosen - ref_chosen) - (rejected - ref_rejected), e = label_smoothing, and bars for length averages:
    sigmoid: -(1 - e) log s(beta h) - e log s(-beta h) (Rafailov et al. 2023, eq. 7; e > 0 is conservative DPO);
    robust:  [-(1 - e) log s(beta h) + e log s(-beta h)] / (1 - 2 e) (Chowdhury et al. 2024);
    ipo:     (h_bar - 1 / (2 beta))^2 on length averages (Azar et al. 2023, as TRL averages it);
    hinge:   max(0, 1 - beta h) (Zhao et al. 2023);
    orpo:    -beta log s(log odds of chosen_bar - log odds of rejected_bar); the caller adds the NLL (Hong et al. 2024);
    simpo:   -log s(beta (chosen_bar - rejected_bar) - gamma) (Meng et al. 2024).
    """
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    if kind == "sigmoid":
        return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    if kind == "robust":
        if label_smoothing >= 0.5:
            raise ValueError("robust DPO needs label_smoothing < 0.5")
        mixed = -(1 - label_smoothing) * F.logsigmoid(beta * h) + label_smoothing * F.logsigmoid(-beta * h)
        return mixed / (1 - 2 * label_smoothing)
    if kind == "ipo":
        average = (chosen - ref_chosen) / chosen_length - (rejected - ref_rejected) / rejected_length
        return (average - 1 / (2 * beta)).square()
    if kind == "hinge":
        return torch.relu(1 - beta * h)
    chosen_bar, rejected_bar = chosen / chosen_length, rejected / rejected_length
    if kind == "orpo":
        return -beta * F.logsigmoid(log_odds(chosen_bar) - log_odds(rejected_bar))
    if kind == "simpo":
        return -F.logsigmoid(beta * (chosen_bar - rejected_bar) - gamma)
    raise ValueError(f"unknown preference loss {kind!r}: {', '.join(PAIR_LOSSES)} or kto")


def log_odds(log_prob: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p < 0, stable at both ends."""
    log_prob = log_prob.clamp(max=-1e-6)
    complement = torch.where(log_prob > -0.6931, torch.log(-torch.expm1(log_prob)), torch.log1p(-log_prob.exp()))
    return log_prob - complement


def kto_loss(log_ratio: Tensor, desirable: Tensor, kl: Tensor, beta: float = 0.1) -> Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 8, both weights 1), (B,): 1 - s(beta (r - z)), or 1 - s(beta (z - r)) if not desirable.

    log_ratio (B,): log pi - log ref of each response; desirable (B,) bool; kl: the scalar z >= 0 (no gradient).
    """
    z = kl.detach()
    return torch.where(desirable, 1 - torch.sigmoid(beta * (log_ratio - z)), 1 - torch.sigmoid(beta * (z - log_ratio)))
