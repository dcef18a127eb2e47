"""What a run starts from: device and types, the base with its tokenizer, fresh roles, tokenised rows."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from punster.config import DpoConfig, PolicyConfig, RewardConfig, SftConfig, TrainConfig
from punster.config.shared import DEFAULT_MODEL
from punster.data import corpus
from punster.data.batch import Example
from punster.data.files import not_written, read_rows
from punster.data.mix import is_mixture, mixture
from punster.data.prompts import prompted
from punster.data.schema import Row, check_row, texts_of
from punster.errors import UserError
from punster.model import kernels
from punster.model.load import load_model
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
    key = (model, pick_dtype(config.dtype, device), device)
    if key not in _BASES:
        _BASES.clear()
        _BASES[key] = load_model(*key)
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
    if config.model not in (DEFAULT_MODEL, role.model.name):
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
    if model.model.name != policy.model.name or own.prompt_format != tokenizer.prompt_format:
        raise UserError(
            f"{path}: trained on another base or prompt format than the policy ({model.model.name}, {policy.model.name})"
        )
    return model


# ---- rows ---------------------------------------------------------------------------------------------------------
def kind_of_rows(config: TrainConfig) -> str:
    """The schema of what a verb learns from: "sft", "preference", "unpaired" (KTO), "judged", or "prompt" alone."""
    if isinstance(config, RewardConfig):
        return "judged"
    if isinstance(config, PolicyConfig) or (isinstance(config, DpoConfig) and config.makes_pairs):
        return "prompt"
    if isinstance(config, DpoConfig):
        return "unpaired" if config.loss_type == "kto" else "preference"
    return "sft"


def embedded_rows(kind: str, split: str = "train") -> list[Row]:
    """What "embedded" stands for (but for reward models, which have --negatives to train on)."""
    if kind == "sft":
        return corpus.sft_rows(split)
    if kind == "prompt":
        return [{"prompt": prompt} for prompt in corpus.prompts(split)]
    return corpus.unpaired(corpus.pairs(split)) if kind == "unpaired" else corpus.pairs(split)


def load_rows(
    sources: Sequence[str] | Sequence[Row],
    kind: str,
    embedded: Any,
    columns: Sequence[str] = (),
    quiet: bool = False,
    training: bool = True,
) -> list[Row]:
    """Rows of files, mixtures and the embedded corpus (`embedded` makes those), in the order given.

    quiet: without what mixtures tell of themselves, and folders of what is left out. training: of a folder as `located_rows` has it.
    """
    rows: list[Row] = []
    schema = "written" if kind == "sft" else kind
    for source in sources:
        if isinstance(source, dict):
            rows.append(check_row(source, schema, f"row {len(rows) + 1}"))
        elif source == "embedded":
            rows += embedded()
        elif not is_mixture(source):
            rows += read_rows(source, schema, columns, training, speaker(quiet))
        else:
            found = mixture(source, "preference" if kind == "judged" else kind, say=speaker(quiet))
            if kind == "preference" and not all("chosen" in row for row in found):
                raise UserError(
                    f"{source}: some of its rows are no pairs (ranked groups, labels), from which only reward models learn"
                )
            rows += found
    if not rows:
        raise UserError("no rows of data were given")
    return asked(rows, quiet) if kind == "sft" else rows


def asked(rows: Sequence[Row], quiet: bool) -> list[Row]:
    """Texts as completions, as in a mixture: with a prompt, on no topic of the embedded held-out part, and without what is no pun."""
    why = list(map(not_written, rows))
    reasons = Counter(filter(None, why))
    for reason, count in reasons.items():
        speaker(quiet)(f"  {count} of {len(rows)} rows left out: their text is {reason}")
    kept = [row for row, reason in zip(rows, why, strict=True) if reason is None]
    if not kept:
        raise UserError(f"no row is left: their text is {' or '.join(reasons)}")
    if all(row.get("completion") is not None for row in kept):
        return kept
    found, bare = prompted(kept, corpus.held_out_topics())
    if bare:
        speaker(quiet)(f"  {len(bare)} of {len(rows)} rows have no prompt and get one (the first: {bare[0]['prompt']!r})")
    return found


def speaker(quiet: bool) -> Callable[[str], None]:
    """For notes to the user: none under --quiet."""
    if quiet:
        return lambda line: None
    return partial(print, file=sys.stderr)


def load_prompts(source: str | Sequence[Any], split: str = "train", quiet: bool = False) -> list[Any]:
    if not isinstance(source, str):
        if not source:
            raise UserError("no prompts were given")
        rows = [prompt if isinstance(prompt, dict) else {"prompt": prompt} for prompt in source]
        return [check_row(row, "prompt", f"prompt {number}")["prompt"] for number, row in enumerate(rows, 1)]
    if source == "embedded":
        return corpus.prompts(split)
    if is_mixture(source):
        name = "eval-prompts" if source == "puns" and split != "train" else source
        return [row["prompt"] for row in mixture(name, "prompt", say=speaker(quiet))]
    return [row["prompt"] for row in read_rows(source, "prompt", (), split == "train", speaker(quiet))]


def encode(tokenizer: Tokenizer, model: Decoder, prompt: Any, completion: str, where: str = "a row") -> Example:
    """Prompt and completion as ids; UserError if they do not fit into the context."""
    example = Example(tuple(tokenizer.prompt_ids(prompt)), tuple(tokenizer.response_ids(completion)))
    limit = model.config.max_positions
    if example.length > limit:
        raise UserError(f"{where}: {example.length} tokens, but the model's context is {limit}; shorten the prompt or the text")
    if not example.prompt:
        raise UserError(f"{where}: the prompt has no tokens in this prompt format")
    return example


def fits(row: Row, tokenizer: Tokenizer, model: Decoder) -> bool:
    """Whether all texts of a row fit into the context behind its prompt."""
    room = model.config.max_positions - len(tokenizer.prompt_ids(row["prompt"]))
    return all(len(tokenizer.response_ids(text)) <= room for text in texts_of(row))


def without_long_contrasts(rows: Sequence[Row], tokenizer: Tokenizer, model: Decoder, quiet: bool) -> list[Row]:
    """Contrasts that a short context has no room for are left out and counted; any other such row is refused when it is encoded."""
    kept = [row for row in rows if row.get("source") != "contrasts" or fits(row, tokenizer, model)]
    if len(kept) < len(rows):
        speaker(quiet)(f"  {len(rows) - len(kept)} of {len(rows)} rows left out: contrasts longer than the model's context")
    if not kept:
        raise UserError("no row is left: all are longer than the model's context")
    return kept


def encode_rows(
    tokenizer: Tokenizer, model: Decoder, rows: Sequence[Row], quiet: bool, what: str = "row"
) -> tuple[list[Row], list[Example]]:
    """Rows to learn to write, less contrasts that are too long, and their examples; an error names a row by its place as given."""
    places = {id(row): place for place, row in enumerate(rows, 1)}
    kept = without_long_contrasts(rows, tokenizer, model, quiet)
    examples = [
        Example(tuple(tokenizer.prompt_ids(row["prompt"])), tuple(row["_completion_ids"]))  # sampled: never tokenised again
        if "_completion_ids" in row
        else encode(tokenizer, model, row["prompt"], row["completion"], f"{what} {places[id(row)]}")
        for row in kept
    ]
    return kept, examples


def held_out_name(data: Sequence[str]) -> str:
    """Whose held-out prompts show what a model learns from these data: "embedded" for our own puns, "puns", or "" for neither."""
    ours = {"embedded", "own-puns", "demo-puns"}
    return "embedded" if ours & set(data) else "puns" if "puns" in data else ""


def encode_fitting(tokenizer: Tokenizer, model: Decoder, rows: Sequence[Row]) -> list[Example]:
    """Held-out rows of the embedded corpus as examples, without those that a short context has no room for."""
    examples = (Example(tuple(tokenizer.prompt_ids(r["prompt"])), tuple(tokenizer.response_ids(r["completion"]))) for r in rows)
    return [example for example in examples if example.length <= model.config.max_positions]


def check_prompts(tokenizer: Tokenizer, model: Decoder, prompts: Sequence[Any], new_tokens: int) -> list[list[int]]:
    """All prompts as ids; UserError naming the first that leaves no room for new tokens."""
    limit = model.config.max_positions
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        ids = tokenizer.prompt_ids(prompt)
        if not ids:
            raise UserError(f"prompt {number} has no tokens in this prompt format")
        if len(ids) + new_tokens > limit:
            raise UserError(
                f"prompt {number} has {len(ids)} tokens; with {new_tokens} new ones it exceeds the context of {limit} tokens. Shorten it."
            )
        encoded.append(ids)
    return encoded
