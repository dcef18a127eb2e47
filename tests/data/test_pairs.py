"""Pairs out of groups and ratings: gaps, caps, recited texts, lengths."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from punster.data import corpus
from punster.data.pairs import from_group, labelled, length_matched, ranked
from punster.data.schema import check_row


def group(scores: list[float], **more: Any) -> dict[str, Any]:
    texts = [" ".join(["word"] * (1 + i % 5) + [str(i)]) for i in range(len(scores))]
    return {"id": "g", "prompt": "make a pun", "source": "s", "licence": "l", "completions": texts, "scores": scores, **more}


def test_pairs_of_a_group_respect_gap_cap_and_order() -> None:
    rows = from_group(group([5.0, 4.6, 4.5, 1.0]), 0.5, 0, random.Random(1))
    assert Counter(row["gap"] for row in rows) == {0.5: 1, 4.0: 1, 3.6: 1, 3.5: 1}
    for row in rows:
        check_row(row, "preference", "here")
        assert row["group"] == "g" and row["prompt"] == "make a pun"
    assert len({row["id"] for row in rows}) == len(rows)
    assert len(from_group(group([5.0, 4.6, 4.5, 1.0]), 0.5, 2, random.Random(1))) == 2
    assert from_group(group([1.0, 1.0]), 0.0, 0, random.Random(1)) == []  # ties are no judgement
    (pair,) = from_group(group([2.0, 1.0], pass_share=0.5), 0.0, 0, random.Random(1))
    assert pair["pass_share"] == 0.5


def test_a_recited_text_is_never_the_better_one() -> None:
    rows = from_group(group([3.0, 2.0, 1.0], recited=[True, False, True]), 0.5, 0, random.Random(1))
    assert [row["id"] for row in rows] == ["g/1-2"]


def test_under_a_cap_the_longer_text_wins_as_often_as_the_shorter() -> None:
    texts = [" ".join(["w"] * n) for n in [3] * 10 + [9] * 4 + [12] * 10 + [2] * 2]  # the better ones are mostly shorter
    scores = [1.0] * 14 + [0.0] * 12
    made = {**group(scores), "completions": texts}
    rows = from_group(made, 0.5, 20, random.Random(1))
    longer = sum(len(row["chosen"].split()) > len(row["rejected"].split()) for row in rows)
    assert len(rows) == 20 and longer == 10


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.floats(0, 5)), min_size=2, max_size=40),
    st.floats(0.1, 2),
    st.integers(1, 4),
    st.integers(0, 30),
)
def test_length_matched_pairs(texts: list[tuple[int, float]], gap: float, cap: int, limit: int) -> None:
    rows = [
        {"id": str(i), "text": " ".join([f"t{i}"] * n), "rating": r, "source": "s", "licence": "l"}
        for i, (n, r) in enumerate(texts)
    ]
    pairs = length_matched(rows, gap, cap, limit, "tell a joke", random.Random(1), "rating")
    used: Counter[str] = Counter()
    rating = {row["text"]: row["rating"] for row in rows}
    for pair in pairs:
        check_row(pair, "preference", "here")
        assert len(pair["chosen"].split()) == len(pair["rejected"].split())
        assert rating[pair["chosen"]] - rating[pair["rejected"]] >= gap - 1e-9
        assert pair["gap"] == pytest.approx(rating[pair["chosen"]] - rating[pair["rejected"]], abs=1e-4)
        used.update([pair["chosen"], pair["rejected"]])
    assert max(used.values(), default=0) <= cap and (not limit or len(pairs) <= limit)
    assert len({pair["id"] for pair in pairs}) == len(pairs)


def test_ranked_triples_of_the_embedded_corpus() -> None:
    triples = [triple for split in ("train", "gold", "val", "test") for triple in corpus.groups(split)]
    assert len(triples) >= 300
    for triple in triples:
        assert check_row(triple, "group", triple["id"])["scores"] == [2, 1, 0]
        assert len(set(triple["completions"])) == 3
    assert len(from_group(triples[0], 1, 0, random.Random(1))) == 3


def test_ranked_groups_lose_recited_texts_and_keep_their_order() -> None:
    found = ranked(group([3.0, 2.0, 1.0], recited=[True, False, False], systems=["a", "b", "c"]))
    assert found["scores"] == [2.0, 1.0] and found["systems"] == ["b", "c"] and "recited" not in found
    assert found["completions"] == group([3.0, 2.0, 1.0])["completions"][1:]
    check_row(found, "judged", "here")
    assert ranked(group([2.0, 1.0])) == group([2.0, 1.0])


def test_labelled_texts_have_their_rating_standardised() -> None:
    rows = [{"text": f"t{i}", "id": str(i), "source": "s", "licence": "l", "is_pun": i < 2, "rating": i} for i in range(5)]
    found = labelled(rows, "rating", "make a pun")
    assert [row["label"] for row in found] == [True, True, False, False, False]
    assert [row["rating"] for row in found] == pytest.approx([-(2**0.5), -(0.5**0.5), 0, 0.5**0.5, 2**0.5], abs=1e-3)
    assert "rating" not in labelled(rows, "is_pun", "make a pun")[0]
    assert labelled([{**rows[0], "is_pun": None}], "rating", "x")[0]["label"] is None


def test_equal_ratings_are_no_judgement_whatever_the_gap() -> None:
    rows = [{"id": str(i), "text": f"text number {i}", "rating": i % 3, "source": "s", "licence": "l"} for i in range(60)]
    pairs = length_matched(rows, 0.0, 5, 0, "p", random.Random(1), "rating")
    assert pairs and all(pair["gap"] > 0 for pair in pairs)
