"""Evaluation while training: what the model writes to prompts, held-out ones where there are such, counted as `punster evaluate`
counts, and shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from punster.config import TrainConfig
from punster.data.batch import Example
from punster.data.schema import Row, texts_of
from punster.errors import UserError, speaker
from punster.evaluate.compare import exact_kl, shared_depths
from punster.evaluate.metrics import copy_rate, distinct_n, words
from punster.model.role import Role, score_examples
from punster.model.tokenizer import Tokenizer
from punster.model.transformer import Decoder
from punster.rollout.sampler import Decoding, generate
from punster.train.optim import seeded
from punster.train.rows import kind_of_rows, load_prompts, load_rows
from punster.train.run import Run

Scores = Callable[[list[Any], list[str], list[Example]], Sequence[float]]


def first(
    prompts: Sequence[Any], count: int, tokenizer: Tokenizer, model: Decoder, new_tokens: int, quiet: bool = False
) -> list[Any]:
    """The first different prompts that leave room for a response, the others being counted aloud.

    They are of a held-out part where there is one, else of people's own, which are all that they have.
    """
    different = {str(prompt): prompt for prompt in prompts}.values() if count else ()
    room = model.config.max_positions - new_tokens
    kept = [prompt for prompt in different if 0 < len(tokenizer.prompt_ids(prompt)) <= room]
    if len(kept) < len(different):
        left = f"{len(different) - len(kept)} of {len(different)} prompts to evaluate on left out"
        speaker(quiet)(f"  {left}: no room for {new_tokens} new tokens in the context of {model.config.max_positions}")
    return kept[:count]


def own_rows(config: TrainConfig, given: Sequence[Row] | None = None) -> list[Row]:
    """The rows of --eval-data, or as given from Python, of the kind that the verb learns from; none without."""
    if given is None and not config.eval_data:
        return []
    kind, columns = kind_of_rows(config), getattr(config, "columns", [])
    if kind == "prompt":
        return [{"prompt": prompt} for name in config.eval_data for prompt in load_prompts(name, "val", config.quiet)]
    source = config.eval_data if given is None else given
    rows = load_rows(source, kind, columns=columns, quiet=config.quiet, training=False)
    if kind == "judged" and not any("chosen" in row for row in rows):
        raise UserError("--eval-data: no pairs (chosen and rejected) in it")
    return rows


def say_shared(config: TrainConfig, own: Sequence[Row], trained: Sequence[Row]) -> None:
    """How many rows of --eval-data are no held-out ones: their (preferred) text, or of prompts alone the prompt, is trained on."""
    told = lambda row: (texts_of(row) or [str(row["prompt"])])[0]
    known = {told(row) for row in trained} if own else set()
    if shared := sum(told(row) in known for row in own):
        speaker(config.quiet)(f"note: {shared} of {len(own)} rows of --eval-data are trained on, too, so they are not held out")


@torch.no_grad()
def sample_table(
    run: Run, step: int, policy: Role, tokenizer: Tokenizer, prompts: Sequence[Any], decoding: Decoding, *,
    score: Scores | None = None, reference: Role | None = None, training: Sequence[str] | None = None,
) -> dict[str, float]:  # fmt: skip
    """One sample to each prompt from a fixed stream; metrics eval/..., rows in samples.jsonl, a table on the screen.

    score: the reward that is trained against, if there is one; reference: for the exact KL; training: texts for the copy rate.
    """
    if run.held_out[0] == step:  # the last step's evaluation may have been due anyway
        return run.held_out[1]
    if not prompts:
        return {}
    keep = shared_depths(policy, reference) if reference else ()
    stream = seeded(run.config.seed, "evaluation")
    rollout = generate(policy, list(map(tokenizer.prompt_ids, prompts)), decoding, tokenizer.eos_id, stream, keep=keep)
    texts = [tokenizer.decode(example.response) for example in rollout.examples]
    count = len(texts)
    found = {
        "eval/eos_rate": sum(rollout.finished) / count,
        "eval/length": sum(len(words(text)) for text in texts) / count,
        "eval/distinct_2": distinct_n(texts, 2),
    }
    scores: Sequence[float | None] = [None] * count
    if score is not None:
        scores = rewards = [round(float(value), 4) for value in score(list(prompts), texts, rollout.closed)]
        found["eval/score"] = sum(rewards) / count
    if reference is not None:
        found["eval/exact_kl"] = sum(exact_kl(policy, reference, rollout, decoding.temperature)) / count
    if training is not None:
        found["eval/copy_rate"] = copy_rate(texts, training)
    given = list(zip(prompts, texts, scores, strict=True))
    run.samples(step, ({"prompt": p, "completion": t, "score": s, "held_out": True} for p, t, s in given))
    run.show(step, "samples to evaluation prompts", ("prompt", "completion", "score"), given)
    run.held_out = (step, found)
    return found


@torch.no_grad()
def pair_table(run: Run, step: int, model: Role, tokenizer: Tokenizer, pairs: Sequence[Example]) -> None:
    """Scores of the first eight held-out pairs (even places the preferred text, odd ones the rejected)."""
    chosen = pairs[:16]
    scores = score_examples(model, chosen)
    texts = [tokenizer.decode(example.response) for example in chosen]
    rows = [(texts[i], scores[i], texts[i + 1], scores[i + 1]) for i in range(0, len(texts), 2)]
    run.show(step, "held-out pairs", ("preferred", "score", "rejected", "score "), rows)
