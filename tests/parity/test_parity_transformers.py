"""Our decoder gives the logits and the greedy tokens of `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from punster.config.shared import DEFAULT_MODEL
from punster.model.load import load_model, resolve
from punster.model.tokenizer import Tokenizer
from punster.model.transformer import Decoder, KeyValueCache

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied-wide": ("gpt2", {"tie_word_embeddings": False, "n_inner": 48, "activation_function": "gelu"}),
    "llama-gqa-untied": ("llama", {}),
    "llama-gqa-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-head-dim-theta": ("llama", {"head_dim": 16, "rope_theta": 500_000.0, "rms_norm_eps": 1e-3}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
}


def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def greedy(model: Decoder, prompt: Tensor, steps: int) -> Tensor:
    """(1, P) -> (1, P + steps): argmax decoding through the key-value cache."""
    cache = KeyValueCache(model.config, 1, prompt.shape[1] + steps, prompt.device)
    ids, fresh = prompt, prompt
    for _ in range(steps):
        positions = torch.arange(cache.length, ids.shape[1])[None]
        state = model.blocks(model.embed(fresh, positions), 0, model.config.n_layer, positions=positions, cache=cache)
        cache.length = ids.shape[1]
        fresh = model.logits(model.final_norm(state[:, -1:])).argmax(-1)
        ids = torch.cat((ids, fresh), 1)
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens_equal_transformers(variant: str, make_model: Any) -> None:
    family, options = VARIANTS[variant]
    folder = make_model(family, seed=7, **options)
    ours, reference = load_model(str(folder)), theirs(folder)
    ids = torch.randint(3, ours.config.vocab_size, (3, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(ids).logits
        found = ours.forward(ids)
    assert found.dtype == torch.float32
    assert expected.std() > 0.1  # the comparison below means something
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    prompt = ids[:1, :9]
    generated = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40, min_new_tokens=40, eos_token_id=None
    )
    assert torch.equal(greedy(ours, prompt, 40), generated)


def test_rope_theta_of_older_config_files_is_read(make_model: Any, tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta at the top level, 5 writes rope_parameters: both give the same network."""
    folder = make_model("llama", rope_theta=50_000.0)
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("rope_parameters", None)
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**raw, "rope_theta": 50_000.0}))
    ids = torch.arange(60)[None] + 5
    with torch.no_grad():
        new, old = load_model(str(folder)).forward(ids), load_model(str(tmp_path)).forward(ids)
    assert torch.equal(new, old)
    with torch.no_grad():
        torch.testing.assert_close(old, theirs(folder)(ids).logits, atol=1e-4, rtol=0)


def test_sharded_folder_equals_the_single_file(tiny_llama: Path, tmp_path: Path) -> None:
    theirs(tiny_llama).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    whole, sharded = load_model(str(tiny_llama)), load_model(str(tmp_path))
    assert whole.weights.keys() == sharded.weights.keys()
    assert all(torch.equal(tensor, sharded.weights[key]) for key, tensor in whole.weights.items())


def test_gpt2_saved_from_the_bare_model(tiny_gpt2: Path, tmp_path: Path) -> None:
    """openai-community/gpt2 itself has names without the leading 'transformer.'."""
    theirs(tiny_gpt2).transformer.save_pretrained(tmp_path)
    ids = torch.arange(30)[None] + 5
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path)).forward(ids), load_model(str(tiny_gpt2)).forward(ids))


@pytest.mark.slow
def test_default_model_equals_transformers_on_the_same_file(default_model: Decoder) -> None:
    path = resolve(DEFAULT_MODEL)
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = Tokenizer.load(DEFAULT_MODEL)
    prompt = torch.tensor([tokenizer.prompt_ids("make a pun about bakers")])
    ids = torch.cat((prompt, torch.tensor([tokenizer.response_ids("He kneaded the dough, and then some.")])), 1)
    with torch.no_grad():
        torch.testing.assert_close(default_model.forward(ids), reference(ids).logits, atol=1e-4, rtol=0)
    generated = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=None,
        repetition_penalty=1.0,
    )
    assert torch.equal(greedy(default_model, prompt, 24), generated)
