"""What the fault tests share: the fixtures of the training tests, short runs of every stage, and runs in child processes."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a forked child must not wait for the parent's threads
spec = importlib.util.spec_from_file_location("training_fixtures", Path(__file__).parents[1] / "train" / "conftest.py")
assert spec is not None and spec.loader is not None
training = importlib.util.module_from_spec(spec)
spec.loader.exec_module(training)
toy_corpus, options, make, reader = training.toy_corpus, training.options, training.make, training.reader
sft_run, reward_run = training.sft_run, training.reward_run

Job = tuple[Any, Callable[[Any], Any]]
STAGES = ("sft", "reward", "ppo", "grpo", "dpo")


def vowels(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / 10 for text in completions]


@pytest.fixture(scope="module")
def jobs(tiny_llama: Path, sft_run: str, reward_run: str, make: Callable[..., Any]) -> Callable[..., dict[str, Job]]:
    """jobs(out, **settings) -> {stage: (configuration, function)}: five steps of every stage, with all that has a state."""
    from punster.config import DpoConfig, GrpoConfig, PpoConfig, RewardConfig, SftConfig
    from punster.train.dpo import dpo
    from punster.train.grpo import grpo
    from punster.train.ppo import ppo
    from punster.train.reward import train_reward
    from punster.train.sft import sft

    def build(out: Path, **settings: Any) -> dict[str, Job]:
        shared = {"out": str(out), "model": str(tiny_llama), "steps": 4, "save_every": 1, "seed": 5, **settings}
        policy = {**shared, "actor": sft_run, "reward_model": reward_run, "max_new_tokens": 5, "eval_prompts": 2, "eval_every": 2}
        return {
            "sft": (make(SftConfig, **{"eval_every": 2, **shared}, batch_size=5), sft),
            "reward": (make(RewardConfig, **shared, batch_size=4, pretrained=sft_run, normalise_samples=4, test_limit=2), train_reward),
            "ppo": (make(PpoConfig, **policy, batch_size=4, epochs=2, target_kl=0.5, kl_horizon=50), lambda c: ppo(c, None, vowels)),
            "grpo": (make(GrpoConfig, **policy, batch_size=4, samples=2), lambda c: grpo(c, None, vowels)),
            "dpo": (make(DpoConfig, **shared, actor=sft_run, batch_size=4), dpo),
        }  # fmt: skip

    return build


@pytest.fixture(scope="module")
def pipeline(tiny_llama: Path) -> Callable[[Path], Job]:
    """A pipeline of four short stages with evaluation and report."""
    from punster.config import PipelineConfig
    from punster.train.pipeline import run_pipeline

    def train(config: PipelineConfig) -> Path:
        run_pipeline(config)
        return Path(config.out) / config.name

    def build(out: Path) -> Job:
        tiny = {"steps": 2, "batch_size": 4, "lora_r": 4, "save_every": 1, "eval_prompts": 2}
        judge = {**tiny, "normalise_samples": 4, "test_limit": 2}
        return PipelineConfig(
            out=str(out), model=str(tiny_llama), device="cpu", dtype="fp32", quiet=True, seed=5, stages=["sft", "reward", "gold", "ppo"],
            sft=tiny, reward=judge, gold=judge, ppo={**tiny, "max_new_tokens": 5}, evaluate={"limit": 2, "samples": 2, "best_of": 2, "max_new_tokens": 5},
        ), train  # fmt: skip

    return build


def in_child(body: Callable[[], int | None], errors: Path) -> tuple[int, str]:
    """Run a function in a forked process; (exit code, minus the signal if killed; what it wrote to stderr)."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = body() or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), errors.read_text(errors="replace")


@pytest.fixture(scope="session")
def child(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], int | None]], tuple[int, str]]:
    errors = tmp_path_factory.mktemp("child") / "stderr"
    errors.touch()
    errors.chmod(0o666)
    return lambda body: in_child(body, errors)
