"""Negatives that differ from a pun in the pun word alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from punster.data.mix import build
from punster.data.recipe import load_mixture
from punster.data.replace import blank_of, foreign_pairs
from punster.data.schema import Row
from punster.errors import UserError


def row(text: str, word: str, **more: str) -> Row:
    return {"id": "a", "text": text, "pun_word": word, "is_pun": True, "source": "s", "licence": "l", **more}


@pytest.mark.parametrize(
    ("text", "word", "filled"),
    [
        ("The church needs to be souled.", "souled", "The church needs to be painted."),
        ("Souls are what it feeds.", "souls", "Painted are what it feeds."),
        ("Old pacifists just go to PEACES.", "peaces", "Old pacifists just go to PAINTED."),
        ("Bread is Dough, dough is bread.", "dough", "Bread is Dough, painted is bread."),
        ('He said "I saw a Saw!"', "saw", 'He said "I saw a painted!"'),
        ('He said "Look. Saws!"', "saws", 'He said "Look. Painted!"'),
    ],
)
def test_the_last_whole_word_is_replaced_in_the_case_of_its_place(text: str, word: str, filled: str) -> None:
    blank = blank_of(row(text, word))
    assert blank is not None and blank.filled(blank.word) == text
    assert blank.filled("painted") == filled


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("The souls are here.", "soul"),
        ("No pun here.", ""),
        ("A soul's.", "soul"),
        (" soul music", "soul"),
    ],
)
def test_a_word_that_is_not_there_is_not_found(text: str, word: str) -> None:
    assert blank_of(row(text, word)) is None


def test_neither_the_pun_word_nor_what_it_sounds_like_goes_back() -> None:
    blank = blank_of(row("Thieves know how to steal.", "steal", alternative_word="steel"))
    assert blank is not None
    assert not any(map(blank.takes, ("steal", "stealing", "steel", "steels")))
    assert blank.takes("iron")


def test_foreign_words_have_the_same_ending_and_are_never_the_own() -> None:
    rows = [row(f"Here they are {word}.", word) for word in ("running", "baking", "raised", "dyed", "dough", "flour")]
    rows += [row("All alone it stands: reads.", "reads")]
    pairs = foreign_pairs(rows, 1, "make a pun", random.Random(1))
    found = {pair["pun_word"]: pair["replaced_by"] for pair in pairs}
    assert found["running"] == "baking" and found["baking"] == "running"
    assert found["raised"] == "dyed" and found["dough"] == "flour"
    assert "reads" not in found, "no other word has its ending"


@pytest.mark.parametrize("part", ["{file: a.jsonl, use: foreign}", "{source: embedded, use: foreign, cap: 0}"])
def test_a_part_that_cannot_be_made_is_refused(part: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"parts: [{part}]\n")
    with pytest.raises(UserError, match=r"r\.yaml, part 1: .*(use of a file must be one of|cap must be at least 1)"):
        load_mixture(str(tmp_path / "r.yaml"))


def test_a_mixture_makes_and_guards_replaced_texts(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("parts: [{source: embedded, use: foreign, cap: 2, total: 30}, {source: embedded, use: literal}]\n")
    rows, statement = build(load_mixture(str(recipe)))
    foreign = [found for found in rows if "replaced_by" in found]
    assert statement["parts"][0]["taken"] == len(foreign) > 800
    assert sum(found["weight"] for found in foreign) == pytest.approx(30)
    assert not any("weight" in found for found in rows if "replaced_by" not in found)


def test_words_that_cannot_be_spoken_do_not_stop_a_mixture() -> None:
    rows = [row("He took a 4th.", "4th"), row("He took a bow.", "bow"), row("She ate an egg.", "egg")]
    pairs = foreign_pairs(rows, 4, "make a pun", random.Random(1))
    assert {pair["rejected"] for pair in pairs} == {"He took a bow.", "He took a 4th."}
