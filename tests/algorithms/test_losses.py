"""Losses against hand values, gradient identities and finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from punster.algorithms.losses import (
    PAIR_LOSSES,
    clipped_policy_loss,
    clipped_value_loss,
    kto_loss,
    log_odds,
    plackett_luce,
    preference_loss,
)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---- reward models ------------------------------------------------------------------------------------------------
def pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Plackett-Luce of pairs: Bradley-Terry."""
    return plackett_luce(torch.stack((chosen, rejected), 1), torch.tensor([[2.0, 1.0]]).expand(len(chosen), 2))


def test_pairs_by_hand() -> None:
    loss = pair_loss(t(2.0, 0.0, 1.0), t(1.0, 0.0, 3.0))
    hand = [-math.log(sigmoid(1.0)), math.log(2), -math.log(sigmoid(-2.0))]
    assert loss.tolist() == pytest.approx(hand, abs=1e-12)
    with_margin = pair_loss(t(2.0, 2.0) - t(0.25, 1.0), t(1.0, 1.0))
    assert with_margin.tolist() == pytest.approx([-math.log(sigmoid(0.75)), math.log(2)], abs=1e-12)


def test_plackett_luce_is_a_distribution_over_orders() -> None:
    """By brute force: the probabilities of all K! orders of one group sum to 1, and each is the product of its stages."""
    generator = torch.Generator().manual_seed(1)
    for size in (2, 3, 4, 5):
        scores = torch.randn(size, generator=generator, dtype=torch.float64) * 2
        total = 0.0
        for order in itertools.permutations(range(size)):
            ordered = scores[list(order)]
            ranks = torch.arange(size, 0, -1.0)
            loss = plackett_luce(ordered[None], ranks[None])[0]
            by_hand = math.prod(float(ordered[k].exp() / ordered[k:].exp().sum()) for k in range(size))
            assert float((-loss).exp()) == pytest.approx(by_hand, rel=1e-9)
            total += float((-loss).exp())
        assert total == pytest.approx(1, abs=1e-9)


def test_plackett_luce_of_two_is_bradley_terry_and_padding_and_ties_cost_nothing() -> None:
    scores = torch.tensor([[1.0, -0.5], [2.0, 3.0]])
    two = plackett_luce(scores, torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
    torch.testing.assert_close(two, -F.logsigmoid(scores[:, 0] - scores[:, 1]))
    padded = F.pad(scores, (0, 3), value=7.0).requires_grad_()
    ratings = F.pad(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), (0, 3), value=math.nan)
    loss = plackett_luce(padded, ratings)
    torch.testing.assert_close(loss, two)
    (gradient,) = torch.autograd.grad(loss.sum(), padded)
    assert gradient.isfinite().all() and float(gradient[:, 2:].abs().max()) == 0
    assert plackett_luce(torch.tensor([[5.0, 1.0]]), torch.tensor([[3.0, 3.0]])).tolist() == [0.0]
    assert plackett_luce(torch.tensor([[500.0, -500.0]]), torch.tensor([[1.0, 2.0]])).tolist() == [1000.0]


def test_pairs_are_finite_far_out() -> None:
    loss = pair_loss(torch.tensor([-500.0, 500.0]), torch.tensor([500.0, -500.0]))
    assert loss.tolist() == [1000.0, 0.0]


# ---- PPO ----------------------------------------------------------------------------------------------------------
RATIOS = t(1.5, 0.5, 1.5, 0.5, 1.1, 7.0)
ADVANTAGES = t(2.0, 2.0, -2.0, -2.0, 3.0, 50.0)
MASK = torch.tensor([[True, True, True, True, True, False]])


def test_clipped_policy_loss_by_hand() -> None:
    """Clip .2. Tokens: cut at 1.2 (-2.4); not cut (-1); not cut, -A rho = 3; cut at .8 (1.6); inside (-3.3); masked."""
    loss, stats = clipped_policy_loss(RATIOS.log()[None], torch.zeros(1, 6, dtype=torch.float64), ADVANTAGES[None], MASK, 0.2)
    assert loss.item() == pytest.approx(-2.4 - 1.0 + 3.0 + 1.6 - 3.3, abs=1e-12)
    assert stats["clipfrac"].item() == 2
    assert stats["ratio"].item() == pytest.approx(5.1, abs=1e-12)
    assert stats["ratio_gap"].item() == pytest.approx(0.5, abs=1e-12)
    half_squares = sum(math.log(r) ** 2 / 2 for r in (1.5, 0.5, 1.5, 0.5, 1.1))
    assert stats["approx_kl"].item() == pytest.approx(half_squares, abs=1e-12)


def test_clip_high_moves_the_upper_end_only() -> None:
    arguments = (RATIOS.log()[None], torch.zeros(1, 6, dtype=torch.float64), ADVANTAGES[None], MASK, 0.2)
    loss, _ = clipped_policy_loss(*arguments, clip_high=0.28)
    assert loss.item() == pytest.approx(-2.56 - 1.0 + 3.0 + 1.6 - 3.3, abs=1e-12)


def test_clipped_tokens_have_no_gradient_and_others_do() -> None:
    log_prob = RATIOS.log()[None].clone().requires_grad_(True)
    loss, _ = clipped_policy_loss(log_prob, torch.zeros(1, 6, dtype=torch.float64), ADVANTAGES[None], MASK, 0.2)
    loss.backward()
    assert log_prob.grad is not None
    # d(-A rho)/d log rho = -A rho where the plain term is the larger one.
    assert log_prob.grad[0].tolist() == pytest.approx([0.0, -1.0, 3.0, 0.0, -3.3, 0.0], abs=1e-12)


def test_at_ratio_one_the_gradient_is_the_policy_gradient() -> None:
    log_prob = t(-1.0, -2.0, -0.5)[None].requires_grad_(True)
    advantages = t(0.3, -1.2, 2.0)[None]
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, stats = clipped_policy_loss(log_prob, log_prob.detach(), advantages, mask)
    loss.backward()
    assert log_prob.grad is not None
    assert torch.equal(log_prob.grad, -advantages)
    assert stats["ratio_gap"].item() == 0 and stats["clipfrac"].item() == 0 and stats["approx_kl"].item() == 0


def test_clipped_value_loss_by_hand() -> None:
    """Old value 1, clip .2. V 2, return 3: cut to 1.2, max(1, 3.24). V 1.1: inside, .81 twice. V 0, return 3: max(9, 4.84)."""
    values, old, returns = t(2.0, 1.1, 0.0, 9.0)[None], t(1.0, 1.0, 1.0, 1.0)[None], t(3.0, 2.0, 3.0, 0.0)[None]
    mask = torch.tensor([[True, True, True, False]])
    loss, clipped = clipped_value_loss(values, old, returns, mask, 0.2)
    assert loss.item() == pytest.approx(0.5 * (3.24 + 0.81 + 9.0), abs=1e-12)
    assert clipped.item() == 1


# ---- DPO and its family -------------------------------------------------------------------------------------------
# One pair: chosen -10 (reference -12, 4 tokens), rejected -9 (reference -8, 5 tokens): h = 2 - (-1) = 3.
PAIR = (t(-10.0), t(-9.0), t(-12.0), t(-8.0), t(4.0), t(5.0))


def hand_orpo(beta: float) -> float:
    odds = [math.log(math.exp(x) / (1 - math.exp(x))) for x in (-2.5, -1.8)]
    return -beta * math.log(sigmoid(odds[0] - odds[1]))


HAND: dict[tuple[str, float], float] = {
    ("sigmoid", 0.0): -math.log(sigmoid(0.3)),
    ("sigmoid", 0.1): -0.9 * math.log(sigmoid(0.3)) - 0.1 * math.log(sigmoid(-0.3)),
    ("robust", 0.0): -math.log(sigmoid(0.3)),
    ("robust", 0.1): (-0.9 * math.log(sigmoid(0.3)) + 0.1 * math.log(sigmoid(-0.3))) / 0.8,
    ("ipo", 0.0): (2 / 4 + 1 / 5 - 5.0) ** 2,
    ("hinge", 0.0): 1 - 0.3,
    ("orpo", 0.0): hand_orpo(0.1),
    ("simpo", 0.0): -math.log(sigmoid(0.1 * (-2.5 + 1.8) - 0.5)),
}


@pytest.mark.parametrize(("kind", "smoothing"), HAND)
def test_preference_loss_by_hand(kind: str, smoothing: float) -> None:
    loss = preference_loss(*PAIR, kind=kind, beta=0.1, label_smoothing=smoothing, gamma=0.5)
    assert loss.tolist() == pytest.approx([HAND[kind, smoothing]], abs=1e-12)


def test_every_kind_has_a_hand_value() -> None:
    assert {kind for kind, _ in HAND} == set(PAIR_LOSSES)


def test_hinge_is_flat_beyond_its_margin() -> None:
    assert preference_loss(*PAIR, kind="hinge", beta=1.0).tolist() == [0.0]


@pytest.mark.parametrize("kind", ["sigmoid", "robust"])
def test_loss_is_ln_2_where_policy_and_reference_agree(kind: str) -> None:
    equal = (t(-10.0), t(-9.0), t(-10.0), t(-9.0), t(4.0), t(5.0))
    assert preference_loss(*equal, kind=kind, beta=0.7).item() == pytest.approx(math.log(2), abs=1e-15)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_gradient_identity_of_the_sigmoid_loss(beta: float) -> None:
    """d loss / d chosen = -beta s(-beta h) = -d loss / d rejected (Rafailov et al. 2023, section 4)."""
    chosen, rejected = t(-10.0, -3.0, -8.0).requires_grad_(True), t(-9.0, -7.0, -8.0).requires_grad_(True)
    ref_chosen, ref_rejected = t(-12.0, -4.0, -9.0), t(-8.0, -2.0, -9.0)
    lengths = t(4.0, 3.0, 2.0)
    preference_loss(chosen, rejected, ref_chosen, ref_rejected, lengths, lengths, "sigmoid", beta).sum().backward()
    h = (chosen - ref_chosen - rejected + ref_rejected).detach()
    assert chosen.grad is not None and rejected.grad is not None
    torch.testing.assert_close(chosen.grad, -beta * torch.sigmoid(-beta * h), rtol=0, atol=1e-12)
    assert torch.equal(rejected.grad, -chosen.grad)


def test_robust_loss_is_unbiased_under_flipped_labels() -> None:
    """The expectation over labels flipped with probability e is the loss on the true labels (Chowdhury et al. 2024)."""
    chosen, rejected, ref_chosen, ref_rejected, a, b = PAIR
    right = preference_loss(*PAIR, kind="robust", beta=0.1, label_smoothing=0.2)
    wrong = preference_loss(rejected, chosen, ref_rejected, ref_chosen, b, a, kind="robust", beta=0.1, label_smoothing=0.2)
    plain = preference_loss(*PAIR, kind="sigmoid", beta=0.1)
    torch.testing.assert_close(0.8 * right + 0.2 * wrong, plain, rtol=0, atol=1e-12)


def test_losses_that_have_no_reference_ignore_it() -> None:
    chosen, rejected, _, _, a, b = PAIR
    for kind in ("orpo", "simpo"):
        other = preference_loss(chosen, rejected, t(-50.0), t(3.0), a, b, kind=kind)
        assert torch.equal(other, preference_loss(*PAIR, kind=kind))


def test_bad_kinds_and_bad_smoothing_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown preference loss"):
        preference_loss(*PAIR, kind="dpo2")
    with pytest.raises(ValueError, match="label_smoothing"):
        preference_loss(*PAIR, kind="robust", label_smoothing=0.5)


def test_log_odds_is_right_and_stable_at_both_ends() -> None:
    p = t(1e-12, 1e-3, 0.3, 0.5, 0.7, 0.999)
    torch.testing.assert_close(log_odds(p.log()), (p / (1 - p)).log(), rtol=1e-9, atol=1e-12)
    ends = torch.tensor([-1e4, -200.0, -1e-7, 0.0], requires_grad=True)
    odds = log_odds(ends)
    odds.sum().backward()
    assert torch.isfinite(odds).all()
    assert ends.grad is not None and torch.isfinite(ends.grad).all()
    assert odds[0].item() == -1e4 and odds[1].item() == -200.0
    single = log_odds(torch.tensor([-1e-4]))  # log(-expm1(x)), where log(1 - e^x) has lost three digits
    assert single.item() == pytest.approx(-math.log(1e-4), abs=1e-3)


def test_kto_by_hand() -> None:
    ratios, z = t(3.0, -1.0), torch.tensor(0.5, dtype=torch.float64)
    desirable = torch.tensor([True, False])
    loss = kto_loss(ratios, desirable, z, beta=0.2)
    assert loss.tolist() == pytest.approx([1 - sigmoid(0.2 * 2.5), 1 - sigmoid(0.2 * 1.5)], abs=1e-12)
    assert kto_loss(t(0.0, 0.0), desirable, torch.tensor(0.0)).tolist() == [0.5, 0.5]


def test_kto_has_no_gradient_in_the_reference_point_and_the_right_signs() -> None:
    ratios = t(0.4, 0.4).requires_grad_(True)
    z = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    kto_loss(ratios, torch.tensor([True, False]), z, beta=0.3).sum().backward()
    assert z.grad is None
    assert ratios.grad is not None
    assert ratios.grad[0] < 0 < ratios.grad[1]


# ---- finite differences -------------------------------------------------------------------------------------------
def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return values.requires_grad_(True)


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_gradcheck_of_the_preference_losses(kind: str) -> None:
    chosen, rejected = random(4, seed=1) - 9, random(4, seed=2) - 9
    ref_chosen, ref_rejected = (random(4, seed=3) - 9).detach(), (random(4, seed=4) - 9).detach()
    lengths = t(3.0, 4.0, 5.0, 6.0)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return preference_loss(a, b, ref_chosen, ref_rejected, lengths, lengths + 1, kind, 0.1, 0.1, 0.5)

    assert torch.autograd.gradcheck(loss, (chosen.detach().requires_grad_(True), rejected.detach().requires_grad_(True)))


def _policy(x: Tensor) -> Tensor:
    mask = torch.arange(5)[None] < torch.tensor([5, 2, 3])[:, None]
    return clipped_policy_loss(x, random(3, 5, seed=6, scale=0.3).detach(), random(3, 5, seed=7).detach(), mask, 0.2, 0.28)[0]


def _value(x: Tensor) -> Tensor:
    mask = torch.arange(5)[None] < torch.tensor([5, 2, 3])[:, None]
    return clipped_value_loss(x, random(3, 5, seed=8).detach(), random(3, 5, seed=9).detach(), mask, 0.2)[0]


def _kto(x: Tensor) -> Tensor:
    return kto_loss(x.reshape(-1), torch.arange(15) % 2 == 0, torch.tensor(0.3), 0.2)


def _pairs(x: Tensor) -> Tensor:
    return pair_loss(x[0] - 0.2, x[1])


@pytest.mark.parametrize("loss", [_policy, _value, _kto, _pairs])
def test_gradcheck_of_the_other_losses(loss: Callable[[Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(loss, (random(3, 5, seed=5, scale=0.3),))
