"""Token sequences and padded batches. Masks come from lengths and spans, never from comparing ids with a pad id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from punster.model.fused import Paths
    from punster.model.recording import Recording


@dataclass(frozen=True)
class Example:
    """A tokenised prompt and response; the response ends with EOS unless it was cut off."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass
class PrefixTree:
    """The distinct prefixes of a batch, so that what texts begin with in common runs once; no padding runs either.

    Under causal attention a token's state depends on its prefix alone. N nodes, one a distinct prefix: texts of one prompt,
    a pun and its twin, and the template of the prompt format all share theirs.
    """

    nodes: Tensor  # (B, T) node of each token; 0 on pads, of which nothing is read
    first: Tensor  # (N,) index into B * T of the first token at each node
    positions: Tensor  # (1, N) length of the prefix before each node's token
    starts: list[int]  # for each row, the length of the prefix that an earlier row has
    paths: Paths | None = None  # the same as the kernels read it (see `model.fused.Paths`)

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu", left: bool = False) -> PrefixTree:
        """The tree of rows padded on the right, or on the left."""
        longest = max(len(sequence) for sequence in sequences)
        known: dict[tuple[int, int], int] = {}
        nodes = torch.zeros(len(sequences), longest, dtype=torch.long)
        first: list[int] = []
        positions: list[int] = []
        starts: list[int] = []
        for row, sequence in enumerate(sequences):
            node, shared, path = -1, 0, []
            offset = longest - len(sequence) if left else 0
            for place, token in enumerate(sequence):
                key = (node, token)
                if key in known:
                    node, shared = known[key], place + 1
                else:
                    node = known[key] = len(first)
                    first.append(row * longest + offset + place)
                    positions.append(place)
                path.append(node)
            nodes[row, offset : offset + len(path)] = torch.tensor(path)
            starts.append(shared)
        as_tensor = partial(torch.tensor, dtype=torch.long, device=device)
        return cls(nodes.to(device), as_tensor(first), as_tensor(positions)[None], starts)

    def spread(self, x: Tensor) -> Tensor:
        """(1, N, …) per node -> (B, T, …) per token."""
        return x[0].index_select(0, self.nodes.flatten()).view(*self.nodes.shape, *x.shape[2:])

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, …) per token -> (1, N, …) per node: tokens of one node are equal."""
        return x.reshape(-1, *x.shape[2:]).index_select(0, self.first)[None]


@dataclass
class Batch:
    """Right-padded rows [prompt, response, padding]. Causal attention needs no mask: nothing real looks at a pad.

    ids (B, T); prompt_lengths, lengths (B,); trunk: (depth, key) -> (1, N, d) states that roles can go on from; R is the longest
    response of the batch, and per-token quantities of responses are (B, R).
    """

    ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    tree: PrefixTree
    trunk: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    record: Recording | None = None  # of these rows, by the sampler; then the tree is its own

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

    def predictors(self) -> Tensor:
        """(N,) the tree's nodes one position before each response token, row after row: their states predict it."""
        return self.tree.nodes[:, : self.ids.shape[1] - 1][self.response_span()[:, 1:]]

    def scatter(self, flat: Tensor) -> Tensor:
        """(N,) per response token -> (B, R), 0 elsewhere."""
        mask = self.mask
        return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def collate(examples: Sequence[Example], pad_id: int = 0, device: torch.device | str = "cpu") -> Batch:
    """Pad on the right. Any pad id will do, an id that also occurs in texts included."""
    if not all(example.prompt and example.response for example in examples):
        raise ValueError("an example needs at least one prompt token and one response token")
    sequences = [example.prompt + example.response for example in examples]
    ids = pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True, padding_value=pad_id)
    prompts = torch.tensor([len(example.prompt) for example in examples])
    lengths = torch.tensor([example.length for example in examples])
    return Batch(ids.to(device), prompts.to(device), lengths.to(device), PrefixTree.of(sequences, device))


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


def prefix_batches(examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Split row numbers into groups of at most max_tokens distinct prefixes (at least one row), texts that share one together.

    Attention sees padded rows, so a group's padded size is bounded too, at four times as many tokens.
    """
    sequences = [example.prompt + example.response for example in examples]
    groups: list[list[int]] = []
    size = longest = 0
    before: tuple[int, ...] = ()
    for row in sorted(range(len(sequences)), key=lambda row: (sequences[row], row)):
        sequence = sequences[row]
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, sequence, strict=False)) if a != b), min(len(before), len(sequence))
        )
        size, longest = size + len(sequence) - shared, max(longest, len(sequence))
        if not groups or size > max_tokens or (len(groups[-1]) + 1) * longest > 4 * max_tokens:
            groups.append([])
            size = longest = len(sequence)
        groups[-1].append(row)
        before = sequence
    return groups


def epoch_order(rows: int, generator: torch.Generator) -> list[int]:
    """A fresh seeded permutation."""
    return torch.randperm(rows, generator=generator).tolist()
