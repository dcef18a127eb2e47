"""Ambiguity and distinctiveness of a text with two meanings (Kao, Levy & Goodman 2016), in closed form.

The model: a meaning m is drawn, and for each content word w_i whether the writer had m in mind (f_i, even chances); a focused word has
probability p(w_i) exp(r_im) with r its relatedness to m, any other p(w_i). All words are independent given m, hence
  P(m | w) ~ P(m) prod_i (1 + exp r_im) / 2    and    P(f_i = 1 | m, w) = sigmoid(r_im).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from punster.data.batch import Example
from punster.model.role import Role
from punster.model.tokenizer import Tokenizer
from punster.puns.phonetics import frequency, lemma
from punster.puns.surprisal import document_start, example_log_probs

FUNCTION_WORDS = 6.3  # Zipf frequency from which a word says nothing about a topic (the, with, would)
ABOUT, NEUTRAL = "Words that have to do with {}:", "Words:"


@dataclass(frozen=True)
class Meanings:
    ambiguity: float  # entropy of P(m | words), nats
    distinctiveness: float  # symmetrised KL of the two focus distributions, nats


def meanings(relatedness: Tensor, prior: Tensor | None = None) -> Meanings:
    """relatedness (2, n) of each content word to each meaning; prior (2,), even by default."""
    r = relatedness.double()
    logs = torch.nn.functional.softplus(r).sum(1)
    posterior = (logs + (prior.double().log() if prior is not None else 0.0)).log_softmax(0)
    focus = r.sigmoid()
    # KL(q || s) + KL(s || q) of two Bernoullis = (q - s)(logit q - logit s)
    apart = (focus[0] - focus[1]) * (r[0] - r[1])
    return Meanings(float(-(posterior.exp() * posterior).sum()), float(apart.sum()))


def content_words(text: str, without: Sequence[str] = ()) -> list[str]:
    """Words that can speak for a topic, each once, without any form of the given ones."""
    excluded = {lemma(word.lower()) for word in without}
    found = dict.fromkeys(re.findall(r"[a-z]+(?:['’][a-z]+)*", text.lower()))
    return [w for w in found if lemma(w) not in excluded and len(w) > 1 and "'" not in w and frequency(w) < FUNCTION_WORDS]


def relatedness(role: Role, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Pointwise mutual information of (word, meaning) by the language model, in nats: log p(word | a list about it) - log p(word)."""

    start = document_start(tokenizer)  # once: it builds the whole vocabulary

    def example(word: str, context: str) -> Example:
        return Example((start, *tokenizer.text_ids(context)), tuple(tokenizer.text_ids(f" {word}")))

    asked = list(dict.fromkeys([(w, ABOUT.format(m)) for w, m in pairs] + [(w, NEUTRAL) for w, _ in pairs]))
    logs = example_log_probs(role, [example(*question) for question in asked])
    known = {question: float(part.sum()) for question, part in zip(asked, logs, strict=True)}
    return [known[w, ABOUT.format(m)] - known[w, NEUTRAL] for w, m in pairs]


def text_meanings(role: Role, tokenizer: Tokenizer, rows: Sequence[tuple[str, str, str]]) -> list[Meanings]:
    """Of (text, pun word, alternative word): the two words stand for the two meanings."""
    words = [content_words(text, (one, two)) for text, one, two in rows]
    pairs = [(word, m) for found, (_, *both) in zip(words, rows, strict=True) for m in both for word in found]
    values = iter(relatedness(role, tokenizer, pairs)) if pairs else iter(())
    return [meanings(torch.tensor([[next(values) for _ in found] for _ in range(2)]).view(2, -1)) for found in words]
