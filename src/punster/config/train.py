"""One dataclass for each training verb."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from punster.config.shared import TrainConfig, opt, require

Variant = Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce++"]
COLUMNS_HELP = "names of the fields in your files, FIELD=COLUMN: --columns prompt=question completion=answer"
MAX_LENGTH_HELP = (
    "rows of more tokens lose the beginning of their prompt, never EOS; where an answer alone is longer the row is left out "
    "(0: rows beyond the model's context are an error)"
)
KlPenalty = Literal["k1", "clamped", "k2", "k3", "js", "none", "exact"]
DpoLoss = Literal["sigmoid", "ipo", "hinge", "robust", "kto", "orpo", "simpo"]


@dataclass
class SftConfig(TrainConfig):
    """Supervised fine-tuning on prompts and completions; loss on the completion and its EOS only."""

    data: list[str] = opt(
        ["embedded"],
        "embedded, puns (public sources), a mixture.yaml, a file or folder (JSONL, JSON, CSV, Parquet), a .txt with a text a line, a hub data set",
    )
    columns: list[str] = opt([], COLUMNS_HELP)
    max_length: int = opt(0, MAX_LENGTH_HELP, low=0)
    pretrained: str | None = opt(None, "start from the adapter of this run", short="-p")
    epochs: float = opt(3.0, "passes over the data", above=0)
    lr: float = opt(3e-4, "learning rate; linear to 0 after warm-up", above=0)


@dataclass
class RewardConfig(TrainConfig):
    """A Bradley-Terry reward model on preference pairs, normalised on samples of the SFT model."""

    data: list[str] = opt(
        ["embedded"],
        "embedded, puns (public sources), a mixture.yaml, or files, folders, hub data sets with prompt and chosen, rejected "
        "(pairs), completions, scores (ranked groups) or completion, label (is it a pun)",
    )
    pretrain: list[str] = opt([], "data that is passed once before the other, as --data: votes, ratings")
    eval_data: list[str] = opt(
        [],
        "held-out pairs, as --data, for evaluations while training and the summary's calibration and reliability (default: embedded)",
    )
    columns: list[str] = opt([], COLUMNS_HELP)
    max_length: int = opt(0, MAX_LENGTH_HELP, low=0)
    negatives: list[str] = opt(
        ["literal", "off_topic"],
        "embedded data: kinds of rejected text (literal, off_topic, synonym_swap, homophone, weak, garbled, spliced, template, sampled)",
    )
    rows_per_kind: int = opt(0, "embedded data: at most so many pairs of each kind, taken in a seeded order (0: all)", low=0)
    sampled_rows: int = opt(160, "embedded data: at most so many pairs of the kind sampled (they are the easiest to tell)", low=0)
    split: Literal["train", "gold"] = opt("train", "embedded data: part of the corpus that is trained on (train, gold)")
    half: int = opt(
        0, "1 or 2: this half of --data alone, for a reward model and a yardstick that name the same data and share no text and no pun "
        "word that a row names (0: all)", low=0, high=2)  # fmt: skip
    without: list[str] = opt([], "sources of the rows (embedded, puneval, ...) that are not learned from")
    pretrained: str | None = opt(None, "SFT run: its prompt format, and the policy whose samples normalise the score", short="-p")
    start: Literal["base", "sft"] = opt("base", "begin from the plain base, or stack on the SFT run's adapter")
    depth: float = opt(0.667, "layers that run before the head reads: a number, a share below 1, or 0 for all", low=0)
    pooling: Literal["last", "mean"] = opt("last", "read at the last token, or average over the response")
    epochs: float = opt(1.0, "passes over the pairs", above=0)
    minutes: float = opt(
        0.0,
        "where training is estimated at more than a fifth longer on this machine, passes are halved until it fits, and the batch with "
        "them, down to a quarter (0: all passes; left aside with --steps); a resumed run keeps its passes and batch",
        low=0,
    )
    lr: float = opt(2e-4, "learning rate; linear to 0 after warm-up", above=0)
    neutral: float = opt(0.0, "share of the prompts replaced by 'make a pun', so that the score hangs on the text", low=0, high=1)
    families: bool = opt(
        False, "rows about one text or group are learned from in one step, in which each text runs once; -b then counts families"
    )
    balance: bool = opt(False, "pairs of a source: as many with the longer text right as with the shorter, in buckets of length")
    pun_head: float = opt(
        0.5, "labelled texts: weight of 'is it a pun', whose log-odds are the score times and plus a number", low=0
    )
    funniness_head: float = opt(0.2, "rated texts: weight of the auxiliary head 'how funny'", low=0)
    int8: bool = opt(
        False,
        "a step multiplies by frozen bf16 matrices in 8 bits where punster doctor tells of them; scoring is as without",
    )
    members: int = opt(
        1, "ensemble: adapters and heads on the one base, each of own seed and four fifths of the data", low=1, high=16
    )
    combine: Literal["mean", "min", "cautious"] = opt(
        "mean", "ensemble: mean, minimum, or mean less --caution x standard deviation"
    )
    caution: float = opt(1.0, "ensemble: multiple of the spread that 'cautious' takes off", low=0)
    center_rewards: float = opt(0.01, "coefficient of mean((r_w + r_l)^2), as TRL has it", low=0)
    l2_rewards: float = opt(0.0, "coefficient of mean(r_w^2 + r_l^2), as ChatGLM-RLHF has it", low=0)
    shuffle_labels: bool = opt(False, "placebo: preferences, labels, ranks and ratings are drawn at random")
    normalise_samples: int = opt(128, "SFT samples on which gain and offset are set (0: none)", low=0)
    test_limit: int = opt(60, "test records on which each kind of pair is judged for the summary", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.depth < 1 or float(self.depth).is_integer()
        require(whole, f"--depth must be a number of layers, a share below 1, or 0, got {self.depth}")
        require(self.normalise_samples == 0 or self.normalise_samples >= 2, "--normalise-samples must be 0 or at least 2")
        require(self.members == 1 or self.adapter == "lora", "--members: an ensemble needs --adapter lora")
        known = ("literal", "off_topic", "synonym_swap", "homophone", "weak", "garbled", "spliced", "template", "sampled")
        for kind in self.negatives:
            require(kind in known, f"--negatives: unknown kind {kind!r} (one of {', '.join(known)})")
        require(
            "template" not in self.negatives or self.split == "train", "--negatives template: these pairs are for --split train"
        )
        require("sampled" not in self.negatives or self.pretrained is not None, "--negatives sampled needs an SFT run (-p)")
        require(not (self.half and self.pretrain), "--half is of --data; with --pretrain the halves would share texts")
        require(self.start == "base" or self.pretrained is not None, "--start sft needs an SFT run (-p)")


@dataclass
class PolicyConfig(TrainConfig):
    """What ppo and grpo share: a policy, rewards, prompts, sampling."""

    actor: str = opt("", "SFT run to start from, or 'base' for the plain model; the reference is the same", short="-a")
    reward_model: str | None = opt(None, "reward-model run", short="-c")
    reward: list[str] = opt([], "Python rewards FILE.py:FUNCTION[:WEIGHT], added to the reward model's score")
    reward_timeout: float = opt(600.0, "seconds that a Python reward may take for one rollout (0: no limit)", low=0)
    strategy: str = opt("naive", "naive: one process, one device", short="-s")
    prompts: str = opt("embedded", "embedded, or a file with prompts")
    minibatches: int = opt(1, "optimizer steps in one pass", low=1)
    max_new_tokens: int = opt(40, "longest response", low=1)
    temperature: float = opt(1.0, "sampling temperature, in all roles", above=0)
    beta: float = opt(0.02, "coefficient of the per-token KL (k1) in the reward", low=0)
    missing_eos_penalty: float = opt(1.0, "taken off the score of a response that does not end", low=0)
    clip: float = opt(0.2, "ratio clip", above=0, below=1)
    max_kl: float = opt(100.0, "exact KL in nats a response at which the run goes back to its last good step and stops", above=0)
    filter_std: float = opt(0.0, "prompts are dropped whose --filter-samples responses differ less in reward (0: none)", low=0)
    filter_samples: int = opt(4, "responses of the reference to each prompt by which --filter-std decides", low=2)
    memory: Literal["trunk", "hydra", "lora", "separate"] = opt(
        "trunk",
        "copies of the base: one, its lower layers run once (trunk); one (hydra); two, policy and reference on one and critic "
        "and reward model on the other (lora); one for each role (separate)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.minibatches <= self.batch_size, f"--minibatches must lie in [1, batch size], got {self.minibatches}")


@dataclass
class PpoConfig(PolicyConfig):
    """Proximal policy optimisation with a per-token critic that starts from the reward model."""

    batch_size: int = opt(64, "responses in one rollout, at least 2 (advantages are whitened over them)", short="-b", low=2)
    steps: int | None = opt(20, "rollouts", low=1)
    lr: float = opt(3e-4, "learning rate of the policy; linear to 0 after warm-up", above=0)
    kl_penalty: KlPenalty = opt(
        "k1", "KL in the reward: k1, clamped, k2 (squared), k3 (Bregman), js, none, exact (whole vocabulary)"
    )
    critic: Literal["separate", "joined"] = opt(
        "separate", "the critic's adapter: its own, or the policy's (Hydra's joined form)"
    )
    critic_lr: float = opt(3e-4, "learning rate of the critic", above=0)
    critic_warmup: int = opt(1, "first rollouts in which only the critic learns", low=0)
    epochs: int = opt(4, "passes over each rollout", low=1)
    gamma: float = opt(1.0, "discount", low=0, high=1)
    lam: float = opt(0.95, "GAE lambda", low=0, high=1)
    value_clip: float = opt(0.2, "value clip", above=0)
    value_coef: float = opt(0.1, "weight of the value loss (for a separate critic it matters through clipping only)", low=0)
    whiten_rewards: bool = opt(False, "divide the tokens' rewards by their standard deviation in each rollout; the mean stays")
    scale_rewards: bool = opt(False, "divide scores by their standard deviation over all rollouts so far")
    clip_rewards: float | None = opt(None, "cut scores to this range on both sides of 0, after scaling", above=0)
    reference_baseline: bool = opt(False, "subtract the score of one fixed response of the reference to each prompt")
    sft_coef: float = opt(0.0, "weight of an SFT loss mixed into every update, against forgetting", low=0)
    sft_data: list[str] = opt(["embedded"], "rows with prompt and completion for --sft-coef")
    target_kl: float | None = opt(None, "adaptive coefficient: sequence KL in nats to steer at (default: fixed beta)", above=0)
    kl_horizon: int | None = opt(
        None,
        "adaptive coefficient: its horizon in responses (default: a tenth of the run's, at least two rollouts'), so that beta can follow",
        low=1,
    )
    stop_kl: float = opt(0.1, "no further pass over a rollout once the last update's approx_kl exceeds this", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.critic == "separate" or self.adapter == "lora", "--critic joined needs --adapter lora")
        require(self.target_kl is None or self.beta > 0, "--target-kl steers beta by factors: it needs --beta above 0")
        steered = self.target_kl is None or self.kl_penalty != "none"
        require(steered, "--target-kl steers --beta, of which --kl-penalty none makes no use")
        fine = self.kl_horizon is None or self.kl_horizon >= self.batch_size
        require(fine, f"--kl-horizon counts responses: it must be at least the batch ({self.batch_size}), got {self.kl_horizon}")


@dataclass
class GrpoConfig(PolicyConfig):
    """Group-relative policy optimisation and its kin: no critic, several samples a prompt."""

    batch_size: int = opt(64, "responses in one rollout (a multiple of samples)", short="-b", low=1)
    steps: int | None = opt(20, "rollouts", low=1)
    lr: float = opt(3e-4, "learning rate; linear to 0 after warm-up", above=0)
    variant: Variant = opt("grpo", "grpo, dr_grpo, dapo, rloo or reinforce++")
    samples: int = opt(8, "responses to one prompt", low=2)
    epochs: int = opt(2, "passes over each rollout", low=1)
    clip_high: float | None = opt(None, "upper ratio clip (default: clip; dapo: .28)", above=0)
    beta: float = opt(0.02, "coefficient of the KL (where it acts: --kl-in)", low=0)
    kl_in: Literal["auto", "reward", "loss", "corrected"] = opt(
        "auto",
        "k1 in the reward, k3 in the loss, or k3 times the ratio in the loss (corrected, as TRL has it); auto: as published, the "
        "loss for grpo, dr_grpo and dapo, the reward for rloo and reinforce++",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size % self.samples == 0, f"-b {self.batch_size} must be a multiple of --samples {self.samples}")
        require(self.upper_clip >= self.clip, f"--clip-high {self.upper_clip} lies below --clip {self.clip}")

    @property
    def upper_clip(self) -> float:
        """DAPO's clips are apart (Yu et al. 2025, arXiv 2503.14476)."""
        return self.clip_high if self.clip_high is not None else 0.28 if self.variant == "dapo" else self.clip

    @property
    def kl_place(self) -> str:
        """Where the KL acts: reward, loss or corrected."""
        published = "reward" if self.variant in ("rloo", "reinforce++") else "loss"
        return published if self.kl_in == "auto" else self.kl_in


@dataclass
class DpoConfig(TrainConfig):
    """Direct preference optimisation and its family, on given pairs, on-policy pairs, or online."""

    actor: str = opt("", "SFT run to start from; the reference is this run", short="-a")
    reward_model: str | None = opt(None, "reward-model run that ranks samples (for --pairs sampled and --online)", short="-c")
    strategy: str = opt("naive", "naive: one process, one device", short="-s")
    data: list[str] = opt(
        ["embedded"],
        "embedded, puns, a mixture.yaml, or files, folders, hub data sets with prompt, chosen and rejected (kto: no mixture; prompt, completion, label)",
    )
    columns: list[str] = opt([], COLUMNS_HELP)
    max_length: int = opt(0, MAX_LENGTH_HELP, low=0)
    prompts: str = opt("embedded", "sampled pairs and online: embedded, or a file with prompts")
    pairs: Literal["data", "sampled"] = opt("data", "pairs as given, or best against worst of several samples of the SFT model")
    samples: int = opt(8, "sampled pairs: responses drawn for each prompt", low=2)
    pairs_per_prompt: int = opt(1, "sampled pairs: best against worst, second best against second worst, and so on", low=1)
    missing_eos_penalty: float = opt(1.0, "sampled pairs: taken off the score of a response that does not end", low=0)
    prompt_limit: int = opt(0, "sampled pairs: number of prompts used (0: all)", low=0)
    online: bool = opt(False, "sample from the current policy at every step, rank by the reward model, and learn")
    loss_type: DpoLoss = opt("sigmoid", "sigmoid, ipo, hinge, robust, kto, orpo or simpo")
    label_smoothing: float = opt(0.0, "share of wrong labels assumed (sigmoid: conservative DPO; robust)", low=0, below=0.5)
    beta: float = opt(0.1, "strength of the tie to the reference (simpo has none, and is used with 2 to 10)", above=0)
    simpo_gamma: float = opt(0.5, "SimPO's target margin", low=0)
    sft_coef: float = opt(0.0, "weight of an SFT term on the chosen responses (not of kto; orpo has one)", low=0)
    max_new_tokens: int = opt(40, "longest sampled response", low=1)
    temperature: float = opt(1.0, "temperature of sampled pairs", above=0)
    epochs: float = opt(1.0, "passes over the pairs", above=0)
    lr: float = opt(1e-4, "learning rate; linear to 0 after warm-up", above=0)

    @property
    def makes_pairs(self) -> bool:
        """Whether pairs are made of samples that the reward model ranks."""
        return self.online or self.pairs == "sampled"

    def __post_init__(self) -> None:
        super().__post_init__()
        fine = self.pairs_per_prompt <= self.samples // 2
        require(fine, f"--pairs-per-prompt must lie in [1, samples / 2], got {self.pairs_per_prompt}")
        require(self.loss_type != "kto" or self.batch_size >= 2, "--loss-type kto needs a batch of at least 2")
        smooth = self.loss_type in ("sigmoid", "robust") or self.label_smoothing == 0
        require(smooth, f"--label-smoothing belongs to sigmoid and robust; --loss-type is {self.loss_type}")
        fine = self.loss_type not in ("kto", "orpo") or self.sft_coef == 0
        require(fine, f"--sft-coef: {self.loss_type} has its own place for wanted texts")
        given = not self.makes_pairs
        require(given or self.reward_model is not None, "--online and --pairs sampled need a reward model (-c)")
        fine = given or (self.data in ([], ["embedded"]) and not self.columns and not self.max_length)
        require(
            fine,
            "--online and --pairs sampled pair samples to --prompts: they have no use for --data, --columns and --max-length",
        )
        require(not (self.online and self.loss_type == "kto"), "--online makes pairs; kto does not use pairs")


@dataclass
class DistillConfig(SftConfig):
    """Rejection sampling: SFT on the best of n samples of a run, chosen by a reward model."""

    actor: str = opt("", "SFT run to sample from and to continue", short="-a")
    reward_model: str = opt("", "reward-model run that chooses", short="-c")
    best_of: int = opt(8, "samples for each prompt", low=2)
    prompts: str = opt("embedded", "embedded, or a file with prompts")
    max_new_tokens: int = opt(40, "longest response", low=1)
    epochs: float = opt(2.0, "passes over the chosen samples", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.data in ([], ["embedded"]) and not (self.columns or self.max_length) and self.pretrained in (None, self.actor)
        require(
            own,
            "distill makes its own rows from the run that it continues: -a and --prompts, not --data, --columns, --max-length or -p",
        )
