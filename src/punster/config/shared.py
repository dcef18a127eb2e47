"""What all settings share: fields with help texts, ranges, versions, and the settings of every training verb."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from punster.errors import UserError
from punster.model.load import DEFAULT_MODEL

CONFIG_VERSION = 1  # goes up when a setting changes its name or its meaning


def opt(default: Any = MISSING, help: str = "", short: str | None = None, factory: Any = MISSING) -> Any:
    """A dataclass field with its help text and its short flag."""
    metadata = {"help": help, "short": short}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def require(fine: bool, message: str) -> None:
    if not fine:
        raise UserError(message)


# Ranges, ends included, of settings that have the same meaning wherever they occur.
RANGES: dict[str, tuple[float, float]] = {
    "gamma": (0, 1), "lam": (0, 1), "critic_warmup": (0, math.inf), "value_clip": (1e-9, math.inf), "value_coef": (0, math.inf),
    "target_kl": (1e-9, math.inf), "kl_horizon": (1, math.inf), "stop_kl": (1e-9, math.inf), "clip_high": (1e-9, math.inf),
    "max_new_tokens": (1, math.inf), "center_rewards": (0, math.inf), "simpo_gamma": (0, math.inf), "sft_coef": (0, math.inf),
    "reward_timeout": (0, math.inf), "best_of": (0, math.inf), "pool": (0, math.inf),
}  # fmt: skip


def check_shared(config: Any) -> None:
    """Refuse numbers that are not finite or out of range, and unknown devices and types."""
    require(config.dtype in ("auto", "fp32", "bf16"), f"--dtype must be auto, fp32 or bf16, got {config.dtype!r}")
    known = re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config.device)
    require(bool(known), f"--device must be auto, cpu, cuda or mps, got {config.device!r}")
    for item in fields(config):
        value, flag = getattr(config, item.name), f"--{item.name.replace('_', '-')}"
        if isinstance(value, float | int):
            low, high = RANGES.get(item.name, (-math.inf, math.inf))
            require(math.isfinite(value), f"{flag} must be a finite number, got {value}")
            span = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
            require(low <= value <= high, f"{flag} must be {span}, got {value}")


def check_version(found: Any, place: str = "this configuration") -> None:
    """Settings of other versions are refused with the way out."""
    if found != CONFIG_VERSION:
        newer = isinstance(found, int) and found > CONFIG_VERSION
        hint = "update punster" if newer else "compare its keys with `punster VERB --help`, then set config_version"
        raise UserError(f"{place} was written for version {found} of the settings, this punster reads {CONFIG_VERSION}: {hint}")


@dataclass
class TrainConfig:
    """What every training verb shares."""

    name: str = opt("", "name of the run; its folder is OUT/NAME", short="-n")
    out: str = opt("runs", "folder that holds the runs")
    model: str = opt(DEFAULT_MODEL, "base model: built-in name, hub id, folder, or .gguf file")
    batch_size: int = opt(16, "rows (prompts for ppo and grpo: responses) in one optimizer step or rollout", short="-b")
    steps: int | None = opt(None, "optimizer steps, or rollouts for ppo and grpo (default: as many as the epochs need)")
    lr: float = opt(1e-4, "learning rate; linear to 0 after warm-up")
    warmup: float = opt(0.1, "share of the steps over which the learning rate rises from 0")
    weight_decay: float = opt(0.0, "AdamW weight decay")
    max_grad_norm: float = opt(1.0, "gradients are clipped to this norm, after accumulation")
    adapter: Literal["lora", "none"] = opt("lora", "lora, or none to train the layers' own weights (fp32 masters)")
    lora_r: int = opt(16, "rank of the adapter")
    lora_alpha: float = opt(32.0, "scale of the adapter; its product is multiplied by alpha / r")
    top_layers: str | int | float = opt(
        "auto",
        "how many of the uppermost layers are adapted: a number, a share below 1, all, or auto (sft: a third, else a fifth)",
    )
    prompt_format: str = opt("auto", "auto (chat template, else '{prompt}\\n'), chat, or a text containing {prompt}")
    device: str = opt("auto", "auto, cpu, cuda, mps")
    dtype: str = opt("auto", "type of the frozen weights: auto (bf16 where the CPU or GPU is fast at it), fp32, bf16")
    max_tokens: int = opt(2048, "padded tokens in one micro-batch; changes memory and speed, not the result")
    seed: int = opt(1, "seed of all named generators (data, sampling, init)")
    save_every: int = opt(0, "steps between checkpoints (0: only at the end and when interrupted)")
    keep: int = opt(2, "newest checkpoints that are kept")
    keep_best: str = opt(
        "auto", "metric by which the best checkpoint is kept too, with - if lower is better: auto, none, -eval_loss"
    )
    eval_every: int = opt(0, "steps between evaluations on held-out data (0: at the end only)")
    eval_prompts: int = opt(32, "held-out prompts sampled at every evaluation (0: none)")
    resume: bool = opt(False, "go on from the newest checkpoint of the run of this name")
    dry_run: bool = opt(False, "print the plan with time and memory estimates, and stop")
    quiet: bool = opt(False, "print nothing but errors")
    config_version: int = opt(CONFIG_VERSION, "version of these settings, for files of other versions of punster")

    def __post_init__(self) -> None:
        check_version(self.config_version)
        check_shared(self)
        require(self.batch_size >= 1, f"-b / batch-size must be at least 1, got {self.batch_size}")
        require(self.steps is None or self.steps >= 1, f"--steps must be at least 1, got {self.steps}")
        require(math.isfinite(self.lr) and self.lr > 0, f"--lr must be a positive number, got {self.lr}")
        require(0 <= self.warmup <= 1, f"--warmup must lie in [0, 1], got {self.warmup}")
        require(self.weight_decay >= 0, f"--weight-decay must be >= 0, got {self.weight_decay}")
        require(self.max_grad_norm > 0, f"--max-grad-norm must be > 0, got {self.max_grad_norm}")
        require(self.lora_r >= 1, f"--lora-r must be at least 1, got {self.lora_r}")
        require(self.lora_alpha > 0, f"--lora-alpha must be > 0, got {self.lora_alpha}")
        top = self.top_layers = str(self.top_layers)  # YAML may say 8
        good = top in ("auto", "all") or (top.isdigit() and int(top) >= 1)
        good = good or bool(re.fullmatch(r"0?\.\d+", top) and float(top) > 0)
        require(good, f"--top-layers must be a number of layers, a share below 1, all or auto, got {self.top_layers!r}")
        require(self.max_tokens >= 64, f"--max-tokens must be at least 64, got {self.max_tokens}")
        require(self.keep >= 1, f"--keep must be at least 1, got {self.keep}")
        require(self.eval_prompts >= 0, f"--eval-prompts must be >= 0, got {self.eval_prompts}")
        require(self.save_every >= 0 and self.eval_every >= 0, "--save-every and --eval-every must be >= 0")
        require(not self.name or bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", self.name)),
                f"run name {self.name!r}: use letters, digits, '.', '_', '+' and '-' only, at most 100")  # fmt: skip


def field_names(kind: type) -> list[str]:
    return [item.name for item in fields(kind)]
