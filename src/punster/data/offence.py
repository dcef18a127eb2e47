"""What is left out as offensive: by the source's own ratings where it has them, and by a list of words for rude sources."""

from __future__ import annotations

from functools import cache

from punster.data.schema import Row, texts_of

VOTES = 2  # of five people who called a text offensive (ExPUNations)
RATING = 1.0  # mean offence from 0 to 5 (HaHackathon)


@cache
def is_profane(text: str) -> bool:
    """Does the text contain a profane word, also in disguise (letters replaced, spaced out)?"""
    from pyobscenity import check

    return bool(check(text))


def offensive(row: Row, word_list: bool) -> str | None:
    """Why a row is left out, or None."""
    if row.get("offensive", 0) >= VOTES:
        return "called offensive by annotators"
    if row.get("offence", 0.0) >= RATING:
        return "rated offensive"
    if word_list and any(map(is_profane, texts_of(row))):
        return "profane words"
    return None
