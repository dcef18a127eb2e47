"""PPO's critic: where it starts, how its scale is found, how well it predicts."""

from __future__ import annotations

from dataclasses import replace

import torch

from punster.algorithms.advantages import gae, masked_mean
from punster.config import PpoConfig
from punster.model.heads import ScalarHead
from punster.model.role import Role
from punster.train.experience import Experience, Setup
from punster.train.setup import extend, own_copy


def make_critic(config: PpoConfig, setup: Setup) -> Role:
    """A value per token: the reward model's adapter (copied) and head with its normalisation folded in.

    Without a reward model: a fresh adapter and a zero head on the reference. Joined (Santacroce et al. 2023): a zero head
    on the policy's own states, whose adapter then learns from both losses.
    """
    reward_model, reference = setup.reward.model, setup.reference
    width, device = reference.model.config.d_model, reference.model.device
    zero = ScalarHead(torch.zeros(width, device=device), torch.zeros((), device=device)).trainable()
    if config.critic == "joined":
        return replace(setup.policy, head=zero, trained=())
    if reward_model is not None and reward_model.head is not None and reward_model.adapters:
        *below, last = reward_model.adapters
        trained = last.copy("critic").trainable()
        head = reward_model.head.scaled(*reward_model.normalisation).trainable()
        plain = replace(reward_model, normalisation=(1.0, 0.0), others=(), aux={})
        critic = replace(plain, adapters=(*below, trained), head=head, trained=("critic",))
        return own_copy(critic) if config.memory == "separate" else critic
    critic = extend(reference, replace(config, adapter="lora", seed=config.seed + 1), "critic")
    return replace(own_copy(critic) if config.memory in ("lora", "separate") else critic, head=zero)


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


def explained_variance(exp: Experience, returns: torch.Tensor) -> float:
    """1 - Var(return - V) / Var(return) over response tokens."""
    mean = masked_mean(returns, exp.mask)
    error = returns - exp.values
    total = masked_mean((returns - mean).square(), exp.mask)
    left = masked_mean((error - masked_mean(error, exp.mask)).square(), exp.mask)
    return float(1 - left / total.clamp(min=1e-8))
