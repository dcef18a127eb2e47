"""Near-duplicates: the index against brute force, groups, repeats, and its speed."""

from __future__ import annotations

import random
import time
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from punster.data.leakage import Index, jaccard, near_groups, without_repeats, words

sets_of_words = st.lists(st.frozensets(st.sampled_from([f"w{i}" for i in range(12)]), max_size=9), max_size=25)


@settings(max_examples=60, deadline=None)
@given(sets_of_words, st.sampled_from([0.05, 0.3, 0.5, 0.6, 2 / 3, 0.7, 0.9, 1.0]))
def test_the_index_finds_what_comparing_all_pairs_finds(sets: list[frozenset[str]], threshold: float) -> None:
    expected = {(a, b) for a, b in combinations(range(len(sets)), 2) if sets[a] and jaccard(sets[a], sets[b]) >= threshold}
    index = Index(sets, threshold)
    assert {(min(pair), max(pair)) for pair in index.pairs()} == expected
    for query in sets[:5]:
        near = [i for i, other in enumerate(sets) if query and other and jaccard(query, other) >= threshold]
        assert index.near(query) == near


def test_words_are_alike_however_a_text_was_tokenised() -> None:
    assert words("Don't stop!") == words("don ' t stop") == words("DON T STOP .") == {"don", "t", "stop"}
    assert words("...") == frozenset() and not Index([frozenset()]).has_near("...")


def test_groups_by_likeness_and_by_lemma_and_chains_of_both() -> None:
    texts = ["the cat sat on a mat", "the cat sat on a hat", "bread rises early", "a boat sails at noon", "nothing at all"]
    assert near_groups(texts) == [0, 0, 2, 3, 4]
    assert near_groups(texts, ["cat", None, "dough", "cat", None]) == [0, 0, 2, 0, 4]


def test_repeats_are_judged_by_what_remains() -> None:
    chain = ["a b c d e f g h", "a b c d e f g x", "a b c d e f y x"]  # the third is near to the second only
    assert without_repeats(chain, 0.75) == [0, 2]


@pytest.mark.slow
def test_eighty_thousand_short_texts_in_a_minute() -> None:
    """Words by Zipf's law, 5 to 25 a text, with planted near-duplicates. CPU seconds, for the machine may be busy."""
    draw = random.Random(1)
    vocabulary = [f"w{i}" for i in range(30_000)]
    weights = [1 / (i + 3) for i in range(30_000)]
    texts = [" ".join(draw.choices(vocabulary, weights, k=draw.randint(5, 25))) for _ in range(79_000)]
    planted = [text + " planted" for text in texts[:1_000]]
    started = time.process_time()
    groups = near_groups([*texts, *planted])
    seconds = time.process_time() - started
    assert all(groups[79_000 + i] == groups[i] for i in range(1_000) if len(words(texts[i])) > 2)
    assert seconds < 60
