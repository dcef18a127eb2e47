"""The README's commands and Python, run as they stand (with a tiny model and few steps)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from punster.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TRAINING = ("sft", "reward", "ppo", "grpo", "dpo", "distill")
SHORT = {
    "reward": ["--normalise-samples", "8", "--test-limit", "4"],
    "ppo": ["--eval-prompts", "2", "--max-new-tokens", "8", "-b", "8"],
    "grpo": ["--eval-prompts", "2", "--max-new-tokens", "8"],
    "distill": ["--prompts", "prompts.jsonl", "--max-new-tokens", "30"],
}


def blocks(language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].strip() for block in blocks() for line in block.splitlines()]
    lines = [line.removeprefix(".venv/bin/") for line in lines]
    return [shlex.split(line)[1:] for line in lines if line.startswith("punster ")]


def test_the_readme_has_its_commands() -> None:
    verbs = [command[0] for command in commands()]
    assert {"generate", *TRAINING, "evaluate", "score", "report", "export", "doctor"} <= set(verbs)
    assert "make demo" in README


def test_readme_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    """In order, in an empty folder; a pipeline run of the tiny model stands for `make demo`."""
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text('{"text": "a pun"}\n')
    Path("prompts.jsonl").write_text('{"prompt": "make a pun about bakers"}\n' * 4)
    assert main(["run", "demo", "--model", str(tiny_llama), "--scale", "0.02", "--quiet"]) == 0
    assert (tmp_path / "runs" / "demo" / "report.html").exists()
    for command in commands():
        verb = command[0]
        extra = []
        if verb in TRAINING:
            extra = ["--model", str(tiny_llama), "--steps", "1", "--quiet", *SHORT.get(verb, [])]
        if verb == "evaluate":
            extra = ["--limit", "4", "--samples", "2", "--max-new-tokens", "8"]
        assert main([*command, *extra]) == 0, command


def test_readme_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = next(block for block in blocks("python") if "import punster" in block)
    short = {
        "SftConfig(": "epochs=1, ",
        "RewardConfig(": "normalise_samples=8, test_limit=4, ",
        "PpoConfig(": "steps=1, batch_size=4, eval_prompts=2, max_new_tokens=8, ",
    }
    for name, options in short.items():
        source = source.replace(f"{name}name", f"{name}model={str(tiny_llama)!r}, quiet=True, {options}name")
    exec(compile(source, "README.md", "exec"), {})
    assert "[" in capsys.readouterr().out


def test_readme_reward_function_is_a_reward() -> None:
    source = next(block for block in blocks("python") if "def reward" in block)
    scope: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), scope)
    from punster.rewards import call_reward

    assert call_reward("reward", scope["reward"], ["p", "p"], ["a!", "b"]) == [0.0, 1.0]
