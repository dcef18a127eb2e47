"""Supervised fine-tuning: next-token cross-entropy on the completion and its EOS, averaged over the step's tokens.

punster sft -n NAME -b 16 [--model M] [--data D ...]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from punster.config import DistillConfig, SftConfig
from punster.data import corpus
from punster.data.batch import Example, token_batches
from punster.data.schema import Row
from punster.model.role import Role, Trunk
from punster.rollout.logprobs import token_log_probs
from punster.rollout.sampler import Decoding
from punster.train.checkpoint import State, end_step, restore
from punster.train.guard import keep_begun
from punster.train.held_out import first, own_rows, sample_table, say_shared
from punster.train.optim import (
    Cursor,
    learning_rate,
    make_optimizer,
    optimizer_step,
    rows_used,
    seeded,
    total_steps,
    within_memory,
)
from punster.train.plan import announce
from punster.train.rows import encode, encode_rows, fits, held_out_name, load_prompts, load_rows
from punster.train.run import Run, check_name, marked
from punster.train.setup import extend, open_start


def sft(
    config: SftConfig, rows: Sequence[Row] | None = None, callback: Callable[[int, dict[str, float]], None] | None = None,
    eval_rows: Sequence[Row] | None = None, *, verb: str = "sft", started: float | None = None,
) -> Path | None:  # fmt: skip
    """Train an adapter named "sft" on rows with prompt and completion; returns the run folder (None for a dry run).

    rows, eval_rows: in the place of --data and --eval-data.
    """
    config = replace(config)  # the caller's stays as it is
    started = check_name(config, verb) if started is None else started
    start, tokenizer = open_start(config.pretrained or "base", config)
    given = load_rows(rows if rows is not None else config.data, "sft", columns=config.columns, quiet=config.quiet)
    given, examples = encode_rows(tokenizer, start.model, given, config.quiet, config.max_length)
    known = [row["completion"] for row in given]
    held_out = own_rows(config, eval_rows)
    say_shared(config, held_out, given)
    named = config.prompts if isinstance(config, DistillConfig) else held_out_name(config.data) if rows is None else ""
    decoding = Decoding(config.max_new_tokens if isinstance(config, DistillConfig) else 40)
    asked = [row["prompt"] for row in held_out or given] if held_out or not named else load_prompts(named, "val", quiet=True)
    shown = first(asked, config.eval_prompts, tokenizer, start.model, decoding.max_new_tokens, config.quiet)
    if held_out:
        validation = encode_rows(tokenizer, start.model, held_out, config.quiet, config.max_length, "row of --eval-data")[1]
    else:
        fitting = [row for row in corpus.sft_rows("val") if fits(row, tokenizer, start.model)]
        validation = [encode(tokenizer, start.model, row) for row in fitting]
    steps = total_steps(config, len(examples), config.epochs)
    policy = extend(start, config, "sft")
    if announce(config, verb, policy, steps, examples):
        return None
    optimizer = make_optimizer(policy, config.lr, config.weight_decay)
    cursor = Cursor(len(examples), seeded(config.seed, "data"))
    state = State(policy, {"policy": optimizer}, {"data": cursor.generator}, {"data": cursor}, given=examples)
    with Run(marked(config, data=rows if verb == "sft" else None, eval_data=eval_rows), verb, steps, started) as run:
        restore(run, state)
        used = rows_used(len(examples), config.seed, steps * config.batch_size)
        depths = [policy.frozen_depth]
        trunk = within_memory(state, lambda tokens: Trunk.compute(policy, examples, depths, tokens, used), "trunk_tokens")
        held_out_trunk = within_memory(state, lambda tokens: Trunk.compute(policy, validation, depths, tokens), "trunk_tokens")
        for step in range(run.step + 1, steps + 1):
            if step == steps and config.adapter == "lora":  # what comes after it may fail; own weights are too large for a copy
                keep_begun(run, state, tokenizer, step)
            rows_now = cursor.next(config.batch_size)
            step_loss = partial(accumulate_nll, policy, trunk, examples, rows_now)
            loss_sum, tokens = within_memory(state, step_loss)
            rate = learning_rate(config.lr, step - 1, steps, config.warmup)
            metrics = {"loss": loss_sum, "num_tokens": tokens, **optimizer_step(optimizer, rate, config.max_grad_norm)}
            if step == steps or (config.eval_every and step % config.eval_every == 0):
                metrics["eval_loss"] = held_out_loss(policy, validation, held_out_trunk)
                metrics |= sample_table(run, step, policy, tokenizer, shown, decoding, training=known)
            run.log(step, metrics, f"loss {loss_sum:.3f}")
            end_step(run, step, metrics, state, tokenizer, callback)
        summary = {"eval_loss": held_out_loss(policy, validation, held_out_trunk), "steps": steps, "rows": len(examples)}
        run.finish(summary | sample_table(run, steps, policy, tokenizer, shown, decoding, training=known))
        return run.folder


def accumulate_nll(
    policy: Role, trunk: Trunk, examples: Sequence[Example], rows: Sequence[int], max_tokens: int, weight: float = 1.0
) -> tuple[float, int]:
    """Add the gradient of weight * cross-entropy per response token of these rows; returns that loss and the tokens."""
    tokens = sum(len(examples[row].response) for row in rows)
    total = 0.0
    for group in token_batches([examples[row].length for row in rows], max_tokens):
        batch = trunk.collate(examples, [rows[i] for i in group], policy.model.device)
        log_probs = token_log_probs(policy.response_hidden(batch), policy.model.head, batch.targets())
        loss = -weight * log_probs.sum() / tokens
        loss.backward()
        total += float(loss.detach())
    return total, tokens


@torch.no_grad()
def held_out_loss(policy: Role, examples: Sequence[Example], trunk: Trunk) -> float:
    """Cross-entropy per response token over all examples; 0 if there are none."""
    total, tokens = 0.0, 0
    for group in token_batches([example.length for example in examples], 4096):
        batch = trunk.collate(examples, group, policy.model.device)
        log_probs = token_log_probs(policy.response_hidden(batch), policy.model.head, batch.targets())
        total, tokens = total - float(log_probs.sum()), tokens + log_probs.numel()
    return total / max(1, tokens)
