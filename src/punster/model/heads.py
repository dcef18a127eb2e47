"""Scalar heads: a linear read-out of one state, in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class ScalarHead:
    """value = h . weight + bias, for each state h (…, d) -> (…)."""

    weight: Tensor  # (d,)
    bias: Tensor  # ()

    @classmethod
    def create(cls, width: int, generator: torch.Generator, device: torch.device | str = "cpu") -> ScalarHead:
        """N(0, 1/sqrt(d + 1)) and bias 0 (Stiennon et al. 2020; Huang et al. 2024)."""
        weight = torch.randn(width, generator=generator) / math.sqrt(width + 1)
        return cls(weight.to(device), torch.zeros((), device=device))

    def __call__(self, state: Tensor) -> Tensor:
        return state.float() @ self.weight + self.bias

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield "head.weight", self.weight
        yield "head.bias", self.bias

    def trainable(self) -> ScalarHead:
        for _, tensor in self.named_parameters():
            tensor.requires_grad_()
        return self

    def scaled(self, gain: float, offset: float) -> ScalarHead:
        """A copy whose output is gain * value + offset."""
        return replace(self, weight=self.weight.detach() * gain, bias=self.bias.detach() * gain + offset)
