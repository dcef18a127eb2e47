"""Critic-free policy gradients with several samples a prompt: GRPO, Dr. GRPO, DAPO's loss, RLOO, REINFORCE++.

    punster grpo -n NAME -b 64 -a runs/SFT -c runs/REWARD [--variant grpo|dr_grpo|dapo|rloo|reinforce++]

| variant     | advantage                      | KL                | loss is normalised by                     |
| grpo        | (r - mean) / (std + 1e-4)      | k3 in the loss    | tokens of each response, then responses   |
| dr_grpo     | r - mean                       | k3 in the loss    | responses x longest allowed response      |
| dapo        | (r - mean) / (std + 1e-4)      | k3 in the loss    | tokens of the whole rollout; clip-higher  |
| rloo        | r - mean of the others         | k1 in the reward  | responses (the sum over their tokens)     |
| reinforce++ | return-to-go, batch-whitened   | k1 in the reward  | tokens of the whole rollout               |

Where the KL acts can be chosen for each (--kl-in).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from punster.algorithms.advantages import group_advantages, reinforce_pp_advantages
from punster.algorithms.kl import kl_estimate, kl_loss
from punster.algorithms.losses import clipped_policy_loss
from punster.config import GrpoConfig
from punster.model.role import Role
from punster.rewards import RewardFunction
from punster.rollout.logprobs import token_log_probs
from punster.train.checkpoint import State, end_step, restore
from punster.train.experience import Experience, collect, open_policy, sample_table
from punster.train.guard import Guard
from punster.train.optim import Cursor, learning_rate, make_optimizer, optimizer_step, seeded, within_memory
from punster.train.plan import announce
from punster.train.run import Run, check_name, marked
from punster.train.shaping import filter_prompts


def grpo(
    config: GrpoConfig, prompts: Sequence[Any] | None = None, reward: RewardFunction | None = None,
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> Path | None:  # fmt: skip
    """Train an adapter named "policy" on top of an SFT run; returns the run folder (None for a dry run)."""
    config = replace(config)  # the caller's stays as it is
    started = check_name(config, "grpo")
    setup = open_policy(config, prompts, reward)
    policy, tokenizer = setup.policy, setup.tokenizer
    steps = config.steps or 1
    if announce(config, "grpo", policy, steps, setup.dry_examples, work=setup.work):
        return None
    optimizer = make_optimizer(policy, config.lr, config.weight_decay)
    cursor = Cursor(filter_prompts(setup, config), seeded(config.seed, "data"))
    sampling, shuffling = seeded(config.seed, "sampling"), seeded(config.seed, "minibatches")
    generators = {"data": cursor.generator, "sampling": sampling, "minibatches": shuffling}
    state = State(
        policy, {"policy": optimizer}, generators, {"data": cursor}, numbers={"episodes": 0}, fixed=[setup.reward.model],
        given=setup.prompt_ids,
    )  # fmt: skip
    with Run(marked(config, prompts=prompts, reward=reward), "grpo", steps, started) as run:
        restore(run, state)
        guard = Guard(run, state, tokenizer, config.max_kl)
        for step in range(run.step + 1, steps + 1):
            guard.begin(step)
            rows = cursor.next(config.batch_size // config.samples)
            rollout = partial(
                collect, setup, rows, sampling, shuffling, minibatches=config.minibatches, samples=config.samples, with_graph=True
            )
            exp = within_memory(state, rollout)
            guard.check_rollout(exp.kl, exp.mask)
            scores = exp.scores - config.missing_eos_penalty * (~exp.finished)
            advantages = advantages_of(config, exp, scores)
            rate = learning_rate(config.lr, step - 1, steps, config.warmup)
            updates: list[dict[str, float]] = []
            for epoch in range(config.epochs):
                minibatches = exp.groups if epoch == 0 else exp.regroup(config.minibatches, shuffling)
                for groups in minibatches:
                    stats = within_memory(state, partial(train_step, config, exp, groups, policy, advantages))
                    if not updates and stats["ratio_gap"] > 1e-5 and state.numbers["max_tokens"] == exp.max_tokens:
                        raise RuntimeError(f"the ratio is off 1 by {stats['ratio_gap']:.2e} before the first update")
                    guard.check_losses({"the loss": stats["loss"]})
                    updates.append(stats | optimizer_step(optimizer, rate, config.max_grad_norm))
            spread = scores.view(-1, config.samples).std(1)
            state.numbers["episodes"] += len(exp.examples)
            metrics = {
                **exp.metrics(config.beta, scores),
                **{f"policy/{k}": sum(u[k] for u in updates) / len(updates) for k in ("loss", "clipfrac", "approx_kl", "ratio")},
                "grad_norm": sum(u["grad_norm"] for u in updates) / len(updates),
                "skipped_steps": sum(u["skipped_steps"] for u in updates),
                "lr": rate,
                "reward": float(scores.mean()),
                "reward_std": float(spread.mean()),
                "frac_reward_zero_std": float((spread < 1e-6).float().mean()),
                "episode": state.numbers["episodes"],
            }
            if config.eval_every and (step == steps or step % config.eval_every == 0):
                metrics |= sample_table(run, step, setup)
            run.log(step, metrics, f"score {metrics['objective/scores']:+.2f} kl {metrics['objective/exact_kl']:.1f}")
            run.samples(step, exp.sample_rows(4))
            end_step(run, step, metrics, state, tokenizer, callback)
        figures = sample_table(run, steps, setup)
        guard.check_end(figures)
        run.finish({"steps": steps, "episodes": state.numbers["episodes"], **figures})
        return run.folder


def advantages_of(config: GrpoConfig, exp: Experience, scores: Tensor) -> Tensor:
    """(B, R) advantages of the variant."""
    k1 = kl_estimate(exp.log_prob, exp.ref_log_prob) * exp.mask
    beta = config.beta if config.kl_place == "reward" else 0.0
    if config.variant == "reinforce++":
        return reinforce_pp_advantages(scores, k1, exp.mask, beta)
    scores = scores - beta * k1.sum(1)
    return group_advantages(scores, config.samples, config.variant)[:, None] * exp.mask


def token_weights(config: GrpoConfig, mask: Tensor) -> Tensor:
    """(B, R) weights that sum the per-token loss up to the variant's normalisation."""
    rows = mask.shape[0]
    if config.variant == "grpo":
        return mask / mask.sum(1, keepdim=True) / rows
    if config.variant == "dr_grpo":
        return mask / (rows * config.max_new_tokens)
    if config.variant == "rloo":
        return mask / rows
    return mask / mask.sum()


def train_step(
    config: GrpoConfig, exp: Experience, groups: list[list[int]], policy: Role, advantages: Tensor, max_tokens: int = 0
) -> dict[str, float]:
    """Accumulate the gradient over the micro-batches of one minibatch (with one: of the whole rollout)."""
    groups = exp.cut(groups, max_tokens)
    chosen = [row for group in groups for row in group]
    weights = torch.zeros_like(exp.mask, dtype=torch.float32)
    weights[chosen] = token_weights(config, exp.mask[chosen])
    tokens = float(exp.mask[chosen].sum())
    sums = dict.fromkeys(("loss", "clipfrac", "approx_kl", "ratio"), 0.0)
    largest = 0.0
    for rows in groups:
        batch = exp.trunk.collate(exp.examples, rows, policy.model.device)
        mask = batch.mask
        cut = (rows, slice(0, mask.shape[1]))
        first = exp.first_pass(rows)
        states = policy.response_hidden(batch) if first.states is None else first.states
        flat = token_log_probs(states, policy.model.head, batch.targets(), config.temperature, known=first.known)
        log_prob = batch.scatter(flat)
        # The clipped loss is linear in positive weights, so they can ride on the advantages.
        loss, stats = clipped_policy_loss(
            log_prob, exp.log_prob[cut], advantages[cut] * weights[cut], mask, config.clip, config.upper_clip
        )
        if config.beta and config.kl_place != "reward":
            kl = kl_loss(log_prob, exp.log_prob[cut], exp.ref_log_prob[cut], config.kl_place == "corrected")
            loss = loss + config.beta * (kl * weights[cut]).sum()
        loss.backward()
        sums["loss"] += float(loss.detach())
        for key in ("clipfrac", "approx_kl", "ratio"):
            sums[key] += float(stats[key]) / tokens
        largest = max(largest, float(stats["ratio_gap"]))
    return {**sums, "ratio_gap": largest}
