"""Negatives that differ from a pun in the pun word alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from punster.data.mix import build, load_mixture
from punster.data.replace import Blank, blank_of, foreign_pairs, likely_pairs, near_pairs
from punster.data.schema import Row
from punster.errors import UserError


class Words:
    """A proposer that says what it was told to, and remembers what it was asked."""

    def __init__(self, likely: Sequence[str] = (), near: dict[str, list[str]] | None = None) -> None:
        self.words, self.nearest = list(likely), near or {}
        self.asked: list[tuple[list[str], int]] = []

    def likely(self, blanks: Sequence[Blank], count: int) -> list[list[str]]:
        self.asked.append(([blank.word for blank in blanks], count))
        return [self.words[: len(self.words) - place % 2] for place, _ in enumerate(blanks)]

    def near(self, word: str, count: int) -> list[str]:
        assert count >= 6
        return self.nearest[word]


def row(text: str, word: str, **more: str) -> Row:
    return {"id": "a", "text": text, "pun_word": word, "is_pun": True, "source": "s", "licence": "l", **more}


@pytest.mark.parametrize(
    ("text", "word", "filled"),
    [
        ("The church needs to be souled.", "souled", "The church needs to be painted."),
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
        ("Soul food.", "soul"),
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


def test_likely_pairs_take_what_the_model_proposes() -> None:
    words = Words(["money", "bread", "time", "cash"])
    rows = [row("He makes a lot of dough.", "dough"), row("Nothing is located here.", "dough"), row("Her bills are due.", "due")]
    pairs = likely_pairs(rows, 2, "make a pun", random.Random(1), words)
    assert words.asked == [(["dough", "due"], 4)]
    assert [pair["chosen"] for pair in pairs] == ["He makes a lot of dough."] * 2 + ["Her bills are due."] * 2
    assert all(pair["rejected"] == pair["chosen"].replace(pair["pun_word"], pair["replaced_by"]) for pair in pairs)
    assert len({pair["rejected"] for pair in pairs}) == 4 and {pair["prompt"] for pair in pairs} == {"make a pun"}


def test_near_pairs_take_turns_between_the_senses() -> None:
    words = Words(near={"sole": ["sole", "only", "alone"], "soul": ["souls", "spirit"], "mane": ["hair"]})
    rows = [row("The cobbler saved my sole.", "sole", alternative_word="soul"), row("It is the mane thing.", "mane")]
    pairs = near_pairs(rows, 2, "make a pun", random.Random(1), words)
    by_word = [pair["replaced_by"] for pair in pairs]
    assert by_word[0] in ("only", "alone") and by_word[1:] == ["spirit", "hair"]
    assert pairs[1]["rejected"] == "The cobbler saved my spirit."
    assert [pair["replaced_by"] for pair in near_pairs(rows[:1], 1, "", random.Random(1), words)] == by_word[:1]


def test_foreign_words_have_the_same_ending_and_are_never_the_own() -> None:
    rows = [row(f"Here they are {word}.", word) for word in ("running", "baking", "raised", "dyed", "dough", "flour")]
    rows += [row("All alone it stands: reads.", "reads")]
    pairs = foreign_pairs(rows, 1, "make a pun", random.Random(1))
    found = {pair["pun_word"]: pair["replaced_by"] for pair in pairs}
    assert found["running"] == "baking" and found["baking"] == "running"
    assert found["raised"] == "dyed" and found["dough"] == "flour"
    assert "reads" not in found, "no other word has its ending"


@pytest.mark.parametrize("part", ["{file: a.jsonl, use: near}", "{source: embedded, use: foreign, cap: 0}"])
def test_a_part_that_cannot_be_made_is_refused(part: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"parts: [{part}]\n")
    with pytest.raises(UserError, match=r"r\.yaml, part 1: .*(use of a file must be one of|cap must be at least 1)"):
        load_mixture(str(tmp_path / "r.yaml"))


def test_a_mixture_guards_replaced_texts_and_needs_a_model(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("parts: [{source: embedded, use: likely, cap: 2, total: 30}, {source: embedded, use: literal}]\n")
    with pytest.raises(UserError, match="needs a model"):
        build(load_mixture(str(recipe)))
    rows, statement = build(load_mixture(str(recipe)), proposer=Words(["thing", "one", "way"]))
    likely = [found for found in rows if "replaced_by" in found]
    assert statement["parts"][0]["taken"] == len(likely) > 800
    assert sum(found["weight"] for found in likely) == pytest.approx(30)
    assert not any("weight" in found for found in rows if "replaced_by" not in found)


def test_words_that_cannot_be_spoken_do_not_stop_a_mixture() -> None:
    rows = [row("He took a 4th.", "4th"), row("He took a bow.", "bow"), row("She ate an egg.", "egg")]
    pairs = foreign_pairs(rows, 4, "make a pun", random.Random(1))
    assert {pair["rejected"] for pair in pairs} == {"He took a bow.", "He took a 4th."}
