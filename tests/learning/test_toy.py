"""The loops must learn: on a tiny random model, with rewards and preferences whose best answer is known.

Fixed seeds and one thread; each figure has slack, and a loop with a wrong sign or a broken gradient stays far below.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from punster.config import DpoConfig, GrpoConfig, PpoConfig, RewardConfig, SftConfig
from punster.data import corpus
from punster.data.batch import Example
from punster.model.role import Trunk, score_examples
from punster.train import setup
from punster.train.checkpoint import load_run
from punster.train.dpo import dpo, response_log_probs
from punster.train.grpo import grpo
from punster.train.judged import encode_items
from punster.train.ppo import ppo
from punster.train.reward import train_reward
from punster.train.sft import sft

WORDS = ("abc", "xyz")  # the wanted class of letters, and the other one
PROMPTS = [f"say {i}" for i in range(12)]


def text(generator: torch.Generator, wanted: float, length: int = 6) -> str:
    """Letters, each of the wanted class with the given probability."""
    draws = torch.rand(length, 2, generator=generator).tolist()
    return "".join(WORDS[0 if coin < wanted else 1][int(3 * place)] for coin, place in draws)


def share(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Share of letters of the wanted class; anything else counts against it."""
    return [sum(letter in WORDS[0] for letter in completion) / max(1, len(completion)) for completion in completions]


def record(number: int, split: str) -> dict[str, str]:
    kinds = ("pun", "literal", "synonym_swap", "plain", "weak")
    return {"id": str(number), "topic": "t", "prompt": f"say {number}", "pun_word": "abc", "alternative_word": "xyz", "kind": "homophonic",
            "split": split, **dict.fromkeys(kinds, "abc xyz")}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_corpus() -> Iterator[None]:
    """Held-out texts that fit into the tiny model's context."""
    with pytest.MonkeyPatch.context() as patch:
        records = tuple(
            record(i, split) for i, split in enumerate(("train", "train", "val", "val", "gold", "gold", "test", "test"))
        )
        patch.setattr(corpus, "records", lambda: records)
        patch.setattr(setup, "_BASES", {})
        yield


@pytest.fixture(scope="module")
def options(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny model with a louder head: adapters leave the head alone, and a quiet one cannot say anything with certainty."""
    folder = make_model("llama")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": weights["lm_head.weight"] * 6}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return {"out": str(tmp_path_factory.mktemp("runs")), "model": str(folder), "quiet": True, "device": "cpu", "dtype": "fp32",
            "top_layers": "2", "lora_r": 8, "lora_alpha": 16.0}  # fmt: skip


@pytest.fixture(scope="module")
def start(options: dict[str, Any]) -> str:
    """SFT on texts of which an eighth is of the wanted class: what policy gradients start from."""
    generator = torch.Generator().manual_seed(1)
    rows = [{"prompt": PROMPTS[i % 12], "completion": text(generator, 0.12)} for i in range(240)]
    config = SftConfig(name="sft", **{**options, "top_layers": "all"}, steps=120, batch_size=24, lr=1e-2, max_grad_norm=5.0)
    return str(sft(config, rows))


def curve(run: Path | str | None, metric: str = "objective/scores") -> list[float]:
    assert run is not None
    return [json.loads(line)[metric] for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


# ---- policy gradients ---------------------------------------------------------------------------------------------
POLICY: dict[str, Any] = {
    "batch_size": 32, "max_new_tokens": 10, "beta": 0.01, "eval_prompts": 0, "missing_eos_penalty": 0.2, "seed": 2,
}  # fmt: skip


def check_learned(run: Path | str | None) -> None:
    scores, kl = curve(run), curve(run, "objective/exact_kl")
    assert sum(scores[:2]) / 2 < 0.2
    assert sum(scores[-3:]) / 3 > 0.8
    assert kl[0] < 1e-4 < 1.0 < kl[-1]


def test_ppo_raises_the_reward(start: str, options: dict[str, Any]) -> None:
    config = PpoConfig(name="ppo", **options, **POLICY, actor=start, steps=22, lr=1e-2, critic_lr=1e-2, epochs=3)
    run = ppo(config, PROMPTS, share)
    check_learned(run)
    assert curve(run, "val/explained_variance")[-1] > curve(run, "val/explained_variance")[0]


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "rloo", "reinforce++"])
def test_grpo_and_its_variants_raise_the_reward(variant: str, start: str, options: dict[str, Any]) -> None:
    name = variant.replace("+", "p")
    config = GrpoConfig(name=name, **options, **POLICY, actor=start, steps=22, lr=1e-2, samples=8, epochs=2, variant=variant)
    check_learned(grpo(config, PROMPTS, share))


def test_a_reward_of_the_other_sign_lowers_it(start: str, options: dict[str, Any]) -> None:
    """The learning above is the reward's doing, not a drift of the loop."""
    config = GrpoConfig(name="minus", **options, **POLICY, actor=start, steps=15, lr=1e-2, samples=8)
    run = grpo(config, PROMPTS, lambda prompts, completions: [-value for value in share(prompts, completions)])
    assert -sum(curve(run)[-3:]) / 3 < 0.1


def test_a_strong_tie_to_the_reference_holds_the_policy(start: str, options: dict[str, Any]) -> None:
    config = PpoConfig(
        name="tied", **options, **{**POLICY, "beta": 5.0}, actor=start, steps=15, lr=1e-2, critic_lr=1e-2, epochs=3
    )
    assert max(curve(ppo(config, PROMPTS, share), "objective/exact_kl")) < 1.0


# ---- preferences --------------------------------------------------------------------------------------------------
def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"prompt": PROMPTS[i % 12], "chosen": text(generator, 0.8), "rejected": text(generator, 0.2)} for i in range(count)]


def sums(run: str | Path | None, examples: list[Example]) -> torch.Tensor:
    assert run is not None
    role, _ = load_run(run)
    return response_log_probs(role, examples, Trunk.compute(role.model, examples, []), 4096)


@pytest.mark.parametrize("loss_type", ["sigmoid", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto"])
def test_dpo_separates_held_out_pairs(loss_type: str, start: str, options: dict[str, Any]) -> None:
    smoothing = 0.1 if loss_type in ("cdpo", "robust") else 0.0
    kind: Any = "sigmoid" if loss_type == "cdpo" else loss_type
    config = DpoConfig(
        name=loss_type, **options, actor=start, steps=30, batch_size=16, lr=3e-3, beta=0.3, loss_type=kind, label_smoothing=smoothing
    )  # fmt: skip
    given = pairs(200, seed=3)
    run = dpo(config, corpus.unpaired(given) if loss_type == "kto" else given)
    role, tokenizer = load_run(start)
    held_out = pairs(100, seed=4)
    seen = {row["chosen"] for row in pairs(200, seed=3)}
    examples, _ = encode_items([row for row in held_out if row["chosen"] not in seen], tokenizer, role.model)
    ratios = sums(run, examples) - sums(start, examples)
    margin = ratios[::2] - ratios[1::2]
    assert len(margin) > 60
    assert (margin > 0).float().mean() > 0.85
    assert margin.mean() > 1.0


def test_a_reward_model_learns_a_planted_preference(start: str, options: dict[str, Any]) -> None:
    config = RewardConfig(name="reward", **options, pretrained=start, steps=60, batch_size=16, lr=5e-3, normalise_samples=64)
    run = train_reward(config, pairs(300, seed=5))
    assert run is not None
    role, tokenizer = load_run(run)
    scores = torch.tensor(score_examples(role, encode_items(pairs(200, seed=6), tokenizer, role.model)[0]))
    assert (scores[::2] > scores[1::2]).float().mean() > 0.85
    pure, _ = encode_items([{"prompt": PROMPTS[0], "chosen": "abcabc", "rejected": "xyzxyz"}], tokenizer, role.model)
    best, worst = score_examples(role, pure)
    assert best > 1 > worst  # in standard deviations of the SFT model's samples


def test_a_reward_model_on_shuffled_labels_learns_nothing(start: str, options: dict[str, Any]) -> None:
    config = RewardConfig(name="placebo", **options, pretrained=start, steps=60, batch_size=16, lr=5e-3, shuffle_labels=True)
    run = train_reward(config, pairs(300, seed=5))
    assert run is not None
    role, tokenizer = load_run(run)
    scores = torch.tensor(score_examples(role, encode_items(pairs(200, seed=6), tokenizer, role.model)[0]))
    assert 0.25 < (scores[::2] > scores[1::2]).float().mean() < 0.75


def test_ppo_against_a_learned_reward_model(start: str, options: dict[str, Any]) -> None:
    """The whole chain: the planted taste reaches the policy through the reward model alone."""
    judge = RewardConfig(
        name="judge", **options, pretrained=start, steps=60, batch_size=16, lr=5e-3, normalise_samples=64, depth=0
    )
    model = str(train_reward(judge, pairs(300, seed=7)))
    config = PpoConfig(
        name="chain", **options, **POLICY, actor=start, reward_model=model, steps=16, lr=1e-2, critic_lr=3e-3, epochs=3
    )  # fmt: skip
    run = ppo(config, PROMPTS)
    assert run is not None
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    shares = {step: share([], [row["completion"] for row in rows if row["step"] == step]) for step in (1, 2, 15, 16)}
    before, after = (sum(shares[a] + shares[b]) / len(shares[a] + shares[b]) for a, b in ((1, 2), (15, 16)))
    assert before < 0.45 and after > 0.7
    assert curve(run)[-1] > curve(run)[0] + 1.0
