"""What ChatGLM-RLHF (Hou et al. 2024, arXiv 2404.00934) adds around PPO: a reference baseline, a prompt filter, an SFT loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from punster.config import PolicyConfig, PpoConfig
from punster.errors import UserError
from punster.model.role import Trunk
from punster.rollout.sampler import generate
from punster.train.experience import Setup
from punster.train.optim import Cursor, seeded
from punster.train.rows import encode_rows, load_rows
from punster.train.sft import accumulate_nll


def reference_scores(setup: Setup, rows: Sequence[int], samples: int, missing_eos_penalty: float) -> Tensor:
    """(len(rows), samples): scores of the reference's own responses to these prompts, missing-EOS penalty included."""
    prompts = [setup.prompts[row] for row in rows for _ in range(samples)]
    rollout = generate(
        setup.reference, [setup.prompt_ids[row] for row in rows], setup.decoding, setup.tokenizer.eos_id,
        seeded(setup.config.seed, "reference"), samples,
    )  # fmt: skip
    texts = [setup.tokenizer.decode(example.response) for example in rollout.examples]
    scores = torch.tensor(setup.reward(prompts, texts, rollout.closed), device=setup.policy.model.device)
    scores -= missing_eos_penalty * ~torch.tensor(rollout.finished, device=scores.device)
    return scores.view(len(rows), samples)


def filter_prompts(setup: Setup, config: PolicyConfig) -> int:
    """Drop the prompts whose responses all earn about the same, since they teach nothing; returns how many are left."""
    if config.filter_std > 0:
        scores = reference_scores(setup, range(len(setup.prompts)), config.filter_samples, config.missing_eos_penalty)
        kept = (scores.std(1) >= config.filter_std).nonzero()[:, 0].tolist()
        if not kept:
            raise UserError(
                f"--filter-std {config.filter_std}: no prompt is left; the largest is {float(scores.std(1).max()):.3f}"
            )
        setup.prompts, setup.prompt_ids = [setup.prompts[i] for i in kept], [setup.prompt_ids[i] for i in kept]
    return len(setup.prompts)


def baseline_scores(setup: Setup, config: PpoConfig, rows: set[int]) -> Tensor:
    """(number of prompts,): score of one fixed response of the reference to each of these prompts, 0 for the others."""
    scores = torch.zeros(len(setup.prompts), device=setup.policy.model.device)
    if config.reference_baseline:
        order = sorted(rows)
        scores[order] = reference_scores(setup, order, 1, config.missing_eos_penalty)[:, 0]
    return scores


class SftTerm:
    """The SFT loss that is added to each update of the policy, on rows of its own."""

    def __init__(self, config: PpoConfig, setup: Setup):
        self.config, self.policy, self.trunk = config, setup.policy, Trunk({})
        rows = load_rows(config.sft_data, "sft", quiet=config.quiet) if config.sft_coef else []
        self.examples = encode_rows(setup.tokenizer, setup.policy.model, rows, config.quiet)[1] if rows else []
        self.cursor = Cursor(max(1, len(self.examples)), seeded(config.seed, "sft"))

    def prepare(self, max_tokens: int) -> None:
        if self.config.memory == "trunk":
            self.trunk = Trunk.compute(self.policy, self.examples, [self.policy.frozen_depth], max_tokens)

    def next(self, minibatches: int) -> list[int]:
        """As many rows as a minibatch has responses; none without a coefficient."""
        return self.cursor.next(max(1, self.config.batch_size // minibatches)) if self.config.sft_coef else []

    def accumulate(self, rows: list[int], max_tokens: int) -> dict[str, float]:
        """Add the gradient over these rows; the loss per token, before its coefficient."""
        if not rows:
            return {}
        loss, _ = accumulate_nll(self.policy, self.trunk, self.examples, rows, max_tokens, self.config.sft_coef)
        return {"sft": loss / self.config.sft_coef}
