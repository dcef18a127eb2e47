"""Proximal policy optimisation (Schulman et al. 2017) with a per-token critic, on one frozen base.

    punster ppo -n NAME -b 64 -a runs/SFT -c runs/REWARD -s naive [--reward FILE.py:FUNCTION[:WEIGHT]]

One rollout: sample, run the trunk once, score, GAE; then several passes over the branch only. The old log-probs come
from the training path in the very micro-batches of the first pass, so the ratio is exactly 1 before the first update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from punster.algorithms.advantages import RunningScale, gae, inverse_std, masked_whiten, shaped_rewards
from punster.algorithms.kl import AdaptiveKL, kl_penalty
from punster.algorithms.losses import clipped_policy_loss, clipped_value_loss
from punster.config import PpoConfig
from punster.errors import speaker
from punster.model.role import Role
from punster.rewards import RewardFunction
from punster.rollout.logprobs import token_log_probs
from punster.train.checkpoint import State, end_step, restore
from punster.train.critic import calibrate, explained_variance, make_critic
from punster.train.experience import Experience, collect, open_policy, sample_table
from punster.train.guard import Guard
from punster.train.optim import Cursor, learning_rate, make_optimizer, optimizer_step, rows_used, seeded, within_memory
from punster.train.plan import announce
from punster.train.run import Run, check_name, marked
from punster.train.shaping import SftTerm, baseline_scores, filter_prompts


def ppo(
    config: PpoConfig, prompts: Sequence[Any] | None = None, reward: RewardFunction | None = None,
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> Path | None:  # fmt: skip
    """Train an adapter named "policy" on top of an SFT run; returns the run folder (None for a dry run)."""
    config = replace(config)  # the caller's stays as it is
    started = check_name(config, "ppo")
    setup = open_policy(config, prompts, reward)
    policy, tokenizer, steps = setup.policy, setup.tokenizer, config.steps or 1
    critic = make_critic(config, setup)
    if announce(config, "ppo", policy, steps, setup.dry_examples, work=setup.work):
        return None
    if steps <= config.critic_warmup:
        speaker(config.quiet)(f"note: --critic-warmup {config.critic_warmup} leaves none of the {steps} rollouts to the policy")
    optimizer = make_optimizer(policy, config.lr, config.weight_decay)
    critic_optimizer = make_optimizer(critic, config.critic_lr, config.weight_decay)
    count = filter_prompts(setup, config)
    baseline = baseline_scores(setup, config, rows_used(count, config.seed, steps * config.batch_size))
    cursor, sft_term = Cursor(count, seeded(config.seed, "data")), SftTerm(config, setup)
    sampling, shuffling = seeded(config.seed, "sampling"), seeded(config.seed, "minibatches")
    state = State(
        policy, {"policy": optimizer, "critic": critic_optimizer},
        {"data": cursor.generator, "sampling": sampling, "minibatches": shuffling, "sft": sft_term.cursor.generator},
        {"data": cursor, "sft": sft_term.cursor}, {"critic": critic}, {"beta": config.beta, "episodes": 0, "scale": [0.0, 0.0, 0.0]},
        [setup.reward.model], [*setup.prompt_ids, *sft_term.examples],
    )  # fmt: skip
    with Run(marked(config, prompts=prompts, reward=reward), "ppo", steps, started) as run:
        restore(run, state)
        within_memory(state, sft_term.prepare, "trunk_tokens")
        scale, guard = RunningScale(*state.numbers["scale"]), Guard(run, state, tokenizer, config.max_kl)
        controller = AdaptiveKL(
            state.numbers["beta"], config.target_kl, config.kl_horizon or max(2, math.ceil(steps / 10)) * config.batch_size
        )
        for step in range(run.step + 1, steps + 1):
            guard.begin(step)
            rows = cursor.next(config.batch_size)
            learns = step > config.critic_warmup
            rollout = partial(
                collect, setup, rows, sampling, shuffling, critic=critic, minibatches=config.minibatches, with_graph=learns and step > 1
            )  # fmt: skip
            exp = within_memory(state, rollout)
            guard.check_rollout(exp.kl, exp.mask)
            scores = exp.scores - config.missing_eos_penalty * (~exp.finished) - baseline[rows]
            deviation = scale.update(scores)
            if config.scale_rewards:
                scores = scores / deviation
            if config.clip_rewards is not None:
                scores = scores.clamp(-config.clip_rewards, config.clip_rewards)
            penalty = kl_penalty(exp.log_prob, exp.ref_log_prob, exp.kl, config.kl_penalty)
            rewards = shaped_rewards(scores, penalty, exp.mask, controller.beta)
            unit = inverse_std(rewards, exp.mask) if config.whiten_rewards else 1.0
            rewards = masked_whiten(rewards, exp.mask, shift_mean=False) if config.whiten_rewards else rewards
            if step == 1:
                calibrate(critic, exp, rewards, config.gamma)
            advantages, returns = gae(rewards, exp.values, exp.mask, config.gamma, config.lam)
            if config.kl_penalty == "exact":  # one KL for all tokens of a state: what each of them adds to it is k1's deviation
                advantages = advantages - unit * controller.beta * (exp.log_prob - exp.ref_log_prob - exp.kl) * exp.mask
            advantages = masked_whiten(advantages, exp.mask)
            rate = learning_rate(1.0, step - 1, steps, config.warmup)
            updates: list[dict[str, float]] = []
            for epoch in range(config.epochs):
                minibatches = exp.groups if epoch == 0 else exp.regroup(config.minibatches, shuffling)
                for groups in minibatches:
                    own_part = partial(train_step, config, exp, groups, policy, critic, advantages, returns, learns)
                    sft_part = partial(sft_term.accumulate, sft_term.next(config.minibatches) if learns else [])
                    stats = within_memory(state, partial(one_update, own_part, sft_part))
                    if not updates and stats["ratio_gap"] > 1e-5 and state.numbers["max_tokens"] == exp.max_tokens:
                        raise RuntimeError(f"the ratio is off 1 by {stats['ratio_gap']:.2e} before the first update")
                    guard.check_losses({f"the {key} loss": stats[key] for key in ("policy", "value", "sft") if key in stats})
                    if learns:
                        stats |= optimizer_step(optimizer, config.lr * rate, config.max_grad_norm)
                    value_stats = optimizer_step(critic_optimizer, config.critic_lr * rate, config.max_grad_norm)
                    updates.append(
                        stats | {"critic_grad_norm": value_stats["grad_norm"], "critic_skipped": value_stats["skipped_steps"]}
                    )
                if updates[-1]["approx_kl"] > config.stop_kl:
                    break
            state.numbers["episodes"] += len(rows)
            metrics = {
                **exp.metrics(controller.beta, scores, penalty),
                **update_metrics(updates),
                "val/explained_variance": explained_variance(exp, returns),
                "episode": state.numbers["episodes"],
                "beta": controller.beta,
            }
            if learns:  # no coefficient moves the KL of a policy that waits for its critic
                controller.update(metrics["objective/exact_kl"], len(rows))
            state.numbers |= {"beta": controller.beta, "scale": [scale.count, scale.mean, scale.squares]}
            if config.eval_every and (step == steps or step % config.eval_every == 0):
                metrics |= sample_table(run, step, setup)
            run.log(step, metrics, f"score {metrics['objective/scores']:+.2f} kl {metrics['objective/exact_kl']:.1f}")
            run.samples(step, exp.sample_rows(4))
            end_step(run, step, metrics, state, tokenizer, callback)
        figures = sample_table(run, steps, setup)
        guard.check_end(figures)
        run.finish({"steps": steps, "episodes": state.numbers["episodes"], **figures})
        return run.folder


def one_update(
    own: Callable[[int], dict[str, float]], added: Callable[[int], dict[str, float]], max_tokens: int
) -> dict[str, float]:
    """Two losses whose gradients add up to one update's: if memory runs out in the second, the first is done again too."""
    return own(max_tokens) | added(max_tokens)


def train_step(
    config: PpoConfig, exp: Experience, groups: list[list[int]], policy: Role, critic: Role,
    advantages: torch.Tensor, returns: torch.Tensor, with_policy: bool, max_tokens: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Accumulate both gradients over the micro-batches of one minibatch; statistics per token of the minibatch.

    A joined critic reads the policy's states, so one backward pass carries both losses; in the warm-up it learns its head only.
    """
    joined = config.critic == "joined"
    groups = exp.cut(groups, max_tokens)
    rows_all = [row for group in groups for row in group]
    tokens = float(exp.mask[rows_all].sum())
    sums = dict.fromkeys(("policy", "value", "clipfrac", "approx_kl", "ratio", "ratio_sq", "value_clipfrac"), 0.0)
    if not with_policy:
        sums["ratio"] = sums["ratio_sq"] = 1.0  # a policy that waits for its critic is where it was
    largest = 0.0
    for rows in groups:
        batch = exp.trunk.collate(exp.examples, rows, policy.model.device)
        width = batch.mask.shape[1]
        cut = (rows, slice(0, width))
        mask = batch.mask
        states, values, known = exp.first_pass(rows)
        if states is None and (with_policy or joined):
            states = policy.response_hidden(batch)
        both: list[torch.Tensor] = []
        if with_policy and states is not None:
            flat = token_log_probs(states, policy.model.head, batch.targets(), config.temperature, known=known)
            log_prob = batch.scatter(flat)
            loss, stats = clipped_policy_loss(log_prob, exp.log_prob[cut], advantages[cut], mask, config.clip)
            if joined:
                both.append(loss / tokens)
            else:
                (loss / tokens).backward()
            sums["policy"] += float(loss.detach()) / tokens
            for key in ("clipfrac", "approx_kl", "ratio"):
                sums[key] += float(stats[key]) / tokens
            ratio = ((log_prob.detach() - exp.log_prob[cut]) * mask).exp()
            sums["ratio_sq"] += float((ratio.square() * mask).sum()) / tokens
            largest = max(largest, float(stats["ratio_gap"]))
        if joined and states is not None and critic.head is not None:
            values = batch.scatter(critic.head(states if with_policy else states.detach()))
        elif values is None:
            values = critic.values(batch)
        assert values is not None
        value_loss, value_clipped = clipped_value_loss(values, exp.values[cut], returns[cut], mask, config.value_clip)
        both.append(config.value_coef * value_loss / tokens)
        sum(both[1:], both[0]).backward()
        sums["value"] += float(value_loss.detach()) / tokens
        sums["value_clipfrac"] += float(value_clipped) / tokens
    return {**sums, "ratio_gap": largest}


def update_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over the optimizer steps of one rollout, under TRL's names."""
    names = {
        "policy/approxkl_avg": "approx_kl", "policy/clipfrac_avg": "clipfrac", "loss/policy_avg": "policy",
        "loss/value_avg": "value", "val/clipfrac_avg": "value_clipfrac", "val/ratio": "ratio", "loss/sft": "sft",
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
