"""Reward models: the head learns under LoRA, scores are normalised, padding is harmless, the placebo flips labels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from punster.config import RewardConfig
from punster.data import corpus
from punster.data.batch import collate
from punster.errors import UserError
from punster.model import kernels
from punster.model.heads import ScalarHead
from punster.model.role import Role, score_examples
from punster.rollout.sampler import Decoding, generate
from punster.train.checkpoint import load_run
from punster.train.judged import balanced, encode_items, shuffled, swapped
from punster.train.lessons import drawn_prompts, sft_samples
from punster.train.optim import seeded
from punster.train.plan import training_cost, training_seconds
from punster.train.reward import train_reward, within_minutes
from punster.train.run import saved_settings
from punster.train.setup import extend, open_base, open_reward_model

Make = Callable[..., Any]
PAIRS = [{"prompt": f"pun: {i}", "chosen": f"the tide {i}!", "rejected": f"a fact {i}."} for i in range(8)]


def test_head_and_adapter_change_under_lora(reward_run: str, reader: Any) -> None:
    trained = load_file(reader.final(reward_run) / "head.safetensors")
    fresh = ScalarHead.create(32, seeded(1, "head"))
    assert float((trained["head.weight"] - fresh.weight).abs().min()) > 0
    assert float((trained["head.weight"] - fresh.weight).abs().max()) < 0.1, "the head starts from the seeded initial weights"
    adapter = reader.adapter(reward_run, "reward")
    assert adapter and all(float(tensor.abs().max()) > 0 for name, tensor in adapter.items() if "lora_B" in name)


def test_the_head_starts_at_one_over_root_width() -> None:
    head = ScalarHead.create(40_000, seeded(1, "head"))
    assert head.weight.std().item() * math.sqrt(40_001) == pytest.approx(1, abs=0.02)
    assert head.bias.item() == 0


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_samples_of_the_sft_model_have_mean_0_and_std_1(
    pooling: str, sft_run: str, tiny_llama: Path, tmp_path: Path, make: Make
) -> None:
    """Scored afresh with the loaded run, on the very samples that normalisation draws."""
    run = train_reward(make(RewardConfig, name="run", out=str(tmp_path), model=str(tiny_llama), pretrained=sft_run, steps=2,
                            pooling=pooling, normalise_samples=40))  # fmt: skip
    role, tokenizer = load_run(run)
    policy, _ = load_run(sft_run)
    rows = [{"prompt": prompt} for prompt in corpus.prompts("train")]
    ids = drawn_prompts(policy, tokenizer, rows, 40, 1)
    rollout = generate(policy, ids, Decoding(40), tokenizer.eos_id, seeded(1, "normalise"))
    scores = torch.tensor(score_examples(role, rollout.closed))
    assert role.pooling == pooling and role.normalisation != (1.0, 0.0)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1, abs=1e-4)
    assert role.normalisation[0] > 0, "a negative gain would turn preferences round"


def test_no_normalisation_on_request(sft_run: str, tiny_llama: Path, tmp_path: Path, make: Make) -> None:
    run = train_reward(
        make(RewardConfig, name="run", out=str(tmp_path), model=str(tiny_llama), steps=1, normalise_samples=0), PAIRS
    )
    assert load_run(run)[0].normalisation == (1.0, 0.0)


def test_a_checkpoint_that_is_not_normalised_says_so_where_it_judges(
    sft_run: str, tiny_llama: Path, tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {"out": str(tmp_path), "model": str(tiny_llama), "pretrained": sft_run, "steps": 2, "save_every": 1, "keep": 2}
    runs = [train_reward(make(RewardConfig, name=f"r{n}", normalise_samples=n, **shared), PAIRS) for n in (8, 0)]
    policy, tokenizer = load_run(sft_run)

    def said(path: Path, quiet: bool = False) -> str:
        config = make(RewardConfig, name="x", quiet=quiet)
        open_reward_model(str(path), config, policy, tokenizer)
        return capsys.readouterr().err

    early = runs[0] / "checkpoints" / "step-1"
    assert "step-1: not normalised" in said(early) and not said(early, quiet=True)
    assert not said(runs[0]) and not said(runs[1]) and not said(runs[1] / "checkpoints" / "step-1")  # none was wanted


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_does_not_move_scores(pooling: str, reward_run: str) -> None:
    role, tokenizer = load_run(reward_run)
    role = replace(role, pooling=pooling)
    examples, _ = encode_items([*PAIRS, {"prompt": "x", "chosen": "long " * 15, "rejected": "y"}], tokenizer, role.model)
    alone = torch.cat([role.scores_and_spread(collate([example]))[0] for example in examples])
    for pad in (0, tokenizer.eos_id, 77):
        torch.testing.assert_close(role.scores_and_spread(collate(examples, pad_id=pad))[0], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(score_examples(role, examples, max_tokens=64)), alone, rtol=0, atol=1e-5)
    assert alone.std() > 0.01


def test_the_last_token_is_eos_and_mean_covers_the_response_only(reward_run: str) -> None:
    role, tokenizer = load_run(reward_run)
    examples, _ = encode_items(PAIRS[:2], tokenizer, role.model)
    batch = collate(examples)
    assert role.head is not None
    values = role.head(role.hidden(batch))
    for row, example in enumerate(examples):
        assert example.response[-1] == tokenizer.eos_id
        at = values[row, : example.length]
        assert role.raw_scores(batch)[row].item() == pytest.approx(at[-1].item(), abs=1e-6)
        mean = at[len(example.prompt) :].mean().item()
        assert replace(role, pooling="mean").raw_scores(batch)[row].item() == pytest.approx(mean, abs=1e-6)


def test_first_loss_by_hand(tiny_llama: Path, tmp_path: Path, make: Make, reader: Any) -> None:
    """Bradley-Terry of the untrained head with margins subtracted, plus the centring term, mean over pairs."""
    rows = [{**pair, "margin": 0.5 * i} for i, pair in enumerate(PAIRS)]
    config = make(
        RewardConfig, name="run", out=str(tmp_path), model=str(tiny_llama), steps=1, batch_size=8, normalise_samples=0, depth=0
    )
    run = train_reward(config, rows)
    trained, tokenizer = load_run(run)
    untrained = Role(trained.model, head=ScalarHead.create(32, seeded(1, "head")))
    examples, items = encode_items(rows, tokenizer, trained.model)
    margins = torch.tensor([item.margin for item in items])
    scores = torch.tensor(score_examples(untrained, examples), dtype=torch.float64)
    chosen, rejected = scores[::2], scores[1::2]
    loss = -torch.sigmoid(chosen - rejected - margins).log().mean() + 0.01 * (chosen + rejected).square().mean()
    (line,) = reader.lines(run)
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert line["accuracy"] == pytest.approx((chosen > rejected).double().mean().item())
    assert line["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)


def test_micro_batches_do_not_change_a_reward_run(tiny_llama: Path, tmp_path: Path, make: Make, reader: Any) -> None:
    config = make(RewardConfig, name="a", out=str(tmp_path), model=str(tiny_llama), steps=3, batch_size=8, normalise_samples=0)
    runs = [train_reward(replace(config, name=name, max_tokens=size), PAIRS) for name, size in (("a", 64), ("b", 100_000))]
    for metric in ("loss", "margin", "grad_norm"):
        assert reader.values(runs[0], metric) == pytest.approx(reader.values(runs[1], metric), abs=1e-5)


@pytest.mark.skipif(not kernels.in_halves(), reason="no products in 8 bits here: int8 changes nothing")
def test_steps_in_8_bits_are_near_to_others_and_resume(
    make_model: Callable[..., Path], tmp_path: Path, make: Make, reader: Any
) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 96}
    config = make(
        RewardConfig, out=str(tmp_path), model=str(make_model("llama", **sizes)), dtype="bf16", steps=12, batch_size=8, save_every=6,
        keep=9, normalise_samples=0, lr=0.01, depth=0,
    )  # fmt: skip
    plain, coarse = (train_reward(replace(config, name=f"run{int8}", int8=int8), PAIRS) for int8 in (False, True))
    losses = [torch.tensor(reader.values(run, "loss")) for run in (plain, coarse)]
    assert float(losses[0][-1]) < 0.5 * float(losses[0][0])  # so that the steps depend on the states
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=0.1, atol=0.01)
    copy = reader.interrupted_copy(coarse, tmp_path / "copy", 6)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("name: runTrue", "name: copy"))
    resumed = train_reward(replace(config, name="copy", int8=True, resume=True), PAIRS)
    assert reader.tensor_bytes(resumed) == reader.tensor_bytes(coarse)
    role, tokenizer = load_run(coarse, dtype=torch.bfloat16)
    assert not role.model.coarse
    examples, _ = encode_items(PAIRS, tokenizer, role.model)
    scores = score_examples(role, examples)
    with role.model.in_bytes():
        assert score_examples(role, examples) != scores


def test_passes_and_batches_are_halved_until_they_fit_into_the_minutes(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    def found(minutes: float, fixed: float = 0.0, **settings: Any) -> RewardConfig:
        given = {"epochs": 2.0, "batch_size": 27, "steps": None, "quiet": False, **settings}
        # A smaller batch takes longer for a pass here, so that the plan which is estimated is the one that is taken.
        return within_minutes(
            make(RewardConfig, name="x", minutes=minutes, **given), lambda c: fixed + c.epochs * (45 + 27 / c.batch_size - 1)
        )

    def plan(minutes: float, **settings: Any) -> tuple[float, int]:
        config = found(minutes, **settings)
        assert config.minutes == 0
        return config.epochs, config.batch_size

    assert plan(0) == plan(76) == (2, 27) and not capsys.readouterr().err  # 90 are 76 and a fifth
    assert found(74, families=True) == make(
        RewardConfig, name="x", epochs=1.0, batch_size=13, steps=None, quiet=False, families=True
    )
    assert "2 would take about 90 minutes on this machine; 1, in steps of 13 families, about 46 (" in capsys.readouterr().err
    assert plan(25) == (0.5, 7) and plan(10) == (0.25, 7) and plan(10, batch_size=3) == (0.125, 1) and plan(1.5) == (2 / 64, 7)
    assert "in steps of 7 rows" in capsys.readouterr().err
    assert plan(1, steps=10) == (2, 27), "steps that are given stay"
    assert plan(25, quiet=True) == (0.5, 7) and not capsys.readouterr().err
    with pytest.raises(UserError, match=r"--minutes 25: even 0\.03125 passes would take about 41 minutes"):
        found(25, fixed=40)  # as --pretrain takes, which is always one pass


def test_a_run_that_fits_into_its_minutes_goes_on_with_its_passes(
    tiny_llama: Path, tmp_path: Path, make: Make, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(
        RewardConfig, name="a", out=str(tmp_path), model=str(tiny_llama), steps=None, epochs=4.0, batch_size=4, save_every=2, keep=9,
        normalise_samples=0, eval_data=[],
    )  # fmt: skip
    half = train_reward(replace(config, name="half", epochs=2.0, batch_size=2), PAIRS)
    monkeypatch.setattr("punster.train.reward.training_seconds", lambda config, model, texts, passes, check: 600 * passes)
    short = train_reward(replace(config, minutes=22), PAIRS)  # 40 minutes for four passes
    saved = saved_settings(short)
    assert (saved["epochs"], saved["batch_size"], saved["minutes"]) == (2.0, 2, 0.0)
    assert reader.tensor_bytes(short) == reader.tensor_bytes(half)
    events = [json.loads(line) for line in (short / "run.log").read_text().splitlines()]
    assert [(e["asked"], e["epochs"], e["batch_size"]) for e in events if e["event"] == "shortened"] == [(4.0, 2.0, 2)]
    assert "shortened" not in (half / "run.log").read_text()
    copy = reader.interrupted_copy(short, tmp_path / "copy", 4)
    text = (copy / "config.yaml").read_text().replace("name: a", "name: copy")
    (copy / "config.yaml").write_text(text)
    monkeypatch.setattr("punster.train.reward.training_seconds", lambda *_, check: 0.0)  # resumed on a faster machine
    again = replace(config, name="copy", minutes=22, resume=True)
    resumed = train_reward(again, PAIRS)
    assert reader.tensor_bytes(resumed) == reader.tensor_bytes(short)
    for change, said in (({"epochs": 3.0}, "epochs: 2.0 -> 3.0"), ({"batch_size": 8}, "batch_size: 2 -> 8")):
        with pytest.raises(UserError, match=f"other settings than the run was started with .*{said}"):
            train_reward(replace(again, **change), PAIRS)
    (copy / "config.yaml").write_text(text.replace("epochs: 2.0", "epochs: most"))
    with pytest.raises(UserError, match=r"epochs: 'most' -> 4\.0"):
        train_reward(again, PAIRS)


def test_the_estimate_knows_of_8_bits_and_of_texts_that_are_never_used(
    tiny_llama: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(RewardConfig, model=str(tiny_llama), int8=True)
    base, tokenizer = open_base(config)
    examples, _ = encode_items(PAIRS, tokenizer, base)
    monkeypatch.setattr("punster.train.plan.measured_speed", lambda *_: 1e6)
    seconds = []
    for in_bytes in (False, True):
        monkeypatch.setattr("punster.train.plan.fused.quantises", lambda *_, found=in_bytes: found)
        seconds.append(training_seconds(config, Role(base), examples, 1.0))
    assert seconds[1] / seconds[0] == pytest.approx(0.8 / 0.75 * 0.6)
    frozen = extend(Role(base), replace(config, top_layers="1"), "reward", 0)
    assert frozen.frozen_depth > 0
    assert training_cost(frozen, examples, 0.5) == pytest.approx(training_cost(frozen, examples, 1.0) / 2)
    assert training_cost(frozen, examples, 2.0) < 2 * training_cost(frozen, examples, 1.0)


def test_swapped_pairs_take_their_ids_along(reward_run: str) -> None:
    role, tokenizer = load_run(reward_run)
    row = {"prompt": "pun: sea", "chosen": "the sea made dough.", "rejected": "the tide", "_rejected_ids": [70, 71, 72, 2]}
    straight, turned = (encode_items([r], tokenizer, role.model)[0] for r in (row, swapped(row)))
    assert turned == straight[::-1] and straight[1].response == (70, 71, 72, 2)


def test_balanced_pairs_have_the_longer_text_right_as_often_as_wrong(reward_run: str) -> None:
    tokenizer = load_run(reward_run)[1]
    pun = "the sea made dough."
    length = len(tokenizer.response_ids(pun))
    gaps = [3] * 7 + [-2] * 4 + [9] * 5 + [0] * 2 + [-30]
    rows = [{"id": str(i), "chosen": pun, "rejected": "x", "_rejected_ids": [5] * (length - gap)} for i, gap in enumerate(gaps)]
    kept = [gaps[int(row["id"])] for row in balanced(rows, tokenizer)]
    assert sorted(kept) == [-2] * 4 + [0] * 2 + [3] * 4  # 9 and -30 have no counterpart
    assert balanced([], tokenizer) == []


def test_shuffled_labels_are_a_seeded_coin_for_each_pair(make: Make) -> None:
    rows = [{"prompt": str(i), "chosen": f"good {i}", "rejected": f"bad {i}", "kind": "x"} for i in range(400)]
    config = make(RewardConfig, name="x", shuffle_labels=True)
    swapped = shuffled(rows, config)
    flips = [row["chosen"].startswith("bad") for row in swapped]
    assert 160 < sum(flips) < 240
    for row, flip, number in zip(swapped, flips, range(400), strict=True):
        assert {row["chosen"], row["rejected"]} == {f"good {number}", f"bad {number}"} and row["prompt"] == str(number)
        assert row["chosen"] == (f"bad {number}" if flip else f"good {number}")
    assert shuffled(rows, config) == swapped
    assert shuffled(rows, replace(config, seed=2)) != swapped
    assert shuffled(rows, replace(config, shuffle_labels=False)) == rows


def test_depth_reads_lower_layers(tiny_llama: Path, tmp_path: Path, make: Make, reader: Any) -> None:
    config = make(RewardConfig, name="run", out=str(tmp_path), model=str(tiny_llama), steps=1, depth=2, normalise_samples=0)
    role, tokenizer = load_run(train_reward(config, PAIRS))
    assert role.depth == 2 and role.first_layer == 1
    batch = collate(encode_items(PAIRS, tokenizer, role.model)[0])
    before = role.scores_and_spread(batch)[0]
    role.model.weights["model.layers.3.mlp.down_proj.weight"] += 1.0
    assert torch.equal(role.scores_and_spread(batch)[0], before)
    with pytest.raises(UserError, match="--depth 9"):
        train_reward(replace(config, name="deep", depth=9), PAIRS)


def test_reward_on_the_sft_adapter_keeps_it(sft_run: str, tiny_llama: Path, tmp_path: Path, make: Make, reader: Any) -> None:
    run = train_reward(make(RewardConfig, name="run", out=str(tmp_path), model=str(tiny_llama), pretrained=sft_run, start="sft", steps=2,
                            normalise_samples=0), PAIRS)  # fmt: skip
    kept, given = reader.adapter(run, "sft"), reader.adapter(sft_run, "sft")
    assert all(torch.equal(kept[name], given[name]) for name in given)


def test_full_fine_tuning_of_a_reward_model_saves_and_loads(tiny_llama: Path, tmp_path: Path, make: Make, reader: Any) -> None:
    config = make(RewardConfig, name="run", out=str(tmp_path), model=str(tiny_llama), steps=40, batch_size=8, adapter="none",
                  normalise_samples=0, lr=3e-3)  # fmt: skip
    run = train_reward(config, PAIRS)
    role, tokenizer = load_run(run)
    scores = score_examples(role, encode_items(PAIRS, tokenizer, role.model)[0])
    margin = sum(a - b for a, b in zip(scores[::2], scores[1::2], strict=True)) / 8
    assert margin == pytest.approx(reader.values(run, "margin")[-1], abs=0.1) and margin > 1


def test_summary_holds_accuracies_by_kind(reward_run: str, reader: Any) -> None:
    accuracies = reader.summary(reward_run)["accuracy"]
    assert set(accuracies) == {*corpus.NEGATIVES, "template"}
    assert all(0 <= value <= 1 for value in accuracies.values())


def test_an_ensemble_counts_all_skipped_updates_and_is_judged_as_it_is_kept(
    tiny_llama: Path, sft_run: str, tmp_path: Path, make: Make, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two members has a gradient that is not finite, and a head a hundred times the other's."""
    import punster.train.reward as module

    calls, plain = [0], module.optimizer_step

    def spoilt(optimizer: Any, *rest: Any) -> dict[str, float]:
        calls[0] += 1
        if calls[0] == 1:
            optimizer.param_groups[0]["params"][0].grad.fill_(math.nan)
        return plain(optimizer, *rest)

    made = module.new_member

    def loud(start: Role, config: RewardConfig, number: int, items: Any) -> Role:
        member = made(start, config, number, items)
        assert member.head is not None
        if number == 0:
            member.head.weight.data.mul_(100)
        return member

    monkeypatch.setattr(module, "optimizer_step", spoilt)
    monkeypatch.setattr(module, "new_member", loud)
    settings = {"members": 2, "combine": "min", "pretrained": sft_run, "normalise_samples": 8, "steps": 2, "lr": 1e-4}
    run = train_reward(make(RewardConfig, name="two", out=str(tmp_path), model=str(tiny_llama), **settings))
    assert reader.values(run, "skipped_steps") == [1.0, 0.0]
    role, tokenizer = load_run(str(run))
    assert reader.summary(run)["accuracy"] == module.accuracy_by_kind(role, tokenizer, 60)
    raw = replace(role, normalisation=(1.0, 0.0), others=tuple(replace(o, normalisation=(1.0, 0.0)) for o in role.others))
    assert reader.summary(run)["accuracy"] != module.accuracy_by_kind(raw, tokenizer, 60)


def test_no_sampled_rows_are_none_of_that_kind(sft_run: str, tiny_llama: Path, tmp_path: Path, make: Make, reader: Any) -> None:
    config = make(RewardConfig, name="a", out=str(tmp_path), model=str(tiny_llama), pretrained=sft_run, steps=1, sampled_rows=0,
                  normalise_samples=0)  # fmt: skip
    pairs = {
        name: reader.summary(train_reward(replace(config, name=name, negatives=kinds)))["pairs"]
        for name, kinds in (("a", ["literal", "sampled"]), ("b", ["literal"]))
    }
    assert pairs["a"] == pairs["b"] > 0
    with pytest.raises(UserError, match="--sampled-rows 0 leaves no pair of the embedded corpus"):
        train_reward(replace(config, name="c", negatives=["sampled"]))


def test_bad_settings_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"negatives": ["funny"]}, "unknown kind 'funny'"),
        ({"negatives": ["sampled"]}, "needs an SFT run"),
        ({"start": "sft"}, "needs an SFT run"),
        ({"negatives": ["template"], "split": "gold"}, "for --split train"),
        ({"epochs": 0}, "--epochs"),
    ):
        with pytest.raises(UserError, match=message):
            RewardConfig(name="x", out=str(tmp_path), **settings)


def test_the_score_is_normalised_on_prompts_of_all_files_that_leave_room(
    sft_run: str, tiny_llama: Path, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on the first file's alone; and one prompt with room among many without still gives a spread."""
    asked: list[Any] = []

    def noted(policy: Any, tokenizer: Any, ids: list[list[int]], seed: int, stream: str) -> list[Any]:
        asked[:] = map(tuple, ids)
        return sft_samples(policy, tokenizer, ids, seed, stream)

    monkeypatch.setattr("punster.train.reward.sft_samples", noted)
    pair = {"chosen": "the tide made dough.", "rejected": "the tide was 3."}
    settings = {"out": str(tmp_path), "model": str(tiny_llama), "pretrained": sft_run, "steps": 1, "batch_size": 4}
    rows = [{"prompt": f"{name} {i}", **pair} for name in ("first", "second") for i in range(20)]
    train_reward(make(RewardConfig, name="two", normalise_samples=16, **settings), rows)
    tokenizer = load_run(sft_run)[1]
    second = {tuple(tokenizer.prompt_ids(row["prompt"])) for row in rows[20:]}
    assert len(asked) == 16 and 3 <= sum(ids in second for ids in asked) <= 13
    rows = [{"prompt": f"{i} {'7' * 85}", **pair} for i in range(9)] + [{"prompt": "short", **pair}]
    role, tokenizer = load_run(train_reward(make(RewardConfig, name="one", normalise_samples=8, **settings), rows))
    room = role.model.config.max_positions - 40
    assert sum(len(tokenizer.prompt_ids(row["prompt"])) <= room for row in rows) == 1
    assert asked == [tuple(tokenizer.prompt_ids("short"))] * 8 and all(math.isfinite(value) for value in role.normalisation)
    with pytest.raises(UserError, match="no prompt leaves room for a sample of 40 tokens"):  # before anything is trained
        train_reward(make(RewardConfig, name="none", normalise_samples=8, **settings), rows[:-1])
    assert not (tmp_path / "none").exists()
