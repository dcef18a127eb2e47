"""Halves of judged rows share no text and no pun word, whatever ties the rows and in whatever order they come."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from punster.config import RewardConfig
from punster.data.corpus import contrast_rows
from punster.errors import UserError
from punster.train.halves import halves_of
from punster.train.judged import source_of
from punster.train.reward import train_reward
from punster.train.rows import load_rows


def pair(chosen: str, rejected: str, **more: str) -> dict[str, Any]:
    return {"prompt": "p", "chosen": chosen, "rejected": rejected, "source": "s", **more}


NOUNS = [
    "tide",
    "sole",
    "whale",
    "bank",
    "bike",
    "fly",
    "baker",
    "sailor",
    "clock",
    "apple",
    "river",
    "stone",
    "candle",
    "garden",
    "window",
    "table",
    "pencil",
    "farmer",
    "doctor",
    "lawyer",
]
FORMS = [(word, f"{word}s".title()) for word in NOUNS] * 3  # the third of each is the same pair again


# Rows that must go together, by every way in which rows are tied; {n} makes many of each that share nothing else.
TIED = {
    "pun word in two forms": lambda n: [pair(f"a{n}", f"b{n}", pun_word=FORMS[n][0]), pair(f"c{n}", f"d{n}", pun_word=FORMS[n][1])],
    "word evoked": lambda n: [
        pair(f"a{n}", f"b{n}", pun_word=f"wug{n}", alternative_word=f"dax{n}"), pair(f"c{n}", f"d{n}", pun_word=f"dax{n}")
    ],
    "two words of one text": lambda n: [
        pair(f"a{n} b", f"b{n}", pun_word=f"wug{n}"), pair(f"a{n} b", f"c{n}", pun_word=f"dax{n}"), pair(f"e{n}", f"f{n}", pun_word=f"dax{n}")
    ],
    "the plain twin of two puns": lambda n: [pair(f"a{n}", f"plain {n}", pun_word=f"wug{n}"), pair(f"b{n}", f"plain {n}", pun_word=f"dax{n}")],
    "a labelled text": lambda n: [pair(f"A{n}, tide!", f"b{n}"), {"prompt": "q", "completion": f"tide a{n}", "label": True, "source": "s"}],
    "a group": lambda n: [pair(f"a{n}", f"b{n}", group=f"g{n}"), pair(f"c{n}", f"a{n}", group=f"g{n}"), pair(f"e{n}", f"f{n}", group=f"g{n}")],
    "a ranked group": lambda n: [
        {"prompt": "p", "completions": [f"a{n}", f"b{n}"], "scores": [1, 0], "source": "s", "id": f"r{n}"}, pair(f"b{n}", f"c{n}")
    ],
}  # fmt: skip


@pytest.mark.parametrize("tie", TIED)
def test_what_is_tied_stays_together(tie: str) -> None:
    bundles = [TIED[tie](n) for n in range(60)]
    rows = [row for bundle in bundles for row in bundle]
    found = dict(zip(map(id, rows), halves_of(rows), strict=True))
    halves = [{found[id(row)] for row in bundle} for bundle in bundles]
    assert all(len(each) == 1 for each in halves) and {1, 2} == set().union(*halves)
    assert 15 < sum(each == {1} for each in halves) < 45
    mixed = rows[:]
    random.Random(1).shuffle(mixed)
    assert dict(zip(map(id, mixed), halves_of(mixed), strict=True)) == found, "whatever the order"


def test_pairs_of_texts_that_are_rated_apart_stay_only_within_a_half() -> None:
    texts = [pair(f"a{n} tide", f"b{n} fact", pun_word=f"wug{n}") for n in range(40)]
    across = [pair(texts[a]["chosen"], texts[b]["chosen"]) for a in range(40) for b in range(40) if a != b]
    found = halves_of([*texts, *across])
    assert {1, 2} == set(found[:40]), "they tie nothing"
    for row, half in zip(across, found[40:], strict=True):
        two = {found[n] for n in range(40) if texts[n]["chosen"] in (row["chosen"], row["rejected"])}
        assert half == (two.pop() if len(two) == 1 else 0)


def test_own_pairs_are_known_by_their_records(toy_corpus: None, tmp_path: Path) -> None:
    """The embedded corpus's pairs have ids in the place of words; rows of other sources with such an id are not taken for them."""
    from punster.data import corpus

    rows = corpus.preference_rows(("literal",), "train")
    words = {record["id"]: {record["pun_word"], record["alternative_word"]} for record in corpus.records()}
    found = halves_of(rows)
    assert all(half > 0 for half in found)
    one, two = (
        {word for row, half in zip(rows, found, strict=True) if half == side for word in words[row["id"]]} for side in (1, 2)
    )
    assert one and two and not one & two
    mine = [
        {key: value for key, value in row.items() if key != "source"}
        for row in (pair("a", "b"), pair("c", "d", id=rows[0]["id"]))
    ]
    assert [source_of(row) for row in (rows[0], *mine)] == ["embedded", "", ""]
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b", "kind": "literal"}) + "\n")
    assert [source_of(row) for row in load_rows([str(file)], "judged", quiet=True)] == [""], "a column of that name"
    strange = [pair(f"x{n}", f"y{n}", id=rows[0]["id"]) for n in range(40)]
    assert {1, 2} == set(halves_of(strange))


def test_contrasts_fall_into_equal_halves() -> None:
    rows = [*contrast_rows("synonym_swap"), *contrast_rows("literal")]
    found = halves_of(rows)
    assert 0 not in found and 0.45 < found.count(1) / len(rows) < 0.55


def test_a_reward_model_learns_from_its_half_and_without_what_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [
        pair(f"{word} tide", f"a {word} fact", pun_word=word)
        for word in ("wail", "tail", "tied", "sea", "dough", "sole", "knead")
    ]

    def taken(name: str, **more: Any) -> int:
        config = RewardConfig(
            name=name, out=str(tmp_path), model=str(tiny_llama), **{"steps": 1, "normalise_samples": 0, "quiet": True, **more}
        )
        folder = train_reward(config, [*rows, {**rows[0], "source": "other"}])
        assert folder is not None
        return int(json.loads((folder / "summary.json").read_text())["pairs"])

    one, two = taken("h1", half=1), taken("h2", half=2)
    assert one + two == 8 and min(one, two) > 0
    assert taken("w", without=["other"]) == 7
    with pytest.raises(UserError, match="no row is left without other, s"):
        taken("x", without=["other", "s"])
    with pytest.raises(UserError, match=r"--without othr: no row is of this source. Did you mean other\? Found: other, s"):
        taken("x", without=["othr"])
    with pytest.raises(UserError, match="--half is of --data"):
        taken("x", half=1, pretrain=["votes"])
    votes = tmp_path / "votes.jsonl"
    votes.write_text(
        "".join(json.dumps(pair(f"{n} tide", f"{n} fact", source=("votes", "jokes")[n % 2])) + "\n" for n in range(4))
    )
    more = {"pretrain": [str(votes)], "steps": 2}
    assert [taken(f"p{n}", without=[name], **more) for n, name in enumerate(("votes", "other"))] == [8, 7], "of either list"
    with pytest.raises(UserError, match=r"--without vote: no row .* Did you mean votes.* Found: jokes, other, s, votes"):
        taken("x", without=["vote"], **more)
    assert not (tmp_path / "x").exists()
