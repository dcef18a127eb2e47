"""GGUF files, written here with the `gguf` package, give the network they were made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from punster.errors import UserError
from punster.model.load import gguf_reader, load_model, random_model, read_gguf
from punster.model.transformer import Decoder

LLAMA = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
GPT2 = {
    "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
TOP = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
}  # fmt: skip
# Largest difference of a logit (their standard deviation is about 1) that the rounding of each type may cause.
TOLERANCE = {Kind.F32: 1e-5, Kind.F16: 1e-2, Kind.BF16: 0.1, Kind.Q8_0: 0.15, Kind.Q4_1: 1.5, Kind.Q4_0: 1.8}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    for prefix, inner in (("model.layers.", LLAMA), ("transformer.h.", GPT2)):
        if stem.startswith(prefix):
            layer, _, module = stem.removeprefix(prefix).partition(".")
            return f"blk.{layer}.{inner[module]}.{kind}"
    return f"{TOP[stem]}.{kind}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k rows (its `permute`)."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def written_arrays(model: Decoder) -> dict[str, np.ndarray]:
    """The model's tensors under GGUF's names and in GGUF's row order."""
    arrays = {}
    for name, tensor in model.weights.items():
        array = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = interleaved(array, model.config.n_head if "q_proj" in name else model.config.n_kv_head)
        arrays[gguf_name(name)] = np.ascontiguousarray(array)
    return arrays


def write(
    path: Path, model: Decoder, kind: Kind = Kind.F32, *, arrays: dict[str, np.ndarray] | None = None,
    raw: dict[str, tuple[np.ndarray, Kind]] | None = None, architecture: str | None = None,
    extra: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:  # fmt: skip
    c = model.config
    writer = gguf.GGUFWriter(path, architecture or c.family)
    writer.add_block_count(c.n_layer)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_head)
    writer.add_eos_token_id(2)
    if c.family == "llama":
        writer.add_head_count_kv(c.n_kv_head)
        writer.add_layer_norm_rms_eps(c.norm_eps)
        writer.add_rope_freq_base(c.rope_theta)
    else:
        writer.add_layer_norm_eps(c.norm_eps)
    if extra:
        extra(writer)
    for name, array in (written_arrays(model) if arrays is None else arrays).items():
        if raw and name in raw:
            data, its_kind = raw[name]
            writer.add_tensor(name, data, raw_dtype=its_kind)
        elif array.ndim == 1 or name.startswith("position_embd") or kind == Kind.F32:
            writer.add_tensor(name, array)
        elif kind == Kind.F16:
            writer.add_tensor(name, array.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def some_ids() -> Tensor:
    return torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_llama_tied", "tiny_gpt2"])
@pytest.mark.parametrize("kind", TOLERANCE, ids=lambda kind: kind.name)
def test_every_type_gives_the_model_it_was_made_of(
    fixture: str, kind: Kind, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    original = load_model(str(request.getfixturevalue(fixture)))
    loaded = load_model(str(write(tmp_path / "m.gguf", original, kind)))
    for name in ("family", "n_layer", "n_head", "n_kv_head", "d_model", "d_head", "d_ff", "tied", "vocab_size", "max_positions"):
        assert getattr(loaded.config, name) == getattr(original.config, name), name
    assert loaded.config.norm_eps == pytest.approx(original.config.norm_eps)
    assert loaded.config.raw["eos_token_id"] == 2
    ids = some_ids()
    expected, found = original.forward(ids), loaded.forward(ids)
    assert (found - expected).abs().max() < TOLERANCE[kind]
    # Exactly the rounded weights, each in its place: quantise and de-quantise our own tensors for comparison.
    rounded = {}
    for name, tensor in original.weights.items():
        array = tensor.numpy()
        if tensor.dim() > 1 and "wpe" not in name and kind != Kind.F32:
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        rounded[name] = torch.from_numpy(array.copy())
    assert loaded.weights.keys() == rounded.keys()
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in rounded.items())


@torch.no_grad()
def test_the_tolerances_would_notice_a_wrong_permutation(tiny_llama: Path, tmp_path: Path) -> None:
    original = load_model(str(tiny_llama))
    arrays = written_arrays(original)
    for name, tensor in original.weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            arrays[gguf_name(name)] = tensor.numpy()  # as if the converter had not interleaved
    wrong = load_model(str(write(tmp_path / "wrong.gguf", original, arrays=arrays)))
    assert (wrong.forward(some_ids()) - original.forward(some_ids())).abs().max() > 2 * TOLERANCE[Kind.Q8_0]


# K-quants: bytes of a block, and where its fp16 scales lie (random bytes there would make infinities).
K_QUANTS = {
    Kind.Q2_K: (84, (80, 82)), Kind.Q3_K: (110, (108,)), Kind.Q4_K: (144, (0, 2)), Kind.Q5_K: (176, (0, 2)),
    Kind.Q6_K: (210, (208,)),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_k_quants_equal_gguf_dequantize(kind: Kind, tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "vocab_size": 32, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    model = random_model(config)
    size, scales = K_QUANTS[kind]
    assert gguf.GGML_QUANT_SIZES[kind] == (256, size)
    rng = np.random.default_rng(3)
    raw = {}
    for name, array in written_arrays(model).items():
        if array.ndim == 2:
            blocks = rng.integers(0, 256, (array.shape[0], size), dtype=np.uint8)
            for at in scales:
                blocks[:, at : at + 2] = (rng.standard_normal((array.shape[0], 1)) * 0.01).astype(np.float16).view(np.uint8)
            raw[name] = (blocks, kind)
    loaded = load_model(str(write(tmp_path / "k.gguf", model, raw=raw)))
    for name, tensor in loaded.weights.items():
        if tensor.dim() == 2:
            expected = gguf.dequantize(raw[gguf_name(name)][0], kind)
            assert np.isfinite(expected).all() and expected.std() > 0
            ours = tensor.numpy()
            if "q_proj" in name or "k_proj" in name:
                ours = interleaved(ours, 4 if "q_proj" in name else 2)
            assert np.array_equal(ours, expected), name


def test_a_stored_type_that_gguf_cannot_dequantise(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama))
    array = written_arrays(model)["blk.0.attn_v.weight"]
    raw = {"blk.0.attn_v.weight": (np.zeros((array.shape[0], gguf.GGML_QUANT_SIZES[Kind.Q8_1][1]), np.uint8), Kind.Q8_1)}
    with pytest.raises(UserError, match=r"attn_v\.weight is stored as Q8_1"):
        load_model(str(write(tmp_path / "m.gguf", model, raw=raw)))


@pytest.mark.parametrize("order", list(gguf.GGUFEndian))
def test_the_faster_reader_reads_what_the_package_reads(order: gguf.GGUFEndian, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=order)
    words = ["", "a", "Ġpun", "猫", "x" * 999] + [f"word {i}" for i in range(300)]
    writer.add_token_list(words)
    writer.add_token_types(list(range(len(words))))
    writer.add_rope_freq_base(10_000.5)
    writer.add_string("note", "pün")
    writer.add_bool("yes", True)
    writer.add_tensor("token_embd.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = gguf_reader(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    assert ours.fields.keys() == theirs.fields.keys()
    contents = {name: field.contents() for name, field in ours.fields.items()}
    assert contents == {name: field.contents() for name, field in theirs.fields.items()}
    assert contents["tokenizer.ggml.tokens"] == words
    part = "tokenizer.ggml.tokens"
    assert type(ours.fields[part].parts[-1]) is np.ndarray and isinstance(theirs.fields[part].parts[-1], np.memmap)
    assert contents["tokenizer.ggml.token_type"] == list(range(len(words)))
    assert ours.tensors[0].data.dtype == theirs.tensors[0].data.dtype
    assert np.array_equal(ours.tensors[0].data, theirs.tensors[0].data)


def refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        read_gguf(path)


def test_damaged_files(tiny_llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", load_model(str(tiny_llama)))
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:size])
        refused(path, "not a readable GGUF file")
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    refused(path, "not a readable GGUF file")


def test_unknown_architecture(tiny_llama: Path, tmp_path: Path) -> None:
    refused(
        write(tmp_path / "m.gguf", load_model(str(tiny_llama)), architecture="mamba"), r"'mamba' is not supported \(llama, gpt2\)"
    )


def test_rotary_scaling(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama))
    scaled = write(tmp_path / "a.gguf", model, extra=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR))
    refused(scaled, "rotary scaling")
    none = write(tmp_path / "b.gguf", model, extra=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE))
    assert read_gguf(none)[0].n_layer == 4
    factors = {**written_arrays(model), "rope_freqs.weight": np.ones(4, np.float32)}
    refused(write(tmp_path / "c.gguf", model, arrays=factors), "rotary scaling")


@pytest.mark.parametrize("missing", ["blk.2.attn_k.weight", "output_norm.weight"])
def test_missing_tensor(missing: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama))
    arrays = {name: array for name, array in written_arrays(model).items() if name != missing}
    refused(write(tmp_path / "m.gguf", model, arrays=arrays), "is missing")


def test_missing_embedding(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama))
    arrays = {name: array for name, array in written_arrays(model).items() if name != "token_embd.weight"}
    refused(write(tmp_path / "m.gguf", model, arrays=arrays), "token_embd|missing")


def test_missing_metadata(tiny_llama: Path, tmp_path: Path) -> None:
    """A file with tensors but without the figures that describe them."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, array in written_arrays(load_model(str(tiny_llama))).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "m.gguf", "m.gguf")


def test_wrong_shape_and_unknown_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama))
    arrays = written_arrays(model)
    narrow = {**arrays, "blk.1.ffn_up.weight": arrays["blk.1.ffn_up.weight"][:32]}
    refused(write(tmp_path / "a.gguf", model, arrays=narrow), r"up_proj\.weight is \(32, 32\), expected \(64, 32\)")
    experts = {**arrays, "blk.1.ffn_gate_inp.weight": arrays["blk.1.ffn_up.weight"]}
    refused(write(tmp_path / "b.gguf", model, arrays=experts), "unknown tensors")


def test_wrong_shape_of_a_rotary_matrix(tiny_llama: Path, tmp_path: Path) -> None:
    """q and k rows are re-ordered before the shapes are checked; rows that do not divide must still be an error for people."""
    model = load_model(str(tiny_llama))
    arrays = written_arrays(model)
    narrow = {**arrays, "blk.1.attn_q.weight": np.ascontiguousarray(arrays["blk.1.attn_q.weight"][:30])}
    refused(write(tmp_path / "m.gguf", model, arrays=narrow), r"q_proj\.weight is \(30, 32\)|attn_q")
