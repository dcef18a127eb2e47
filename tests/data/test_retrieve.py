"""Plain sentences with a pun's word and topic put in, as negatives (`use: retrieved`)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from punster.data.mix import build
from punster.data.pool import Pool
from punster.data.recipe import Ingredient, Recipe
from punster.data.retrieve import plain_sentences, retrieved_pairs
from punster.errors import UserError

PUN = {"id": "het_1", "source": "semeval2017_task7", "text": "The butcher asked for a shorter hare cut today.",
       "pun_word": "hare", "alternative_word": "hair", "is_pun": True}  # fmt: skip
HOMOGRAPH = {"id": "hom_1", "source": "semeval2017_task7", "text": "The banker lost all his interest in it.",
             "pun_word": "interest", "alternative_word": "interest", "is_pun": True}  # fmt: skip
SENTENCES = [
    "Her mother washed the child's long hair.",
    "Hair grows about a centimetre each month.",
    "They found much interest in the old maps.",
    "A sentence that has neither of the words.",
    "This one is about hair and it goes on and on and on until it is far too long.",
]


def made(rows: list[dict[str, Any]], cap: int = 3, seed: int = 1) -> list[dict[str, Any]]:
    return retrieved_pairs(rows, SENTENCES, cap, "make a pun", random.Random(seed))


def test_the_pun_word_stands_where_the_alternative_stood() -> None:
    pairs = made([PUN])
    assert {pair["chosen"] for pair in pairs} == {PUN["text"]} and len(pairs) == 2, "the long sentence is not near in length"
    for pair in pairs:
        assert "hare" in pair["rejected"].lower() and "hair" not in pair["rejected"].lower()
        assert pair["prompt"] == "make a pun" and pair["pun_word"] == "hare" and pair["source"] == "semeval2017_task7"
    assert any(pair["rejected"].startswith("Hare ") for seed in range(9) for pair in made([PUN], seed=seed)), "a capital stays"


def test_the_word_stays_where_both_are_one_and_some_get_a_word_of_the_pun() -> None:
    found = [pair["rejected"] for seed in range(30) for pair in made([HOMOGRAPH], seed=seed)]
    assert all("interest" in text for text in found)
    plain, topical = [text for text in found if text in SENTENCES], [text for text in found if text not in SENTENCES]
    assert plain and topical
    assert all({"banker", "lost"} & set(text.lower().split()) for text in topical)


def test_pairs_are_drawn_by_seed_and_capped() -> None:
    assert made([PUN, HOMOGRAPH]) == made([PUN, HOMOGRAPH])
    assert len(made([PUN], cap=1)) == 1
    assert made([{**PUN, "pun_word": None}]) == [] and made([{**PUN, "pun_word": "zebra", "alternative_word": "zebras"}]) == []


def test_a_recipe_takes_sentences_of_training_texts_that_are_no_puns(punster_data: Path) -> None:
    pool = Pool(punster_data)
    found = plain_sentences(pool)
    puns = {row["text"] for row in pool.rows("semeval2017_task7", "train") if row["is_pun"]}
    held_out = {row["text"] for row in pool.rows("semeval2017_task7", "val")}
    assert found and not (puns | held_out) & set(found)
    recipe = Recipe(
        parts=[Ingredient(source="semeval2017_task7", use="retrieved", cap=2, generic=True, total=100.0)], guard=False
    )
    rows, statement = build(recipe, punster_data)
    assert rows and sum(row["weight"] for row in rows) == pytest.approx(100)
    assert {row["prompt"] for row in rows} == {"make a pun"} and {row["chosen"] for row in rows} <= puns
    (part,) = statement["parts"]
    assert "MIT" in part["licence"] and "none stated" in part["licence"] and not part["open"], "of the sentences, too"


def test_no_plain_text_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "has", lambda self, name: False)
    with pytest.raises(UserError, match="needs plain texts of crowdtruth_shorttext, hh_rlhf, semeval2017_task7; found: none"):
        plain_sentences(Pool(tmp_path))
