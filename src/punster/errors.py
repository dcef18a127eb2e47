"""Errors that are addressed to people: one clear message, no traceback, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Usage or input was wrong; the message says what was found, what was expected and what to do."""


def near_matches(word: str, known: Iterable[str]) -> str:
    """' Did you mean a, b?' for the known words nearest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else ""
