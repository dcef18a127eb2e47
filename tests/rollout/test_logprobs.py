"""Chunked log-probs, entropy and exact KL against the full softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from punster.model.product import LogitHead
from punster.rollout import logprobs
from punster.rollout.logprobs import compare_policies, token_log_probs

ROWS, WIDTH, VOCAB = 13, 6, 11


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", 4)


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    return hidden.requires_grad_(True), head.requires_grad_(True), targets


def full(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (hidden @ head.T / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("chunk", [1, 4, 13, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_full_softmax(chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    hidden, head, targets = inputs()
    weights = torch.randn(ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for log_prob in (
        token_log_probs(hidden, LogitHead(head), targets, temperature),
        full(hidden, head, targets, temperature)[0],
    ):
        gradients = torch.autograd.grad((log_prob * weights).sum(), (hidden, head))
        results.append((log_prob, *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, targets = inputs()
    frozen = head.detach()
    token_log_probs(hidden, LogitHead(frozen), targets, 1.0).sum().backward()
    assert frozen.grad is None and hidden.grad is not None
    expected = torch.autograd.grad(full(hidden, frozen, targets, 1.0)[0].sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [3, 64])
def test_gradcheck(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    hidden, head, targets = inputs(seed=3)

    def function(h: Tensor, w: Tensor) -> Tensor:
        return token_log_probs(h, LogitHead(w), targets, 0.8)

    assert torch.autograd.gradcheck(function, (hidden, head))
    assert torch.autograd.gradcheck(lambda h: function(h, head.detach()), (hidden,))


def test_a_bf16_head_gives_fp32_log_probs_and_nearly_the_same_gradient() -> None:
    """Its weights are exact in fp32; only what flows back is a product in bf16."""
    hidden, head, targets = inputs(torch.float32)
    half = head.detach().bfloat16()
    ours = token_log_probs(hidden, LogitHead(half), targets, 1.0)
    theirs = full(hidden, half.float(), targets, 1.0)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    a, b = (torch.autograd.grad(x.sum(), hidden)[0].flatten() for x in (ours, theirs))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9999


def test_log_probs_are_bit_equal_in_training_and_comparison() -> None:
    """The ratio before the first update is exactly 1 only if both paths round alike."""
    hidden, weight, targets = inputs(torch.float32)
    head = LogitHead(weight.detach())
    with torch.no_grad():
        compared = compare_policies(hidden, head, hidden, head, targets, 0.7)
    assert torch.equal(compared["log_prob"], token_log_probs(hidden, head, targets, 0.7))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_exact_kl_is_the_sum_over_the_vocabulary(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets = inputs(seed=4)
    reference, reference_head, _ = inputs(seed=5)
    monkeypatch.setattr(logprobs, "CHUNK", 5)
    compared = compare_policies(hidden, LogitHead(head), reference, LogitHead(reference_head), targets, temperature)
    p = (hidden @ head.T / temperature).softmax(-1)
    q = (reference @ reference_head.T / temperature).softmax(-1)
    torch.testing.assert_close(compared["kl"], (p * (p / q).log()).sum(-1).detach(), rtol=0, atol=1e-10)
    assert (compared["kl"] > 0).all()
    log_prob, entropy = full(hidden, head, targets, temperature)
    ref_log_prob, _ = full(reference, reference_head, targets, temperature)
    for name, expected in (("log_prob", log_prob), ("entropy", entropy), ("ref_log_prob", ref_log_prob)):
        torch.testing.assert_close(compared[name], expected.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_kl_of_a_policy_with_itself_is_zero(dtype: torch.dtype) -> None:
    hidden, head, targets = inputs(dtype)
    compared = compare_policies(hidden, LogitHead(head), hidden, LogitHead(head), targets)
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    assert compared["kl"].abs().max().item() < bound


def test_no_full_logits_are_kept_for_backward() -> None:
    """What autograd saves does not grow with tokens x vocabulary: the states and targets, for the gradient of a trained head."""
    hidden, head, targets = inputs()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_log_probs(hidden, LogitHead(head), targets, 1.0)
    assert sorted(saved) == sorted([hidden.numel(), targets.numel()])
