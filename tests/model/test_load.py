"""Folders and names: what is wrong is said to people, before any work is done on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from punster.config.shared import DEFAULT_MODEL
from punster.errors import UserError
from punster.model import load
from punster.model.architecture import ModelConfig
from punster.model.load import expected_shapes, load_model, random_model, resolve


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "copy"))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        load_model(str(folder))


def test_dtype_and_frozen_weights(tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama), torch.bfloat16)
    assert {tensor.dtype for tensor in model.weights.values()} == {torch.bfloat16}
    assert not any(tensor.requires_grad for tensor in model.weights.values())
    assert model.name == str(tiny_llama)


@pytest.mark.parametrize("keep", [0, 7, 200, 0.5])
def test_damaged_safetensors(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep > 1 or keep == 0 else keep * len(whole))])
    refused(folder, r"model\.safetensors is damaged")


def test_missing_weights_file_and_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
    refused(folder, r"model\.safetensors is missing \(punster reads safetensors only, never pickles\)")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}))
    refused(folder, r"model-00002\.safetensors is missing")


@pytest.mark.parametrize("given", [["a"], {"a": 1}, None])
def test_an_index_that_names_no_files(folder: Path, given: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": given}))
    refused(folder, "weight_map must name a file for each tensor")


@pytest.mark.parametrize(("gpt2", "llama", "value"), [("n_head", "num_attention_heads", 0), ("n_head", "num_attention_heads", "8"),
                                                      ("n_embd", "hidden_size", None), ("layer_norm_epsilon", "rms_norm_eps", "x"),
                                                      ("layer_norm_epsilon", "rms_norm_eps", None),
                                                      ("layer_norm_epsilon", "rms_norm_eps", float("nan")), ("n_layer", "num_hidden_layers", True)])  # fmt: skip
def test_values_that_make_no_sense(folder: Path, gpt2: str, llama: str, value: object) -> None:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    change_config(folder, **{gpt2 if kind == "gpt2" else llama: value})
    refused(folder, r"config\.json: .*(makes no sense|must be a (whole )?number above 0)")


@pytest.mark.parametrize(
    "change", [{"num_key_value_heads": 3}, {"head_dim": 7}, {"tie_word_embeddings": "no"}, {"hidden_act": ["x"]}]
)
def test_settings_that_do_not_fit_together(change: dict[str, object], tiny_llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    change_config(copy, **change)
    refused(copy, r"config\.json: .*(do not fit together|are needed)")


def test_an_index_cannot_point_outside_the_folder(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    refused(folder, r"outside\.safetensors is missing")


@pytest.mark.parametrize("which", [0, -1])
def test_missing_tensor(folder: Path, which: int) -> None:
    names = [name for name in expected_shapes(load_model(str(folder)).config) if "lm_head" not in name]
    change_tensors(folder, lambda tensors: tensors.pop(names[which]))
    refused(folder, rf"tensor {names[which]} is missing")


def test_wrong_shape(folder: Path) -> None:
    name = next(name for name in load_file(folder / "model.safetensors") if name.endswith(("c_fc.weight", "up_proj.weight")))
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(5, 7)}))
    refused(folder, rf"{name} is \([57], [57]\), expected")


def test_unknown_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.zeros(8)}))
    refused(folder, "unknown tensors .*q_norm")


def test_buffers_of_old_checkpoints_are_ignored(tiny_gpt2: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_gpt2, tmp_path / "copy"))
    buffers = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    change_tensors(copy, lambda tensors: tensors.update(buffers))
    assert load_model(str(copy)).weights.keys() == load_model(str(tiny_gpt2)).weights.keys()


@pytest.mark.parametrize("kind", ["mistral", "gpt_neox", None])
def test_unknown_architecture(folder: Path, kind: str | None) -> None:
    change_config(folder, model_type=kind)
    refused(folder, rf"model_type {kind!r} is not supported")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_scaling(key: str, tiny_llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    change_config(copy, **{"rope_parameters": None, key: {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10_000.0}})
    refused(copy, "rotary scaling 'llama3' is not implemented")
    change_config(copy, **{"rope_parameters": None, key: {"type": "linear", "factor": 2.0}})
    refused(copy, "rotary scaling 'linear' is not implemented")


def test_gpt2_with_other_attention_scaling(tiny_gpt2: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_gpt2, tmp_path / "copy"))
    change_config(copy, scale_attn_by_inverse_layer_idx=True)
    refused(copy, "scales attention")


def test_unknown_activation(tiny_gpt2: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_gpt2, tmp_path / "copy"))
    change_config(copy, activation_function="relu")
    with pytest.raises(UserError, match="activation 'relu' is not implemented"):
        load_model(str(copy)).forward(torch.tensor([[3, 4]]))


def test_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", ')
    refused(folder, r"config\.json")


def test_incomplete_config(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    del raw["vocab_size"]
    (folder / "config.json").write_text(json.dumps(raw))
    refused(folder, "vocab_size")


def test_damaged_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")
    load_model(str(folder))  # transformers, too, takes the single file, and leaves an old index beside what it writes
    (folder / "model.safetensors").unlink()
    refused(folder, r"index\.json")


def test_a_head_of_its_own_stays_one_whatever_the_settings_say(folder: Path) -> None:
    """As in transformers: a merge or fine-tune may have left the flag on."""
    tensors = load_file(folder / "model.safetensors")
    embedding = next(t for n, t in tensors.items() if n.endswith(("wte.weight", "embed_tokens.weight")))
    change_config(folder, tie_word_embeddings=True)
    for head, tied in ((embedding, True), (embedding * 2, False)):
        save_file({**tensors, "lm_head.weight": head.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
        model = load_model(str(folder))
        assert model.config.tied == tied and torch.equal(model.head.weight, head)


def test_scaled_rotation_is_refused_beside_the_newer_settings(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    change_config(
        folder, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rope_scaling={"rope_type": "linear", "factor": 4.0}
    )
    refused(folder, "rotary scaling 'linear' is not implemented")


def test_heads_that_do_not_divide_the_width(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_gpt2, tmp_path / "m"))
    change_config(folder, n_head=3)
    refused(folder, "do not fit together")


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"neither a \.gguf file nor a Hugging Face model folder"):
        load_model(str(tmp_path / "m.safetensors"))
    with pytest.raises(UserError, match="no such file or folder"):
        load_model("~nosuchuser/model")


# ---- names ----------------------------------------------------------------------------------------------------
@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hub is unreachable; the list collects what was asked of it."""
    asked: list[str] = []

    def snapshot_download(name: str, **_: Any) -> str:
        asked.append(name)
        raise LocalEntryNotFoundError("the hub is not reachable\nand so on")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(load, "fetch", lambda model: pytest.fail("nothing may be downloaded"))
    return asked


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("smollm2-135m-instruct", DEFAULT_MODEL),
        ("smolm2-135m-instruct-q4", DEFAULT_MODEL),
        ("gtp2", "gpt2"),
        ("distilgtp2", "distilgpt2"),
    ],
)
def test_unknown_name_suggests_near_matches(name: str, suggestion: str, no_network: list[str]) -> None:
    with pytest.raises(UserError, match=rf"unknown model '{name}'\. Did you mean [^?]*{suggestion}") as raised:
        load_model(name)
    assert "a folder, a .gguf file, a hub id" in str(raised.value)
    assert not no_network


def test_nonsense_suggests_nothing(no_network: list[str]) -> None:
    with pytest.raises(UserError, match="unknown model 'zzzz'") as raised:
        resolve("zzzz")
    assert "Did you mean" not in str(raised.value)


def test_unreachable_hub_is_one_clear_line(no_network: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"could not fetch 'HuggingFaceTB/SmolLM2-135M-Instrct' from the hub \(the hub is not reachable\)"
    ) as raised:
        resolve("HuggingFaceTB/SmolLM2-135M-Instrct")
    assert "Did you mean HuggingFaceTB/SmolLM2-135M-Instruct" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="openai-community/gpt2"):
        resolve("gpt2")
    assert no_network == ["HuggingFaceTB/SmolLM2-135M-Instrct", "openai-community/gpt2"]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "runs/sft/checkpoints", "missing.gguf"])
def test_missing_path_is_not_taken_for_a_hub_id(name: str, no_network: list[str]) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        resolve(name)
    assert not no_network


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json in this folder"):
        resolve(str(tmp_path))


def test_random_model_is_seeded_and_complete() -> None:
    config = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    first, again, other = random_model(config, 3), random_model(config, 3), random_model(config, 4)
    assert {name: tuple(tensor.shape) for name, tensor in first.weights.items()} == expected_shapes(ModelConfig.from_hf(config))
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in first.weights.items())
    assert not torch.equal(first.embedding, other.embedding)


def test_what_the_transport_to_the_hub_raises_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no kind of the hub's own: a proxy that refuses, a connection that is cut."""

    def snapshot_download(name: str, **_: Any) -> str:
        raise Exception("403 Forbidden")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"could not fetch 'openai-community/gpt2' from the hub \(403 Forbidden\)"):
        resolve("openai-community/gpt2")
