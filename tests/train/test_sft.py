"""Supervised fine-tuning: what carries loss, micro-batches, padding, and that it learns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import punster.train.sft as sft_module
from punster.config import DpoConfig, PpoConfig, RewardConfig, SftConfig
from punster.data.batch import Example, collate, token_batches
from punster.errors import UserError
from punster.model.load import load_model
from punster.model.product import multiplies_bf16
from punster.model.role import Role, Trunk
from punster.model.tokenizer import Tokenizer
from punster.rollout.logprobs import token_log_probs
from punster.train.checkpoint import load_run
from punster.train.rows import encode
from punster.train.setup import extend
from punster.train.sft import held_out_loss, sft

Make = Callable[..., Any]
ROWS = [
    {"prompt": "pun: sea", "completion": "the tide was tied."},
    {"prompt": "a much longer request for a pun about bread", "completion": "dough!"},
    {"prompt": "x", "completion": "I used to be a banker but I lost interest in it."},
    {"prompt": "pun: time", "completion": "it flies"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.load(str(tiny_llama))


@pytest.fixture(scope="module")
def examples(tiny_llama: Path, tokenizer: Tokenizer) -> list[Example]:
    model = load_model(str(tiny_llama))
    return [encode(tokenizer, model, row) for row in ROWS]


def captured(config: SftConfig, monkeypatch: pytest.MonkeyPatch, rows: Any = ROWS) -> list[Tensor]:
    """The gradients of the first optimizer step of a run."""
    seen: list[Tensor] = []

    def spy(optimizer: torch.optim.Optimizer, lr: float, norm: float) -> dict[str, float]:
        if not seen:
            seen.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])
        return original(optimizer, lr, norm)

    original = sft_module.optimizer_step
    monkeypatch.setattr(sft_module, "optimizer_step", spy)
    sft(config, rows)
    monkeypatch.undo()
    return seen


def test_micro_batches_give_the_gradient_of_one_batch(
    tiny_llama: Path, tmp_path: Path, make: Make, reader: Any, monkeypatch: pytest.MonkeyPatch, examples: list[Example]
) -> None:
    """Responses of very different length: a mean of means over micro-batches would differ."""
    assert len(token_batches([example.length for example in examples], 64)) >= 3
    config = make(SftConfig, name="whole", out=str(tmp_path), model=str(tiny_llama), steps=1, batch_size=4, max_tokens=100_000)
    whole = captured(config, monkeypatch)
    parts = captured(replace(config, name="parts", max_tokens=64), monkeypatch)
    assert len(whole) == len(parts) > 0
    assert max(float(g.abs().max()) for g in whole) > 1e-2
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert reader.values(tmp_path / "whole", "loss") == pytest.approx(reader.values(tmp_path / "parts", "loss"), abs=1e-6)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_first_loss_is_transformers_loss_on_completion_and_eos(
    tiny_llama: Path, tmp_path: Path, make: Make, reader: Any, examples: list[Example], adapter: str
) -> None:
    """Labels -100 on the prompt, EOS labelled: cross-entropy per response token of the untouched model."""
    from transformers import AutoModelForCausalLM

    sft(make(SftConfig, name="one", out=str(tmp_path), model=str(tiny_llama), steps=1, batch_size=4, adapter=adapter), ROWS)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    total, tokens = 0.0, 0
    for example in examples:
        labels = torch.tensor([[-100] * len(example.prompt) + list(example.response)])
        with torch.no_grad():
            mean = theirs(torch.tensor([example.prompt + example.response]), labels=labels).loss
        total, tokens = total + float(mean) * len(example.response), tokens + len(example.response)
    assert reader.values(tmp_path / "one", "loss") == pytest.approx([total / tokens], abs=1e-5)
    assert reader.values(tmp_path / "one", "num_tokens") == [tokens]


def test_prompt_tokens_have_no_weight_and_eos_has(tiny_llama: Path, tokenizer: Tokenizer, examples: list[Example]) -> None:
    """Gradient of the loss in each position's logits, through the head's input."""
    role = Role(load_model(str(tiny_llama)))
    batch = collate(examples)
    hidden = role.hidden(batch).detach().requires_grad_(True)
    log_probs = token_log_probs(hidden[:, :-1][batch.response_span()[:, 1:]], role.model.head, batch.targets())
    (-log_probs.sum()).backward()
    assert hidden.grad is not None
    for row, example in enumerate(examples):
        assert example.response[-1] == tokenizer.eos_id
        weight = hidden.grad[row].abs().sum(-1)
        first, last = len(example.prompt) - 1, example.length - 2  # predictors of the first response token and of EOS
        assert (weight[:first] == 0).all()
        assert (weight[first : last + 1] > 0).all()
        assert (weight[last + 1 :] == 0).all()


def test_the_pad_id_does_not_matter(tiny_llama: Path, tokenizer: Tokenizer, examples: list[Example]) -> None:
    """pad == eos, pad == another id of the texts: the same hidden states, bit for bit, at every real token."""
    role = Role(load_model(str(tiny_llama)))
    results = []
    for pad in (0, tokenizer.eos_id, examples[0].response[0]):
        batch = collate(examples, pad_id=pad)
        log_probs = token_log_probs(role.response_hidden(batch), role.model.head, batch.targets())
        assert batch.targets().tolist() == [token for example in examples for token in example.response]
        results.append(log_probs)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_loss_falls_and_the_saved_run_has_that_loss(
    family: str, adapter: str, tmp_path: Path, make: Make, reader: Any, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    config = make(SftConfig, name="learn", out=str(tmp_path), model=str(folder), steps=120, batch_size=4, lr=1e-2,
                  warmup=0.025, adapter=adapter, top_layers="all")  # fmt: skip
    run = sft(config, ROWS)
    losses = reader.values(run, "loss")
    assert losses[0] > 4 and losses[-1] < (0.3 if adapter == "none" else 0.55) * losses[0]
    assert [row["lr"] for row in reader.lines(run)][:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert 0 < reader.values(run, "lr")[-1] < 1e-3
    role, tokenizer = load_run(run)
    texts = [encode(tokenizer, role.model, row) for row in ROWS]
    again = held_out_loss(role, texts, Trunk.compute(role.model, texts, [], 4096))
    assert again < losses[-1] + 0.05


def test_summary_holds_the_held_out_loss_of_the_saved_run(sft_run: str, reader: Any) -> None:
    from punster.data import corpus

    role, tokenizer = load_run(sft_run)
    texts = [encode(tokenizer, role.model, row) for row in corpus.sft_rows("val")]
    expected = held_out_loss(role, texts, Trunk.compute(role.model, texts, [], 4096))
    summary = reader.summary(sft_run)
    assert summary["eval_loss"] == pytest.approx(expected, abs=1e-4)
    assert (summary["steps"], summary["rows"]) == (8, 24)


def test_the_base_is_untouched(tiny_llama: Path, tmp_path: Path, make: Make) -> None:
    from punster.train.setup import shared_base

    before = {name: tensor.clone() for name, tensor in load_model(str(tiny_llama)).weights.items()}
    for adapter in ("lora", "none"):
        sft(make(SftConfig, name=adapter, out=str(tmp_path), model=str(tiny_llama), steps=2, batch_size=4, adapter=adapter), ROWS)
    shared = shared_base(str(tiny_llama), SftConfig(device="cpu", dtype="fp32"))
    assert all(torch.equal(before[name], tensor) for name, tensor in shared.weights.items())


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_own_weights_are_multiplied_in_the_type_of_the_base_but_for_policies(kind: str, tiny_llama: Path, make: Make) -> None:
    model = load_model(str(tiny_llama))
    half = torch.bfloat16 if kind == "bf16" and multiplies_bf16() else torch.float32
    settings = {"name": "x", "model": str(tiny_llama), "dtype": kind, "adapter": "none", "top_layers": "2"}
    for config, products in ((SftConfig, half), (RewardConfig, half), (DpoConfig, torch.float32), (PpoConfig, torch.float32)):
        assert extend(Role(model), make(config, **settings), "own").model.own_type == products


def test_adapters_lie_in_the_top_layers_only(tiny_llama: Path, make: Make, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama))
    config = make(SftConfig, name="x", out=str(tmp_path), model=str(tiny_llama))
    assert extend(Role(model), config, "sft").first_layer == 3  # a third of 4
    assert extend(Role(model), replace(config, top_layers="2"), "sft").first_layer == 2
    assert extend(Role(model), replace(config, top_layers="all"), "sft").first_layer == 0
    with pytest.raises(UserError, match="--top-layers 5"):
        extend(Role(model), replace(config, top_layers="5"), "sft")


def test_sft_on_top_of_sft_keeps_the_first_adapter(
    sft_run: str, tiny_llama: Path, tmp_path: Path, make: Make, reader: Any
) -> None:
    run = sft(
        make(SftConfig, name="second", out=str(tmp_path), model=str(tiny_llama), pretrained=sft_run, steps=2, batch_size=4), ROWS
    )
    first, kept, own = reader.adapter(sft_run, "sft"), reader.adapter(run, "sft"), reader.adapter(run, "sft2")
    assert all(torch.equal(first[name], kept[name]) for name in first)
    assert any(float(tensor.abs().max()) > 0 for name, tensor in own.items() if "lora_B" in name)


def test_bad_rows_are_refused(tiny_llama: Path, tmp_path: Path, make: Make) -> None:
    config = make(SftConfig, name="bad", out=str(tmp_path), model=str(tiny_llama), steps=1)
    for rows, message in (
        ([{"prompt": "a"}], "row 1: field 'completion' is missing"),
        ([ROWS[0], {"prompt": "a", "completion": 3}], "row 2, field 'completion'"),
        ([{"prompt": "a", "completion": " "}], "empty"),
        ([], "no rows"),
        ([{"prompt": "word " * 200, "completion": "b"}], "row 1: .* the model's context is 128"),
    ):
        with pytest.raises(UserError, match=message):
            sft(config, rows)
    assert not (tmp_path / "bad").exists(), "nothing half-written is left behind"


def test_loss_of_random_weights_is_about_that_of_guessing(sft_run: str, tiny_llama: Path, reader: Any) -> None:
    vocabulary = load_model(str(tiny_llama)).config.vocab_size
    assert abs(reader.values(sft_run, "loss")[0] - math.log(vocabulary)) < 1.5


def test_own_rows_train_where_the_embedded_held_out_texts_do_not_fit(
    tiny_llama: Path, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with a context of 128 and rows that fit into it; one embedded validation text is longer than that."""
    from punster.data import corpus

    long = tuple({**record, "pun": "q" * 200} if record["split"] == "val" else record for record in corpus.records())
    monkeypatch.setattr(corpus, "records", lambda: long)
    assert sft(make(SftConfig, name="own", out=str(tmp_path), model=str(tiny_llama), steps=1, batch_size=4), ROWS)


def test_long_contrasts_are_left_out_and_counted_and_other_rows_refused(
    tiny_llama: Path, tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"out": str(tmp_path), "model": str(tiny_llama), "steps": 1, "batch_size": 4, "quiet": False}
    rows = [*ROWS, {"prompt": "make a pun", "completion": "q" * 200, "source": "contrasts"}]
    folder = sft(make(SftConfig, name="own", **settings), rows)
    assert folder is not None and json.loads((folder / "summary.json").read_text())["rows"] == len(ROWS)
    assert f"1 of {len(rows)} rows left out: contrasts longer" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"row {len(rows)}: .* the model's context is"):
        sft(make(SftConfig, name="other", **settings), [*ROWS, {**rows[-1], "source": "mine"}])


def test_a_run_on_embedded_puns_and_more_is_shown_held_out_prompts(
    tiny_llama: Path, tmp_path: Path, make: Make, reader: Any
) -> None:
    settings = {"out": str(tmp_path), "model": str(tiny_llama), "steps": 1, "batch_size": 4, "eval_prompts": 3}
    folder = sft(make(SftConfig, name="both", data=["embedded", "demo-puns"], **settings))
    assert folder is not None
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    from punster.data import corpus

    assert len({row["prompt"] for row in samples}) == 3 and {row["prompt"] for row in samples} <= set(corpus.prompts("val"))
