"""Scalar heads: a read-out of one state, linear or through a hidden layer, in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class ScalarHead:
    """value = h . weight + bias, for each state h (…, d) -> (…); with a hidden layer h is first GELU(U standardised(h) + u)."""

    weight: Tensor  # (d,), of a hidden layer (units,)
    bias: Tensor  # ()
    hidden: Tensor | None = None  # (units, d + 1): U, and u as the last column
    scale: Tensor | None = None  # (2, d): mean and inverse deviation of the states that a hidden layer reads; not trained

    @classmethod
    def create(cls, width: int, generator: torch.Generator, device: torch.device | str = "cpu") -> ScalarHead:
        """N(0, 1/sqrt(d + 1)) and bias 0 (Stiennon et al. 2020; Huang et al. 2024)."""
        weight = torch.randn(width, generator=generator) / math.sqrt(width + 1)
        return cls(weight.to(device), torch.zeros((), device=device))

    @classmethod
    def with_hidden(cls, width: int, units: int, generator: torch.Generator, device: torch.device | str = "cpu") -> ScalarHead:
        """Both layers are drawn as a linear head is, at half the size; `standardise` must follow."""
        head = cls.create(units, generator, device).scaled(0.5, 0.0)
        drawn = torch.randn(units, width + 1, generator=generator) / math.sqrt(width + 1) / 2
        return replace(head, hidden=drawn.to(device), scale=torch.ones(2, width, device=device))

    def standardise(self, states: Tensor) -> None:
        """Fix the scale by these (n, d) states."""
        assert self.scale is not None
        self.scale.copy_(torch.stack((states.mean(0), 1 / (states.std(0) + 1e-3))))

    def __call__(self, state: Tensor, thinned: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """thinned: dropout in training, of what a hidden layer reads and of what it gives."""
        state = state.float()
        if self.hidden is not None and self.scale is not None:
            state = thinned((state - self.scale[0]) * self.scale[1])
            state = thinned(F.gelu(F.linear(state, self.hidden[:, :-1], self.hidden[:, -1])))
        return state @ self.weight + self.bias

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield "head.weight", self.weight
        yield "head.bias", self.bias
        if self.hidden is not None:
            yield "head.hidden", self.hidden

    def trainable(self, on: bool = True) -> ScalarHead:
        for _, tensor in self.named_parameters():
            tensor.requires_grad_(on)
        return self

    def scaled(self, gain: float, offset: float) -> ScalarHead:
        """A copy whose output is gain * value + offset."""
        return replace(self, weight=self.weight.detach() * gain, bias=self.bias.detach() * gain + offset)
