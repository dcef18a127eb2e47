"""Where the pun is, and which word it stands for, when only the sentence is given."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from punster.data.batch import Example
from punster.model.role import Role
from punster.model.tokenizer import Tokenizer
from punster.puns.ambiguity import FUNCTION_WORDS
from punster.puns.phonetics import frequency, homophones, nearest
from punster.puns.surprisal import document_start, example_log_probs, surprisals

Place = tuple[int, int]
_WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)*")
FEATURES = ("last", "place", "zipf", "surprisal", "gain", "homophones", "length")
# Log-linear weights of FEATURES, fitted by scripts/reproduce_pun_metrics.py on the train part of SemEval-2017 task 7.
WEIGHTS = (-0.042, 5.52, -0.953, 1.021, 0.235, 0.301, -2.018)


def candidates(text: str) -> list[Place]:
    """Places of the words that are not function words; of all words where there is no other."""
    places = [match.span() for match in _WORD.finditer(text)]
    found = [p for p in places if p[1] - p[0] > 1 and frequency(text[slice(*p)]) < FUNCTION_WORDS]
    return found or places


def word_log_probs(role: Role, tokenizer: Tokenizer, texts: Sequence[str]) -> list[dict[Place, float]]:
    """For each text its candidates with the log-prob of the word in its left context (of all tokens that overlap it)."""
    start, limit = document_start(tokenizer), role.model.config.max_positions - 1
    encoded = [tokenizer.hf(t, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True) for t in texts]
    logs = example_log_probs(role, [Example((start,), tuple(e.input_ids[:limit])) for e in encoded])
    found = []
    for text, pieces, values in zip(texts, encoded, logs, strict=True):
        at = list(zip(pieces.offset_mapping, values.tolist(), strict=False))
        found.append({(b, e): sum(v for (i, j), v in at if i < e and j > b) for b, e in candidates(text)})
    return found


def features(text: str, logs: dict[Place, float]) -> Tensor:
    """(candidates, FEATURES): last or not, relative place, frequency, surprisal, what context adds, homophones, length."""
    rows = []
    for number, (place, log) in enumerate(logs.items(), 1):
        word = text[slice(*place)]
        zipf = frequency(word)
        unigram = (max(zipf, 1.0) - 9) * math.log(10)
        rows.append([float(number == len(logs)), number / len(logs), zipf, -log, log - unigram, math.log1p(len(homophones(word))), len(word)])  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64) / torch.tensor([1, 1, 1, 10, 10, 1, 10], dtype=torch.float64)


def locate(role: Role, tokenizer: Tokenizer, texts: Sequence[str]) -> list[Place]:
    """The likeliest place of the pun word of each text (which must have a word)."""
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    logs = word_log_probs(role, tokenizer, texts)
    return [list(found)[int((features(text, found) @ weights).argmax())] for text, found in zip(texts, logs, strict=True)]


def alternatives(
    role: Role, tokenizer: Tokenizer, rows: Sequence[tuple[str, Place]], k: int = 10, strictness: float = 20.0
) -> list[str]:
    """The word that each text's pun word stands for: of the k that sound most like it, the one that fits the text best.

    Fit = S_global with that word, less `strictness` x its phonetic distance (nats).
    """
    asked = [(text, place, word, far) for text, place in rows for word, far in nearest(text[slice(*place)], k)]
    found = surprisals(role, tokenizer, [(text, place, word) for text, place, word, _ in asked])
    fits = [s.far - strictness * far for s, (*_, far) in zip(found, asked, strict=True)]
    best = [max(range(i, i + k), key=lambda j: fits[j]) for i in range(0, len(asked), k)]
    return [asked[i][2] for i in best]
