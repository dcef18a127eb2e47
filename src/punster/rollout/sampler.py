"""Sampling with a key-value cache: the prompt once, then one token per row and step.

Rows are left-padded for generation; positions and masks come from lengths. Each row draws from its own stream of
uniforms, so its result does not depend on the rows beside it. Finished rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from punster.data.batch import Example, PrefixTree
from punster.errors import UserError
from punster.model.lora import join
from punster.model.role import Role
from punster.model.transformer import KeyValueCache, causal_mask
from punster.rollout.decode import Stepper, Stream, decode_one_token


@dataclass(frozen=True)
class Decoding:
    """How to sample. The default is the model's own distribution: RL and all evaluation use it."""

    max_new_tokens: int = 48
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        checks = {
            "max-new-tokens must be at least 1": self.max_new_tokens >= 1,
            "temperature must be >= 0": self.temperature >= 0,
            "top-k must be >= 0": self.top_k >= 0,
            "top-p must lie in (0, 1]": 0 < self.top_p <= 1,
            "min-p must lie in [0, 1]": 0 <= self.min_p <= 1,
            "repetition-penalty must be > 0": self.repetition_penalty > 0,
        }
        for message, fine in checks.items():
            if not fine:
                raise UserError(message)

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.repetition_penalty != 1


@dataclass
class Rollout:
    """Sampled responses in the order of the prompts (each prompt's samples together)."""

    examples: list[Example]
    log_probs: list[Tensor]  # the sampler's own, per response token
    finished: list[bool]  # ended with EOS (which is part of the response)
    eos_id: int = -1
    max_positions: int = 1 << 30

    @property
    def closed(self) -> list[Example]:
        """The examples as reward models read them: all end with EOS, the cut-off ones too.

        A head that reads at the last token was trained on EOS and means nothing elsewhere. That a response did not end by
        itself is the business of the missing-EOS penalty and of the EOS rate.
        """
        whole = []
        for example, done in zip(self.examples, self.finished, strict=True):
            room = example.length < self.max_positions
            cut = example.response if room else example.response[:-1]
            whole.append(example if done else Example(example.prompt, (*cut, self.eos_id)))
        return whole


@torch.no_grad()
def generate(
    role: Role, prompts: Sequence[Sequence[int]], decoding: Decoding, eos_id: int, generator: torch.Generator,
    samples: int = 1, max_rows: int = 128,
) -> Rollout:  # fmt: skip
    """Draw `samples` responses to each tokenised prompt.

    Raises UserError if a prompt leaves no room for max_new_tokens in the model's context.
    """
    limit = role.model.config.max_positions
    for prompt in prompts:
        if len(prompt) + decoding.max_new_tokens > limit:
            raise UserError(
                f"a prompt of {len(prompt)} tokens leaves no room for {decoding.max_new_tokens} new ones: the context is {limit} tokens"
            )
    uniforms = torch.rand(len(prompts) * samples, decoding.max_new_tokens, generator=generator, dtype=torch.float64).float()
    if role.adapters:
        role = Role(role.model, (join(role.adapters),))
    stepper = Stepper.of(role.model, role.adapters, role.last_layer)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    per_call = max(1, max_rows // samples)
    examples: list[Example | None] = [None] * (len(prompts) * samples)
    log_probs: list[Tensor] = [torch.empty(0)] * len(examples)
    finished = [False] * len(examples)
    for start in range(0, len(order), per_call):
        chosen = order[start : start + per_call]
        rows = [prompt * samples + k for prompt in chosen for k in range(samples)]
        drawn = uniforms[rows].to(role.model.device)
        results = _generate(role, stepper, [prompts[i] for i in chosen], samples, decoding, eos_id, drawn)
        for row, (ids, logs) in zip(rows, results, strict=True):
            examples[row] = Example(tuple(prompts[row // samples]), tuple(ids))
            log_probs[row] = logs
            finished[row] = ids[-1] == eos_id
    return Rollout([example for example in examples if example is not None], log_probs, finished, eos_id, limit)


def _generate(
    role: Role,
    stepper: Stepper,
    prompts: Sequence[Sequence[int]],
    samples: int,
    decoding: Decoding,
    eos_id: int,
    uniforms: Tensor,
) -> list[tuple[list[int], Tensor]]:
    model, device = role.model, role.model.device
    widest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), widest, dtype=torch.long, device=device)
    mask = torch.zeros(len(prompts), widest, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, widest - len(prompt) :] = torch.tensor(list(prompt), device=device)
        mask[row, widest - len(prompt) :] = True
    cache = KeyValueCache(model.config, len(prompts), widest + decoding.max_new_tokens, torch.float32, device)
    logits = prefill(role, ids, mask, cache, PrefixTree.of(prompts, device, left=True))
    bias = torch.zeros(len(prompts), 1, cache.capacity, device=device)
    bias[:, 0, :widest] = torch.where(mask, 0.0, -1e30)
    stream = Stream(cache, mask.sum(1), None if bool(mask.all()) else bias)
    if samples > 1:  # the prompt was run once for all its samples
        repeat = torch.arange(len(prompts), device=device).repeat_interleave(samples)
        stream.select(repeat)
        logits, mask, ids = logits[repeat], mask[repeat], ids[repeat]
    total = logits.shape[0]
    active = torch.arange(total, device=device)
    tokens = torch.zeros(total, decoding.max_new_tokens, dtype=torch.long, device=device)
    logs = torch.zeros(total, decoding.max_new_tokens, device=device)
    lengths = torch.full((total,), decoding.max_new_tokens, dtype=torch.long, device=device)
    alive = torch.ones(total, dtype=torch.bool, device=device)
    seen = _seen_tokens(ids, mask, model.config.vocab_size) if decoding.repetition_penalty != 1 else None
    for step in range(decoding.max_new_tokens):
        token, log_prob = choose(logits, decoding, uniforms[active, step], None if seen is None else seen[active])
        tokens[active, step], logs[active, step] = token, log_prob
        if seen is not None:
            seen[active, token] = True
        ended = alive[active] & (token == eos_id)
        lengths[active[ended]] = step + 1
        alive[active[ended]] = False
        living = alive[active]
        if step + 1 == decoding.max_new_tokens or not bool(living.any()):
            break
        if int((~living).sum()) * 8 >= living.numel():  # finished rows leave once they are an eighth of the batch
            keep = living.nonzero()[:, 0]
            stream.select(keep)
            active, token = active[keep], token[keep]
        logits = decode_one_token(stepper, token, stream)
    return [(tokens[row, : lengths[row]].tolist(), logs[row, : lengths[row]].cpu()) for row in range(total)]


def prefill(role: Role, ids: Tensor, mask: Tensor, cache: KeyValueCache, tree: PrefixTree) -> Tensor:
    """Run left-padded prompts (B, P) into an empty cache, what they share once; logits (B, V) of the next token."""
    model = role.model
    hidden = model.embed_tree(ids, tree)
    hidden = model.blocks(hidden, 0, role.last_layer, adapters=role.adapters, mask=causal_mask(mask), cache=cache, tree=tree)
    cache.length = ids.shape[1]
    return model.logits(model.final_norm(hidden[0, tree.nodes[:, -1]]))


def choose(logits: Tensor, decoding: Decoding, uniform: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pick one token per row from (B, V) logits with one uniform (B,) each; its log-prob under what was sampled from."""
    if seen is not None:
        penalised = torch.where(logits > 0, logits / decoding.repetition_penalty, logits * decoding.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if decoding.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    logits = logits / decoding.temperature if decoding.temperature != 1 else logits
    if decoding.top_k or decoding.top_p < 1 or decoding.min_p:
        logits = truncate(logits, decoding)
    probs = logits.softmax(-1)
    token = inverse_cdf(probs, uniform)
    return token, probs.gather(1, token[:, None])[:, 0].log()


def truncate(logits: Tensor, decoding: Decoding) -> Tensor:
    """top-k, then top-p (Holtzman et al. 2020), then min-p, each on what the one before left; -inf elsewhere."""
    floor = float("-inf")
    if 0 < decoding.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(decoding.top_k, -1).values[:, -1:], floor)
    if decoding.top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = before >= decoding.top_p  # keeps the token that crosses the threshold
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), floor)
    if decoding.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < decoding.min_p * probs.max(-1, keepdim=True).values, floor)
    return logits


def inverse_cdf(probs: Tensor, uniform: Tensor, block: int = 256) -> Tensor:
    """Smallest index whose cumulative probability exceeds u, by two-level block sums; (B, V), (B,) -> (B,).

    Never an index of probability 0: the comparison is strict, and rounding at the upper end is clamped to the last
    index with mass.
    """
    rows, size = probs.shape
    padded = (torch.nn.functional.pad(probs, (0, -size % block)) if size % block else probs).view(rows, -1, block)
    sums = padded.sum(-1)
    edges = sums.cumsum(-1)
    target = uniform[:, None] * edges[:, -1:]
    last_block = sums.shape[1] - 1 - (sums > 0).flip(1).int().argmax(1, keepdim=True)
    which = torch.minimum((edges <= target).sum(-1, keepdim=True), last_block)
    before = edges.gather(1, which) - sums.gather(1, which)
    inside = padded.gather(1, which[:, :, None].expand(-1, -1, block))[:, 0]
    cumulative = inside.cumsum(-1) + before
    last = block - 1 - (inside > 0).flip(1).int().argmax(1, keepdim=True)
    first = (inside > 0).int().argmax(1, keepdim=True)
    place = torch.minimum((cumulative <= target).sum(-1, keepdim=True), last).maximum(first)
    # A zero-probability token right after the crossing cannot be chosen: its cumulative sum equals its predecessor's.
    return (which * block + place)[:, 0]


def _seen_tokens(ids: Tensor, mask: Tensor, vocab_size: int) -> Tensor:
    seen = torch.zeros(ids.shape[0], vocab_size, dtype=torch.bool, device=ids.device)
    for row in range(ids.shape[0]):
        seen[row, ids[row][mask[row]]] = True
    return seen
