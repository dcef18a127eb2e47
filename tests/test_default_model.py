"""The real default model: training contracts that tiny models cannot show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from punster.config.shared import DEFAULT_MODEL
from punster.data import corpus
from punster.data.batch import collate
from punster.model.load import load_model
from punster.model.role import Role
from punster.model.tokenizer import Tokenizer
from punster.rollout.logprobs import token_log_probs
from punster.rollout.sampler import Decoding, generate


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_sampler_agrees_with_the_training_path(dtype: torch.dtype, bound: float) -> None:
    """Mean absolute gap of the sampled tokens' log-probs: 1e-4 in fp32, .03 on a bf16 base."""
    role, tokenizer = Role(load_model(DEFAULT_MODEL, dtype)), Tokenizer.load(DEFAULT_MODEL)
    prompts = [tokenizer.prompt_ids(prompt) for prompt in corpus.prompts("val")[:6]]
    rollout = generate(role, prompts, Decoding(12), tokenizer.eos_id, torch.Generator().manual_seed(1))
    batch = collate(rollout.examples)
    with torch.no_grad():
        trained = token_log_probs(role.response_hidden(batch), role.model.head, batch.targets())
    gap = (trained - torch.cat(rollout.log_probs)).abs()
    assert float(gap.mean()) <= bound


@pytest.mark.slow
def test_sft_learns_and_writes_eight_different_puns(tmp_path: Path) -> None:
    """A few steps on the embedded corpus lower the held-out loss of the real model; the run generates."""
    import punster
    from punster import SftConfig

    common = {"out": str(tmp_path), "batch_size": 8, "quiet": True, "top_layers": "4"}
    first = punster.sft(SftConfig(name="one", steps=1, lr=1e-9, **common))
    second = punster.sft(SftConfig(name="few", steps=6, lr=1e-3, **common))
    import json

    losses = [json.loads((run / "summary.json").read_text())["eval_loss"] for run in (first, second)]
    assert losses[1] < losses[0] - 0.1
    texts = punster.load(str(second)).generate("make a pun about bakers", k=8, max_new_tokens=16)
    assert len(set(texts)) == 8
