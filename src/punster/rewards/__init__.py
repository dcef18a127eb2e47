"""Rewards: a reward model, any Python function `reward(prompts, completions) -> list of numbers`, or a weighted mix."""

from __future__ import annotations

import importlib.util
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from punster.config.shared import FROM_PYTHON
from punster.data.batch import Example
from punster.errors import UserError
from punster.model.role import Role, Trunk, score_examples

RewardFunction = Callable[[list[Any], list[str]], Sequence[float]]


@dataclass
class Reward:
    """The reward model's score (weight 1) plus the weighted functions; one number for each completion."""

    model: Role | None = None
    functions: list[tuple[str, RewardFunction, float]] = field(default_factory=list)
    timeout: float = 0.0  # seconds that a function may take for one rollout; 0: no limit

    def __post_init__(self) -> None:
        if self.model is None and not self.functions:
            raise UserError("a reward is needed: a reward-model run (-c) or --reward FILE.py:FUNCTION")

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], examples: Sequence[Example], trunk: Trunk | None = None,
        max_tokens: int = 4096,
    ) -> list[float]:  # fmt: skip
        total = [0.0] * len(completions)
        if self.model is not None:
            total = score_examples(self.model, examples, trunk, max_tokens)
        for name, function, weight in self.functions:
            values = call_reward(name, function, prompts, completions, self.timeout)
            total = [t + weight * v for t, v in zip(total, values, strict=True)]
        return total


class _Late(BaseException):
    """Not an Exception, so that a reward that catches those and tries again is stopped too."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise _Late in the block after so many seconds: where the system has alarms, in the main thread."""
    if not seconds or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise _Late

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # once a second from then on, should it be swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def call_reward(
    name: str, function: RewardFunction, prompts: Sequence[Any], completions: Sequence[str], timeout: float = 0.0
) -> list[float]:
    """Call a person's reward and check what comes back; raises UserError naming the function and the fault."""
    try:
        with time_limit(timeout):
            values = list(function(list(prompts), list(completions)))
    except _Late:
        raise UserError(f"reward {name} gave no answer in {timeout:g} seconds (--reward-timeout)") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {name} raised {type(error).__name__}: {error}") from error
    if len(values) != len(completions):
        raise UserError(f"reward {name} returned {len(values)} numbers for {len(completions)} completions")
    numbers = []
    for place, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
            raise UserError(f"reward {name} returned {value!r} for {completions[place]!r}; expected a number") from None
        if not math.isfinite(number):
            raise UserError(f"reward {name} returned {number} for {completions[place]!r}; expected a finite number")
        numbers.append(number)
    return numbers


def load_function(specification: str) -> tuple[str, RewardFunction, float]:
    """FILE.py:FUNCTION[:WEIGHT] -> (name, function, weight)."""
    if specification == FROM_PYTHON:
        raise UserError(
            "this run's reward was a function given from Python; give it again (reward=...), or name its file with --reward"
        )
    parts = specification.split(":")
    if len(parts) not in (2, 3):
        raise UserError(f"--reward {specification!r}: expected FILE.py:FUNCTION or FILE.py:FUNCTION:WEIGHT")
    path = Path(parts[0])
    if not path.is_file():
        raise UserError(f"--reward {specification!r}: there is no file {path}")
    try:
        weight = float(parts[2]) if len(parts) == 3 else 1.0
    except ValueError:
        raise UserError(f"--reward {specification!r}: the weight {parts[2]!r} is not a number") from None
    if not math.isfinite(weight):
        raise UserError(f"--reward {specification!r}: the weight must be a finite number, found {parts[2]!r}")
    spec = importlib.util.spec_from_file_location(f"punster_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--reward {specification!r}: {path} is not a Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends itself, or reads our command line as its own
        raise UserError(f"--reward {specification!r}: importing {path} raised {type(error).__name__}: {error}") from error
    function = getattr(module, parts[1], None)
    if not callable(function):
        known = [name for name in vars(module) if callable(getattr(module, name)) and not name.startswith("_")]
        raise UserError(f"--reward {specification!r}: {path} has no function {parts[1]!r} (it has: {', '.join(known) or 'none'})")
    return f"{path.name}:{parts[1]}", function, weight
