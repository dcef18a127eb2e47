"""What sampling has computed already: kept for the gradients of the first update, which is made with the very same weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from punster.data.batch import PrefixTree
from punster.model.kernels import LONGEST, CKept, at

if TYPE_CHECKING:
    from punster.model.fused import Saved
    from punster.rollout.decode import Stepper


class Recording:
    """What the gradients of a sampling pass need, so that the training pass with the same weights need not be made.

    Rows are nodes of a tree: the prompts' first, then one for each token that was fed. Nothing is merged among responses. The
    kernels make every short path's numbers the same whatever stands beside it, so these are the training pass's own.
    """

    @classmethod
    def of(
        cls, stepper: Stepper, first_layer: int, prompts: Sequence[Sequence[int]], samples: int, new_tokens: int, rows: list[int]
    ) -> Recording | None:  # fmt: skip
        """None where some layer is not the kernels', or a path is long: there training attends in blocks, with other numbers."""
        if len(stepper.steps) < len(stepper.stages) or max(map(len, prompts)) + new_tokens > LONGEST:
            return None
        return cls(stepper, first_layer, sum(map(len, prompts)) + len(prompts) * samples * new_tokens, rows)

    def __init__(self, stepper: Stepper, first_layer: int, capacity: int, rows: list[int]):
        config, self.first_layer, self.count = stepper.model.config, first_layer, 0
        self.rows = rows  # which of the rollout's rows each of ours is
        d, inner, qkv = config.d_model, config.n_head * config.d_head, (config.n_head + 2 * config.n_kv_head) * config.d_head
        wide = config.d_ff * (2 if config.family == "llama" else 1)
        self.layers: dict[int, list[Tensor]] = {}
        self.last = torch.empty(capacity, d)  # states behind the last layer
        self.fed: list[tuple[Tensor, int]] = []  # for each step the rows and the first one's node
        self.prompts: list[Tensor] = []  # for each row its prompt's nodes
        for layer in range(first_layer, len(stepper.steps)):
            ranks = [max(1, step.low.ranks) for step in stepper.steps[layer]]
            floats, halves = torch.float32, torch.bfloat16
            widths = (
                (d, floats), (d, halves), (ranks[0], floats), (2, floats), (qkv, floats), (config.n_head, floats), (inner, halves),
                (ranks[1], floats), (d, floats), (d, halves), (ranks[2], floats), (2, floats), (wide, halves), (config.d_ff, halves),
                (ranks[3], floats),
            )  # fmt: skip
            self.layers[layer] = [torch.empty(capacity, width, dtype=dtype) for width, dtype in widths]

    def put(self, layer: int, saved: Saved, result: Tensor) -> None:
        """The prompts' rows; of layers that are not recorded nothing."""
        if layer not in self.layers:
            return
        for buffer, rows in zip(self.layers[layer], saved, strict=True):
            buffer[: len(rows)] = rows
        if layer + 1 not in self.layers:
            self.last[: len(result)] = result

    def begin(self, prompts: list[Tensor], nodes: int) -> None:
        """The prompts were run: for each row the nodes of its own, and how many there are."""
        self.prompts, self.count = prompts, nodes

    @cached_property
    def structs(self) -> Any:
        """For `punster_decode`: one CKept a layer, empty below the first."""
        made = (CKept * (max(self.layers) + 1))()
        for layer, buffers in self.layers.items():
            made[layer] = CKept(*map(at, buffers))
        return made

    def append(self, rows: Tensor) -> None:
        """One token of each of these rows was fed, and all layers have written it behind the others."""
        self.fed.append((rows, self.count))
        self.count += len(rows)

    def before(self, layer: int) -> Tensor:
        """States (N, d) before a layer."""
        return (self.layers[layer][0] if layer in self.layers else self.last)[: self.count]

    def attention(self, layer: int) -> tuple[Saved, Tensor]:
        saved = tuple(buffer[: self.count] for buffer in self.layers[layer])
        return saved[:8], saved[8].detach()

    def feed_forward(self, layer: int) -> tuple[Saved, Tensor]:
        return tuple(buffer[: self.count] for buffer in self.layers[layer])[8:], self.before(layer + 1).detach()

    def tree(self, order: Sequence[int]) -> PrefixTree:
        """The nodes of the rows in this order; (B, T) with T the longest prompt and all steps."""
        place = torch.tensor([list(order).index(row) for row in self.rows])
        longest = max(len(nodes) for nodes in self.prompts) + len(self.fed)
        nodes = torch.zeros(len(order), longest, dtype=torch.long)
        first, position = torch.zeros(2, self.count, dtype=torch.long)
        for row, own in enumerate(self.prompts):
            nodes[place[row], : len(own)] = own
            first[own] = place[row] * longest + torch.arange(len(own))
            position[own] = torch.arange(len(own))
        lengths = torch.tensor([len(own) for own in self.prompts])
        for step, (rows, node) in enumerate(self.fed):
            own, where = node + torch.arange(len(rows)), lengths[rows] + step
            nodes[place[rows], where] = own
            first[own], position[own] = place[rows] * longest + where, where
        return PrefixTree(nodes, first, position[None], [])
