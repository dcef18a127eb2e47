"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) as objects of their own, beside a frozen base.

y = W x + (alpha / r) B A x with A (r, in) kaiming-uniform, B (out, r) zero. Several adapters stack by adding their
products. They are fp32, saved and loaded in PEFT's format, and never merged into the base: export and scoring
merge into a copy of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from punster.errors import UserError

if TYPE_CHECKING:
    from punster.model.architecture import ModelConfig


@dataclass
class Adapter:
    """One named set of low-rank updates: site (module path) -> A and B."""

    name: str
    rank: int
    alpha: float
    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    first_layer: int = 0
    _hash: tuple[tuple[tuple[int, int], ...], str] = field(default=((), ""), repr=False, compare=False)

    def fingerprint(self) -> str:
        """SHA-256 over scale, names and values; computed again whenever a tensor was written to or replaced."""
        versions = tuple((tensor.data_ptr(), tensor._version) for tensor in self.parameters())
        if versions != self._hash[0]:
            digest = hashlib.sha256(f"{self.scale}".encode())
            for name, tensor in self.named_parameters():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            self._hash = versions, digest.hexdigest()
        return self._hash[1]

    @classmethod
    def create(
        cls, name: str, config: ModelConfig, *, rank: int, alpha: float, layers: range,
        generator: torch.Generator, device: torch.device | str = "cpu",
    ) -> Adapter:  # fmt: skip
        """A fresh adapter on every linear layer of the given blocks; it changes nothing until trained (B = 0)."""
        adapter = cls(name, rank, alpha, first_layer=layers.start)
        for layer in layers:
            for site, (out, into) in config.sites(layer).items():
                bound = 1 / math.sqrt(into)  # kaiming_uniform with a = sqrt(5)
                adapter.a[site] = ((torch.rand(rank, into, generator=generator) * 2 - 1) * bound).to(device)
                adapter.b[site] = torch.zeros(out, rank, device=device)
        return adapter

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def parameters(self) -> Iterator[Tensor]:
        return (tensor for _, tensor in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for site in self.a:
            yield f"{site}.lora_A", self.a[site]
            yield f"{site}.lora_B", self.b[site]

    def trainable(self) -> Adapter:
        for tensor in self.parameters():
            tensor.requires_grad_()
        return self

    def copy(self, name: str) -> Adapter:
        return Adapter(
            name, self.rank, self.alpha, {s: t.detach().clone() for s, t in self.a.items()},
            {s: t.detach().clone() for s, t in self.b.items()}, self.first_layer,
        )  # fmt: skip

    def save(self, folder: Path, base: str, config: ModelConfig) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        gpt2 = config.family == "gpt2"
        layers = sorted({int(part) for site in self.a for part in site.split(".") if part.isdigit()})
        modules = sorted({".".join(site.split(".")[-2:]) if gpt2 else site.split(".")[-1] for site in self.a})
        described: dict[str, Any] = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": self.rank,
            "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": gpt2,
            "target_modules": modules, "layers_to_transform": layers, "layers_pattern": "h" if gpt2 else "layers",
            "inference_mode": True, "modules_to_save": None, "init_lora_weights": True,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n")
        tensors = {}
        for site in self.a:
            tensors[f"base_model.model.{site}.lora_A.weight"] = self.a[site].detach().cpu().contiguous()
            tensors[f"base_model.model.{site}.lora_B.weight"] = self.b[site].detach().cpu().contiguous()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path, name: str, config: ModelConfig, device: torch.device | str = "cpu") -> Adapter:
        """Read a PEFT folder; an adapter of another base is refused by site and shape."""
        try:
            described = json.loads((folder / "adapter_config.json").read_text())
            tensors = load_file(folder / "adapter_model.safetensors")
            plain = described.get("peft_type") == "LORA" and not described.get("use_dora")
        except Exception as error:
            raise UserError(f"{folder}: not a readable PEFT adapter ({str(error) or type(error).__name__})") from None
        if not plain or described.get("alpha_pattern") or described.get("rank_pattern"):
            raise UserError(f"{folder}: only plain LoRA adapters of one rank and alpha can be loaded")
        rank, alpha = described.get("r"), described.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise UserError(
                f"{folder}: adapter_config.json has r {rank!r} and lora_alpha {alpha!r}; a rank of at least 1 and a number are needed"
            )
        adapter = cls(name, rank, alpha * (math.sqrt(rank) if described.get("use_rslora") else 1.0))
        known = {site: shape for layer in range(config.n_layer) for site, shape in config.sites(layer).items()}
        for key, tensor in tensors.items():
            site, _, kind = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            if site not in known or kind not in ("lora_A", "lora_B"):
                raise UserError(f"{folder}: {key} does not belong to this base model")
            out, into = known[site]
            expected = (adapter.rank, into) if kind == "lora_A" else (out, adapter.rank)
            if tuple(tensor.shape) != expected:
                raise UserError(f"{folder}: {key} is {tuple(tensor.shape)}, this base model needs {expected}")
            (adapter.a if kind == "lora_A" else adapter.b)[site] = tensor.float().to(device)
        if set(adapter.a) != set(adapter.b):
            raise UserError(f"{folder}: A and B matrices do not pair up")
        layers = [int(part) for site in adapter.a for part in site.split(".") if part.isdigit()]
        adapter.first_layer = min(layers, default=config.n_layer)
        return adapter


def join(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter equal to the sum of several: ranks concatenated, scales absorbed into B (so alpha = r).

    Sites that only some adapters have are filled with zeros, so that one rank fits all (as PEFT wants it).
    """
    rank = sum(adapter.rank for adapter in adapters)
    joined = Adapter("joined", rank, float(rank), first_layer=min(adapter.first_layer for adapter in adapters))
    for site in dict.fromkeys(site for adapter in adapters for site in adapter.a):
        like = next(adapter for adapter in adapters if site in adapter.a)
        into, out = like.a[site].shape[1], like.b[site].shape[0]
        a = [ad.a[site] if site in ad.a else like.a[site].new_zeros(ad.rank, into) for ad in adapters]
        b = [ad.b[site] * ad.scale if site in ad.b else like.b[site].new_zeros(out, ad.rank) for ad in adapters]
        joined.a[site], joined.b[site] = torch.cat(a).detach(), torch.cat(b, 1).detach()
    return joined


def low_rank(x: Tensor, site: str, adapters: Sequence[Adapter]) -> Tensor | None:
    """Sum over the adapters that have this site of scale * B A x, as one pair of products; None if none has it."""
    present = [adapter for adapter in adapters if site in adapter.a]
    if not present:
        return None
    if len(present) == 1:
        adapter = present[0]
        return F.linear(F.linear(x, adapter.a[site]), adapter.b[site] * adapter.scale)
    a = torch.cat([adapter.a[site] for adapter in present])
    b = torch.cat([adapter.b[site] * adapter.scale for adapter in present], 1)
    return F.linear(F.linear(x, a), b)


def merged_weights(weights: dict[str, Tensor], adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """fp32 copies of the weights with the adapters added."""
    merged = {key: tensor.detach().float().cpu().clone() for key, tensor in weights.items()}
    for adapter in adapters:
        for site in adapter.a:
            merged[f"{site}.weight"] += (adapter.b[site] @ adapter.a[site]).detach().cpu() * adapter.scale
    return merged
