"""What a run starts from: device and types, the base with its tokenizer, fresh roles, tokenised rows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import torch

from punster.config import RewardConfig, SftConfig, TrainConfig
from punster.config.shared import DEFAULT_MODEL
from punster.errors import UserError, speaker
from punster.model import kernels
from punster.model.load import identity, load_model
from punster.model.lora import Adapter
from punster.model.product import multiplies_bf16, type_of_products
from punster.model.role import Role
from punster.model.saved import load_role
from punster.model.tokenizer import Tokenizer
from punster.model.transformer import Decoder
from punster.train.checkpoint import checkpoint_of
from punster.train.optim import seeded

_BASES: dict[tuple[str, torch.dtype, str], Decoder] = {}


def pick_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device must be auto, cpu, cuda or mps, got {name!r}")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA device; use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here; use --device cpu")
    return name


def fast_bf16(device: str) -> bool:
    """Whether bf16 weights are the faster ones: on GPUs from Ampere on, on CPUs with AVX512_BF16 or AMX, or where the C kernels run."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "mps":
        return False
    return multiplies_bf16() or kernels.compiled() is not None


def pick_dtype(name: str, device: str) -> torch.dtype:
    """Type of the frozen weights; auto is bf16 where it is fast, else fp32."""
    if name not in ("auto", "fp32", "bf16"):
        raise UserError(f"--dtype must be auto, fp32 or bf16, got {name!r}")
    if name == "auto":
        return torch.bfloat16 if fast_bf16(device) else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


def shared_base(model: str, config: Any) -> Decoder:
    """One base in memory for all roles and stages of a process, on the device and of the type that are configured."""
    device = pick_device(config.device)
    key = (identity(model), pick_dtype(config.dtype, device), device)
    if key not in _BASES:
        _BASES.clear()
        _BASES[key] = load_model(model, *key[1:])
    return _BASES[key]


def open_role(path: str, config: Any, tokenizer: Tokenizer | None = None) -> tuple[Role, Tokenizer]:
    """The trained role of a run, on the shared base, with this verb's device and type."""
    place = checkpoint_of(path)
    base = shared_base(json.loads((place / "role.json").read_text())["model"], config)
    return load_role(place, base=base, tokenizer=tokenizer)


def open_base(config: TrainConfig) -> tuple[Decoder, Tokenizer]:
    base = shared_base(config.model, config)
    return base, Tokenizer.load(config.model, config.prompt_format).check_fits(base)


def layer_count(value: float, layers: int) -> int:
    """A number of layers, or a share of them below 1 (at least one layer)."""
    return max(1, round(value * layers)) if 0 < value < 1 else int(value)


def top_layers(config: TrainConfig, model: Decoder, last: int = 0) -> range:
    """The layers that are adapted: the top k of those below the read-out, or all.

    auto is a third of the model for SFT (docs/LOG.md) and a fifth for what is trained on top of it, which halves the time of a
    pass; benchmarks/topk.py compares depths in equal wall time.
    """
    layers = model.config.n_layer
    last = last or layers
    if last > layers:
        raise UserError(f"--depth {last}: the model has {layers} layers")
    if config.top_layers == "all":
        return range(last)
    share = 1 / 3 if isinstance(config, SftConfig) else 1 / 5
    count = max(1, round(layers * share)) if config.top_layers == "auto" else layer_count(float(config.top_layers), layers)
    if count > last:
        raise UserError(f"--top-layers {count}: only {last} layers run before the read-out")
    return range(last - count, last)


def extend(role: Role, config: TrainConfig, name: str, depth: int = 0) -> Role:
    """Stack something trainable on a role: a fresh adapter (everything below it frozen), or the layers' own weights."""
    layers = top_layers(config, role.model, depth)
    name = unused_name(name, role)
    if config.adapter == "none":
        return replace(role, model=role.model.trainable_copy(layers.start, own_products(config)), trained=(), depth=depth)
    adapter = Adapter.create(
        name, role.model.config, rank=config.lora_r, alpha=config.lora_alpha, layers=layers,
        generator=seeded(config.seed, "init"), device=role.model.device,
    ).trainable()  # fmt: skip
    return replace(role, adapters=(*role.adapters, adapter), trained=(name,), depth=depth)


def own_products(config: TrainConfig) -> torch.dtype:
    """In which type weights that are being trained are multiplied: fp32 for policies, whose updates are small beside a bf16 digit."""
    device = pick_device(config.device)
    kind = pick_dtype(config.dtype, device) if isinstance(config, SftConfig | RewardConfig) else torch.float32
    return type_of_products(torch.empty(0, dtype=kind, device=device))


def unused_name(wanted: str, role: Role) -> str:
    """An adapter name that the stack does not have yet: policy, policy2, ..."""
    taken = {adapter.name for adapter in role.adapters}
    return next(name for name in [wanted, *(f"{wanted}{i}" for i in range(2, 1000))] if name not in taken)


def open_policy_role(path: str, config: Any, tokenizer: Tokenizer | None = None) -> tuple[Role, Tokenizer]:
    """A run that writes, or "base", the plain model of the configuration; reward models are refused."""
    if path == "base":
        base, tokenizer = open_base(config)
        return Role(base), tokenizer
    role, tokenizer = open_role(path, config, tokenizer)
    if role.head is not None:
        raise UserError(f"{path} is a reward model: it scores texts and cannot write them; an SFT or policy run is needed here")
    return role, tokenizer


def own_copy(role: Role) -> Role:
    """The same role on base weights of its own, as it is with separate models."""
    old = role.model
    model = Decoder(old.config, {name: tensor.detach().clone() for name, tensor in old.weights.items()}, old.name)
    model.trained_from, model.trunk_of, model.own = old.trained_from, old.trunk_of, old.own
    return replace(role, model=model)


def open_start(path: str, config: TrainConfig) -> tuple[Role, Tokenizer]:
    """What a run continues: it uses that one's base and prompt format; settings that say otherwise are a mistake, not a wish."""
    role, tokenizer = open_policy_role(path, config)
    if config.model != DEFAULT_MODEL and identity(config.model) != identity(role.model.name):
        raise UserError(f"--model {config.model}: {path} was trained on {role.model.name}, and this run continues it")
    if config.prompt_format not in ("auto", tokenizer.prompt_format):
        raise UserError(
            f"--prompt-format {config.prompt_format!r}: {path} was trained with {tokenizer.prompt_format!r}, and this run continues it"
        )
    config.model = role.model.name
    return role, tokenizer


def plain_base(role: Role, config: Any) -> Decoder:
    """The untrained base of a role, whatever was trained on top of it."""
    if role.model.trained_from is None:
        return role.model
    if role.model.trunk_of is not None:
        return role.model.trunk_of
    return shared_base(role.model.name, config)


def open_reward_model(path: str, config: Any, policy: Role, tokenizer: Tokenizer) -> Role:
    """A reward-model run that fits a policy: same base, same prompt format."""
    place = checkpoint_of(path)
    model, own = open_role(str(place), config, tokenizer)
    if model.head is None:
        raise UserError(f"{path}: this run is not a reward model")
    if not json.loads((place / "role.json").read_text()).get("normalised", True):
        speaker(config.quiet)(f"note: {place}: not normalised, as only a reward run's last checkpoint is; its scale differs")
    if identity(model.model.name) != identity(policy.model.name) or own.prompt_format != tokenizer.prompt_format:
        raise UserError(
            f"{path}: trained on another base or prompt format than the policy ({model.model.name}, {policy.model.name})"
        )
    return model
