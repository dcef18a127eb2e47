"""Two policies of the field as baselines, on our own sampler and data: SurGen (He et al. 2019) and joint decoding (Yu et al. 2018)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from punster.model.role import Role
from punster.model.tokenizer import Tokenizer
from punster.puns.ambiguity import ABOUT, content_words
from punster.puns.surprisal import document_start, find_word, log_probs, replaced
from punster.rollout.sampler import Decoding, generate
from punster.rollout.search import joint_decode

SENSE = "Write one short sentence with the word {}, about {}."


def retrieve(sentences: Sequence[str], alternative: str, most: int = 5) -> list[str]:
    """Sentences with the alternative word, the later it stands the better (a pun word does its work at the end)."""
    pattern = re.compile(rf"(?<!\w){re.escape(alternative)}(?!\w)", re.IGNORECASE)
    found = [(found_at.start() / len(s), s) for s in sentences if (found_at := pattern.search(s))]
    return [sentence for _, sentence in sorted(found, reverse=True)[:most]]


def swap(sentence: str, pun_word: str, alternative: str) -> str:
    """The sentence with the pun word in the place of the alternative word: half a pun."""
    place = find_word(sentence, alternative)
    return replaced(sentence, place, pun_word) if place else sentence


def topic_words(role: Role, tokenizer: Tokenizer, word: str, generator: torch.Generator, samples: int = 8) -> list[str]:
    """Words that the model lists as having to do with a word."""
    ids = [document_start(tokenizer), *tokenizer.text_ids(ABOUT.format(word))]
    rollout = generate(role, [ids], Decoding(12), tokenizer.eos_id, generator, samples)
    listed = [w for e in rollout.examples for w in content_words(tokenizer.decode(e.response).split("\n")[0], [word])]
    return sorted(dict.fromkeys(listed), key=lambda w: -listed.count(w))[:6]


def surgen(
    role: Role, tokenizer: Tokenizer, sentences: Sequence[str], pun_word: str, alternative: str, generator: torch.Generator
) -> str | None:
    """Retrieve, swap, put a topic word of the pun word early in the sentence, smooth; None where nothing is retrieved.

    The smoother is the language model's choice among all places and topic words (theirs is a trained edit model).
    """
    topics = topic_words(role, tokenizer, pun_word, generator)
    options = []
    for sentence in retrieve(sentences, alternative):
        swapped = swap(sentence, pun_word, alternative)
        place = find_word(swapped, pun_word)
        early = [find_word(swapped, w) for w in content_words(swapped, [pun_word])]
        spots = [p for p in early if p and place and p[1] < place[0]][:2]
        options += [replaced(swapped, spot, topic) for spot in spots for topic in topics] or [swapped]
    if not options:
        return None
    scores = [score / max(1, len(text)) for score, text in zip(log_probs(role, tokenizer, options), options, strict=True)]
    return options[max(range(len(options)), key=lambda i: scores[i])]


def joint(
    role: Role, tokenizer: Tokenizer, pun_word: str, senses: tuple[str, str], generator: torch.Generator, new_tokens: int = 32
) -> str:
    """A sentence with the pun word that fits both senses, decoded under both at once."""
    prompts = [tokenizer.prompt_ids(SENSE.format(pun_word, sense)) for sense in senses]
    return tokenizer.decode(joint_decode(role, prompts, Decoding(new_tokens), tokenizer.eos_id, generator))
