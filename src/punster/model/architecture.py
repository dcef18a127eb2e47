"""What a model is beside its weights: sizes, family and options, read from a Hugging Face config and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from punster.errors import UserError

# What transformers calls the activations, and which of ours each is.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """What the weights cannot say for themselves."""

    family: str  # "gpt2" or "llama"
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    d_model: int
    d_head: int
    d_ff: int
    max_positions: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tied: bool = True
    activation: str = "silu"  # "silu", "gelu_new" (tanh) or "gelu" (erf)
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # the config.json it came from

    @classmethod
    def from_hf(cls, raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face config.json; raises UserError for architectures this decoder does not implement."""
        try:
            config = cls._from_hf(raw)
        except KeyError as missing:
            raise UserError(f"{where} lacks the field {missing}") from None
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise UserError(f"{where}: a setting of the model makes no sense ({error})") from None
        for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "d_model", "d_head", "d_ff", "max_positions"):
            if type(value := getattr(config, name)) is not int or value < 1:
                raise UserError(f"{where}: {name} is {value!r}; it must be a whole number above 0")
        for name in ("norm_eps", "rope_theta"):
            if type(value := getattr(config, name)) not in (int, float) or not 0 < value < math.inf:
                raise UserError(f"{where}: {name} is {value!r}; it must be a number above 0")
        uneven = config.d_head % 2 if config.family == "llama" else config.d_model % config.n_head
        if config.n_head % config.n_kv_head or uneven:
            raise UserError(
                f"{where}: {config.n_head} heads of {config.d_head} on {config.n_kv_head} of keys and values do not fit together"
            )
        if not isinstance(config.tied, bool) or not isinstance(config.activation, str):
            raise UserError(
                f"{where}: tied embeddings are {config.tied!r}, the activation is {config.activation!r}; true or false and a name are needed"
            )
        if config.activation not in ACTIVATIONS:
            raise UserError(f"{where}: activation {config.activation!r} is not implemented ({', '.join(ACTIVATIONS)})")
        return replace(config, activation=ACTIVATIONS[config.activation])

    @classmethod
    def _from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        kind = raw.get("model_type")
        if kind == "gpt2":
            width = raw["n_embd"]
            if raw.get("scale_attn_by_inverse_layer_idx") or not raw.get("scale_attn_weights", True):
                raise UserError("this GPT-2 scales attention in a way punster does not implement")
            return cls(
                family="gpt2", vocab_size=raw["vocab_size"], n_layer=raw["n_layer"], n_head=raw["n_head"],
                n_kv_head=raw["n_head"], d_model=width, d_head=width // raw["n_head"],
                d_ff=raw.get("n_inner") or 4 * width, max_positions=raw.get("n_positions", 1024),
                norm_eps=raw.get("layer_norm_epsilon", 1e-5), tied=raw.get("tie_word_embeddings", True),
                activation=raw.get("activation_function", "gelu_new"), raw=raw,
            )  # fmt: skip
        if kind == "llama":
            rope = {**(raw.get("rope_parameters") or {}), **(raw.get("rope_scaling") or {})}
            scaling = rope.get("rope_type", rope.get("type", "default"))
            if scaling not in ("default", None):
                raise UserError(f"rotary scaling {scaling!r} is not implemented (only the default)")
            heads = raw["num_attention_heads"]
            return cls(
                family="llama", vocab_size=raw["vocab_size"], n_layer=raw["num_hidden_layers"], n_head=heads,
                n_kv_head=raw.get("num_key_value_heads") or heads, d_model=raw["hidden_size"],
                d_head=raw.get("head_dim") or raw["hidden_size"] // heads, d_ff=raw["intermediate_size"],
                max_positions=raw.get("max_position_embeddings", 2048), norm_eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=rope.get("rope_theta") or raw.get("rope_theta", 10_000.0),
                tied=raw.get("tie_word_embeddings", False), activation=raw.get("hidden_act", "silu"), raw=raw,
            )  # fmt: skip
        raise UserError(f"model_type {kind!r} is not supported: punster runs the gpt2 and llama families")

    @property
    def steps(self) -> dict[str, dict[str, tuple[int, int]]]:
        """The linear layers of a block by what they do, with (out, in) features; those of one step read the same input."""
        d, ff = self.d_model, self.d_ff
        if self.family == "gpt2":
            return {
                "attend": {"attn.c_attn": (3 * d, d)}, "out": {"attn.c_proj": (d, d)},
                "up": {"mlp.c_fc": (ff, d)}, "down": {"mlp.c_proj": (d, ff)},
            }  # fmt: skip
        q, kv = self.n_head * self.d_head, self.n_kv_head * self.d_head
        return {
            "attend": {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)},
            "out": {"self_attn.o_proj": (d, q)}, "up": {"mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d)},
            "down": {"mlp.down_proj": (d, ff)},
        }  # fmt: skip

    def sites(self, layer: int) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: Hugging Face module path -> (out, in) features."""
        prefix = self.block_prefix(layer)
        return {prefix + name: shape for step in self.steps.values() for name, shape in step.items()}

    @property
    def norm_sites(self) -> tuple[str, str]:
        """The norms before attention and before the feed-forward part."""
        return ("ln_1", "ln_2") if self.family == "gpt2" else ("input_layernorm", "post_attention_layernorm")

    def block_prefix(self, layer: int) -> str:
        return f"transformer.h.{layer}." if self.family == "gpt2" else f"model.layers.{layer}."
