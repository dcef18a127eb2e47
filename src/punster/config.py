"""One dataclass per verb: the single source of command-line flags, YAML keys, documentation, and what a run saves."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from punster.errors import UserError
from punster.model.load import DEFAULT_MODEL

CONFIG_VERSION = 1  # goes up when a setting changes its name or its meaning
Variant = Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce++"]
COLUMNS_HELP = "names of the fields in your files, FIELD=COLUMN: --columns prompt=question completion=answer"
KlPenalty = Literal["k1", "clamped", "k2", "k3", "js", "none", "exact"]
DpoLoss = Literal["sigmoid", "ipo", "hinge", "robust", "kto", "orpo", "simpo"]


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


@dataclass
class SftConfig(TrainConfig):
    """Supervised fine-tuning on prompts and completions; loss on the completion and its EOS only."""

    data: list[str] = opt(
        factory=lambda: ["embedded"],
        help="embedded, puns (public sources), a mixture.yaml, a file or folder (JSONL, JSON, CSV, Parquet), a hub data set",
    )
    columns: list[str] = opt(factory=list, help=COLUMNS_HELP)
    pretrained: str | None = opt(None, "start from the adapter of this run", short="-p")
    epochs: float = opt(3.0, "passes over the data")
    lr: float = opt(3e-4, "learning rate; linear to 0 after warm-up")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs > 0, f"--epochs must be > 0, got {self.epochs}")


@dataclass
class RewardConfig(TrainConfig):
    """A Bradley-Terry reward model on preference pairs, normalised on samples of the SFT model."""

    data: list[str] = opt(
        factory=lambda: ["embedded"],
        help="embedded, puns (public sources), a mixture.yaml, or files, folders, hub data sets with prompt and chosen, rejected "
        "(pairs), completions, scores (ranked groups) or completion, label (is it a pun)",
    )
    pretrain: list[str] = opt(factory=list, help="data that is passed once before the other, as --data: votes, ratings")
    eval_data: list[str] = opt(factory=list, help="pairs held out for the summary's calibration and reliability, as --data")
    columns: list[str] = opt(factory=list, help=COLUMNS_HELP)
    negatives: list[str] = opt(
        factory=lambda: ["literal", "off_topic"],
        help="embedded data: kinds of rejected text (literal, off_topic, synonym_swap, homophone, weak, garbled, spliced, template, sampled)",
    )
    rows_per_kind: int = opt(0, "embedded data: at most so many pairs of each kind, taken in a seeded order (0: all)")
    sampled_rows: int = opt(160, "embedded data: at most so many pairs of the kind sampled (they are the easiest to tell)")
    split: Literal["train", "gold"] = opt("train", "embedded data: part of the corpus that is trained on (train, gold)")
    pretrained: str | None = opt(None, "SFT run: its prompt format, and the policy whose samples normalise the score", short="-p")
    start: Literal["base", "sft"] = opt("base", "begin from the plain base, or stack on the SFT run's adapter")
    depth: float = opt(0.667, "layers that run before the head reads: a number, a share below 1, or 0 for all")
    pooling: Literal["last", "mean"] = opt("last", "read at the last token, or average over the response")
    epochs: float = opt(1.0, "passes over the pairs")
    lr: float = opt(2e-4, "learning rate; linear to 0 after warm-up")
    neutral: float = opt(0.0, "share of the prompts that are replaced by 'make a pun', so that the score hangs on the text")
    balance: bool = opt(False, "pairs of a source: as many with the longer text right as with the shorter, in buckets of length")
    pun_head: float = opt(0.5, "labelled texts: weight of the auxiliary head 'is it a pun'")
    funniness_head: float = opt(0.2, "rated texts: weight of the auxiliary head 'how funny'")
    members: int = opt(
        1, "ensemble: so many adapters and heads on the one base, each of its own seed and four fifths of the data"
    )
    combine: Literal["mean", "min", "cautious"] = opt(
        "mean", "ensemble: the mean, the minimum, or the mean less --caution x the members' standard deviation"
    )
    caution: float = opt(1.0, "ensemble: multiple of the spread that 'cautious' takes off")
    center_rewards: float = opt(0.01, "coefficient of mean((r_w + r_l)^2), as TRL has it")
    l2_rewards: float = opt(0.0, "coefficient of mean(r_w^2 + r_l^2), as ChatGLM-RLHF has it")
    shuffle_labels: bool = opt(False, "placebo: which text of a pair is preferred is drawn at random")
    normalise_samples: int = opt(128, "SFT samples on which gain and offset are set (0: none)")
    test_limit: int = opt(60, "test records on which each kind of pair is judged for the summary")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs > 0, f"--epochs must be > 0, got {self.epochs}")
        whole = self.depth < 1 or float(self.depth).is_integer()
        require(self.depth >= 0 and whole, f"--depth must be a number of layers, a share below 1, or 0, got {self.depth}")
        counts = {"rows-per-kind": self.rows_per_kind, "sampled-rows": self.sampled_rows, "test-limit": self.test_limit}
        for flag, count in counts.items():
            require(count >= 0, f"--{flag} must be >= 0, got {count}")
        require(self.normalise_samples == 0 or self.normalise_samples >= 2, "--normalise-samples must be 0 or at least 2")
        require(0 <= self.neutral <= 1, f"--neutral must lie in [0, 1], got {self.neutral}")
        require(1 <= self.members <= 16, f"--members must lie in [1, 16], got {self.members}")
        require(self.members == 1 or self.adapter == "lora", "--members: an ensemble needs --adapter lora")
        weights = {"pun-head": self.pun_head, "funniness-head": self.funniness_head, "center-rewards": self.center_rewards}
        for flag, weight in {**weights, "l2-rewards": self.l2_rewards, "caution": self.caution}.items():
            require(weight >= 0, f"--{flag} must be >= 0, got {weight}")
        known = ("literal", "off_topic", "synonym_swap", "homophone", "weak", "garbled", "spliced", "template", "sampled")
        for kind in self.negatives:
            require(kind in known, f"--negatives: unknown kind {kind!r} (one of {', '.join(known)})")
        require("sampled" not in self.negatives or self.pretrained is not None, "--negatives sampled needs an SFT run (-p)")
        require(self.start == "base" or self.pretrained is not None, "--start sft needs an SFT run (-p)")


@dataclass
class PolicyConfig(TrainConfig):
    """What ppo and grpo share: a policy, rewards, prompts, sampling."""

    actor: str = opt("", "SFT run to start from, or 'base' for the plain model; the reference is the same", short="-a")
    reward_model: str | None = opt(None, "reward-model run", short="-c")
    reward: list[str] = opt(factory=list, help="Python rewards FILE.py:FUNCTION[:WEIGHT], added to the reward model's score")
    reward_timeout: float = opt(600.0, "seconds that a Python reward may take for one rollout (0: no limit)")
    strategy: str = opt("naive", "naive: one process, one device", short="-s")
    prompts: str = opt("embedded", "embedded, or a file with prompts")
    max_new_tokens: int = opt(40, "longest response")
    temperature: float = opt(1.0, "sampling temperature, in all roles")
    beta: float = opt(0.02, "coefficient of the per-token KL (k1) in the reward")
    missing_eos_penalty: float = opt(1.0, "taken off the score of a response that does not end")
    clip: float = opt(0.2, "ratio clip")
    max_kl: float = opt(100.0, "exact KL in nats a response at which the run goes back to its last good step and stops")
    filter_std: float = opt(0.0, "prompts are dropped whose --filter-samples responses differ less in reward (0: none)")
    filter_samples: int = opt(4, "responses of the reference to each prompt by which --filter-std decides")
    memory: Literal["trunk", "hydra", "lora", "separate"] = opt(
        "trunk",
        "copies of the base: one, its lower layers run once (trunk); one (hydra); two, policy and reference on one and critic "
        "and reward model on the other (lora); one for each role (separate)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.strategy == "naive", f"-s {self.strategy}: only the strategy naive (one process) is implemented")
        require(self.max_new_tokens >= 1, f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        require(self.temperature > 0, f"--temperature must be > 0 in training, got {self.temperature}")
        require(self.beta >= 0, f"--beta must be >= 0, got {self.beta}")
        require(0 < self.clip < 1, f"--clip must lie in (0, 1), got {self.clip}")
        require(self.max_kl > 0, f"--max-kl must be > 0, got {self.max_kl}")
        require(self.filter_std >= 0, f"--filter-std must be >= 0, got {self.filter_std}")
        require(self.filter_samples >= 2, f"--filter-samples must be at least 2, got {self.filter_samples}")
        require(self.missing_eos_penalty >= 0, f"--missing-eos-penalty must be >= 0, got {self.missing_eos_penalty}")


@dataclass
class PpoConfig(PolicyConfig):
    """Proximal policy optimisation with a per-token critic that starts from the reward model."""

    batch_size: int = opt(64, "responses in one rollout", short="-b")
    steps: int | None = opt(20, "rollouts")
    lr: float = opt(3e-4, "learning rate of the policy; linear to 0 after warm-up")
    kl_penalty: KlPenalty = opt(
        "k1", "KL in the reward: k1, clamped, k2 (squared), k3 (Bregman), js, none, exact (full vocabulary)"
    )
    critic: Literal["separate", "joined"] = opt(
        "separate", "the critic's adapter: its own, or the policy's (Hydra's joined form)"
    )
    critic_lr: float = opt(3e-4, "learning rate of the critic")
    critic_warmup: int = opt(1, "first rollouts in which only the critic learns")
    epochs: int = opt(4, "passes over each rollout")
    minibatches: int = opt(1, "optimizer steps in one pass")
    gamma: float = opt(1.0, "discount")
    lam: float = opt(0.95, "GAE lambda")
    value_clip: float = opt(0.2, "value clip")
    value_coef: float = opt(0.1, "weight of the value loss (for a separate critic it matters through clipping only)")
    whiten_rewards: bool = opt(False, "divide the tokens' rewards by their standard deviation in each rollout; the mean stays")
    scale_rewards: bool = opt(False, "divide scores by their standard deviation over all rollouts so far")
    clip_rewards: float | None = opt(None, "cut scores to this range on both sides of 0, after scaling")
    reference_baseline: bool = opt(False, "subtract the score of one fixed response of the reference to each prompt")
    sft_coef: float = opt(0.0, "weight of an SFT loss mixed into every update, against forgetting")
    sft_data: list[str] = opt(factory=lambda: ["embedded"], help="rows with prompt and completion for --sft-coef")
    target_kl: float | None = opt(None, "adaptive coefficient: sequence KL in nats to steer at (default: fixed beta)")
    kl_horizon: int = opt(10_000, "adaptive coefficient: its horizon in responses")
    stop_kl: float = opt(0.1, "a pass ends early once approx_kl exceeds this")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs >= 1, f"--epochs must be at least 1, got {self.epochs}")
        require(1 <= self.minibatches <= self.batch_size, f"--minibatches must lie in [1, batch size], got {self.minibatches}")
        require(self.critic_lr > 0, f"--critic-lr must be > 0, got {self.critic_lr}")
        require(self.clip_rewards is None or self.clip_rewards > 0, f"--clip-rewards must be > 0, got {self.clip_rewards}")
        require(self.critic == "separate" or self.adapter == "lora", "--critic joined needs --adapter lora")
        require(self.sft_coef >= 0, f"--sft-coef must be >= 0, got {self.sft_coef}")
        require(self.target_kl is None or self.beta > 0, "--target-kl steers beta by factors: it needs --beta above 0")
        require(self.batch_size >= 2, "-b / batch-size must be at least 2 for ppo: advantages are whitened over the rollout")


@dataclass
class GrpoConfig(PolicyConfig):
    """Group-relative policy optimisation and its kin: no critic, several samples a prompt."""

    batch_size: int = opt(64, "responses in one rollout (a multiple of samples)", short="-b")
    steps: int | None = opt(20, "rollouts")
    lr: float = opt(3e-4, "learning rate; linear to 0 after warm-up")
    variant: Variant = opt("grpo", "grpo, dr_grpo, dapo, rloo or reinforce++")
    samples: int = opt(8, "responses to one prompt")
    epochs: int = opt(2, "passes over each rollout")
    minibatches: int = opt(1, "optimizer steps in one pass")
    clip_high: float | None = opt(None, "upper ratio clip (default: clip; dapo: .28)")
    beta: float = opt(0.02, "coefficient of the KL (where it acts: --kl-in)")
    kl_in: Literal["auto", "reward", "loss", "corrected"] = opt(
        "auto",
        "k1 in the reward, k3 in the loss, or k3 times the ratio in the loss (corrected, as TRL has it); auto: as published, the "
        "loss for grpo, dr_grpo and dapo, the reward for rloo and reinforce++",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.samples >= 2, f"--samples must be at least 2, got {self.samples}")
        require(1 <= self.minibatches <= self.batch_size, f"--minibatches must lie in [1, batch size], got {self.minibatches}")
        require(self.batch_size % self.samples == 0, f"-b {self.batch_size} must be a multiple of --samples {self.samples}")
        require(self.epochs >= 1, f"--epochs must be at least 1, got {self.epochs}")
        high = self.clip_high if self.clip_high is not None else self.clip
        require(high >= self.clip, f"--clip-high {high} lies below --clip {self.clip}")

    @property
    def kl_place(self) -> str:
        """Where the KL acts: reward, loss or corrected."""
        published = "reward" if self.variant in ("rloo", "reinforce++") else "loss"
        return published if self.kl_in == "auto" else self.kl_in


@dataclass
class DpoConfig(TrainConfig):
    """Direct preference optimisation and its family, on given pairs, on-policy pairs, or online."""

    actor: str = opt("", "SFT run to start from; the reference is this run", short="-a")
    reward_model: str | None = opt(
        None, "reward-model run that ranks sampled responses (needed for --pairs sampled and --online)", short="-c"
    )
    strategy: str = opt("naive", "naive: one process, one device", short="-s")
    data: list[str] = opt(
        factory=lambda: ["embedded"],
        help="embedded, puns, a mixture.yaml, or files, folders, hub data sets with prompt, chosen and rejected (kto: prompt, completion, label)",
    )
    columns: list[str] = opt(factory=list, help=COLUMNS_HELP)
    max_length: int = opt(
        0, "given rows longer than this lose the beginning of their prompt, never EOS; where a response alone is longer the row is "
        "left out (0: rows beyond the model's context are an error)",
    )  # fmt: skip
    prompts: str = opt("embedded", "sampled pairs and online: embedded, or a file with prompts")
    pairs: Literal["data", "sampled"] = opt("data", "pairs as given, or best against worst of several samples of the SFT model")
    samples: int = opt(8, "sampled pairs: responses drawn for each prompt")
    pairs_per_prompt: int = opt(1, "sampled pairs: best against worst, second best against second worst, and so on")
    missing_eos_penalty: float = opt(1.0, "sampled pairs: taken off the score of a response that does not end")
    prompt_limit: int = opt(0, "sampled pairs: number of prompts used (0: all)")
    online: bool = opt(False, "sample from the current policy at every step, rank by the reward model, and learn")
    loss_type: DpoLoss = opt("sigmoid", "sigmoid, ipo, hinge, robust, kto, orpo or simpo")
    label_smoothing: float = opt(0.0, "share of wrong labels assumed (sigmoid: conservative DPO; robust)")
    beta: float = opt(0.1, "strength of the tie to the reference")
    simpo_gamma: float = opt(0.5, "SimPO's target margin")
    sft_coef: float = opt(0.0, "weight of an SFT term on the chosen responses")
    max_new_tokens: int = opt(40, "longest sampled response")
    temperature: float = opt(1.0, "temperature of sampled pairs")
    epochs: float = opt(1.0, "passes over the pairs")
    lr: float = opt(1e-4, "learning rate; linear to 0 after warm-up")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.strategy == "naive", f"-s {self.strategy}: only the strategy naive (one process) is implemented")
        require(0 <= self.label_smoothing < 0.5, f"--label-smoothing must lie in [0, .5), got {self.label_smoothing}")
        require(self.beta > 0, f"--beta must be > 0, got {self.beta}")
        require(self.epochs > 0, f"--epochs must be > 0, got {self.epochs}")
        require(self.samples >= 2, f"--samples must be at least 2, got {self.samples}")
        most = self.samples // 2
        require(
            1 <= self.pairs_per_prompt <= most, f"--pairs-per-prompt must lie in [1, samples / 2], got {self.pairs_per_prompt}"
        )
        require(self.missing_eos_penalty >= 0, f"--missing-eos-penalty must be >= 0, got {self.missing_eos_penalty}")
        require(self.temperature > 0, f"--temperature must be > 0 in training, got {self.temperature}")
        require(self.max_length == 0 or self.max_length >= 2, f"--max-length must be 0 or at least 2, got {self.max_length}")
        require(self.prompt_limit >= 0, f"--prompt-limit must be >= 0, got {self.prompt_limit}")
        require(self.loss_type != "kto" or self.batch_size >= 2, "--loss-type kto needs a batch of at least 2")
        smooth = self.loss_type in ("sigmoid", "robust") or self.label_smoothing == 0
        require(smooth, f"--label-smoothing belongs to sigmoid and robust; --loss-type is {self.loss_type}")
        needs = self.online or self.pairs == "sampled"
        require(not needs or self.reward_model is not None, "--online and --pairs sampled need a reward model (-c)")
        require(not (self.online and self.loss_type == "kto"), "--online makes pairs; kto does not use pairs")


@dataclass
class DistillConfig(SftConfig):
    """Rejection sampling: SFT on the best of n samples of a run, chosen by a reward model."""

    actor: str = opt("", "SFT run to sample from and to continue", short="-a")
    reward_model: str = opt("", "reward-model run that chooses", short="-c")
    best_of: int = opt(8, "samples for each prompt")
    prompts: str = opt("embedded", "embedded, or a file with prompts")
    max_new_tokens: int = opt(40, "longest response")
    epochs: float = opt(2.0, "passes over the chosen samples")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.best_of >= 2, f"--best-of must be at least 2, got {self.best_of}")


@dataclass
class EvaluateConfig:
    """Compare runs on held-out prompts, by a yardstick that no training used."""

    models: list[str] = opt(factory=list, help="runs, or 'base' for the plain base model")
    gold: str | None = opt(
        None, "reward-model run that is the yardstick (default: the runs' own gold, if they lie in one pipeline)"
    )
    proxy: str | None = opt(None, "reward-model run that selects best-of-n (default: the pipeline's reward run)")
    reference: str | None = opt(None, "run that the others are compared with (default: the run named sft)")
    prompts: str = opt("embedded", "embedded (the test part), or a file with prompts")
    samples: int = opt(4, "responses to each prompt")
    best_of: int = opt(0, "also report best-of-n of the reference, chosen by the proxy")
    pool: int = opt(0, "samples a prompt of the reference from which best-of-n is estimated (default: twice n)")
    limit: int = opt(0, "use only the first so many prompts (0: all)")
    max_new_tokens: int = opt(40, "longest response")
    temperature: float = opt(1.0, "sampling temperature; evaluation is untruncated")
    seed: int = opt(1, "seed of the sampling and of the bootstrap")
    device: str = opt("auto", "auto, cpu, cuda, mps")
    dtype: str = opt("auto", "auto, fp32, bf16")
    out: str | None = opt(None, "write summary.json and samples.jsonl into this folder")
    quiet: bool = opt(False, "print nothing but errors")
    judge: str | None = opt(
        None,
        "let a language model judge too, at this OpenAI-compatible URL (key, if any, in PUNSTER_JUDGE_KEY); openai is "
        "OpenAI's own, with OPENAI_API_KEY. Texts are sent there; without this option nothing is sent anywhere",
    )
    judge_model: str = opt("", "name of the judging model at that endpoint")
    judge_pairs: Literal["reference", "all"] = opt("reference", "compare each model with the reference, or every two models")
    judge_budget: int = opt(2000, "at most so many calls that are not answered from the cache")
    judge_workers: int = opt(8, "calls at once")
    judge_rate: int = opt(0, "calls started a minute (0: no limit)")
    judge_timeout: float = opt(60.0, "seconds to wait for an answer before trying again")
    judge_tokens: int = opt(40, "longest answer in tokens; models that think first need hundreds")
    judge_cache: str | None = opt(None, "SQLite file that keeps every answer (default: judge.sqlite in the cache folder)")
    calibrate: int = opt(0, "first let the judge label so many texts that people have labelled (PUNSTER_DATA): Cohen's kappa")

    def __post_init__(self) -> None:
        check_shared(self)
        if self.judge is not None:
            fine = self.judge == "openai" or re.fullmatch(r"https?://[^\s/]+\S*", self.judge)
            require(bool(fine), f"--judge must be openai or a URL such as http://127.0.0.1:8000/v1, got {self.judge!r}")
            require(bool(self.judge_model), "--judge needs --judge-model NAME")
        require(self.judge is not None or not (self.judge_model or self.calibrate), "--judge-model and --calibrate need --judge")
        counts = {
            "budget": self.judge_budget,
            "workers": self.judge_workers,
            "timeout": self.judge_timeout,
            "tokens": self.judge_tokens,
        }
        for flag, value in counts.items():
            require(value > 0, f"--judge-{flag} must be above 0, got {value}")
        require(self.judge_rate >= 0, f"--judge-rate must be >= 0, got {self.judge_rate}")
        require(self.calibrate == 0 or self.calibrate >= 10, f"--calibrate must be at least 10, got {self.calibrate}")
        require(self.samples >= 1, f"--samples must be at least 1, got {self.samples}")
        require(self.limit >= 0, f"--limit must be >= 0, got {self.limit}")
        require(self.temperature > 0, f"--temperature must be > 0 in evaluation, got {self.temperature}")
        require(self.best_of == 0 or self.best_of >= 2, f"--best-of must be at least 2, got {self.best_of}")
        require(self.pool == 0 or self.pool > self.best_of, f"--pool must be more than --best-of, got {self.pool}")
        require(self.max_new_tokens >= 1, f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")


@dataclass
class PipelineConfig:
    """punster run: sft -> reward -> ppo, grpo, dpo, best-of-n -> evaluate -> report. Sections override a verb's defaults."""

    name: str = opt("", "name of the run; its folder is OUT/NAME (default: the recipe's name)", short="-n")
    out: str = opt("runs", "folder that holds the runs")
    model: str = opt(DEFAULT_MODEL, "base model: built-in name, hub id, folder, or .gguf file")
    prompt_format: str = opt("auto", "auto, chat, or a text containing {prompt}")
    device: str = opt("auto", "auto, cpu, cuda, mps")
    dtype: str = opt("auto", "auto, fp32, bf16")
    seed: int = opt(1, "seed of all stages")
    scale: float = opt(1.0, "multiplies data, steps and samples of every stage: .02 is a smoke test")
    stages: list[str] = opt(factory=lambda: ["sft", "reward", "gold", "ppo", "grpo", "dpo"], help="stages to run, in this order")
    sft: dict[str, Any] = opt(factory=dict, help="settings of the SFT stage")
    reward: dict[str, Any] = opt(factory=dict, help="settings of the reward model that is trained against")
    gold: dict[str, Any] = opt(factory=dict, help="settings of the yardstick reward model")
    ppo: dict[str, Any] = opt(factory=dict, help="settings of PPO")
    grpo: dict[str, Any] = opt(factory=dict, help="settings of GRPO")
    dpo: dict[str, Any] = opt(factory=dict, help="settings of DPO")
    placebo_reward: dict[str, Any] = opt(factory=dict, help="settings of the reward model with shuffled labels")
    placebo: dict[str, Any] = opt(factory=dict, help="settings of PPO against the placebo reward model")
    evaluate: dict[str, Any] = opt(factory=dict, help="settings of the evaluation")
    resume: bool = opt(False, "keep finished stages and go on with the first unfinished one")
    dry_run: bool = opt(False, "print the plan with time and memory estimates, and stop")
    quiet: bool = opt(False, "print nothing but errors")
    config_version: int = opt(CONFIG_VERSION, "version of these settings, for files of other versions of punster")

    def __post_init__(self) -> None:
        check_version(self.config_version)
        check_shared(self)
        known = ("sft", "reward", "gold", "ppo", "grpo", "dpo", "placebo_reward", "placebo")
        for stage in self.stages:
            require(stage in known, f"--stages: unknown stage {stage!r}: {', '.join(known)}")
        needs = {"reward": ["sft"], "gold": ["sft"], "placebo_reward": ["sft"], "ppo": ["sft", "reward"], "grpo": ["sft", "reward"],
                 "dpo": ["sft", "reward"], "placebo": ["sft", "placebo_reward"]}  # fmt: skip
        for place, stage in enumerate(self.stages):
            for needed in needs.get(stage, []):
                require(needed in self.stages[:place], f"--stages: {stage} needs {needed} before it")
        for needed in ("sft", "gold"):
            require(needed in self.stages, f"--stages: the evaluation needs {needed}")
        require("reward" in self.stages or not self.evaluate.get("best_of"), "--stages: best-of-n needs reward")
        require(0 < self.scale <= 100, f"--scale must lie in (0, 100], got {self.scale}")
        require(not self.name or bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", self.name)),
                f"run name {self.name!r}: use letters, digits, '.', '_', '+' and '-' only, at most 100")  # fmt: skip


def field_names(kind: type) -> list[str]:
    return [item.name for item in fields(kind)]
