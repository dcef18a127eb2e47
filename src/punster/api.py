"""The Python face of trained runs: load, generate, score.

import punster
model = punster.load("runs/demo/ppo")
model.generate("make a pun about bakers", k=8)
model.generate_many(["make a pun about bakers", "make a pun about bees"], k=4)
punster.load("runs/demo/reward").score(["make a pun about bakers"], ["Bakers trade bread recipes on a knead-to-know basis."])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from punster.config.shared import DEFAULT_MODEL, as_meant
from punster.errors import UserError
from punster.evaluate.table import shown_progress
from punster.model.load import identity
from punster.model.role import Role, score_examples, scores_and_spreads
from punster.model.tokenizer import Tokenizer
from punster.rollout.sampler import ROWS, Decoding, generate
from punster.train.optim import seeded
from punster.train.rows import check_prompts, encode
from punster.train.setup import open_role, shared_base


@dataclass
class Model:
    """A role with its tokenizer."""

    role: Role
    tokenizer: Tokenizer

    def generate(self, prompt: Any, k: int = 1, **options: Any) -> list[str]:
        """k texts in answer to one prompt; the options are those of `generate_many`."""
        return self.generate_many([prompt], k, **options)[0]

    def generate_many(
        self, prompts: Sequence[Any], k: int = 1, *, best_of: int = 0, judge: Model | None = None, seed: int = 1,
        max_new_tokens: int = 48, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.05,
        repetition_penalty: float = 1.0, distinct: bool = True, quiet: bool = True,
    ) -> list[list[str]]:  # fmt: skip
        """k texts to each prompt; with best_of and a judge, each is the best of so many samples. `distinct` draws again for repeats.

        The defaults are for reading; temperature 1 and min_p 0 sample as training and evaluation do. Prompts are sampled together;
        not `quiet`: with a progress bar.
        """
        decoding = Decoding(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
        if self.role.head is not None:
            raise UserError("this run is a reward model: it scores texts, it does not write them")
        if isinstance(prompts, str):
            raise UserError("generate_many takes a list of prompts; generate takes one")
        if k < 1 or best_of < 0:
            raise UserError(f"-k must be at least 1 and --best-of at least 0, got {k} and {best_of}")
        if best_of and judge is None:
            raise UserError("--best-of needs a reward model to choose by: -c runs/REWARD")
        if judge is not None:
            theirs, ours = ((identity(each.role.model.name), each.tokenizer.prompt_format) for each in (judge, self))
            if judge.role.head is None or theirs != ours:
                raise UserError("-c must be a reward model on the same base and prompt format as the model that writes")
            if not best_of:
                raise UserError("-c chooses among samples: give --best-of N too")
        ids = check_prompts(self.tokenizer, self.role.model, prompts, decoding.max_new_tokens)
        generator = seeded(seed, "generate")
        together = max(1, ROWS // (k * max(1, best_of)))  # prompts whose samples fill the sampler
        starts = range(0, len(ids), together)
        found: list[list[str]] = []
        for start in shown_progress(starts, "generate", quiet, len(starts)):
            found += self._texts(ids[start : start + together], k, decoding, best_of, judge, generator, distinct)
        return found

    def _texts(
        self, ids: Sequence[Sequence[int]], k: int, decoding: Decoding, best_of: int, judge: Model | None,
        generator: torch.Generator, distinct: bool,
    ) -> list[list[str]]:  # fmt: skip
        """At most k texts to each tokenised prompt."""
        found: list[list[str]] = [[] for _ in ids]
        for _ in range(5 if distinct else 1):
            short = [own for own in range(len(ids)) if len(found[own]) < k]
            if not short:
                break
            count = max(k - len(found[own]) for own in short)
            asked = [ids[own] for own in short]
            rollout = generate(self.role, asked, decoding, self.tokenizer.eos_id, generator, max(1, best_of) * count)
            examples = rollout.examples
            if judge is not None:
                scores = score_examples(judge.role, rollout.closed)
                blocks = [range(i, i + best_of) for i in range(0, len(examples), best_of)]
                examples = [examples[max(block, key=lambda i: scores[i])] for block in blocks]
            for place, example in enumerate(examples):
                text, own = self.tokenizer.decode(example.response), found[short[place // count]]
                if len(own) < k and (not distinct or (text and text not in own)):
                    own.append(text)
        return found

    def score(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        """One normalised score for each completion; it depends on this prompt and text alone."""
        return self.judge(prompts, completions)[0]

    def judge(
        self, prompts: Sequence[Any], completions: Sequence[str], places: Sequence[str] = ()
    ) -> tuple[list[float], list[float]]:
        """Scores, and the standard deviation over an ensemble's members on each text (0 for a single model).

        places: what an error calls each text ("FILE, line N"), instead of its number.
        """
        if self.role.head is None:
            raise UserError("this run is not a reward model: only reward runs score texts")
        alone = isinstance(prompts, str) or isinstance(completions, str)
        prompts, completions = list(prompts), list(completions)
        if alone or len(prompts) != len(completions):
            raise UserError("prompts and completions must be two lists of the same length")
        rows = zip(prompts, completions, places or [f"row {i}" for i in range(1, len(prompts) + 1)], strict=True)
        examples = [encode(self.tokenizer, self.role.model, {"prompt": p, "completion": c}, where=place) for p, c, place in rows]
        unique = list(dict.fromkeys(examples))  # equal texts get equal scores to the last digit, and run once
        found = dict(zip(unique, zip(*scores_and_spreads(self.role, unique), strict=True), strict=True))
        return [found[example][0] for example in examples], [found[example][1] for example in examples]


def load(
    path: str = DEFAULT_MODEL, *, device: str = "auto", dtype: str = "auto", prompt_format: str = "auto", merge: bool = False
) -> Model:
    """A run folder, or any --model value. merge: in fp32 a run's adapters are added into the weights, which scores faster."""
    where = SimpleNamespace(device=device, dtype=dtype)
    folder = Path(path)
    if (folder / "checkpoints").is_dir() or (folder / "manifest.json").exists():
        role, tokenizer = open_role(path, where)
        if as_meant(prompt_format) not in ("auto", tokenizer.prompt_format):
            raise UserError(
                f"{path}: trained with --prompt-format {tokenizer.prompt_format!r}, and writes and scores with no other"
            )
        return Model(role.merged() if merge else role, tokenizer)
    if folder.is_dir() and not (folder / "config.json").exists():
        runs = sorted(p.name for p in folder.iterdir() if (p / "checkpoints").is_dir())
        if runs:
            raise UserError(f"{path} is a folder of runs: choose one, such as {path}/{runs[0]} ({', '.join(runs)})")
        raise UserError(f"{path}: neither a run nor a model folder (no checkpoints, no config.json)")
    base = shared_base(path, where)
    return Model(Role(base), Tokenizer.load(path, as_meant(prompt_format)).check_fits(base))
