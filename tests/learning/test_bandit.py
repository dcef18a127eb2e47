"""A bandit whose optimum is known: one prompt, one token, a vocabulary of six. The loops themselves must find it.

With the KL in the reward, max E[r] - beta KL(pi || ref) has the solution pi* ~ ref exp(r / beta). GRPO as published (advantages
over the group's deviation, k3 in the loss) goes somewhere else: to a fixed point that is solved here by enumeration.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from punster.algorithms.kl import kl_loss
from punster.config import GrpoConfig, PpoConfig
from punster.config.train import KlPenalty, Variant
from punster.model.role import Role
from punster.train import setup
from punster.train.checkpoint import load_run
from punster.train.grpo import grpo
from punster.train.ppo import ppo
from punster.train.setup import open_base

WORDS = ("ask", "a", "b", "c", "d")
WORTH = {"": 0.3, "ask": 0.0, "a": 1.0, "b": 0.7, "c": 0.45, "d": 0.1}  # "" is the end-of-sequence token
BETA, SAMPLES = 0.5, 4


def worth(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [WORTH[text] for text in completions]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of six words, loud enough that its adapter can say anything with certainty."""
    folder = tmp_path_factory.mktemp("bandit")
    raw = Tokenizer(models.WordLevel({"<eos>": 0, **{word: i for i, word in enumerate(WORDS, 1)}}, unk_token="ask"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LlamaConfig(vocab_size=6, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.12, tie_word_embeddings=False,
                             eos_token_id=0, bos_token_id=None)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "_BASES", {})
        yield {
            "out": str(tmp_path_factory.mktemp("runs")), "model": str(folder), "actor": "base", "quiet": True, "device": "cpu",
            "dtype": "fp32", "top_layers": "all", "lora_r": 4, "lora_alpha": 8.0, "max_new_tokens": 1, "eval_prompts": 0,
            "missing_eos_penalty": 0.0, "beta": BETA, "seed": 4, "batch_size": 512, "steps": 100, "lr": 2e-2, "warmup": 0.0,
        }  # fmt: skip


def distribution(role: Role, tokenizer: Any) -> Tensor:
    logits = role.model.forward(torch.tensor([tokenizer.prompt_ids("ask")]), role.adapters)
    return logits[0, -1].double().detach().softmax(-1)


def reference(options: dict[str, Any]) -> Tensor:
    base, tokenizer = open_base(PpoConfig(name="x", model=options["model"], device="cpu", dtype="fp32"))
    return distribution(Role(base), tokenizer)


def learned(run: Path | None) -> Tensor:
    assert run is not None
    return distribution(*load_run(run))


def rewards() -> Tensor:
    return torch.tensor([WORTH[""], *(WORTH[word] for word in WORDS)], dtype=torch.float64)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum())


def optimum(ref: Tensor) -> Tensor:
    return (ref.log() + rewards() / BETA).softmax(-1)


# ---- published GRPO's own fixed point -----------------------------------------------------------------------------------
GROUPS = torch.tensor(list(itertools.product(range(6), repeat=SAMPLES)))  # all 1,296 groups
GROUP_REWARDS = rewards()[GROUPS]
ADVANTAGES = (GROUP_REWARDS - GROUP_REWARDS.mean(1, keepdim=True)) / (GROUP_REWARDS.std(1, keepdim=True) + 1e-4)


def published_gradient(log_prob: Tensor, ref: Tensor) -> Tensor:
    """Exact expected gradient of GRPO's loss in the logits, over every group that can be drawn."""
    logits = log_prob.clone().requires_grad_(True)
    fresh = logits.log_softmax(-1)
    chance = log_prob[GROUPS].sum(1).exp()
    policy = -(chance[:, None] * ADVANTAGES * fresh[GROUPS]).sum() / SAMPLES
    pull = BETA * (log_prob.exp() * kl_loss(fresh, log_prob, ref.log())).sum()
    return torch.autograd.grad(policy + pull, logits)[0]


def published_fixed_point(ref: Tensor) -> Tensor:
    log_prob = ref.log()
    for _ in range(4000):
        log_prob = (log_prob - 0.5 * published_gradient(log_prob, ref)).log_softmax(-1)
    assert float(published_gradient(log_prob, ref).abs().max()) < 1e-9
    return log_prob.exp()


def test_the_two_optima_are_far_apart(options: dict[str, Any]) -> None:
    """Otherwise reaching the one would show nothing about the other."""
    ref = reference(options)
    best, published = optimum(ref), published_fixed_point(ref)
    assert kl(best, published) > 0.05 and kl(published, best) > 0.05
    assert kl(best, ref) > 0.2 and kl(published, ref) > 0.2
    objective = [float((p * rewards()).sum()) - BETA * kl(p, ref) for p in (best, published, ref)]
    assert objective[0] > max(objective[1:]) + 0.05


# ---- the loops ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["k1", "exact"])
def test_ppo_reaches_the_optimum(kind: KlPenalty, options: dict[str, Any]) -> None:
    run = ppo(PpoConfig(name=kind, **options, epochs=1, critic_lr=1e-2, kl_penalty=kind), ["ask"], worth)
    ref = reference(options)
    assert kl(optimum(ref), learned(run)) < 0.01 and kl(learned(run), optimum(ref)) < 0.01


@pytest.mark.parametrize("variant", ["rloo", "reinforce++", "dr_grpo"])
def test_critic_free_methods_with_the_kl_in_the_reward_reach_the_optimum(variant: Variant, options: dict[str, Any]) -> None:
    """dr_grpo is GRPO without the division by the deviation."""
    config = GrpoConfig(name=variant.replace("+", "p"), **options, samples=SAMPLES, epochs=1, variant=variant, kl_in="reward")
    run = grpo(config, ["ask"], worth)
    ref = reference(options)
    assert kl(optimum(ref), learned(run)) < 0.01 and kl(learned(run), optimum(ref)) < 0.01


def test_published_grpo_reaches_its_own_fixed_point(options: dict[str, Any]) -> None:
    run = grpo(GrpoConfig(name="published", **options, samples=SAMPLES, epochs=1, variant="grpo"), ["ask"], worth)
    ref = reference(options)
    fixed = published_fixed_point(ref)
    assert kl(fixed, learned(run)) < 0.01 and kl(learned(run), fixed) < 0.01


def test_without_a_penalty_the_best_token_takes_everything(options: dict[str, Any]) -> None:
    run = ppo(PpoConfig(name="none", **options, epochs=1, critic_lr=1e-2, kl_penalty="none"), ["ask"], worth)
    assert float(learned(run)[1 + WORDS.index("a")]) > 0.95
