"""The columns beside reward and win rate: success estimate, degeneration, exposure bias, forgetting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from punster.data import corpus
from punster.data.batch import Example
from punster.evaluate.degeneration import describe_texts, exposure_gap, mauve, perplexity
from punster.evaluate.success import Estimator, features, open_estimator, success_rate
from punster.model.role import Role, Trunk
from punster.model.tokenizer import Tokenizer
from punster.puns.surprisal import document_start, example_log_probs
from punster.rollout.sampler import Decoding

MAUVE_TEXTS = 100  # prompts from which on MAUVE is given: ten clusters, and ten texts in each


@dataclass
class Extra:
    """What all models of one evaluation share."""

    base: Role
    tokenizer: Tokenizer
    training: Sequence[str] | None
    estimator: Estimator | None
    seed: int
    human: list[Example]  # the corpus's plain test sentences as documents, then as many puns under their prompts
    trunk: Trunk  # their states

    @classmethod
    def open(cls, base: Role, tokenizer: Tokenizer, training: Sequence[str] | None, seed: int, depth: int = 0) -> Extra:
        """depth: where the models that are compared leave the base."""
        start, records = document_start(tokenizer), corpus.part("test")
        most = base.model.config.max_positions // 2  # of a prompt and of a response: longer ones are cut
        text_ids, prompt_ids, response_ids = tokenizer.text_ids, tokenizer.prompt_ids, tokenizer.response_ids
        human = [Example((start,), tuple(text_ids(r["plain"])[:most])) for r in records]
        human += [Example(tuple(prompt_ids(r["prompt"])[-most:]), tuple(response_ids(r["pun"])[:most])) for r in records]
        return cls(base, tokenizer, training, open_estimator(base, tokenizer), seed, human, Trunk.compute(base, human, [depth]))

    @cached_property
    def people(self) -> Tensor:
        """`features` of people's test puns."""
        return features(self.base, self.tokenizer, [record["pun"] for record in corpus.part("test")])

    def of_texts(self, by_prompt: Sequence[Sequence[str]]) -> dict[str, Any]:
        """success_rate (null without labels) and MAUVE (null below MAUVE_TEXTS) of the first texts, and what describe_texts counts.

        MAUVE is against people's test puns, on the estimator's features, the mean over five clusterings.
        """
        many = len(by_prompt) >= MAUVE_TEXTS
        x = features(self.base, self.tokenizer, [group[0] for group in by_prompt]) if self.estimator or many else None
        near = [mauve(self.people, x, seed=seed) for seed in range(5)] if many and x is not None else []
        found = describe_texts(by_prompt, self.training)
        found = {key: None if value is not None and not math.isfinite(value) else value for key, value in found.items()}
        found["mauve"] = sum(near) / len(near) if near else None
        return {"success_rate": success_rate(self.estimator, x, self.seed), **found}

    def of_model(self, role: Role, free_running: Sequence[Tensor], decoding: Decoding) -> dict[str, float | None]:
        """Perplexity on the corpus's plain test sentences (forgetting), on its test puns under their prompts, and the gap to own samples.

        free_running: the log-probs of the model's own samples, as the sampler gave them; at another temperature than 1, or
        truncated, they are not of the distribution that people's puns are measured by, and there is no gap.
        """
        logs, half = example_log_probs(role, self.human, self.trunk), len(self.human) // 2
        plain, puns = logs[:half], logs[half:]
        gap = exposure_gap(puns, free_running) if decoding.temperature == 1 and not decoding.truncated else None
        return {"perplexity_plain": perplexity(plain), "perplexity_puns": perplexity(puns), "exposure_gap": gap}
