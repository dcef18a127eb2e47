"""What all settings share: fields with help texts, ranges, versions, and the settings of every training verb."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from punster.errors import UserError

DEFAULT_MODEL = "smollm2-135m-instruct-q4"  # built in: model/load.py
FROM_PYTHON = "(given from Python)"  # in config.yaml: rows, prompts or a reward that no file has
# Settings that change nothing of what is learned.
WITHOUT_EFFECT = frozenset((
    "resume", "quiet", "dry_run", "save_every", "keep", "keep_best", "eval_every", "eval_data", "out", "max_tokens", "reward_timeout",
))  # fmt: skip
CONFIG_VERSION = 1  # goes up when a setting changes its name or its meaning


def opt(default: Any, help: str = "", short: str | None = None, **limits: float) -> Any:
    """A dataclass field with its help text, its short flag and, for numbers, limits: low, high (included), above, below."""
    metadata = {"help": help, "short": short, **limits}
    if isinstance(default, list | dict):
        return field(default_factory=partial(deepcopy, default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(item: Field[Any]) -> Any:
    return item.default_factory() if callable(item.default_factory) else item.default


def defaults_of(kind: Any) -> dict[str, Any]:
    """All defaults of a dataclass of settings, by name; none of None."""
    return {item.name: default_of(item) for item in fields(kind)} if kind else {}


def require(fine: bool, message: str) -> None:
    if not fine:
        raise UserError(message)


LIMITS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "low": (operator.ge, "at least"), "high": (operator.le, "at most"), "above": (operator.gt, "above"), "below": (operator.lt, "below"),
}  # fmt: skip


def is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a setting's type: what the command line and YAML are checked for by their parser."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(is_of(value, each) for each in inner)
    if origin is list:
        return isinstance(value, list | tuple) and all(is_of(each, inner[0]) for each in value)
    return isinstance(value, origin or (NoneType if hint is None else hint))


def check_types(config: Any) -> None:
    """Refuse values of other types and choices that there are not, which only Python can give; paths become texts."""
    hints = get_type_hints(type(config))
    for item in fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        if isinstance(value, list | tuple):
            value = [str(each) if isinstance(each, PurePath) else each for each in value]
        value = str(value) if isinstance(value, PurePath) else value
        setattr(config, item.name, value)
        if not is_of(value, hint):
            choices = f"one of {', '.join(get_args(hint))}" if get_origin(hint) is Literal else str(hint)
            wanted = choices if get_args(hint) else hint.__name__
            raise UserError(f"--{item.name.replace('_', '-')} must be {wanted}, got {value!r}")


def check_shared(config: Any) -> None:
    """Refuse numbers that are not finite or out of range, and names, devices, types and strategies that are none."""
    check_types(config)
    require(config.dtype in ("auto", "fp32", "bf16"), f"--dtype must be auto, fp32 or bf16, got {config.dtype!r}")
    known = re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config.device)
    require(bool(known), f"--device must be auto, cpu, cuda or mps, got {config.device!r}")
    name, strategy = getattr(config, "name", ""), getattr(config, "strategy", "naive")
    require(not name or bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name)),
            f"run name {name!r}: use letters, digits, '.', '_', '+' and '-' only, at most 100")  # fmt: skip
    require(strategy == "naive", f"-s {strategy}: only the strategy naive (one process) is implemented")
    for item in fields(config):
        value, flag = getattr(config, item.name), f"--{item.name.replace('_', '-')}"
        if isinstance(value, float | int):
            require(math.isfinite(value), f"{flag} must be a finite number, got {value}")
            for kind, (holds, words) in LIMITS.items():
                limit = item.metadata.get(kind, value)
                require(kind not in item.metadata or holds(value, limit), f"{flag} must be {words} {limit:g}, got {value}")


def check_version(found: Any, place: str = "this configuration") -> None:
    """Settings of other versions are refused with the way out."""
    if found != CONFIG_VERSION:
        newer = isinstance(found, int) and found > CONFIG_VERSION
        hint = "update punster" if newer else "compare its keys with `punster VERB --help`, then set config_version"
        raise UserError(f"{place} was written for version {found} of the settings, this punster reads {CONFIG_VERSION}: {hint}")


def as_meant(prompt_format: str) -> str:
    """The format with line ends for the two characters \\n, which a shell's single quotes and help texts leave as they are."""
    return prompt_format.replace("\\n", "\n")


@dataclass
class RunConfig:
    """What every run has, of one verb or of a pipeline."""

    name: str = opt("", "name of the run; its folder is OUT/NAME (punster run: default is the recipe's name)", short="-n")
    out: str = opt("runs", "folder that holds the runs")
    model: str = opt(DEFAULT_MODEL, "base model: built-in name, hub id, folder, or .gguf file")
    prompt_format: str = opt("auto", "auto (chat template, else '{prompt}\\n'), chat, or a text containing {prompt}")
    device: str = opt("auto", "auto, cpu, cuda, mps")
    dtype: str = opt(
        "auto", "type of the frozen weights: auto (bf16 where it is faster: GPUs, C kernels, CPUs with bf16), fp32, bf16"
    )
    seed: int = opt(1, "seed of all named generators (data, sampling, init), of all stages in a pipeline")
    resume: bool = opt(False, "go on with the run of this name: from its newest checkpoint, or with its first unfinished stage")
    dry_run: bool = opt(False, "print the plan with time and memory estimates, and stop")
    quiet: bool = opt(False, "print the folder of the run alone")
    config_version: int = opt(CONFIG_VERSION, "version of these settings, for files of other versions of punster")

    def __post_init__(self) -> None:
        check_version(self.config_version)
        check_shared(self)
        self.prompt_format = as_meant(self.prompt_format)


@dataclass
class TrainConfig(RunConfig):
    """What every training verb shares."""

    batch_size: int = opt(16, "rows (prompts for ppo and grpo: responses) in one optimizer step or rollout", short="-b", low=1)
    steps: int | None = opt(None, "optimizer steps, or rollouts for ppo and grpo (default: as many as the epochs need)", low=1)
    lr: float = opt(1e-4, "learning rate; linear to 0 after warm-up", above=0)
    warmup: float = opt(0.1, "share of the steps over which the learning rate rises from 0", low=0, high=1)
    weight_decay: float = opt(0.0, "AdamW weight decay", low=0)
    max_grad_norm: float = opt(1.0, "gradients are clipped to this norm, after accumulation", above=0)
    adapter: Literal["lora", "none"] = opt("lora", "lora, or none to train the layers' own weights (fp32 masters)")
    lora_r: int = opt(16, "rank of the adapter", low=1)
    lora_alpha: float = opt(32.0, "scale of the adapter; its product is multiplied by alpha / r", above=0)
    top_layers: str | int | float = opt(
        "auto",
        "how many of the uppermost layers are adapted: a number, a share below 1, all, or auto (sft: a third, else a fifth)",
    )
    max_tokens: int = opt(2048, "padded tokens in one micro-batch; changes memory and speed, not the result", low=64)
    save_every: int = opt(
        0, "steps between checkpoints (0: only at the end, when interrupted, and where a late step fails)", low=0
    )
    keep: int = opt(2, "newest checkpoints that are kept", low=1)
    keep_best: str = opt("auto", "metric by which the best checkpoint is kept too, - if lower is better: auto, none, -eval_loss")
    eval_data: list[str] = opt(
        [],
        "what evaluations while training and at the end look at in the place of the embedded corpus's held-out part: rows as --data "
        "(ppo, grpo and pairs that are sampled: prompts); of a prepared folder its val files",
    )
    eval_every: int = opt(0, "steps between evaluations on held-out data (0: at the end only)", low=0)
    eval_prompts: int = opt(32, "prompts sampled at every evaluation: held-out ones, or the first of your own (0: none)", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        top = self.top_layers = str(self.top_layers)  # YAML may say 8
        good = re.fullmatch(r"auto|all|0*[1-9]\d*|0?\.\d*[1-9]\d*", top)
        require(bool(good), f"--top-layers must be a number of layers, a share below 1, all or auto, got {top!r}")
