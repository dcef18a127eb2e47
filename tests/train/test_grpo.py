"""GRPO and its variants: advantages, normalisation and KL of each, and the run itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import punster.train.grpo as grpo_module
from punster.algorithms.losses import clipped_policy_loss
from punster.config import GrpoConfig
from punster.errors import UserError
from punster.train.grpo import advantages_of, grpo, token_weights

Make = Callable[..., Any]
Config = Callable[..., GrpoConfig]
VARIANTS = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce++")


def letters(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [sum(letter.isalpha() for letter in text) / 5 for text in completions]


@pytest.fixture
def config(tiny_llama: Path, sft_run: str, tmp_path: Path, make: Make) -> Config:
    def build(name: str = "run", **settings: Any) -> GrpoConfig:
        given: dict[str, Any] = {
            "model": str(tiny_llama), "actor": sft_run, "batch_size": 8, "samples": 4, "steps": 3, "max_new_tokens": 8,
            "eval_prompts": 2, "lr": 1e-2,
        }  # fmt: skip
        return make(GrpoConfig, name=name, out=str(tmp_path), **{**given, **settings})

    return build


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_and_moves_the_policy(variant: str, config: Config, reader: Any) -> None:
    run = grpo(config(variant=variant), None, letters)
    exact = reader.values(run, "objective/exact_kl")
    assert abs(exact[0]) < 1e-5 and exact[-1] > 1e-3
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in reader.lines(run))
    assert reader.values(run, "episode") == [8, 16, 24]
    assert reader.summary(run)["episodes"] == 24


def test_variants_differ(config: Config, reader: Any) -> None:
    adapters = [
        reader.tensor_bytes(grpo(config(variant.replace("+", "p"), variant=variant, steps=1), None, letters))
        for variant in VARIANTS
    ]
    assert len({tuple(sorted(found.items())) for found in adapters}) == len(VARIANTS)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_ratio_is_exactly_one_in_the_first_pass_only(adapter: str, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    gaps: list[float] = []

    def spy(*arguments: Any) -> Any:
        loss, stats = clipped_policy_loss(*arguments)
        gaps.append(float(stats["ratio_gap"]))
        return loss, stats

    monkeypatch.setattr(grpo_module, "clipped_policy_loss", spy)
    grpo(config(steps=1, epochs=2, max_tokens=64, adapter=adapter), None, letters)
    half = len(gaps) // 2
    assert half >= 2 and gaps[:half] == [0.0] * half and min(gaps[half:]) > 1e-6


def test_share_of_groups_without_any_spread(config: Config, reader: Any) -> None:
    """A constant reward has no spread anywhere; one that depends on the prompt has none within a group either."""
    settings = {"steps": 1, "missing_eos_penalty": 0.0}
    constant = grpo(config("constant", **settings), None, lambda p, c: [3.0] * len(c))
    by_prompt = grpo(config("prompt", **settings), None, lambda p, c: [float(len(prompt)) for prompt in p])
    spread = grpo(config("spread", **settings), None, lambda p, c: [float(i) for i in range(len(c))])
    half = grpo(config("half", **settings), None, lambda p, c: [float(i == 5) for i in range(len(c))])
    shares = [reader.values(run, "frac_reward_zero_std")[0] for run in (constant, by_prompt, spread, half)]
    assert shares == [1.0, 1.0, 0.0, 0.5]
    assert reader.values(spread, "reward_std") == pytest.approx([1.2909944], abs=1e-5)


def test_without_spread_the_policy_stays(config: Config, reader: Any) -> None:
    """No advantage and, at the reference, no gradient of k3: nothing moves."""
    run = grpo(config(steps=1, epochs=1, missing_eos_penalty=0.0), None, lambda p, c: [3.0] * len(c))
    assert reader.values(run, "grad_norm")[0] < 1e-6


def test_samples_of_a_group_share_their_prompt(config: Config) -> None:
    seen: list[list[Any]] = []

    def reward(prompts: list[Any], completions: list[str]) -> list[float]:
        seen.append(prompts)
        return letters(prompts, completions)

    grpo(config(steps=1, eval_prompts=0), ["a", "b", "c"], reward)
    prompts = seen[0]
    assert len(prompts) == 8 and len(set(prompts[:4])) == len(set(prompts[4:])) == 1 and prompts[0] != prompts[4]


MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])


@pytest.mark.parametrize(
    ("variant", "rows"),
    [
        ("grpo", [1 / 6, 1 / 2]),
        ("dr_grpo", [1 / 20, 1 / 20]),
        ("dapo", [1 / 4, 1 / 4]),
        ("rloo", [1 / 2, 1 / 2]),
        ("reinforce++", [1 / 4, 1 / 4]),
    ],
)
def test_token_weights_by_hand(variant: str, rows: list[float], make: Make) -> None:
    """Two responses of 3 and 1 tokens, at most 10 allowed."""
    weights = token_weights(make(GrpoConfig, name="x", variant=variant, max_new_tokens=10), MASK)
    torch.testing.assert_close(weights, torch.tensor(rows)[:, None] * MASK)


def experience(kl: torch.Tensor) -> Any:
    return cast(Any, SimpleNamespace(log_prob=kl, ref_log_prob=torch.zeros_like(kl), mask=MASK))


def test_kl_is_in_the_reward_of_rloo_and_reinforce_pp_only(make: Make) -> None:
    """Scores 4 and 1, k1 sums 6 and 2 with beta .5: rewards 1 and 0."""
    kl = torch.tensor([[1.0, 2.0, 3.0, 9.0], [2.0, 9.0, 9.0, 9.0]])
    scores = torch.tensor([4.0, 1.0])
    expected = {"rloo": [1.0, -1.0], "dr_grpo": [1.5, -1.5], "grpo": [0.70707, -0.70707], "dapo": [0.70707, -0.70707]}
    for variant, rows in expected.items():
        config = make(GrpoConfig, name="x", variant=variant, samples=2, beta=0.5, batch_size=2)
        advantages = advantages_of(config, experience(kl), scores)
        torch.testing.assert_close(advantages, torch.tensor(rows)[:, None] * MASK, rtol=0, atol=1e-4)
    config = make(GrpoConfig, name="x", variant="reinforce++", samples=2, beta=0.5, batch_size=2)
    to_go = torch.tensor([1.0, 1.5, 2.5, 0.0])  # of the whole batch: 1, 1.5, 2.5 and 0
    white = (to_go - 1.25) / to_go.std()
    torch.testing.assert_close(
        advantages_of(config, experience(kl), scores), torch.tensor([[*white[:3].tolist(), 0.0], [white[3].item(), 0.0, 0.0, 0.0]]),
        rtol=0, atol=1e-5,
    )  # fmt: skip


def test_dapo_clips_higher(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[float, float | None]] = []

    def spy(*arguments: Any) -> Any:
        ends.append(arguments[4:])
        return clipped_policy_loss(*arguments)

    monkeypatch.setattr(grpo_module, "clipped_policy_loss", spy)
    for name, settings in (("a", {"variant": "dapo"}), ("b", {"variant": "grpo"}), ("c", {"variant": "grpo", "clip_high": 0.4})):
        grpo(config(name, steps=1, epochs=1, **settings), None, letters)
    assert list(dict.fromkeys(ends)) == [(0.2, 0.28), (0.2, 0.2), (0.2, 0.4)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_do_not_change_a_step(variant: str, config: Config, reader: Any) -> None:
    runs = [
        grpo(config(name, max_tokens=size, steps=2, variant=variant), None, letters)
        for name, size in (("small", 64), ("large", 100_000))
    ]
    for metric in ("policy/loss", "grad_norm", "objective/exact_kl"):
        assert reader.values(runs[0], metric) == pytest.approx(reader.values(runs[1], metric), rel=2e-3, abs=1e-5)


def test_a_reward_model_alone_is_enough(config: Config, reward_run: str, reader: Any) -> None:
    run = grpo(config(reward_model=reward_run, steps=1, eval_every=1))
    assert abs(reader.values(run, "objective/scores")[0]) < 5
    assert reader.values(run, "eval/score") == pytest.approx([reader.summary(run)["eval/score"]])


def test_bad_settings_are_user_errors(config: Config) -> None:
    for settings, message in (({"samples": 1}, "--samples"), ({"batch_size": 6}, "multiple"), ({"epochs": 0}, "--epochs")):
        with pytest.raises(UserError, match=message):
            config(**settings)
    with pytest.raises(UserError, match="a reward is needed"):
        grpo(config())
    with pytest.raises(UserError, match="returned 2 numbers"):
        grpo(replace(config(), name="short"), None, lambda p, c: [1.0, 2.0])


def test_kl_can_move_to_the_reward_or_be_corrected(config: Config, make: Make, reader: Any) -> None:
    """In the reward it is part of every variant's advantage and of no loss; corrected, the loss differs from plain k3."""
    kl = torch.tensor([[1.0, 2.0, 3.0, 9.0], [2.0, 9.0, 9.0, 9.0]])
    moved = make(GrpoConfig, name="x", variant="dr_grpo", samples=2, beta=0.5, batch_size=2, kl_in="reward")
    expected = torch.tensor([0.5, -0.5])[:, None] * MASK  # rewards 4 - 3 and 1 - 1
    torch.testing.assert_close(advantages_of(moved, experience(kl), torch.tensor([4.0, 1.0])), expected)
    kept = make(GrpoConfig, name="x", variant="rloo", samples=2, beta=0.5, batch_size=2, kl_in="loss")
    torch.testing.assert_close(
        advantages_of(kept, experience(kl), torch.tensor([4.0, 1.0])), torch.tensor([3.0, -3.0])[:, None] * MASK
    )
    policies = []
    for place in ("reward", "loss", "corrected"):
        run = grpo(config(place, kl_in=place, beta=0.5), None, letters)
        policies.append(reader.tensor_bytes(run)["adapters/policy/adapter_model.safetensors"])
    assert len(set(policies)) == 3


def test_upper_clip_of_the_variants(make: Make) -> None:
    shared = {"actor": "a"}
    assert make(GrpoConfig, **shared).upper_clip == 0.2 and make(GrpoConfig, variant="dapo", **shared).upper_clip == 0.28
    assert make(GrpoConfig, variant="dapo", clip_high=0.4, **shared).upper_clip == 0.4
    with pytest.raises(UserError, match=r"--clip-high 0.28 lies below --clip 0.35"):
        make(GrpoConfig, variant="dapo", clip=0.35, **shared)
