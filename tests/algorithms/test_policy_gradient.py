"""Expected policy gradients against the exact gradient, on a problem of three tokens and two steps that can be enumerated."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from punster.algorithms.advantages import gae, group_advantages, reinforce_pp_advantages, shaped_rewards
from punster.algorithms.kl import kl_estimate, kl_penalty
from punster.algorithms.losses import clipped_policy_loss

V, BETA = 3, 0.7
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=2)))  # all nine texts of two tokens
GENERATOR = torch.Generator().manual_seed(11)
SCORES = torch.randn(9, generator=GENERATOR, dtype=torch.float64)
POLICY = torch.randn(
    1 + V, V, generator=GENERATOR, dtype=torch.float64
)  # logits: of the first token, then after each first token
REFERENCE = torch.randn(1 + V, V, generator=GENERATOR, dtype=torch.float64)
VALUES = torch.randn(1 + V, generator=GENERATOR, dtype=torch.float64)  # any value function: a baseline must not bias
STATES = torch.stack([torch.zeros(9, dtype=torch.long), 1 + TEXTS[:, 0]], 1)
MASK = torch.ones(9, 2, dtype=torch.bool)


def log_probs(logits: Tensor) -> Tensor:
    """(9, 2) log-prob of each token of each text."""
    return logits.log_softmax(-1)[STATES, TEXTS]


def exact_kl() -> Tensor:
    """(9, 2) KL over the whole vocabulary at each state."""
    log_p, log_q = POLICY.log_softmax(-1), REFERENCE.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)[STATES]


def true_gradient(beta: float) -> Tensor:
    """Of E[score] - beta KL(pi || ref) over whole texts, by differentiating the sum over all nine."""
    logits = POLICY.clone().requires_grad_(True)
    log_p = log_probs(logits).sum(1)
    objective = (log_p.exp() * (SCORES - beta * (log_p - log_probs(REFERENCE).sum(1)))).sum()
    return torch.autograd.grad(objective, logits)[0]


def expected_gradient(advantages: Tensor, chance: Tensor | None = None) -> Tensor:
    """Minus the gradient of the clipped loss at ratio 1, each text weighted with its probability."""
    logits = POLICY.clone().requires_grad_(True)
    fresh = log_probs(logits)
    chance = log_probs(POLICY).sum(1).exp() if chance is None else chance
    loss, stats = clipped_policy_loss(fresh, fresh.detach(), advantages * chance[:, None], MASK)
    assert stats["ratio_gap"] == 0
    return -torch.autograd.grad(loss, logits)[0]


def ppo_advantages(kind: str, lam: float = 1.0) -> Tensor:
    """As PPO's loop makes them, without whitening."""
    log_p, log_q = log_probs(POLICY), log_probs(REFERENCE)
    penalty = kl_penalty(log_p, log_q, exact_kl(), kind)
    advantages, _ = gae(shaped_rewards(SCORES, penalty, MASK, BETA), VALUES[STATES], MASK, 1.0, lam)
    return advantages - BETA * (log_p - log_q - exact_kl()) if kind == "exact" else advantages


@pytest.mark.parametrize("kind", ["k1", "exact"])
def test_ppos_gradient_is_exact_for_any_value_function(kind: str) -> None:
    torch.testing.assert_close(expected_gradient(ppo_advantages(kind)), true_gradient(BETA), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["clamped", "k2", "k3", "js"])
def test_other_penalties_are_other_objectives(kind: str) -> None:
    assert (expected_gradient(ppo_advantages(kind)) - true_gradient(BETA)).abs().max() > 0.01


def test_exact_kl_alone_would_miss_each_tokens_own_part() -> None:
    """Why the loop adds k1's deviation: without it the last token feels no penalty at all."""
    rewards = shaped_rewards(SCORES, exact_kl(), MASK, BETA)
    advantages, _ = gae(rewards, VALUES[STATES], MASK, 1.0, 1.0)
    missing = expected_gradient(advantages) - true_gradient(BETA)
    torch.testing.assert_close(expected_gradient(advantages)[1:], true_gradient(0.0)[1:], rtol=0, atol=1e-12)
    assert missing.abs().max() > 0.05


def test_exact_kl_has_less_variance_than_k1() -> None:
    """On the true value function, so that nothing but the penalty's noise is left of it."""
    log_p, log_q = log_probs(POLICY), log_probs(REFERENCE)
    chance = log_p.sum(1).exp()
    # What follows the first token: the second token's penalty, sampled and in expectation.
    sampled, exact = (log_p - log_q)[:, 1], exact_kl()[:, 1]
    mean = (chance * exact).sum()
    torch.testing.assert_close((chance * sampled).sum(), mean, rtol=0, atol=1e-14)
    assert (chance * (exact - mean) ** 2).sum() < 0.9 * (chance * (sampled - mean) ** 2).sum()


def test_gae_below_lambda_one_is_biased_by_a_wrong_value_function() -> None:
    assert (expected_gradient(ppo_advantages("k1", lam=0.5)) - true_gradient(BETA)).abs().max() > 0.01


@pytest.mark.parametrize(("variant", "factor"), [("rloo", 1.0), ("dr_grpo", 2 / 3)])
def test_group_baselines_are_exact_in_expectation(variant: str, factor: float) -> None:
    """All 729 groups of three texts. RLOO is unbiased; Dr. GRPO's baseline contains the text itself: (G - 1) / G of the gradient."""
    k1 = kl_estimate(log_probs(POLICY), log_probs(REFERENCE)).sum(1)
    groups = torch.tensor(list(itertools.product(range(9), repeat=3)))
    log_p = log_probs(POLICY).sum(1)
    chance = log_p[groups].sum(1).exp()
    advantages = group_advantages((SCORES - BETA * k1)[groups].reshape(-1), 3, variant).view(-1, 3)
    weight = torch.zeros(9, dtype=torch.float64).index_add(0, groups.flatten(), (chance[:, None] * advantages / 3).flatten())
    ours = expected_gradient(weight[:, None].expand(9, 2), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(ours, factor * true_gradient(BETA), rtol=0, atol=1e-12)


def test_grpos_division_by_the_deviation_changes_the_direction() -> None:
    groups = torch.tensor(list(itertools.product(range(9), repeat=3)))
    chance = log_probs(POLICY).sum(1)[groups].sum(1).exp()
    advantages = group_advantages(SCORES[groups].reshape(-1), 3, "grpo").view(-1, 3)
    weight = torch.zeros(9, dtype=torch.float64).index_add(0, groups.flatten(), (chance[:, None] * advantages / 3).flatten())
    ours = expected_gradient(weight[:, None].expand(9, 2), torch.ones(9, dtype=torch.float64))
    assert float(torch.cosine_similarity(ours.flatten(), true_gradient(0.0).flatten(), dim=0)) < 0.999


def test_reinforce_pp_is_the_scaled_gradient() -> None:
    """Whitening by constants (a batch so large that its mean and deviation are the distribution's) scales and adds a baseline."""
    k1 = kl_estimate(log_probs(POLICY), log_probs(REFERENCE))
    weights = (log_probs(POLICY).sum(1).exp() * 3000).round().long()  # a batch in proportion to the probabilities
    rows = torch.repeat_interleave(torch.arange(9), weights)
    mask = torch.ones(len(rows), 2, dtype=torch.bool)
    advantages = reinforce_pp_advantages(SCORES[rows], k1[rows], mask, BETA)
    logits = POLICY.clone().requires_grad_(True)
    fresh = log_probs(logits)[rows]
    loss, _ = clipped_policy_loss(fresh, fresh.detach(), advantages, mask)
    (gradient,) = torch.autograd.grad(-loss / len(rows), logits)
    assert float(torch.cosine_similarity(gradient.flatten(), true_gradient(BETA).flatten(), dim=0)) > 0.999


def test_importance_ratios_correct_for_the_sampling_policy() -> None:
    """Texts drawn from the reference, an unclipped ratio: the gradient at POLICY of the reference-sampled objective is exact."""
    logits = POLICY.clone().requires_grad_(True)
    old = log_probs(REFERENCE)
    # One ratio a text: the first token's clipped loss on summed log-probs, with clips that never bind.
    fresh = log_probs(logits).sum(1, keepdim=True)
    loss, _ = clipped_policy_loss(
        fresh, old.sum(1, keepdim=True), (SCORES * old.sum(1).exp())[:, None], torch.ones(9, 1, dtype=torch.bool), 0.999999, 1e9
    )
    (gradient,) = torch.autograd.grad(-loss, logits)
    torch.testing.assert_close(gradient, true_gradient(0.0), rtol=0, atol=1e-12)
