"""One dataclass each for `punster evaluate` and `punster run`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from punster.config.shared import RunConfig, check_shared, opt, require


@dataclass
class EvaluateConfig:
    """Compare runs on held-out prompts, by a yardstick that no training used."""

    models: list[str] = opt([], "runs, or 'base' for the plain base model")
    gold: str | None = opt(
        None, "reward-model run that is the yardstick (default: the gold of the pipeline that the runs lie in)"
    )
    proxy: str | None = opt(None, "reward-model run that selects best-of-n (default: the pipeline's reward run)")
    reference: str | None = opt(None, "run that the others are compared with, or base (default: the run named sft)")
    prompts: str = opt("embedded", "embedded (the test part), or a file with prompts")
    call_puns: bool = opt(
        False,
        "also the share of texts that the gold calls puns, its threshold set on labels of people; needs local copies (PUNSTER_DATA)",
    )
    samples: int = opt(4, "responses to each prompt", low=1)
    best_of: int = opt(0, "also report best-of-n of the reference, chosen by the proxy", low=0)
    pool: int = opt(0, "samples a prompt of the reference from which best-of-n is estimated (default: twice n)", low=0)
    limit: int = opt(0, "use only the first so many prompts (0: all)", low=0)
    max_new_tokens: int = opt(40, "longest response", low=1)
    temperature: float = opt(
        1.0, "sampling temperature; the whole distribution is sampled unless the next four say otherwise", above=0
    )
    top_k: int = opt(
        0, "sample among the k likeliest tokens (0: all); the exact KL is of whole distributions and left out then", low=0
    )
    top_p: float = opt(1.0, "sample among the likeliest tokens of this mass", above=0, high=1)
    min_p: float = opt(0.0, "sample among tokens of at least this share of the likeliest", low=0, high=1)
    repetition_penalty: float = opt(1.0, "above 1: discourage repeated tokens", above=0)
    seed: int = opt(1, "seed of the sampling and of the bootstrap")
    device: str = opt("auto", "auto, cpu, cuda, mps")
    dtype: str = opt("auto", "auto, fp32, bf16")
    out: str | None = opt(None, "write summary.json, samples.jsonl and these settings (config.yaml) into this folder")
    quiet: bool = opt(False, "print the tables alone")
    judge: str | None = opt(
        None,
        "let a language model judge too, at this OpenAI-compatible URL (key, if any, in PUNSTER_JUDGE_KEY); openai is "
        "OpenAI's own, with OPENAI_API_KEY. Texts are sent there; without this option nothing is sent anywhere",
    )
    judge_model: str = opt("", "name of the judging model at that endpoint")
    judge_pairs: Literal["reference", "all"] = opt("reference", "compare each model with the reference, or every two models")
    judge_budget: int = opt(2000, "at most so many calls that are not answered from the cache", above=0)
    judge_workers: int = opt(8, "calls at once", above=0)
    judge_rate: int = opt(0, "calls started a minute (0: no limit)", low=0)
    judge_timeout: float = opt(60.0, "seconds to wait for an answer before trying again", above=0)
    judge_tokens: int = opt(40, "longest answer in tokens; models that think first need hundreds", above=0)
    judge_cache: str | None = opt(None, "SQLite file that keeps every answer (default: judge.sqlite in the cache folder)")
    calibrate: int = opt(0, "first let the judge label so many texts that people labelled (PUNSTER_DATA): Cohen's kappa", low=0)

    def __post_init__(self) -> None:
        check_shared(self)
        if self.judge is not None:
            fine = self.judge == "openai" or re.fullmatch(r"https?://[^\s/]+\S*", self.judge)
            require(bool(fine), f"--judge must be openai or a URL such as http://127.0.0.1:8000/v1, got {self.judge!r}")
            require(bool(self.judge_model), "--judge needs --judge-model NAME")
        require(self.judge is not None or not (self.judge_model or self.calibrate), "--judge-model and --calibrate need --judge")
        require(self.calibrate == 0 or self.calibrate >= 10, f"--calibrate must be at least 10, got {self.calibrate}")
        require(self.best_of == 0 or self.best_of >= 2, f"--best-of must be at least 2, got {self.best_of}")
        require(self.best_of > 0 or not (self.pool or self.proxy), "--pool and --proxy need --best-of N")
        require(self.pool == 0 or self.pool > self.best_of, f"--pool must be more than --best-of, got {self.pool}")


NEEDS = {"sft": [], "reward": ["sft"], "gold": ["sft"], "ppo": ["sft", "reward"], "grpo": ["sft", "reward"],
         "dpo": ["sft", "reward"], "placebo_reward": ["sft"], "placebo": ["sft", "placebo_reward"]}  # fmt: skip


@dataclass
class PipelineConfig(RunConfig):
    """punster run: sft -> reward -> ppo, grpo, dpo, best-of-n -> evaluate -> report. Sections override a verb's defaults."""

    quiet: bool = opt(False, "print nothing but errors")
    scale: float = opt(1.0, "multiplies passes, steps and samples of every stage: .02 is a smoke test", above=0, high=100)
    minutes: float = opt(
        0.0,
        "where the whole would take longer on this machine, scale is lowered until it does not (0: however long it takes); a run "
        "that goes on keeps its own",
        low=0,
    )
    stages: list[str] = opt(["sft", "reward", "gold", "ppo", "grpo", "dpo"], "stages to run, in this order")
    sft: dict[str, Any] = opt({}, "settings of the SFT stage")
    reward: dict[str, Any] = opt({}, "settings of the reward model that is trained against")
    gold: dict[str, Any] = opt({}, "settings of the yardstick reward model")
    ppo: dict[str, Any] = opt({}, "settings of PPO")
    grpo: dict[str, Any] = opt({}, "settings of GRPO")
    dpo: dict[str, Any] = opt({}, "settings of DPO")
    placebo_reward: dict[str, Any] = opt({}, "settings of the reward model with shuffled labels")
    placebo: dict[str, Any] = opt({}, "settings of PPO against the placebo reward model")
    evaluate: dict[str, Any] = opt({}, "settings of the evaluation")

    def __post_init__(self) -> None:
        super().__post_init__()
        for place, stage in enumerate(self.stages):
            require(stage in NEEDS, f"--stages: unknown stage {stage!r}: {', '.join(NEEDS)}")
            for needed in NEEDS[stage]:
                require(needed in self.stages[:place], f"--stages: {stage} needs {needed} before it")
        for needed in ("sft", "gold"):
            require(needed in self.stages, f"--stages: the evaluation needs {needed}")
        require("reward" in self.stages or not self.evaluate.get("best_of"), "--stages: best-of-n needs reward")
