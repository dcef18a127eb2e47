"""Command lines and configuration files together: which of them wins, and what mistakes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from punster.config import DistillConfig, DpoConfig, EvaluateConfig, GrpoConfig, PpoConfig, RewardConfig, SftConfig
from punster.config.parsing import TRL_NAMES, parse
from punster.errors import UserError


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Configurations by their names."""
    texts = {
        "C": "name: old\nbatch_size: 4\ndata: [theirs.jsonl]\n",
        "D": "batch_size: 5\nlora_r: 2\n",
        "E": "models: [a, b]\nsamples: 2\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return {name: str(tmp_path / name) for name in texts}


def words(line: str, files: dict[str, str]) -> list[str]:
    return ["=".join(files.get(part, part) for part in word.split("=")) for word in line.split()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-b 16 --config C", {"name": "old", "batch_size": 16}),
        ("-b 16 --config=C", {"name": "old", "batch_size": 16}),
        ("-n again --config C -b 16", {"name": "again", "batch_size": 16}),
        ("--config C -n again", {"name": "again", "batch_size": 4}),
        ("--data mine.jsonl --config C", {"data": ["mine.jsonl"]}),
        ("--config C --config D", {"name": "old", "batch_size": 5, "lora_r": 2}),
        ("--config D -n x --config=C", {"name": "x", "batch_size": 4, "lora_r": 2}),
    ],
)
def test_the_command_line_wins_over_files_wherever_it_stands(line: str, expected: dict[str, Any], files: dict[str, str]) -> None:
    found = parse("sft", SftConfig, words(line, files))
    assert {key: getattr(found, key) for key in expected} == expected


def test_the_command_line_turns_off_what_a_file_turns_on(tmp_path: Path) -> None:
    file = tmp_path / "on.yaml"
    file.write_text("quiet: true\nresume: true\n")
    for line, quiet in (
        ("--config F", True),
        ("--config F --no-quiet", False),
        ("--no-quiet --config F", False),
        ("--quiet", True),
    ):
        found = parse("dpo", DpoConfig, words(line, {"F": str(file)}))
        assert (found.quiet, found.resume) == (quiet, "F" in line)
    for key in ("no-quiet", "no_quiet"):
        file.write_text(f"{key}: true\n")
        with pytest.raises(UserError, match=f"unknown key '{key}'.*by `false`"):
            parse("dpo", DpoConfig, ["--config", str(file)])
    with pytest.raises(UserError, match="Did you mean --quiet, "):
        parse("dpo", DpoConfig, ["--quite"])


@pytest.mark.parametrize(
    ("line", "models", "samples"),
    [
        ("--config E", ["a", "b"], 2),
        ("--samples 3 --config E", ["a", "b"], 3),
        ("--config E x", ["x"], 2),
        ("x y --config E", ["x", "y"], 2),
        ("x --conf E y", ["x", "y"], 2),
        ("x -- --config", ["x", "--config"], 4),
        ("--samples 3", [], 3),
    ],
)
def test_models_of_a_file_are_those_unless_there_are_words(
    line: str, models: list[str], samples: int, files: dict[str, str], recwarn: pytest.WarningsRecorder
) -> None:
    found = parse("evaluate", EvaluateConfig, words(line, files), positional=("models",))
    assert (found.models, found.samples) == (models, samples)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--data mine.jsonl --config C stray", "unknown option stray"),
        ("--data mine.jsonl --config=C stray", "unknown option stray"),
        ("-b 16 --config", "expected one argument"),
        ("--config -b 16", "expected one argument"),
    ],
)
def test_words_that_belong_nowhere_are_refused_as_they_were(line: str, expected: str, files: dict[str, str]) -> None:
    with pytest.raises(UserError, match=expected):
        parse("sft", SftConfig, words(line, files))


@pytest.mark.parametrize(
    ("kind", "word", "expected"),
    [
        (SftConfig, "--learning_rate", "--lr"),
        (SftConfig, "--learning-rate=0.1", "--lr"),
        (SftConfig, "--per_device_train_batch_size", "-b/--batch-size"),
        (SftConfig, "--num_train_epochs", "--epochs"),
        (PpoConfig, "--kl_coef", "--beta"),
        (PpoConfig, "--kl-coef", "--beta"),
        (PpoConfig, "--max_new_tokens", "--max-new-tokens"),
        (DpoConfig, "--max_length", "--max-length"),
        (GrpoConfig, "--num_generations", "--samples"),
        (DistillConfig, "--reward_model", "-c/--reward-model"),
    ],
)
def test_names_that_others_use_get_a_hint_and_nothing_more(kind: type, word: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        parse("x", kind, [word, "1"])
    assert str(told.value) == f"unknown option {word}. Did you mean {expected}?"
    key = word.removeprefix("--").partition("=")[0].replace("-", "_")
    if key not in {"max_new_tokens", "max_length", "reward_model"}:
        (tmp_path / "c.yaml").write_text(f"{key}: 1\n")
        with pytest.raises(UserError) as told:
            parse("x", kind, ["--config", str(tmp_path / "c.yaml")])
        right = expected.rpartition("--")[2].replace("-", "_")
        assert str(told.value) == f"unknown key {key!r} in the configuration. Did you mean {right}?"


def test_hints_name_options_that_there_are() -> None:
    from dataclasses import fields

    known = {item.name.replace("_", "-") for kind in (SftConfig, PpoConfig, GrpoConfig) for item in fields(kind)}
    assert set(TRL_NAMES.values()) <= known and not set(TRL_NAMES) & known and len(TRL_NAMES) <= 12
    with pytest.raises(UserError, match=r"unknown option --kl_coef\.(?! Did you mean --beta)"):  # sft has none
        parse("sft", SftConfig, ["--kl_coef", "1"])


def test_the_packages_own_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README names recipes/NAME.yaml, and a wheel has no such folder beside it; a file of one's own comes first."""
    monkeypatch.chdir(tmp_path)
    assert parse("reward", RewardConfig, ["--config", "recipes/reward-human.yaml"]).data == ["human"]
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "reward-human.yaml").write_text("data: [mine.jsonl]\n")
    assert parse("reward", RewardConfig, ["--config", "recipes/reward-human.yaml"]).data == ["mine.jsonl"]
    with pytest.raises(UserError, match=r"recipes/other.yaml"):
        parse("reward", RewardConfig, ["--config", "recipes/other.yaml"])
