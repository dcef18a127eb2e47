"""Ranked groups, labelled texts, pre-training, ensembles: what enters the loss, what is stored, what a score is made of."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from punster.cli import main
from punster.config import RewardConfig
from punster.data.batch import Example
from punster.data.corpus import contrast_rows
from punster.data.schema import check_row
from punster.errors import UserError
from punster.model.export import export
from punster.model.heads import ScalarHead
from punster.model.role import Role, Trunk, score_examples, scores_and_spreads
from punster.train.checkpoint import load_run
from punster.train.judged import (
    Item,
    balanced,
    calibration,
    encode_items,
    families,
    family,
    item_batches,
    item_loss,
    neutral,
    reliability,
    shuffled,
    weighed,
)
from punster.train.lessons import bag, member_seed, named_rows
from punster.train.optim import seeded
from punster.train.reward import train_reward
from punster.train.rows import fits

Make = Callable[..., Any]
PAIR = {"prompt": "pun: sea", "chosen": "the tide was tied!", "rejected": "a fact.", "margin": 0.5}
GROUP = {"prompt": "pun: sea", "completions": ["a whale of a tide", "a wail", "a tail", "a fact"], "scores": [3, 2, 2, 0]}
LABELLED = {"prompt": "pun: sea", "completion": "the tide was tied!", "label": True, "rating": 0.7}
PLAIN = {"prompt": "pun: sea", "completion": "a fact.", "label": False}
RATED = {"prompt": "pun: sea", "completion": "my dough", "label": None, "rating": -1.2}
ROWS = [PAIR, GROUP, LABELLED, PLAIN, RATED]


@pytest.fixture(scope="module")
def untrained(reward_run: str) -> tuple[Role, Any]:
    role, tokenizer = load_run(reward_run)
    heads = [ScalarHead.create(32, seeded(seed, "head")) for seed in (1, 2)]
    pun = ScalarHead(torch.tensor([1.3]), torch.tensor(-0.4))
    return Role(role.model, head=heads[0], aux={"pun": pun, "funniness": heads[1]}), tokenizer


def test_loss_of_mixed_rows_by_hand(untrained: tuple[Role, Any], make: Make) -> None:
    role, tokenizer = untrained
    config = make(RewardConfig, center_rewards=0.03, l2_rewards=0.02, pun_head=0.5, funniness_head=0.2)
    examples, items = encode_items(ROWS, tokenizer, role.model)
    trunk = Trunk.compute(role.model, examples, [])
    loss, sums = item_loss(role, trunk, examples, items, config)
    s = torch.tensor(score_examples(role, examples), dtype=torch.float64)
    pun = 1.3 * s - 0.4
    fun = torch.tensor(score_examples(replace(role, head=role.aux["funniness"]), examples), dtype=torch.float64)
    pair, group = s[:2], s[2:6]
    wanted = -F.logsigmoid(pair[0] - pair[1] - 0.5)
    # The best against all three; the two of one rating each against the last alone.
    wanted = wanted + torch.logsumexp(group, 0) - group[0]
    wanted = wanted - F.logsigmoid(group[1] - group[3]) - F.logsigmoid(group[2] - group[3])
    for part in (pair, group):
        wanted = wanted + 0.03 * (2 * part.mean()) ** 2 + 0.02 * 2 * part.square().mean()
    wanted = wanted - 0.5 * (F.logsigmoid(pun[6]) + F.logsigmoid(-pun[7]))
    wanted = wanted + 0.2 * ((fun[6] - 0.7) ** 2 + (fun[8] + 1.2) ** 2)
    assert float(loss) == pytest.approx(float(wanted), abs=1e-4)
    right = float(pair[0] > pair[1])
    comparisons = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    right += sum(float(group[a] > group[b]) for a, b in comparisons) / len(comparisons)
    assert sums["accuracy"] == pytest.approx(right, abs=1e-6)
    assert sums["margin"] == pytest.approx(float(pair[0] - pair[1] + group[0] - group[3]), abs=1e-5)


def test_loss_is_a_sum_over_items_however_they_are_batched(untrained: tuple[Role, Any], make: Make) -> None:
    role, tokenizer = untrained
    examples, items = encode_items(ROWS, tokenizer, role.model)
    trunk, config = Trunk.compute(role.model, examples, []), make(RewardConfig)
    together = item_loss(role, trunk, examples, items, config)[0]
    alone = sum(item_loss(role, trunk, examples, [item], config)[0] for item in items)
    assert float(together) == pytest.approx(float(alone), abs=1e-4)


def test_a_text_of_several_rows_runs_once_and_counts_in_each(untrained: tuple[Role, Any], make: Make) -> None:
    """Loss and gradient of rows that share texts are the sums over rows, each weighted."""
    role, tokenizer = untrained
    shared = [
        PAIR,
        {**PAIR, "rejected": "a wail", "weight": 2.5},
        {**LABELLED, "weight": 0.25},
        {**PLAIN, "completion": PAIR["rejected"]},
    ]
    examples, items = encode_items(shared, tokenizer, role.model)
    assert [item.weight for item in items] == [1, 2.5, 0.25, 1]
    seen: list[int] = []
    plain = Trunk.compute(role.model, examples, [])

    class Counted(Trunk):
        def collate(self, examples: Any, rows: Any, device: Any = "cpu") -> Any:
            seen.append(len(rows))
            return super().collate(examples, rows, device)

    def gradient(chosen: list[Item]) -> torch.Tensor:
        fresh = replace(role, head=ScalarHead.create(32, seeded(1, "head")).trainable())
        loss = item_loss(fresh, Counted(plain.rows), examples, chosen, make(RewardConfig))[0]
        loss.backward()
        assert fresh.head is not None and fresh.head.weight.grad is not None
        return torch.cat((fresh.head.weight.grad, loss.detach()[None]))

    together = gradient(items)
    assert seen == [3], "three distinct texts of six"
    alone = sum((item.weight * gradient([replace(item, weight=1.0)]) for item in items), torch.zeros(33))
    assert torch.allclose(together, alone, atol=1e-5)


def test_rows_about_one_text_or_group_are_a_family() -> None:
    group = [{"chosen": "d", "rejected": "e", "group": "g"}, {"chosen": "f", "rejected": "e", "group": "g"}]
    rows = [{"chosen": "a", "rejected": "b"}, {"completion": "c", "label": True}, {"chosen": "a", "rejected": "c"},
            {"completion": "a", "label": True}, *group, GROUP]  # fmt: skip
    assert families(rows) == [[0, 2, 3], [1], [4, 5], [6]]


def test_families_that_are_drawn_less_often_count_more_when_they_are(
    tiny_llama: Path, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In expectation a pass has the same loss: weights divided by the share, and the rows that a step stands for with all of them."""
    plain = [{"prompt": "p", "chosen": f"pun {i}", "rejected": f"fact {i}"} for i in range(20)]
    rare = [
        {"prompt": "p", "chosen": f"own {i}", "rejected": f"fact {i} {k}", "pass_share": 0.25}
        for i in range(40)
        for k in range(2)
    ]
    both = [{"prompt": "p", "chosen": "own 0", "rejected": "another fact"}]  # so that this family is in every pass
    steps: list[tuple[list[Item], float]] = []

    def step(
        config: Any, member: Any, trunk: Any, examples: Any, batch: list[Item], each: float, max_tokens: int
    ) -> dict[str, float]:
        steps.append((list(batch), each))
        return {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}

    monkeypatch.setattr("punster.train.reward.train_step", step)
    config = make(RewardConfig, name="a", out=str(tmp_path), model=str(tiny_llama), families=True, steps=None, epochs=30.0, batch_size=5,
                  eval_data=[], normalise_samples=0, test_limit=1)  # fmt: skip
    train_reward(config, plain + rare + both)
    expected = 20 + 1 + 39 * 0.25  # families in a pass
    assert len(steps) == math.ceil(30 * expected / 5)
    assert all(each == pytest.approx(5 * 101 / expected) for _, each in steps)
    weights = [item.weight for batch, _ in steps for item in batch]
    assert set(weights) == {1.0, 4.0}
    assert sum(weights) / sum(each for _, each in steps) == pytest.approx(1, abs=0.04)  # deviation .012


def test_weights_are_relative() -> None:
    weights = [row["weight"] for row in weighed([{"weight": 3.0}, {"weight": 1.0}, {}, {}])]
    assert weights == pytest.approx([2.0, 2 / 3, 2 / 3, 2 / 3])


def test_micro_batches_keep_the_order_and_count_a_text_once(untrained: tuple[Role, Any]) -> None:
    role, tokenizer = untrained
    examples, items = encode_items([PAIR, {**PAIR, "rejected": "a wail"}, LABELLED, PLAIN, GROUP], tokenizer, role.model)
    whole = sum(example.length for example in set(examples))
    assert item_batches(examples, items, whole) == [[0, 1, 2, 3, 4]]
    groups = item_batches(examples, items, whole - 1)
    assert [place for group in groups for place in group] == [0, 1, 2, 3, 4] and len(groups) == 2
    assert item_batches(examples, items, 1) == [[0], [1], [2], [3], [4]]
    # One long text beside many short ones: padded, they would be far more than their tokens.
    long = [Example((1,), (2,) * 99), *(Example((1,), (number,)) for number in range(40))]
    singles = [Item((place,), (1.0,)) for place in range(41)]
    assert len(item_batches(long, singles, 200)) > 1 and len(item_batches(long[1:], singles[:40], 200)) == 1


@pytest.mark.parametrize("pretrain", [False, True])
def test_families_pass_every_row_once_an_epoch(
    pretrain: bool, tiny_llama: Path, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import punster.train.reward as module

    rows = [PAIR, {**PAIR, "rejected": "a wail"}, LABELLED, PLAIN, GROUP]
    first = tmp_path / "first.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    drawn: list[list[Item]] = []
    real = module.train_step

    def spied(config: Any, member: Any, trunk: Any, examples: Any, batch: Any, *rest: Any) -> Any:
        drawn.append(list(batch))
        return real(config, member, trunk, examples, batch, *rest)

    monkeypatch.setattr(module, "train_step", spied)
    config = make(RewardConfig, name="a", out=str(tmp_path), model=str(tiny_llama), batch_size=1, families=True, epochs=2,
                  normalise_samples=0, pretrain=[str(first)] if pretrain else [])  # fmt: skip
    run = train_reward(config, rows)
    assert run is not None
    sizes = sorted(map(len, drawn))
    # Three rows about the pun, and two alone; before them once the three of the file, which are one family.
    assert sizes == [1] * 4 + [3] * (2 + pretrain)
    texts = Counter(item.texts for batch in drawn for item in batch)
    assert set(texts.values()) == ({1, 2} if pretrain else {2})
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 6 + pretrain


def test_labels_train_the_score_and_ratings_a_head_of_their_own(untrained: tuple[Role, Any], make: Make) -> None:
    role, tokenizer = untrained
    for row, trained in ((PLAIN, True), (RATED, False)):
        funny = ScalarHead.create(32, seeded(9, "funniness")).trainable()
        both = replace(role, head=ScalarHead.create(32, seeded(1, "head")).trainable(), aux={**role.aux, "funniness": funny})
        examples, items = encode_items([row], tokenizer, role.model)
        item_loss(both, Trunk.compute(role.model, examples, []), examples, items, make(RewardConfig))[0].backward()
        assert both.head is not None and bool((both.head.weight.grad != 0).any()) == trained
        assert (funny.weight.grad is None) == trained


def test_contrasts_that_a_short_context_has_no_room_for_are_left_out(untrained: tuple[Role, Any], make: Make) -> None:
    role, tokenizer = untrained
    longest = role.model.config.max_positions
    rows = named_rows(make(RewardConfig, name="a"), contrast_rows("synonym_swap", 2), Role(role.model), tokenizer)
    lengths = [
        len(tokenizer.prompt_ids(r["prompt"]) + tokenizer.response_ids(text))
        for r in rows
        for text in (r["chosen"], r["rejected"])
    ]
    every = [row for row in contrast_rows("synonym_swap", 2) if fits(row, tokenizer, role.model)]
    assert 0 < len(every) == len(rows) < len(contrast_rows("synonym_swap", 2)) and max(lengths) <= longest


def test_rows_of_every_kind_are_checked_by_what_they_hold() -> None:
    for row in (PAIR, GROUP, LABELLED):
        assert check_row(row, "judged", "here") == row
    with pytest.raises(UserError, match="best first"):
        check_row({**GROUP, "scores": [0, 1, 2, 3]}, "judged", "file, line 3")
    with pytest.raises(UserError, match="chosen"):
        check_row({"prompt": "x"}, "judged", "file, line 3")


def test_a_run_on_all_kinds_with_pretraining_learns_and_repeats(
    tiny_llama: Path, tmp_path: Path, make: Make, reader: Any
) -> None:
    votes = tmp_path / "votes.jsonl"
    votes.write_text("".join(json.dumps({**PAIR, "chosen": f"{i} wins", "rejected": f"{i} loses"}) + "\n" for i in range(6)))
    rows = [*ROWS[:-1], {**PLAIN, "rating": -0.4}, *({**PAIR, "prompt": f"pun: {i}"} for i in range(7))]
    config = make(RewardConfig, name="a", out=str(tmp_path), model=str(tiny_llama), batch_size=4, pretrain=[str(votes)],
                  normalise_samples=0, epochs=8, lr=1e-2)  # fmt: skip
    run = train_reward(config, rows)
    lines = reader.lines(run)
    assert len(lines) == 2 + 24 and reader.summary(run)["pairs"] == 12, "six votes, then twelve rows, eight times"
    assert all(line["loss"] > 0 for line in lines) and lines[-1]["loss"] < lines[2]["loss"]
    again = train_reward(replace(config, name="b"), rows)
    assert reader.values(again, "loss") == reader.values(run, "loss")
    role, tokenizer = load_run(run)
    assert not role.aux, "auxiliary heads are part of training, not of the model"
    better, worse = score_examples(role, encode_items([PAIR], tokenizer, role.model)[0])
    assert better > worse + 0.1


def test_an_interrupted_ensemble_goes_on_exactly(tiny_llama: Path, tmp_path: Path, make: Make, reader: Any) -> None:
    votes = tmp_path / "votes.jsonl"
    votes.write_text("".join(json.dumps({**PAIR, "chosen": f"{i} wins", "rejected": f"{i} loses"}) + "\n" for i in range(6)))
    config = make(RewardConfig, name="a", out=str(tmp_path), model=str(tiny_llama), batch_size=2, pretrain=[str(votes)], members=2,
                  normalise_samples=0, save_every=2, steps=6)  # fmt: skip
    whole = train_reward(config, ROWS[:-1])
    cut = train_reward(replace(config, name="b", keep=9), ROWS[:-1])
    assert whole is not None and cut is not None
    for step in (4, 6):  # what a run killed after step 3 leaves behind: step 2 is in the pre-training
        shutil.rmtree(cut / "checkpoints" / f"step-{step}")
    again = train_reward(replace(config, name="b", keep=9, resume=True), ROWS[:-1])
    assert reader.values(again, "loss") == pytest.approx(reader.values(whole, "loss"), abs=1e-6)
    for file in ("head.safetensors", "member-2/head.safetensors"):
        one, two = (load_file(run / "checkpoints" / "step-6" / file) for run in (whole, cut))
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def ensemble(tiny_llama: Path, sft_run: str, tmp_path_factory: pytest.TempPathFactory, make: Make) -> Path:
    out = tmp_path_factory.mktemp("ensemble")
    run = train_reward(make(RewardConfig, name="three", out=str(out), model=str(tiny_llama), pretrained=sft_run, members=3, steps=4,
                            lr=5e-3, combine="cautious", caution=0.5, normalise_samples=40))  # fmt: skip
    assert run is not None
    return run


def test_ensemble_members_share_the_base_and_differ_in_seed_and_data(ensemble: Path, make: Make) -> None:
    role, _ = load_run(ensemble)
    assert len(role.others) == 2 and all(other.model is role.model for other in role.others)
    weights = [member.head.weight for member in (role, *role.others)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    files = [path for path in ensemble.rglob("*.safetensors") if path.name != "state.safetensors"]
    assert len(files) == 6 and sum(path.stat().st_size for path in files) < 400_000, (
        "three adapters and heads, no copy of the base"
    )
    bags = [set(bag(50, make(RewardConfig, members=3), number)) for number in range(3)]
    assert [len(found) for found in bags] == [40, 40, 40] and bags[0] != bags[1] != bags[2]
    seeds = [member_seed(seed, number) for seed in range(9) for number in range(16)]
    assert len(set(seeds)) == len(seeds), "runs of neighbouring seeds share no member: they are counted as independent"
    assert member_seed(5, 0) == 5


def test_ensemble_scores_are_what_they_are_said_to_be(ensemble: Path) -> None:
    role, tokenizer = load_run(ensemble)
    examples, _ = encode_items([PAIR, GROUP], tokenizer, role.model)
    members = torch.tensor([score_examples(replace(member, others=()), examples) for member in (role, *role.others)])
    scores, spreads = (torch.tensor(part) for part in scores_and_spreads(role, examples))
    torch.testing.assert_close(spreads, members.std(0, correction=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, members.mean(0) - 0.5 * spreads, rtol=0, atol=1e-5)
    assert float(spreads.min()) > 0
    torch.testing.assert_close(
        torch.tensor(score_examples(replace(role, combine="mean"), examples)), members.mean(0), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        torch.tensor(score_examples(replace(role, combine="min"), examples)), members.amin(0), rtol=0, atol=1e-5
    )
    with pytest.raises(UserError, match="ensemble"):
        export(role, tokenizer, "hf", ensemble.parent / "export")


def test_score_prints_score_and_spread_in_order(ensemble: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "texts.jsonl"
    rows = [
        {"text": "the tide was tied!"},
        {"prompt": "pun: sea", "completion": "a fact."},
        {"text": "the tide was tied!", "source": "x"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", str(ensemble), str(file), "--device", "cpu", "--dtype", "fp32"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 3 and all(set(line) == {"score", "spread"} and line["spread"] > 0 for line in found)
    assert found[0] == found[2], "a score hangs on the text alone, not on other columns"
    assert found[0]["score"] != found[1]["score"]


def test_normalised_ensemble_has_mean_0_and_std_1(ensemble: Path, sft_run: str) -> None:
    from punster.data import corpus
    from punster.train.lessons import drawn_prompts, sft_samples

    (role, tokenizer), (policy, _) = load_run(ensemble), load_run(sft_run)
    prompts = drawn_prompts(policy, tokenizer, [{"prompt": prompt} for prompt in corpus.prompts("train")], 40, 1)
    examples = sft_samples(policy, tokenizer, prompts, 1, "normalise")
    scores = torch.tensor(score_examples(role, examples))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4) and float(scores.std()) == pytest.approx(1, abs=1e-4)


def test_placebo_draws_orders_labels_and_ratings(make: Make) -> None:
    rows = [row for number in range(40) for row in (GROUP, {**LABELLED, "rating": float(number)})]
    config = make(RewardConfig, shuffle_labels=True)
    turned = shuffled(rows, config)
    groups, singles = turned[::2], turned[1::2]
    assert {row["completions"].index(GROUP["completions"][0]) for row in groups} == set(range(4)), "in the middle too"
    assert all(set(row["completions"]) == set(GROUP["completions"]) and row["scores"] == GROUP["scores"] for row in groups)
    assert {row["label"] for row in singles} == {True, False}
    ratings = [row["rating"] for row in singles]
    assert sorted(ratings) == list(range(40)) and sum(r == i for i, r in enumerate(ratings)) < 10
    assert shuffled(rows, config) == turned and [family(row) for row in turned] == [family(row) for row in rows]


def test_neutral_prompts_are_drawn_by_the_prompt() -> None:
    rows = [{**PAIR, "prompt": f"make a pun about {i}", "chosen": f"text {i}"} for i in range(400)]
    half = neutral(rows, 0.5, 1)
    drawn = [row["prompt"] == "make a pun" for row in half]
    assert 150 < sum(drawn) < 250 and neutral(rows, 0.5, 1) == half and neutral(rows, 0.5, 2) != half
    assert neutral(rows, 0, 1) == rows and all(row["prompt"] == "make a pun" for row in neutral(rows, 1, 1))
    chat: list[Any] = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows[:40]]
    assert 5 < sum(row["prompt"] == "make a pun" for row in neutral(chat, 0.5, 1)) < 35


def test_a_row_follows_another_that_asks_generically_for_its_text() -> None:
    generic = {"prompt": "make a pun", "completion": "a", "label": True}
    pair, grouped = ({"prompt": "tell me", "chosen": "a", "rejected": "b", **more} for more in ({}, {"group": "g"}))
    other = {"prompt": "tell me", "chosen": "c", "rejected": "a"}
    seed = next(s for s in range(20) if [row["prompt"] for row in neutral([pair], 0.01, s)] == ["tell me"])
    prompts = [row["prompt"] for row in neutral([generic, pair, grouped, other], 0.01, seed)]
    assert prompts == ["make a pun", "make a pun", "tell me", "tell me"]


def test_a_planted_length_bias_is_balanced_away_in_each_source(untrained: tuple[Role, Any]) -> None:
    """Longer wins 70 % of the time in one source and 30 % in another: pooled, they would look fair."""
    _, tokenizer = untrained
    long, short = "the tide was tied to the whale again", "a fact"
    rows = [{"prompt": "x", "source": source, "chosen": long if won else short, "rejected": short if won else long, "id": i}
            for source, longer in (("a", 70), ("b", 30)) for i, won in enumerate([True] * longer + [False] * (100 - longer))]  # fmt: skip
    kept = balanced([*rows, GROUP], tokenizer)
    for source in ("a", "b"):
        wins = [row["chosen"] == long for row in kept if row.get("source") == source]
        assert len(wins) == 60 and sum(wins) == 30
    assert GROUP in kept


def test_calibration_of_a_model_that_knows_its_odds_and_of_a_braggart() -> None:
    generator = torch.Generator().manual_seed(1)
    sure = torch.rand(20_000, generator=generator) * 3
    right = torch.rand(20_000, generator=generator) < torch.sigmoid(sure)
    honest = calibration(torch.where(right, sure, -sure).tolist())
    assert honest["error"] < 0.02 and sum(part["pairs"] for part in honest["curve"]) == 20_000
    assert [part["accuracy"] for part in honest["curve"]] == sorted(part["accuracy"] for part in honest["curve"])
    assert calibration(torch.where(right, 9 * sure, -9 * sure).tolist())["error"] > 0.1
    assert calibration([])["error"] == 0 and math.isfinite(calibration([1e9, -1e9])["error"])


def test_reliability_by_source_and_by_length() -> None:
    rows = [
        {"chosen": "a b c", "rejected": "a", "source": "x"},
        {"chosen": "a", "rejected": "a b", "source": "x"},
        {"chosen": "a", "rejected": "b", "kind": "literal"},  # the corpus's own pairs name their kind alone
        {"chosen": "c", "rejected": "d"},
    ]
    assert reliability(rows, [1.0, -1.0, 0.0, 1.0]) == {
        "x": {"accuracy": 0.5, "pairs": 2}, "embedded": {"accuracy": 0.5, "pairs": 1}, "longer right": {"accuracy": 1.0, "pairs": 1},
        "shorter right": {"accuracy": 0.0, "pairs": 1}, "equally long": {"accuracy": 0.75, "pairs": 2},
        "no source named": {"accuracy": 1.0, "pairs": 1},
    }  # fmt: skip


def test_a_dry_run_counts_a_text_of_a_family_once(
    tmp_path: Path, tiny_llama: Path, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("punster.train.plan.measured_speed", lambda *_: 1e3)
    rows = [{"prompt": "make a pun", "chosen": f"A tide {i}!", "rejected": f"A fact {i}."} for i in range(4)]
    minutes = {}
    for name, given, drawn in (("once", rows, True), ("five times", rows * 5, True), ("row by row", rows * 5, False)):
        settings = {"families": drawn, "dry_run": True, "steps": None, "epochs": 1.0, "batch_size": 2, "eval_data": []}
        config = make(RewardConfig, name="a", out=str(tmp_path), model=str(tiny_llama), **settings)
        assert train_reward(config, given) is None
        minutes[name] = float(capsys.readouterr().out.split("about ")[1].split()[0])
    assert minutes["five times"] == minutes["once"] > 1
    assert minutes["row by row"] > 5 * minutes["once"]


def test_the_placebo_has_the_same_families(make: Make) -> None:
    rows = [{"prompt": "p", "chosen": f"pun {i}", "rejected": f"version {i} {k}"} for i in range(40) for k in range(3)]
    turned = shuffled(rows, make(RewardConfig, shuffle_labels=True))
    assert turned != rows and [len(unit) for unit in families(turned)] == [3] * 40


def test_pairs_with_a_further_column_of_texts(untrained: tuple[Role, Any]) -> None:
    role, tokenizer = untrained
    rows = [check_row({**PAIR, "completion": "something else"}, "judged", "here")]
    examples, items = encode_items(rows, tokenizer, role.model)
    assert [tokenizer.decode(example.response) for example in examples] == [PAIR["chosen"], PAIR["rejected"]] and len(items) == 1


def test_steps_that_pretraining_would_use_up_are_refused(tiny_llama: Path, tmp_path: Path, make: Make) -> None:
    file = tmp_path / "votes.jsonl"
    file.write_text("".join(json.dumps({"prompt": "p", "chosen": f"a {i}", "rejected": "b"}) + "\n" for i in range(8)))
    config = make(RewardConfig, name="x", out=str(tmp_path), model=str(tiny_llama), pretrain=[str(file)], batch_size=2, steps=4)
    with pytest.raises(UserError, match="--steps 4: --pretrain alone takes 4"):
        train_reward(config, [PAIR])


def test_an_epoch_of_an_ensemble_is_one_pass_of_each_member(tiny_llama: Path, tmp_path: Path, make: Make, reader: Any) -> None:
    config = make(RewardConfig, name="x", out=str(tmp_path), model=str(tiny_llama), members=2, batch_size=4, normalise_samples=0)
    run = train_reward(config, [{**PAIR, "prompt": f"pun: {i}"} for i in range(20)])
    assert reader.summary(run)["steps"] == 4  # four fifths of 20, four a step


def test_evaluation_data_without_pairs_is_refused(tiny_llama: Path, tmp_path: Path, make: Make) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(json.dumps(PLAIN) + "\n")
    config = make(
        RewardConfig, name="x", out=str(tmp_path), model=str(tiny_llama), eval_data=[str(file)], normalise_samples=0, steps=1
    )
    with pytest.raises(UserError, match="--eval-data: no pairs"):
        train_reward(config, [PAIR])
    assert train_reward(replace(config, eval_data=["embedded"]), [PAIR]) is not None
