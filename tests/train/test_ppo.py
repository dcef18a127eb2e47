"""PPO: ratio exactly 1 before the first update, the reference frozen, rewards through the API, clear errors."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import punster.train.ppo as ppo_module
from punster.algorithms.losses import clipped_policy_loss
from punster.config import PpoConfig, RewardConfig, SftConfig
from punster.data.batch import Example
from punster.errors import UserError
from punster.model.load import load_model
from punster.model.role import score_examples
from punster.train.checkpoint import load_run
from punster.train.critic import calibrate, make_critic
from punster.train.experience import Experience, FirstPass, collect, open_policy, partition
from punster.train.optim import seeded
from punster.train.ppo import ppo
from punster.train.reward import train_reward
from punster.train.rows import encode
from punster.train.sft import sft

Make = Callable[..., Any]
Config = Callable[..., PpoConfig]


def letters(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [sum(letter.isalpha() for letter in text) / 5 for text in completions]


@pytest.fixture
def config(tiny_llama: Path, sft_run: str, tmp_path: Path, make: Make) -> Config:
    def build(name: str = "run", **settings: Any) -> PpoConfig:
        given: dict[str, Any] = {
            "model": str(tiny_llama), "actor": sft_run, "batch_size": 8, "steps": 3, "max_new_tokens": 8, "eval_prompts": 2,
            "lr": 1e-3, "critic_lr": 1e-3, "critic_warmup": 0,
        }  # fmt: skip
        return make(PpoConfig, name=name, out=str(tmp_path), **{**given, **settings})

    return build


@pytest.fixture
def policy_losses(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """Statistics of every call of the policy loss, in order."""
    seen: list[dict[str, float]] = []

    def spy(*arguments: Any) -> Any:
        loss, stats = clipped_policy_loss(*arguments)
        seen.append({key: float(value) for key, value in stats.items()})
        return loss, stats

    monkeypatch.setattr(ppo_module, "clipped_policy_loss", spy)
    return seen


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ratio_is_exactly_one_before_the_first_update_only(
    adapter: str, family: str, config: Config, policy_losses: list[dict[str, float]], tiny_gpt2: Path, tmp_path: Path, make: Make
) -> None:
    """Several micro-batches: those of the first pass are the ones the old log-probs came from."""
    actor = {}
    if family == "gpt2":
        run = sft(make(SftConfig, name="gpt2", out=str(tmp_path), model=str(tiny_gpt2), steps=2, batch_size=8))
        actor = {"actor": str(run), "model": str(tiny_gpt2)}
    ppo(config(steps=1, epochs=2, max_tokens=64, adapter=adapter, stop_kl=1e9, **actor), None, letters)
    half = len(policy_losses) // 2
    assert half >= 3
    assert all(stats["ratio_gap"] == 0.0 and stats["clipfrac"] == 0 for stats in policy_losses[:half])
    assert all(stats["ratio_gap"] > 1e-6 for stats in policy_losses[half:])


def test_clipping_happens_at_a_large_learning_rate(config: Config, reader: Any) -> None:
    run = ppo(config(lr=3e-2, stop_kl=1e9, minibatches=2, clip=0.05), None, letters)
    assert max(reader.values(run, "policy/clipfrac_avg")) > 0.05
    assert max(reader.values(run, "policy/approxkl_avg")) > 1e-3
    assert max(reader.values(run, "val/ratio_var")) > 0


def test_exact_kl_is_zero_at_the_first_rollout_and_positive_later(config: Config, reader: Any) -> None:
    run = ppo(config(lr=1e-2, steps=4), None, letters)
    exact, sampled = reader.values(run, "objective/exact_kl"), reader.values(run, "objective/kl")
    assert abs(exact[0]) < 1e-5 and abs(sampled[0]) < 1e-5
    assert all(kl > 1e-3 for kl in exact[2:])
    assert reader.values(run, "objective/non_score_reward")[0] == pytest.approx(0, abs=1e-6)


def test_the_samplers_log_probs_are_the_training_ones(config: Config, reader: Any) -> None:
    run = ppo(config(lr=1e-2, temperature=0.7), None, letters)
    assert max(reader.values(run, "sampler_gap")) < 1e-4


def test_reference_base_and_sft_adapter_are_bit_identical_afterwards(
    config: Config, sft_run: str, tiny_llama: Path, reader: Any
) -> None:
    from punster.train.setup import shared_base

    before = {name: tensor.clone() for name, tensor in load_model(str(tiny_llama)).weights.items()}
    given = reader.adapter(sft_run, "sft")
    run = ppo(config(lr=3e-2), None, letters)
    assert all(torch.equal(reader.adapter(run, "sft")[name], given[name]) for name in given)
    assert all(torch.equal(reader.adapter(sft_run, "sft")[name], given[name]) for name in given)
    shared = shared_base(str(tiny_llama), PpoConfig(device="cpu", dtype="fp32"))
    assert all(torch.equal(before[name], tensor) for name, tensor in shared.weights.items())
    moved = reader.adapter(run, "policy")
    assert max(float(tensor.abs().max()) for name, tensor in moved.items() if "lora_B" in name) > 1e-3


def test_critic_warm_up_leaves_the_policy_alone(config: Config, reader: Any) -> None:
    run = ppo(config(steps=2, critic_warmup=2), None, letters)
    assert all(float(tensor.abs().max()) == 0 for name, tensor in reader.adapter(run, "policy").items() if "lora_B" in name)
    assert all(norm > 0 for norm in reader.values(run, "critic_grad_norm"))
    assert reader.values(run, "objective/exact_kl") == pytest.approx([0, 0], abs=1e-5)


def test_the_critic_starts_as_the_normalised_reward_model(config: Config, reward_run: str) -> None:
    settings = config(reward_model=reward_run)
    setup = open_policy(settings, None, None)
    model = setup.reward.model
    assert model is not None and model.normalisation != (1.0, 0.0)
    critic = make_critic(settings, setup)
    examples = [
        encode(setup.tokenizer, model.model, {"prompt": "pun: sea", "completion": text})
        for text in ("the tide", "a whale of a time")
    ]
    assert score_examples(critic, examples) == pytest.approx(score_examples(model, examples), abs=1e-5)
    assert critic.parameters() and all(tensor.requires_grad for tensor in critic.parameters())
    assert not any(tensor.requires_grad for adapter in model.adapters for tensor in adapter.parameters())


def test_the_first_rollout_calibrates_the_critic(config: Config, reward_run: str) -> None:
    """Least squares by torch.linalg: the head's scale and shift, and the rollout's values with them; never a negative scale."""
    setup = open_policy(config(reward_model=reward_run), None, None)
    critic = make_critic(config(), setup)
    exp = collect(setup, [0, 1, 2, 3, 4, 5], seeded(1, "sampling"), seeded(1, "minibatches"), critic=critic)
    assert critic.head is not None
    before, weight, bias = exp.values[exp.mask], critic.head.weight.clone(), critic.head.bias.clone()
    to_go = 3 * exp.values + 0.5 + 0.1 * torch.sin(torch.arange(exp.mask.numel()).view(exp.mask.shape))
    rewards = (to_go - torch.nn.functional.pad(to_go * exp.mask, (0, 1))[:, 1:]) * exp.mask
    calibrate(critic, exp, rewards, 1.0)
    design = torch.stack([before, torch.ones_like(before)], 1)
    gain, offset = torch.linalg.lstsq(design, to_go[exp.mask][:, None]).solution[:, 0]
    torch.testing.assert_close(critic.head.weight, weight * gain, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(critic.head.bias, bias * gain + offset, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(exp.values[exp.mask], before * gain + offset, rtol=1e-3, atol=1e-4)
    calibrate(critic, exp, -rewards, 1.0)
    assert not critic.head.weight.any() and (exp.values[exp.mask] - exp.values[exp.mask][0]).abs().max() < 1e-6


@pytest.mark.parametrize("critic", ["separate", "joined"])
def test_the_first_update_reuses_the_forward_pass_of_the_old_log_probs(
    critic: str, config: Config, reward_run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights to the last bit as with that pass repeated; from the second rollout on, as the first one calibrates the critic."""
    taken: list[bool] = []
    first_pass = Experience.first_pass

    def spy(self: Experience, rows: list[int]) -> Any:
        found = first_pass(self, rows)
        taken.append(found[0] is not None)
        return found

    def weights(name: str) -> bytes:
        run = ppo(config(name, reward_model=reward_run, critic=critic, epochs=2, minibatches=1))
        assert run is not None
        return (run / "checkpoints" / "step-3" / "adapters" / "policy" / "adapter_model.safetensors").read_bytes()

    monkeypatch.setattr(Experience, "first_pass", spy)
    kept = weights("kept")
    assert taken == [False, False, True, False, True, False]
    monkeypatch.setattr(Experience, "first_pass", lambda self, rows: FirstPass())
    assert weights("repeated") == kept


def test_cut_off_responses_are_scored_as_if_they_had_ended(config: Config, reward_run: str) -> None:
    setup = open_policy(config(reward_model=reward_run, max_new_tokens=2), None, None)
    exp = collect(setup, [0, 1, 2, 3], seeded(1, "sampling"), seeded(1, "minibatches"))
    eos = setup.tokenizer.eos_id
    assert not bool(exp.finished.all()) and setup.reward.model is not None
    closed = [e if done else replace(e, response=(*e.response, eos)) for e, done in zip(exp.examples, exp.finished, strict=True)]
    assert exp.scores.tolist() == pytest.approx(score_examples(setup.reward.model, closed), abs=1e-5)
    assert exp.scores.tolist() != pytest.approx(score_examples(setup.reward.model, exp.examples), abs=1e-3)


def test_rewards_of_model_and_function_reach_the_scores(config: Config, reward_run: str, tmp_path: Path, reader: Any) -> None:
    """Samples in samples.jsonl carry the score: model + 100 * function, checked by scoring the logged texts again."""
    path = tmp_path / "mine.py"
    path.write_text("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    seen: list[tuple[list[Any], list[str]]] = []

    def spy(prompts: list[Any], completions: list[str]) -> list[float]:
        seen.append((prompts, completions))
        return [0.0] * len(completions)

    run = ppo(config(steps=1, reward_model=reward_run, reward=[f"{path}:length:100"]), None, spy)
    prompts, completions = seen[0]
    assert len(prompts) == len(completions) == 8 and all(prompt.startswith("pun: ") for prompt in prompts)
    rows = [row for row in reader.lines(run, "samples.jsonl") if not row.get("held_out")]
    assert [row["completion"] for row in rows] == completions[: len(rows)]
    for row in rows:  # a model score is within a few standard deviations of 0
        assert abs(row["score"] - 100 * len(row["completion"])) < 20
    assert any(abs(row["score"] - 100 * len(row["completion"])) > 1e-3 for row in rows)


def test_prompts_and_callback_through_the_api(config: Config) -> None:
    seen: list[int] = []
    asked: list[Any] = []

    def reward(prompts: list[Any], completions: list[str]) -> list[float]:
        asked.extend(prompts)
        return letters(prompts, completions)

    mine: list[Any] = ["one", [{"role": "user", "content": "three"}]]
    row = {"prompt": "two", "source": "a row as a file has it"}
    ppo(config(steps=2, eval_prompts=0), [*mine, row], reward, lambda step, metrics: seen.append(step))
    mine.append("two")
    assert seen == [1, 2]
    assert {str(prompt) for prompt in asked} == {str(prompt) for prompt in mine}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda prompts, completions: [math.nan] * len(completions), "returned nan"),
        (lambda prompts, completions: [1.0], "returned 1 numbers for 8"),
        (lambda prompts, completions: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_bad_rewards_are_user_errors(config: Config, reward: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ppo(config(), None, reward)


def test_a_reward_model_of_another_base_is_refused(config: Config, tiny_gpt2: Path, tmp_path: Path, make: Make) -> None:
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    other = train_reward(
        make(RewardConfig, name="other", out=str(tmp_path), model=str(tiny_gpt2), steps=1, normalise_samples=0), pairs
    )
    with pytest.raises(UserError, match="another base or prompt format"):
        ppo(config(reward_model=str(other)))


def test_missing_pieces_are_user_errors(config: Config, sft_run: str, reward_run: str) -> None:
    with pytest.raises(UserError, match="a reward is needed"):
        ppo(config())
    with pytest.raises(UserError, match="-a runs/SFT"):
        ppo(replace(config(), actor=""), None, letters)
    with pytest.raises(UserError, match="no such run"):
        ppo(replace(config(), actor=sft_run + "x"), None, letters)
    with pytest.raises(UserError, match="is not a reward model"):
        ppo(config(reward_model=sft_run))
    with pytest.raises(UserError, match=r"prompt 2 has .* exceeds the context of 128"):
        ppo(config(max_new_tokens=60), ["fine", "long " * 80], letters)
    with pytest.raises(UserError, match="no prompts"):
        ppo(config(), [], letters)
    for prompts, message in (
        (["fine", 5], "prompt 2: prompt must be text or chat messages"),
        ([{"text": "fine"}], "prompt 1: field 'prompt' is missing .found: text"),
        (["fine", {"prompt": "fine"}, [{"role": "bot", "content": "x"}]], "prompt 3: unknown role 'bot'"),
    ):
        with pytest.raises(UserError, match=message):
            ppo(config(), prompts, letters)


@pytest.mark.parametrize(
    "settings", [{"strategy": "ddp"}, {"beta": -1.0}, {"temperature": 0.0}, {"batch_size": 1}, {"minibatches": 9}, {"clip": 1.0}]
)
def test_bad_settings_are_user_errors(config: Config, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        config(**settings)


def test_full_fine_tuning_runs_saves_and_loads(config: Config, sft_run: str, reader: Any) -> None:
    run = ppo(config(adapter="none", lr=1e-3, steps=4), None, letters)
    assert reader.values(run, "objective/exact_kl")[0] == pytest.approx(0, abs=1e-5)
    assert reader.values(run, "objective/exact_kl")[-1] > 1e-3
    role, tokenizer = load_run(run)
    start, _ = load_run(sft_run)
    ids = torch.tensor([tokenizer.prompt_ids("pun: sea 1")])
    difference = role.model.forward(ids, role.adapters) - start.model.forward(ids, start.adapters)
    assert float(difference.abs().max()) > 1e-3
    assert [adapter.name for adapter in role.adapters] == ["sft"]


def test_truncated_responses_pay_the_penalty(config: Config, reader: Any) -> None:
    """One token a response and a constant reward of 1: what is left is 1 - penalty * share of unfinished responses."""
    run = ppo(config(steps=1, max_new_tokens=1, missing_eos_penalty=3.0, beta=0.0), None, lambda p, c: [1.0] * len(c))
    (line,) = reader.lines(run)
    assert line["objective/scores"] == 1.0
    assert line["objective/rlhf_reward"] == pytest.approx(1 - 3 * (1 - line["eos_rate"]))
    assert line["eos_rate"] < 1 and line["length"] == 1


def test_adaptive_controller_moves_beta_and_the_fixed_one_does_not(config: Config, reader: Any) -> None:
    fixed = ppo(config("fixed", lr=1e-2), None, letters)
    moved = ppo(config("moved", lr=1e-2, target_kl=5.0, kl_horizon=100), None, letters)
    assert reader.values(fixed, "beta") == [0.02] * 3
    betas = reader.values(moved, "beta")
    assert betas[0] == 0.02 and betas[1] == pytest.approx(0.02 * (1 - 0.2 * 8 / 100))  # KL 0: the error is cut at -.2


def test_the_controller_waits_for_the_critic_as_the_policy_does(config: Config, reader: Any) -> None:
    run = ppo(config(steps=4, critic_warmup=2, target_kl=6.0, kl_horizon=100), None, letters)
    assert reader.values(run, "beta") == pytest.approx([0.02] * 3 + [0.02 * (1 - 0.2 * 8 / 100)], rel=1e-12)


def test_a_large_update_ends_the_passes_early(config: Config, reader: Any) -> None:
    run = ppo(config(lr=5e-2, steps=2, epochs=6, stop_kl=1e-4), None, letters)
    assert all(1 < count < 6 for count in reader.values(run, "updates"))


def test_micro_batches_do_not_change_a_step(config: Config, reader: Any) -> None:
    runs = [ppo(config(name, max_tokens=size, steps=2), None, letters) for name, size in (("small", 64), ("large", 100_000))]
    for metric in ("loss/policy_avg", "loss/value_avg", "grad_norm", "critic_grad_norm", "objective/exact_kl"):
        assert reader.values(runs[0], metric) == pytest.approx(reader.values(runs[1], metric), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("minibatches", [1, 2, 3, 5])
def test_minibatches_keep_the_samples_of_a_prompt_together(minibatches: int) -> None:
    rows = [Example((5,), (6, 7))] * 20
    cut = partition(rows, minibatches, torch.Generator().manual_seed(1), 4096, samples=4)
    found = [[row for group in minibatch for row in group] for minibatch in cut]
    assert sorted(functools.reduce(operator.iadd, found, [])) == list(range(20)) and len(found) == minibatches
    assert max(map(len, found)) - min(map(len, found)) <= 4
    for minibatch in found:
        assert len(minibatch) == 4 * len({row // 4 for row in minibatch})


@pytest.mark.parametrize(("rows", "minibatches", "sizes"), [(64, 9, {7, 8}), (64, 10, {6, 7}), (64, 3, {21, 22}), (3, 3, {1})])
def test_minibatches_are_as_many_as_asked_for_and_even(rows: int, minibatches: int, sizes: set[int]) -> None:
    cut = partition([Example((5,), (6, 7))] * rows, minibatches, torch.Generator().manual_seed(1), 4096)
    found = [[row for group in minibatch for row in group] for minibatch in cut]
    assert len(found) == minibatches and set(map(len, found)) == sizes
    assert sorted(functools.reduce(operator.iadd, found, [])) == list(range(rows))


def test_rollout_draws_are_seeded_streams() -> None:
    a, b = (torch.rand(4, generator=seeded(1, name)) for name in ("sampling", "data"))
    assert not torch.equal(a, b)
    assert torch.equal(a, torch.rand(4, generator=seeded(1, "sampling")))
