"""Passes of the decoder: padding, cache, full fine-tuning copies, fingerprints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from punster.errors import UserError
from punster.model.architecture import ACTIVATIONS, ModelConfig
from punster.model.load import load_model, random_model
from punster.model.transformer import Decoder, KeyValueCache, activate, causal_mask

FAMILIES = ("tiny_llama", "tiny_gpt2")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Decoder:
    return load_model(str(request.getfixturevalue(request.param)))


def some_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str, pad: int) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        at = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, at], mask[index, at] = row, 1
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    """Positions of (B, T) rows with padding anywhere: count of real tokens before, clamped at 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def masked_logits(model: Decoder, ids: Tensor, mask: Tensor) -> Tensor:
    at = positions_of(mask)
    state = model.blocks(model.embed(ids, at), 0, model.config.n_layer, positions=at, mask=causal_mask(mask))
    return model.logits(model.final_norm(state))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 2, 77])
def test_padded_rows_equal_unpadded_rows(model: Decoder, side: str, pad: int) -> None:
    rows = [some_ids(1, length, length)[0] for length in (23, 1, 9)]
    ids, mask = padded(rows, side, pad)
    logits = masked_logits(model, ids, mask)
    assert logits.isfinite().all()  # pads that may look at nothing stay finite
    for index, row in enumerate(rows):
        alone = model.forward(row[None])[0]
        torch.testing.assert_close(logits[index][mask[index].bool()], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_right_padding_needs_no_mask(model: Decoder) -> None:
    rows = [some_ids(1, length, length)[0] for length in (17, 5)]
    ids, _ = padded(rows, "right", 4)
    logits = model.forward(ids)
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index, : len(row)], model.forward(row[None])[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_nothing_looks_ahead(model: Decoder) -> None:
    ids = some_ids(1, 20)
    changed = ids.clone()
    changed[0, 12:] = 5
    first, second = model.forward(ids), model.forward(changed)
    assert torch.equal(first[:, :12], second[:, :12])
    assert not torch.allclose(first[:, 12:], second[:, 12:])


@torch.no_grad()
def test_cache_on_equals_cache_off_with_left_padding(model: Decoder) -> None:
    rows = [some_ids(1, length, length)[0] for length in (16, 11, 7)]
    ids, mask = padded(rows, "left", 0)
    extra = some_ids(3, 8, 99)
    whole = masked_logits(model, torch.cat((ids, extra), 1), torch.cat((mask, torch.ones_like(extra)), 1))

    cache = KeyValueCache(model.config, 3, 40, ids.device)
    positions = positions_of(mask)
    state = model.embed(ids, positions)
    state = model.blocks(state, 0, model.config.n_layer, positions=positions, mask=causal_mask(mask), cache=cache)
    cache.length = ids.shape[1]
    real = mask.bool()
    torch.testing.assert_close(model.logits(model.final_norm(state))[real], whole[:, : ids.shape[1]][real], atol=1e-5, rtol=0)
    seen, at = mask, positions[:, -1:]
    for step in range(extra.shape[1]):
        seen, at = torch.cat((seen, torch.ones(3, 1, dtype=torch.long)), 1), at + 1
        state = model.embed(extra[:, step : step + 1], at)
        state = model.blocks(state, 0, model.config.n_layer, positions=at, mask=seen.bool()[:, None], cache=cache)
        cache.length += 1
        logits = model.logits(model.final_norm(state))[:, 0]
        torch.testing.assert_close(logits, whole[:, ids.shape[1] + step], atol=1e-5, rtol=0)
        if step == 3:  # rows leave and change places: what remains goes on undisturbed
            order = torch.tensor([2, 0])
            cache.select(order)
            seen, at, extra, whole = seen[order], at[order], extra[order], whole[order]
            break
    for step in range(4, extra.shape[1]):
        seen, at = torch.cat((seen, torch.ones(2, 1, dtype=torch.long)), 1), at + 1
        state = model.embed(extra[:, step : step + 1], at)
        state = model.blocks(state, 0, model.config.n_layer, positions=at, mask=seen.bool()[:, None], cache=cache)
        cache.length += 1
        logits = model.logits(model.final_norm(state))[:, 0]
        torch.testing.assert_close(logits, whole[:, ids.shape[1] + step], atol=1e-5, rtol=0)


@torch.no_grad()
def test_chunks_of_blocks_equal_one_pass(model: Decoder) -> None:
    ids = some_ids(2, 15)
    state = model.embed(ids)
    for layer in range(model.config.n_layer):
        state = model.blocks(state, layer, layer + 1)
    assert torch.equal(model.logits(model.final_norm(state)), model.forward(ids))


@torch.no_grad()
def test_bf16_base_keeps_hidden_states_and_head_in_fp32(tiny_llama: Path) -> None:
    exact, half = load_model(str(tiny_llama)), load_model(str(tiny_llama), torch.bfloat16)
    ids = some_ids(1, 12)
    assert half.dtype == torch.bfloat16 and half.logits(half.final_norm(half.embed(ids))).dtype == torch.float32
    state = half.blocks(half.embed(ids), 0, 4)
    assert state.dtype == torch.float32
    gap = (half.forward(ids).log_softmax(-1) - exact.forward(ids).log_softmax(-1)).abs().mean()
    assert 0 < gap < 0.05


@pytest.mark.parametrize("first", [0, 2])
def test_full_fine_tuning_copy_leaves_the_base_bit_identical(model: Decoder, first: int) -> None:
    before = {key: tensor.clone() for key, tensor in model.weights.items()}
    ids = some_ids(2, 12)
    with torch.no_grad():
        logits = model.forward(ids)
    copy = model.trainable_copy(first)
    trained = {key: tensor for key, tensor in copy.weights.items() if tensor.requires_grad}
    assert {model.layer_of(key) for key in trained} == set(range(-1 if first == 0 else first, model.config.n_layer + 1))
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    loss = torch.nn.functional.cross_entropy(copy.forward(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert all(
        tensor.grad is not None and tensor.grad.abs().sum() > 0 for key, tensor in trained.items() if "k_proj.bias" not in key
    )
    optimizer.step()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.weights.items())
    with torch.no_grad():
        assert torch.equal(model.forward(ids), logits)
        after = torch.nn.functional.cross_entropy(copy.forward(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert after < loss - 0.1
    shared = [key for key in model.weights if copy.weights[key].data_ptr() == model.weights[key].data_ptr()]
    assert bool(shared) == (first > 0)


def test_layers_that_are_trained_can_be_multiplied_in_bf16_with_fp32_masters(model: Decoder) -> None:
    ids = some_ids(4, 12)
    gradients = []
    for kind in (torch.float32, torch.bfloat16):
        copy = model.trainable_copy(1, kind)
        logits = copy.forward(ids)
        assert logits.dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(copy.forward(ids), model.trainable_copy(1).forward(ids))  # evaluated as what is saved
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        trained = [tensor for tensor in copy.weights.values() if tensor.requires_grad]
        assert all(tensor.dtype == torch.float32 and tensor.grad is not None for tensor in trained)
        gradients.append(torch.cat([tensor.grad.flatten() for tensor in trained if tensor.grad is not None]))
    exact, rounded = gradients
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.03  # eight bits of each factor


def test_fingerprint_and_trunk_key_tell_models_apart(make_model: object) -> None:
    config = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    one, same, other = random_model(config, 1), random_model(config, 1), random_model(config, 2)
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert one.trunk_key(2) == same.trunk_key(2) != one.trunk_key(1)
    assert one.trunk_key(2) != other.trunk_key(2)
    half = Decoder(one.config, {key: tensor.bfloat16() for key, tensor in one.weights.items()})
    assert half.fingerprint() == one.fingerprint(torch.bfloat16) != one.fingerprint()
    # A copy trained from layer 2 on shares the trunk below it, and only that.
    copy = one.trainable_copy(2)
    assert [copy.trunk_key(depth) == one.trunk_key(depth) for depth in (1, 2, 3)] == [True, True, False]
    assert one.trainable_copy(0).trunk_key(1) != one.trunk_key(1)


def test_mask_by_hand() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert causal_mask(mask)[0].tolist() == [[False] * 4, [False] * 4, [False, False, True, False], [False, False, True, True]]


def test_config_defaults_follow_transformers() -> None:
    gpt2 = ModelConfig.from_hf({"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2})
    assert (gpt2.d_ff, gpt2.max_positions, gpt2.tied, gpt2.activation) == (32, 1024, True, "gelu_new")
    llama = ModelConfig.from_hf({
        "model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 4,
    })  # fmt: skip
    assert (llama.n_kv_head, llama.d_head, llama.tied, llama.rope_theta, llama.norm_eps) == (2, 4, False, 10_000.0, 1e-6)


def test_activations_are_those_of_transformers_or_refused_at_once() -> None:
    from transformers.activations import ACT2FN

    llama = {
        "model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 4,
    }  # fmt: skip
    x = torch.linspace(-6, 6, 500)
    for name in ACTIVATIONS:
        config = ModelConfig.from_hf({**llama, "hidden_act": name})
        assert config.raw["hidden_act"] == name  # an export says what it was
        torch.testing.assert_close(activate(x, config.activation), ACT2FN[name](x), rtol=0, atol=1e-6)
    assert (ModelConfig.from_hf({**llama, "hidden_act": "swish"}).activation, "relu" in ACTIVATIONS) == ("silu", False)
    gpt2 = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "activation_function": "relu"}
    for config in (gpt2, {**llama, "hidden_act": "relu"}):
        with pytest.raises(UserError, match=r"activation 'relu' is not implemented \(silu, .*gelu_fast"):
            ModelConfig.from_hf(config)
