"""RLHF for small language models on one machine, made for puns."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# A thread that waits for the others keeps its core for a while: by libgomp's default so long that beside another busy program a step
# took thirty times as long, and takes two to three times as long with this (on two cores: docs/PERFORMANCE.md). libgomp reads
# it when PyTorch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# Heavy libraries are imported where they are used, so that `import punster` stays fast.
_API = {
    "sft": "punster.train.sft", "train_reward": "punster.train.reward", "ppo": "punster.train.ppo",
    "grpo": "punster.train.grpo", "dpo": "punster.train.dpo", "distill": "punster.train.distill",
    "load": "punster.api", "Model": "punster.api", "SftConfig": "punster.config", "RewardConfig": "punster.config",
    "PpoConfig": "punster.config", "GrpoConfig": "punster.config", "DpoConfig": "punster.config",
    "DistillConfig": "punster.config", "UserError": "punster.errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(import_module(_API[name]), name)
    raise AttributeError(f"module 'punster' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_API, "__version__"])
