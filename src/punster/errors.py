"""Errors that are addressed to people (one clear message, no traceback, exit code 2), and notes."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from functools import partial


class UserError(Exception):
    """Usage or input was wrong; the message says what was found, what was expected and what to do."""


class Aborted(Exception):
    """Training went wrong and was stopped; the run holds its last good step. Exit code 1, no traceback."""


def near_matches(word: str, known: Iterable[str]) -> str:
    """' Did you mean a, b?' for the known words nearest to `word`, or an empty string."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    # A long name may be meant by its beginning: compare with as much of each last part as was typed.
    short = {name.split("/")[-1].lower()[: len(word) + 1]: name for name in reversed(names)}
    close += [short[key] for key in difflib.get_close_matches(word.lower(), list(short), n=3, cutoff=0.7)]
    return f" Did you mean {', '.join(dict.fromkeys(close[:3]))}?" if close else ""


def speaker(quiet: bool) -> Callable[[str], None]:
    """For notes to the user: none under --quiet."""
    if quiet:
        return lambda line: None
    return partial(print, file=sys.stderr)
