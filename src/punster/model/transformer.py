"""One decoder for the GPT-2 and Llama families, with plain functions from hidden states to hidden states.

The network is a dictionary of weights under Hugging Face's names (matrices as out x in) and a configuration.
Low-rank adapters are separate objects that are passed into each call, so that one frozen base serves every role:
a *trunk* (embedding and the layers below the lowest adapter) is run once, and each role's *branch* starts from it.

Shapes: B rows, T tokens, d width, H heads, K key-value heads, h head size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from punster.data.batch import PrefixTree
from punster.model import fused
from punster.model.architecture import ModelConfig
from punster.model.lora import Adapter, low_rank
from punster.model.product import LogitHead, Matrix, project
from punster.model.recording import Recording


class KeyValueCache:
    """Keys and values of every layer in static fp32 buffers of shape (B, K, capacity, h)."""

    def __init__(self, config: ModelConfig, rows: int, capacity: int, device: torch.device):
        shape = (rows, config.n_kv_head, capacity, config.d_head)
        self.keys = [torch.empty(shape, device=device) for _ in range(config.n_layer)]
        self.values = [torch.empty(shape, device=device) for _ in range(config.n_layer)]
        self.length, self.capacity = 0, capacity

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, t, h) behind what is there; returns all keys and values so far (views)."""
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given rows; only what is filled is copied."""
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = buffer.new_empty(len(rows), *buffer.shape[1:])
                buffers[layer][:, :, : self.length] = buffer[rows, :, : self.length]


class Decoder:
    """The network: weights, configuration, and the passes over them. Hidden states are always fp32."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], name: str = ""):
        self.config = config
        self.weights = weights
        self.name = name  # what --model was, so that a run can name its base
        self.trained_from: int | None = None  # lowest layer whose own weights were trained (full fine-tuning)
        self.trunk_of: Decoder | None = None  # the plain base that the layers below `trained_from` are shared with
        self.own: frozenset[str] = frozenset()  # weights that differ from the named base, in this run or the ones before it
        self.own_type = torch.float32  # in which a step multiplies by weights that learn; they are fp32, and evaluated so
        self.coarse = False  # see `in_bytes`
        self.scoring = False  # no pass is ever compared with one that learns, so that the last bits are free (`Role.merged`)
        self._fingerprints: dict[torch.dtype | None, str] = {}
        self._matrices: dict[tuple[str, ...], Matrix] = {}

    # ---- where things are -------------------------------------------------------------------------------------
    @property
    def embedding(self) -> Tensor:
        return self.weights["transformer.wte.weight" if self.config.family == "gpt2" else "model.embed_tokens.weight"]

    @cached_property
    def head(self) -> LogitHead:
        """The map to logits: the embedding itself where the head is tied."""
        return LogitHead(self.embedding if self.config.tied else self.weights["lm_head.weight"])

    def matrix(self, sites: tuple[str, ...]) -> Matrix:
        """Frozen linear layers that read the same input, as one; their weights become views of it."""
        if sites not in self._matrices:
            fused = torch.cat([self.weights[site + ".weight"] for site in sites])
            biases = [self.weights[site + ".bias"] for site in sites if site + ".bias" in self.weights]
            for site, part in zip(sites, fused.split([self.weights[site + ".weight"].shape[0] for site in sites]), strict=True):
                self.weights[site + ".weight"] = part
            self._matrices[sites] = Matrix(fused, torch.cat(biases) if biases else None, self.scoring)
        return self._matrices[sites]

    @contextmanager
    def in_bytes(self, wanted: bool = True) -> Iterator[None]:
        """Passes of prefix trees that are made within, and their gradients, multiply by the frozen matrices in 8 bits where the
        kernels can: for training that bears errors of some hundredths in a state (`kernels.Quantised`)."""
        before, self.coarse = self.coarse, wanted
        try:
            yield
        finally:
            self.coarse = before

    def projection(self, layer: int, which: str) -> list[tuple[str, slice]]:
        """The linear layers of one step of a block ("attend", "out", "up" or "down"), and their columns of the joint output."""
        places, column = [], 0
        for name, (out, _) in self.config.steps[which].items():
            places.append((self.config.block_prefix(layer) + name, slice(column, column + out)))
            column += out
        return places

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def layer_of(self, weight: str) -> int:
        """The block a weight belongs to; -1 for embeddings, n_layer for the final norm and the head."""
        parts = weight.split(".")
        for part in parts:
            if part.isdigit():
                return int(part)
        return -1 if any(p in ("wte", "wpe", "embed_tokens") for p in parts) else self.config.n_layer

    def fingerprint(self, dtype: torch.dtype | None = None) -> str:
        """SHA-256 over names, types and bytes of all weights (cast to a type), computed once; of frozen models only."""
        if dtype not in self._fingerprints:
            digest = hashlib.sha256()
            for key in sorted(self.weights):
                tensor = self.weights[key].detach().to(dtype or self.weights[key].dtype).cpu().contiguous()
                digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.view(torch.uint8).numpy().data)
            self._fingerprints[dtype] = digest.hexdigest()
        return self._fingerprints[dtype]

    def trunk_key(self, depth: int) -> str:
        """Names the activations after `depth` layers; two models with the same key may share them."""
        if self.trained_from is None:
            return f"{self.fingerprint()}:{depth}"
        if self.trunk_of is not None and depth <= self.trained_from:
            return self.trunk_of.trunk_key(depth)
        return f"trained-{id(self)}:{depth}"

    def trainable_copy(self, first_layer: int, products: torch.dtype = torch.float32) -> Decoder:
        """An fp32 copy whose layers from `first_layer` on (0: everything) are trained; the rest is shared.

        products: the type in which training steps multiply by them (mixed precision, Micikevicius et al. 2018, arXiv
        1710.03740); without gradients that is fp32, as once they are saved. In bf16 an update below a weight's third digit
        shows only once several have added up.
        """
        weights = {}
        for key, tensor in self.weights.items():
            frozen = first_layer > 0 and (self.layer_of(key) < first_layer or key == "lm_head.weight")
            weights[key] = tensor if frozen else tensor.detach().float().clone().requires_grad_(True)
        copy = Decoder(self.config, weights, self.name)
        copy.own = self.own | {key for key, tensor in weights.items() if tensor.requires_grad}
        copy.trained_from = first_layer if self.trained_from is None else min(first_layer, self.trained_from)
        copy.trunk_of = (self.trunk_of or self) if copy.trained_from > 0 else None
        copy.own_type = products
        copy._matrices = self._matrices  # of frozen layers only, which both have
        if not copy.head.weight.requires_grad:
            copy.head = self.head
        return copy

    # ---- passes -----------------------------------------------------------------------------------------------
    def embed(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Token (and, for GPT-2, position) embeddings: (B, T) -> (B, T, d) fp32."""
        hidden = F.embedding(ids, self.embedding).float()
        if self.config.family == "gpt2":
            if positions is None:
                positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            hidden = hidden + F.embedding(positions, self.weights["transformer.wpe.weight"]).float()
        return hidden

    def embed_tree(self, ids: Tensor, tree: PrefixTree) -> Tensor:
        """(B, T) ids -> (1, N, d) fp32, one state a distinct prefix."""
        return self.embed(tree.gather(ids), tree.positions)

    def blocks(
        self, hidden: Tensor, first: int, last: int, *, adapters: Sequence[Adapter] = (), positions: Tensor | None = None,
        mask: Tensor | None = None, cache: KeyValueCache | None = None, tree: PrefixTree | None = None,
        record: Recording | None = None, only: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Run layers first..last-1 on (B, T, d), or with a tree on (1, N, d).

        tree: products run on the N distinct prefixes of a batch; attention looks along their paths (on the kernels, which serve
        trees alone and read no mask; in fp32 where a model is for scoring) or sees whole rows.
        positions: (B, T) or None for 0..T-1. mask: boolean (B, T, S), true where a query may look, or None for plain
        causal attention over the T tokens themselves (right-padded rows need no mask: nothing real looks at a pad).
        With a cache, S = cache.length + T, and the caller advances cache.length afterwards.
        record: with a cache what the prompts' gradients need is put there; without one it was, by a sampling pass, and is used.
        only: (n,) distinct nodes of a tree whose states are wanted, (1, n, d): the last layer leaves the others out.
        """
        assert only is None or (tree is not None and cache is None and record is None)
        positions = tree.positions if tree is not None else positions
        turn = None
        if self.config.family == "llama":
            turn = self.turn(torch.arange(hidden.shape[1], device=self.device)[None] if positions is None else positions)
        rope: fused.Rope | None = None
        for layer in range(first, last):
            read = only if layer == last - 1 else None
            if tree is not None and fused.usable(self, layer):
                rope = rope if rope is not None or turn is None else fused.rope_rows(*turn, hidden.shape)
                hidden = fused.block(self, hidden, layer, adapters, rope, tree, cache, record, read)
            else:
                hidden = self._block(hidden, layer, adapters, turn, mask, cache, tree, read)
        return hidden if only is None or first < last else hidden[:, only]

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm before the head; it belongs to the branch, not to the trunk."""
        return norm(self, hidden, "transformer.ln_f" if self.config.family == "gpt2" else "model.norm")

    def logits(self, normed: Tensor) -> Tensor:
        """(…, d) after the final norm -> (…, V) fp32. For sampling; training goes through rollout.logprobs."""
        return self.head.logits(normed)

    def forward(self, ids: Tensor, adapters: Sequence[Adapter] = ()) -> Tensor:
        """(B, T) ids -> (B, T, V) logits, without a tree and its kernels: the network at its plainest."""
        hidden = self.blocks(self.embed(ids), 0, self.config.n_layer, adapters=adapters)
        return self.logits(self.final_norm(hidden))

    # ---- parts ------------------------------------------------------------------------------------------------
    def _project(self, x: Tensor, layer: int, which: str, adapters: Sequence[Adapter]) -> Tensor:
        """One step's linear layers with their adapters: (…, in) -> (…, out) fp32."""
        places = self.projection(layer, which)
        if not any(self.weights[site + ".weight"].requires_grad for site, _ in places):
            return project(x, self.matrix(tuple(site for site, _ in places)), places, adapters)
        outputs = []  # trained weights are fp32 and one layer each
        kind = self.own_type if torch.is_grad_enabled() else torch.float32
        for site, _ in places:
            bias = self.weights.get(site + ".bias")
            y = F.linear(x.to(kind), self.weights[site + ".weight"].to(kind), None if bias is None else bias.to(kind)).to(x.dtype)
            delta = low_rank(x, site, adapters)
            outputs.append(y if delta is None else y + delta)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What `rotated` needs at these positions (…): cos (…, 1, 1, h / 2) and -sin, sin (…, 1, 2, h / 2) (Su et al. 2021)."""
        half = self.config.d_head // 2
        powers = torch.arange(0, half, device=self.device, dtype=torch.float32) * 2 / self.config.d_head
        angles = positions.float()[..., None] * self.config.rope_theta**-powers
        sin = angles.sin()
        return angles.cos()[..., None, None, :], torch.stack((-sin, sin), -2)[..., None, :, :]

    def _attend(
        self, qkv: Tensor, layer: int, mask: Tensor | None, cache: KeyValueCache | None, tree: PrefixTree | None
    ) -> Tensor:
        """(B, T, H + 2K, h) or with a tree (1, N, H + 2K, h) -> (B, T, H*h) or (1, N, H*h)."""
        heads, kv_heads = self.config.n_head, self.config.n_kv_head
        qkv = (qkv if tree is None else tree.spread(qkv)).transpose(1, 2)
        length = qkv.shape[2]
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if heads > kv_heads:
            k, v = k.repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)
        if mask is None:
            assert length == 1 or k.shape[2] == length, "several tokens behind earlier keys need a mask"
            out = F.scaled_dot_product_attention(q, k, v, is_causal=k.shape[2] == length)
        else:
            # A row of a left pad may look at nothing: let it look at itself, so that it stays finite.
            safe = mask | ~mask.any(-1, keepdim=True)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=safe[:, None])
        out = out.transpose(1, 2).flatten(2)
        return out if tree is None else tree.gather(out)

    def _block(
        self, x: Tensor, layer: int, adapters: Sequence[Adapter], turn: tuple[Tensor, Tensor] | None,
        mask: Tensor | None, cache: KeyValueCache | None, tree: PrefixTree | None, only: Tensor | None,
    ) -> Tensor:  # fmt: skip
        at, c = self.config.block_prefix(layer), self.config
        before, between = c.norm_sites
        qkv = self._project(norm(self, x, at + before), layer, "attend", adapters)
        if tree is not None and cache is None and fused.attends(self, qkv, tree):
            found = fused.attended(self, qkv, turn, tree)
        else:
            qkv = qkv.unflatten(-1, (-1, c.d_head))
            if turn is not None:
                turned = c.n_head + c.n_kv_head
                qkv = torch.cat((rotated(qkv[..., :turned, :], *turn), qkv[..., turned:, :]), -2)
            found = self._attend(qkv, layer, mask, cache, tree)
        if only is not None:
            x, found = x[:, only], found[:, only]
        x = x + self._project(found, layer, "out", adapters)
        y = self._project(norm(self, x, at + between), layer, "up", adapters)
        if c.family == "llama":
            gate, up = y.chunk(2, -1)
            y = activate(gate, c.activation) * up
        else:
            y = activate(y, c.activation)
        return x + self._project(y, layer, "down", adapters)


def norm(model: Decoder, x: Tensor, name: str) -> Tensor:
    """LayerNorm (GPT-2) or RMSNorm (Llama) over the last dimension, in fp32."""
    weight = model.weights[name + ".weight"].float()
    if model.config.family == "gpt2":
        return F.layer_norm(x, (x.shape[-1],), weight, model.weights[name + ".bias"].float(), model.config.norm_eps)
    return F.rms_norm(x, (x.shape[-1],), weight, model.config.norm_eps)


def rotated(x: Tensor, cos: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of (…, heads, h) in the form that rotates halves; cos and turn as `Decoder.turn` makes them."""
    halves = x.unflatten(-1, (2, -1))
    return torch.addcmul(halves * cos, halves.flip(-2), turn).flatten(-2)


def activate(x: Tensor, kind: str) -> Tensor:
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_new" else "none")


def causal_mask(mask: Tensor) -> Tensor:
    """(B, T) real tokens -> (B, T, T): true where a query may look at a key."""
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return causal[None] & mask[:, None, :].bool()
