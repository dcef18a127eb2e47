"""One block in two differentiable steps on the kernels: attention, and the feed-forward part.

The same function as the plain block of transformer.py, with products of bf16 inputs summed in fp32. Gradients are formed by hand:
pulled back through the frozen products in bf16, as the plain path does; those of A and B are fp32 sums of products of bf16.
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

from punster.data.batch import PrefixTree
from punster.model import kernels
from punster.model.kernels import (
    ACTIVATIONS,
    LONGEST,
    SIDE,
    SILU,
    CNorm,
    CRuns,
    CTree,
    LowRank,
    at,
    call,
    empty_low,
    rounded,
)
from punster.model.lora import Adapter

if TYPE_CHECKING:
    from punster.model.recording import Recording
    from punster.model.transformer import Decoder, KeyValueCache

QKV = 4  # place in what attention saves
Rope = tuple[Tensor, Tensor]  # cosines and sines, (n, h / 2) each
Saved = tuple[Tensor, ...]


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

    def gradient(self, dy: Tensor, x: Tensor, stat: Tensor, base: Tensor) -> Tensor:
        """base + the gradient of the norm's input."""
        dx = torch.empty_like(x)
        call("punster_norm_back", dy, x, stat, c.c_long(len(x)), x.shape[1], c.byref(self.struct), base, dx)
        return dx


class Step:
    """One product of a block with its low-rank updates."""

    def __init__(self, model: Decoder, layer: int, which: str, adapters: Sequence[Adapter]):
        places = model.projection(layer, which)
        self.matrix = model.matrix(tuple(site for site, _ in places))
        self.low = LowRank.of(places, adapters)
        # Not the product into attention: its normed inputs have outlying channels, which made most of the error (docs/PERFORMANCE.md).
        self.coarse, self.coarse_back = model.coarse and which != "attend", model.coarse

    def __call__(self, x: Tensor, low: Tensor, base: Tensor | None = None, half: bool = False) -> Tensor:
        """x (n, in) bf16 and its low-rank image -> (n, out); base and half as `Packed` takes them."""
        product = self.matrix.quantised if self.coarse else self.matrix.packed
        return product(x, low, self.low.forward(), base, half)

    def factors(self) -> list[Tensor]:
        return [tensor for _, _, adapter, site in self.low.parts for tensor in (adapter.a[site], adapter.b[site])]

    def pull_back(self, dy: Tensor, pulled: Tensor) -> Tensor:
        """dy (n, out) bf16 and its low-rank image -> (n, in) fp32."""
        update, _alive = self.low.backward()
        product = self.matrix.quantised_back if self.coarse_back else self.matrix.packed_back
        return product(dy, pulled, update)

    def rounded_gradient(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        """dy (n, out) fp32 -> bf16, and pulled = dy b^T."""
        pulled = empty_low(len(dy), self.low)
        update = kernels.CUpdate(at(self.low.b), None, self.low.ranks, None, None)
        return rounded(dy, update, self.low.ends, pulled), pulled


def attention(
    x: Tensor, norm: Norm, into: Step, out: Step, rope: Rope | None, heads: Heads, paths: Paths, only: Tensor | None = None
) -> tuple[Saved, Tensor]:
    """x (N, d) + out(attention(norm(x))) of a prefix tree's nodes, or of `only` these, with rotary embedding."""
    normed, low_in, stat = norm(x, into.low)
    qkv = into(normed, low_in)  # (N, (H + 2K) h)
    turn(qkv, rope, heads, 1.0)
    found, total = paths.attend(qkv, heads)
    base, found = (x, found) if only is None else (x[only], found[only])
    low_out = empty_low(len(base), out.low)
    narrow = rounded(found, out.low.forward(), None, low_out)
    return (x, normed, low_in, stat, qkv, total, narrow, low_out), out(narrow, low_out, base=base)


class _Attention(torch.autograd.Function):
    """`attention`, or what a recording has of it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Norm, into: Step, out: Step, rope: Rope | None, heads: Heads, paths: Paths,
        only: Tensor | None, recorded: tuple[Saved, Tensor] | None, *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        saved, y = attention(x, norm, into, out, rope, heads, paths, only) if recorded is None else recorded
        ctx.save_for_backward(*saved)
        ctx.rest = norm, into, out, rope, heads, paths, only
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, low_in, stat, qkv, total, narrow, low_out = ctx.saved_tensors
        norm, into, out, rope, heads, paths, only = ctx.rest
        middle = 9 + len(into.factors())
        whole = lambda rows: rows if only is None else rows.new_zeros(len(x), rows.shape[1]).index_copy_(0, only, rows)
        gradient = gradient.contiguous()
        dy, pulled = out.rounded_gradient(gradient)
        found = out.pull_back(dy, pulled)
        of_out = out.low.gradients(low_out, dy, pulled, narrow, ctx.needs_input_grad[middle:])
        dqkv = paths.pull_back(qkv, whole(narrow), total, whole(found), heads)
        turn(dqkv, rope, heads, -1.0)
        dy, pulled = into.rounded_gradient(dqkv)
        dx = norm.gradient(into.pull_back(dy, pulled), x, stat, whole(gradient)) if ctx.needs_input_grad[0] else None
        of_in = into.low.gradients(low_in, dy, pulled, normed, ctx.needs_input_grad[9:middle])
        return dx, None, None, None, None, None, None, None, None, *of_in, *of_out


class Paths:
    """Attention of a prefix tree's N nodes, each to its own path from the root.

    Short paths: one query at a time, in fp32, with the very numbers of decoding. Long ones: in blocks of rows rounded to bf16.
    """

    def __init__(self, tree: PrefixTree):
        self.nodes, self.first, self.position = tree.nodes.contiguous(), tree.first, tree.positions[0]
        self.entries = int(self.position.sum()) + len(self.first)
        self.long = self.nodes.shape[1] > LONGEST

    @classmethod
    def of(cls, tree: PrefixTree) -> Paths:
        found = tree.paths
        if found is None:
            found = tree.paths = cls(tree)
        return found

    def struct(self, heads: Heads) -> CTree:
        return CTree(*heads, len(self.first), at(self.nodes), at(self.first), at(self.position))

    @cached_property
    def readers(self) -> tuple[Tensor, ...]:
        """For every key who reads it; see punster_readers."""
        count = len(self.first)
        made = tuple(torch.empty(size, dtype=torch.long) for size in (count + 1, count + 1, self.entries, self.entries))
        call("punster_readers", c.byref(self.struct(Heads(1, 1, 1))), *made)
        return made

    @cached_property
    def runs(self) -> tuple[Tensor, ...]:
        """What each row adds to the tree, see blocked.h: start, from, end and at of every run, and their padded length together."""
        rows, which = torch.unique(self.first // self.nodes.shape[1], return_inverse=True)
        lowest, highest = torch.full((2, len(rows)), self.nodes.shape[1])
        lowest = lowest.scatter_reduce(0, which, self.position, "amin")
        highest = highest.scatter_reduce(0, which, self.position, "amax", include_self=False) + 1
        start = torch.empty_like(rows).scatter(0, which, self.first - self.position)
        padded = (highest + SIDE - 1) // SIDE * SIDE
        return start, lowest, highest, padded.cumsum(0) - padded, padded.sum()

    def blocks(self, heads: Heads) -> tuple[CRuns, Tensor]:
        """The runs, and room for their packed keys and values."""
        *places, padded = self.runs
        packed = torch.empty(4 * heads.keys * int(padded) * heads.size, dtype=torch.bfloat16)
        return CRuns(*heads, len(places[0]), int(padded), at(self.nodes), *map(at, places)), packed

    def attend(self, qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
        """(N, (H + 2K) h) -> what is found (N, H h), logs of the partition sums (N, H)."""
        found, total = torch.empty(len(qkv), heads.queries * heads.size), torch.empty(len(qkv), heads.queries)
        if self.long:
            runs, packed = self.blocks(heads)
            call("punster_attend_runs", c.byref(runs), qkv, packed, found, total)
        else:
            call("punster_attend", c.byref(self.struct(heads)), qkv, found, total)
        return found, total

    def pull_back(self, qkv: Tensor, found: Tensor, total: Tensor, gradient: Tensor, heads: Heads) -> Tensor:
        """The gradient of qkv from that of what was found (N, H h); `found` itself in bf16."""
        result = torch.empty_like(qkv)
        if self.long:
            runs, packed = self.blocks(heads)
            sums = torch.empty(heads.queries * 2 * int(self.runs[-1]) * heads.size)
            call("punster_attend_runs_back", c.byref(runs), qkv, packed, found, total, gradient, sums, result, c.c_long(len(qkv)))
        else:
            share, slope = torch.empty(2, self.entries * heads.queries)
            call("punster_attend_back", c.byref(self.struct(heads)), *self.readers, qkv, total, gradient, share, slope, result)
        return result


def turn(qkv: Tensor, rope: Rope | None, heads: Heads, sign: float) -> None:
    """Rotary embedding in place, or with sign -1 its transpose."""
    if rope is not None:
        all_heads, turned = heads.queries + 2 * heads.keys, heads.queries + heads.keys
        call("punster_rope", qkv, c.c_long(len(qkv)), all_heads, turned, heads.size, *rope, c.c_float(sign))


def feed_forward(x: Tensor, norm: Norm, up: Step, down: Step, act: int) -> tuple[Saved, Tensor]:
    """x (n, d) + down(act(up(norm(x)))); what lies between the products is kept in bf16."""
    normed, low_up, stat = norm(x, up.low)
    y = up(normed, low_up, half=True)
    width = y.shape[1] // (2 if act == SILU else 1)
    h, low_down = torch.empty(len(x), width, dtype=torch.bfloat16), empty_low(len(x), down.low)
    call("punster_act", y, c.c_long(len(x)), width, act, c.byref(down.low.forward()), h, low_down)
    result = down(h, low_down, base=x)
    return (x, normed, low_up, stat, y, h, low_down), result


class _FeedForward(torch.autograd.Function):
    """`feed_forward`, or what a recording has of it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Norm, up: Step, down: Step, act: int, recorded: tuple[Saved, Tensor] | None, *factors: Tensor
    ) -> Tensor:
        saved, result = feed_forward(x, norm, up, down, act) if recorded is None else recorded
        ctx.save_for_backward(*saved)
        ctx.rest = norm, up, down, act
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, low_up, stat, y, h, low_down = ctx.saved_tensors
        norm, up, down, act = ctx.rest
        middle = 6 + len(up.factors())
        gradient = gradient.contiguous()
        dz, pulled = down.rounded_gradient(gradient)
        of_down = down.low.gradients(low_down, dz, pulled, h, ctx.needs_input_grad[middle:])
        dh = down.pull_back(dz, pulled)
        dy, pulled = torch.empty_like(y), empty_low(len(x), up.low)
        call("punster_act_back", dh, y, c.c_long(len(x)), h.shape[1], act, c.byref(up.low.forward()), dy, pulled)
        of_up = up.low.gradients(low_up, dy, pulled, normed, ctx.needs_input_grad[6:middle])
        dx = norm.gradient(up.pull_back(dy, pulled), x, stat, gradient) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, None, *of_up, *of_down


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


def quantises(model: Decoder, layer: int) -> bool:
    """Whether the block's products are faster in 8 bits (`Decoder.in_bytes`)."""
    return kernels.in_halves() and usable(model, layer)


def attends(model: Decoder, qkv: Tensor, tree: PrefixTree) -> bool:
    """Whether the kernels look along a tree's paths for weights that they do not multiply by: fp32 scoring, without gradients."""
    fits = model.scoring and qkv.device.type == "cpu" and not qkv.requires_grad and model.config.d_head % 32 == 0
    return fits and kernels.compiled() is not None and not Paths.of(tree).long


def attended(model: Decoder, qkv: Tensor, rope: Rope | None, tree: PrefixTree) -> Tensor:
    """Attention of a tree's nodes, with rotary embedding by what `Decoder.turn` gives: (1, N, (H + 2K) h) fp32 -> (1, N, H h)."""
    heads, rows = Heads(model.config.n_head, model.config.n_kv_head, model.config.d_head), qkv[0].contiguous()
    turn(rows, None if rope is None else rope_rows(*rope, qkv.shape), heads, 1.0)
    return Paths.of(tree).attend(rows, heads)[0][None]


def rope_rows(cos: Tensor, turned: Tensor, shape: torch.Size) -> Rope:
    """What `Decoder.turn` gives, one row a token of (B, T, d)."""
    half = cos.shape[-1]
    cosines, sines = (
        part.expand(*shape[:-1], half).reshape(-1, half).contiguous() for part in (cos[..., 0, 0, :], turned[..., 0, 1, :])
    )
    return cosines, sines


def block(
    model: Decoder, x: Tensor, layer: int, adapters: Sequence[Adapter], rope: Rope | None, tree: PrefixTree,
    cache: KeyValueCache | None, record: Recording | None, only: Tensor | None,
) -> Tensor:  # fmt: skip
    """(1, N, d) states of a tree's nodes -> (1, N, d), or (1, n, d) of `only` these distinct nodes."""
    config, prefix = model.config, model.config.block_prefix(layer)
    before, between = (Norm(model, prefix + name) for name in config.norm_sites)
    attend, out, up, down = (Step(model, layer, which, adapters) for which in config.steps)
    act = ACTIVATIONS[config.family, config.activation]
    flat, paths, heads = x[0].contiguous(), Paths.of(tree), Heads(config.n_head, config.n_kv_head, config.d_head)
    if cache is not None:  # prompts, without gradients
        saved, flat = attention(flat, before, attend, out, rope, heads, paths)
        rows = tree.spread(saved[QKV].view(1, len(flat), -1, config.d_head)[:, :, config.n_head :])
        cache.append(layer, *rows.transpose(1, 2).chunk(2, 1))
        of_rest, result = feed_forward(flat, between, up, down, act)
        if record is not None:
            record.put(layer, (*saved, *of_rest), result)
        return result[None]
    recorded = None if record is None else record.attention(layer)
    flat = _Attention.apply(flat, before, attend, out, rope, heads, paths, only, recorded, *attend.factors(), *out.factors())
    recorded = None if record is None else record.feed_forward(layer)
    last: Tensor = _FeedForward.apply(flat, between, up, down, act, recorded, *up.factors(), *down.factors())
    return last[None]
