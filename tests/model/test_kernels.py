"""The C kernels against plain PyTorch: the same function, nearer to exact arithmetic, and independent of what stands beside a row."""

from __future__ import annotations

import ctypes as c
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from punster.data.batch import Batch, Example, PrefixTree, collate
from punster.errors import UserError
from punster.model import fused, kernels, product
from punster.model.kernels import BLOCK, CUpdate, LowRank, Packed, Quantised, at, call
from punster.model.load import random_model
from punster.model.lora import Adapter
from punster.model.role import Role
from punster.model.transformer import Decoder
from punster.rollout import logprobs, sampler
from punster.rollout.sampler import Decoding, generate
from punster.train.optim import seeded

needs_kernels = pytest.mark.skipif(kernels.compiled() is None, reason="no AVX2 (or AMX), or no C compiler: plain PyTorch is used")
needs_halves = pytest.mark.skipif(not kernels.in_halves(), reason="no AVX512_BF16 and AVX512_VNNI: nothing runs in 8 bits")
FAMILIES = {
    "llama": {
        "model_type": "llama", "vocab_size": 331, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "hidden_act": "silu",
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 331, "n_embd": 64, "n_head": 2, "n_layer": 3, "n_positions": 64},
}  # fmt: skip


def exact_and_half(family: str) -> tuple[Decoder, Decoder]:
    """One network twice: bf16 weights, and the same values in fp32. Norm weights and biases are not at their initial values."""
    base = random_model(FAMILIES[family])
    generator = torch.Generator().manual_seed(5)
    half = {
        name: (t + 0.1 * torch.randn(t.shape, generator=generator) if t.dim() == 1 else t).bfloat16()
        for name, t in base.weights.items()
    }
    return Decoder(base.config, {name: t.float() for name, t in half.items()}), Decoder(base.config, half)


def adapters(model: Decoder) -> tuple[Adapter, ...]:
    """Two that stack, of unequal rank; the second one is trained."""
    made = []
    for name, rank in (("sft", 3), ("policy", 8)):
        generator = torch.Generator().manual_seed(rank)
        adapter = Adapter.create(name, model.config, rank=rank, alpha=16.0, layers=range(3), generator=generator)
        for site in adapter.b:
            adapter.b[site] = 0.02 * torch.randn(adapter.b[site].shape, generator=generator)
        made.append(adapter)
    made[1].trainable()
    return tuple(made)


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_of_scoring_is_that_of_plain_passes_in_fp32(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With prefixes in common; and only where a model is for scoring, for others are compared with passes that learn."""
    exact, _ = exact_and_half(family)
    role, calls = Role(exact, adapters(exact)), []
    attended = fused.attended
    monkeypatch.setattr(fused, "attended", lambda *given: calls.append(1) or attended(*given))
    batch = collate(texts())
    plain = role.nodes(batch)
    assert not calls
    scoring = role.merged()
    found = scoring.nodes(collate(texts()))
    assert len(calls) == 3
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def texts(count: int = 5) -> list[Example]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda n: tuple(torch.randint(0, 331, (n,), generator=generator).tolist())
    shared = draw(4)
    return [Example(shared + draw(i % 3), draw(3 + 2 * i)) for i in range(count)]


def states_and_gradients(model: Decoder, batch: Batch, in_bytes: bool = False) -> tuple[Tensor, Tensor]:
    role = Role(model, adapters(model), trained=("policy",))
    with model.in_bytes(in_bytes):
        hidden = role.response_hidden(batch)
    logs = logprobs.token_log_probs(hidden, model.head, batch.targets(), 1.3)
    (logs * torch.linspace(-1, 1, len(logs))).sum().backward()
    grads = [p.grad for p in role.parameters()]
    assert all(grad is not None for grad in grads)
    return hidden.detach(), torch.cat([grad.flatten() for grad in grads if grad is not None])


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_and_its_gradients_are_nearer_to_exact_than_the_plain_path(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, half = exact_and_half(family)
    batch = collate(texts())
    assert fused.usable(half, 0) and not fused.usable(exact, 0)
    truth, slope = states_and_gradients(exact, batch)
    found, own_slope = states_and_gradients(half, batch)
    monkeypatch.setattr(fused, "usable", lambda model, layer: False)
    monkeypatch.setattr(product, "suits", lambda weight: False)
    monkeypatch.setattr(product, "multiplies_bf16", lambda: True)
    plain, _ = states_and_gradients(Decoder(half.config, dict(half.weights)), batch)
    error, plain_error = (float((x - truth).norm() / truth.norm()) for x in (found, plain))
    assert 0 < error < 1.1 * plain_error and error < 0.01
    assert float(torch.nn.functional.cosine_similarity(own_slope, slope, 0)) > 0.999


@needs_kernels
@pytest.mark.parametrize(("rows", "out", "into"), [(1, 100, 64), (7, 48, 32), (13, 331, 96), (300, 96, 4128)])
@torch.no_grad()
def test_products_sum_in_fp32(rows: int, out: int, into: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    w, x = torch.randn(out, into, generator=generator).bfloat16(), torch.randn(rows, into, generator=generator).bfloat16()
    bias, start = torch.randn(out, generator=generator), torch.randn(rows, out, generator=generator)
    want = x.double() @ w.double().T + bias
    packed = Packed.of(w, bias)
    if not kernels.in_halves():
        assert 0 < float((packed(x) - want).norm() / want.norm()) < 0.0004  # rounding to bf16 costs .0017
        back = Packed.of(torch.nn.functional.pad(w.T, (0, out % 2)))(torch.nn.functional.pad(want, (0, out % 2)).bfloat16())
        exact = want.bfloat16().double() @ w.double()
        assert float((back - exact).norm() / exact.norm()) < 0.0004
        torch.testing.assert_close(packed(x, base=start), packed(x) + start, atol=1e-5, rtol=1e-5)
        assert torch.equal(packed(x, half=True), packed(x).bfloat16())
        return
    torch.testing.assert_close(packed(x).double(), want, atol=3e-6 * into**0.5 * 8, rtol=1e-5)
    torch.testing.assert_close(packed(x, base=start).double(), want + start, atol=3e-6 * into**0.5 * 8, rtol=1e-5)
    assert torch.equal(packed(x, half=True), packed(x).bfloat16()) or into > 2 * 1024
    even = torch.nn.functional.pad(want, (0, out % 2)).bfloat16()
    back = Packed.of(torch.nn.functional.pad(w.T, (0, out % 2)))(even)
    torch.testing.assert_close(back.double(), even[:, :out].double() @ w.double(), atol=1e-3 * out**0.5, rtol=1e-4)


@pytest.mark.skipif(kernels.compiled() is None or kernels.in_halves(), reason="products are in bf16, or in PyTorch")
@torch.no_grad()
def test_in_whole_numbers_nothing_overflows_and_nan_is_not_lost() -> None:
    generator = torch.Generator().manual_seed(3)
    w, x = (torch.randint(-1, 2, shape, generator=generator).bfloat16() for shape in ((100, 1056), (13, 1056)))
    w[:2], x[:2] = 1, 1  # the largest sums that a block can have
    w[1], w[5], x[5] = -1, 0, 0
    sizes = 2.0 ** (torch.arange(13) % 5)[:, None]
    found = Packed.of(w * 0.375)(x * sizes.bfloat16())
    torch.testing.assert_close(found, sizes * 0.375 * (x.float() @ w.float().T), rtol=1e-5, atol=1e-4)
    assert float(found[0, 0]) == pytest.approx(1056 * 0.375) and not found[5].any() and not found[:, 5].any()
    x[3, 700], x[4, 1050], x[6, :] = torch.nan, torch.inf, 3e-39
    found = Packed.of(w)(x)
    assert bool(found[3:5].isnan().all()) and bool(found[[0, 1, 2, 5, 6, 7]].isfinite().all())
    w[9, 5], w[50, 1055] = torch.nan, torch.inf
    found = Packed.of(w)(x[:3])
    assert bool(found[:, [9, 50]].isnan().all()) and int(found.isnan().sum()) == 6
    matrix = product.Matrix(w)
    assert matrix.quantised is matrix.packed and matrix.quantised_back is matrix.packed_back  # 8 bits would be no faster


@needs_halves
@pytest.mark.parametrize(("rows", "out", "into"), [(1, 100, 64), (7, 48, 256), (13, 331, 288), (300, 96, 1632)])
@torch.no_grad()
def test_products_in_8_bits(rows: int, out: int, into: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    bias, start = torch.randn(out, generator=generator), torch.randn(rows, out, generator=generator)
    # Whole numbers, the largest of each block (and column) 127 times a power of two: nothing is lost.
    w, x = (torch.randint(-127, 128, shape, generator=generator).float() for shape in ((out, into), (rows, into)))
    w[:, 0], x[:, ::BLOCK] = 127, -127
    w, x = (w * 2.0 ** -(torch.arange(out) % 9)[:, None]).bfloat16(), (x * 2.0 ** (torch.arange(rows) % 5)[:, None]).bfloat16()
    want = x.double() @ w.double().T + bias
    torch.testing.assert_close(Quantised.of(w, bias)(x).double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    w, x = torch.randn(out, into, generator=generator).bfloat16(), torch.randn(rows, into, generator=generator).bfloat16()
    made, exact = Quantised.of(w, bias), x.double() @ w.double().T + bias
    assert 0.004 < float((made(x) - exact).norm() / exact.norm()) < 0.014
    assert torch.equal(made(x, half=True), made(x).bfloat16())
    torch.testing.assert_close(made(x, base=start), made(x) + start, atol=1e-5, rtol=1e-5)
    low, b = torch.randn(rows, 2, generator=generator), torch.randn(2, out, generator=generator)
    ends = torch.tensor([[0, 0], [out, out]], dtype=torch.int32)
    update = CUpdate(None, at(b), 2, at(ends[0]), at(ends[1]))
    torch.testing.assert_close(made(x, low, update), made(x) + low @ b, atol=1e-4, rtol=1e-5)
    assert torch.equal(Quantised.of(w.T.contiguous().T, bias)(x), made(x))


@needs_halves
@torch.no_grad()
def test_in_8_bits_an_outlier_costs_its_own_block_and_nan_is_not_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(96, 4 * BLOCK, generator=generator).bfloat16(), torch.randn(3, 4 * BLOCK, generator=generator).bfloat16()
    x[1, 5], x[2, 700] = 3000.0, torch.nan
    w[:, 5] = 0  # so that the exact product does not have the outlier in it
    found, want = Quantised.of(w)(x), x.float() @ w.float().T
    error = (found - want).norm(dim=1) / want.norm(dim=1)
    assert float(error[0]) < 0.014
    assert 0.3 < float(error[1]) < 0.6  # a quarter of the inputs is rounded to nothing: half of the norm, by its root
    assert bool(found[2].isnan().all())


@needs_kernels
@pytest.mark.parametrize("into", [64, 100, 1056])
@torch.no_grad()
def test_a_row_is_bit_identical_whatever_stands_beside_it(into: int) -> None:
    w, x, start = torch.randn(200, into).bfloat16(), torch.randn(70, into).bfloat16(), torch.randn(70, 200)
    packed, low, b = Packed.of(w, torch.randn(200)), torch.randn(70, 3), torch.randn(3, 200)
    ends = torch.tensor([[0, 0, 100], [200, 100, 200]], dtype=torch.int32)
    update = CUpdate(None, at(b), 3, at(ends[0]), at(ends[1]))
    ways: list[Callable[[slice], Tensor]] = [
        lambda rows: packed(x[rows].contiguous()),
        lambda rows: packed(x[rows].contiguous(), low[rows].contiguous(), update, half=True),
        lambda rows: packed(x[rows].contiguous(), low[rows].contiguous(), update, start[rows].contiguous()),
    ]
    for way in ways:
        whole = way(slice(0, 70))
        for first, last in ((0, 1), (3, 8), (8, 41), (69, 70), (20, 22), (30, 33), (40, 44), (50, 56), (60, 67), (5, 5)):
            assert torch.equal(way(slice(first, last)), whole[first:last])


@needs_kernels
@pytest.mark.parametrize(("heads", "keys", "size"), [(9, 3, 64), (2, 2, 32), (4, 1, 96)])
def test_attention_over_a_prefix_tree_and_its_gradient(heads: int, keys: int, size: int) -> None:
    """Against attention of whole rows in fp64, summed over the rows that share a node."""
    batch = collate(texts(7))
    tree, count = batch.tree, batch.tree.first.numel()
    generator = torch.Generator().manual_seed(4)
    qkv = torch.randn(count, (heads + 2 * keys) * size, generator=generator)
    upstream = torch.randn(count, heads * size, generator=generator)
    paths, shape = fused.Paths(tree), fused.Heads(heads, keys, size)
    found, total = paths.attend(qkv, shape)
    exact = qkv.double().requires_grad_()
    q, k, v = tree.spread(exact.view(1, count, -1, size)).transpose(1, 2).split((heads, keys, keys), 1)
    k, v = (x.repeat_interleave(heads // keys, 1) for x in (k, v))
    wanted = tree.gather(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))[0]
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)
    (wanted * upstream).sum().backward()
    torch.testing.assert_close(
        paths.pull_back(qkv, found.bfloat16(), total, upstream, shape).double(), exact.grad, rtol=1e-5, atol=1e-5
    )


@needs_kernels
@pytest.mark.parametrize(("heads", "keys", "size"), [(9, 3, 64), (2, 2, 32), (4, 1, 96), (2, 1, 128)])
@pytest.mark.parametrize("left", [False, True])
def test_long_paths_are_attended_in_blocks(heads: int, keys: int, size: int, left: bool) -> None:
    """Against fp64, as near as PyTorch's attention in bf16 is; rows that share prefixes, one twice, one within another."""
    generator = torch.Generator().manual_seed(6)
    long = torch.randint(0, 331, (700,), generator=generator).tolist()
    rows = [long, long[:130] + long[300:420], long, long[:64], [7, 8, 9], long[:131] + long[400:519], long[:640] + long[:61]]
    tree = PrefixTree.of(rows, left=left)
    count = tree.first.numel()
    qkv = 1.5 * torch.randn(count, (heads + 2 * keys) * size, generator=generator)
    upstream = torch.randn(count, heads * size, generator=generator)
    paths, shape = fused.Paths(tree), fused.Heads(heads, keys, size)
    assert paths.long
    found, total = paths.attend(qkv, shape)
    own = paths.pull_back(qkv, found.bfloat16(), total, upstream, shape)
    mask = torch.zeros(len(rows), 1, 701, 701, dtype=torch.bool)
    for row, sequence in enumerate(rows):
        begin = 701 - len(sequence) if left else 0
        mask[row, 0, begin : begin + len(sequence), begin : begin + len(sequence)] = True
    mask = mask.tril() | torch.eye(701, dtype=torch.bool)

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = qkv.double().requires_grad_()
        q, k, v = tree.spread(x.to(dtype).view(1, count, -1, size)).transpose(1, 2).split((heads, keys, keys), 1)
        k, v = (t.repeat_interleave(heads // keys, 1) for t in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = tree.gather(out.transpose(1, 2).flatten(2))[0]
        (out.double() * upstream).sum().backward()
        assert x.grad is not None
        return out.detach().double(), x.grad

    def error(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).norm() / b.norm())

    (wanted, gradient), (rough, rough_gradient) = plain(torch.float64), plain(torch.bfloat16)
    assert error(found, wanted) <= 1.2 * error(rough, wanted) < 0.01
    parts = [x.split((heads * size, keys * size, keys * size), 1) for x in (own, gradient, rough_gradient)]
    for mine, true, theirs in zip(*parts, strict=True):
        assert error(mine, true) <= 1.2 * error(theirs, true) < 0.02
    again = paths.attend(qkv, shape)
    assert torch.equal(again[0], found) and torch.equal(paths.pull_back(qkv, found.bfloat16(), total, upstream, shape), own)


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_has_the_log_probs_of_the_training_path_to_the_last_bit(family: str) -> None:
    _, half = exact_and_half(family)
    role = Role(half, adapters(half), trained=("policy",))
    prompts = [example.prompt for example in texts()]
    out = generate(role, prompts, Decoding(12, temperature=1.3), 7, seeded(3, "sampling"), 2)
    batch = collate(out.examples)
    with torch.no_grad():
        logs = logprobs.token_log_probs(role.response_hidden(batch), half.head, batch.targets(), 1.3)
    assert torch.equal(logs, torch.cat(out.log_probs))


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("first", "below_from"), [(0, 0), (2, 0), (0, 2)])
def test_what_sampling_recorded_serves_as_the_forward_pass(
    family: str, first: int, below_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The states of the responses are those of a fresh pass to the last bit, the gradients up to the order of sums.

    Some rows end early and leave the batch; the trained adapter begins at layer `first`, the one below at `below_from`; rows come in
    another order.
    """
    _, half = exact_and_half(family)
    below, policy = adapters(half)
    for adapter, begin in ((policy, first), (below, below_from)):
        adapter.first_layer = begin
        for site in [s for s in adapter.a if half.layer_of(s) < begin]:
            del adapter.a[site], adapter.b[site]
    role = Role(half, (below, policy), trained=("policy",))
    prompts = [example.prompt for example in texts()]
    choose = sampler.choose

    def often_the_end(logits: Tensor, decoding: Decoding, uniform: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        token, log_prob = choose(logits, decoding, uniform, seen)
        return torch.where(uniform < 0.1, 7, token), log_prob

    monkeypatch.setattr(sampler, "choose", often_the_end)
    out = generate(role, prompts, Decoding(12), 7, seeded(8, "sampling"), 3, record=True)
    lengths = [len(example.response) for example in out.examples]
    assert out.record is not None and out.record.first_layer == first and min(lengths) < 12 and max(lengths) == 12
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(1)).tolist()
    fresh = collate([out.examples[row] for row in order])
    recorded = replace(fresh, record=out.record, tree=out.record.tree(order))
    results = []
    for batch in (fresh, recorded):
        for parameter in role.parameters():
            parameter.grad = None
        states = role.response_hidden(batch)
        logs = logprobs.token_log_probs(states, half.head, batch.targets())
        (logs * torch.linspace(-1, 1, len(logs))).sum().backward()
        grads = [p.grad.flatten() for p in role.parameters() if p.grad is not None]
        results.append((states.detach(), torch.cat(grads)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0.02, atol=2e-3 * float(results[0][1].abs().max()))
    assert float(torch.cosine_similarity(results[0][1], results[1][1], 0)) > 0.99999


@needs_kernels
def test_log_probs_and_slopes_of_the_comparison_serve_the_loss() -> None:
    _, half = exact_and_half("llama")
    states, targets = torch.randn(150, 96), torch.randint(0, 331, (150,), generator=torch.Generator().manual_seed(1))
    found = logprobs.compare_policies(states, half.head, states + 0.1, half.head, targets, 0.7, with_slopes=True)
    known = logprobs.Known(found["log_prob"], found["slopes"])
    results = []
    for given in (None, known):
        leaf = states.clone().requires_grad_()
        logs = logprobs.token_log_probs(leaf, half.head, targets, 0.7, known=given)
        (logs * torch.linspace(-1, 1, len(logs))).sum().backward()
        results.append((logs.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is not None and results[1][1] is not None and torch.equal(results[0][1], results[1][1])


@needs_kernels
def test_choosing_by_inverse_cdf() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(400, 1003, generator=generator)
    logits[:, ::3] = float("-inf")
    uniform = torch.rand(400, generator=generator)
    uniform[:3] = torch.tensor([0.0, 1 - 2**-24, 0.5])
    token, log_prob = sampler.choose_plainly(logits, 0.8, uniform)
    exact = (logits.double() / 0.8).softmax(-1)
    total = exact.cumsum(-1)
    rows = torch.arange(400)
    assert bool((exact[rows, token] > 0).all())
    assert bool((total[rows, token] >= uniform.double() - 1e-6).all())
    assert bool((total[rows, token] - exact[rows, token] <= uniform.double() + 1e-6).all())
    torch.testing.assert_close(log_prob, (logits / 0.8).log_softmax(-1)[rows, token], rtol=1e-5, atol=1e-5)
    alone = [sampler.choose_plainly(logits[i : i + 1], 0.8, uniform[i : i + 1])[0] for i in range(20)]
    assert torch.equal(torch.cat(alone), token[:20])


@needs_kernels
def test_log_probs_entropy_and_kl_over_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(331, 64, generator=generator).bfloat16()
    hidden = torch.randn(70, 64, generator=generator)
    hidden, other = hidden.bfloat16().float().requires_grad_(), (hidden + 0.1).bfloat16().float()
    targets = torch.randint(0, 331, (70,), generator=generator)

    def everything(head: product.LogitHead) -> list[Tensor]:
        logs = logprobs.token_log_probs(hidden, head, targets, 0.8)
        (slope,) = torch.autograd.grad(logs.square().sum(), hidden)
        compared = logprobs.compare_policies(hidden.detach(), head, other, head, targets, 0.8)
        assert torch.equal(compared["log_prob"], logs.detach()) or head.packed is None
        return [logs.detach(), slope, *compared.values(), *logprobs.token_statistics(hidden.detach(), head, targets, 0.8)]

    found = everything(product.LogitHead(weight))
    monkeypatch.setattr(product, "suits", lambda w: False)
    plain = everything(product.LogitHead(weight))
    slopes = found.pop(1), plain.pop(1)
    assert float((slopes[0] - slopes[1]).norm() / slopes[1].norm()) < 0.01  # probabilities are rounded to bf16
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4 if kernels.in_halves() else 0.03, rtol=1e-5)  # logits spread by 6


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernels), False])
def test_slopes_of_confident_tokens(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """d log p(y) = (1 - p(y)) W[y] - sum of the others: rounding p(y) to bf16 would leave noise where p(y) is near 1."""
    if not kernel:
        monkeypatch.setattr(product, "suits", lambda w: False)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(300, 64, generator=generator).bfloat16()
    targets = torch.arange(40)
    hidden = (0.16 * weight[:40].float()).bfloat16().double().requires_grad_()
    logs = (hidden @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert float(logs.exp().mean()) > 0.9
    (want,) = torch.autograd.grad(logs.sum(), hidden)
    state = hidden.detach().float().requires_grad_()
    (found,) = torch.autograd.grad(logprobs.token_log_probs(state, product.LogitHead(weight), targets).sum(), state)
    assert float(((found - want).norm(dim=1) / want.norm(dim=1)).median()) < 0.01


@needs_kernels
def test_one_thread_and_two_agree_to_the_last_bit() -> None:
    _, half = exact_and_half("llama")
    batch, threads = collate(texts()), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(states_and_gradients(half, batch))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)  # some sums of the plain parts are split


@needs_halves
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_in_bytes_is_near_to_one_in_bf16_and_ends_with_its_context(family: str) -> None:
    _, half = exact_and_half(family)
    batch = collate(texts())
    coarse, coarse_gradients = states_and_gradients(half, batch, in_bytes=True)
    for which in half.config.steps:
        made = half.matrix(tuple(site for site, _ in half.projection(1, which))).__dict__
        used = {name for name in ("packed", "packed_back", "quantised", "quantised_back") if name in made}
        assert used == {"packed" if which == "attend" else "quantised", "quantised_back"}
    states, gradients = states_and_gradients(half, batch)
    assert 0.001 < float((coarse - states).norm() / states.norm()) < 0.03
    assert 0.98 < float(torch.cosine_similarity(coarse_gradients, gradients, 0)) < 0.999999
    with half.in_bytes(), half.in_bytes(False):
        assert torch.equal(states_and_gradients(half, batch)[0], states)
    with pytest.raises(KeyboardInterrupt), half.in_bytes():
        raise KeyboardInterrupt
    assert not half.coarse and torch.equal(states_and_gradients(half, batch)[0], states)


@needs_halves
@torch.no_grad()
def test_in_8_bits_rows_stand_alone_and_nothing_is_divided_by_zero() -> None:
    generator = torch.Generator().manual_seed(1)
    w, x = torch.randn(200, 320, generator=generator).bfloat16(), torch.randn(70, 320, generator=generator).bfloat16()
    w[7], x[5], x[60, 300] = 0, 0, torch.inf
    made = Quantised.of(w)
    whole = made(x)
    for first, last in ((0, 1), (3, 8), (8, 41), (69, 70)):
        assert torch.equal(made(x[first:last].contiguous()), whole[first:last])
    assert not whole[5].any() and not whole[:60, 7].any()
    assert bool(whole[60].isnan().all()) and bool(whole[:60].isfinite().all())
    assert made(x[:0]).shape == (0, 200)


@pytest.mark.parametrize(("family", "longer", "kernel"), [
    pytest.param("llama", 0, True, marks=needs_kernels), pytest.param("gpt2", 0, True, marks=needs_kernels),
    pytest.param("llama", kernels.LONGEST, True, marks=needs_kernels), ("llama", 0, False), ("gpt2", 0, False),
])  # fmt: skip
def test_the_last_layer_of_the_nodes_that_are_read(family: str, longer: int, kernel: bool) -> None:
    """Among the texts are two that are equal, one that another begins with, and one whose last layer another role reads too."""
    model = exact_and_half(family)[kernel]
    long = Example((3, 4, 5), tuple(range(6, 20 + longer)))
    batch = collate([*texts(), long, long, replace(long, response=long.response[:7])])
    rows, found = torch.arange(len(batch.ids)), []
    for whole in (True, False):
        role = Role(model, adapters(model), trained=("policy",), depth=3)
        states = (
            model.final_norm(role.nodes(batch)[0])[batch.tree.nodes[rows, batch.lengths - 1]] if whole else role.pooled(batch)
        )
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        found.append((states.detach(), *(p.grad for p in role.parameters())))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0 if kernel else 1e-5)
    assert torch.equal(found[1][0][-3], found[1][0][-2])
    for one, other in zip(*(part[1:] for part in found), strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4 * float(one.abs().max()))


def test_nodes_that_are_read_where_no_layer_runs() -> None:
    exact, _ = exact_and_half("llama")
    batch = collate(texts())
    state, read = exact.embed_tree(batch.ids, batch.tree), torch.tensor([0, 2])
    assert torch.equal(exact.blocks(state, 2, 2, tree=batch.tree, only=read), state[:, read])


@needs_kernels
@pytest.mark.parametrize(("rows", "ranks"), [(1, 1), (7, 8), (300, 19)])
def test_gradients_of_the_factors_sum_over_rows_in_fp32(rows: int, ranks: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    low, x = torch.randn(rows, ranks, generator=generator), torch.randn(rows, 96, generator=generator).bfloat16()
    trained = [r % 3 < 2 for r in range(ranks)]  # the others have no columns, and their rows are left as they are
    ends = torch.tensor([[0] * ranks, [96 * is_trained for is_trained in trained]], dtype=torch.int32)
    pairs, found = torch.empty(-(-rows // 2), ranks, dtype=torch.int32), torch.empty(ranks, 96)
    call("punster_outer", low, x, c.c_long(rows), 96, ranks, ends[0], ends[1], pairs, found)
    want = low.bfloat16().double().T @ x.double()
    torch.testing.assert_close(found[trained].double(), want[trained], rtol=1e-5, atol=1e-5 * rows**0.5)


@needs_kernels
def test_low_rank_images_are_those_of_a_row_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x, a = torch.randn(11, 160, generator=generator), torch.randn(5, 160, generator=generator)
    ends = torch.tensor([[0, 0, 32, 48, 48], [160, 160, 104, 96, 96]], dtype=torch.int32)
    update, whole = CUpdate(at(a), None, 5, None, None), torch.empty(11, 5)
    kernels.rounded(x, update, ends, whole)
    want = torch.stack([x[:, begin:end] @ a[r, begin:end] for r, (begin, end) in enumerate(ends.T.tolist())], 1)
    torch.testing.assert_close(whole, want, rtol=1e-5, atol=1e-5)
    for first, last in ((0, 1), (3, 6), (3, 8), (9, 11)):
        part = torch.empty(last - first, 5)
        assert torch.equal(kernels.rounded(x[first:last].contiguous(), update, ends, part), x[first:last].bfloat16())
        assert torch.equal(part, whole[first:last])


@needs_kernels
def test_layers_that_are_trained_mix_with_layers_of_the_kernels() -> None:
    _, half = exact_and_half("llama")
    copy = half.trainable_copy(2)
    role = Role(copy, trained=())
    assert fused.usable(copy, 1) and not fused.usable(copy, 2)
    out = generate(role, [example.prompt for example in texts()], Decoding(8), 7, seeded(3, "sampling"))
    batch = collate(out.examples)
    logs = logprobs.token_log_probs(role.response_hidden(batch), copy.head, batch.targets())
    assert float((logs.detach() - torch.cat(out.log_probs)).abs().mean()) < 1e-3
    logs.sum().backward()
    grads = {name: t.grad for name, t in copy.weights.items() if t.requires_grad}
    assert grads and all(grad is not None and grad.abs().sum() > 0 for name, grad in grads.items() if "layers.2" in name)


@needs_kernels
def test_low_rank_updates_reach_their_own_columns_only() -> None:
    _, half = exact_and_half("llama")
    places, both = half.projection(1, "attend"), adapters(half)
    low = LowRank.of(places, both)
    assert low.a is not None and low.b is not None and low.ranks == 3 * (3 + 8)
    for ranks, columns, adapter, site in low.parts:
        assert torch.equal(low.b[ranks, columns], adapter.b[site].detach().T * adapter.scale)
    assert int((low.b != 0).sum()) == sum(adapter.b[site].numel() for _, _, adapter, site in low.parts)


def run(script: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


ASK = "from punster.model import kernels; print(kernels.compiled())"


def test_a_word_that_switches_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNSTER_KERNELS", "off")
    with pytest.raises(UserError, match="PUNSTER_KERNELS is 'off'; it must be 0"):
        kernels.compiled.__wrapped__()


def test_they_can_be_switched_off() -> None:
    assert run(ASK, PUNSTER_KERNELS="0").strip() == "None"


def test_where_the_cpu_has_no_bf16_its_matrices_are_multiplied_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights that the kernels do not take."""
    monkeypatch.setattr(product, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(product, "suits", lambda weight: False)
    w, bias, x = torch.randn(50, 40).bfloat16(), torch.randn(50).bfloat16(), torch.randn(7, 40)
    matrix = product.Matrix(w, bias)
    assert torch.equal(matrix(x), torch.nn.functional.linear(x, w.float(), bias.float()))
    assert torch.equal(matrix.pull_back(matrix(x)), matrix(x) @ w.float())
    head = product.LogitHead(w)
    assert torch.equal(head.pull_back(matrix(x)), matrix(x) @ w.float())


@needs_halves
def test_what_avx2_can_does_as_well(tmp_path: Path) -> None:
    """This file once more, with the kernels that CPUs without AVX-512 have."""
    ask = "from punster.model import kernels; print(kernels.compiled() is not None, kernels.in_halves())"
    assert run(ask, PUNSTER_KERNELS="avx2").strip() == "True False"
    once_more(tmp_path, "not test_what_avx", PUNSTER_KERNELS="avx2")


@pytest.mark.slow
@pytest.mark.skipif(kernels.compiled() is None or kernels.in_halves(), reason="they run as they are, or there is no C compiler")
def test_what_avx512_does_is_tested_without_it_too(tmp_path: Path) -> None:
    """This file once more, with the kernels for larger CPUs, whose instructions emulated.h does in plain C."""
    compiler, header = tmp_path / "cc", Path(__file__).with_name("emulated.h")
    own = shutil.which(os.environ.get("CC", "gcc")) or "cc"
    compiler.write_text(f'#!/bin/sh\nexec {own} -Wno-psabi -include "{header}" "$@" -O1\n')  # -O3 takes minutes
    compiler.chmod(0o755)
    environment = {"CC": str(compiler), "PUNSTER_CACHE": str(tmp_path / "cache"), "PUNSTER_KERNELS": ""}
    ask = "from punster.model import kernels; print(kernels.compiled() is not None, kernels.in_halves())"
    assert run(ask, **environment).strip() == "True True"
    once_more(tmp_path, "not test_what_avx and not built", **environment)  # building it again takes half a minute


def once_more(folder: Path, which: str, **environment: str) -> None:
    """The tests of this file in another process, but for those that do just that."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", which, __file__, f"--basetemp={folder / 'inner'}"]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-3000:]
    told = re.search(r"(\d+) passed", result.stdout)
    assert told is not None and int(told[1]) > 40, result.stdout[-3000:]


@needs_kernels
def test_a_compiler_that_fails_is_named_and_does_without(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\ncase $1 in --version) echo broken 1.0;; *) echo 'no such target' >&2; exit 1;; esac\n")
    broken.chmod(0o755)
    said = run(ASK, CC=str(broken), PUNSTER_CACHE=str(tmp_path / "cache"))
    assert "None" in said and "no such target" in said and not list((tmp_path / "cache" / "kernels").iterdir())


@needs_kernels
def test_built_once(tmp_path: Path) -> None:
    for _ in range(2):
        assert "CDLL" in run(ASK, PUNSTER_CACHE=str(tmp_path))
    (library,) = (tmp_path / "kernels").iterdir()
    whole = library.read_bytes()
    for size in (0, 100, 20_000, len(whole) - 1):  # cut off; what is mapped beyond a file's end is a bus error
        library.write_bytes(whole[:size])
        said = run(ASK, PUNSTER_CACHE=str(tmp_path))
        assert "CDLL" in said and "could not be used" not in said, size
        assert list((tmp_path / "kernels").iterdir()) == [library] and library.stat().st_size >= len(whole)
