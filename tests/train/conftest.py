"""What the training tests share: a toy corpus, toy rows, an SFT run and a reward run, readers of run folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from punster.data import corpus
from punster.train import setup
from punster.train.sft import sft

PUN_WORDS = (("dough", "doe"), ("tide", "tied"), ("whale", "wail"), ("flour", "flower"), ("sole", "soul"), ("knead", "need"))
SPLITS = ("train", "train", "train", "train", "gold", "val", "test")
TOPICS = ("sea", "bread", "time", "fish", "bank", "bike", "fly")


def toy_records() -> tuple[dict[str, str], ...]:
    """42 short records of the corpus's shape: the embedded texts would not fit into the tiny models' context."""
    records = []
    for number in range(42):
        word, other = PUN_WORDS[number % 6]
        topic = TOPICS[number // 6]
        records.append({
            "id": f"toy-{number}", "topic": topic, "prompt": f"pun: {topic} {number % 6}", "pun": f"the {topic} made {word}.",
            "pun_word": word, "alternative_word": other, "kind": "homophonic", "literal": f"the {topic} was {number}.",
            "synonym_swap": f"the {topic} made it.", "plain": f"my {other} is here.", "weak": f"{topic} and {word}.",
            "split": SPLITS[number // 6],
        })  # fmt: skip
    return tuple(records)


@pytest.fixture(scope="module", autouse=True)
def toy_corpus() -> Iterator[None]:
    """Every test here sees the toy corpus, and no base model of another test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "records", toy_records)
        patch.setattr(setup, "_BASES", {})
        forget_halves()
        yield
    forget_halves()


def forget_halves() -> None:
    """The halves of the contrasts, and the topics that own texts keep off, hang on the corpus."""
    corpus.held_out_topics.cache_clear()
    corpus.contrast_puns.cache_clear()
    corpus.contrast_halves.cache_clear()
    corpus.contrast_rows.cache_clear()


def tiny_options(**more: Any) -> dict[str, Any]:
    return {"quiet": True, "device": "cpu", "dtype": "fp32", "lora_r": 4, "lora_alpha": 8.0, **more}


@pytest.fixture(scope="session")
def options() -> Callable[..., dict[str, Any]]:
    """Settings that every tiny run shares."""
    return tiny_options


@pytest.fixture(scope="session")
def make() -> Callable[..., Any]:
    """make(SftConfig, name=..., ...): a configuration with the tiny settings, as far as the verb knows them."""

    def build(kind: type, **settings: Any) -> Any:
        known = {item.name for item in fields(kind)}
        return kind(**{key: value for key, value in tiny_options(**settings).items() if key in known or key in settings})

    return build


@pytest.fixture(scope="module")
def sft_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, make: Callable[..., Any]) -> str:
    """A short SFT run on the toy corpus."""
    from punster.config import SftConfig

    out = tmp_path_factory.mktemp("sft")
    sft(make(SftConfig, name="sft", out=str(out), model=str(tiny_llama), steps=8, batch_size=8, lr=5e-3, seed=3))
    return str(out / "sft")


@pytest.fixture(scope="module")
def reward_run(tiny_llama: Path, sft_run: str, tmp_path_factory: pytest.TempPathFactory, make: Callable[..., Any]) -> str:
    """A short reward run on the toy corpus, normalised on samples of the SFT run."""
    from punster.config import RewardConfig
    from punster.train.reward import train_reward

    out = tmp_path_factory.mktemp("reward")
    train_reward(make(RewardConfig, name="reward", out=str(out), model=str(tiny_llama), pretrained=sft_run, steps=4, batch_size=8,
                      normalise_samples=32, lr=2e-3))  # fmt: skip
    return str(out / "reward")


# ---- reading run folders ------------------------------------------------------------------------------------------
class Reader:
    """Figures and tensors of a run folder."""

    @staticmethod
    def lines(run: Path | str, name: str = "metrics.jsonl", drop: Sequence[str] = ("seconds",)) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (Path(run) / name).read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in drop} for row in rows]

    @staticmethod
    def values(run: Path | str, metric: str) -> list[float]:
        return [row[metric] for row in Reader.lines(run) if metric in row]

    @staticmethod
    def final(run: Path | str) -> Path:
        return max((Path(run) / "checkpoints").glob("step-*"), key=lambda place: int(place.name.removeprefix("step-")))

    @staticmethod
    def tensor_bytes(run: Path | str) -> dict[str, bytes]:
        """Every safetensors file of the last checkpoint, byte for byte."""
        place = Reader.final(run)
        found = {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*.safetensors"))}
        assert found
        return found

    @staticmethod
    def adapter(run: Path | str, name: str) -> dict[str, Any]:
        return load_file(Reader.final(run) / "adapters" / name / "adapter_model.safetensors")

    @staticmethod
    def summary(run: Path | str) -> dict[str, Any]:
        return json.loads((Path(run) / "summary.json").read_text())

    @staticmethod
    def interrupted_copy(run: Path | str, target: Path, step: int) -> Path:
        """The folder as a run leaves it that was stopped right after the checkpoint of `step`."""
        shutil.copytree(run, target)
        for place in (target / "checkpoints").glob("step-*"):
            if int(place.name.removeprefix("step-")) > step:
                shutil.rmtree(place)
        (target / "summary.json").unlink()
        return target


@pytest.fixture(scope="session")
def reader() -> type[Reader]:
    return Reader
