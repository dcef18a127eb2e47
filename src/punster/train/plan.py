"""What a run will cost, before it starts: counted multiply-adds against a half-second speed check of this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from punster.config import PolicyConfig, TrainConfig
from punster.data.batch import Example
from punster.model.role import Role
from punster.model.transformer import Decoder


def measured_speed(dtype: torch.dtype, device: str = "cpu", seconds: float = 0.3) -> float:
    """Multiply-adds per second of a matrix product of the size that training uses."""
    a, b = torch.randn(1024, 576, device=device).to(dtype), torch.randn(576, 1536, device=device).to(dtype)
    a @ b
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ b
        count += 1
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return count * 1024 * 576 * 1536 / (time.perf_counter() - start)


def block_size(model: Decoder) -> int:
    """Multiply-adds per token of one block."""
    return sum(out * into for out, into in model.config.sites(0).values())


def training_cost(role: Role, examples: Sequence[Example], passes: float) -> float:
    """Multiply-adds: the trunk once, and forward, input gradients and recomputed head for each pass (LoRA: no weight gradients)."""
    tokens = sum(example.length for example in examples)
    responses = sum(len(example.response) for example in examples)
    block, head = block_size(role.model), role.model.head.weight.numel()
    branch = role.last_layer - role.frozen_depth
    use_head = 0 if role.head is not None else 3 * head * responses
    weights = 1 if role.model.trained_from is not None else 0
    return tokens * block * (role.frozen_depth + (2 + weights) * branch * passes) + use_head * passes


def announce(
    config: TrainConfig, verb: str, role: Role, steps: int, examples: Sequence[Example], passes: float = 0.0, work: float = 0.0
) -> bool:
    """For --dry-run print the plan and return True.

    passes: over the texts (default: as many as the steps make with a text a row); work: multiply-adds, where they are more than
    training on the examples.
    """
    if not config.dry_run:
        return False
    passes = passes or steps * config.batch_size / max(1, len(examples))
    speed = measured_speed(role.model.dtype, str(role.model.device))
    seconds = work / speed / 0.95 if work else training_cost(role, examples, passes) / speed / 0.6
    trainable = sum(tensor.numel() for tensor in role.parameters())
    base = sum(t.numel() * t.element_size() for t in role.model.weights.values())
    stored = sum(example.length for example in examples) * role.model.config.d_model * 4 if role.frozen_depth else 0
    working = config.max_tokens * role.model.config.d_model * 4 * 40 * (role.last_layer - role.frozen_depth)
    copies = 40 if isinstance(config, PolicyConfig) else 16  # bytes: gradients and Adam's state; what the guard may go back to
    memory = base + trainable * copies + stored + working + 512 * role.model.config.vocab_size * 12
    print(f"{verb} {Path(config.out) / config.name}: {steps} steps of {config.batch_size} rows, {len(examples)} texts")
    print(
        f"  model {role.model.name}, layers {role.frozen_depth}..{role.last_layer - 1} trained, {trainable:,} trainable parameters, {role.model.dtype}"
    )
    print(f"  about {seconds / 60:.1f} minutes at {2 * speed / 1e9:.0f} GFLOP/s here, about {memory / 1e9:.1f} GB of memory")
    return True
