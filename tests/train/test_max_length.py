"""--max-length and rows that the context has no room for: what is cut, what is left out, and where an error points."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from punster.config import DistillConfig, DpoConfig, PpoConfig, RewardConfig, SftConfig
from punster.data.prompts import GENERIC_PROMPT
from punster.errors import UserError
from punster.train.checkpoint import load_run
from punster.train.dpo import dpo
from punster.train.judged import encode_items
from punster.train.lessons import lesson_rows, sft_samples
from punster.train.ppo import ppo
from punster.train.reward import train_reward
from punster.train.rows import encode, encode_rows, within_length
from punster.train.sft import sft

Make = Callable[..., Any]
LONG, SHORT = "sea " * 20, "pun: sea"
COMPLETIONS = [
    {"prompt": LONG, "completion": "the tide was tied!"},
    {"prompt": SHORT, "completion": "a whale of a tide."},
    {"prompt": SHORT, "completion": "dull " * 60},
    {"prompt": SHORT, "completion": "my dough."},
]
JUDGED = [
    {"prompt": LONG, "chosen": "the tide was tied!", "rejected": "a fact."},
    {"prompt": LONG, "completions": ["a whale of a tide", "a wail", "a fact"], "scores": [3, 2, 0]},
    {"prompt": LONG, "completion": "the tide was tied!", "label": True},
    {"prompt": SHORT, "chosen": "the tide", "rejected": "dull " * 60},
    {"prompt": SHORT, "completion": "a fact.", "label": False},
]


def write(path: Path, rows: list[dict[str, Any]], head: str = "") -> str:
    path.write_text(head + "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sft_cuts_the_beginning_of_prompts_and_leaves_out_long_answers(sft_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    role, tokenizer = load_run(sft_run)
    kept, examples = encode_rows(tokenizer, role.model, COMPLETIONS, False, 40)
    assert [row["completion"] for row in kept] == [COMPLETIONS[place]["completion"] for place in (0, 1, 3)]
    assert [example.length == 40 for example in examples] == [True, False, False]
    assert list(examples[0].prompt) == tokenizer.prompt_ids(LONG)[-len(examples[0].prompt) :]
    assert all(example.response[-1] == tokenizer.eos_id for example in examples)
    assert list(examples[1].prompt) == tokenizer.prompt_ids(SHORT)
    assert capsys.readouterr().err == "  --max-length 40: 1 prompts cut at their beginning, 1 of 4 rows left out\n"
    with pytest.raises(UserError, match=r"--max-length 2: each of 4 rows has an answer that alone is longer"):
        encode_rows(tokenizer, role.model, COMPLETIONS, True, 2)
    with pytest.raises(UserError, match=r"--max-length 999: the model's context is 128 tokens"):
        encode_rows(tokenizer, role.model, COMPLETIONS, True, 999)


def test_an_sft_run_holds_training_and_held_out_rows_to_it(
    tiny_llama: Path, tmp_path: Path, make: Make, reader: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write(tmp_path / "held_out.jsonl", [COMPLETIONS[0], COMPLETIONS[2]])
    shared = {"out": str(tmp_path), "model": str(tiny_llama), "steps": 1, "batch_size": 2, "quiet": False}
    run = sft(make(SftConfig, name="cut", max_length=40, eval_data=[held_out], **shared), COMPLETIONS)
    assert reader.summary(run)["rows"] == 3
    assert "1 prompts cut at their beginning, 1 of 2 rows of --eval-data left out" in capsys.readouterr().err
    long = [{"prompt": SHORT, "completion": "dull " * 200}]
    with pytest.raises(UserError, match=r"row of --eval-data 1: \d+ tokens, but the model's context is 128"):
        sft(make(SftConfig, name="whole", **shared), COMPLETIONS[:2], eval_rows=long)


def test_every_text_of_a_judged_row_sees_the_same_prompt(sft_run: str, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    role, tokenizer = load_run(sft_run)
    config = make(RewardConfig, name="x", max_length=40, quiet=False)
    _, rows = lesson_rows(config, JUDGED, role, tokenizer)
    assert [row["prompt"] for row in rows] == [LONG] * 3 + [SHORT]
    examples, items = encode_items(rows, tokenizer, role.model)
    for item in items[:3]:
        own = [examples[place] for place in item.texts]
        assert len({example.prompt for example in own}) == 1 and max(example.length for example in own) == 40
    assert sum(item.weight for item in items) == pytest.approx(4)  # of the rows that are left
    assert "3 prompts cut at their beginning, 1 of 5 rows left out" in capsys.readouterr().err
    _, rows = lesson_rows(make(RewardConfig, name="x", max_length=40, neutral=1.0), JUDGED, role, tokenizer)
    assert {row["prompt"] for row in rows} == {GENERIC_PROMPT} and not any("_prompt_ids" in row for row in rows)


def test_a_reward_run_holds_training_and_held_out_pairs_to_it(
    tiny_llama: Path, tmp_path: Path, make: Make, reader: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {"out": str(tmp_path), "model": str(tiny_llama), "steps": 1, "batch_size": 2, "normalise_samples": 0, "quiet": False}
    run = train_reward(make(RewardConfig, name="cut", max_length=40, **shared), JUDGED, [JUDGED[0], JUDGED[3]])
    summary = reader.summary(run)
    assert summary["pairs"] == 4 and sum(part["pairs"] for part in summary["calibration"]["curve"]) == 1
    assert "1 of 2 rows of --eval-data left out" in capsys.readouterr().err
    longest = [{**JUDGED[0], "prompt": "sea " * 200}, JUDGED[0]]  # the first is beyond the context until it is cut
    run = train_reward(make(RewardConfig, name="longest", max_length=40, **shared), JUDGED[:1], longest)
    assert sum(part["pairs"] for part in reader.summary(run)["calibration"]["curve"]) == 2


@pytest.mark.parametrize("verb", ["sft", "reward", "dpo"])
def test_an_error_names_file_and_line_whatever_was_left_out_before(
    verb: str, sft_run: str, tiny_llama: Path, tmp_path: Path, make: Make
) -> None:
    answer = {"completion": "dull " * 200} if verb == "sft" else {"chosen": "tide", "rejected": "dull " * 200}
    no_pun = {"prompt": SHORT, "completion": "left out", "label": False}
    first = [no_pun, COMPLETIONS[1]] if verb == "sft" else JUDGED[:1]
    files = [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", [{"prompt": SHORT, **answer}], "\n\n")]
    shared = {"name": verb, "out": str(tmp_path), "data": files, "steps": 1}
    base = {"model": str(tiny_llama)}
    train: dict[str, Callable[[], Any]] = {
        "sft": lambda: sft(make(SftConfig, **base, **shared)),
        "reward": lambda: train_reward(make(RewardConfig, normalise_samples=0, **base, **shared)),
        "dpo": lambda: dpo(make(DpoConfig, actor=sft_run, **shared)),
    }
    with pytest.raises(UserError, match=r"b\.jsonl, line 3: \d+ tokens, but the model's context is 128; .*--max-length"):
        train[verb]()
    assert not (tmp_path / verb).exists()


def test_a_row_from_python_is_named_by_its_place_among_those_given(tiny_llama: Path, tmp_path: Path, make: Make) -> None:
    first = [{**row, "source": "x"} for row in (JUDGED[0], JUDGED[1], JUDGED[2])]
    long = {"prompt": SHORT, "chosen": "tide", "rejected": "dull " * 200}
    config = make(RewardConfig, name="x", out=str(tmp_path), model=str(tiny_llama), without=["x"], pretrain=["embedded"])
    with pytest.raises(UserError, match=r"^row 4: \d+ tokens"):
        train_reward(config, [*first, long])


def test_a_sampled_answer_is_as_long_as_it_was_sampled(sft_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its text may be fewer tokens than were drawn, and is never tokenised again."""
    role, tokenizer = load_run(sft_run)
    row = {"prompt": LONG, "chosen": "a tide", "rejected": "the tide", "_rejected_ids": [70] * 30 + [tokenizer.eos_id]}
    (kept,) = within_length(40, [row], tokenizer, role.model, True)
    assert len(kept["_prompt_ids"]) == 9 and len(encode(tokenizer, role.model, kept, "rejected").response) == 31
    with pytest.raises(UserError, match="an answer that alone is longer"):
        within_length(31, [row], tokenizer, role.model, True)


def test_our_contrasts_are_cut_as_other_rows(sft_run: str) -> None:
    role, tokenizer = load_run(sft_run)
    row = {"prompt": "sea " * 200, "completion": "a tide", "source": "contrasts"}
    kept, examples = encode_rows(tokenizer, role.model, [row], True, 100)
    assert len(kept) == 1 and examples[0].length == 100
    with pytest.raises(UserError, match="all are longer than the model's context"):
        encode_rows(tokenizer, role.model, [row], True)


def test_the_score_is_normalised_on_prompts_as_they_were_cut(
    sft_run: str, tiny_llama: Path, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def noted(policy: Any, tokenizer: Any, ids: list[list[int]], *rest: Any) -> Any:
        asked[:] = map(tuple, ids)
        return sft_samples(policy, tokenizer, ids, *rest)

    monkeypatch.setattr("punster.train.reward.sft_samples", noted)
    rows = [{"prompt": f"{number} " + "sea " * 200, "chosen": f"the tide {number}", "rejected": "a fact."} for number in range(4)]
    settings: dict[str, Any] = {"model": str(tiny_llama), "pretrained": sft_run, "out": str(tmp_path), "normalise_samples": 4,
                                "steps": 1, "batch_size": 2}  # fmt: skip
    train_reward(make(RewardConfig, name="cut", max_length=64, **settings), rows)
    assert len(asked) == 4 and {len(ids) <= 63 for ids in asked} == {True}
    with pytest.raises(UserError, match="no prompt leaves room for a sample of 40 tokens"):  # a dry run says so, too
        train_reward(make(RewardConfig, name="dry", max_length=110, dry_run=True, **settings), rows)


def test_a_dry_run_of_dpo_counts_the_pairs_that_are_kept(
    sft_run: str, tiny_llama: Path, tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": SHORT, "chosen": f"the tide {number}", "rejected": "dull " * 60 if number < 6 else "no"} for number in range(8)
    ]
    settings: dict[str, Any] = {"model": str(tiny_llama), "actor": sft_run, "out": str(tmp_path), "max_length": 40, "batch_size": 2,
                                "epochs": 2.0}  # fmt: skip
    dpo(make(DpoConfig, name="dry", dry_run=True, **settings), rows)
    assert ": 2 steps of 2 rows, 4 texts" in capsys.readouterr().out
    run = dpo(make(DpoConfig, name="run", **settings), rows)
    assert run is not None and json.loads((run / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize("verb", ["ppo", "dpo"])
def test_held_out_prompts_without_room_for_a_response_are_counted(
    verb: str, sft_run: str, reward_run: str, tiny_llama: Path, tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write(tmp_path / "held_out.jsonl", [{"prompt": SHORT}, {"prompt": "sea " * 200}])
    shared = {
        "name": "x",
        "out": str(tmp_path),
        "actor": sft_run,
        "reward_model": reward_run,
        "eval_data": [held_out],
        "steps": 1,
        "quiet": False,
    }
    train: dict[str, Callable[[], Any]] = {
        "ppo": lambda: ppo(make(PpoConfig, model=str(tiny_llama), batch_size=4, **shared)),
        "dpo": lambda: dpo(make(DpoConfig, model=str(tiny_llama), online=True, **shared)),
    }
    train[verb]()
    told = capsys.readouterr().err
    assert "1 of 2 prompts to evaluate on left out: no room for " in told and "in the context of 128" in told
    samples = map(json.loads, (tmp_path / "x" / "samples.jsonl").read_text().splitlines())
    assert {row["prompt"] for row in samples if row.get("held_out")} == {SHORT}


def test_it_is_refused_where_rows_are_made(make: Make) -> None:
    with pytest.raises(UserError, match="no use for --data, --columns and --max-length"):
        make(DpoConfig, name="x", actor="a", reward_model="b", online=True, max_length=40)
    with pytest.raises(UserError, match="--max-length or -p"):
        make(DistillConfig, name="x", actor="a", reward_model="b", max_length=40)
