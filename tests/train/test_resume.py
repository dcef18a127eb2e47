"""A run that was interrupted and resumed ends bit for bit where an uninterrupted one ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from punster.cli import main
from punster.config import DpoConfig, GrpoConfig, PpoConfig, RewardConfig, SftConfig
from punster.disk import sha256_of
from punster.errors import UserError
from punster.train.checkpoint import damage, load_run, newest_step
from punster.train.dpo import dpo
from punster.train.grpo import grpo
from punster.train.ppo import ppo
from punster.train.reward import train_reward
from punster.train.run import Interrupted
from punster.train.sft import sft

Make = Callable[..., Any]
Train = Callable[[Any], Any]


# Several passes in five steps, of which each draws eight families and about six of the other twelve.
DRAWN = [{"prompt": f"pun: {i}", "chosen": f"the tide {i}!", "rejected": f"a fact {i}.", **({"pass_share": 0.5} if i % 5 > 1 else {})}
         for i in range(20)]  # fmt: skip


def vowels(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / 10 for text in completions]


def jobs(out: str, model: str, sft_run: str, reward_run: str, make: Make) -> dict[str, tuple[Any, Train]]:
    """Short runs of every loop, with all that has a state: adaptive KL, minibatches, several epochs, online sampling."""
    shared = {"out": out, "model": model, "steps": 5, "save_every": 2, "keep": 99, "seed": 5}
    policy = {**shared, "actor": sft_run, "max_new_tokens": 6, "eval_prompts": 2}
    return {
        "sft": (make(SftConfig, **shared, batch_size=5, weight_decay=0.01), sft),
        "sft-none": (make(SftConfig, **shared, batch_size=5, adapter="none"), sft),
        "reward": (make(RewardConfig, **shared, batch_size=5, pretrained=sft_run, normalise_samples=8), train_reward),
        "reward-families": (make(RewardConfig, **shared, batch_size=5, negatives=["literal", "weak"], families=True, members=2,
                                 normalise_samples=0), train_reward),
        "reward-shares": (make(RewardConfig, **shared, batch_size=5, families=True, members=2, normalise_samples=0, eval_data=[]),
                          lambda config: train_reward(config, DRAWN)),
        "ppo": (
            make(PpoConfig, **policy, batch_size=6, reward_model=reward_run, epochs=2, minibatches=2, target_kl=0.5, kl_horizon=50),
            lambda config: ppo(config, None, vowels),
        ),
        "ppo-none": (make(PpoConfig, **policy, batch_size=6, epochs=1, adapter="none"), lambda config: ppo(config, None, vowels)),
        "grpo": (make(GrpoConfig, **policy, batch_size=8, samples=4, reward_model=reward_run), grpo),
        "dpo": (make(DpoConfig, **shared, actor=sft_run, batch_size=5), dpo),
        "dpo-online": (make(DpoConfig, **shared, actor=sft_run, reward_model=reward_run, batch_size=3, online=True, samples=3,
                            max_new_tokens=6), dpo),
    }  # fmt: skip


NAMES = ("sft", "sft-none", "reward", "reward-families", "reward-shares", "ppo", "ppo-none", "grpo", "dpo", "dpo-online")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [2, 4])
def test_resumed_equals_uninterrupted(
    name: str, step: int, tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    config, train = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)[name]
    whole = train(replace(config, name="whole"))
    copy = reader.interrupted_copy(whole, tmp_path / "copy", step)
    # The name is part of the settings, so the copy goes on under its own.
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("name: whole", "name: copy"))
    assert newest_step(copy) == step
    resumed = train(replace(config, name="copy", resume=True))
    assert reader.tensor_bytes(resumed) == reader.tensor_bytes(whole)
    assert reader.lines(resumed) == reader.lines(whole)
    assert [line["step"] for line in reader.lines(resumed)] == [1, 2, 3, 4, 5]
    if (whole / "samples.jsonl").exists():
        assert reader.lines(resumed, "samples.jsonl") == reader.lines(whole, "samples.jsonl")
    ours, theirs = reader.summary(resumed), reader.summary(whole)
    assert {**ours, "wall_seconds": 0} == {**theirs, "wall_seconds": 0}
    state = [json.loads((reader.final(run) / "state.json").read_text()) for run in (resumed, whole)]
    assert state[0] == state[1]


def test_a_reward_model_does_not_go_on_with_other_shares(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    config, train = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["reward-shares"]
    train(replace(config, name="a", steps=2))
    again = replace(config, name="a", steps=2, resume=True)
    for share in ({}, {"pass_share": 0.4}):
        rows = [{**row, **share} if "pass_share" in row else row for row in DRAWN]
        rows = rows if share else [{k: v for k, v in row.items() if k != "pass_share"} for row in rows]
        with pytest.raises(UserError, match="data"):
            train_reward(again, rows)
    assert train(again)


@pytest.mark.parametrize("name", NAMES)
def test_resuming_a_finished_run_changes_nothing(
    name: str, tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    config, train = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)[name]
    run = train(replace(config, name="done", steps=2))
    before, lines, summary = reader.tensor_bytes(run), reader.lines(run), reader.summary(run)
    train(replace(config, name="done", steps=2, resume=True))
    assert reader.tensor_bytes(run) == before and reader.lines(run) == lines
    assert {**reader.summary(run), "wall_seconds": 0} == {**summary, "wall_seconds": 0}


def test_the_same_seed_repeats_a_run_and_another_does_not(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    config, train = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["grpo"]
    runs = [train(replace(config, name=name, steps=2, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert reader.tensor_bytes(runs[0]) == reader.tensor_bytes(runs[1]) and reader.lines(runs[0]) == reader.lines(runs[1])
    assert reader.tensor_bytes(runs[0]) != reader.tensor_bytes(runs[2])


def test_the_same_seed_in_another_process(tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, reader: Any) -> None:
    """A new interpreter, which hashes strings in another order."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"pun: sea {i}"}) + "\n" for i in range(6)))
    arguments = ["ppo", "-n", "run", "-a", sft_run, "-c", reward_run, "-b", "4", "--steps", "2", "--max-new-tokens", "5", "--prompts", str(prompts),
                 "--model", str(tiny_llama), "--device", "cpu", "--dtype", "fp32", "--quiet", "--out"]  # fmt: skip
    assert main([*arguments, str(tmp_path / "here")]) == 0
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    there = [sys.executable, "-m", "punster.cli", *arguments, str(tmp_path / "there")]
    subprocess.run(there, env=environment, check=True, capture_output=True)
    runs = [tmp_path / place / "run" for place in ("here", "there")]
    assert reader.tensor_bytes(runs[0]) == reader.tensor_bytes(runs[1])
    for log in ("metrics.jsonl", "samples.jsonl"):
        assert reader.lines(runs[0], log) == reader.lines(runs[1], log)


def test_an_interrupt_finishes_the_step_and_can_be_resumed(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    """SIGINT in the third rollout: a checkpoint of step 3, whatever save_every says."""
    config, _ = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["ppo"]
    config = replace(config, save_every=0)
    whole = ppo(replace(config, name="whole"), None, vowels)

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="step 3"):
        ppo(replace(config, name="cut"), None, vowels, stop)
    assert signal.getsignal(signal.SIGINT) is previous
    assert newest_step(tmp_path / "cut") == 3 and not (tmp_path / "cut" / "summary.json").exists()
    resumed = ppo(replace(config, name="cut", resume=True), None, vowels)
    assert reader.tensor_bytes(resumed) == reader.tensor_bytes(whole) and reader.lines(resumed) == reader.lines(whole)


def test_a_damaged_checkpoint_is_skipped_for_an_older_one(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config, train = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["sft"]
    run = train(replace(config, name="run"))
    before = reader.tensor_bytes(run)
    state = run / "checkpoints" / "step-5" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    assert "state.safetensors" in damage(run / "checkpoints" / "step-5")
    assert newest_step(run) == 4
    assert "step-5: state.safetensors is missing or damaged" in capsys.readouterr().err
    train(replace(config, name="run", resume=True))
    assert reader.tensor_bytes(run) == before


def test_resume_refuses_other_settings_and_missing_runs(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make
) -> None:
    config, train = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["sft"]
    train(replace(config, name="run", steps=1))
    with pytest.raises(UserError, match=r"other settings.*lr: 0.0003 -> 0.1"):
        train(replace(config, name="run", steps=1, lr=0.1, resume=True))
    with pytest.raises(UserError, match="there is no run"):
        train(replace(config, name="absent", resume=True))
    assert not (tmp_path / "absent").exists()


def test_the_clock_goes_on_where_it_was(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds pass at each look at the clock: what was spent before the interruption counts."""
    looks = iter(range(10**6))
    monkeypatch.setattr("punster.train.run.time.monotonic", lambda: 10.0 * next(looks))
    config, train = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["sft"]
    whole = train(replace(config, name="whole"))
    copy = reader.interrupted_copy(whole, tmp_path / "copy", 4)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("name: whole", "name: copy"))
    spent = json.loads((copy / "checkpoints" / "step-4" / "context.json").read_text())["seconds"]
    assert spent >= 50
    resumed = train(replace(config, name="copy", resume=True))
    times = [row["seconds"] for row in reader.lines(resumed, drop=())]
    assert times == sorted(times) and times[3] <= spent < times[4] < reader.summary(resumed)["wall_seconds"]


@pytest.mark.parametrize("what", ["data", "SFT run", "reward model"])
def test_resume_refuses_what_is_no_longer_the_same(
    what: str, tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make
) -> None:
    """Other prompts, another adapter below the policy, another reward model, each under the name it had."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"pun: sea {i}"}) + "\n" for i in range(6)))
    actor, judge = tmp_path / "sft", tmp_path / "reward"
    shutil.copytree(sft_run, actor)
    shutil.copytree(reward_run, judge)
    config, _ = jobs(str(tmp_path), str(tiny_llama), str(actor), str(judge), make)["grpo"]
    config = replace(config, name="run", prompts=str(prompts))

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        grpo(config, callback=stop)
    if what == "data":
        prompts.write_text(prompts.read_text().replace("sea 5", "sea 6"))
    else:
        place = actor if what == "SFT run" else judge
        kind, verb = (SftConfig, sft) if what == "SFT run" else (RewardConfig, train_reward)
        shutil.rmtree(place)
        more = {} if what == "SFT run" else {"pretrained": str(actor), "normalise_samples": 0}
        verb(make(kind, name=place.name, out=str(tmp_path), model=str(tiny_llama), steps=1, batch_size=4, **more))
    with pytest.raises(UserError, match=f"--resume: the .*{what}.* is not what the run was started with"):
        grpo(replace(config, resume=True))


def test_old_checkpoints_are_removed(tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make) -> None:
    config, train = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["sft"]
    run = train(replace(config, name="run", save_every=1, keep=2))
    assert sorted(place.name for place in (run / "checkpoints").iterdir()) == ["step-4", "step-5"]


def again(run: Path, name: str, step: int, reader: Any) -> None:
    """A copy of a run as it was after a step, under another name."""
    copy = reader.interrupted_copy(run, run.parent / name, step)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(f"name: {run.name}", f"name: {name}"))


def test_another_sft_run_of_own_weights_is_no_base_to_go_on_from(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    first, _ = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["sft-none"]
    config, train = jobs(str(tmp_path), str(tiny_llama), str(tmp_path / "full"), reward_run, make)["ppo-none"]
    config = replace(config, adapter="lora", reward_model=None)
    sft(replace(first, name="full"))
    again(train(replace(config, name="whole")), "copy", 2, reader)
    shutil.rmtree(tmp_path / "full")
    sft(replace(first, name="full", seed=77))
    with pytest.raises(UserError, match="SFT run or the reward model is not what the run was started with"):
        train(replace(config, name="copy", resume=True))


def test_other_labels_or_sft_rows_make_another_run(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    shared = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)
    config = replace(shared["dpo"][0], loss_type="kto")
    rows = [{"prompt": f"pun: {i}", "completion": f"text {i}", "label": i % 2 == 0} for i in range(10)]
    again(dpo(replace(config, name="kto"), rows), "kto2", 2, reader)
    with pytest.raises(UserError, match="the data is not what the run was started with"):
        dpo(replace(config, name="kto2", resume=True), [{**row, "label": not row["label"]} for row in rows])
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(shared["ppo"][0], sft_coef=0.1, sft_data=[str(file)])
    again(ppo(replace(config, name="ppo"), None, vowels), "ppo2", 2, reader)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    with pytest.raises(UserError, match="the data is not what the run was started with"):
        ppo(replace(config, name="ppo2", resume=True), None, vowels)


JUDGED = [
    *({"prompt": f"pun: {i}", "chosen": f"the tide {i}!", "rejected": f"a fact {i}.", "margin": 0.1} for i in range(4)),
    *({"prompt": f"pun: {i}", "completions": ["a", "b", "c"], "scores": [3, 2, 1]} for i in range(4)),
    *({"prompt": f"pun: {i}", "completion": f"tied {i}", "label": i > 1, "rating": 0.5} for i in range(4)),
]  # fmt: skip


@pytest.mark.parametrize("other", [{"margin": 0.2}, {"scores": [3, 2, 2]}, {"label": True}, {"rating": 0.7}, {"weight": 2.0}])
def test_other_judgements_of_the_same_texts_make_another_reward_run(
    other: dict[str, Any], tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    config = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["reward"][0]
    again(train_reward(replace(config, name="a"), JUDGED), "b", 2, reader)
    place = 4 if "scores" in other else 0 if {"margin", "weight"} & set(other) else 8
    rows = [{**row, **other} if number == place else row for number, row in enumerate(JUDGED)]
    with pytest.raises(UserError, match=r"the data .its scores, labels, .* is not what the run was started with"):
        train_reward(replace(config, name="b", resume=True), rows)
    assert train_reward(replace(config, name="b", resume=True), JUDGED)


def test_another_sft_run_to_normalise_on_makes_another_reward_run(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    """An older version did not keep what the samples are drawn from: its runs go on."""
    actor = tmp_path / "sft"
    shutil.copytree(sft_run, actor)
    config = jobs(str(tmp_path), str(tiny_llama), str(actor), reward_run, make)["reward"][0]
    run = train_reward(replace(config, name="a"), JUDGED)
    for name in ("b", "old"):
        again(run, name, 2, reader)
    shutil.rmtree(actor)
    sft(make(SftConfig, name="sft", out=str(tmp_path), model=str(tiny_llama), steps=1, batch_size=4))
    with pytest.raises(UserError, match="the SFT run or the reward model is not what the run was started with"):
        train_reward(replace(config, name="b", resume=True), JUDGED)
    place = tmp_path / "old" / "checkpoints" / "step-2"
    numbers = json.loads((place / "state.json").read_text())
    numbers["keys"] = {key: numbers["keys"][key] for key in ("adapters", "weights", "data")}
    (place / "state.json").write_text(json.dumps(numbers))
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({**manifest, "state.json": sha256_of(place / "state.json")}))
    assert train_reward(replace(config, name="old", resume=True), JUDGED)


def test_the_same_reward_model_on_another_scale_makes_another_run(
    tiny_llama: Path, sft_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    settings = {"out": str(tmp_path), "model": str(tiny_llama), "pretrained": sft_run, "steps": 1, "batch_size": 4}
    judge = train_reward(make(RewardConfig, name="judge", normalise_samples=8, **settings), JUDGED)
    config, train = jobs(str(tmp_path), str(tiny_llama), sft_run, str(judge), make)["grpo"]
    again(train(replace(config, name="a")), "b", 2, reader)
    before = reader.tensor_bytes(judge)
    shutil.rmtree(str(judge))
    train_reward(make(RewardConfig, name="judge", normalise_samples=16, **settings), JUDGED)
    assert reader.tensor_bytes(judge) == before
    with pytest.raises(UserError, match="the SFT run or the reward model is not what the run was started with"):
        train(replace(config, name="b", resume=True))


def test_rows_from_python_are_not_called_the_embedded_corpus(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    shared = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)
    rows = [{"prompt": "p", "completion": f"text {i}"} for i in range(6)]
    runs = [
        sft(replace(shared["sft"][0], name="a", steps=1), rows),
        grpo(replace(shared["grpo"][0], name="b", steps=1), ["pun: sea"]),
    ]
    for run, key in zip(runs, ("data: \n- (given from Python)", "prompts: (given from Python)"), strict=True):
        assert key.replace(" \n", "\n") in (run / "config.yaml").read_text()
    again(sft(replace(shared["sft"][0], name="c"), rows), "d", 2, reader)
    assert sft(replace(shared["sft"][0], name="d", resume=True), rows) is not None


def test_settings_that_name_no_data_or_change_nothing_do_not_stop_a_resumed_run(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    """As earlier versions wrote them: the data of a run on rows from Python, and the horizon of a controller that was off."""
    config = replace(jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["ppo"][0], target_kl=None, kl_horizon=None)
    again(ppo(replace(config, name="new"), ["pun: sea", "pun: oak"], vowels), "old", 2, reader)
    file = tmp_path / "old" / "config.yaml"
    text = file.read_text().replace("kl_horizon: null", "kl_horizon: 10000")
    text = text.replace("prompts: (given from Python)", "prompts: embedded")
    assert "kl_horizon: 10000" in text and "prompts: embedded" in text
    file.write_text(text)
    resumed = ppo(replace(config, name="old", resume=True), ["pun: sea", "pun: oak"], vowels)
    assert reader.tensor_bytes(resumed) == reader.tensor_bytes(tmp_path / "new")
    with pytest.raises(UserError, match="kl_horizon: 10000 -> 64"):
        ppo(replace(config, name="old", resume=True, target_kl=1.0, kl_horizon=64), ["pun: sea", "pun: oak"], vowels)


def test_a_resumed_run_takes_the_tokens_that_are_asked_for_unless_memory_ran_out(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import punster.train.sft as module

    config, train = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["sft"]
    monkeypatch.setattr("punster.train.checkpoint.damage", lambda place: "")  # a state is changed below
    asked: list[int] = []
    accumulate = module.accumulate_nll

    def seen(*given: Any) -> Any:
        asked.append(given[-1])
        return accumulate(*given)

    ran_out: dict[str, int] = {"max_tokens": 128}  # halved by a process that ran out of memory
    for name, changed, wanted, expected in (
        ("enough", {}, 4096, 4096), ("ran_out", ran_out, 4096, 128), ("and_fewer_asked", ran_out, 64, 64),
        ("older", {"asked_tokens": None}, 4096, 256),
    ):  # fmt: skip
        run = Path(str(train(replace(config, name=f"{name}_first", max_tokens=256))))
        again(run, name, 2, reader)
        state = max((tmp_path / name / "checkpoints").glob("step-*/state.json"))
        numbers = json.loads(state.read_text())
        assert numbers["numbers"]["asked_tokens"] == 256
        numbers["numbers"] = {key: n for key, n in (numbers["numbers"] | changed).items() if n is not None}
        state.write_text(json.dumps(numbers))
        asked.clear()
        monkeypatch.setattr(module, "accumulate_nll", seen)
        train(replace(config, name=name, max_tokens=wanted, resume=True))
        monkeypatch.setattr(module, "accumulate_nll", accumulate)
        assert asked and set(asked) == {expected}, name
        last = max((tmp_path / name / "checkpoints").glob("step-*/state.json"), key=lambda file: int(file.parent.name[5:]))
        assert json.loads(last.read_text())["numbers"]["asked_tokens"] == wanted


def test_a_reward_from_python_is_named_and_missed(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    config = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["ppo"][0]
    run = ppo(replace(config, name="with"), None, vowels)
    assert "reward:\n- (given from Python)" in (Path(str(run)) / "config.yaml").read_text()
    again(run, "half", 2, reader)
    with pytest.raises(UserError, match="reward"):  # not silently on by the reward model alone
        ppo(replace(config, name="half", resume=True))
    with pytest.raises(UserError, match="a function given from Python"):
        ppo(replace(config, name="other", reward=["(given from Python)"]))
    resumed = ppo(replace(config, name="half", resume=True), None, vowels)
    assert reader.tensor_bytes(resumed) == reader.tensor_bytes(run)
    again(ppo(replace(config, name="without")), "more", 2, reader)
    with pytest.raises(UserError, match="reward"):  # nor silently by another objective
        ppo(replace(config, name="more", resume=True), None, vowels)


def test_a_run_of_another_type_of_weights_says_how_to_go_on(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started where --dtype auto is fp32, resumed where it is bf16: the weights are the same, their type is not."""
    config, train = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["sft"]
    monkeypatch.setattr("punster.train.setup.fast_bf16", lambda device: False)
    run = train(replace(config, name="first", dtype="auto"))
    again(run, "second", 2, reader)
    monkeypatch.setattr("punster.train.setup.fast_bf16", lambda device: True)
    with pytest.raises(UserError, match="started with float32 weights, and here they are bfloat16: add --dtype fp32"):
        train(replace(config, name="second", dtype="auto", resume=True))
    resumed = train(replace(config, name="second", dtype="fp32", resume=True))
    assert reader.tensor_bytes(resumed) == reader.tensor_bytes(run)


def test_another_prompt_format_is_no_wish(tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make) -> None:
    config, train = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["dpo"]
    with pytest.raises(UserError, match="was trained with 'chat', and this run continues it"):
        train(replace(config, name="other", prompt_format="{prompt}:"))
    assert not (tmp_path / "other").exists()


def test_both_spellings_of_a_line_end_are_one_prompt_format(tiny_llama: Path, tmp_path: Path, make: Make) -> None:
    rows = [{"prompt": f"pun: {i}", "completion": f"the tide {i}!"} for i in range(4)]
    config = make(SftConfig, name="a", out=str(tmp_path), model=str(tiny_llama), steps=1, batch_size=4, eval_prompts=0)
    sft(replace(config, prompt_format=r"{prompt}\n"), rows)
    assert load_run(str(tmp_path / "a"))[1].prompt_format == "{prompt}\n"
    for name, written in (("b", r"{prompt}\n"), ("c", "{prompt}\n")):
        sft(replace(config, name=name, pretrained=str(tmp_path / "a"), prompt_format=written), rows)
        sft(replace(config, name="a", prompt_format=written, resume=True), rows)


def test_a_refused_resume_takes_nothing_away(
    tiny_llama: Path, sft_run: str, reward_run: str, tmp_path: Path, make: Make, reader: Any
) -> None:
    """Logs behind the checkpoint and the summary are evidence until the run goes on; nor did it crash."""
    config, train = jobs(str(tmp_path), str(tiny_llama), sft_run, reward_run, make)["grpo"]
    again(train(replace(config, name="a")), "b", 2, reader)
    run = tmp_path / "b"
    shutil.copy(tmp_path / "a" / "metrics.jsonl", run / "metrics.jsonl")  # as if it had gone on to the fifth step
    (run / "summary.json").write_text('{"aborted": "exact KL", "aborted_at": 5}\n')
    kept = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "summary.json")}
    weights = reader.final(run) / "role.json"
    described = weights.read_text()
    for text in (described.replace('"float32"', '"bfloat16"'), described.replace('"base_sha256": "', '"base_sha256": "0')):
        weights.write_text(text)
        manifest = json.loads((weights.parent / "manifest.json").read_text())
        (weights.parent / "manifest.json").write_text(json.dumps({**manifest, "role.json": sha256_of(weights)}))
        with pytest.raises(UserError, match="--resume"):
            train(replace(config, name="b", resume=True))
        assert {name: (run / name).read_bytes() for name in kept} == kept and not (run / "crash.json").exists()
    weights.write_text(described)
    (weights.parent / "manifest.json").write_text(json.dumps({**manifest, "role.json": sha256_of(weights)}))
    assert reader.tensor_bytes(train(replace(config, name="b", resume=True))) == reader.tensor_bytes(tmp_path / "a")
    assert reader.lines(run) == reader.lines(tmp_path / "a") and "aborted" not in reader.summary(run)
