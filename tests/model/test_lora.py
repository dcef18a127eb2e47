"""Adapters without PEFT: what a fresh one is, stacking, joining, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from punster.errors import UserError
from punster.model.load import load_model
from punster.model.lora import Adapter, join, low_rank, merged_weights
from punster.model.transformer import Decoder

IDS = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> Decoder:
    return load_model(str(request.getfixturevalue(request.param)))


def fresh(
    model: Decoder, name: str = "policy", seed: int = 0, rank: int = 4, alpha: float = 8.0, layers: range = range(2, 4)
) -> Adapter:
    return Adapter.create(
        name, model.config, rank=rank, alpha=alpha, layers=layers, generator=torch.Generator().manual_seed(seed)
    )


def trained(model: Decoder, name: str = "policy", seed: int = 0, **options: object) -> Adapter:
    adapter = fresh(model, name, seed, **options)
    generator = torch.Generator().manual_seed(seed + 1000)
    for site in adapter.b:
        adapter.b[site] = torch.randn(adapter.b[site].shape, generator=generator) * 0.2
    return adapter


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_bit_for_bit(model: Decoder) -> None:
    base = model.forward(IDS)
    assert torch.equal(model.forward(IDS, [fresh(model)]), base)
    assert torch.equal(model.forward(IDS, [fresh(model), fresh(model, "rl", 2)]), base)
    assert not torch.equal(model.forward(IDS, [trained(model)]), base)
    stack = [trained(model), fresh(model, "rl", 2)]
    torch.testing.assert_close(model.forward(IDS, stack), model.forward(IDS, stack[:1]), atol=1e-6, rtol=0)


def test_initialisation(model: Decoder) -> None:
    adapter = fresh(model, rank=16)
    for site, a in adapter.a.items():
        bound = 1 / math.sqrt(a.shape[1])
        assert a.dtype == torch.float32 and a.abs().max() <= bound
        assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)  # uniform
        assert not adapter.b[site].any()
    assert adapter.scale == 0.5
    assert adapter.first_layer == 2
    assert {model.layer_of(site) for site in adapter.a} == {2, 3}
    assert set(adapter.a) == {site for layer in (2, 3) for site in model.config.sites(layer)}
    same, other = fresh(model, rank=16), fresh(model, rank=16, seed=1)
    site = next(iter(adapter.a))
    assert torch.equal(adapter.a[site], same.a[site]) and not torch.equal(adapter.a[site], other.a[site])


def test_gradient_reaches_b_first_and_the_base_never(model: Decoder) -> None:
    adapter = fresh(model).trainable()
    model.forward(IDS, [adapter]).logsumexp(-1).sum().backward()
    assert all(not tensor.grad.any() for tensor in adapter.a.values() if tensor.grad is not None)  # because B = 0
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in adapter.b.values())
    assert all(tensor.grad is None for tensor in model.weights.values())


def test_low_rank_is_the_sum_of_the_products(model: Decoder) -> None:
    one, two = trained(model, rank=2, alpha=3.0), trained(model, "rl", 5, rank=5, alpha=1.0, layers=range(3, 4))
    both, only = next(iter(two.a)), next(iter(one.a))
    x = torch.randn(3, one.a[both].shape[1], generator=torch.Generator().manual_seed(0))
    expected = 1.5 * x @ one.a[both].T @ one.b[both].T + 0.2 * x @ two.a[both].T @ two.b[both].T
    found = low_rank(x, both, [one, two])
    assert found is not None
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found = low_rank(x, only, [one, two])
    assert found is not None
    torch.testing.assert_close(found, 1.5 * x @ one.a[only].T @ one.b[only].T, atol=1e-5, rtol=1e-5)
    assert low_rank(x, "elsewhere", [one, two]) is None


@torch.no_grad()
def test_join_equals_the_stack(model: Decoder) -> None:
    stack = [
        trained(model, "sft", 1, rank=2, alpha=9.0),
        trained(model, "rl", 2, layers=range(1, 4)),
        trained(model, "top", 3, layers=range(3, 4)),
    ]
    joined = join(stack)
    assert (joined.rank, joined.scale, joined.first_layer) == (2 + 4 + 4, 1.0, 1)
    expected = model.forward(IDS, stack)
    torch.testing.assert_close(model.forward(IDS, [joined]), expected, atol=1e-5, rtol=0)
    merged = merged_weights(model.weights, stack)
    torch.testing.assert_close(Decoder(model.config, merged).forward(IDS), expected, atol=1e-5, rtol=0)
    assert all(torch.equal(merged[key], tensor) for key, tensor in model.weights.items() if model.layer_of(key) < 1)


def test_merging_is_fp32_and_leaves_the_base_alone(tiny_llama: Path) -> None:
    half = load_model(str(tiny_llama), torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in half.weights.items()}
    adapter = trained(half)
    for site in adapter.b:
        adapter.b[site] *= 1e-4  # far below half an ulp of bf16
    merged = merged_weights(half.weights, [adapter])
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    assert all(not torch.equal(merged[f"{site}.weight"], half.weights[f"{site}.weight"].float()) for site in adapter.a)
    assert all(torch.equal(tensor, half.weights[key]) for key, tensor in before.items())
    merged["model.norm.weight"].zero_()
    assert half.weights["model.norm.weight"].any()


def test_copy_shares_nothing(model: Decoder) -> None:
    adapter = trained(model)
    copy = adapter.copy("critic")
    site = next(iter(adapter.a))
    adapter.a[site].zero_()
    assert copy.a[site].any() and copy.name == "critic" and copy.first_layer == adapter.first_layer


def test_adapter_of_another_base_is_refused(
    model: Decoder, tmp_path: Path, make_model: object, tiny_llama: Path, tiny_gpt2: Path
) -> None:
    trained(model).save(tmp_path, "base", model.config)
    other_family = load_model(str(tiny_gpt2 if model.config.family == "llama" else tiny_llama))
    with pytest.raises(UserError, match="does not belong to this base model"):
        Adapter.load(tmp_path, "policy", other_family.config)
    changed = {"n_embd": 48} if model.config.family == "gpt2" else {"hidden_size": 48}
    wider = load_model(str(make_model(model.config.family, **changed)))
    with pytest.raises(UserError, match=r"is \(.*32.*\), this base model needs \(.*48.*\)"):
        Adapter.load(tmp_path, "policy", wider.config)
    with pytest.raises(UserError, match="does not belong to this base model"):
        Adapter.load(tmp_path, "policy", replace(model.config, n_layer=3))


def test_unpaired_matrices_are_refused(model: Decoder, tmp_path: Path) -> None:
    trained(model).save(tmp_path, "base", model.config)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, path)
    with pytest.raises(UserError, match="do not pair up"):
        Adapter.load(tmp_path, "policy", model.config)


def test_other_peft_types_are_refused(model: Decoder, tmp_path: Path) -> None:
    trained(model).save(tmp_path, "base", model.config)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "IA3"}))
    with pytest.raises(UserError, match="only plain LoRA"):
        Adapter.load(tmp_path, "policy", model.config)


@pytest.mark.parametrize("change", [{"r": None}, {"r": "8"}, {"r": 0}, {"lora_alpha": None}])
def test_ranks_that_make_no_sense(change: dict[str, object], model: Decoder, tmp_path: Path) -> None:
    trained(model).save(tmp_path, "base", model.config)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="a rank of at least 1 and a number are needed"):
        Adapter.load(tmp_path, "policy", model.config)
    path.write_text("[1]")
    with pytest.raises(UserError, match="not a readable PEFT adapter"):
        Adapter.load(tmp_path, "policy", model.config)


@pytest.mark.parametrize("damage", ["no folder", "no weights", "cut weights", "cut config"])
def test_damaged_adapter_folders(damage: str, model: Decoder, tmp_path: Path) -> None:
    trained(model).save(tmp_path, "base", model.config)
    weights, described = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:500])
    elif damage == "cut config":
        described.write_text(described.read_text()[:20])
    folder = tmp_path / "nowhere" if damage == "no folder" else tmp_path
    with pytest.raises(UserError, match=str(folder)):
        Adapter.load(folder, "policy", model.config)
