"""Products with frozen matrices, and low-rank updates beside them.

Weights are reordered once for the CPU's matrix kernels. PyTorch's operators for that are private, so they are tried out once
and left alone if they fail; plain products take their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from punster.model.kernels import Packed, Quantised, in_halves, suits

if TYPE_CHECKING:
    from punster.model.lora import Adapter


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has products of bf16 in hardware: AVX512_BF16 or AMX."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


def type_of_products(weight: Tensor) -> torch.dtype:
    """In which PyTorch multiplies by a matrix: its own, or fp32 where the CPU has no products of bf16 (a tenth as fast)."""
    slow = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not multiplies_bf16()
    return torch.float32 if slow else weight.dtype


@cache
def can_reorder(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and CPU multiply by reordered weights, and get it right."""
    try:
        x = torch.linspace(-1, 1, 3 * 32).view(3, 32).to(dtype)
        weight = torch.linspace(-1, 1, 48 * 32).view(48, 32).to(dtype)
        bias, error = torch.linspace(0, 1, 48).to(dtype), 1e-5 if dtype == torch.float32 else 0.02
        return bool(torch.allclose(_product(x, _reorder(weight), bias), F.linear(x, weight, bias), rtol=error, atol=error))
    except (AttributeError, RuntimeError):
        return False


def _reorder(weight: Tensor) -> Tensor:
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return reordered


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class Matrix:
    """One or several frozen linear layers that read the same input: x (n, in) -> x W^T + bias (n, out), without gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, scoring: bool = False):
        # Where the kernels do not take bf16, it is reordered. In fp32 plain products stay nearest to what other libraries compute, so
        # only models for scoring are (a seventh faster on a Zen 3; scores differ by some 1e-6).
        if not suits(weight):
            kind = type_of_products(weight)
            weight, bias = weight.to(kind), None if bias is None else bias.to(kind)
        self.weight, self.bias = weight, bias
        worth = weight.device.type == "cpu" and not suits(weight) and (scoring or weight.dtype == torch.bfloat16)
        self._reordered = _reorder(weight) if worth and can_reorder(weight.dtype) else None

    @cached_property
    def packed(self) -> Packed:
        """For the kernels, where `kernels.suits` the weight."""
        return Packed.of(self.weight.detach(), self.bias)

    @cached_property
    def packed_back(self) -> Packed:
        """The transpose, for gradients."""
        return Packed.of(self.weight.detach().T)

    @cached_property
    def quantised(self) -> Packed | Quantised:
        """In 8 bits where that is faster."""
        return Quantised.of(self.weight.detach(), self.bias) if in_halves() else self.packed

    @cached_property
    def quantised_back(self) -> Packed | Quantised:
        return Quantised.of(self.weight.detach().T) if in_halves() else self.packed_back

    def __call__(self, x: Tensor) -> Tensor:
        """In the type of the weights, or fp32."""
        x = x.to(self.weight.dtype)
        if suits(self.weight):
            return self.packed(x)
        if self._reordered is None:
            return F.linear(x, self.weight, self.bias)
        return _product(x, self._reordered, self.bias)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """(n, out) -> (n, in): gradient W, in the type of the gradient."""
        if suits(self.weight) and self.weight.shape[0] % 2 == 0:
            return self.packed_back(gradient.to(self.weight.dtype))
        kind = type_of_products(self.weight)
        return (gradient.to(kind) @ self.weight.to(kind)).to(gradient.dtype)


class _Projection(torch.autograd.Function):
    """x (n, in) -> x W^T + sum of scale x A^T B^T on the columns of each update, fp32; updates are (columns, scale) with A, B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix, updates: list[tuple[slice, float]], *low_rank: Tensor) -> Tensor:
        y = matrix(x).to(x.dtype)
        if updates:
            a, b = low_rank[::2], low_rank[1::2]
            low = F.linear(x, a[0] if len(a) == 1 else torch.cat(a))
            for (columns, scale), factor, part in zip(updates, b, low.split([t.shape[0] for t in a], 1), strict=True):
                y[:, columns].addmm_(part, factor.T, alpha=scale)
            ctx.save_for_backward(x, low, *low_rank)
        ctx.matrix, ctx.updates = matrix, updates
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        back = ctx.matrix.pull_back(gradient) if wanted[0] else None
        if not ctx.updates:
            return back, None, None
        x, low, *low_rank = ctx.saved_tensors
        a, b = low_rank[::2], low_rank[1::2]
        ranks = [t.shape[0] for t in a]
        pulled = torch.empty_like(low)
        grads: list[Tensor | None] = []
        parts = zip(ctx.updates, b, low.split(ranks, 1), pulled.split(ranks, 1), strict=True)
        for place, ((columns, scale), factor, part, into) in enumerate(parts):
            into.copy_(gradient[:, columns] @ factor).mul_(scale)
            grads += [None, (gradient[:, columns].T @ part).mul_(scale) if wanted[4 + 2 * place] else None]
        if back is not None:
            back.addmm_(pulled, a[0] if len(a) == 1 else torch.cat(a))
        if any(wanted[3::2]):
            for place, grad_a in enumerate((pulled.T @ x).split(ranks)):
                grads[2 * place] = grad_a if wanted[3 + 2 * place] else None
        return back, None, None, *grads


def project(x: Tensor, matrix: Matrix, sites: Sequence[tuple[str, slice]], adapters: Sequence[Adapter]) -> Tensor:
    """(…, in) -> (…, out) fp32, differentiable in x and in the adapters' A and B; sites are (name, columns of the output)."""
    found = [(columns, adapter, site) for site, columns in sites for adapter in adapters if site in adapter.a]
    factors = [tensor for _, adapter, site in found for tensor in (adapter.a[site], adapter.b[site])]
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _Projection.apply(flat, matrix, [(columns, adapter.scale) for columns, adapter, _ in found], *factors)
    return y.view(*x.shape[:-1], y.shape[-1])


@dataclass
class LogitHead:
    """The map from final states to logits, (n, d) -> (n, V), and its transpose for gradients.

    Logits are summed and kept in fp32 even on a bf16 base: bf16 logits alone put noise of several hundredths on log-probs. What
    flows back from them are probabilities, for which products in the base's own type are good enough.
    """

    weight: Tensor  # (V, d) in the type of the base

    @cached_property
    def packed(self) -> Packed | None:
        """For the kernels: little more than the states' rounding is lost (.006 of a log-prob)."""
        return Packed.of(self.weight.detach()) if suits(self.weight) else None

    @cached_property
    def packed_back(self) -> Packed:
        return Packed.of(F.pad(self.weight.detach().T, (0, self.weight.shape[0] % 2)))

    @cached_property
    def _exact(self) -> tuple[Tensor, bool]:
        """The weight in fp32, and whether it is reordered."""
        exact = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        reorders = exact.device.type == "cpu" and can_reorder(exact.dtype)
        return _reorder(exact) if reorders else exact, reorders

    def logits(self, hidden: Tensor) -> Tensor:
        if self.weight.requires_grad or (hidden.requires_grad and torch.is_grad_enabled()):
            return F.linear(hidden, self.weight.to(hidden.dtype))  # differentiable
        if self.packed is not None:
            return self.packed(hidden.bfloat16().reshape(-1, hidden.shape[-1])).view(*hidden.shape[:-1], self.packed.out)
        weight, reordered = self._exact
        hidden = hidden.to(weight.dtype)
        return _product(hidden, weight, None) if reordered else F.linear(hidden, weight)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """(n, V) -> (n, d) fp32: gradient W; for the kernels bf16, with one more column of zeros where V is odd."""
        if self.packed is not None and gradient.dtype == torch.bfloat16:
            return self.packed_back(gradient)
        kind = type_of_products(self.weight)
        return (gradient.to(kind) @ self.weight.detach().to(kind)).to(gradient.dtype)
