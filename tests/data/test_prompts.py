"""Topics, the share of prompts that name the pun word, and held-out topics."""

from __future__ import annotations

from typing import Any

import pytest

from punster.data.prompts import (
    held_out_prompts,
    noun_rank,
    pun_word_share,
    request,
    same_word,
    topic_key,
    topic_of,
    topic_of_context,
    topics_in,
    with_prompts,
)


def test_the_topic_is_a_keyword_without_the_pun_word_else_a_noun() -> None:
    text = "The baker stopped because he could not make enough dough."
    assert topic_of(text, "dough") == "baker"
    assert topic_of(text, "dough", ["dough", "quickly", "bread oven"]) == "bread oven"
    assert topic_of(text, "dough", ["dough ball"]) == "baker"
    assert topic_of("He ran and she sat.", "ran") is None
    assert topic_of(text, "baker") == "dough" and topic_of(text, "bakers") == "dough"
    assert topic_of("A sailor met a baker.", None, avoid=frozenset({"sailor"})) == "baker"
    assert (
        topic_of_context(["always", "hockey players", "terrible chess players", "bears"], "bear")
        == "hockey players and terrible chess players"
    )
    assert topic_of_context(["quickly"], "x") is None


def test_contractions_and_pronouns_are_no_topics() -> None:
    for text in (
        "My electrician won't explain it.",
        "She’ll swim and he'll watch; we'll see.",
        "Nobody can't.",
        "It is five o'clock.",
    ):
        found = topics_in(text, None)
        assert not {"wont", "shell", "hell", "well", "nobody", "cant", "oclock"} & set(found)
    assert topics_in("The 'sailor' saw the dogs' sail's wind.", None) == sorted({"sailor", "dogs", "sail", "wind"}, key=noun_rank)


def test_requests() -> None:
    assert (request("bees"), request(None, "bee"), request(None)) == (
        "make a pun about bees",
        "make a pun with the word bee",
        "make a pun",
    )
    assert same_word("Knives", "knife") and same_word("bakery", "baker") and not same_word("cat", "category")
    assert topic_key("terrible chess players") == "player"


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_at_most_the_given_share_of_prompts_names_the_pun_word(share: float) -> None:
    bare: list[dict[str, Any]] = [
        {"id": str(i), "text": f"He ran {i} and sat.", "pun_word": "ran", "source": "s"} for i in range(50)
    ]
    named = [{"id": f"n{i}", "prompt": "make a pun about knives", "topic": "knives", "completion": f"The knife was sharp {i}.", "pun_word": "knife"}
             for i in range(50)]  # fmt: skip
    rows = with_prompts(bare + named, share=share)
    assert pun_word_share(rows) <= share and len(rows) == 100
    assert pun_word_share(rows) == share  # the room is used
    assert all(row["prompt"] and row["completion"] and "text" not in row for row in rows)


def test_prompts_of_ones_own_stay() -> None:
    own = [{"prompt": prompt, "completion": f"He ran {i} and sat.", "pun_word": "ran"}
           for i, prompt in enumerate(["tell me one", "ran, in a pun", [{"role": "user", "content": "a pun with ran"}]])]  # fmt: skip
    for share in (0.0, 1.0):
        assert [row["prompt"] for row in with_prompts(own, share=share)] == [row["prompt"] for row in own]
    bare = [{"text": f"She ran {i} and sat.", "pun_word": "ran"} for i in range(7)]
    rows = with_prompts([*own, *bare], share=0.5)
    assert [row["prompt"] for row in rows[:3]] == [row["prompt"] for row in own]
    assert [row["prompt"] for row in rows].count("make a pun with the word ran") == 3, "five may, and two of one's own do"


def test_a_prompt_of_the_source_itself_stays_and_held_out_topics_are_avoided() -> None:
    rows = with_prompts(
        [
            {"id": "1", "prompt": "Human: hey Assistant:", "completion": "A baker and a sailor."},
            {"id": "2", "prompt": "make a pun about sailors", "topic": "sailors", "completion": "A baker met a sailor."},
            {"id": "3", "text": "The sailor slept."},
        ],
        frozenset({"sailor"}),
    )
    assert [row["prompt"] for row in rows] == ["Human: hey Assistant:", "make a pun about baker", "make a pun"]


def test_held_out_prompts_have_one_topic_each() -> None:
    rows = [
        {"id": str(i), "source": "s", "text": t}
        for i, t in enumerate(["A baker met a sailor.", "Bakers bake.", "The florist slept."])
    ]
    prompts = held_out_prompts(rows)
    assert len({topic_key(row["topic"]) for row in prompts}) == len(prompts) >= 3
