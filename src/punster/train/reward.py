"""Reward model: Bradley-Terry on pairs, Plackett-Luce on ranked groups, auxiliary heads on labelled texts; then normalised.

punster reward -n NAME -b 16 -p runs/SFT, or punster reward -n NAME --config recipes/reward-human.yaml
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from punster.config import RewardConfig
from punster.data import corpus
from punster.data.batch import Example
from punster.data.schema import Row
from punster.errors import UserError, speaker
from punster.model import fused
from punster.model.heads import ScalarHead
from punster.model.role import Role, Trunk, score_examples
from punster.model.tokenizer import Tokenizer
from punster.train.checkpoint import State, end_step, restore
from punster.train.guard import keep_begun
from punster.train.held_out import own_rows, pair_table, say_shared
from punster.train.judged import (
    Item,
    calibration,
    encode_items,
    item_batches,
    item_loss,
    reliability,
    share_right,
)
from punster.train.lessons import Lessons, drawn_prompts, judged_pairs, lesson_rows, member_seed, sft_samples
from punster.train.optim import (
    learning_rate,
    make_optimizer,
    optimizer_step,
    seeded,
    within_memory,
)
from punster.train.plan import announce, training_seconds
from punster.train.rows import fits
from punster.train.run import Run, check_name, marked, saved_settings
from punster.train.setup import extend, layer_count, open_start, plain_base


def train_reward(config: RewardConfig, rows: Sequence[Row] | None = None, eval_rows: Sequence[Row] | None = None) -> Path | None:
    """Train a reward model on pairs, ranked groups and labelled texts; returns the run folder (None for a dry run).

    rows, eval_rows: in the place of --data and --eval-data.
    """
    config = replace(config)  # the caller's stays as it is
    started = check_name(config, "reward")
    sampled_from, tokenizer = open_start(config.pretrained or "base", config)
    start = sampled_from if config.start == "sft" else Role(plain_base(sampled_from, config))
    own = own_rows(config, eval_rows)  # before anything is sampled
    first, given = lesson_rows(config, rows, sampled_from, tokenizer)
    say_shared(config, own, first + given)
    lessons = Lessons.of(config, first, given, tokenizer, start.model)
    held_out = judged_pairs(config, own, tokenizer, start.model)
    validation, _ = encode_items(held_out, tokenizer, start.model)
    members = [new_member(start, config, number, lessons.items) for number in range(config.members)]
    model = replace(members[0], others=tuple(members[1:]), combine=config.combine, caution=config.caution)

    def needed(wanted: RewardConfig) -> float:
        """Minutes, by a speed check that is long enough to see beyond a busy moment."""
        return training_seconds(wanted, model, *lessons.work(wanted), check=8.0) / 60

    asked, config = config.epochs, within_minutes(config, needed)
    first_steps, steps = lessons.steps(config)
    if steps <= first_steps:
        raise UserError(f"--steps {steps}: --pretrain alone takes {first_steps}, so --data would never be learned from")
    prompts = drawn_prompts(sampled_from, tokenizer, given, config.normalise_samples, config.seed)
    if announce(config, "reward", model, steps, *lessons.work(config)):
        return None
    labels = [f"reward{number + 1 if number else ''}" for number in range(config.members)]
    optimizers = {
        label: make_optimizer(member, config.lr, config.weight_decay) for label, member in zip(labels, members, strict=True)
    }
    cursors = [lessons.cursors(number, config.seed) for number in range(config.members)]
    named = {f"{label}|{kind}": cursor for label, own in zip(labels, cursors, strict=True) for kind, cursor in own.items()}
    draws = config.normalise_samples or ("sampled" in config.negatives and config.sampled_rows)
    state = State(
        model, optimizers, {name: cursor.generator for name, cursor in named.items()}, named,
        given=[*lessons.examples, *([lessons.shares] if lessons.uneven else []), *(map(list, lessons.bags) if model.others else [])],
        judged=[(item.ratings, item.margin, item.weight, item.label, item.rating) for item in lessons.items],
        drawn_from=sampled_from if draws else None, described={"normalised": False} if config.normalise_samples else {},
    )  # fmt: skip
    if config.int8 and not fused.quantises(model.model, model.frozen_depth):
        speaker(config.quiet)(
            "  --int8 changes nothing here: no frozen bf16 layer that the C kernels take in 8 bits (punster doctor)"
        )

    def as_kept() -> Role:
        """The result: normalised on samples."""
        return normalised(model, sampled_from, tokenizer, config.seed, prompts) if prompts else model

    with Run(marked(config, data=rows, eval_data=eval_rows), "reward", steps, started) as run:
        restore(run, state)
        if config.epochs != asked:
            run.note("shortened", asked=asked, epochs=config.epochs, batch_size=config.batch_size)
        used = lessons.texts_used(config)
        depths = [model.frozen_depth]
        trunk = within_memory(state, lambda tokens: Trunk.compute(model, lessons.examples, depths, tokens, used), "trunk_tokens")
        known = within_memory(state, lambda tokens: Trunk.compute(model, validation, depths, tokens), "trunk_tokens")
        gaps: list[float] = []
        for step in range(run.step + 1, steps + 1):
            if step == steps and config.adapter == "lora":  # what comes after it may fail; own weights are too large for a copy
                keep_begun(run, state, tokenizer, step)
            rate = learning_rate(config.lr, step - 1, steps, config.warmup)
            sums = dict.fromkeys(("grad_norm", "loss", "accuracy", "margin"), 0.0)
            skipped = 0.0
            for number, (member, optimizer) in enumerate(zip(members, optimizers.values(), strict=True)):
                batch, each = lessons.draw(number, cursors[number], step <= first_steps, config.batch_size)
                found = within_memory(state, partial(train_step, config, member, trunk, lessons.examples, batch, each))
                found |= optimizer_step(optimizer, rate, config.max_grad_norm)
                sums = {name: total + found[name] / len(members) for name, total in sums.items()}
                skipped += found["skipped_steps"]
            metrics = {**sums, "skipped_steps": skipped, "lr": rate}
            if step == steps or (config.eval_every and step % config.eval_every == 0):
                gaps = pair_gaps(model, validation, known)
                metrics["eval_accuracy"] = share_right(gaps)
                pair_table(run, step, model, tokenizer, validation)
            run.log(step, metrics, f"loss {sums['loss']:.3f} accuracy {sums['accuracy']:.2f}")
            end_step(run, step, metrics, state, tokenizer, result=as_kept() if step == steps else None)
        final = as_kept() if model.others else model  # an ensemble's members count by their normalised scores
        summary = {"accuracy": accuracy_by_kind(final, tokenizer, config.test_limit), "steps": steps, "pairs": len(given)}
        gaps = gaps or pair_gaps(model, validation, known)
        right = pair_gaps(final, validation, known) if model.others else gaps
        run.finish({**summary, "calibration": calibration(gaps), "reliability": reliability(held_out, right)})
        return run.folder


def within_minutes(config: RewardConfig, needed: Callable[[RewardConfig], float]) -> RewardConfig:
    """The same with passes halved until they take about --minutes (`needed`); a run that goes on keeps its own.

    Batches are halved with them, down to a quarter, so that fewer passes make as many steps (docs/REWARD.md has what that is
    worth). Halves, and a fifth of slack, since estimates differ by more than that from call to call.
    """
    choices = [replace(config, minutes=0.0)]  # so that the saved settings give the run that was made
    if not config.minutes or config.steps:
        return choices[0]
    for _ in range(6):
        size = max(1, math.ceil(config.batch_size / 4), choices[-1].batch_size // 2)
        choices.append(replace(choices[-1], epochs=choices[-1].epochs / 2, batch_size=size))
    if config.resume:
        saved = saved_settings(Path(config.out) / config.name)
        begun = [
            choice for choice in choices if (choice.epochs, choice.batch_size) == (saved.get("epochs"), saved.get("batch_size"))
        ]
        return begun[0] if begun else choices[0]  # which is refused as any other change is
    found = next((choice for choice in choices if needed(choice) <= 1.2 * config.minutes), None)
    if found is None:
        raise UserError(
            f"--minutes {config.minutes:g}: even {choices[-1].epochs:g} passes would take about {needed(choices[-1]):.0f} minutes on this "
            "machine; give it more of them, or less data"
        )
    if found is not choices[0]:
        rows = "families" if config.families else "rows"
        speaker(config.quiet)(
            f"  passes: {config.epochs:g} would take about {needed(choices[0]):.0f} minutes on this machine; {found.epochs:g}, in steps of "
            f"{found.batch_size} {rows}, about {needed(found):.0f} (--minutes 0: all of them)"
        )
    return found


def new_member(start: Role, config: RewardConfig, number: int, items: Sequence[Item]) -> Role:
    """A fresh adapter and heads, auxiliary ones where items have a label or a rating; members of an ensemble differ in the seed."""
    config = replace(config, seed=member_seed(config.seed, number))
    depth = layer_count(config.depth, start.model.config.n_layer)
    role = extend(start, config, "reward", depth)
    width, device = role.model.config.d_model, role.model.device
    head = ScalarHead.create(width, seeded(config.seed, "head"), device)
    aux: dict[str, ScalarHead] = {}
    if config.pun_head and any(not math.isnan(item.label) for item in items):
        aux["pun"] = ScalarHead(torch.ones(1, device=device), torch.zeros((), device=device)).trainable()
    if config.funniness_head and any(not math.isnan(item.rating) for item in items):
        aux["funniness"] = ScalarHead.create(width, seeded(config.seed, "funniness head"), device).trainable()
    return replace(role, head=head.trainable(), pooling=config.pooling, aux=aux)


def train_step(
    config: RewardConfig, member: Role, trunk: Trunk, examples: Sequence[Example], batch: Sequence[Item],
    each: float, max_tokens: int,
) -> dict[str, float]:  # fmt: skip
    """Accumulate the gradient of one member's step: the sum over the items / `each`; the rest are means over those that rank texts."""
    ranked = max(1, sum(len(item.texts) > 1 for item in batch))
    sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
    for group in item_batches(examples, batch, max_tokens):
        with member.model.in_bytes(config.int8):
            loss, found = item_loss(member, trunk, examples, [batch[place] for place in group], config)
        (loss / each).backward()
        sums["loss"] += float(loss.detach()) / each
        for name, value in found.items():
            sums[name] += value / ranked
    return sums


def pair_gaps(model: Role, examples: Sequence[Example], trunk: Trunk | None = None) -> list[float]:
    """Score of the chosen text (even places) minus that of the rejected one, for each pair."""
    scores = score_examples(model, examples, trunk)
    return [a - b for a, b in zip(scores[::2], scores[1::2], strict=True)]


@torch.no_grad()
def accuracy_by_kind(model: Role, tokenizer: Tokenizer, limit: int) -> dict[str, float]:
    """Accuracy on each kind of negative, on pun words that no reward model was trained on."""
    rows = [row for kind in corpus.NEGATIVES for row in corpus.preference_rows((kind,), "test")[:limit]]
    rows += corpus.template_rows("test")[:limit]
    rows = [row for row in rows if fits(row, tokenizer, model.model)]
    examples, _ = encode_items(rows, tokenizer, model.model)
    unique = list(dict.fromkeys(examples))
    scores = dict(zip(unique, score_examples(model, unique), strict=True))
    gaps: dict[str, list[float]] = {}
    for number, row in enumerate(rows):
        gaps.setdefault(row["kind"], []).append(scores[examples[2 * number]] - scores[examples[2 * number + 1]])
    return {kind: share_right(found) for kind, found in gaps.items()}


def normalised(model: Role, policy: Role, tokenizer: Tokenizer, seed: int, prompts: Sequence[Sequence[int]]) -> Role:
    """The same scores with gain and offset that give samples of the policy to these prompts mean 0 and std 1."""
    examples = sft_samples(policy, tokenizer, prompts, seed, "normalise")
    members = [replace(role, normalisation=(1.0, 0.0), others=()) for role in (model, *model.others)]
    members = [standardised(role, score_examples(role, examples)) for role in members]
    if model.others:
        # The mean of members varies less than each, and their minimum is below 0: once more, for the ensemble's own score.
        scores = score_examples(replace(members[0], others=tuple(members[1:])), examples)
        members = [standardised(role, scores) for role in members]
    return replace(members[0], others=tuple(members[1:]))


def standardised(role: Role, scores: Sequence[float]) -> Role:
    """The role with gain and offset that turn these scores of it into mean 0 and standard deviation 1."""
    found = torch.tensor(scores)
    extra = 1 / max(float(found.std()), 1e-6)
    gain, offset = role.normalisation
    return replace(role, normalisation=(gain * extra, (offset - float(found.mean())) * extra))
