"""DPO: ln 2 at the start, every loss, sampled and online pairs, KTO, micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import punster.train.dpo as dpo_module
from punster.config import DpoConfig, RewardConfig, SftConfig
from punster.config.train import DpoLoss
from punster.data.batch import Example, collate
from punster.data.corpus import unpaired
from punster.errors import UserError
from punster.model.role import Trunk, score_examples
from punster.rollout.sampler import Rollout
from punster.train.checkpoint import load_run
from punster.train.dpo import dpo, encode_given, response_log_probs, sampled_pairs, summed
from punster.train.judged import encode_items
from punster.train.optim import seeded
from punster.train.reward import train_reward
from punster.train.setup import open_role
from punster.train.sft import sft

Make = Callable[..., Any]
Config = Callable[..., DpoConfig]
LOSSES = get_args(DpoLoss)
PAIRS = [
    {"prompt": f"pun: {'sea ' * (i % 3)}{i}", "chosen": f"the tide {i}" + "!" * i, "rejected": f"a {'dull ' * (i % 4)}fact {i}."}
    for i in range(10)
]


@pytest.fixture
def config(tiny_llama: Path, sft_run: str, tmp_path: Path, make: Make) -> Config:
    def build(name: str = "run", **settings: Any) -> DpoConfig:
        given: dict[str, Any] = {
            "model": str(tiny_llama), "actor": sft_run, "batch_size": 5, "steps": 3, "max_new_tokens": 8, "lr": 1e-2, "samples": 3,
        }  # fmt: skip
        return make(DpoConfig, name=name, out=str(tmp_path), **{**given, **settings})

    return build


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("max_tokens", [64, 100_000])
@pytest.mark.parametrize("loss_type", ["sigmoid", "robust"])
def test_first_loss_is_ln_2(adapter: str, max_tokens: int, loss_type: str, config: Config, reader: Any) -> None:
    smoothing = 0.2 if loss_type == "robust" else 0.0
    run = dpo(config(loss_type=loss_type, max_tokens=max_tokens, adapter=adapter, label_smoothing=smoothing), PAIRS)
    losses = reader.values(run, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses[1] - math.log(2)) > 1e-4
    assert reader.values(run, "rewards/margins")[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_runs_and_moves_the_policy(loss_type: str, config: Config, reader: Any) -> None:
    rows = unpaired(PAIRS) if loss_type == "kto" else PAIRS
    run = dpo(config(loss_type=loss_type, steps=12), rows)
    lines = reader.lines(run)
    assert len(lines) == 12 and all(math.isfinite(value) for line in lines for value in line.values())
    margins = reader.values(run, "rewards/margins")
    assert abs(margins[0]) < 1e-5 and margins[-1] > 0
    norms = reader.values(run, "grad_norm")
    assert all(norm > 0 for norm in (norms[:1] if loss_type == "hinge" else norms))  # hinge is flat once all pairs are apart


def test_first_losses_by_hand(config: Config, reader: Any, sft_run: str) -> None:
    """Where policy = reference: hinge 1, IPO 1/(4 beta^2), KTO 1/2; SimPO and ORPO from the reference's own log-probs."""
    role, tokenizer = load_run(sft_run)
    examples, _ = encode_items(PAIRS, tokenizer, role.model)
    with torch.no_grad():
        sums, lengths = summed(role, collate(examples))
    bars = (sums / lengths).double()
    chosen, rejected = bars[::2], bars[1::2]
    odds = [bar - torch.log(1 - bar.exp()) for bar in (chosen, rejected)]
    nll = -sums[::2].sum().double() / lengths[::2].sum()
    hand = {
        "hinge": 1.0,
        "ipo": 1 / (4 * 0.1**2),
        "simpo": -torch.sigmoid(0.1 * (chosen - rejected) - 0.5).log().mean().item(),
        "orpo": (-0.1 * torch.sigmoid(odds[0] - odds[1]).log().mean() + nll).item(),
        "kto": 0.5,
    }
    for loss_type, value in hand.items():
        rows = unpaired(PAIRS) if loss_type == "kto" else PAIRS
        run = dpo(config(loss_type, loss_type=loss_type, steps=1, batch_size=len(rows)), rows)
        assert reader.values(run, "loss") == pytest.approx([value], abs=2e-5 * max(1, value))


def test_sft_term_is_the_nll_per_chosen_token(config: Config, reader: Any, sft_run: str) -> None:
    role, tokenizer = load_run(sft_run)
    examples, _ = encode_items(PAIRS, tokenizer, role.model)
    sums = response_log_probs(role, examples, Trunk.compute(role.model, examples, []), 4096)
    nll = -float(sums[::2].sum()) / sum(len(example.response) for example in examples[::2])
    run = dpo(config(steps=1, batch_size=10, sft_coef=0.7), PAIRS)
    assert reader.values(run, "loss") == pytest.approx([math.log(2) + 0.7 * nll], abs=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "orpo", "kto"])
def test_micro_batches_do_not_change_a_step(loss_type: str, config: Config, reader: Any) -> None:
    rows = unpaired(PAIRS) if loss_type == "kto" else PAIRS
    runs = [dpo(config(name, loss_type=loss_type, max_tokens=size), rows) for name, size in (("small", 64), ("large", 100_000))]
    for metric in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "grad_norm"):
        assert reader.values(runs[0], metric) == pytest.approx(reader.values(runs[1], metric), rel=1e-3, abs=1e-4)


def test_the_reference_is_bit_identical_afterwards(config: Config, sft_run: str, reader: Any) -> None:
    given = reader.adapter(sft_run, "sft")
    run = dpo(config(lr=3e-2), PAIRS)
    assert all(torch.equal(reader.adapter(run, "sft")[name], given[name]) for name in given)
    assert max(float(tensor.abs().max()) for name, tensor in reader.adapter(run, "policy").items() if "lora_B" in name) > 1e-3


def test_sampled_pairs_are_best_against_worst(config: Config, reward_run: str) -> None:
    settings = config(reward_model=reward_run, pairs="sampled", samples=4)
    policy, tokenizer = open_role(settings.actor, settings)
    judge, _ = open_role(reward_run, settings, tokenizer)
    prompts = [tokenizer.prompt_ids(f"pun: {word}") for word in ("sea", "bread", "time")]
    examples, _ = sampled_pairs(policy, judge, prompts, settings, tokenizer, seeded(1, "pairs"))
    eos = tokenizer.eos_id
    closed = [e if e.response[-1] == eos else replace(e, response=(*e.response, eos)) for e in examples]
    scores = score_examples(judge, closed)
    assert 0 < len(examples) <= 2 * len(prompts)  # prompts of which no sample ends are left out
    for number in range(len(examples) // 2):
        best, worst = examples[2 * number], examples[2 * number + 1]
        assert best.prompt == worst.prompt and list(best.prompt) in [list(prompt) for prompt in prompts]
        ended = [example.response[-1] == tokenizer.eos_id for example in (best, worst)]
        assert ended[0], "a response that does not end is never preferred"
        assert scores[2 * number] > scores[2 * number + 1] - (not ended[1])


def test_pairs_of_known_scores(config: Config, sft_run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs a prompt by score less the penalty; what does not end is the worse one at most; prompts without an end go."""
    rows = [Example((prompt,), (prompt, k)) for prompt in (5, 6, 7) for k in range(4)]
    finished = [True, True, True, False] + [False] * 4 + [True, False, False, False]
    scores = [0.1, 0.9, 0.5, 0.8, 9.0, 8.0, 7.0, 6.0, 0.0, 3.0, -2.0, 0.5]
    monkeypatch.setattr(dpo_module, "generate", lambda *_, **__: Rollout(rows, [], finished))
    monkeypatch.setattr(dpo_module, "score_examples", lambda *_, **__: scores)
    policy, tokenizer = open_role(sft_run, config())

    def pairs(**settings: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        found, _ = sampled_pairs(policy, policy, [], config(samples=4, **settings), tokenizer, seeded(1, "pairs"))
        return [(a.response, b.response) for a, b in zip(found[::2], found[1::2], strict=True)]

    assert pairs() == [((5, 1), (5, 3)), ((7, 0), (7, 2))]  # .8 - 1 is below .1
    assert pairs(pairs_per_prompt=2) == [((5, 1), (5, 3)), ((5, 2), (5, 0)), ((7, 0), (7, 2))]
    assert pairs(missing_eos_penalty=0.0) == [((5, 1), (5, 0)), ((7, 0), (7, 2))]
    monkeypatch.setattr(dpo_module, "score_examples", lambda *_, **__: [1.0] * 12)
    assert pairs(missing_eos_penalty=0.0) == []


@pytest.mark.parametrize(
    "settings",
    [{"online": True}, {"pairs": "sampled"}, {"pairs": "sampled", "loss_type": "kto"}, {"online": True, "adapter": "none"}],
)
def test_sampled_and_online_runs(settings: dict[str, Any], config: Config, reward_run: str, reader: Any) -> None:
    run = dpo(config(reward_model=reward_run, **settings))
    losses = reader.values(run, "loss")
    empty = sum(line.get("objective/pairs") == 0 for line in reader.lines(run))  # steps in which no prompt gave a pair
    assert len(losses) + empty == 3 and losses[0] == pytest.approx(0.5 if "loss_type" in settings else math.log(2), abs=1e-5)
    assert reader.summary(run)["steps"] == 3


def test_default_steps_are_one_epoch(config: Config, reader: Any) -> None:
    assert len(reader.lines(dpo(config(steps=None), PAIRS))) == 2  # 10 pairs, 5 a step
    assert reader.summary(dpo(config("two", steps=None, epochs=2.0), PAIRS))["steps"] == 4


def test_user_errors(config: Config, sft_run: str, reward_run: str) -> None:
    for settings, message in (
        ({"online": True}, "need a reward model"),
        ({"pairs": "sampled"}, "need a reward model"),
        ({"online": True, "reward_model": reward_run, "loss_type": "kto"}, "kto does not use pairs"),
        ({"online": True, "reward_model": reward_run, "data": ["mine.jsonl"]}, "no use for --data"),
        ({"pairs": "sampled", "reward_model": reward_run, "data": ["embedded", "mine.jsonl"]}, "no use for --data"),
        (
            {"pairs": "sampled", "reward_model": reward_run, "columns": ["prompt=question"]},
            "no use for --data, --columns and --max-length",
        ),
        ({"label_smoothing": 0.5}, "--label-smoothing"),
        ({"beta": 0.0}, "--beta"),
    ):
        with pytest.raises(UserError, match=message):
            config(**settings)
    for data in ([], ["embedded"]):  # as saved runs have it
        config(online=True, reward_model=reward_run, data=data)
        config(pairs="sampled", reward_model=reward_run, data=data)
    with pytest.raises(UserError, match="-a runs/SFT"):
        dpo(config(actor=""), PAIRS)
    with pytest.raises(UserError, match="row 1: field 'completion' is missing"):
        dpo(config("kto", loss_type="kto"), PAIRS)
    with pytest.raises(UserError, match="row 2: field 'rejected' is missing"):
        dpo(config("rows"), [PAIRS[0], {"prompt": "a", "chosen": "b"}])


def test_a_dry_run_of_kto_accepts_its_own_rows(config: Config) -> None:
    assert dpo(config(loss_type="kto", dry_run=True), unpaired(PAIRS)) is None


def test_a_dry_run_counts_the_tokens_of_the_rows(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    work: list[float] = []
    monkeypatch.setattr(dpo_module, "announce", lambda *_, **given: work.append(given["work"]))
    for words in (1, 20):
        rows = [{"prompt": "sea", "chosen": "tide " * words, "rejected": "dull " * words}] * 4
        dpo(config(dry_run=True), rows)
    assert work[1] > 2 * work[0]
    with pytest.raises(UserError, match=r"row 1: .* tokens, but the model's context is 128"):
        dpo(config(dry_run=True), [{"prompt": "sea " * 200, "chosen": "a", "rejected": "b"}])


def test_kto_takes_no_mixture_and_says_so(config: Config) -> None:
    with pytest.raises(UserError, match="kto learns from embedded or files with prompt, completion and label; this is a mixture"):
        dpo(config(loss_type="kto", data=["puns"]))


def test_kto_crosses_rows_that_do_not_fit_together(
    config: Config, tiny_gpt2: Path, tmp_path: Path, make: Make, reader: Any
) -> None:
    """Every row fits into the context of 128, but the long prompt with the long response of another row does not."""
    actor = sft(make(SftConfig, name="gpt2", out=str(tmp_path), model=str(tiny_gpt2), steps=1, batch_size=8))
    rows = [
        {"prompt": "qz" * 45, "completion": "short", "label": True},
        {"prompt": "short", "completion": "qz" * 45, "label": False},
    ]  # fmt: skip
    run = dpo(config(loss_type="kto", actor=str(actor), model=str(tiny_gpt2), batch_size=2), rows)
    assert len(reader.lines(run)) == 3


def test_dpo_goes_on_from_a_dpo_run(config: Config, reader: Any) -> None:
    """Iterated DPO: the first round's adapter is part of the reference, and both are in the saved run."""
    first = dpo(config("first", steps=8), PAIRS)
    second = dpo(config("second", actor=str(first), steps=1, lr=1e-12, batch_size=10), PAIRS)
    logs = []
    for run in (first, second):
        role, tokenizer = load_run(run)
        examples, _ = encode_items(PAIRS, tokenizer, role.model)
        logs.append(response_log_probs(role, examples, Trunk.compute(role.model, examples, []), 4096))
    assert [adapter.name for adapter in role.adapters] == ["sft", "policy", "policy2"]
    torch.testing.assert_close(logs[1], logs[0], rtol=0, atol=1e-3)
    assert reader.values(second, "loss") == pytest.approx([math.log(2)], abs=1e-6)
    assert reader.values(second, "logps/chosen") == pytest.approx([float(logs[0][::2].mean())], abs=1e-3)


def test_rewards_of_another_base_do_not_fit(config: Config, tiny_gpt2: Path, tmp_path: Path, make: Make) -> None:
    other = train_reward(
        make(RewardConfig, name="other", out=str(tmp_path), model=str(tiny_gpt2), steps=1, normalise_samples=0), PAIRS
    )
    with pytest.raises(UserError, match="another base"):
        dpo(replace(config(), reward_model=str(other), online=True))


# ---- long rows ----------------------------------------------------------------------------------------------------
def test_long_rows_lose_the_beginning_of_their_prompt_and_never_eos(
    config: Config, sft_run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    role, tokenizer = load_run(sft_run)
    rows = [
        {"prompt": "sea " * 60, "chosen": "tide", "rejected": "the dull tide turned"},
        {"prompt": "sea", "chosen": "tide", "rejected": "dull"},
        {"prompt": "sea", "chosen": "tide", "rejected": "dull " * 60},
    ]
    examples, labels = encode_given(config(max_length=40, quiet=False), rows, role.model, tokenizer)
    assert labels is None and len(examples) == 4
    assert examples[0].prompt == examples[1].prompt  # both sides see the same prompt
    assert max(examples[0].length, examples[1].length) == 40
    assert list(examples[0].prompt) == tokenizer.prompt_ids(rows[0]["prompt"])[-len(examples[0].prompt) :]
    assert all(example.response[-1] == tokenizer.eos_id for example in examples)
    assert list(examples[2].prompt) == tokenizer.prompt_ids("sea")
    assert "1 prompts cut at their beginning, 1 of 3 rows left out" in capsys.readouterr().err
    for limit, message in ((1000, "the model's context is 128"), (3, "each of 3 rows has an answer that alone is longer")):
        with pytest.raises(UserError, match=message):
            encode_given(config(max_length=limit), rows, role.model, tokenizer)
    with pytest.raises(UserError, match=r"row 1: .* tokens, but the model's context is 128"):
        dpo(config("whole"), [{"prompt": "sea " * 200, "chosen": "a", "rejected": "b"}])


def test_labels_stay_with_their_rows_when_some_are_left_out(config: Config, reader: Any) -> None:
    rows = [
        {"prompt": "sea", "completion": text, "label": label}
        for text, label in (("dull " * 60, False), ("tide", True), ("a", False))
    ]
    run = dpo(config(loss_type="kto", max_length=40, batch_size=2, steps=1), rows)
    assert reader.summary(run)["rows"] == 2


def test_callbacks_are_called_each_step_with_the_metrics(config: Config) -> None:
    seen: list[tuple[int, float]] = []
    dpo(config(), PAIRS, lambda step, metrics: seen.append((step, metrics["loss"])))
    assert [step for step, _ in seen] == [1, 2, 3] and seen[0][1] == pytest.approx(math.log(2), abs=1e-6)


def test_samples_that_are_all_worth_the_same_teach_nothing(
    config: Config, reward_run: str, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpo_module, "score_examples", lambda judge, examples, **_: [0.0] * len(examples))
    settings = {"reward_model": reward_run, "missing_eos_penalty": 0.0, "sft_coef": 1.0}
    run = dpo(config(online=True, steps=2, **settings))
    assert reader.values(run, "objective/pairs") == [0, 0] == reader.values(run, "skipped_steps")  # nothing was not finite
    assert not any("loss" in line for line in reader.lines(run))
    trained, _ = load_run(run)
    assert all(float(tensor.abs().max()) == 0 for name, tensor in trained.adapters[-1].named_parameters() if "lora_B" in name)
    with pytest.raises(UserError, match="all samples of each prompt are worth the same"):
        dpo(config("offline", pairs="sampled", **settings))


def test_kto_on_a_run_whose_own_weights_were_trained(
    config: Config, tiny_llama: Path, tmp_path: Path, make: Make, reader: Any
) -> None:
    actor = sft(make(SftConfig, name="full", out=str(tmp_path), model=str(tiny_llama), steps=2, batch_size=4, adapter="none"))
    for adapter in ("lora", "none"):
        run = dpo(config(adapter, actor=str(actor), loss_type="kto", adapter=adapter), unpaired(PAIRS))
        assert reader.values(run, "loss")[0] == pytest.approx(0.5, abs=1e-5) and reader.values(run, "kl")[0] == 0


def test_a_prompt_without_tokens_is_refused_where_rows_are_cut(
    config: Config, tiny_llama: Path, tmp_path: Path, make: Make
) -> None:
    shared = {"out": str(tmp_path), "model": str(tiny_llama), "prompt_format": "{prompt}"}
    actor = sft(make(SftConfig, name="bare", steps=1, batch_size=4, **shared))
    with pytest.raises(UserError, match="row 1: the prompt has no tokens"):
        dpo(config(actor=str(actor), prompt_format="{prompt}", max_length=64), [{**PAIRS[0], "prompt": ""}])
