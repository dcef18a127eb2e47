"""Contrasts: our own puns beside texts that only look like puns, and words that undo SemEval's puns."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data.test_corpus import ROOT, check

from punster.data import corpus
from punster.data.corpus import CONTRASTS, contrast_rows, records, replacements
from punster.data.mix import build, load_mixture
from punster.data.pool import Pool
from punster.data.replace import chosen_pairs
from punster.data.schema import check_row, texts_of
from punster.data.split import lemma
from punster.errors import UserError

FILE = ROOT / "src" / "punster" / "data" / "contrasts.jsonl"


def test_form_and_length() -> None:
    assert check.contrast_problems(FILE, None) == []


@pytest.mark.slow
def test_no_text_is_taken_from_public_data(punster_data: Path) -> None:
    assert check.contrast_problems(FILE, punster_data) == []


def test_no_pun_word_is_held_out() -> None:
    held_out = {lemma(record["pun_word"].lower()) for record in records() if record["split"] != "train"}
    assert {lemma(row["pun_word"].lower()) for row in contrast_rows("weak")} & held_out == set()


def test_a_replaced_word_is_all_that_differs() -> None:
    rows = contrast_rows("synonym_swap")
    assert len(rows) > 5000
    for row in rows:
        check_row(row, "preference", row["id"])
        before = re.split(rf"(?<!\w){re.escape(row['pun_word'])}(?!\w)", row["chosen"], flags=re.IGNORECASE)
        assert len(before) > 1 and row["rejected"].endswith(before[-1]) and row["rejected"] != row["chosen"]


def test_rows_of_one_record_are_a_family() -> None:
    rows = [row for kind in CONTRASTS for row in contrast_rows(kind)]
    by_group: dict[str, list[Any]] = {}
    for row in rows:
        by_group.setdefault(row["group"], []).append(row)
    for group in by_group.values():
        weak = next(row for row in group if row["kind"] == "weak")
        puns = weak["scores"].count(1)
        assert {row["chosen"] for row in group if "chosen" in row} <= set(weak["completions"][:puns])
        assert weak["id"] == weak["group"] and weak["scores"] == [1] * puns + [0] * (len(weak["completions"]) - puns)


def test_words_were_chosen_by_id() -> None:
    row = {
        "id": "x",
        "text": "The cobbler saved my sole.",
        "pun_word": "sole",
        "alternative_word": "soul",
        "source": "s",
        "licence": "l",
    }
    other = {**row, "id": "y"}
    words = {"x": ["spirit", "souls", "shoe"]}
    pairs = chosen_pairs([row, other], 3, "make a pun", random.Random(1), words)
    assert {pair["rejected"] for pair in pairs} == {"The cobbler saved my spirit.", "The cobbler saved my shoe."}
    assert len(chosen_pairs([row], 1, "make a pun", random.Random(1), words)) == 1
    assert all(2 <= len(words) <= 4 for words in replacements().values())


def test_chosen_words_belong_to_training_puns(punster_data: Path) -> None:
    train = {row["id"]: row for row in Pool(punster_data).rows("semeval2017_task7", "train")}
    assert set(replacements()) <= set(train)
    pairs = chosen_pairs(list(train.values()), 3, "make a pun", random.Random(1), replacements())
    assert len({pair["chosen"] for pair in pairs}) > 0.95 * len(replacements())
    assert Counter(len(texts_of(pair)) for pair in pairs).keys() == {2}


def test_a_mixture_takes_contrasts(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("parts: [{source: contrasts, use: weak, cap: 0, total: 50}, {source: contrasts, use: literal}]\n")
    rows, statement = build(load_mixture(str(recipe)))
    assert statement["not_open"] == []
    made = sum(row["scores"].count(1) * row["scores"].count(0) for row in contrast_rows("weak"))
    assert statement["parts"][0]["available"] == made - sum(statement["parts"][0]["dropped"].values())
    assert sum(row.get("weight", 0) for row in rows) == pytest.approx(50)
    assert {row["group"] for row in rows} <= {row["group"] for row in corpus.contrast_rows("weak")}


@pytest.mark.parametrize(
    "text",
    [
        "split: val\nparts: [{source: contrasts, use: weak}]",
        "kind: sft\nparts: [{source: contrasts}]",
        "parts: [{source: contrasts, use: homophone}]",
        "parts: [{source: davidbau_puns, use: chosen}]",
    ],
)
def test_what_contrasts_are_not_for(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text + "\n")
    with pytest.raises(UserError, match=r"part 1: (contrasts are pairs for training|words were chosen for)"):
        load_mixture(str(tmp_path / "r.yaml"))
