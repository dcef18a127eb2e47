"""PPO's options: KL penalties, score shaping, the filter and baseline of ChatGLM-RLHF, the SFT term, memory modes, the joined critic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import punster.train.ppo as ppo_module
from punster.config import DpoConfig, GrpoConfig, PpoConfig
from punster.config.train import KlPenalty
from punster.errors import UserError
from punster.model.role import Trunk
from punster.train import setup as loading
from punster.train.checkpoint import load_run
from punster.train.critic import make_critic
from punster.train.dpo import dpo
from punster.train.experience import open_policy
from punster.train.grpo import grpo
from punster.train.ppo import ppo
from punster.train.setup import open_base, own_copy
from punster.train.sft import held_out_loss
from punster.train.shaping import SftTerm, filter_prompts, reference_scores

Make = Callable[..., Any]
Config = Callable[..., PpoConfig]


def letters(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [sum(letter.isalpha() for letter in text) / 5 for text in completions]


def by_prompt(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Tells responses to the sea apart; to everything else all are worth 1."""
    return [len(text) if "sea" in prompt else 1.0 for prompt, text in zip(prompts, completions, strict=True)]


@pytest.fixture
def config(tiny_llama: Path, sft_run: str, tmp_path: Path, make: Make) -> Config:
    def build(name: str = "run", **settings: Any) -> PpoConfig:
        given: dict[str, Any] = {
            "model": str(tiny_llama), "actor": sft_run, "batch_size": 8, "steps": 3, "max_new_tokens": 8, "eval_prompts": 0,
            "lr": 1e-2, "critic_lr": 1e-3, "critic_warmup": 0, "stop_kl": 1e9,
        }  # fmt: skip
        return make(PpoConfig, name=name, out=str(tmp_path), **{**given, **settings})

    return build


@pytest.fixture
def rewards_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    """Scores, per-token KL, mask and beta of each rollout, as they enter the per-token rewards."""
    seen: list[Any] = []
    original = ppo_module.shaped_rewards

    def spy(*arguments: Any) -> torch.Tensor:
        seen.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(ppo_module, "shaped_rewards", spy)
    return seen


# ---- KL in the reward ---------------------------------------------------------------------------------------------
def test_every_penalty_trains_and_they_differ(config: Config, reader: Any) -> None:
    policies = {}
    for kind in get_args(KlPenalty):
        run = ppo(config(kind, kl_penalty=kind, beta=0.5), None, letters)
        policies[kind] = reader.adapter(run, "policy")
        penalty = reader.values(run, "objective/non_score_reward")
        assert abs(penalty[0]) < 1e-5  # policy = reference in the first rollout
        if kind == "none":
            assert penalty == [0.0] * 3
        elif kind == "exact":
            assert penalty[1:] == pytest.approx([-0.5 * kl for kl in reader.values(run, "objective/exact_kl")[1:]], rel=1e-5)
        elif kind != "k1":
            assert all(value < 0 for value in penalty[1:])  # all others are never negative for any token
    tensors = {kind: torch.cat([t.flatten() for t in found.values()]) for kind, found in policies.items()}
    assert all(not torch.equal(tensors[a], tensors[b]) for a in tensors for b in tensors if a != b)


# ---- scores -------------------------------------------------------------------------------------------------------
def test_scores_are_scaled_by_the_running_deviation_and_then_clipped(config: Config, reader: Any, rewards_seen: Any) -> None:
    plain = ppo(config("plain", steps=1, missing_eos_penalty=0.0), None, letters)
    ppo(config("scaled", steps=1, missing_eos_penalty=0.0, scale_rewards=True), None, letters)
    ppo(config("clipped", steps=1, missing_eos_penalty=0.0, scale_rewards=True, clip_rewards=1.5), None, letters)
    raw, scaled, clipped = (call[0] for call in rewards_seen)
    torch.testing.assert_close(scaled, raw / raw.std(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clipped, scaled.clamp(-1.5, 1.5))
    assert not torch.equal(clipped, scaled)
    assert reader.values(plain, "objective/scores")[0] == pytest.approx(float(raw.mean()))


def test_the_running_scale_survives_a_resume(config: Config, reader: Any, tmp_path: Path) -> None:
    settings = {"scale_rewards": True, "sft_coef": 0.1, "save_every": 1, "keep": 9, "steps": 4}
    whole = ppo(config("whole", **settings), None, letters)
    reader.interrupted_copy(whole, tmp_path / "cut", 2)
    text = (tmp_path / "cut" / "config.yaml").read_text().replace("name: whole", "name: cut")
    (tmp_path / "cut" / "config.yaml").write_text(text)
    resumed = ppo(config("cut", resume=True, **settings), None, letters)
    assert reader.tensor_bytes(resumed) == reader.tensor_bytes(whole)
    assert reader.lines(resumed) == reader.lines(whole)


def test_whitened_rewards_have_unit_deviation_and_keep_their_mean(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    original = ppo_module.gae

    def spy(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *rest: float) -> Any:
        seen.append(rewards[mask])
        return original(rewards, values, mask, *rest)

    monkeypatch.setattr(ppo_module, "gae", spy)
    for name, on in (("plain", False), ("white", True)):
        ppo(config(name, steps=1, whiten_rewards=on), None, letters)
    plain, white = seen
    assert float(white.std()) == pytest.approx(1, abs=1e-4) != pytest.approx(float(plain.std()), abs=0.1)
    assert float(white.mean()) == pytest.approx(float(plain.mean()), abs=1e-5)


def test_the_reference_baseline_is_one_fixed_response_a_prompt(config: Config, rewards_seen: Any) -> None:
    """The same seed gives the same rollout: what is subtracted is what the reference's own response to the prompt scores."""
    prompts = ["pun: sea 1", "pun: bread 2"]
    ppo(config("without", steps=1, missing_eos_penalty=0.3), prompts, letters)
    settings = config("with", steps=1, missing_eos_penalty=0.3, reference_baseline=True)
    ppo(settings, prompts, letters)
    difference = rewards_seen[0][0] - rewards_seen[1][0]
    setup = open_policy(config("again"), prompts, letters)
    of_prompt = reference_scores(setup, [0, 1], 1, 0.3)[:, 0]
    assert of_prompt[0] != of_prompt[1]
    assert sorted(set(difference.round(decimals=4).tolist())) == pytest.approx(sorted(of_prompt.tolist()), abs=1e-4)
    assert int((difference - of_prompt[0]).abs().lt(1e-4).sum()) == 4  # each prompt four times in a rollout of eight


def test_prompts_that_teach_nothing_are_dropped(config: Config, make: Make, tmp_path: Path) -> None:
    prompts = ["pun: sea 1", "pun: bread 2", "pun: sea 3", "pun: time 4"]
    settings = config(filter_std=0.5, filter_samples=6, missing_eos_penalty=0.0)
    setup = open_policy(settings, prompts, by_prompt)
    assert filter_prompts(setup, settings) == 2
    assert setup.prompts == ["pun: sea 1", "pun: sea 3"] and setup.prompt_ids[1] == setup.tokenizer.prompt_ids("pun: sea 3")
    asked: set[str] = set()

    def reward(given: list[Any], completions: list[str]) -> list[float]:
        if len(given) == 8:  # a rollout; the filter asks for 24
            asked.update(given)
        return by_prompt(given, completions)

    ppo(settings, prompts, reward)
    assert asked == {"pun: sea 1", "pun: sea 3"}
    with pytest.raises(UserError, match="no prompt is left"):
        ppo(config("none", filter_std=1e6, missing_eos_penalty=0.0), prompts, by_prompt)
    assert not (tmp_path / "none").exists()
    asked.clear()
    group = make(GrpoConfig, name="group", out=str(tmp_path), model=settings.model, actor=settings.actor, batch_size=8, samples=4,
                 steps=2, max_new_tokens=8, eval_prompts=0, filter_std=0.5, filter_samples=6, missing_eos_penalty=0.0)  # fmt: skip
    grpo(group, prompts, reward)
    assert asked == {"pun: sea 1", "pun: sea 3"}


# ---- forgetting ---------------------------------------------------------------------------------------------------
def test_the_sft_term_keeps_the_fine_tuning_loss_down(config: Config, reader: Any) -> None:
    losses = {}
    for name, coefficient in (("without", 0.0), ("with", 1.0)):
        settings = config(name, steps=8, sft_coef=coefficient, lr=2e-2)
        run = ppo(settings, None, letters)
        role, _ = load_run(run)
        examples = SftTerm(config(sft_coef=1.0), open_policy(settings, None, letters)).examples
        losses[name] = held_out_loss(role, examples, Trunk.compute(role.model, examples, []))
        logged = reader.values(run, "loss/sft")
        assert (logged == [0.0] * 8) if coefficient == 0 else all(value > 0 for value in logged)
    assert losses["with"] < losses["without"] - 0.1


def test_the_sft_terms_gradient_is_added_once_per_update(config: Config) -> None:
    """Twice the coefficient, twice the gradient; the loss is the mean over response tokens, without its coefficient."""
    norms = {}
    for coefficient in (1.0, 2.0):
        settings = config(sft_coef=coefficient)
        setup = open_policy(settings, None, letters)
        term = SftTerm(settings, setup)
        loss = term.accumulate(term.next(2), 4096)["sft"]
        assert term.cursor.order and len(term.examples) - len(term.cursor.order) == 4
        grads = [p.grad.clone() for p in setup.policy.parameters() if p.grad is not None]
        norms[coefficient] = (loss, torch.cat([g.flatten() for g in grads]))
    assert norms[1.0][0] == pytest.approx(norms[2.0][0])
    torch.testing.assert_close(2 * norms[1.0][1], norms[2.0][1])


# ---- where the weights are ----------------------------------------------------------------------------------------
def base_bytes(config: PpoConfig) -> tuple[int, int]:
    """Bytes of base weights that all roles of a run hold together, and those of one base."""
    setup = open_policy(config, None, None)
    roles = [setup.policy, setup.reference, setup.reward.model, make_critic(config, setup)]
    tensors = {t.data_ptr(): t.nbytes for role in roles if role for t in role.model.weights.values()}
    return sum(tensors.values()), sum({t.data_ptr(): t.nbytes for t in setup.policy.model.weights.values()}.values())


def test_memory_modes_hold_one_two_or_four_bases(config: Config, reward_run: str) -> None:
    copies = {}
    for mode in ("trunk", "hydra", "lora", "separate"):
        held, one = base_bytes(config(memory=mode, reward_model=reward_run))
        copies[mode] = held / one
    assert copies == {"trunk": 1, "hydra": 1, "lora": 2, "separate": 4}


def test_a_copy_shares_nothing_and_computes_the_same(config: Config) -> None:
    """Nor what the model made of its weights in an earlier pass."""
    setup = open_policy(config(), None, letters)
    ids = torch.tensor([setup.prompt_ids[0]])
    before = setup.reference.model.forward(ids, setup.reference.adapters)
    copied = own_copy(setup.reference)
    for tensor in setup.reference.model.weights.values():
        tensor.zero_()
    assert torch.equal(copied.model.forward(ids, copied.adapters), before)
    loading._BASES.clear()


@pytest.mark.parametrize("top_layers", ["1", "all"])
def test_memory_modes_compute_the_same(top_layers: str, config: Config, reward_run: str, reader: Any) -> None:
    """The same trainable parameters and the same seed: rollouts, losses and weights agree up to float noise."""
    runs = {
        mode: ppo(config(mode, memory=mode, reward_model=reward_run, top_layers=top_layers, steps=2, lr=1e-3))
        for mode in ("trunk", "hydra", "lora", "separate")
    }
    for mode, run in runs.items():
        assert [row["completion"] for row in reader.lines(run, "samples.jsonl")] == [
            row["completion"] for row in reader.lines(runs["trunk"], "samples.jsonl")
        ], mode
        for metric in ("objective/scores", "objective/exact_kl", "loss/policy_avg", "loss/value_avg", "grad_norm"):
            assert reader.values(run, metric) == pytest.approx(reader.values(runs["trunk"], metric), rel=1e-3, abs=1e-5)
        for name, tensor in reader.adapter(run, "policy").items():
            torch.testing.assert_close(tensor, reader.adapter(runs["trunk"], "policy")[name], rtol=0, atol=1e-4)


def test_a_joined_critic_shares_the_policys_adapter(config: Config, reward_run: str, reader: Any) -> None:
    settings = config(critic="joined", reward_model=reward_run, value_coef=1.0)
    setup = open_policy(settings, None, None)
    critic = make_critic(settings, setup)
    assert critic.adapters[-1] is setup.policy.adapters[-1]
    assert [name for name, _ in critic.named_parameters()] == ["head.weight", "head.bias"]
    run = ppo(settings)
    assert reader.values(run, "objective/exact_kl")[-1] > 1e-4
    assert len(set(reader.values(run, "loss/value_avg"))) == 3
    other = ppo(config("weak", critic="joined", reward_model=reward_run, value_coef=0.01))
    a, b = (reader.adapter(r, "policy") for r in (run, other))
    assert any(not torch.equal(a[name], b[name]) for name in a)  # the value loss reaches the shared adapter
    with pytest.raises(UserError, match="--critic joined needs"):
        config(critic="joined", adapter="none")


def test_a_joined_critics_warm_up_learns_the_head_only(config: Config, reader: Any) -> None:
    run = ppo(config(critic="joined", critic_warmup=2, steps=2), None, letters)
    assert all(float(t.abs().max()) == 0 for name, t in reader.adapter(run, "policy").items() if "lora_B" in name)
    assert all(norm > 0 for norm in reader.values(run, "critic_grad_norm"))


# ---- from the base ------------------------------------------------------------------------------------------------
def test_rl_without_fine_tuning_starts_from_the_base(config: Config, make: Make, tmp_path: Path, reader: Any) -> None:
    run = ppo(config(actor="base", prompt_format="{prompt}\n"), ["sea", "bread"], letters)
    exact = reader.values(run, "objective/exact_kl")
    assert abs(exact[0]) < 1e-5 < exact[-1]
    role, tokenizer = load_run(run)
    assert [adapter.name for adapter in role.adapters] == ["policy"] and tokenizer.prompt_format == "{prompt}\n"
    base, _ = open_base(config())
    assert role.model.fingerprint() == base.fingerprint()
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    direct = make(DpoConfig, name="dpo", out=str(tmp_path), model=config().model, actor="base", steps=1, batch_size=2)
    assert reader.values(dpo(direct, pairs), "rewards/margins") == pytest.approx([0.0], abs=1e-5)
