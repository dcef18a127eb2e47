"""Export: a merged Hugging Face folder, in fp32, or a PEFT adapter."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from punster.errors import UserError
from punster.model.load import BUILT_IN, transposed
from punster.model.lora import join, merged_weights
from punster.model.role import Role
from punster.model.tokenizer import Tokenizer


def export(role: Role, tokenizer: Tokenizer, format: str, out: Path) -> Path:
    """Write `role` to a new folder, or into an empty one. hf: AutoModelForCausalLM or, with a head, AutoModelForSequenceClassification. peft: adapter."""
    if format not in ("hf", "peft"):
        raise UserError(f"--format {format}: hf or peft")
    out = out.resolve()  # "." has no name
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder")
    there = out.is_dir()  # it may be a mount, or where a shell stands: its files come into it
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out if there else out.parent) as private:
        temporary = Path(private) / "part"  # a folder like any other: the one around it is for its owner's eyes only
        temporary.mkdir()
        if format == "hf":
            _export_hf(role, tokenizer, temporary)
        else:
            _export_peft(role, temporary)
        hf = tokenizer.for_transformers()
        if role.head is not None:  # what is read is the last token that is no pad: EOS, so the pad must be another special token
            pad = distinct_pad(tokenizer)
            hf.pad_token = hf.convert_ids_to_tokens(pad) if pad in hf.all_special_ids else None
        hf.save_pretrained(temporary)
        if there:
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):  # by which it is a model, last
                path.rename(out / path.name)
        else:
            temporary.rename(out)
    return out


def _export_hf(role: Role, tokenizer: Tokenizer, folder: Path) -> None:
    model = role.model
    weights = merged_weights(model.weights, role.adapters)
    config: dict[str, Any] = {**model.config.raw, "tie_word_embeddings": model.config.tied, "dtype": "float32"}
    config.pop("torch_dtype", None)  # the older name of dtype
    layers = "n_layer" if model.config.family == "gpt2" else "num_hidden_layers"
    prefix = "GPT2" if model.config.family == "gpt2" else "Llama"
    if role.head is None:
        config["architectures"] = [f"{prefix}LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"]
    else:
        if role.others:
            raise UserError(
                "an ensemble has no counterpart in transformers; train a single reward model (--members 1) for export"
            )
        if role.pooling != "last":
            raise UserError(
                "a head that averages over the response has no counterpart in transformers; train with --pooling last"
            )
        config |= {"architectures": [f"{prefix}ForSequenceClassification"], "num_labels": 1, "id2label": {"0": "LABEL_0"}}
        config[layers] = role.last_layer
        weights = {
            k: t for k, t in weights.items() if model.layer_of(k) < role.last_layer or model.layer_of(k) == model.config.n_layer
        }
        weights.pop("lm_head.weight", None)
        gain, offset = role.normalisation
        weights["score.weight"] = role.head.weight.detach().cpu()[None] * gain
        # transformers' score head has no bias: the constant is recorded, and does not change any comparison.
        config["punster_score_bias"] = float(role.head.bias) * gain + offset
    pad = distinct_pad(tokenizer)
    if role.head is None and pad not in tokenizer.hf.all_special_ids:  # generated rows are filled with it, and shown
        pad = tokenizer.eos_id
    config["pad_token_id"] = pad
    config["eos_token_id"] = tokenizer.eos_id
    save_file(transposed(weights, model.config.family), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": tokenizer.eos_id, "pad_token_id": pad, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _export_peft(role: Role, folder: Path) -> None:
    if role.head is not None or not role.adapters or role.model.trained_from is not None:
        raise UserError("--format peft needs a policy trained with --adapter lora; use --format hf for this run")
    known = BUILT_IN.get(role.model.name)
    base = known.origin if known else role.model.name
    join(role.adapters).save(folder, base, role.model.config)
    if known:
        note = f"Trained on {known.name}, a 4-bit copy of {known.origin}: on the full model the logits differ slightly.\n"
        (folder / "README.md").write_text(note)


def distinct_pad(tokenizer: Tokenizer) -> int:
    """A pad id that is not EOS, so that readers that look for the last token that is not a pad find EOS."""
    for candidate in (tokenizer.hf.pad_token_id, tokenizer.hf.unk_token_id, 0):
        if candidate is not None and candidate != tokenizer.eos_id:
            return int(candidate)
    return 1
