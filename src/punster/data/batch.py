"""Token sequences and padded batches. Masks come from lengths and spans, never from comparing ids with a pad id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """A tokenised prompt and response; the response ends with EOS unless it was cut off."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass
class Batch:
    """Right-padded rows [prompt, response, padding]. Causal attention needs no mask: nothing real looks at a pad.

    ids (B, T); prompt_lengths, lengths (B,); trunk: depth -> (B, T, d) activations of the plain base; R is the longest
    response of the batch, and per-token quantities of responses are (B, R).
    """

    ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    trunk: dict[int, Tensor] = field(default_factory=dict)
    trunk_keys: dict[int, str] = field(default_factory=dict)

    @property
    def response_lengths(self) -> Tensor:
        return self.lengths - self.prompt_lengths

    @property
    def mask(self) -> Tensor:
        """(B, R) true where a response token is."""
        longest = int(self.response_lengths.max())
        return torch.arange(longest, device=self.ids.device)[None] < self.response_lengths[:, None]

    def response_span(self) -> Tensor:
        """(B, T) true on the response tokens themselves."""
        at = torch.arange(self.ids.shape[1], device=self.ids.device)[None]
        return (at >= self.prompt_lengths[:, None]) & (at < self.lengths[:, None])

    def targets(self) -> Tensor:
        """(N,) ids of all response tokens, row after row."""
        return self.ids[self.response_span()]

    def select_predictors(self, hidden: Tensor) -> Tensor:
        """(B, T, d) -> (N, d): the states one position before each response token (those that predict it)."""
        return hidden[:, :-1][self.response_span()[:, 1:]]

    def scatter(self, flat: Tensor) -> Tensor:
        """(N,) per response token -> (B, R), 0 elsewhere."""
        mask = self.mask
        return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def collate(examples: Sequence[Example], pad_id: int = 0, device: torch.device | str = "cpu") -> Batch:
    """Pad on the right. Any pad id will do, an id that also occurs in texts included."""
    longest = max(example.length for example in examples)
    ids = torch.full((len(examples), longest), pad_id, dtype=torch.long)
    for row, example in enumerate(examples):
        if not example.prompt or not example.response:
            raise ValueError("an example needs at least one prompt token and one response token")
        ids[row, : example.length] = torch.tensor(example.prompt + example.response)
    prompts = torch.tensor([len(example.prompt) for example in examples])
    lengths = torch.tensor([example.length for example in examples])
    return Batch(ids.to(device), prompts.to(device), lengths.to(device))


def token_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split row numbers into groups of similar length whose padded size stays within max_tokens (at least one row)."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    groups: list[list[int]] = []
    for row in order:
        if groups and lengths[row] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def epoch_order(rows: int, generator: torch.Generator) -> list[int]:
    """A fresh seeded permutation."""
    return torch.randperm(rows, generator=generator).tolist()
