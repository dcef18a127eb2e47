"""Roles on disk: role.json, adapters in PEFT's format, heads and trained weights as safetensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from punster.errors import UserError
from punster.model.heads import ScalarHead
from punster.model.load import identity, load_model, read_json
from punster.model.lora import Adapter
from punster.model.role import Role
from punster.model.tokenizer import Tokenizer
from punster.model.transformer import Decoder

FORMAT = 1


def save_role(folder: Path, role: Role, tokenizer: Tokenizer, extra: dict[str, Any] | None = None) -> None:
    """Write a role so that it can be loaded beside other roles on the same base."""
    config = role.model.config
    base = None if role.model.trained_from == 0 else role.model.trunk_of or role.model
    for adapter in role.adapters:
        adapter.save(folder / "adapters" / adapter.name, role.model.name, config)
    if role.head is not None:
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in role.head.named_parameters()}
        save_file(head, folder / "head.safetensors")
    if role.model.trained_from is not None:
        own = {n: role.model.weights[n].detach().cpu().contiguous() for n in sorted(role.model.own)}
        save_file(own, folder / "base.safetensors")
    described = {
        "format": FORMAT, "model": role.model.name, "base_sha256": None if base is None else base.fingerprint(),
        "base_sha256_bf16": None if base is None or base.dtype != torch.float32 else base.fingerprint(torch.bfloat16),
        "dtype": str(role.model.dtype).removeprefix("torch."), "prompt_format": tokenizer.prompt_format,
        "adapters": [adapter.name for adapter in role.adapters], "has_head": role.head is not None, "depth": role.depth,
        "pooling": role.pooling, "normalisation": list(role.normalisation), "trained_from": role.model.trained_from,
        "members": 1 + len(role.others), "combine": role.combine, "caution": role.caution, **(extra or {}),
    }  # fmt: skip
    for number, other in enumerate(role.others, 2):
        (folder / f"member-{number}").mkdir()
        save_role(folder / f"member-{number}", other, tokenizer)
    (folder / "role.json").write_text(json.dumps(described, indent=2) + "\n")


def load_role(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, base: Decoder | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[Role, Tokenizer]:  # fmt: skip
    """Read a role; with `base` (and `tokenizer`) given and fitting, they are shared instead of loaded again."""
    described = read_json(folder / "role.json")
    if described.get("format") != FORMAT:
        raise UserError(
            f"{folder}: written by another version of punster (format {described.get('format')}, this one reads {FORMAT})"
        )
    plain = base
    if plain is None or identity(plain.name) != identity(described["model"]):
        plain = load_model(described["model"], dtype, device)
    model = plain
    types = (described["dtype"], str(model.dtype).removeprefix("torch."))
    wanted = described["base_sha256"] if types[0] == types[1] else None
    cast: torch.dtype | None = None
    if types == ("bfloat16", "float32"):  # the same weights if they are the same once they are rounded
        wanted, cast = described["base_sha256"], torch.bfloat16
    elif types == ("float32", "bfloat16"):
        wanted = described.get("base_sha256_bf16")
    if wanted and wanted != model.fingerprint(cast):
        raise UserError(f"{folder}: was trained on other base weights than {described['model']} has now (their SHA-256 differs)")
    if tokenizer is None or tokenizer.prompt_format != described["prompt_format"] or model is not base:
        tokenizer = Tokenizer.load(described["model"], described["prompt_format"]).check_fits(model)
    if described["trained_from"] is not None:
        trained = load_file(folder / "base.safetensors")
        own = Decoder(model.config, {**model.weights, **{k: t.to(model.device) for k, t in trained.items()}}, model.name)
        own.trained_from = described["trained_from"]
        own.own = frozenset(trained)
        own.trunk_of = model if own.trained_from > 0 else None
        model = own
    if outside := [name for name in described["adapters"] if Path(name).name != name]:
        raise UserError(f"{folder}: {outside[0]!r} is not the name of an adapter")
    adapters = tuple(Adapter.load(folder / "adapters" / name, name, model.config, model.device) for name in described["adapters"])
    head = None
    if described["has_head"]:
        stored = load_file(folder / "head.safetensors")
        if described.get("also") or "head.hidden" in stored or described["pooling"] not in ("last", "mean"):
            raise UserError(
                f"{folder}: a head with a hidden layer or several depths, which this version no longer reads; train it again"
            )
        head = ScalarHead(**{name.removeprefix("head."): tensor.clone().to(model.device) for name, tensor in stored.items()})
    gain, offset = described["normalisation"]
    role = Role(model, adapters, head, described["depth"], described["pooling"], (gain, offset))
    if (count := described.get("members", 1)) > 1:
        options: dict[str, Any] = {"device": device, "dtype": dtype, "base": plain, "tokenizer": tokenizer}
        others = tuple(load_role(folder / f"member-{number}", **options)[0] for number in range(2, count + 1))
        role = replace(role, others=others, combine=described["combine"], caution=described["caution"])
    return role, tokenizer
