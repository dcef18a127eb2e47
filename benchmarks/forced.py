"""Sampling at a forced length, as in the peers' runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def without_eos(choose: Callable[..., Any], eos_id: int) -> Callable[..., Any]:
    """`sampler.choose` that never takes EOS. Log-probs stay those of the policy, as PPO compares them with what it trains on."""

    def forced(logits: torch.Tensor, *rest: Any) -> Any:
        log_probs = logits.log_softmax(-1)
        logits[:, eos_id] = float("-inf")
        token, _ = choose(logits, *rest)
        return token, log_probs.gather(1, token[:, None])[:, 0]

    return forced
