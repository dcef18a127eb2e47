"""Which words a model finds likely in a blank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from wordfreq import zipf_frequency

from punster.api import load
from punster.data.replace import Blank
from punster.model.load import load_model
from punster.model.role import Role
from punster.model.tokenizer import Tokenizer
from punster.rollout.words import FOLLOWING, FUNCTION_WORDS, WordModel, common_words


@pytest.fixture(scope="module")
def role(tiny_llama: Path) -> Role:
    return Role(load_model(str(tiny_llama)))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.load(str(tiny_llama))


def blank(before: str, after: str, *avoid: str) -> Blank:
    return Blank(before, "zzzz", after, frozenset(avoid))


def test_scores_are_those_of_plain_passes(role: Role, tokenizer: Tokenizer) -> None:
    """The order of the words is that of log p(word, next tokens | before), each text in a pass of its own."""
    blanks = [blank("The baker makes a lot of ", " every day of the week."), blank("She was only the ", ".")]
    found = WordModel(role, tokenizer, "make a pun").likely(blanks, 5)
    words = common_words(tokenizer)
    by_word = {word: token for token, word in words.items()}
    asked = tokenizer.prompt_ids("make a pun")
    for place, proposed in zip(blanks, found, strict=True):
        before = [*asked, *tokenizer.text_ids(place.before.rstrip(" "))]

        def value(word: str, place: Blank = place, before: list[int] = before) -> float:
            start = len(asked) + len(tokenizer.text_ids(place.before + word))
            whole = [*asked, *tokenizer.response_ids(place.before + word + place.after)][: start + FOLLOWING]
            logs = role.model.forward(torch.tensor([whole]))[0].log_softmax(-1)
            first = role.model.forward(torch.tensor([before]))[0, -1].log_softmax(-1)[by_word[word]]
            return float(first + sum(logs[at - 1, whole[at]] for at in range(start, len(whole))))

        values = [value(word) for word in proposed]
        assert len(proposed) == 5 and values == sorted(values, reverse=True)


def test_words_that_the_blank_refuses_are_left_out(role: Role, tokenizer: Tokenizer) -> None:
    (first,) = WordModel(role, tokenizer, "make a pun").likely([blank("A lot of ", ".")], 3)
    (second,) = WordModel(role, tokenizer, "make a pun").likely([blank("A lot of ", ".", first[0])], 3)
    assert first[0] not in second


def test_no_blank_no_words(role: Role, tokenizer: Tokenizer) -> None:
    assert WordModel(role, tokenizer, "make a pun").likely([], 3) == []


def test_proposed_words_are_common_whole_and_clean(tokenizer: Tokenizer) -> None:
    words = set(common_words(tokenizer).values())
    assert all(word.isalpha() and word.islower() and len(word) >= 3 for word in words)
    assert not words & {"qzx", "fuck", "shit"}


def test_near_words_by_the_cosine_of_centred_embeddings(role: Role, tokenizer: Tokenizer) -> None:
    known = common_words(tokenizer)
    table = role.model.embedding[list(known)].float()
    centred = table - table.mean(0)
    for place, word in list(enumerate(known.values()))[:3]:
        telling = [i for i, other in enumerate(known.values()) if zipf_frequency(other, "en") < FUNCTION_WORDS]
        cosines = torch.nn.functional.cosine_similarity(centred[telling], centred[place][None])
        wanted = [list(known.values())[telling[i]] for i in cosines.argsort(descending=True)[:3].tolist()]
        assert WordModel(role, tokenizer, "").near(word, 3) == wanted


@pytest.mark.slow
def test_the_default_model_finds_the_plain_word() -> None:
    base = load()
    blanks = [
        blank("The baker quit his job because he couldn't make enough ", ".", "dough"),
        blank("Wet paint on the walls made the whole ", " smell."),
        blank("I noticed that the sun was ", ", and nobody had bothered to look."),
    ]
    words = WordModel(base.role, base.tokenizer, "make a pun")
    found = words.likely(blanks, 4)
    assert "money" in found[0] and {"house", "room", "place"} & set(found[1]) and "shining" in found[2]
    assert {"weary", "exhausted"} <= set(words.near("tired", 6)) and "metal" in words.near("steel", 4)
