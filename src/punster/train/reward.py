"""Reward model: Bradley-Terry on pairs, Plackett-Luce on ranked groups, auxiliary heads on labelled texts; then normalised.

punster reward -n NAME -b 16 -p runs/SFT, or punster reward -n NAME --config recipes/reward-human.yaml
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from punster.config import RewardConfig
from punster.data import corpus
from punster.data.batch import Example, epoch_order
from punster.data.schema import Row
from punster.errors import UserError, near_matches
from punster.model import fused
from punster.model.heads import ScalarHead
from punster.model.role import Role, Trunk, score_examples
from punster.model.tokenizer import Tokenizer
from punster.model.transformer import Decoder
from punster.rollout.sampler import Decoding, generate
from punster.train.checkpoint import State, restore, save_checkpoint
from punster.train.guard import keep_begun
from punster.train.halves import halves_of
from punster.train.held_out import pair_table
from punster.train.judged import (
    Item,
    balanced,
    calibration,
    encode_items,
    families,
    item_batches,
    item_loss,
    neutral,
    pass_shares,
    reliability,
    share_right,
    shuffled,
    source_of,
    weighed,
)
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
from punster.train.plan import announce, training_seconds
from punster.train.run import Run, check_name, marked, saved_settings
from punster.train.setup import (
    extend,
    fits,
    layer_count,
    load_rows,
    open_start,
    plain_base,
    speaker,
    without_long_contrasts,
)


def train_reward(config: RewardConfig, rows: Sequence[Row] | None = None, eval_rows: Sequence[Row] | None = None) -> Path | None:
    """Train a reward model on pairs, ranked groups and labelled texts; returns the run folder (None for a dry run).

    rows, eval_rows: in the place of --data and --eval-data.
    """
    started = check_name(config, "reward")
    sampled_from, tokenizer = open_start(config.pretrained or "base", config)
    plain = Role(plain_base(sampled_from, config))
    start = sampled_from if config.start == "sft" else plain

    def judged(found: Sequence[Row]) -> list[Row]:
        found = of_half(config, found)
        found = balanced(found, tokenizer) if config.balance else found
        return weighed(neutral(shuffled(found, config), config.neutral, config.seed))

    first = named_rows(config, config.pretrain, sampled_from, tokenizer) if config.pretrain else []
    given = named_rows(config, rows if rows is not None else config.data, sampled_from, tokenizer)
    check_without(config, first + given)  # a source may be in one of the two alone
    first, given = judged(first) if first else [], judged(given)
    if not given:
        raise UserError("there is no data to train on")
    examples, items = encode_items(first + given, tokenizer, start.model)
    held_out = judged_pairs(config, eval_rows, tokenizer, start.model)
    validation, _ = encode_items(held_out, tokenizer, start.model)
    # What a step draws, of the first rows and of the rest: families, or single rows.
    units = [families(part) if config.families else [[place] for place in range(len(part))] for part in (first, given)]
    units[1] = [[len(first) + place for place in unit] for unit in units[1]]
    shares = pass_shares(first + given, units[1])  # --pretrain is passed whole
    for unit, share in zip(units[1], shares, strict=True):
        for row in unit:  # what is drawn less often counts more when it is
            items[row] = replace(items[row], weight=items[row].weight / share)
    # Rows for which a drawn unit stands, on average; bags are alike in that.
    rows_a_unit = len(first) / max(1, len(units[0])), len(given) / sum(shares)
    bags = [bag(len(units[1]), config, number) for number in range(config.members)]
    uneven = min(shares) < 1
    bag_shares = [[shares[place] for place in places] if uneven else [] for places in bags]
    members = [new_member(start, config, number, items) for number in range(config.members)]
    model = replace(members[0], others=tuple(members[1:]), combine=config.combine, caution=config.caution)
    # In families each text runs once a step, and about half of its tokens are a prefix of another (as in `stage_work`).
    texts, per_pass = (list(dict.fromkeys(examples)), 0.5) if config.families else (examples, 1.0)
    lengths = [sum(e.length for e in {examples[text] for row in unit for text in items[row].texts}) for unit in chain(*units)]
    drawn_in = [1.0] * len(units[0]) + shares
    per_pass *= sum(length * share for length, share in zip(lengths, drawn_in, strict=True)) / sum(lengths)

    def counted(wanted: RewardConfig) -> tuple[int, int, float]:
        """Steps of --pretrain, of the whole, and passes over all tokens."""
        first_steps = math.ceil(len(units[0]) / wanted.batch_size)
        steps = wanted.steps or first_steps + total_steps(wanted, sum(shares) * len(bags[0]) / len(shares), wanted.epochs)
        return first_steps, steps, per_pass * steps * wanted.batch_size * wanted.members / sum(drawn_in)

    def needed(wanted: RewardConfig) -> float:
        """Minutes, by a speed check that is long enough to see beyond a busy moment."""
        return training_seconds(wanted, model, texts, counted(wanted)[2], check=8.0) / 60

    asked, config = config.epochs, within_minutes(config, needed)
    first_steps, steps, passes = counted(config)
    if steps <= first_steps:
        raise UserError(f"--steps {steps}: --pretrain alone takes {first_steps}, so --data would never be learned from")
    if announce(config, "reward", model, steps, texts, passes):
        return None
    optimizers: dict[str, torch.optim.Optimizer] = {}
    cursors: dict[str, Cursor] = {}
    for number, member in enumerate(members):
        label = f"reward{number + 1 if number else ''}"
        optimizers[label] = make_optimizer(member, config.lr, config.weight_decay)
        if units[0]:
            cursors[f"{label}|first"] = Cursor(len(units[0]), seeded(config.seed + number, "data"))
        cursors[f"{label}|data"] = Cursor(len(bags[number]), seeded(config.seed + number, "data"), bag_shares[number])
    generators = {name: cursor.generator for name, cursor in cursors.items()}
    draws = config.normalise_samples or ("sampled" in config.negatives and config.sampled_rows)
    state = State(
        model, optimizers, generators, cursors, given=[*examples, *([shares] if uneven else [])],
        judged=[(item.ratings, item.margin, item.weight, item.label, item.rating) for item in items],
        drawn_from=sampled_from if draws else None, described={"normalised": False} if config.normalise_samples else {},
    )  # fmt: skip
    if config.int8 and not fused.quantises(model.model, model.frozen_depth):
        speaker(config.quiet)(
            "  --int8 changes nothing here: no frozen bf16 layer that the C kernels take in 8 bits (punster doctor)"
        )

    def as_kept() -> Role:
        """The result: normalised on samples."""
        if not config.normalise_samples:
            return model
        return normalised(model, sampled_from, tokenizer, config, [row["prompt"] for row in given])

    with Run(marked(config, data=rows, eval_data=eval_rows), "reward", steps, started) as run:
        restore(run, state)
        if config.epochs != asked:
            run.note("shortened", asked=asked, epochs=config.epochs, batch_size=config.batch_size)
        seen = {row for unit in units[0] for row in unit}  # and what any member draws of the rest
        for number, places in enumerate(bags):
            count = (steps - first_steps) * config.batch_size
            for place in rows_used(len(places), config.seed + number, count, bag_shares[number]):
                seen.update(units[1][places[place]])
        used = {text for row in seen for text in items[row].texts}
        depths = [model.frozen_depth]
        trunk = within_memory(state, lambda tokens: Trunk.compute(model, examples, depths, tokens, used), "trunk_tokens")
        known = within_memory(state, lambda tokens: Trunk.compute(model, validation, depths, tokens), "trunk_tokens")
        gaps: list[float] = []
        for step in range(run.step + 1, steps + 1):
            if step == steps and config.adapter == "lora":  # what comes after it may fail; own weights are too large for a copy
                keep_begun(run, state, tokenizer, step)
            rate = learning_rate(config.lr, step - 1, steps, config.warmup)
            sums = dict.fromkeys(("grad_norm", "loss", "accuracy", "margin"), 0.0)
            skipped = 0.0
            for number, (member, (label, optimizer)) in enumerate(zip(members, optimizers.items(), strict=True)):
                if step <= first_steps:
                    drawn, part = cursors[f"{label}|first"].next(config.batch_size), 0
                else:
                    drawn, part = [bags[number][place] for place in cursors[f"{label}|data"].next(config.batch_size)], 1
                batch = [items[row] for place in drawn for row in units[part][place]]
                each = len(drawn) * rows_a_unit[part]
                found = within_memory(state, partial(train_step, config, member, trunk, examples, batch, each))
                found |= optimizer_step(optimizer, rate, config.max_grad_norm)
                sums = {name: total + found[name] / len(members) for name, total in sums.items()}
                skipped += found["skipped_steps"]
            metrics = {**sums, "skipped_steps": skipped, "lr": rate}
            if step == steps or (config.eval_every and step % config.eval_every == 0):
                gaps = pair_gaps(model, validation, known)
                metrics["eval_accuracy"] = share_right(gaps)
                pair_table(run, step, model, tokenizer, validation)
            run.log(step, metrics, f"loss {sums['loss']:.3f} accuracy {sums['accuracy']:.2f}")
            if run.save_due(step):
                save_checkpoint(run, step, state, tokenizer, as_kept() if step == steps else None)
                run.raise_if_stopped()
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
    config = replace(config, seed=config.seed + number)
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


def judged_rows(
    config: RewardConfig, sources: Sequence[str] | Sequence[Row], sampled_from: Role, tokenizer: Tokenizer
) -> list[Row]:
    """The rows that are named, less those of the other half and of the sources in --without."""
    rows = named_rows(config, sources, sampled_from, tokenizer)
    check_without(config, rows)
    return of_half(config, rows)


def named_rows(
    config: RewardConfig, sources: Sequence[str] | Sequence[Row], sampled_from: Role, tokenizer: Tokenizer
) -> list[Row]:
    """All rows that are named, negatives included that are sampled from the SFT model."""
    rows = load_rows(sources, "judged", lambda: embedded_pairs(config, sampled_from, tokenizer), config.columns, config.quiet)
    return without_long_contrasts(rows, tokenizer, sampled_from.model, config.quiet)


def check_without(config: RewardConfig, rows: Sequence[Row]) -> None:
    """Refuse a source in --without that no row is of."""
    sources = {source_of(row) for row in rows} - {""}
    for name in config.without:
        if name not in sources:
            raise UserError(
                f"--without {name}: no row is of this source.{near_matches(name, sources)} Found: {', '.join(sorted(sources))}"
            )


def of_half(config: RewardConfig, rows: Sequence[Row]) -> list[Row]:
    """The rows of --half, less those of the sources in --without."""
    kept = list(rows)
    if config.half:
        halves = halves_of(rows)
        kept = [row for row, half in zip(rows, halves, strict=True) if half == config.half]
        nowhere = halves.count(0)
        told = f", {nowhere} are in neither half (pairs of two texts that fell apart)" if nowhere else ""
        speaker(config.quiet)(f"  half {config.half}: {len(kept)} of {len(rows)} rows{told}")
    kept = [row for row in kept if source_of(row) not in config.without]
    if not kept:
        half, without = config.half and f" in half {config.half}", config.without and f" without {', '.join(config.without)}"
        raise UserError(f"no row is left{half or ''}{without or ''}")
    return kept


def bag(rows: int, config: RewardConfig, number: int) -> Sequence[int]:
    """The rows that a member learns from: all of them, or of an ensemble's a drawn four fifths."""
    if config.members == 1:
        return range(rows)
    return epoch_order(rows, seeded(config.seed + number, "bag"))[: math.ceil(0.8 * rows)]


def judged_pairs(config: RewardConfig, given: Sequence[Row] | None, tokenizer: Tokenizer, model: Decoder) -> list[Row]:
    """Held-out pairs of which both texts fit into the context: those of --eval-data, by default of the embedded corpus."""
    embedded = lambda: corpus.preference_rows(("literal", "off_topic"), "val")
    source = given if given is not None else config.eval_data or ["embedded"]
    rows = [r for r in load_rows(source, "judged", embedded, config.columns, config.quiet, training=False) if "chosen" in r]
    if not rows:
        raise UserError("--eval-data: no pairs (chosen and rejected) in it")
    return [row for row in rows if fits(row, tokenizer, model)]


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


def embedded_pairs(config: RewardConfig, policy: Role, tokenizer: Tokenizer) -> list[Row]:
    """Pairs of the embedded corpus; the kind "sampled" puts human puns against samples of the SFT model."""
    rows = corpus.preference_rows([kind for kind in config.negatives if kind in corpus.NEGATIVES], config.split, config.seed)
    if config.rows_per_kind:
        order = epoch_order(len(rows), seeded(config.seed, "rows"))
        by_kind = {kind: [rows[i] for i in order if rows[i]["kind"] == kind][: config.rows_per_kind] for kind in config.negatives}
        rows = [row for kind in config.negatives for row in by_kind[kind]]
    rows += corpus.template_rows() if "template" in config.negatives and config.split == "train" else ()
    if "sampled" in config.negatives and config.sampled_rows:
        room = policy.model.config.max_positions - 40
        people = [record for record in corpus.part(config.split) if len(tokenizer.prompt_ids(record["prompt"])) <= room]
        people = [people[i] for i in epoch_order(len(people), seeded(config.seed, "negatives"))][: config.sampled_rows]
        examples = sft_samples(policy, tokenizer, [record["prompt"] for record in people], config.seed, "negatives")
        written: list[Row] = [
            {"prompt": record["prompt"], "chosen": record["pun"], "rejected": text, "kind": "sampled", "id": record["id"],
             "_rejected_ids": list(example.response)}  # kept, so that the rejected text is what the policy emitted
            for record, example in zip(people, examples, strict=True) if (text := tokenizer.decode(example.response))
        ]  # fmt: skip
        rows += balanced(written, tokenizer)
    if not rows and not config.sampled_rows:
        raise UserError("--sampled-rows 0 leaves no pair of the embedded corpus; give more of them, or other --negatives")
    return rows


def sft_samples(policy: Role, tokenizer: Tokenizer, prompts: Sequence[Any], seed: int, stream: str) -> list[Example]:
    """One sample of the SFT model to each prompt that leaves room for it."""
    ids = [tokenizer.prompt_ids(prompt) for prompt in prompts]
    ids = [prompt for prompt in ids if len(prompt) + 40 <= policy.model.config.max_positions]
    if not ids:
        raise UserError(
            "no prompt leaves room for a sample of 40 tokens, which the score is normalised on; use --normalise-samples 0"
        )
    return generate(policy, ids, Decoding(40), tokenizer.eos_id, seeded(seed, stream)).closed


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


def normalised(model: Role, policy: Role, tokenizer: Tokenizer, config: RewardConfig, prompts: Sequence[Any]) -> Role:
    """The same scores with gain and offset that give samples of the policy, on the training prompts, mean 0 and std 1."""
    distinct = list({str(prompt): prompt for prompt in prompts}.values())
    chosen = [distinct[i % len(distinct)] for i in range(config.normalise_samples)]
    examples = sft_samples(policy, tokenizer, chosen, config.seed, "normalise")
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
