"""Direct preference optimisation (Rafailov et al. 2023) and its family: given pairs, on-policy pairs, or online.

    punster dpo -n NAME -b 16 -a runs/SFT [--loss-type sigmoid|ipo|hinge|robust|kto|orpo|simpo] [--online -c runs/REWARD]

Reference log-probs are computed once, from the SFT run, on the training path. The policy starts as the reference, so
the sigmoid loss of the first step is ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from punster.algorithms.losses import kto_loss, preference_loss
from punster.config import DpoConfig
from punster.data.batch import Batch, Example, epoch_order, token_batches
from punster.data.schema import Row
from punster.errors import UserError
from punster.model.role import Role, Trunk, score_examples
from punster.model.tokenizer import Tokenizer
from punster.model.transformer import Decoder
from punster.rollout.logprobs import token_log_probs
from punster.rollout.sampler import Decoding, generate, rows_at_once
from punster.train.checkpoint import State, end_step, restore
from punster.train.guard import keep_begun
from punster.train.held_out import first, own_rows, sample_table, say_shared
from punster.train.optim import Cursor, learning_rate, make_optimizer, optimizer_step, seeded, total_steps, within_memory
from punster.train.plan import announce, stage_work
from punster.train.rows import check_prompts, encode, kind_of_rows, load_prompts, load_rows, within_length
from punster.train.run import Run, check_name, marked
from punster.train.setup import extend, open_reward_model, open_start


def dpo(
    config: DpoConfig, rows: Sequence[Row] | None = None, callback: Callable[[int, dict[str, float]], None] | None = None,
    eval_rows: Sequence[Row] | None = None,
) -> Path | None:  # fmt: skip
    """Train an adapter named "policy" on top of an SFT run; returns the run folder (None for a dry run).

    rows, eval_rows: in the place of --data and --eval-data.
    """
    if not config.actor:
        raise UserError("an SFT run is needed to start from: -a runs/SFT (or -a base)")
    config = replace(config)  # the caller's stays as it is
    started = check_name(config, "dpo")
    if not (rows is None and eval_rows is None) and config.makes_pairs:
        raise UserError("rows were given, but --online and --pairs sampled make pairs of samples: they have no use for them")
    reference, tokenizer = open_start(config.actor, config)
    judge = open_reward_model(config.reward_model, config, reference, tokenizer) if config.reward_model else None
    policy = extend(reference, config, "policy")
    prompts: list[Any] = []
    if config.makes_pairs:
        prompts = load_prompts(config.prompts, quiet=config.quiet)[: config.prompt_limit or None]
    source = config.data if rows is None else rows
    given = [] if prompts else load_rows(source, kind_of_rows(config), columns=config.columns, quiet=config.quiet)
    own = own_rows(config, eval_rows)
    say_shared(config, own, given or [{"prompt": prompt} for prompt in prompts])
    held_out, held_out_labels = (
        ([], None) if prompts or not own else encode_given(config, own, reference.model, tokenizer, "row of --eval-data")
    )
    asked = [row["prompt"] for row in own]
    asked = asked or load_prompts(config.prompts, "val", quiet=True)
    shown = first(asked, config.eval_prompts, tokenizer, reference.model, config.max_new_tokens, config.quiet)
    prompt_ids = check_prompts(tokenizer, reference.model, prompts, config.max_new_tokens)
    if config.dry_run:
        texts = (
            encode_given(config, given, reference.model, tokenizer)[0] if given
            else [Example(tuple(ids), (0,) * config.max_new_tokens) for ids in prompt_ids for _ in range(2)]
        )  # fmt: skip
        unit = 2 if config.loss_type == "kto" else 1  # rows of a pair
        pairs = len(prompts) or len(texts) / 2
        count = unit * len(prompts) * (1 if config.online else config.pairs_per_prompt) or unit * len(texts) // 2
        prompt, response = (sum(len(getattr(text, part)) for text in texts) / len(texts) for part in ("prompt", "response"))
        work = stage_work(config, reference.model, rows=math.ceil(pairs), prompt=prompt, response=response)
        announce(config, "dpo", policy, total_steps(config, count, config.epochs), texts, work=work)
        return None
    examples, labels = load_examples(config, given, prompt_ids, reference, judge, tokenizer)
    unit = 1 if labels is not None else 2  # rows of KTO are single texts
    count = len(prompts) if config.online else len(examples) // unit
    steps = total_steps(config, count, config.epochs)
    optimizer = make_optimizer(policy, config.lr, config.weight_decay)
    cursor = Cursor(count, seeded(config.seed, "data"))
    sampling = seeded(config.seed, "sampling")
    given_data = prompt_ids if config.online else [*examples, *([] if labels is None else labels.tolist())]
    state = State(
        policy, {"policy": optimizer}, {"data": cursor.generator, "sampling": sampling}, {"data": cursor},
        numbers={"loss": 0.0}, fixed=[judge], given=given_data,
    )  # fmt: skip

    def prepared(examples: Sequence[Example], tokens: int) -> tuple[Trunk, Tensor]:
        trunk = Trunk.compute(policy, examples, [policy.frozen_depth], tokens)
        return trunk, response_log_probs(reference, examples, trunk, tokens)

    with Run(marked(config, data=rows, eval_data=eval_rows), "dpo", steps, started) as run:
        restore(run, state)
        trunk, ref_sums = within_memory(state, partial(prepared, examples), "trunk_tokens")
        known = within_memory(state, partial(prepared, held_out), "trunk_tokens")

        def losses(
            examples: Sequence[Example], labels: Tensor | None, units: list[int], known: tuple[Trunk, Tensor], max_tokens: int
        ) -> dict[str, float]:
            if labels is None:
                return pair_step(config, policy, examples, units, *known, max_tokens)
            return kto_step(config, policy, reference, examples, labels, units, *known, max_tokens)

        def evaluated(step: int) -> dict[str, float]:
            score = None if judge is None else lambda asked, texts, closed: score_examples(judge, closed)
            decoding = Decoding(config.max_new_tokens, config.temperature)
            found = sample_table(run, step, policy, tokenizer, shown, decoding, score=score, reference=reference)
            if held_out and "eval_loss" not in found:
                # Drawn, as KTO puts each text beside the next one's prompt, and a file may have those of one prompt together.
                every = epoch_order(len(held_out) // unit, seeded(config.seed, "evaluation"))
                with torch.no_grad():
                    looked_at = within_memory(state, partial(losses, held_out, held_out_labels, every, known))
                found |= {f"eval_{name}": value for name, value in looked_at.items()}
                run.held_out = (step, found)
            return found

        for step in range(run.step + 1, steps + 1):
            if step == steps and config.adapter == "lora":  # what comes after it may fail; own weights are too large for a copy
                keep_begun(run, state, tokenizer, step)
            units = cursor.next(config.batch_size)
            if config.online:
                assert judge is not None
                asked = [prompt_ids[u] for u in units]
                sample = partial(sampled_pairs, policy, judge, asked, config, tokenizer, sampling)
                examples, scores = within_memory(state, sample)
                units = list(range(len(examples) // 2))
                trunk, ref_sums = within_memory(state, partial(prepared, examples))
            rate = learning_rate(config.lr, step - 1, steps, config.warmup)
            if units:
                metrics = within_memory(state, partial(losses, examples, labels, units, (trunk, ref_sums)))
                metrics |= optimizer_step(optimizer, rate, config.max_grad_norm)
            else:  # all samples of each prompt are worth the same: nothing to learn from
                metrics = {"grad_norm": 0.0, "skipped_steps": 0.0, "lr": rate}
            if config.online:
                metrics |= {"objective/pairs": len(units), "objective/scores": sum(scores) / len(scores)}
            state.numbers["loss"] = metrics.get("loss", state.numbers["loss"])
            if step == steps or (config.eval_every and step % config.eval_every == 0):
                metrics |= evaluated(step)
            run.log(step, metrics, f"loss {state.numbers['loss']:.3f} margin {metrics.get('rewards/margins', 0.0):+.2f}")
            end_step(run, step, metrics, state, tokenizer, callback)
        run.finish({"steps": steps, "rows": count, "loss": state.numbers["loss"], **evaluated(steps)})
        return run.folder


# ---- data ---------------------------------------------------------------------------------------------------------
def load_examples(
    config: DpoConfig, given: Sequence[Row], prompt_ids: Sequence[Sequence[int]], reference: Role, judge: Role | None,
    tokenizer: Tokenizer,
) -> tuple[list[Example], Tensor | None]:  # fmt: skip
    """Examples 2i chosen, 2i + 1 rejected and None; or, for KTO, single texts with their labels (B,). Online there are none yet."""
    kto = config.loss_type == "kto"
    if config.online:
        return [], None
    if config.pairs == "sampled":
        assert judge is not None
        drawing = seeded(config.seed, "pairs")
        early = State(reference, {}, {"pairs": drawing}, numbers={"max_tokens": config.max_tokens})  # the run's own comes later
        examples, _ = within_memory(early, partial(sampled_pairs, reference, judge, prompt_ids, config, tokenizer, drawing))
        if not examples:
            raise UserError(
                "--pairs sampled: all samples of each prompt are worth the same; use more --samples or another reward"
            )
        return examples, torch.arange(len(examples)) % 2 == 0 if kto else None
    return encode_given(config, given, reference.model, tokenizer)


def encode_given(
    config: DpoConfig, rows: Sequence[Row], model: Decoder, tokenizer: Tokenizer, what: str = "row"
) -> tuple[list[Example], Tensor | None]:
    """Examples row by row and side by side, within --max-length, and KTO's labels (B,)."""
    sides = ("completion",) if config.loss_type == "kto" else ("chosen", "rejected")
    placed = [{"_place": f"{what} {number}", **row} for number, row in enumerate(rows, 1)]
    kept = within_length(config.max_length, placed, tokenizer, model, config.quiet, what)
    examples = [encode(tokenizer, model, row, side) for row in kept for side in sides]
    return examples, torch.tensor([bool(row["label"]) for row in kept]) if config.loss_type == "kto" else None


def sampled_pairs(
    policy: Role,
    judge: Role,
    prompts: Sequence[Sequence[int]],
    config: DpoConfig,
    tokenizer: Tokenizer,
    generator: torch.Generator,
    max_tokens: int = 0,
) -> tuple[list[Example], list[float]]:
    """Best (even places) and worst (odd) of several samples to each prompt, by reward less the missing-EOS penalty.

    With more pairs a prompt: the second best against the second worst, and so on. A response that does not end is never
    preferred, unless nothing else was drawn; as the worse one it teaches to end. A prompt whose best ended response is not
    worth more than its worst one gives no pair. Also the reward of every sample.
    """
    decoding = Decoding(config.max_new_tokens, config.temperature)
    share = (max_tokens or config.max_tokens) / config.max_tokens  # below 1 where memory has run out
    rollout = generate(policy, prompts, decoding, tokenizer.eos_id, generator, config.samples, rows_at_once(share))
    scores = score_examples(judge, rollout.closed, max_tokens=round(4096 * share))
    penalty = config.missing_eos_penalty
    worth = [score - penalty * (not done) for score, done in zip(scores, rollout.finished, strict=True)]
    groups = [range(start, start + config.samples) for start in range(0, len(worth), config.samples)]
    # Where nothing ends nothing should be preferred, unless there is no other choice at all.
    ending = [places for places in groups if any(rollout.finished[place] for place in places)] or groups
    pairs = []
    for places in ending:
        ranked = sorted(places, key=lambda i: (worth[i], i))
        better = [i for i in ranked[::-1] if rollout.finished[i]] or ranked[::-1]
        for place in range(config.pairs_per_prompt):
            if place < len(better) and worth[better[place]] > worth[ranked[place]]:
                pairs += [rollout.examples[better[place]], rollout.examples[ranked[place]]]
    return pairs, scores


# ---- steps --------------------------------------------------------------------------------------------------------
@torch.no_grad()
def response_log_probs(role: Role, examples: Sequence[Example], trunk: Trunk, max_tokens: int) -> Tensor:
    """(number of examples,) summed log-prob of each response."""
    sums = torch.zeros(len(examples))
    for group in token_batches([example.length for example in examples], max_tokens):
        batch = trunk.collate(examples, group, role.model.device)
        sums[group] = summed(role, batch)[0].cpu()
    return sums


def summed(role: Role, batch: Batch) -> tuple[Tensor, Tensor]:
    """(B,) summed log-probs of the responses and (B,) lengths."""
    flat = token_log_probs(role.response_hidden(batch), role.model.head, batch.targets())
    return batch.scatter(flat).sum(1), batch.response_lengths


def pair_step(
    config: DpoConfig,
    policy: Role,
    examples: Sequence[Example],
    units: list[int],
    trunk: Trunk,
    ref_sums: Tensor,
    max_tokens: int,
) -> dict[str, float]:
    """Accumulate one step's gradient over pairs, in micro-batches of at most max_tokens padded tokens; TRL's metric names."""
    count = len(units)
    chosen_tokens = sum(len(examples[2 * u].response) for u in units)
    padded = [2 * max(examples[2 * u].length, examples[2 * u + 1].length) for u in units]
    totals: dict[str, float] = {}
    for group in token_batches(padded, max_tokens):
        texts = [2 * units[i] for i in group] + [2 * units[i] + 1 for i in group]
        batch = trunk.collate(examples, texts, policy.model.device)
        sums, lengths = summed(policy, batch)
        reference = ref_sums[texts].to(sums.device)
        (chosen, rejected), (ref_chosen, ref_rejected) = sums.chunk(2), reference.chunk(2)
        chosen_length, rejected_length = lengths.chunk(2)
        losses = preference_loss(
            chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, config.loss_type, config.beta,
            config.label_smoothing, config.simpo_gamma,
        )  # fmt: skip
        loss = losses.sum() / count
        if config.loss_type == "orpo" or config.sft_coef:
            weight = 1.0 if config.loss_type == "orpo" else config.sft_coef
            loss = loss - weight * chosen.sum() / chosen_tokens
        if loss.requires_grad:  # of held-out pairs it is looked at alone
            loss.backward()
        rewards_chosen = config.beta * (chosen - ref_chosen).detach()
        rewards_rejected = config.beta * (rejected - ref_rejected).detach()
        parts = {
            "loss": float(loss.detach()),
            "rewards/chosen": float(rewards_chosen.sum()) / count,
            "rewards/rejected": float(rewards_rejected.sum()) / count,
            "rewards/accuracies": float((rewards_chosen > rewards_rejected).sum()) / count,
            "rewards/margins": float((rewards_chosen - rewards_rejected).sum()) / count,
            "logps/chosen": float(chosen.detach().sum()) / count,
            "logps/rejected": float(rejected.detach().sum()) / count,
        }
        totals = {key: totals.get(key, 0.0) + value for key, value in parts.items()}
    return totals


def kto_step(
    config: DpoConfig, policy: Role, reference: Role, examples: Sequence[Example], labels: Tensor, units: list[int], trunk: Trunk,
    ref_sums: Tensor, max_tokens: int,
) -> dict[str, float]:  # fmt: skip
    """KTO on single texts; z is estimated on mismatched prompt and completion pairs of the same step, without gradient."""
    z = mismatched_kl(policy, reference, [examples[u] for u in units], max_tokens)
    totals: dict[str, float] = {"kl": float(z)}
    for group in token_batches([examples[u].length for u in units], max_tokens):
        rows = [units[i] for i in group]
        batch = trunk.collate(examples, rows, policy.model.device)
        log_ratio = summed(policy, batch)[0] - ref_sums[rows].to(policy.model.device)
        desirable = labels[rows].to(policy.model.device)
        loss = kto_loss(log_ratio, desirable, z, config.beta).sum() / len(units)
        if loss.requires_grad:
            loss.backward()
        reward = config.beta * log_ratio.detach()
        parts = {
            "loss": float(loss.detach()),
            "rewards/chosen": float(reward[desirable].sum()) / max(1, int(labels[units].sum())),
            "rewards/rejected": float(reward[~desirable].sum()) / max(1, int((~labels[units]).sum())),
        }
        totals = {**totals, **{key: totals.get(key, 0.0) + value for key, value in parts.items()}}
    totals["rewards/margins"] = totals["rewards/chosen"] - totals["rewards/rejected"]
    return totals


@torch.no_grad()
def mismatched_kl(policy: Role, reference: Role, examples: Sequence[Example], max_tokens: int) -> Tensor:
    """max(0, mean log-ratio) of each prompt with the next row's response: KTO's reference point."""
    room = policy.model.config.max_positions
    following = [*examples[1:], examples[0]]
    crossed = [Example(a.prompt, b.response[: room - len(a.prompt)]) for a, b in zip(examples, following, strict=True)]
    trunk = Trunk.compute(policy, crossed, [policy.frozen_depth], max_tokens)
    ours, theirs = (response_log_probs(role, crossed, trunk, max_tokens) for role in (policy, reference))
    return (ours - theirs).mean().clamp(min=0)
