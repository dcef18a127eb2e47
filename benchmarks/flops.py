"""Floating-point operations of decoding, counted by formula, and the machine's measured matrix peak.

A matrix product of a vector with an (out, in) matrix counts 2 * out * in. For one token at context length c, and layers of
linear sites S with LoRA of rank r, H heads of size h:

    block(c) = layers * ( sum over S of 2 out in  +  sum over S of 2 r (out + in)  +  4 H h c )

(4 H h c: the scores and the weighted sum of attention; norms, activations, softmax and sampling count as nothing.) A rollout of
R new tokens runs each distinct prompt prefix once, and every new token but the last; the head, 2 V d, runs once for each new
token. Prompt tokens that several rows share are counted once, because they are computed once: the share is of work that was done.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What the formula needs to know of a model."""

    layers: int
    sites: tuple[tuple[int, int], ...]  # (out, in) of the linear sites of one layer
    heads: int
    head_size: int
    width: int
    vocabulary: int
    rank: int = 0

    def block(self, context: int) -> int:
        """FLOPs of all layers for one token that looks at `context` tokens (itself included)."""
        dense = sum(2 * out * into for out, into in self.sites)
        low_rank = sum(2 * self.rank * (out + into) for out, into in self.sites)
        return self.layers * (dense + low_rank + 4 * self.heads * self.head_size * context)

    @property
    def head(self) -> int:
        return 2 * self.vocabulary * self.width


def rollout_flops(shape: Shape, prompts: Sequence[Sequence[int]], new: int) -> int:
    """FLOPs of drawing `new` tokens after each prompt, prefill and head included."""
    prefixes = {tuple(prompt[: end + 1]) for prompt in prompts for end in range(len(prompt))}
    prefill = sum(shape.block(len(prefix)) for prefix in prefixes)
    decode = sum(shape.block(len(prompt) + place) for prompt in prompts for place in range(1, new))
    return prefill + decode + len(prompts) * new * shape.head


def matrix_peak(dtype: str, seconds: float = 0.5) -> float:
    """FLOP/s of the fastest shape (median of its runs) of matrix products of 2 to 17 GFLOP: square ones, and this model's."""
    import torch

    kind = getattr(torch, dtype)
    best = 0.0
    for rows, into, out in ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 576, 1536), (2048, 1536, 576), (1024, 576, 8192)):
        a, b = torch.randn(rows, into).to(kind), torch.randn(out, into).to(kind)
        torch.nn.functional.linear(a, b)
        times: list[float] = []
        while sum(times) < seconds:
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * rows * into * out / statistics.median(times))
    return best
