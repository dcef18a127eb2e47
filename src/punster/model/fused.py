"""One block in three differentiable steps on the kernels: into attention, out of it, and the feed-forward part.

The same function as the plain block of transformer.py, with products of bf16 inputs summed in fp32. Gradients are formed by hand:
pulled back through the frozen products in bf16, as the plain path does; those of A and B are fp32 sums over bf16 rows.
n rows (tokens, or nodes of a prefix tree), d width, R ranks.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from punster.model import kernels
from punster.model.kernels import ACTIVATIONS, SILU, CNorm, CTree, LowRank, Packed, at, call, empty_low, rounded
from punster.model.lora import Adapter

if TYPE_CHECKING:
    from punster.data.batch import PrefixTree
    from punster.model.transformer import Attention, Decoder

LONGEST = 256  # tokens of a path that the kernels attend to
Rope = tuple[Tensor, Tensor]  # cosines and sines, (n, h / 2) each


class Heads(NamedTuple):
    """H, K and h."""

    queries: int
    keys: int
    size: int


class Norm:
    """Weights of a norm as the kernels read them."""

    def __init__(self, model: Decoder, name: str):
        self.weight = model.weights[name + ".weight"].detach().float()
        self.bias = model.weights[name + ".bias"].detach().float() if name + ".bias" in model.weights else None
        self.struct = CNorm(at(self.weight), at(self.bias), model.config.norm_eps)

    def __call__(self, x: Tensor, low: LowRank) -> tuple[Tensor, Tensor, Tensor]:
        """(n, d) fp32 -> the normed rows in bf16, their low-rank images, mean and inverse deviation (n, 2)."""
        y, lows, stat = torch.empty(x.shape, dtype=torch.bfloat16), empty_low(len(x), low), torch.empty(len(x), 2)
        call("punster_norm", x, c.c_long(len(x)), x.shape[1], c.byref(self.struct), c.byref(low.forward()), y, lows, stat)
        return y, lows, stat

    def add_gradient(self, dy: Tensor, x: Tensor, stat: Tensor, dx: Tensor) -> Tensor:
        """dx += the gradient of the norm's input."""
        call("punster_norm_back", dy, x, stat, c.c_long(len(x)), x.shape[1], c.byref(self.struct), dx)
        return dx


class Step:
    """One product of a block with its low-rank updates."""

    def __init__(self, model: Decoder, layer: int, which: str, adapters: Sequence[Adapter]):
        places = model.projection(layer, which)
        self.matrix = model.matrix(tuple(site for site, _ in places))
        self.low = LowRank.of(places, adapters)

    @property
    def forward(self) -> Packed:
        return self.matrix.packed

    def factors(self) -> list[Tensor]:
        return [tensor for _, _, adapter, site in self.low.parts for tensor in (adapter.a[site], adapter.b[site])]

    def pull_back(self, dy: Tensor, pulled: Tensor) -> Tensor:
        """dy (n, out) bf16 and its low-rank image -> (n, in) fp32."""
        update, alive = self.low.backward()
        result = self.matrix.packed_back(dy, pulled, update)
        del alive
        return result

    def rounded_gradient(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        """dy (n, out) fp32 -> bf16, and pulled = dy b^T."""
        pulled = empty_low(len(dy), self.low)
        update = kernels.CUpdate(at(self.low.b), None, self.low.ranks, None, None)
        return rounded(dy, update, self.low.ends, pulled), pulled


class _AttendIn(torch.autograd.Function):
    """x (n, d) -> norm, q, k, v with rotary embedding: (n, (H + 2K) h); of a prefix tree's nodes what attention finds: (n, H h)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Norm, step: Step, rope: Rope | None, heads: Heads, tree: Paths | None, *factors: Tensor
    ) -> Tensor:
        normed, low, stat = norm(x, step.low)
        qkv = step.forward(normed, low, step.low.forward())
        turn(qkv, rope, heads, 1.0)
        found, total = (qkv, torch.empty(0)) if tree is None else tree.attend(qkv, heads)
        ctx.save_for_backward(x, normed, low, stat, *((qkv, total) if tree is not None else ()))
        ctx.rest = norm, step, rope, heads, tree
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, low, stat, *attended = ctx.saved_tensors
        norm, step, rope, heads, tree = ctx.rest
        if tree is not None:
            gradient = tree.pull_back(*attended, gradient.contiguous(), heads)
        else:
            gradient = gradient.contiguous() if rope is None else gradient.clone(memory_format=torch.contiguous_format)
        turn(gradient, rope, heads, -1.0)
        dy, pulled = step.rounded_gradient(gradient)
        grads = step.low.gradients(low, dy, pulled, normed, ctx.needs_input_grad[6:])
        dx = norm.add_gradient(step.pull_back(dy, pulled), x, stat, torch.zeros_like(x)) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, None, *grads


class Paths:
    """Attention of a prefix tree's N nodes, each to its own path from the root."""

    def __init__(self, tree: PrefixTree):
        self.nodes, self.first, self.position = tree.nodes.contiguous(), tree.first, tree.positions[0]
        self.entries = int(self.position.sum()) + len(self.first)

    @classmethod
    def of(cls, seen: Attention) -> Paths | None:
        """Where paths are short: for long ones PyTorch's blocks of rows are faster."""
        if seen.tree is None or seen.tree.nodes.shape[1] > LONGEST:
            return None
        if seen.tree.paths is None:
            seen.tree.paths = cls(seen.tree)
        return seen.tree.paths

    def struct(self, heads: Heads) -> CTree:
        return CTree(heads.queries, heads.keys, heads.size, len(self.first), at(self.nodes), at(self.first), at(self.position))

    @cached_property
    def readers(self) -> tuple[Tensor, ...]:
        """For every key who reads it; see punster_readers."""
        count = len(self.first)
        made = tuple(torch.empty(size, dtype=torch.long) for size in (count + 1, count + 1, self.entries, self.entries))
        call("punster_readers", c.byref(self.struct(Heads(1, 1, 1))), *made)
        return made

    def attend(self, qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
        """(N, (H + 2K) h) -> what is found (N, H h), logs of the partition sums (N, H)."""
        found, total = torch.empty(len(qkv), heads.queries * heads.size), torch.empty(len(qkv), heads.queries)
        call("punster_attend", c.byref(self.struct(heads)), qkv, found, total)
        return found, total

    def pull_back(self, qkv: Tensor, total: Tensor, gradient: Tensor, heads: Heads) -> Tensor:
        share, slope = torch.empty(2, self.entries * heads.queries)
        result = torch.empty_like(qkv)
        call("punster_attend_back", c.byref(self.struct(heads)), *self.readers, qkv, total, gradient, share, slope, result)
        return result


def turn(qkv: Tensor, rope: Rope | None, heads: Heads, sign: float) -> None:
    if rope is not None:
        all_heads, turned = heads.queries + 2 * heads.keys, heads.queries + heads.keys
        call("punster_rope", qkv, c.c_long(len(qkv)), all_heads, turned, heads.size, *rope, c.c_float(sign))


class _AddOut(torch.autograd.Function):
    """x (n, d) + the output product of what attention found (n, H h)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: Tensor, step: Step, *factors: Tensor) -> Tensor:
        low = empty_low(len(x), step.low)
        narrow = rounded(found.contiguous(), step.low.forward(), None, low)
        ctx.save_for_backward(narrow, low)
        ctx.step = step
        return step.forward(narrow, low, step.low.forward(), into=x.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        narrow, low = ctx.saved_tensors
        dy, pulled = ctx.step.rounded_gradient(gradient.contiguous())
        grads = ctx.step.low.gradients(low, dy, pulled, narrow, ctx.needs_input_grad[3:])
        back = ctx.step.pull_back(dy, pulled) if ctx.needs_input_grad[1] else None
        return gradient, back, None, *grads


class _FeedForward(torch.autograd.Function):
    """x (n, d) + down(act(up(norm(x)))); what lies between the products is kept in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, up: Step, down: Step, act: int, *factors: Tensor) -> Tensor:
        normed, low_up, stat = norm(x, up.low)
        y = up.forward(normed, low_up, up.low.forward(), half=True)
        width = y.shape[1] // (2 if act == SILU else 1)
        h, low_down = torch.empty(len(x), width, dtype=torch.bfloat16), empty_low(len(x), down.low)
        call("punster_act", y, c.c_long(len(x)), width, act, c.byref(down.low.forward()), h, low_down)
        ctx.save_for_backward(x, normed, low_up, stat, y, h, low_down)
        ctx.rest = norm, up, down, act
        return down.forward(h, low_down, down.low.forward(), into=x.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, low_up, stat, y, h, low_down = ctx.saved_tensors
        norm, up, down, act = ctx.rest
        middle = 5 + len(up.factors())
        gradient = gradient.contiguous()
        dz, pulled = down.rounded_gradient(gradient)
        of_down = down.low.gradients(low_down, dz, pulled, h, ctx.needs_input_grad[middle:])
        dh = down.pull_back(dz, pulled)
        dy, pulled = torch.empty_like(y), empty_low(len(x), up.low)
        call("punster_act_back", dh, y, c.c_long(len(x)), h.shape[1], act, c.byref(up.low.forward()), dy, pulled)
        of_up = up.low.gradients(low_up, dy, pulled, normed, ctx.needs_input_grad[5:middle])
        dx = norm.add_gradient(up.pull_back(dy, pulled), x, stat, gradient.clone()) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, *of_up, *of_down


def usable(model: Decoder, layer: int) -> bool:
    """Whether the block's own weights are frozen bf16 matrices that the kernels can take."""
    config, prefix = model.config, model.config.block_prefix(layer)
    if (config.family, config.activation) not in ACTIVATIONS or config.d_head % 32:
        return False
    norms = [model.weights[prefix + name + ".weight"] for name in config.norm_sites]
    sites = config.sites(layer)
    if any(norm.requires_grad for norm in norms) or any(out % 32 or into % 32 for out, into in sites.values()):
        return False
    return all(kernels.suits(model.weights[site + ".weight"]) for site in sites)


def rope_rows(cos: Tensor, turned: Tensor, shape: torch.Size) -> Rope:
    """What `Decoder.turn` gives, one row a token of (B, T, d)."""
    half = cos.shape[-1]
    cosines, sines = (
        part.expand(*shape[:-1], half).reshape(-1, half).contiguous() for part in (cos[..., 0, 0, :], turned[..., 0, 1, :])
    )
    return cosines, sines


def block(model: Decoder, x: Tensor, layer: int, adapters: Sequence[Adapter], rope: Rope | None, seen: Attention) -> Tensor:
    """(B, T, d) -> (B, T, d), or with a tree (1, N, d)."""
    config, prefix = model.config, model.config.block_prefix(layer)
    before, between = (Norm(model, prefix + name) for name in config.norm_sites)
    attend, out, up, down = (Step(model, layer, which, adapters) for which in ("attend", "out", "up", "down"))
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    heads, paths = Heads(config.n_head, config.n_kv_head, config.d_head), Paths.of(seen)
    found: Tensor = _AttendIn.apply(flat, before, attend, rope, heads, None if seen.cache else paths, *attend.factors())
    if paths is None:
        found = model._attend(found.view(*x.shape[:-1], -1, config.d_head), layer, seen)
    elif seen.cache is not None and seen.tree is not None:
        keys, values = (
            seen.tree.spread(found.view(*x.shape[:-1], -1, config.d_head)[:, :, config.n_head :]).transpose(1, 2).chunk(2, 1)
        )
        seen.cache.append(layer, keys, values)
        found, _ = paths.attend(found, heads)
    flat = _AddOut.apply(flat, found.reshape(-1, found.shape[-1]), out, *out.factors())
    act = ACTIVATIONS[config.family, config.activation]
    result: Tensor = _FeedForward.apply(flat, between, up, down, act, *up.factors(), *down.factors())
    return result.view(x.shape)
