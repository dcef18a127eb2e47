"""Reward model: Bradley-Terry on pairs (the margin, if a pair has one, is subtracted), normalised on SFT samples.

punster reward -n NAME -b 16 -p runs/SFT
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from punster.algorithms.losses import bradley_terry
from punster.config import RewardConfig
from punster.data import corpus
from punster.data.batch import Example, epoch_order, token_batches
from punster.data.schema import Row
from punster.errors import UserError
from punster.model.role import Role, Trunk, score_examples
from punster.model.tokenizer import Tokenizer
from punster.model.transformer import Decoder
from punster.rollout.sampler import Decoding, generate
from punster.train.held_out import pair_table
from punster.train.plan import announce
from punster.train.run import (
    Cursor,
    Run,
    State,
    learning_rate,
    make_optimizer,
    optimizer_step,
    restore,
    rows_used,
    save_checkpoint,
    seeded,
    total_steps,
)  # fmt: skip
from punster.train.setup import (
    check_model,
    encode,
    encode_fitting,
    extend,
    layer_count,
    load_rows,
    open_base,
    open_policy_role,
    plain_base,
    with_head,
)

SIDES = ("chosen", "rejected")


def train_reward(config: RewardConfig, rows: Sequence[Row] | None = None) -> Path | None:
    """Train a reward model on rows with prompt, chosen and rejected; returns the run folder (None for a dry run)."""
    if config.pretrained:
        sampled_from, tokenizer = open_policy_role(config.pretrained, config)
        check_model(config, config.pretrained, sampled_from)
    else:
        base, tokenizer = open_base(config)
        sampled_from = Role(base)
    plain = Role(plain_base(sampled_from, config))
    start = sampled_from if config.start == "sft" else plain
    given = load_rows(
        rows if rows is not None else config.data,
        "preference",
        lambda: embedded_pairs(config, sampled_from, tokenizer),
        config.columns,
    )
    given = shuffled(given, config)
    examples, margins = encode_pairs(given, tokenizer, start.model)
    validation = fitting_pairs(corpus.preference_rows(("literal", "off_topic"), "val"), tokenizer, start.model)
    steps = total_steps(config, len(given), config.epochs)
    model = with_head(
        replace(extend(start, config, "reward", layer_count(config.depth, start.model.config.n_layer)), pooling=config.pooling),
        config,
    )
    if announce(config, "reward", model, steps, examples):
        return None
    optimizer, names = make_optimizer(model, config.lr, config.weight_decay)
    cursor = Cursor(len(given), seeded(config.seed, "data"))
    state = State(model, {"reward": (optimizer, names)}, {"data": cursor.generator}, {"data": cursor})
    with Run(config, "reward", steps) as run:
        restore(run, state)
        used = rows_used(len(given), config.seed, steps * config.batch_size)
        texts_used = {text for pair in used for text in (2 * pair, 2 * pair + 1)}
        trunk = Trunk.shared([model], examples, config.max_tokens, texts_used)
        held_out = Trunk.shared([model], validation, config.max_tokens)
        for step in range(run.step + 1, steps + 1):
            pairs = cursor.next(config.batch_size)
            sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
            for group in pair_batches(examples, pairs, config.max_tokens):
                texts = [2 * pair for pair in group] + [2 * pair + 1 for pair in group]
                chosen, rejected = model.raw_scores(trunk.collate(examples, texts, model.model.device)).chunk(2)
                loss = bradley_terry(chosen, rejected, margins[group].to(chosen.device)).sum()
                loss = (loss + config.center_rewards * (chosen + rejected).square().sum()) / len(pairs)
                loss.backward()
                sums["loss"] += float(loss.detach())
                sums["accuracy"] += float((chosen > rejected).sum()) / len(pairs)
                sums["margin"] += float((chosen - rejected).detach().sum()) / len(pairs)
            rate = learning_rate(config.lr, step - 1, steps, config.warmup)
            metrics = {**sums, **optimizer_step(optimizer, rate, config.max_grad_norm)}
            if step == steps or (config.eval_every and step % config.eval_every == 0):
                metrics["eval_accuracy"] = pair_accuracy(model, validation, held_out)
                pair_table(run, step, model, tokenizer, validation)
            run.log(step, metrics, f"loss {sums['loss']:.3f} accuracy {sums['accuracy']:.2f}")
            if run.save_due(step):
                result = model
                if step == steps and config.normalise_samples:
                    result = normalised(model, sampled_from, tokenizer, config, [row["prompt"] for row in given])
                save_checkpoint(run, step, state, tokenizer, result)
                run.raise_if_stopped()
        summary = {"accuracy": accuracy_by_kind(model, tokenizer, config.test_limit), "steps": steps, "pairs": len(given)}
        run.finish(summary)
        return run.folder


def embedded_pairs(config: RewardConfig, policy: Role, tokenizer: Tokenizer) -> list[Row]:
    """Pairs of the embedded corpus; the kind "sampled" puts human puns against samples of the SFT model."""
    rows = corpus.preference_rows([kind for kind in config.negatives if kind in corpus.NEGATIVES], config.split, config.seed)
    if config.rows_per_kind:
        order = epoch_order(len(rows), seeded(config.seed, "rows"))
        by_kind = {kind: [rows[i] for i in order if rows[i]["kind"] == kind][: config.rows_per_kind] for kind in config.negatives}
        rows = [row for kind in config.negatives for row in by_kind[kind]]
    if "sampled" in config.negatives:
        room = policy.model.config.max_positions - 40
        people = [record for record in corpus.part(config.split) if len(tokenizer.prompt_ids(record["prompt"])) <= room]
        people = [people[i] for i in epoch_order(len(people), seeded(config.seed, "negatives"))][: config.sampled_rows]
        examples = sft_samples(policy, tokenizer, [record["prompt"] for record in people], config.seed, "negatives")
        written = []
        for record, example in zip(people, examples, strict=True):
            if text := tokenizer.decode(example.response):
                # The ids are kept, so that the rejected text is what the policy emitted.
                row = {
                    "prompt": record["prompt"],
                    "chosen": record["pun"],
                    "rejected": text,
                    "kind": "sampled",
                    "id": record["id"],
                }
                written.append(row | {"rejected_ids": list(example.response)})
        rows += balanced(written, tokenizer)
    return rows


def balanced(rows: list[Row], tokenizer: Tokenizer, width: int = 4) -> list[Row]:
    """As many pairs whose chosen text is the longer as whose rejected text is, at every difference in length.

    Pairs are bucketed by the difference in tokens and the surplus is dropped (ChatGLM-RLHF, arXiv 2404.00934): a reward
    model must not learn length from what the sampling model happens to write.
    """
    buckets: dict[int, tuple[list[Row], list[Row]]] = {}
    kept = []
    for row in rows:
        gap = len(tokenizer.response_ids(row["chosen"])) - len(row["rejected_ids"])
        if gap == 0:
            kept.append(row)
        else:
            buckets.setdefault((abs(gap) - 1) // width, ([], []))[gap > 0].append(row)
    for shorter, longer in buckets.values():
        fewer = min(len(shorter), len(longer))
        kept += shorter[:fewer] + longer[:fewer]
    return kept


def sft_samples(policy: Role, tokenizer: Tokenizer, prompts: Sequence[Any], seed: int, stream: str) -> list[Example]:
    """One sample of the SFT model to each prompt that leaves room for it."""
    ids = [tokenizer.prompt_ids(prompt) for prompt in prompts]
    ids = [prompt for prompt in ids if len(prompt) + 40 <= policy.model.config.max_positions]
    if not ids:
        raise UserError(
            "no prompt leaves room for a sample of 40 tokens, which the score is normalised on; use --normalise-samples 0"
        )
    return generate(policy, ids, Decoding(40), tokenizer.eos_id, seeded(seed, stream)).closed


def shuffled(rows: list[Row], config: RewardConfig) -> list[Row]:
    """The placebo: preferred and rejected text swapped by the toss of a seeded coin."""
    if not config.shuffle_labels:
        return rows
    coins = torch.rand(len(rows), generator=seeded(config.seed, "labels")) < 0.5
    return [swapped(row) if coin else row for row, coin in zip(rows, coins.tolist(), strict=True)]


def swapped(row: Row) -> Row:
    """The pair the other way round, ids of sampled texts included."""
    ids = {f"{side}_ids": row.get(f"{other}_ids") for side, other in (SIDES, SIDES[::-1])}
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"], **ids}


def encode_pairs(rows: Sequence[Row], tokenizer: Tokenizer, model: Decoder) -> tuple[list[Example], torch.Tensor]:
    """Examples 2i (chosen) and 2i + 1 (rejected) of every row, and the margins (P,)."""
    examples = []
    for number, row in enumerate(rows, 1):
        for side in SIDES:
            if ids := row.get(f"{side}_ids"):
                examples.append(Example(tuple(tokenizer.prompt_ids(row["prompt"])), tuple(ids)))
            else:
                examples.append(encode(tokenizer, model, row["prompt"], row[side], f"row {number}"))
    return examples, torch.tensor([float(row.get("margin") or 0.0) for row in rows])


def fitting_pairs(rows: Sequence[Row], tokenizer: Tokenizer, model: Decoder) -> list[Example]:
    """Held-out pairs of which both texts fit into the context."""
    pairs = [
        encode_fitting(tokenizer, model, [row], "chosen") + encode_fitting(tokenizer, model, [row], "rejected") for row in rows
    ]
    return [example for pair in pairs if len(pair) == 2 for example in pair]


def pair_batches(examples: Sequence[Example], pairs: Sequence[int], max_tokens: int) -> list[list[int]]:
    longest = [max(examples[2 * pair].length, examples[2 * pair + 1].length) for pair in pairs]
    return [[pairs[i] for i in group] for group in token_batches([2 * length for length in longest], max_tokens)]


def pair_accuracy(model: Role, examples: Sequence[Example], trunk: Trunk | None = None) -> float:
    """Share of pairs whose chosen text (even places) scores above the rejected one; ties count half."""
    scores = score_examples(model, examples, trunk)
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(scores[::2], scores[1::2], strict=True)]
    return sum(wins) / max(1, len(wins))


@torch.no_grad()
def accuracy_by_kind(model: Role, tokenizer: Tokenizer, limit: int, split: str = "test") -> dict[str, float]:
    """Accuracy on each kind of negative, on pun words that no reward model was trained on."""
    rows = [row for kind in corpus.NEGATIVES for row in corpus.preference_rows((kind,), split)[:limit]]
    longest = model.model.config.max_positions
    rows = [
        row
        for row in rows
        if all(len(tokenizer.prompt_ids(row["prompt"]) + tokenizer.response_ids(row[s])) <= longest for s in SIDES)
    ]
    examples, _ = encode_pairs(rows, tokenizer, model.model)
    unique = list(dict.fromkeys(examples))
    scores = dict(zip(unique, score_examples(model, unique), strict=True))
    wins: dict[str, list[float]] = {}
    for number, row in enumerate(rows):
        better, worse = scores[examples[2 * number]], scores[examples[2 * number + 1]]
        wins.setdefault(row["kind"], []).append((better > worse) + 0.5 * (better == worse))
    return {kind: sum(values) / len(values) for kind, values in wins.items()}


def normalised(model: Role, policy: Role, tokenizer: Tokenizer, config: RewardConfig, prompts: Sequence[Any]) -> Role:
    """The same scores with gain and offset that give samples of the policy, on the training prompts, mean 0 and std 1."""
    distinct = list({str(prompt): prompt for prompt in prompts}.values())
    chosen = [distinct[i % len(distinct)] for i in range(config.normalise_samples)]
    examples = sft_samples(policy, tokenizer, chosen, config.seed, "normalise")
    scores = torch.tensor(score_examples(replace(model, normalisation=(1.0, 0.0)), examples))
    gain = 1 / max(float(scores.std()), 1e-6)
    return replace(model, normalisation=(gain, -float(scores.mean()) * gain))
