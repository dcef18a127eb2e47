"""What every optimizer step needs: data order, seeded generators, learning rate, clipping, and a way on when memory runs out."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from punster.config import TrainConfig
from punster.data.batch import epoch_order
from punster.errors import Aborted, UserError
from punster.model.role import Role

if TYPE_CHECKING:
    from punster.train.checkpoint import State

T = TypeVar("T")
TOKENS = ("max_tokens", "trunk_tokens")  # in a micro-batch: of training; of what is computed once, before it
SMALLEST = 64  # tokens in a micro-batch below which there is no point in trying
MEMORY_ERRORS = ("can't allocate memory", "out of memory", "bad_alloc", "could not create a memory", "cannot allocate memory")


class Cursor:
    """Seeded passes over n rows: a fresh permutation each epoch, and a place in it that can be saved.

    shares (n,): with which probability a pass has a row, drawn afresh each pass; without, every pass has all of them.
    """

    def __init__(self, rows: int, generator: torch.Generator, shares: Sequence[float] = ()):
        if rows < 1:
            raise UserError("there is no data to train on")
        self.rows, self.generator, self.shares = rows, generator, shares
        self.order: list[int] = []

    def next(self, count: int) -> list[int]:
        """The next `count` rows; never the same row twice in a pass."""
        taken: list[int] = []
        while len(taken) < count:
            if not self.order:
                self.order = epoch_order(self.rows, self.generator)
                if self.shares:
                    luck = torch.rand(self.rows, generator=self.generator).tolist()
                    self.order = [row for row in self.order if luck[row] < self.shares[row]]
            need = count - len(taken)
            taken += self.order[:need]
            self.order = self.order[need:]
        return taken


def rows_used(rows: int, seed: int, count: int, shares: Sequence[float] = ()) -> set[int]:
    """The rows that a fresh cursor of this seed hands out in its first `count`: all, unless the run is short or has shares."""
    return set(Cursor(rows, seeded(seed, "data"), shares).next(count))


def make_optimizer(role: Role, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW with eps 1e-5 (Huang et al. 2022, detail 3) over a role's trainable parameters, whose names it keeps.

    Fused: over hundreds of small factors, PyTorch's loop takes four times as long.
    """
    return torch.optim.AdamW(role.named_parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=weight_decay, fused=True)


def learning_rate(peak: float, step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then linear to 0; `step` counts from 0."""
    rising = max(1, round(warmup * steps)) if warmup > 0 else 0
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (steps - step) / max(1, steps - rising)


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float, max_norm: float) -> dict[str, float]:
    """Clip the accumulated gradients, step, clear. A non-finite gradient is skipped and counted, never applied."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    skipped = not math.isfinite(norm)
    if not skipped:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm if not skipped else 0.0, "skipped_steps": float(skipped), "lr": lr}


def seeded(seed: int, stream: str) -> torch.Generator:
    """The named generator of a run: its seed mixed with the stream's name."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def total_steps(config: TrainConfig, rows: float, epochs: float) -> int:
    return config.steps or max(1, math.ceil(rows * epochs / config.batch_size))


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in MEMORY_ERRORS)


def within_memory(state: State, attempt: Callable[[int], T], kind: str = "max_tokens") -> T:
    """attempt(tokens); whenever memory runs out, once more from where it began with half the tokens in a micro-batch.

    It must start without gradients. Those are sums over all micro-batches, so they stay the same but for rounding. The
    smaller number stays, in the checkpoints too.
    """
    drawn = {name: generator.get_state() for name, generator in state.generators.items()}
    while True:
        tokens: int = state.numbers[kind]
        try:
            return attempt(tokens)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if tokens < 2 * SMALLEST:
                raise Aborted(f"out of memory even with {tokens} tokens in a micro-batch: a smaller -b may help") from error
        # Here, and not in the handler, the failed attempt's tensors are free.
        for optimizer in state.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for name, generator in state.generators.items():
            generator.set_state(drawn[name])
        state.numbers[kind] = tokens // 2
        print(f"\nout of memory: going on with micro-batches of {tokens // 2} tokens instead of {tokens}", file=sys.stderr)
        state.note("out_of_memory", **{kind: tokens // 2})
