"""The run folder, dry runs, what stands in it, learning-rate schedule, optimizer steps, data order."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from punster.config import DistillConfig, DpoConfig, GrpoConfig, PpoConfig, RewardConfig, SftConfig
from punster.data import corpus
from punster.errors import UserError
from punster.model.lora import Adapter
from punster.model.role import Role
from punster.rollout.sampler import Decoding
from punster.train.checkpoint import damage, load_run
from punster.train.distill import distill
from punster.train.dpo import dpo
from punster.train.grpo import grpo
from punster.train.optim import Cursor, learning_rate, make_optimizer, optimizer_step, seeded, total_steps
from punster.train.ppo import ppo
from punster.train.reward import train_reward
from punster.train.sft import sft

Make = Callable[..., Any]
VERBS = ("sft", "reward", "ppo", "grpo", "dpo", "distill")


def constant(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def start(verb: str, out: Path, model: Path, sft_run: str, reward_run: str, make: Make, **settings: Any) -> Any:
    shared: dict[str, Any] = {"name": "run", "out": str(out), "model": str(model), "steps": 1, **settings}
    sampled = {"actor": sft_run, "max_new_tokens": 4}
    if verb == "sft":
        return sft(make(SftConfig, **shared))
    if verb == "reward":
        return train_reward(make(RewardConfig, **shared, normalise_samples=4, pretrained=sft_run))
    if verb == "ppo":
        return ppo(make(PpoConfig, **shared, **sampled, batch_size=4, eval_prompts=2), None, constant)
    if verb == "grpo":
        return grpo(make(GrpoConfig, **shared, **sampled, batch_size=4, samples=2, eval_prompts=2), None, constant)
    if verb == "dpo":
        return dpo(make(DpoConfig, **shared, **sampled))
    return distill(make(DistillConfig, **shared, actor=sft_run, reward_model=reward_run, max_new_tokens=60, best_of=3))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("verb", VERBS)
def test_a_taken_name_is_an_error_that_changes_nothing(verb: str, tmp_path: Path, make: Make) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="exists already"):  # before anything is looked for or loaded
        start(verb, tmp_path, Path("absent"), "absent", "absent", make)
    assert everything(tmp_path) == {str(tmp_path / "run" / "mine.txt"): b"precious"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_name_is_needed(verb: str, tmp_path: Path, make: Make) -> None:
    with pytest.raises(UserError, match="-n NAME"):
        start(verb, tmp_path, Path("absent"), "absent", "absent", make, name="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_writes_nothing_and_prints_the_plan(
    verb: str, tmp_path: Path, tiny_llama: Path, sft_run: str, reward_run: str, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(Path(sft_run)), everything(Path(reward_run))
    assert start(verb, tmp_path, tiny_llama, sft_run, reward_run, make, dry_run=True) is None
    assert not list(tmp_path.iterdir())
    assert (everything(Path(sft_run)), everything(Path(reward_run))) == before
    plan = capsys.readouterr().out
    assert "1 steps" in plan and "trainable parameters" in plan and "minutes" in plan and "GB" in plan


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_finished_run_leaves(
    verb: str,
    tmp_path: Path,
    tiny_llama: Path,
    sft_run: str,
    reward_run: str,
    make: Make,
    reader: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = start(verb, tmp_path, tiny_llama, sft_run, reward_run, make)
    assert run == tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "events"} <= names
    assert not [path for path in run.rglob("*") if path.suffix in (".pt", ".bin", ".pkl", ".part") or path.name.startswith(".")]
    checkpoint = run / "checkpoints" / "step-1"
    assert damage(checkpoint) == ""
    assert {"role.json", "state.safetensors", "state.json", "manifest.json"} <= {path.name for path in checkpoint.iterdir()}
    assert [line["step"] for line in reader.lines(run)] == [1]
    assert reader.summary(run)["wall_seconds"] >= 0
    assert capsys.readouterr().out == "", "--quiet prints nothing"
    role, tokenizer = load_run(run)
    assert role.adapters and tokenizer.eos_id >= 0
    assert load_run(sft_run)[0].adapters[0].name == "sft"


@pytest.mark.parametrize(("verb", "kind"), [("sft", SftConfig), ("ppo", PpoConfig), ("dpo", DpoConfig)])
def test_the_saved_configuration_is_complete_and_can_be_run_again(
    verb: str, kind: type, tmp_path: Path, tiny_llama: Path, sft_run: str, reward_run: str, make: Make
) -> None:
    run = start(verb, tmp_path, tiny_llama, sft_run, reward_run, make, seed=7)
    text = (run / "config.yaml").read_text()
    assert text.startswith(f"# punster {verb}\n")
    saved = yaml.safe_load(text)
    assert set(saved) == {item.name for item in fields(kind)} and saved["seed"] == 7
    again = kind(**{**saved, "name": "again"})
    assert replace(again, name="run") == kind(**saved)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "-x", "a b", "ü"])
def test_names_that_are_no_folder_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="run name"):
        SftConfig(name=name)


def test_a_missing_run_suggests_its_neighbours(sft_run: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such run.*Did you mean .*sft"):
        load_run(Path(sft_run).parent / "sff")
    with pytest.raises(UserError, match="no usable checkpoint"):
        load_run(tmp_path)


def test_the_loaded_role_is_the_trained_one(sft_run: str, reader: Any) -> None:
    role, _ = load_run(sft_run)
    saved = reader.adapter(sft_run, "sft")
    for site, tensor in role.adapters[0].b.items():
        assert torch.equal(tensor, saved[f"base_model.model.{site}.lora_B.weight"])
    described = json.loads((reader.final(sft_run) / "role.json").read_text())
    assert described["base_sha256"] == role.model.fingerprint()


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_training_on_top_of_a_full_fine_tuned_run_keeps_its_weights(
    adapter: str, tmp_path: Path, tiny_llama: Path, make: Make, reader: Any
) -> None:
    """SFT of all layers, then DPO in the top layer: the saved DPO run must hold both."""
    options = {"out": str(tmp_path), "model": str(tiny_llama)}
    first = sft(make(SftConfig, name="full", **options, steps=20, batch_size=8, adapter="none", top_layers="all", lr=3e-3))
    second = dpo(make(DpoConfig, name="top", **options, actor=str(first), steps=1, lr=1e-9, batch_size=4, adapter=adapter))
    (start_role, tokenizer), (role, _) = load_run(first), load_run(second)
    ids = torch.tensor([tokenizer.prompt_ids("pun: sea 1")])
    with torch.no_grad():
        before, after = start_role.model.forward(ids, start_role.adapters), role.model.forward(ids, role.adapters)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


# ---- steps --------------------------------------------------------------------------------------------------------
def test_learning_rate_rises_and_falls_to_zero() -> None:
    rates = [learning_rate(1.0, step, 10, 0.2) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert [learning_rate(2.0, step, 4, 0.0) for step in range(4)] == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert learning_rate(1.0, 0, 1, 0.1) == 1.0


def small_role() -> Role:
    adapter = Adapter("a", 1, 1.0, {"s": torch.ones(1, 2)}, {"s": torch.ones(2, 1)}).trainable()

    class Model:
        trained_from = None

    return Role(Model(), (adapter,), trained=("a",))


def test_optimizer_step_clips_after_accumulation_and_uses_adam_eps() -> None:
    role = small_role()
    optimizer = make_optimizer(role, 1.0)
    assert [group["param_names"] for group in optimizer.param_groups] == [["a:s.lora_A", "a:s.lora_B"]]
    assert optimizer.defaults["eps"] == 1e-5 and optimizer.defaults["betas"] == (0.9, 0.999)
    a, b = role.parameters()
    for _ in range(2):  # 3-4-5: the accumulated norm is 10
        a.grad = torch.tensor([[3.0, 0.0]]) + (a.grad if a.grad is not None else 0)
        b.grad = torch.tensor([[4.0], [0.0]]) + (b.grad if b.grad is not None else 0)
    stats = optimizer_step(optimizer, 0.1, max_norm=1e-4)
    assert stats == {"grad_norm": pytest.approx(10.0), "skipped_steps": 0.0, "lr": 0.1}
    # Clipped gradient .6e-4 and .8e-4: Adam's first step is lr g / (|g| + 1e-5).
    assert a[0, 0].item() == pytest.approx(1 - 0.1 * 6e-5 / 7e-5, abs=1e-5)
    assert b[0, 0].item() == pytest.approx(1 - 0.1 * 8e-5 / 9e-5, abs=1e-5)
    assert a[0, 1].item() == 1.0 and a.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_is_skipped_and_counted(value: float) -> None:
    role = small_role()
    optimizer = make_optimizer(role, 1.0)
    a, b = role.parameters()
    a.grad, b.grad = torch.tensor([[value, 1.0]]), torch.ones(2, 1)
    assert optimizer_step(optimizer, 0.1, 1.0)["skipped_steps"] == 1.0
    assert torch.equal(a, torch.ones(1, 2)) and torch.equal(b, torch.ones(2, 1)) and a.grad is None
    assert not optimizer.state


def test_the_cursor_visits_every_row_once_a_pass() -> None:
    cursor = Cursor(7, seeded(1, "data"))
    drawn = [row for _ in range(7) for row in cursor.next(3)]
    passes = [drawn[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert passes[0] != passes[1]
    with pytest.raises(UserError, match="no data"):
        Cursor(0, seeded(1, "data"))


def test_a_pass_draws_the_share_of_each_row_that_was_asked_for() -> None:
    shares = [1.0] * 100 + [0.25] * 400
    cursor = Cursor(500, seeded(1, "data"), shares)
    passes: list[list[int]] = []
    while len(passes) < 60:
        first = cursor.next(1)
        passes.append(first + cursor.next(len(cursor.order)))
    assert all(len(set(one)) == len(one) and set(range(100)) <= set(one) for one in passes)
    counts = torch.bincount(torch.tensor([row for one in passes for row in one]), minlength=500)
    assert counts[100:].float().mean().item() / 60 == pytest.approx(0.25, abs=0.01)  # deviation of the mean: .003
    assert counts[100:].min() > 4 and counts[100:].max() < 29, "drawn afresh each pass"  # 15 with a deviation of 3.4
    again = Cursor(500, seeded(1, "data"), shares)
    assert again.next(300) == [row for one in passes for row in one][:300]


def test_total_steps_rounds_up(make: Make) -> None:
    assert total_steps(make(SftConfig, batch_size=4), 10, 1.0) == 3
    assert total_steps(make(SftConfig, batch_size=4), 10, 2.0) == 5
    assert total_steps(make(SftConfig, batch_size=4, steps=9), 10, 2.0) == 9
    assert total_steps(make(SftConfig, batch_size=100), 10, 0.1) == 1


def test_a_dry_run_of_distill_counts_what_it_samples(
    sft_run: str, reward_run: str, tiny_llama: Path, tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("punster.train.distill.measured_speed", lambda *_: 1e6)
    found = []
    for best_of in (4, 8):
        settings = make(DistillConfig, name="d", out=str(tmp_path), model=str(tiny_llama), actor=sft_run, reward_model=reward_run,
                        best_of=best_of, dry_run=True)  # fmt: skip
        assert distill(settings) is None
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith(f"{best_of} samples to each of {len(corpus.prompts('train'))} prompts")
        found.append(float(first.split("about ")[1].split()[0]))
    assert found[1] == pytest.approx(2 * found[0], rel=0.02) and not any(tmp_path.iterdir())


def test_distilled_rows_are_the_best_finished_samples(
    sft_run: str, reward_run: str, tiny_llama: Path, tmp_path: Path, make: Make
) -> None:
    run = start("distill", tmp_path, tiny_llama, sft_run, reward_run, make)
    assert [adapter.name for adapter in load_run(run)[0].adapters] == ["sft", "sft2"]
    with pytest.raises(UserError, match="no sample ended"):
        distill(make(DistillConfig, name="x", out=str(tmp_path), model=str(tiny_llama), actor=sft_run, reward_model=reward_run,
                     max_new_tokens=1, best_of=2))  # fmt: skip


def test_a_text_to_distil_may_be_as_long_as_it_was_sampled(
    sft_run: str, reward_run: str, tiny_llama: Path, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation samples as many tokens: with fewer, a longer text would count as one that does not end."""
    lengths = []

    def noted(
        run: Any, step: int, policy: Any, tokenizer: Any, prompts: Any, decoding: Decoding, **more: Any
    ) -> dict[str, float]:
        lengths.append(decoding.max_new_tokens)
        return {}

    monkeypatch.setattr("punster.train.sft.sample_table", noted)
    shared = {"out": str(tmp_path), "model": str(tiny_llama), "steps": 1, "batch_size": 4}
    distill(make(DistillConfig, name="d", **shared, actor=sft_run, reward_model=reward_run, max_new_tokens=55, best_of=2))
    sft(make(SftConfig, name="s", **shared))
    assert set(lengths[:-2]) == {55} and lengths[-2:] == [40, 40]


def test_paths_are_settings_and_the_callers_settings_stay(sft_run: str, tiny_llama: Path, tmp_path: Path, make: Make) -> None:
    """Verbs return a Path, so the next one is given it."""
    config = make(SftConfig, name="a", out=tmp_path / "o", pretrained=Path(sft_run), steps=1, batch_size=4, eval_prompts=0)
    run = sft(config)
    assert run == tmp_path / "o" / "a" and config.model == SftConfig().model
    assert f"pretrained: {sft_run}\n" in (run / "config.yaml").read_text()
    assert [adapter.name for adapter in load_run(run)[0].adapters] == ["sft", "sft2"]


def test_a_callback_stands_behind_the_rows_as_in_other_verbs(tiny_llama: Path, tmp_path: Path, make: Make) -> None:
    seen = []
    config = make(SftConfig, name="a", out=str(tmp_path), model=str(tiny_llama), steps=2, batch_size=4, eval_prompts=0)
    sft(config, [{"prompt": f"pun: {i}", "completion": "dough."} for i in range(4)], lambda step, metrics: seen.append(step))
    assert seen == [1, 2]


def test_a_metric_that_no_step_has_keeps_nothing_and_is_said(
    tiny_llama: Path, tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {"out": str(tmp_path), "model": str(tiny_llama), "steps": 2, "batch_size": 4, "eval_prompts": 0, "quiet": False}
    for name, best, words in (
        ("a", "-eval_los", "no step has this metric. Did you mean eval_loss"),
        ("b", "-eval_loss", ""),
        ("c", "none", ""),
    ):
        sft(make(SftConfig, name=name, keep_best=best, **shared))
        said = " ".join(capsys.readouterr().err.split())
        assert words in said and ("--keep-best" in said) == bool(words)
