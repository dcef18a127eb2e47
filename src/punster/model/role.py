"""A role is a view of the one base: its stack of adapters, and perhaps a scalar head that reads at some depth.

Policy, reference, critic and reward model are roles. Two roles share the *trunk*, the layers below the lowest adapter
of either, through `Trunk`: activations that were computed once and are handed to each role's branch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from punster.data.batch import Batch, Example, collate, prefix_batches
from punster.model.heads import ScalarHead
from punster.model.lora import Adapter, merged_weights
from punster.model.transformer import Decoder


@dataclass
class Role:
    model: Decoder
    adapters: tuple[Adapter, ...] = ()
    head: ScalarHead | None = None
    depth: int = 0  # layers that run before the read-out; 0 means all of them
    pooling: str = "last"  # a score reads the state at the last real token, or the "mean" over the response
    normalisation: tuple[float, float] = (1.0, 0.0)  # gain and offset that make SFT samples mean 0, std 1
    trained: tuple[str, ...] = field(default=())  # names of the adapters that this role trains
    aux: dict[str, ScalarHead] = field(default_factory=dict)  # read the same state in training; no part of the score
    others: tuple[Role, ...] = ()  # further members of an ensemble on the same base, each with its own normalisation
    combine: str = "mean"  # the ensemble's score: "mean", "min", or "cautious": mean - caution x standard deviation
    caution: float = 1.0

    @property
    def last_layer(self) -> int:
        return self.depth or self.model.config.n_layer

    @property
    def first_layer(self) -> int:
        """The lowest layer in which this role differs from the plain base: where its branch begins."""
        lowest = [adapter.first_layer for adapter in self.adapters]
        if self.model.trained_from is not None:
            lowest.append(self.model.trained_from)
        return min([*lowest, self.last_layer, *(other.first_layer for other in self.others)])

    @property
    def frozen_depth(self) -> int:
        """The lowest layer that this role trains: what lies below may be computed once and kept."""
        lowest = [adapter.first_layer for adapter in self.adapters if adapter.name in self.trained]
        if self.model.trained_from is not None:
            lowest.append(self.model.trained_from)
        return min([*lowest, self.last_layer, *(other.frozen_depth for other in self.others)])

    def trunk_key(self, depth: int) -> str:
        """Names this role's states after `depth` layers: the base, and every adapter that reaches below that depth."""
        below = [adapter.fingerprint() for adapter in self.adapters if adapter.first_layer < depth]
        return "+".join([self.model.trunk_key(depth), *below])

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The trainable parameters, under names that are the same in every process."""
        for adapter in self.adapters:
            if adapter.name in self.trained:
                for name, tensor in adapter.named_parameters():
                    yield f"{adapter.name}:{name}", tensor
        if self.model.trained_from is not None:
            for name, tensor in self.model.weights.items():
                if tensor.requires_grad:
                    yield f"base:{name}", tensor
        for prefix, head in {"": self.head, **{f"{name}_": head for name, head in self.aux.items()}}.items():
            if head is not None and head.weight.requires_grad:
                yield from ((prefix + name, tensor) for name, tensor in head.named_parameters())
        for number, other in enumerate(self.others, 2):
            yield from ((f"member{number}.{name}", tensor) for name, tensor in other.named_parameters())

    def parameters(self) -> list[Tensor]:
        return [tensor for _, tensor in self.named_parameters()]

    @torch.no_grad()
    def merged(self) -> Role:
        """The same function with the adapters added into a copy of the weights: for many passes in fp32 that train nothing.

        The copy holds its matrices twice, as they are and reordered (`product.Matrix`). Ensembles stay as they are, as their members share the base, and so do bf16 weights, in which updates would be rounded off.
        """
        if not self.adapters or self.others or self.model.dtype != torch.float32:
            return self
        weights = {
            name: tensor.to(self.model.device) for name, tensor in merged_weights(self.model.weights, self.adapters).items()
        }
        model = Decoder(self.model.config, weights, self.model.name)
        model.scoring = True
        return replace(self, model=model, adapters=(), trained=())

    # ---- passes -----------------------------------------------------------------------------------------------
    def hidden(self, batch: Batch) -> Tensor:
        """(B, T, d) states after the final norm."""
        return batch.tree.spread(self.model.final_norm(self.nodes(batch)))

    def nodes(self, batch: Batch, only: Tensor | None = None) -> Tensor:
        """(1, N, d) states of the tree's nodes, from the batch's trunk activations where they fit; each prefix runs once.

        Of `only` (n,) distinct nodes where these are given, (1, n, d).
        """
        if batch.record is not None:
            first = batch.record.first_layer
            state = batch.record.before(first)[None]
            state = self.model.blocks(state, first, self.last_layer, adapters=self.adapters, tree=batch.tree, record=batch.record)
            return state if only is None else state[:, only]
        fitting = [depth for depth, key in batch.trunk if depth <= self.frozen_depth and key == self.trunk_key(depth)]
        depth = max(fitting, default=0)
        state = batch.trunk[depth, self.trunk_key(depth)] if depth else self.model.embed_tree(batch.ids, batch.tree)
        return self.model.blocks(state, depth, self.last_layer, adapters=self.adapters, tree=batch.tree, only=only)

    def response_hidden(self, batch: Batch) -> Tensor:
        """(N, d) states that predict the N response tokens of the batch, row after row."""
        return self.model.final_norm(self.nodes(batch)[0].index_select(0, batch.predictors()))

    def values(self, batch: Batch) -> Tensor:
        """(B, R) values of the states that precede each response token; 0 where there is none."""
        assert self.head is not None
        return batch.scatter(self.head(self.response_hidden(batch)))

    def raw_scores(self, batch: Batch) -> Tensor:
        """(B,) head outputs at the last token, or averaged over the response tokens, before normalisation."""
        assert self.head is not None
        return self.head(self.pooled(batch))

    def pooled(self, batch: Batch) -> Tensor:
        """(B, d) the state that heads read: the last token's, or the mean over the response."""
        if self.pooling == "last":
            rows = torch.arange(len(batch.ids), device=batch.ids.device)
            read, place = batch.tree.nodes[rows, batch.lengths - 1].unique(return_inverse=True)
            return self.model.final_norm(self.nodes(batch, read)[0])[place]
        span = batch.response_span()[:, :, None]
        return (self.hidden(batch) * span).sum(1) / span.sum(1)

    def scores_and_spread(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B,) normalised scores, of an ensemble its combination (Coste et al. 2023, arXiv 2310.02743), and the standard deviation
        over the members (0 of a single model)."""
        members = torch.stack(
            [role.raw_scores(batch) * role.normalisation[0] + role.normalisation[1] for role in (self, *self.others)]
        )
        spread = members.std(0, correction=0)
        if self.combine == "min":
            return members.amin(0), spread
        return members.mean(0) - (self.caution * spread if self.combine == "cautious" else 0.0), spread


@dataclass
class Trunk:
    """A role's states at one or more depths, one unpadded (length, d) tensor per example, under (depth, key)."""

    rows: dict[tuple[int, str], list[Tensor]]

    @classmethod
    @torch.no_grad()
    def compute(
        cls, path: Role | Decoder, examples: Sequence[Example], depths: Iterable[int], max_tokens: int = 4096,
        only: Collection[int] | None = None,
    ) -> Trunk:  # fmt: skip
        """Run a role (or the plain base) once over all examples, or `only` these rows, keeping the states after `depths` layers.

        Depth 0 is not kept, nor any depth above the lowest layer that the role trains. Other roles use whatever has their key.
        Examples that occur more than once (a pun in several pairs) are run and stored once.
        """
        role = path if isinstance(path, Role) else Role(path)
        model = role.model
        wanted = sorted({depth for depth in depths if 0 < depth <= role.frozen_depth})
        unique = list(dict.fromkeys(examples[row] for row in (range(len(examples)) if only is None else sorted(only))))
        states: dict[int, dict[Example, Tensor]] = {depth: {} for depth in wanted}
        for rows in prefix_batches(unique, max_tokens) if wanted else []:
            batch = collate([unique[row] for row in rows], device=model.device)
            state, done = model.embed_tree(batch.ids, batch.tree), 0
            for depth in wanted:
                state, done = model.blocks(state, done, depth, adapters=role.adapters, tree=batch.tree), depth
                for place, row in enumerate(rows):
                    states[depth][unique[row]] = state[0, batch.tree.nodes[place, : unique[row].length]]
        absent = torch.empty(0, model.config.d_model)
        return cls({(d, role.trunk_key(d)): [states[d].get(example, absent) for example in examples] for d in wanted})

    def collate(self, examples: Sequence[Example], rows: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """A padded batch of some of the examples, with their activations (attention is causal: a longer text's serve too)."""
        batch = collate([examples[row] for row in rows], device=device)
        for key, states in self.rows.items():
            if any(len(states[row]) < examples[row].length for row in rows):
                raise KeyError(f"the trunk was not computed for one of the rows {list(rows)[:8]}")
            new = zip(rows, batch.tree.starts, strict=True)  # a row's own nodes are the end of it
            batch.trunk[key] = torch.cat([states[row][start : examples[row].length] for row, start in new])[None]
        return batch


def score_examples(role: Role, examples: Sequence[Example], trunk: Trunk | None = None, max_tokens: int = 4096) -> list[float]:
    """Normalised scores of many examples, in their order."""
    return scores_and_spreads(role, examples, trunk, max_tokens)[0]


@torch.no_grad()
def scores_and_spreads(
    role: Role, examples: Sequence[Example], trunk: Trunk | None = None, max_tokens: int = 4096
) -> tuple[list[float], list[float]]:
    """Normalised scores of many examples, in their order, and how far an ensemble's members are apart on each."""
    scores, spreads = [0.0] * len(examples), [0.0] * len(examples)
    trunk = trunk or Trunk({})
    for rows in prefix_batches(examples, max_tokens):
        batch = trunk.collate(examples, rows, role.model.device)
        for row, score, spread in zip(rows, *(part.tolist() for part in role.scores_and_spread(batch)), strict=True):
            scores[row], spreads[row] = score, spread
    return scores, spreads
