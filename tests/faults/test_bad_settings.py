"""Every setting of every verb out of range and of the wrong type, contradictions, other versions, odd prompts: one line, exit 2."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml

from punster import config
from punster.api import load
from punster.cli import main, parse
from punster.errors import UserError
from punster.model.lora import Adapter
from punster.model.saved import load_role, save_role
from punster.train.checkpoint import load_run

VERBS = {
    "sft": config.SftConfig, "reward": config.RewardConfig, "ppo": config.PpoConfig, "grpo": config.GrpoConfig, "dpo": config.DpoConfig,
    "distill": config.DistillConfig, "evaluate": config.EvaluateConfig, "run": config.PipelineConfig,
}  # fmt: skip
FREE = {  # any text may be right: it is looked at where it is used
    "model", "out", "prompts", "actor", "reward_model", "pretrained", "prompt_format", "gold", "proxy", "reference", "keep_best",
}  # fmt: skip
ANY_NUMBER = {"seed"}


def kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def wrong_values(name: str, hint: Any) -> Iterator[Any]:
    """Values of the wrong type, then values out of range."""
    allowed = kinds(hint)
    yield {"a": {"b": 1}} if get_origin(hint) is not dict else "text"
    if int in allowed or float in allowed:
        yield "many"
        yield [1, 2]
        if name not in ANY_NUMBER and str not in allowed:
            yield -1
    if int in allowed and float not in allowed:
        yield 1.5
    if float in allowed and str not in allowed:
        yield float("nan")
        yield float("inf")
        yield float("-inf")
    if bool in allowed:
        yield "perhaps"
    if any(get_origin(kind) is Literal for kind in allowed):
        yield "nonsense"
    if name in ("name",):
        yield from ("../up", "/abs", "a/b", "..", ".", "a\x1b[2J", "a\nb", "-n", "x" * 300)
    if name in ("device", "dtype", "strategy", "top_layers"):
        yield "nonsense"
    if name in ("negatives", "stages"):
        yield ["nonsense"]


def cases() -> list[tuple[str, str, Any]]:
    return [
        (verb, item.name, value)
        for verb, kind in VERBS.items()
        for item in fields(kind)
        for value in wrong_values(item.name, get_type_hints(kind)[item.name])
    ]


def test_every_setting_out_of_range_or_of_the_wrong_type(tmp_path: Path) -> None:
    """Read from YAML, as files and the command line are: a UserError of one line that names the setting."""
    accepted, silent = [], []
    file = tmp_path / "c.yaml"
    tried = cases()
    for verb, name, value in tried:
        file.write_text(yaml.safe_dump({name: value}, allow_unicode=True))
        try:
            parse(verb, VERBS[verb], ["--config", str(file)], positional=("models",) if verb == "evaluate" else ())
        except UserError as error:
            text = str(error)
            if (name not in text and name.replace("_", "-") not in text and "name" not in text) or "\n" in text:
                silent.append((verb, name, value, text))
        else:
            accepted.append((verb, name, value))
    assert len(tried) > 1200
    assert not accepted and not silent


CONTRADICTIONS = {
    "several samples a prompt": ["grpo", "-b", "10", "--samples", "4"],
    "more minibatches than rows": ["ppo", "-b", "4", "--minibatches", "5"],
    "a beta that cannot move": ["ppo", "--target-kl", "5", "--beta", "0"],
    "a horizon below the batch": ["ppo", "-b", "64", "--target-kl", "5", "--kl-horizon", "10"],
    "an SFT term for KTO": ["dpo", "--loss-type", "kto", "--sft-coef", "1"],
    "a second SFT term": ["dpo", "--loss-type", "orpo", "--sft-coef", "1"],
    "rows that distill has no use for": ["distill", "--data", "mine.jsonl"],
    "an adapter that distill has no use for": ["distill", "-a", "runs/a", "-p", "runs/b"],
    "templates of the other part": ["reward", "--split", "gold", "--negatives", "template"],
    "upper clip below the lower": ["grpo", "--clip-high", "0.1", "--clip", "0.2"],
    "smoothing without a use": ["dpo", "--label-smoothing", "0.1", "--loss-type", "hinge"],
    "online without a judge": ["dpo", "--online"],
    "online KTO": ["dpo", "--online", "-c", "r", "--loss-type", "kto"],
    "rows that online DPO has no use for": ["dpo", "--online", "-c", "r", "--data", "mine.jsonl"],
    "rows that sampled pairs have no use for": ["dpo", "--pairs", "sampled", "-c", "r", "--data", "embedded", "mine.jsonl"],
    "columns that sampled pairs have no use for": ["dpo", "--pairs", "sampled", "-c", "r", "--columns", "prompt=question"],
    "KTO of single rows": ["dpo", "-b", "1", "--loss-type", "kto"],
    "sampled negatives without a sampler": ["reward", "--negatives", "sampled"],
    "SFT start without an SFT run": ["reward", "--start", "sft"],
    "pool below best-of": ["evaluate", "base", "--best-of", "8", "--pool", "4"],
    "resume what is not there": ["sft", "--resume"],
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions(case: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb, *rest = CONTRADICTIONS[case]
    more = (
        ["--out", str(tmp_path / "o")]
        if verb == "evaluate"
        else ["-n", "x", "--out", str(tmp_path / "o"), "--model", str(tiny_llama)]
    )
    assert main([verb, *rest, *more]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and "Traceback" not in said
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("version", "expected"), [(0, "compare its keys"), (2, "update punster"), ("old", "config_version")])
@pytest.mark.parametrize("extra", [{}, {"a_key_of_other_times": 1}])
def test_configurations_of_other_versions(
    version: Any, expected: str, extra: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"config_version": version, **extra}))
    assert main(["sft", "-n", "x", "--config", str(file), "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert expected in said and len(said.strip().splitlines()) == 1
    assert main(["run", str(file)]) == 2


# ---- prompts ------------------------------------------------------------------------------------------------------
SPECIAL = "<|im_start|><|im_end|><|endoftext|>"
ODD = {
    "empty": "", "spaces": "   ", "special tokens only": SPECIAL * 3, "right to left": "ספר לי בדיחה", "override": "\u202eabc\u202c",
    "emoji": "🥐👩‍👩‍👧‍👦🏳️‍🌈", "control characters": "".join(map(chr, range(1, 32))), "NUL": "a\x00b", "C1": "\x9b31m\x90q\x9c", "escape": "\x1b]0;x\x07\x1b[2J",
    "combining": "e\u0301" * 20, "template": "{{ 7*7 }}{% raw %}%%punster-0%%", "newlines": "\n\r\n\u2028",
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_prompts(case: str, sft_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ODD[case]
    assert main(["generate", sft_run, prompt, "-k", "2", "--max-new-tokens", "4", "--dtype", "fp32", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.splitlines())
    tokenizer = load(sft_run, device="cpu", dtype="fp32").tokenizer
    special = {i for i, token in tokenizer.hf.added_tokens_decoder.items() if token.special}
    assert not special & set(tokenizer.text_ids(prompt)) and not special & set(tokenizer.response_ids(prompt)[:-1])
    framed, bare = tokenizer.prompt_ids(prompt), tokenizer.prompt_ids("x")
    assert [i for i in framed if i in special] == [i for i in bare if i in special]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("pun " * 25_000, "exceeds the context"), ("x\udcff", "not valid UTF-8"), ("\ud800", "not valid UTF-8")],
)
def test_prompts_that_are_refused(prompt: str, expected: str, sft_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", sft_run, prompt, "--dtype", "fp32", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert expected in said and len(said) < 400 and said.isascii()


# ---- what does not fit together -----------------------------------------------------------------------------------
def test_a_tokenizer_of_another_model(make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model("llama", vocab_size=200)  # fewer embeddings than its tokenizer has tokens
    for command in (
        ["generate", str(folder), "hi"],
        ["sft", "-n", "x", "--model", str(folder), "--out", str(tmp_path / "o"), "--steps", "1"],
    ):
        assert main([*command, "--dtype", "fp32", "--device", "cpu"]) == 2
        assert "do not fit together" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_an_adapter_of_another_base(sft_run: str, tiny_llama: Path, make_model: Any, tmp_path: Path) -> None:
    """Refused by shape, by name of a site, and by the weights' hash where shapes are the same."""
    role, tokenizer = load_run(sft_run)
    place = tmp_path / "saved"
    save_role(place, role, tokenizer)
    narrow, short, twin = (
        make_model("llama", hidden_size=16),
        make_model("llama", num_hidden_layers=2),
        make_model("llama", seed=9),
    )
    text = (place / "role.json").read_text()
    for other, expected in ((narrow, "other base weights"), (short, "other base weights"), (twin, "other base weights")):
        (place / "role.json").write_text(text.replace(str(tiny_llama), str(other)))
        with pytest.raises(UserError, match=expected):
            load_role(place)
    from punster.model.load import load_model

    adapter = place / "adapters" / "sft"
    with pytest.raises(UserError, match=r"lora_[AB].* is \(.*32.*\), this base model needs \(.*16.*\)"):
        Adapter.load(adapter, "sft", load_model(str(narrow)).config)
    with pytest.raises(UserError, match=r"layers.3.* does not belong to this base model"):
        Adapter.load(adapter, "sft", load_model(str(short)).config)
    (place / "role.json").write_text(text.replace('"sft"', '"../../sft"'))
    with pytest.raises(UserError, match="is not the name of an adapter"):
        load_role(place)
    assert torch.is_tensor(role.model.embedding)


def test_python_can_give_no_setting_of_the_wrong_type_or_choice() -> None:
    """A misspelt choice would be none of those that are asked for, and train something else without a word."""
    accepted, silent, tried = [], [], 0
    for verb, kind in VERBS.items():
        for item in fields(kind):
            hint = get_type_hints(kind)[item.name]
            values: list[Any] = [{"a": 1}] if get_origin(hint) is not dict else ["text"]
            if any(get_origin(one) is Literal for one in kinds(hint)):
                values += ["nonsense", None]
            if hint == list[str]:
                values += ["one.jsonl", [1]]
            if int in kinds(hint) or float in kinds(hint):
                values += [True, *(["1"] if str not in kinds(hint) else [])]
            for value in values:
                tried += 1
                try:
                    kind(**{item.name: value})
                except UserError as error:
                    silent += [str(error)] if item.name.replace("_", "-") not in str(error).replace("_", "-") else []
                else:
                    accepted.append((verb, item.name, value))
    assert tried > 700 and not accepted and not silent
    assert config.SftConfig(data=("a", Path("b")), steps=None, lr=1).data == ["a", "b"]
