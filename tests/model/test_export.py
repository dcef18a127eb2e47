"""Exports are opened by transformers and peft with the same logits and scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from punster.data.batch import Example, collate
from punster.errors import UserError
from punster.model.export import export
from punster.model.heads import ScalarHead
from punster.model.load import load_model
from punster.model.lora import Adapter
from punster.model.role import Role, score_examples
from punster.model.tokenizer import Tokenizer
from punster.model.transformer import Decoder

IDS = torch.tensor([[5, 9, 11, 40, 7, 3, 250, 30]])


@pytest.fixture(params=["tiny_llama", "tiny_llama_tied", "tiny_gpt2"])
def trained(request: pytest.FixtureRequest) -> tuple[Role, Tokenizer]:
    """Two stacked adapters (all layers; top two) with weights of some size, as an SFT run and a policy on it have them."""
    folder = str(request.getfixturevalue(request.param))
    model, generator = load_model(folder), torch.Generator().manual_seed(3)
    adapters = []
    for name, layers in (("sft", range(4)), ("policy", range(2, 4))):
        adapter = Adapter.create(name, model.config, rank=3, alpha=5.0, layers=layers, generator=generator)
        for tensor in adapter.b.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        adapters.append(adapter)
    return Role(model, tuple(adapters)), Tokenizer.load(folder)


def test_hf_has_the_same_logits(trained: tuple[Role, Tokenizer], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    role, tokenizer = trained
    out = export(role, tokenizer, "hf", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        ours = role.model.forward(IDS, role.adapters)
        torch.testing.assert_close(theirs(IDS).logits, ours, rtol=0, atol=1e-4)
        plain = role.model.forward(IDS)
    assert (ours - plain).abs().max() > 1e-2  # the adapters did something
    assert AutoTokenizer.from_pretrained(out)("hello").input_ids == tokenizer.hf("hello").input_ids
    assert list(tmp_path.iterdir()) == [out]


def test_peft_has_the_same_logits(trained: tuple[Role, Tokenizer], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    role, tokenizer = trained
    out = export(role, tokenizer, "peft", tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == role.model.name
    base = AutoModelForCausalLM.from_pretrained(role.model.name, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, out)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, role.model.forward(IDS, role.adapters), rtol=0, atol=1e-4)


def test_reward_model_has_the_same_scores(trained: tuple[Role, Tokenizer], tmp_path: Path) -> None:
    """With a head that reads below the last layer, padding, and a pad id that is not EOS."""
    from transformers import AutoModelForSequenceClassification

    role, tokenizer = trained
    head = ScalarHead.create(32, torch.Generator().manual_seed(5))
    below = tuple(
        replace(a, a={s: t for s, t in a.a.items() if ".3." not in s}, b={s: t for s, t in a.b.items() if ".3." not in s})
        for a in role.adapters
    )
    scorer = replace(role, adapters=below, head=head, depth=3, normalisation=(2.0, -0.5))
    eos = tokenizer.eos_id
    examples = [Example((5, 9), (11, 40, eos)), Example((5, 9, 30), (7, 3, 8, 10, eos))]
    out = export(scorer, tokenizer, "hf", tmp_path / "out")
    theirs = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    config = json.loads((out / "config.json").read_text())
    assert config["pad_token_id"] != eos
    batch = collate(examples, pad_id=config["pad_token_id"])
    mask = torch.arange(batch.ids.shape[1])[None] < batch.lengths[:, None]
    with torch.no_grad():
        found = theirs(batch.ids, attention_mask=mask.long()).logits[:, 0] + config["punster_score_bias"]
    torch.testing.assert_close(found, torch.tensor(score_examples(scorer, examples)), rtol=0, atol=1e-4)


def test_texts_padded_by_the_exported_tokenizer_have_the_same_scores(trained: tuple[Role, Tokenizer], tmp_path: Path) -> None:
    """The pad of this tokenizer was EOS, at which a padded row would have been read."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    role, tokenizer = trained
    scorer = replace(role, head=ScalarHead.create(32, torch.Generator().manual_seed(5)))
    out = export(scorer, tokenizer, "hf", tmp_path / "out")
    theirs, config = AutoModelForSequenceClassification.from_pretrained(out), json.loads((out / "config.json").read_text())
    assert theirs.dtype == torch.float32 and "torch_dtype" not in config
    texts = ["a pun", "a pun about the sea and its tides", "no pun"]
    examples = [Example(tuple(tokenizer.prompt_ids("make a pun")), tuple(tokenizer.response_ids(text))) for text in texts]
    hf = AutoTokenizer.from_pretrained(out)
    if set(tokenizer.hf.all_special_ids) == {
        tokenizer.eos_id
    }:  # GPT-2's one special token: nothing to pad with, which transformers says
        assert hf.pad_token is None
        return
    assert tokenizer.hf.pad_token_id == tokenizer.eos_id != hf.pad_token_id in tokenizer.hf.all_special_ids
    rows = hf.pad({"input_ids": [[*example.prompt, *example.response] for example in examples]}, return_tensors="pt")
    with torch.no_grad():
        found = theirs(**rows).logits[:, 0] + config["punster_score_bias"]
    torch.testing.assert_close(found, torch.tensor(score_examples(scorer, examples)), rtol=0, atol=1e-4)


def test_a_base_that_was_stored_in_bf16_is_exported_in_fp32(trained: tuple[Role, Tokenizer], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    role, tokenizer = trained
    raw = {**role.model.config.raw, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    model = Decoder(replace(role.model.config, raw=raw), role.model.weights, role.model.name)
    out = export(replace(role, model=model), tokenizer, "hf", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(trained: tuple[Role, Tokenizer], tmp_path: Path) -> None:
    role, tokenizer = trained
    scorer = replace(role, head=ScalarHead.create(32, torch.Generator().manual_seed(5)))
    for case, format, message in (
        (scorer, "peft", "policy"),
        (replace(scorer, pooling="mean"), "hf", "pooling last"),
        (role, "onnx", "hf or peft"),
    ):
        with pytest.raises(UserError, match=message):
            export(case, tokenizer, format, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        export(role, tokenizer, "hf", tmp_path / "full")


def test_exports_are_ordinary_folders_and_their_neighbours_are_left_alone(
    trained: tuple[Role, Tokenizer], tmp_path: Path
) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "file").touch()
    out = export(*trained, "peft", tmp_path / "new" / "out")
    assert out.stat().st_mode == (tmp_path / "out.part").stat().st_mode
    export(*trained, "peft", tmp_path / "out")
    assert (tmp_path / "out.part" / "file").exists()
    (tmp_path / "mount").mkdir()  # which may be neither removed nor renamed, and a shell may stand in it
    same = (tmp_path / "mount").stat().st_ino
    assert export(*trained, "hf", tmp_path / "mount").stat().st_ino == same
    export(*trained, "hf", tmp_path / "other")
    contents = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
    assert contents(tmp_path / "mount") == contents(tmp_path / "other")


def test_a_policy_pads_with_a_special_token(trained: tuple[Role, Tokenizer], tmp_path: Path) -> None:
    """transformers fills the rows that ended with it, and GPT-2's one special token is EOS."""
    role, tokenizer = trained
    out = export(role, tokenizer, "hf", tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        pad = json.loads((out / name).read_text())["pad_token_id"]
        assert pad in tokenizer.hf.all_special_ids
        assert (pad == tokenizer.eos_id) == (role.model.config.family == "gpt2")
