"""Rewards out of Python functions and reward models: weights, and clear errors for whatever people return."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from punster.errors import UserError
from punster.model.role import score_examples
from punster.rewards import Reward, call_reward, load_function
from punster.train.checkpoint import load_run
from punster.train.rows import encode

SOURCE = '''
"""Two rewards."""
SCALE = 2.0
def length(prompts, completions):
    return [len(text) * SCALE for text in completions]
def about(prompts, completions):
    return [float(p in c) for p, c in zip(prompts, completions)]
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(SOURCE)
    return path


def test_functions_are_added_by_weight(file: Path) -> None:
    functions = [load_function(f"{file}:length:0.5"), load_function(f"{file}:about")]
    assert [(name, weight) for name, _, weight in functions] == [("rewards.py:length", 0.5), ("rewards.py:about", 1.0)]
    assert Reward(None, functions)(["a", "b"], ["abc", "xy"], []) == [4.0, 2.0]


def test_model_and_function_are_added(file: Path, reward_run: str) -> None:
    model, tokenizer = load_run(reward_run)
    texts = ["the tide", "a whale of a time"]
    examples = [encode(tokenizer, model.model, {"prompt": "pun: sea", "completion": text}) for text in texts]
    own = score_examples(model, examples)
    mixed = Reward(model, [load_function(f"{file}:length:-0.25")])(["pun: sea"] * 2, texts, examples)
    assert mixed == pytest.approx([own[0] - 0.25 * 16, own[1] - 0.25 * 34], abs=1e-5)


def test_a_reward_needs_a_source() -> None:
    with pytest.raises(UserError, match="a reward is needed"):
        Reward()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "returned 1 numbers for 2 completions"),
        ([1.0, math.nan], "returned nan for 'bb'"),
        ([math.inf, 0.0], "returned inf for 'a'"),
        ([None, 0.0], "returned None for 'a'; expected a number"),
        (["good", 0.0], "returned 'good'"),
        ([[1.0], [2.0]], "expected a number"),
        (5.0, "raised TypeError"),
        (None, "raised TypeError"),
    ],
)
def test_bad_values_name_the_function_and_the_fault(values: Any, message: str) -> None:
    with pytest.raises(UserError, match="reward mine ") as caught:
        call_reward("mine", lambda prompts, completions: values, ["p", "p"], ["a", "bb"])
    assert message in str(caught.value)


def test_a_reward_that_raises_is_named() -> None:
    def mine(prompts: list[Any], completions: list[str]) -> list[float]:
        raise KeyError("score")

    with pytest.raises(UserError, match="reward mine raised KeyError: 'score'"):
        call_reward("mine", mine, ["p"], ["a"])


def test_numbers_of_other_libraries_and_a_hostile_function() -> None:
    import numpy
    import torch

    assert call_reward("n", lambda p, c: numpy.array([1, 2]), ["p"] * 2, ["a", "b"]) == [1.0, 2.0]
    assert call_reward("t", lambda p, c: torch.tensor([0.5, True]), ["p"] * 2, ["a", "b"]) == [0.5, 1.0]

    def greedy(prompts: list[Any], completions: list[str]) -> list[float]:
        prompts.clear()
        completions.clear()
        return [0.0, 0.0]

    prompts, completions = ["p", "q"], ["a", "b"]
    call_reward("g", greedy, prompts, completions)
    assert (prompts, completions) == (["p", "q"], ["a", "b"]), "a reward gets copies of the lists"


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("{file}", "expected FILE.py:FUNCTION"),
        ("{file}:length:2:3", "expected FILE.py:FUNCTION"),
        ("absent.py:length", "there is no file absent.py"),
        ("{file}:length:heavy", "the weight 'heavy' is not a number"),
        ("{file}:length:nan", "the weight must be a finite number, found 'nan'"),
        ("{file}:length:-inf", "the weight must be a finite number, found '-inf'"),
        ("{file}:lenght", "has no function 'lenght' .it has: length, about"),
        ("{file}:SCALE", "has no function 'SCALE'"),
    ],
)
def test_bad_specifications(file: Path, specification: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_function(specification.format(file=file))


def test_a_reward_file_may_have_dataclasses(tmp_path: Path) -> None:
    """With annotations that are texts, which they look up in their module."""
    path = tmp_path / "typed.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Taste:\n    weight: float = 2.0\n"
        "def reward(prompts, completions):\n    return [Taste().weight] * len(completions)\n"
    )
    assert load_function(f"{path}:reward")[1](["p"], ["c"]) == [2.0]


def test_a_file_that_does_not_import(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import absent_library_of_puns\n")
    with pytest.raises(UserError, match=r"importing .*broken.py raised ModuleNotFoundError"):
        load_function(f"{path}:f")
    path.write_text("import sys\nsys.exit(5)\n")
    with pytest.raises(UserError, match=r"importing .*broken.py raised SystemExit: 5"):
        load_function(f"{path}:f")
