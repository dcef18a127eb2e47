"""One decoding step for many rows: fused and reordered frozen weights, adapters beside them, attention over a static cache.

The numbers are those of `Decoder.blocks`: products in the type of the base, everything else in fp32.
B rows, d width, H heads, K key-value heads, g = H / K, h head size, S keys so far.
"""

from __future__ import annotations

import ctypes as c
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from punster.model import fused, kernels
from punster.model.kernels import CDecode, CLayer, LowRank, at
from punster.model.lora import Adapter
from punster.model.product import Matrix
from punster.model.recording import Recording
from punster.model.transformer import Decoder, KeyValueCache, activate, norm, rotated


@dataclass
class Product:
    """Linear layers that read the same input as one product, their low-rank updates beside it."""

    matrix: Matrix
    low: LowRank

    def __call__(self, x: Tensor) -> Tensor:
        """(B, in) fp32 -> (B, out) fp32."""
        return self.low.add_to(self.matrix(x).float(), x)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """total (B, out) += the product of x (B, in)."""
        self.low.add_to(total.add_(self.matrix(x)), x)


class Stepper:
    """A network with its adapters, ready for decoding: each block for the kernels where they can take it, else as products."""

    def __init__(self, model: Decoder, adapters: Sequence[Adapter], layers: int):
        self.model = model
        self.stages: list[list[Product] | None] = [None] * layers  # of each other layer its products, in the order of the steps
        self.steps: list[list[fused.Step]] = []  # of each layer that the kernels take
        self.layers = (CLayer * layers)()
        self.alive: list[list[fused.Norm]] = []  # the norms, which with `steps` are what the addresses in `layers` point to
        self.ranks = 0  # most ranks of one product
        for layer in range(layers):
            if not fused.usable(model, layer):
                self.stages[layer] = [product_of(model, layer, which, adapters) for which in model.config.steps]
                continue
            norms = [fused.Norm(model, model.config.block_prefix(layer) + name) for name in model.config.norm_sites]
            steps = [fused.Step(model, layer, which, adapters) for which in model.config.steps]
            products = [step.matrix.packed.product(step.low.forward()) for step in steps]
            self.layers[layer] = CLayer(*(norm.struct for norm in norms), *products)
            self.alive.append(norms)
            self.steps.append(steps)
            self.ranks = max(self.ranks, *(step.low.ranks for step in steps))

    def run(
        self, x: Tensor, first: int, last: int, stream: Stream, turn: tuple[Tensor, Tensor] | None, record: Recording | None
    ) -> None:
        """The kernels' layers first..last-1 on x (B, d) fp32, in place; turn as `Decoder.turn` makes it."""
        config, cache, rows = self.model.config, stream.cache, len(x)
        inner, heads = config.n_head * config.d_head, config.n_head + 2 * config.n_kv_head
        act = kernels.ACTIVATIONS[config.family, config.activation]
        wide = config.d_ff * (2 if act == kernels.SILU else 1)
        # fmt: off
        scratch = [
            torch.empty(rows, heads * config.d_head), torch.empty(rows, inner), torch.empty(rows, max(1, self.ranks)),
            torch.empty(rows, max(config.d_model, config.d_ff, inner), dtype=torch.bfloat16),
            torch.empty(rows, wide, dtype=torch.bfloat16),
            kernels.room_for(rows, max(config.d_model, config.d_ff, inner)),
        ]
        rope = (None, None) if turn is None else fused.rope_rows(*turn, x.shape)
        keys, values = ((c.c_void_p * len(side))(*(t.data_ptr() for t in side)) for side in (cache.keys, cache.values))
        kept = None if record is None else record.structs
        task = CDecode(
            config.d_model, config.n_head, config.n_kv_head, config.d_head, config.d_ff, act, cache.capacity, rows, cache.length,
            at(stream.starts), *map(at, rope), c.addressof(keys), c.addressof(values), at(x), *map(at, scratch),
            None if kept is None else c.addressof(kept), 0 if record is None else record.count,
        )
        # fmt: on
        kernels.call("punster_decode", c.byref(task), self.layers, first, last)


@dataclass
class Stream:
    """Rows in flight."""

    cache: KeyValueCache
    positions: Tensor  # (B,) of the token to be fed next
    starts: Tensor | None  # (B,) the first real key behind left padding; None where no row is padded

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given rows."""
        self.cache.select(rows)
        self.positions = self.positions[rows]
        self.starts = None if self.starts is None else self.starts[rows]


def product_of(model: Decoder, layer: int, which: str, adapters: Sequence[Adapter]) -> Product:
    places = model.projection(layer, which)
    sites = tuple(site for site, _ in places)
    if any(model.weights[site + ".weight"].requires_grad for site in sites):  # trained: today's values
        biases = [model.weights[site + ".bias"].detach() for site in sites if site + ".bias" in model.weights]
        weight = torch.cat([model.weights[site + ".weight"].detach() for site in sites])
        matrix = Matrix(weight, torch.cat(biases) if biases else None)
    else:
        matrix = model.matrix(sites)
    return Product(matrix, LowRank.of(places, adapters))


def decode_one_token(
    stepper: Stepper, token: Tensor, stream: Stream, keep: dict[int, Tensor] | None = None, record: Recording | None = None
) -> Tensor:
    """Feed one token (B,) per row; logits (B, V) of the next one. The states (B, d) before the layers in `keep` are put there.

    A record takes what gradients need; its rows are appended by the caller, who knows whose they are.
    """
    model, config = stepper.model, stepper.model.config
    x = model.embed(token[:, None], stream.positions[:, None])[:, 0]
    turn = model.turn(stream.positions) if config.family == "llama" else None
    done, total = 0, len(stepper.stages)
    for layer, stage in enumerate(stepper.stages):
        if keep is not None and layer in keep:
            keep[layer] = x.clone()
        if stage is None:
            following = layer + 1
            if following == total or stepper.stages[following] is not None or (keep is not None and following in keep):
                stepper.run(x, done, following, stream, turn, record)
                done = following
            continue
        done = layer + 1
        before, between = (config.block_prefix(layer) + name for name in config.norm_sites)
        into, out, up, down = stage
        qkv = into(norm(model, x, before))
        out.add_to(x, attend(config.n_head, config.n_kv_head, qkv, turn, layer, stream))
        y = up(norm(model, x, between))
        if config.family == "llama":
            gate, wide = y.chunk(2, -1)
            y = activate(gate, config.activation).mul_(wide)
        else:
            y = activate(y, config.activation)
        down.add_to(x, y)
    if record is not None:
        record.last[record.count : record.count + len(x)] = x
    stream.cache.length += 1
    stream.positions = stream.positions + 1
    return model.logits(model.final_norm(x))


def attend(heads: int, kv_heads: int, qkv: Tensor, turn: tuple[Tensor, Tensor] | None, layer: int, stream: Stream) -> Tensor:
    """(B, (H + 2K) h) -> (B, H h): the new key and value go into the cache; keys are not expanded for grouped queries."""
    rows, cache = qkv.shape[0], stream.cache
    size = qkv.shape[1] // (heads + 2 * kv_heads)
    qk, v = qkv.view(rows, heads + 2 * kv_heads, size).split((heads + kv_heads, kv_heads), 1)
    if turn is not None:
        qk = rotated(qk, *turn)
    keys, values = cache.append(layer, qk[:, heads:, None], v[:, :, None])
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)  # (B K, S, h), views of the cache
    queries = qk[:, :heads].reshape(rows * kv_heads, heads // kv_heads, size)
    scale = 1 / math.sqrt(size)
    if stream.starts is None:
        scores = torch.baddbmm(queries.new_zeros(1, 1, 1), queries, keys.transpose(1, 2), beta=0, alpha=scale)
    else:
        padded = torch.arange(keys.shape[1], device=keys.device) < stream.starts[:, None]
        bias = torch.where(padded, -1e30, 0.0).repeat_interleave(kv_heads, 0)
        scores = torch.baddbmm(bias[:, None], queries, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values).view(rows, heads * size)
