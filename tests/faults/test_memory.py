"""Memory that runs out: half the micro-batch, the same gradient, and said so."""

from __future__ import annotations

import json
import pkgutil
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from punster.errors import Aborted
from punster.train.checkpoint import newest_step
from punster.train.grpo import grpo
from punster.train.optim import optimizer_step, within_memory
from punster.train.sft import sft

STAGES = ("sft", "reward", "ppo", "grpo", "dpo")


def same(reader: Any, run: Path, other: Path) -> bool:
    return reader.tensor_bytes(run) == reader.tensor_bytes(other) and reader.lines(run) == reader.lines(other)


@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(
    stage: str, jobs: Any, reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first and the fourth backward pass fail when gradients are there already; the figures of the run stay what they are."""
    config, train = jobs(tmp_path, max_tokens=256)[stage]
    whole = train(replace(config, name="whole"))
    backward, calls = torch.Tensor.backward, [0]

    def scarce(self: torch.Tensor, *rest: Any, **options: Any) -> None:
        calls[0] += 1
        backward(self, *rest, **options)  # gradients are there already when it fails
        if calls[0] in (1, 4):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", scarce)
        run = train(replace(config, name="scarce"))
    said = capsys.readouterr().err
    assert (
        "out of memory: going on with micro-batches of 128 tokens instead of 256" in said
        and "of 64 tokens instead of 128" in said
    )
    state = json.loads((reader.final(run) / "state.json").read_text())
    assert state["numbers"]["max_tokens"] == 64
    events = [json.loads(line) for line in (run / "run.log").read_text().splitlines()]
    assert [event["max_tokens"] for event in events if event["event"] == "out_of_memory"] == [128, 64]
    ours, theirs = reader.lines(run), reader.lines(whole)
    for one, other in zip(ours, theirs, strict=True):
        for key in ("loss", "loss/policy_avg", "policy/loss", "grad_norm"):
            if key in other:
                assert one[key] == pytest.approx(other[key], rel=2e-3, abs=2e-5), (one["step"], key)
    assert ours[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=1e-5, abs=1e-7)
    # The smaller micro-batch is part of the checkpoint: a resumed run repeats the rest of this one.
    copy = reader.interrupted_copy(run, tmp_path / "copy", 3)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("name: scarce", "name: copy"))
    assert same(reader, train(replace(config, name="copy", resume=True)), run)


PLACES = {  # where memory runs out outside of a backward pass: stage, settings, function, and which of its calls fails
    "states of the texts": ("sft", {}, "punster.model.role.Trunk.compute", 1),
    "states of held-out texts": ("reward", {}, "punster.model.role.Trunk.compute", 2),
    "log-probs of the reference": ("dpo", {}, "punster.train.dpo.response_log_probs", 1),
    "sampled pairs": ("dpo", {"pairs": "sampled", "samples": 2}, "punster.rollout.sampler._generate", 1),
    "online pairs": ("dpo", {"online": True, "samples": 2}, "punster.rollout.sampler._generate", 1),
    "the reference of online pairs": ("dpo", {"online": True, "samples": 2}, "punster.train.dpo.response_log_probs", 2),
    "unpaired texts": ("dpo", {"loss_type": "kto"}, "punster.train.dpo.mismatched_kl", 1),
    "PPO's rollout": ("ppo", {}, "punster.rollout.sampler._generate", 1),
    "GRPO's rollout": ("grpo", {}, "punster.train.experience.compare_policies", 1),
    "the texts of the SFT term": ("ppo", {"sft_coef": 1.0}, "punster.model.role.Trunk.compute", 1),
    "the SFT term": ("ppo", {"sft_coef": 1.0, "critic_warmup": 0}, "punster.train.shaping.accumulate_nll", 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_elsewhere_is_gone_on_from(
    place: str, jobs: Any, reader: Any, tmp_path: Path, reward_run: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """After its work, one call finds no memory: with half the size the run goes on, and ends where it would have ended."""
    stage, settings, name, failing = PLACES[place]
    config, train = jobs(tmp_path, max_tokens=256)[stage]
    sampled = {"reward_model": reward_run, "prompt_limit": 8, "max_new_tokens": 5} if {"pairs", "online"} & set(settings) else {}
    config = replace(config, steps=2, **settings, **sampled)
    whole = train(replace(config, name="whole"))
    original, calls = import_from(name), [0]

    def scarce(*rest: Any, **options: Any) -> Any:
        result = original(*rest, **options)
        calls[0] += 1
        if calls[0] == failing:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(name, scarce)
        run = train(replace(config, name="scarce"))
    assert "out of memory: going on with micro-batches of 128 tokens instead of 256" in capsys.readouterr().err
    for one, other in zip(reader.lines(run), reader.lines(whole), strict=True):
        for row in (one, other):  # at first the sign of differences that are 0 but for rounding
            row.pop("rewards/accuracies", None)
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)
    assert reader.lines(run, "samples.jsonl") == reader.lines(whole, "samples.jsonl") if stage != "reward" else True


def import_from(name: str) -> Any:
    module, attribute = name.rsplit(".", 1)
    return getattr(pkgutil.resolve_name(module), attribute)


def test_memory_that_never_suffices_is_one_message(jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, train = jobs(tmp_path)["sft"]
    with monkeypatch.context() as patch:
        patch.setattr("punster.train.sft.token_log_probs", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(Aborted, match="out of memory even with 64 tokens"):
            train(replace(config, name="run"))


def test_memory_that_runs_out_late_costs_one_step(
    jobs: Any, reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For good, from the third rollout on: a later process, with more memory, goes on from the second."""
    config, _ = jobs(tmp_path, save_every=0)["grpo"]
    whole = grpo(replace(config, name="whole"))
    original, full = import_from("punster.train.experience.compare_policies"), [False]

    def scarce(*rest: Any, **options: Any) -> Any:
        if full[0]:
            raise MemoryError
        return original(*rest, **options)

    def fill(step: int, metrics: dict[str, float]) -> None:
        full[0] = step == 2

    with monkeypatch.context() as patch:
        patch.setattr("punster.train.experience.compare_policies", scarce)
        with pytest.raises(Aborted, match="out of memory even with 64 tokens"):
            grpo(replace(config, name="run"), callback=fill)
    assert newest_step(tmp_path / "run") == 2
    assert same(reader, grpo(replace(config, name="run", resume=True)), whole)


LAST = {
    "sft": "punster.train.sft.held_out_loss",
    "dpo": "punster.train.dpo.sample_table",
    "reward": "punster.train.reward.normalised",
}


@pytest.mark.parametrize("stage", LAST)
def test_a_failure_after_the_last_step_costs_that_step(
    stage: str, jobs: Any, reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the evaluation, or where the reward model is normalised."""
    config, train = jobs(tmp_path, save_every=0)[stage]
    config = replace(config, eval_every=0)
    whole = train(replace(config, name="whole"))

    def scarce(*rest: Any, **options: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(LAST[stage], scarce)
        with pytest.raises(MemoryError):
            train(replace(config, name="run"))
    assert newest_step(tmp_path / "run") == 3
    again = train(replace(config, name="run", resume=True))
    assert same(reader, again, whole)
    assert {**reader.summary(again), "wall_seconds": 0} == {**reader.summary(whole), "wall_seconds": 0}


def test_scores_are_read_in_smaller_batches_where_memory_has_run_out(
    jobs: Any, reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, train = jobs(tmp_path, max_tokens=256, steps=2)["grpo"]
    config = replace(config, eval_prompts=0)
    whole = train(replace(config, name="whole"))
    original = import_from("punster.rewards.score_examples")

    def scarce(role: Any, examples: Any, trunk: Any, max_tokens: int = 4096) -> Any:
        if max_tokens > 1024:
            raise MemoryError
        return original(role, examples, trunk, max_tokens)

    monkeypatch.setattr("punster.rewards.score_examples", scarce)
    for one, other in zip(reader.lines(train(replace(config, name="scarce"))), reader.lines(whole), strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)


def test_a_real_lack_of_memory(jobs: Any, child: Any, reader: Any, tmp_path: Path, make: Any, tiny_llama: Path) -> None:
    """An address space (RLIMIT_AS) in which the whole batch does not fit, but parts of it do."""
    from punster.train.checkpoint import State, load_run
    from punster.train.optim import make_optimizer

    run = sft(make(jobs(tmp_path)["sft"][0].__class__, name="small", out=str(tmp_path), model=str(tiny_llama), steps=1))
    assert run is not None
    role, _ = load_run(run)
    adapter = role.adapters[0].trainable()
    optimizer = make_optimizer(replace(role, trained=(adapter.name,)), 1e-3)

    def attempt(tokens: int) -> float:
        """The gradient of a sum of squares over 2^14 rows, in micro-batches; a full one needs 2 GB."""
        total = 0.0
        for start in range(0, 16384, tokens):
            x = torch.arange(start, start + tokens, dtype=torch.float32)[:, None] / 16384 * torch.ones(1, 32768)
            loss = (x @ torch.ones(32768, 1) * next(adapter.parameters()).sum()).square().mean() * tokens / 16384
            loss.backward()
            total += float(loss.detach())
        return total

    def body() -> int:
        state = State(role, {"policy": optimizer}, {}, numbers={"max_tokens": 16384})
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 900 * 2**20, resource.RLIM_INFINITY))
        assert within_memory(state, attempt) > 0
        (tmp_path / "norm").write_text(f"{state.numbers['max_tokens']} {optimizer_step(optimizer, 0.0, 1e9)['grad_norm']!r}")
        return 0

    code, errors = child(body)
    assert code == 0, errors
    assert "out of memory: going on with micro-batches of 8192 tokens instead of 16384" in errors
    tokens, norm = (tmp_path / "norm").read_text().split()
    assert 64 <= int(tokens) <= 8192
    for start in range(0, 16384, 1024):
        x = torch.arange(start, start + 1024, dtype=torch.float32)[:, None] / 16384 * torch.ones(1, 32768)
        ((x @ torch.ones(32768, 1) * next(adapter.parameters()).sum()).square().mean() * 1024 / 16384).backward()
    assert float(norm) == pytest.approx(optimizer_step(optimizer, 0.0, 1e9)["grad_norm"], rel=1e-4)
