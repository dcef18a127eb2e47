"""KL estimators in exact expectation over a small categorical, and the coefficient controllers."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from punster.algorithms.kl import AdaptiveKL, kl_estimate, kl_loss, kl_penalty
from punster.config.train import KlPenalty

P = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
Q = torch.tensor([0.1, 0.3, 0.2, 0.05, 0.35], dtype=torch.float64)
KL = float((P * (P / Q).log()).sum())


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind: str) -> None:
    """The expectation over all five symbols, so no sampling error is left."""
    assert float((P * kl_estimate(P.log(), Q.log(), kind)).sum()) == pytest.approx(KL, abs=1e-14)


def test_k3_with_policy_and_reference_exchanged_is_wrong() -> None:
    inverted = float((P * kl_estimate(Q.log(), P.log(), "k3")).sum())
    assert abs(inverted - KL) > 0.5


def test_k1_of_exchanged_arguments_has_the_wrong_sign() -> None:
    assert float((P * kl_estimate(Q.log(), P.log(), "k1")).sum()) == pytest.approx(-KL, abs=1e-14)


def test_k2_is_half_the_square_and_biased() -> None:
    x = Q.log() - P.log()
    torch.testing.assert_close(kl_estimate(P.log(), Q.log(), "k2"), x.square() / 2, rtol=0, atol=1e-15)
    assert abs(float((P * kl_estimate(P.log(), Q.log(), "k2")).sum()) - KL) > 0.05


def test_values_by_hand() -> None:
    """log pi = -1, log ref = -1.5: x = -.5, k1 = .5, k2 = .125, k3 = e^-.5 - .5 = .10653."""
    pi, ref = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)
    assert float(kl_estimate(pi, ref, "k1")) == pytest.approx(0.5)
    assert float(kl_estimate(pi, ref, "k2")) == pytest.approx(0.125)
    assert float(kl_estimate(pi, ref, "k3")) == pytest.approx(0.1065306597, abs=1e-10)


def test_k3_is_never_negative_and_zero_for_equal_policies() -> None:
    x = torch.linspace(-5, 5, 201)
    assert (kl_estimate(torch.zeros(201), x, "k3") >= 0).all()
    assert torch.equal(kl_estimate(x, x, "k3"), torch.zeros(201))


def test_k3_keeps_its_precision_near_zero_in_fp32() -> None:
    """e^x - 1 - x by subtraction would be 0 or noise here; the true value is about x^2 / 2."""
    x = torch.tensor([1e-2, -1e-2])
    torch.testing.assert_close(kl_estimate(torch.zeros(2), x, "k3"), x.square() / 2, rtol=1e-2, atol=0)


def test_gradients_of_k3_in_the_policy() -> None:
    log_prob = P.log().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda lp: kl_estimate(lp, Q.log(), "k3"), (log_prob,))


def test_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(P, Q, "k4")


def test_adaptive_controller_follows_a_hand_trace() -> None:
    """Target 4, horizon 100, 10 sequences: errors +.2 (cut from 1), -.1, -.2 (cut from -.75), 0, +.2 (cut from 24)."""
    controller = AdaptiveKL(beta=0.1, target=4.0, horizon=100)
    trace = []
    for kl in (8.0, 3.6, 1.0, 4.0, 100.0):
        controller.update(kl, sequences=10)
        trace.append(controller.beta)
    by_hand = [0.102, 0.100980, 0.0989604, 0.0989604, 0.100939608]
    assert trace == pytest.approx(by_hand, abs=1e-12)


def test_adaptive_controller_moves_by_the_number_of_sequences() -> None:
    small, large = AdaptiveKL(1.0, 2.0, 1000), AdaptiveKL(1.0, 2.0, 1000)
    small.update(10.0, 50)
    large.update(10.0, 500)
    assert (small.beta, large.beta) == (pytest.approx(1.01), pytest.approx(1.1))


def test_fixed_controller_stays() -> None:
    controller = AdaptiveKL(0.05)
    controller.update(1e9, 1000)
    assert controller.beta == 0.05


# ---- penalties in the reward --------------------------------------------------------------------------------------
def expected(kind: str) -> float:
    """Over all five symbols, with the exact KL at every one of them."""
    return float((P * kl_penalty(P.log(), Q.log(), torch.full_like(P, KL), kind)).sum())


def test_penalties_in_exact_expectation() -> None:
    """k1, k3 and exact are the KL; clamped lies above it; none is nothing; js and k2 by their definitions."""
    x = (P / Q).log()
    m = (P + Q) / 2
    js = ((P / m).log().clamp(min=0) + (Q / m).log().clamp(min=0)) / 2
    hand = {"k1": KL, "k3": KL, "exact": KL, "none": 0.0, "k2": float((P * x.square()).sum()) / 2,
            "clamped": float((P * x.clamp(min=0)).sum()), "js": float((P * js).sum())}  # fmt: skip
    assert set(hand) == set(get_args(KlPenalty))
    for kind, value in hand.items():
        assert expected(kind) == pytest.approx(value, abs=1e-14)
    assert hand["clamped"] > KL + 0.05


def test_js_penalty_is_symmetric_bounded_and_zero_for_equal_policies() -> None:
    zero = torch.zeros_like(P)
    a, b = kl_penalty(P.log(), Q.log(), zero, "js"), kl_penalty(Q.log(), P.log(), zero, "js")
    torch.testing.assert_close(a, b, rtol=0, atol=1e-15)
    assert torch.equal(kl_penalty(P.log(), P.log(), zero, "js"), zero)
    far = kl_penalty(torch.tensor(-0.001), torch.tensor(-60.0), torch.tensor(0.0), "js")
    assert float(far) == pytest.approx(math.log(2) / 2, abs=1e-4)


def test_penalty_values_by_hand() -> None:
    """log pi = -1, log ref = -1.5: clamped .5; exchanged 0."""
    pi, ref, exact = (torch.tensor(x, dtype=torch.float64) for x in (-1.0, -1.5, 0.3))
    assert float(kl_penalty(pi, ref, exact, "clamped")) == 0.5 and float(kl_penalty(ref, pi, exact, "clamped")) == 0
    assert float(kl_penalty(pi, ref, exact, "exact")) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="unknown KL estimator"):
        kl_penalty(pi, ref, exact, "k4")


# ---- k3 in the loss -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("corrected", "direction"), [(False, "forward"), (True, "reverse")])
def test_gradient_of_the_kl_loss_in_exact_expectation(corrected: bool, direction: str) -> None:
    """On samples of pi, plain k3 pulls along KL(ref || pi), the corrected one along KL(pi || ref)."""
    logits = P.log().clone().requires_grad_(True)
    log_prob = logits.log_softmax(-1)
    loss = (P * kl_loss(log_prob, log_prob.detach(), Q.log(), corrected)).sum()  # P: the samples' distribution, no gradient
    (ours,) = torch.autograd.grad(loss, logits)
    log_prob = logits.log_softmax(-1)
    kl = {"reverse": (log_prob.exp() * (log_prob - Q.log())).sum(), "forward": (Q * (Q.log() - log_prob)).sum()}
    grads = {name: torch.autograd.grad(value, logits, retain_graph=True)[0] for name, value in kl.items()}
    torch.testing.assert_close(ours, grads[direction], rtol=0, atol=1e-12)
    assert (grads["forward"] - grads["reverse"]).abs().max() > 0.1


def test_gradient_of_k1_as_a_loss_vanishes_and_that_of_k2_is_reverse_kl() -> None:
    logits = P.log().clone().requires_grad_(True)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits)[0]

    k1 = gradient((P * kl_estimate(logits.log_softmax(-1), Q.log(), "k1")).sum())
    k2 = gradient((P * kl_estimate(logits.log_softmax(-1), Q.log(), "k2")).sum())
    log_prob = logits.log_softmax(-1)
    torch.testing.assert_close(k1, torch.zeros_like(k1), rtol=0, atol=1e-14)
    torch.testing.assert_close(k2, gradient((log_prob.exp() * (log_prob - Q.log())).sum()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("corrected", [False, True])
def test_gradcheck_of_the_kl_loss(corrected: bool) -> None:
    log_prob = P.log().clone().requires_grad_(True)
    old = P.log() + 0.1
    assert torch.autograd.gradcheck(lambda lp: kl_loss(lp, old, Q.log(), corrected), (log_prob,))
