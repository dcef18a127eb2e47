"""A run that goes wrong stops, says so, and is back at its last good step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import punster.train.grpo as grpo_module
import punster.train.ppo as ppo_module
from punster.algorithms.losses import clipped_policy_loss, clipped_value_loss
from punster.cli import main
from punster.config import GrpoConfig, PpoConfig
from punster.errors import Aborted
from punster.train.checkpoint import load_run
from punster.train.grpo import grpo
from punster.train.ppo import ppo
from punster.train.run import Interrupted

Make = Callable[..., Any]
Config = Callable[..., Any]


def letters(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [sum(letter.isalpha() for letter in text) / 5 for text in completions]


@pytest.fixture
def config(tiny_llama: Path, sft_run: str, tmp_path: Path, make: Make) -> Config:
    def build(name: str = "run", kind: type = PpoConfig, **settings: Any) -> Any:
        given: dict[str, Any] = {
            "model": str(tiny_llama), "actor": sft_run, "batch_size": 8, "steps": 6, "max_new_tokens": 8, "eval_prompts": 0,
            "lr": 1e-2, "critic_lr": 1e-3, "critic_warmup": 0, "stop_kl": 1e9, "samples": 4, "epochs": 1, "keep": 9,
        }  # fmt: skip
        known = kind.__dataclass_fields__
        return make(kind, name=name, out=str(tmp_path), **{k: v for k, v in {**given, **settings}.items() if k in known})

    return build


def poisoned(original: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The same function, whose loss is nan from one call on."""
    calls = [0]

    def wrapped(*arguments: Any) -> Any:
        calls[0] += 1
        loss, rest = original(*arguments)
        return (loss * float("nan") if calls[0] >= call else loss), rest

    return wrapped


@pytest.mark.parametrize("save_every", [0, 1])
def test_a_kl_explosion_goes_back_before_the_updates_that_made_it(save_every: int, config: Config, reader: Any) -> None:
    """The rollout of step s shows what step s - 1 did: the state after step s - 2 is the last good one.

    Resumed, the run comes to the same end, and its logs repeat nothing.
    """
    calm = ppo(config("calm", save_every=1, lr=5e-2), None, letters)
    kl = reader.values(calm, "objective/exact_kl")
    seen = next(step for step in range(3, 7) if kl[step - 1] > 1.5 * max(kl[: step - 1]))
    limit = (kl[seen - 1] + max(kl[: seen - 1])) / 2
    stopped = rf"STOPPED at step {seen} of 6: exact KL .* above --max-kl .* back at step {seen - 2}"
    settings = {"save_every": save_every, "lr": 5e-2, "max_kl": limit, "eval_every": 1, "eval_prompts": 2}
    with pytest.raises(Aborted, match=stopped):
        ppo(config("wild", **settings), None, letters)
    wild = Path(calm).parent / "wild"
    assert reader.final(wild).name == f"step-{seen - 2}"
    for file in sorted((Path(calm) / "checkpoints" / f"step-{seen - 2}").rglob("*.safetensors")):
        twin = reader.final(wild) / file.relative_to(Path(calm) / "checkpoints" / f"step-{seen - 2}")
        assert twin.read_bytes() == file.read_bytes()  # policy, critic, both optimizers, every generator
    summary = reader.summary(wild)
    assert summary["steps"] == seen - 2 and summary["aborted_at"] == seen and "exact KL" in summary["aborted"]
    logs = [reader.lines(wild, log) for log in ("metrics.jsonl", "samples.jsonl")]
    assert [line["step"] for line in logs[0]] == list(range(1, seen))
    with pytest.raises(Aborted, match=stopped):
        ppo(config("wild", **settings, resume=True), None, letters)
    assert [reader.lines(wild, log) for log in ("metrics.jsonl", "samples.jsonl")] == logs
    role, _ = load_run(wild)
    assert all(torch.isfinite(tensor).all() for adapter in role.adapters for _, tensor in adapter.named_parameters())


@pytest.mark.parametrize("keep", [9, 1])
def test_a_run_resumed_with_bad_updates_goes_back_before_them(keep: int, config: Config, reader: Any) -> None:
    """Interrupted right after the updates that the next rollout shows to be bad; or says that nothing before them is left."""
    calm = ppo(config("calm", save_every=1, lr=5e-2), None, letters)
    kl = reader.values(calm, "objective/exact_kl")
    seen = next(step for step in range(3, 7) if kl[step - 1] > 1.5 * max(kl[: step - 1]))
    settings = {"save_every": 1, "keep": keep, "lr": 5e-2, "max_kl": (kl[seen - 1] + max(kl[: seen - 1])) / 2}

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == seen - 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        ppo(config("wild", **settings), None, letters, callback=stop)
    wild = Path(calm).parent / "wild"
    assert reader.final(wild).name == f"step-{seen - 1}"
    expected = rf"step {seen - 2}, its last good one" if keep > 1 else rf"step {seen - 1}, whose updates are to blame"
    with pytest.raises(Aborted, match=rf"STOPPED at step {seen} of 6: .* back at {expected}"):
        ppo(config("wild", **settings, resume=True), None, letters)
    back = reader.final(wild)
    assert (back / "state.safetensors").read_bytes() == (
        Path(calm) / "checkpoints" / back.name / "state.safetensors"
    ).read_bytes()
    assert reader.summary(wild)["steps"] == int(back.name.removeprefix("step-"))


@pytest.mark.parametrize("name", ["clipped_policy_loss", "clipped_value_loss"])
def test_a_loss_that_is_not_finite_goes_back_to_the_beginning_of_the_step(
    name: str, config: Config, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = ppo(config("calm", save_every=1, max_tokens=100_000), None, letters)
    original = {"clipped_policy_loss": clipped_policy_loss, "clipped_value_loss": clipped_value_loss}[name]
    monkeypatch.setattr(ppo_module, name, poisoned(original, 4))  # one call a step
    with pytest.raises(Aborted, match=r"STOPPED at step 4 of 6: the (policy|value) loss is nan.* back at step 3"):
        ppo(config("wild", max_tokens=100_000), None, letters)
    wild = Path(calm).parent / "wild"
    assert (reader.final(wild) / "state.safetensors").read_bytes() == (
        Path(calm) / "checkpoints" / "step-3" / "state.safetensors"
    ).read_bytes()


def test_grpo_is_guarded_too(config: Config, reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_module, "clipped_policy_loss", poisoned(clipped_policy_loss, 1))
    with pytest.raises(Aborted, match="STOPPED at step 1 of 6: the loss is nan"):
        grpo(config("first", GrpoConfig), None, letters)
    monkeypatch.undo()
    with pytest.raises(Aborted, match="above --max-kl"):
        grpo(config("second", GrpoConfig, max_kl=1e-4), None, letters)


def test_the_command_says_it_loudly_and_fails(
    config: Config, sft_run: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.py").write_text("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    code = main(
        ["ppo", "-n", "wild", "--out", str(tmp_path), "-a", sft_run, "--reward", f"{tmp_path / 'r.py'}:length", "-b", "8",
         "--steps", "6", "--lr", ".05", "--critic-warmup", "0", "--max-kl", ".0001", "--max-new-tokens", "8", "--eval-prompts", "0",
         "--model", str(tiny_llama), "--dtype", "fp32", "--device", "cpu", "--quiet"]
    )  # fmt: skip
    text = capsys.readouterr().err
    assert code == 1
    assert "punster ppo: STOPPED at step 2 of 6" in text and "Lower --lr" in text and "Traceback" not in text


@pytest.mark.parametrize("verb", [ppo, grpo])
def test_the_last_updates_are_judged_by_the_last_evaluation(verb: Callable[..., Any], config: Config, reader: Any) -> None:
    """No rollout follows them; a run of one step has no other check at all."""
    kind = PpoConfig if verb is ppo else GrpoConfig
    settings: dict[str, Any] = {"steps": 2, "save_every": 1, "eval_prompts": 2, "warmup": 0.0, "max_kl": 1e-3}
    calm = verb(config("calm", kind, **{**settings, "max_kl": 100.0, "lr": 0.05}), None, letters)
    grown = reader.values(calm, "objective/exact_kl")[1], reader.summary(calm)["eval/exact_kl"]
    limit = (grown[0] + grown[1]) / 2
    assert grown[0] < limit < grown[1], "the second update must show in the evaluation"
    with pytest.raises(Aborted, match=r"STOPPED at step 2 of 2: exact KL .* in the evaluation, above --max-kl"):
        verb(config("wild", kind, **{**settings, "max_kl": limit, "lr": 0.05}), None, letters)
    wild = Path(calm).parent / "wild"
    assert reader.final(wild).name == "step-1" and reader.summary(wild)["aborted_at"] == 2
    state = "checkpoints/step-1/state.safetensors"

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    for keep, result in ((9, "step-1"), (1, "step-2")):  # interrupted after the last updates, before they were judged
        late = config(f"late-{keep}", kind, **{**settings, "max_kl": limit, "lr": 0.05, "keep": keep})
        with pytest.raises(Interrupted):
            verb(late, None, letters, stop)
        words = "its last good one" if keep > 1 else "no checkpoint before them is left"
        with pytest.raises(Aborted, match=rf"STOPPED at step 2 of 2: .* back at {result[:4]} {result[-1]}, .*{words}"):
            verb(replace(late, resume=True), None, letters)
        assert reader.final(wild.parent / f"late-{keep}").name == result
    assert (wild / state).read_bytes() == (Path(calm) / state).read_bytes()


def test_an_exploded_step_is_never_the_best(config: Config, reader: Any) -> None:
    """Over-optimised texts score highest; what is taken back must not have pushed the best checkpoint out."""
    settings: dict[str, Any] = {
        "steps": 4,
        "save_every": 1,
        "eval_every": 1,
        "eval_prompts": 2,
        "warmup": 0.0,
        "keep": 1,
        "lr": 0.05,
    }
    calm = ppo(config("calm", max_kl=100.0, keep_best="eval/exact_kl", **settings), None, letters)
    grown = reader.values(calm, "eval/exact_kl")
    assert grown[3] == max(grown) and reader.final(calm).name == "step-4", "the metric is one that the explosion wins by"
    limit = (max(reader.values(calm, "objective/exact_kl")) + grown[3]) / 2
    kept = {i + 1 for i, kl in enumerate(grown[:3]) if kl == max(kl for kl in grown[:3] if kl <= limit)}
    with pytest.raises(Aborted, match="in the evaluation"):
        ppo(config("wild", max_kl=limit, keep_best="eval/exact_kl", **settings), None, letters)
    left = {int(place.name.removeprefix("step-")) for place in (Path(str(calm)).parent / "wild" / "checkpoints").glob("step-*")}
    assert left == kept | {3}
