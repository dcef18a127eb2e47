"""Surprisal of the pun word at two distances (He, Peng & Liang 2019, arXiv 1904.06828), and how unusual a text is.

S(c) = log p(c with the alternative word) - log p(c with the pun word). A pun surprises locally (S_local > 0: the pun word is
odd among its neighbours) and less so globally (S_global: the whole text supports it). Every context is scored as a text of its
own that follows the token between documents. Log-probs in nats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from punster.data.batch import Example, prefix_batches
from punster.model.role import Role, Trunk
from punster.model.tokenizer import Tokenizer
from punster.rollout.logprobs import token_log_probs

_TOKEN = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
PAPER = (2, 2)  # words of context to the left and to the right of the pun word
CODE = (2, 1)  # the authors' program: its window [p - 2, p + 2) has one word to the right
RAREST = 1e-8  # probability of a word that the frequency list lacks


def find_word(text: str, word: str) -> tuple[int, int] | None:
    """(begin, end) of the last occurrence of a word or phrase as whole words, or of the last word that it begins; None: nowhere."""
    for tail in (r"(?!\w)", r"\w*"):
        found = list(re.finditer(rf"(?<!\w){re.escape(word.strip())}{tail}", text, re.IGNORECASE)) if word.strip() else []
        if found:
            return found[-1].span()
    return None


def replaced(text: str, place: tuple[int, int], word: str) -> str:
    """The text with another word at a place, a capital kept."""
    word = word[:1].upper() + word[1:] if text[place[0]].isupper() else word
    return text[: place[0]] + word + text[place[1] :]


def window(text: str, place: tuple[int, int], reach: tuple[int, int] = PAPER) -> tuple[int, int]:
    """(begin, end) of the pun word with `reach` words and signs (at least one) to its left and right."""
    spans = [match.span() for match in _TOKEN.finditer(text)]
    before = [begin for begin, end in spans if end <= place[0]]
    after = [end for begin, end in spans if begin >= place[1]]
    return min(before[-reach[0] :], default=place[0]), max(after[: reach[1]], default=place[1])


def document_start(tokenizer: Tokenizer) -> int:
    """The token between documents: <|endoftext|> where the vocabulary has it (GPT-2, SmolLM2), else BOS, else EOS."""
    known = tokenizer.hf.get_vocab().get("<|endoftext|>")
    bos = tokenizer.hf.bos_token_id
    return int(known if known is not None else bos if bos is not None else tokenizer.eos_id)


@torch.no_grad()
def example_log_probs(role: Role, examples: Sequence[Example], trunk: Trunk | None = None) -> list[Tensor]:
    """Log-prob of every response token under a role, one (length,) tensor an example."""
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    for rows in prefix_batches(examples, 4096):
        batch = (trunk or Trunk({})).collate(examples, rows, role.model.device)
        logs = token_log_probs(role.response_hidden(batch), role.model.head, batch.targets())
        for row, part in zip(rows, logs.cpu().split(batch.response_lengths.tolist()), strict=True):
            found[row] = part
    return found


def log_probs(role: Role, tokenizer: Tokenizer, texts: Sequence[str]) -> list[float]:
    """log p of whole texts; a text that occurs twice is scored once."""
    limit = role.model.config.max_positions - 1
    start = document_start(tokenizer)
    unique = {text: tuple(tokenizer.text_ids(text)[:limit]) for text in dict.fromkeys(texts)}
    known = [text for text, ids in unique.items() if ids]
    logs = example_log_probs(role, [Example((start,), unique[text]) for text in known])
    sums = dict.fromkeys(unique, 0.0) | {text: float(part.sum()) for text, part in zip(known, logs, strict=True)}
    return [sums[text] for text in texts]


@dataclass(frozen=True)
class Surprisal:
    near: float  # S_local
    far: float  # S_global

    @property
    def ratio(self) -> float:
        """S_local / S_global, -1 unless both are positive. It explodes where S_global is small: clip it before any use as reward."""
        return self.near / self.far if self.near > 0 and self.far > 0 else -1.0


def surprisals(
    role: Role, tokenizer: Tokenizer, rows: Sequence[tuple[str, tuple[int, int], str]], reach: tuple[int, int] = PAPER
) -> list[Surprisal]:
    """S_local and S_global of texts, each with the place of its pun word and the alternative word."""
    contexts: list[str] = []
    for text, place, alternative in rows:
        begin, end = window(text, place, reach)
        near, at = text[begin:end], (place[0] - begin, place[1] - begin)
        contexts += [replaced(near, at, alternative), near, replaced(text, place, alternative), text]
    logs = log_probs(role, tokenizer, contexts)
    return [Surprisal(logs[i] - logs[i + 1], logs[i + 2] - logs[i + 3]) for i in range(0, len(logs), 4)]


def unusualness(log_prob: float, text: str) -> float:
    """-(1 / n) log(p(text) / prod p(word)) over its n words (Pauls & Klein 2012, as He et al. use it)."""
    from wordfreq import word_frequency

    words = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())
    if not words:
        return 0.0
    unigram = sum(math.log(max(word_frequency(word, "en"), RAREST)) for word in words)
    return (unigram - log_prob) / len(words)
