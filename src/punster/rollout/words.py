"""What a model has to say about words: likely in the blank of a text, by what stands around it, and near to another in meaning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from wordfreq import zipf_frequency

from punster.data.batch import Example, collate, prefix_batches
from punster.data.offence import is_profane
from punster.data.replace import Blank
from punster.model.role import Role
from punster.model.tokenizer import Tokenizer
from punster.rollout.logprobs import chunks, log_softmax, target_log_probs

COMMON = 3.3  # Zipf frequency from which on a word may be proposed: once in half a million words
LOOKED_AT = 40  # of the likeliest words by what stands before
FOLLOWING = 4  # tokens after the blank that a word is also judged by
FUNCTION_WORDS = 5.9  # Zipf frequency from which on a word is near to everything and means little


@dataclass
class WordModel:
    """The base as a `data.replace.Proposer`; blanks are read as answers to `prompt`."""

    role: Role
    tokenizer: Tokenizer
    prompt: str

    @torch.no_grad()
    def likely(self, blanks: Sequence[Blank], count: int) -> list[list[str]]:
        """At most `count` words a blank, likeliest first: log p(word | before) + log p(next tokens | before, word).

        Common words of one token only, none that the blank refuses. Twice `count` are judged by what follows.
        """
        if not blanks:
            return []
        asked = tuple(self.tokenizer.prompt_ids(self.prompt))
        known = common_words(self.tokenizer)
        allowed = torch.zeros(self.role.model.config.vocab_size, dtype=torch.bool)
        allowed[list(known)] = True
        before = [Example(asked, tuple(self.tokenizer.text_ids(blank.before.rstrip(" ")))) for blank in blanks]
        candidates: list[list[tuple[str, float]]] = []
        states = self._states(before)
        for part in chunks(len(blanks)):
            logs = log_softmax(self.role.model.head, states[part], 1.0)
            best = logs.masked_fill(~allowed.to(logs.device), -torch.inf).topk(min(LOOKED_AT, len(known)))
            for blank, values, ids in zip(blanks[part], best.values.tolist(), best.indices.tolist(), strict=True):
                fitting = [(known[token], value) for token, value in zip(ids, values, strict=True) if blank.takes(known[token])]
                candidates.append(fitting[: 2 * count])
        after = iter(self._following(asked, blanks, candidates))
        ranked = [sorted(((value + next(after), word) for word, value in words), reverse=True) for words in candidates]
        return [[word for _, word in words[:count]] for words in ranked]

    def _states(self, examples: Sequence[Example]) -> Tensor:
        """(n, d) states after the last token of each text."""
        states: list[Tensor] = [torch.empty(0)] * len(examples)
        for rows in prefix_batches(examples, 4096):
            batch = collate([examples[row] for row in rows], device=self.role.model.device)
            for row, state in zip(rows, self.role.pooled(batch), strict=True):
                states[row] = state
        return torch.stack(states)

    def _following(
        self, asked: tuple[int, ...], blanks: Sequence[Blank], candidates: Sequence[Sequence[tuple[str, float]]]
    ) -> list[float]:
        """For each candidate of each blank the log-probability of the tokens that follow it, FOLLOWING of them at most."""
        examples, firsts = [], []
        for blank, words in zip(blanks, candidates, strict=True):
            for word, _ in words:
                firsts.append(len(asked) + len(self.tokenizer.text_ids(blank.before + word)))
                whole = self.tokenizer.response_ids(blank.before + word + blank.after)
                examples.append(Example(asked, tuple(whole[: firsts[-1] - len(asked) + FOLLOWING])))
        sums = [0.0] * len(examples)
        for rows in prefix_batches(examples, 4096):
            batch = collate([examples[row] for row in rows], device=self.role.model.device)
            spans = [(place, row, at) for place, row in enumerate(rows) for at in range(firsts[row], examples[row].length)]
            nodes = [int(batch.tree.nodes[place, at - 1]) for place, _, at in spans]
            targets = torch.tensor([int(batch.ids[place, at]) for place, _, at in spans], device=self.role.model.device)
            states = self.role.model.final_norm(self.role.nodes(batch)[0][nodes])
            for part in chunks(len(spans)):
                logs, _ = target_log_probs(self.role.model.head, states[part], targets[part], 1.0, False)
                for (_, row, _), value in zip(spans[part], logs.tolist(), strict=True):
                    sums[row] += value
        return sums

    def near(self, word: str, count: int) -> list[str]:
        """By the cosine between input embeddings less their mean (of a word of several tokens: their average)."""
        words, units, mean = self._meanings
        tokens = self.tokenizer.text_ids(f" {word}")
        query = F.normalize(self.role.model.embedding[tokens].float().mean(0) - mean, dim=0)
        return [words[place] for place in (units @ query).topk(min(count, len(words))).indices.tolist()]

    @cached_property
    def _meanings(self) -> tuple[list[str], Tensor, Tensor]:
        """The words that may be proposed, their unit vectors (n, d), and the mean embedding (d,) of all common words."""
        known = common_words(self.tokenizer)
        embeddings = self.role.model.embedding[list(known)].float()
        mean = embeddings.mean(0)
        telling = [place for place, word in enumerate(known.values()) if zipf_frequency(word, "en") < FUNCTION_WORDS]
        words = list(known.values())
        return [words[place] for place in telling], F.normalize(embeddings[telling] - mean, dim=1), mean


def common_words(tokenizer: Tokenizer) -> dict[int, str]:
    """Token -> word, of the tokens that are a space and a common lower-case word of at least three letters."""
    tokens = tokenizer.hf.convert_ids_to_tokens(range(len(tokenizer.hf)))
    words = {place: found[1] for place, token in enumerate(tokens) if (found := re.fullmatch(r"[Ġ▁ ]([a-z]{3,})", token or ""))}
    return {place: word for place, word in words.items() if zipf_frequency(word, "en") >= COMMON and not is_profane(word)}
