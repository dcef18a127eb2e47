"""Proximal policy optimisation (Schulman et al. 2017) with a per-token critic, on one frozen base.

    punster ppo -n NAME -b 64 -a runs/SFT -c runs/REWARD -s naive [--reward FILE.py:FUNCTION[:WEIGHT]]

One rollout: sample, run the trunk once, score, GAE; then several passes over the branch only. The old log-probs come
from the training path in the very micro-batches of the first pass, so the ratio is exactly 1 before the first update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from punster.algorithms.advantages import gae, masked_mean, masked_whiten, shaped_rewards
from punster.algorithms.kl import AdaptiveKL, FixedKL
from punster.algorithms.losses import clipped_policy_loss, clipped_value_loss
from punster.config import PpoConfig
from punster.model.heads import ScalarHead
from punster.model.role import Role
from punster.rewards import RewardFunction
from punster.rollout.logprobs import token_log_probs
from punster.train.experience import Experience, collect, open_policy, sample_table
from punster.train.plan import announce
from punster.train.run import (
    Cursor,
    Run,
    State,
    learning_rate,
    make_optimizer,
    optimizer_step,
    restore,
    save_checkpoint,
    seeded,
)  # fmt: skip
from punster.train.setup import extend


def ppo(
    config: PpoConfig, prompts: Sequence[Any] | None = None, reward: RewardFunction | None = None,
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> Path | None:  # fmt: skip
    """Train an adapter named "policy" on top of an SFT run; returns the run folder (None for a dry run)."""
    setup = open_policy(config, prompts, reward)
    policy, reference, tokenizer = setup.policy, setup.reference, setup.tokenizer
    critic = make_critic(config, setup.reward.model, reference)
    steps = config.steps or 1
    if announce(config, "ppo", policy, steps, setup.dry_examples):
        return None
    optimizer, names = make_optimizer(policy, config.lr, config.weight_decay)
    critic_optimizer, critic_names = make_optimizer(critic, config.critic_lr, config.weight_decay)
    cursor = Cursor(len(setup.prompts), seeded(config.seed, "data"))
    sampling, shuffling = seeded(config.seed, "sampling"), seeded(config.seed, "minibatches")
    state = State(
        policy, {"policy": (optimizer, names), "critic": (critic_optimizer, critic_names)},
        {"data": cursor.generator, "sampling": sampling, "minibatches": shuffling}, {"data": cursor}, {"critic": critic},
        {"beta": config.beta, "episodes": 0},
    )  # fmt: skip
    with Run(config, "ppo", steps) as run:
        restore(run, state)
        beta = state.numbers["beta"]
        controller = FixedKL(beta) if config.target_kl is None else AdaptiveKL(beta, config.target_kl, config.kl_horizon)
        for step in range(run.step + 1, steps + 1):
            rows = cursor.next(config.batch_size)
            exp = collect(setup, rows, sampling, shuffling, critic=critic, minibatches=config.minibatches)
            scores = exp.scores - config.missing_eos_penalty * (~exp.finished)
            if config.whiten_rewards:
                scores = scores / (scores.std() + 1e-8)
            rewards = shaped_rewards(scores, exp.log_prob - exp.ref_log_prob, exp.mask, controller.beta)
            if step == 1:
                calibrate(critic, exp, rewards, config.gamma)
            advantages, returns = gae(rewards, exp.values, exp.mask, config.gamma, config.lam)
            advantages = masked_whiten(advantages, exp.mask)
            rate = learning_rate(1.0, step - 1, steps, config.warmup)
            updates: list[dict[str, float]] = []
            for epoch in range(config.epochs):
                minibatches = exp.groups if epoch == 0 else exp.regroup(config.minibatches, shuffling)
                for groups in minibatches:
                    stats = train_step(config, exp, groups, policy, critic, advantages, returns, step > config.critic_warmup)
                    if not updates and stats["ratio_gap"] > 1e-5:
                        raise RuntimeError(f"the ratio is off 1 by {stats['ratio_gap']:.2e} before the first update")
                    if step > config.critic_warmup:
                        stats |= optimizer_step(optimizer, config.lr * rate, config.max_grad_norm)
                    value_stats = optimizer_step(critic_optimizer, config.critic_lr * rate, config.max_grad_norm)
                    updates.append(
                        stats | {"critic_grad_norm": value_stats["grad_norm"], "critic_skipped": value_stats["skipped_steps"]}
                    )
                if updates[-1]["approx_kl"] > config.stop_kl:
                    break
            state.numbers["episodes"] += len(rows)
            metrics = {
                **exp.metrics(controller.beta, scores),
                **update_metrics(updates),
                "val/explained_variance": explained_variance(exp, returns),
                "episode": state.numbers["episodes"],
                "beta": controller.beta,
            }
            controller.update(metrics["objective/exact_kl"], len(rows))
            state.numbers["beta"] = controller.beta
            if config.eval_every and step % config.eval_every == 0:
                metrics |= sample_table(run, step, setup)
            run.log(step, metrics, f"score {metrics['objective/scores']:+.2f} kl {metrics['objective/exact_kl']:.1f}")
            run.samples(step, exp.sample_rows(setup, 4))
            if callback is not None:
                callback(step, metrics)
            if run.save_due(step):
                save_checkpoint(run, step, state, tokenizer)
                run.raise_if_stopped()
        run.finish({"steps": steps, "episodes": state.numbers["episodes"], **sample_table(run, steps, setup)})
        return run.folder


def train_step(
    config: PpoConfig, exp: Experience, groups: list[list[int]], policy: Role, critic: Role,
    advantages: torch.Tensor, returns: torch.Tensor, with_policy: bool,
) -> dict[str, float]:  # fmt: skip
    """Accumulate both gradients over the micro-batches of one minibatch; statistics per token of the minibatch."""
    rows_all = [row for group in groups for row in group]
    tokens = float(exp.mask[rows_all].sum())
    sums = dict.fromkeys(("policy", "value", "clipfrac", "approx_kl", "ratio", "ratio_sq", "value_clipfrac"), 0.0)
    largest = 0.0
    for rows in groups:
        batch = exp.trunk.collate(exp.examples, rows, policy.model.device)
        width = batch.mask.shape[1]
        cut = (rows, slice(0, width))
        mask = batch.mask
        if with_policy:
            flat = token_log_probs(policy.response_hidden(batch), policy.model.head, batch.targets(), config.temperature)
            log_prob = batch.scatter(flat)
            loss, stats = clipped_policy_loss(log_prob, exp.log_prob[cut], advantages[cut], mask, config.clip)
            (loss / tokens).backward()
            sums["policy"] += float(loss.detach()) / tokens
            for key in ("clipfrac", "approx_kl", "ratio"):
                sums[key] += float(stats[key]) / tokens
            ratio = ((log_prob.detach() - exp.log_prob[cut]) * mask).exp()
            sums["ratio_sq"] += float((ratio.square() * mask).sum()) / tokens
            largest = max(largest, float(stats["ratio_gap"]))
        values = critic.values(batch)
        value_loss, value_clipped = clipped_value_loss(values, exp.values[cut], returns[cut], mask, config.value_clip)
        (config.value_coef * value_loss / tokens).backward()
        sums["value"] += float(value_loss.detach()) / tokens
        sums["value_clipfrac"] += float(value_clipped) / tokens
    return {**sums, "ratio_gap": largest}


def make_critic(config: PpoConfig, reward_model: Role | None, reference: Role) -> Role:
    """A value per token: the reward model's adapter (copied) and head with its normalisation folded in.

    Without a reward model: a fresh adapter and a zero head on the reference.
    """
    if reward_model is not None and reward_model.head is not None and reward_model.adapters:
        *below, last = reward_model.adapters
        trained = last.copy("critic").trainable()
        head = reward_model.head.scaled(*reward_model.normalisation).trainable()
        return replace(
            reward_model, adapters=(*below, trained), head=head, trained=("critic",), normalisation=(1.0, 0.0), others=(), aux={}
        )
    critic = extend(reference, replace(config, adapter="lora", seed=config.seed + 1), "critic")
    width, device = reference.model.config.d_model, reference.model.device
    head = ScalarHead(torch.zeros(width, device=device), torch.zeros((), device=device)).trainable()
    return replace(critic, head=head)


@torch.no_grad()
def calibrate(critic: Role, exp: Experience, rewards: torch.Tensor, gamma: float) -> None:
    """Scale and shift the head to the least-squares fit of the first rollout's discounted returns, and its values with it.

    A reward model reads whole texts: as values of unfinished ones its numbers are right in their order at best. Where not
    even that holds, the scale becomes 0 and the critic starts from the mean return.
    """
    assert critic.head is not None
    returns, _ = gae(rewards, torch.zeros_like(rewards), exp.mask, gamma, 1.0)
    mean_return, mean_value = masked_mean(returns, exp.mask), masked_mean(exp.values, exp.mask)
    centred = exp.values - mean_value
    variance = masked_mean(centred.square(), exp.mask)
    gain = (masked_mean(centred * (returns - mean_return), exp.mask) / variance.clamp(min=1e-8)).clamp(min=0.0)
    offset = mean_return - gain * mean_value
    critic.head.weight.mul_(gain)
    critic.head.bias.mul_(gain).add_(offset)
    exp.values = (exp.values * gain + offset) * exp.mask


def update_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over the optimizer steps of one rollout, under TRL's names."""
    names = {
        "policy/approxkl_avg": "approx_kl", "policy/clipfrac_avg": "clipfrac", "loss/policy_avg": "policy",
        "loss/value_avg": "value", "val/clipfrac_avg": "value_clipfrac", "val/ratio": "ratio",
        "critic_grad_norm": "critic_grad_norm", "grad_norm": "grad_norm", "lr": "lr", "skipped_steps": "skipped_steps", "critic_skipped_steps": "critic_skipped",
    }  # fmt: skip
    count = len(updates)
    means = {name: sum(u.get(key, 0.0) for u in updates) / count for name, key in names.items()}
    squares = sum(u["ratio_sq"] for u in updates) / count
    means["val/ratio_var"] = max(0.0, squares - means["val/ratio"] ** 2) if means["val/ratio"] else 0.0
    means["skipped_steps"] *= count
    means["critic_skipped_steps"] *= count
    means["updates"] = count
    return means


def explained_variance(exp: Experience, returns: torch.Tensor) -> float:
    """1 - Var(return - V) / Var(return) over response tokens."""
    mean = masked_mean(returns, exp.mask)
    error = returns - exp.values
    total = masked_mean((returns - mean).square(), exp.mask)
    left = masked_mean((error - masked_mean(error, exp.mask)).square(), exp.mask)
    return float(1 - left / total.clamp(min=1e-8))
