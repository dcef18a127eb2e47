"""Sampling with a key-value cache: the prompt once, then one token per row and step.

Rows are left-padded for generation; positions and masks come from lengths. Each row draws from its own stream of
uniforms, so its result does not depend on the rows beside it. Finished rows leave the batch.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from punster.data.batch import Example, PrefixTree
from punster.errors import UserError
from punster.model.kernels import call, compiled
from punster.model.recording import Recording
from punster.model.role import Role, Trunk
from punster.model.transformer import KeyValueCache, causal_mask
from punster.rollout.decode import Stepper, Stream, decode_one_token
from punster.rollout.logprobs import sizes

ROWS = 128  # sampled at once


def rows_at_once(share: float) -> int:
    """How many rows to sample at once where memory allows a share of the usual."""
    return max(1, int(ROWS * share))


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
    trunk: Trunk | None = None  # states of the closed examples, if they were asked for
    record: Recording | None = None  # what the gradients of this pass need, if it was asked for and the kernels could keep it

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
    samples: int = 1, max_rows: int = ROWS, keep: Collection[int] = (), record: bool = False,
) -> Rollout:  # fmt: skip
    """Draw `samples` responses to each tokenised prompt; `keep` the states after so many layers, as a trunk.

    States are kept up to the lowest layer that the role trains (see `Trunk`), and only where the context has room for one more
    token: finished rows stay until their EOS was fed. `record` what the gradients of what the role trains need.

    Raises UserError if a prompt leaves no room for max_new_tokens in the model's context.
    """
    limit = role.model.config.max_positions
    for prompt in prompts:
        if len(prompt) + decoding.max_new_tokens > limit:
            raise UserError(
                f"a prompt of {len(prompt)} tokens leaves no room for {decoding.max_new_tokens} new ones: the context is {limit} tokens"
            )
    roomy = all(len(prompt) + decoding.max_new_tokens < limit for prompt in prompts)  # for the EOS that closes a cut-off response
    highest = min(role.frozen_depth, role.last_layer - 1) if roomy else 0
    keys = {depth: role.trunk_key(depth) for depth in sorted(keep) if 0 < depth <= highest}
    uniforms = torch.rand(len(prompts) * samples, decoding.max_new_tokens, generator=generator, dtype=torch.float64).float()
    uniforms.clamp_(max=1 - 2**-24)  # what lies nearest to 1 was rounded to it
    stepper = Stepper(role.model, role.adapters, role.last_layer)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    per_call = max(1, max_rows // samples)
    chunks = [
        (order[start : start + per_call], range(first, min(first + max_rows, samples)))
        for start in range(0, len(order), per_call)
        for first in range(0, samples, max_rows)  # more than one only where a prompt has more samples than fit
    ]
    examples: list[Example | None] = [None] * (len(prompts) * samples)
    log_probs: list[Tensor] = [torch.empty(0)] * len(examples)
    finished = [False] * len(examples)
    states: dict[int, list[Tensor]] = {depth: [torch.empty(0)] * len(examples) for depth in keys}
    recording = None
    for chosen, numbers in chunks:
        rows = [prompt * samples + k for prompt in chosen for k in numbers]
        drawn = uniforms[rows].to(role.model.device)
        if record and len(chunks) == 1:
            recording = Recording.of(stepper, role.frozen_depth, prompts, samples, decoding.max_new_tokens, rows)
        asked = [prompts[i] for i in chosen]
        results = _generate(role, stepper, asked, len(numbers), decoding, eos_id, drawn, list(keys), recording)
        for row, (ids, logs, kept) in zip(rows, results, strict=True):
            examples[row] = Example(tuple(prompts[row // samples]), tuple(ids))
            log_probs[row] = logs
            finished[row] = ids[-1] == eos_id
            for depth, state in kept.items():
                states[depth][row] = state
    trunk = Trunk({(depth, key): states[depth] for depth, key in keys.items()}) if keys else None
    return Rollout([e for e in examples if e is not None], log_probs, finished, eos_id, limit, trunk, recording)


def _generate(
    role: Role, stepper: Stepper, prompts: Sequence[Sequence[int]], samples: int, decoding: Decoding, eos_id: int,
    uniforms: Tensor, keep: Sequence[int] = (), record: Recording | None = None,
) -> list[tuple[list[int], Tensor, dict[int, Tensor]]]:  # fmt: skip
    """Ids, log-probs and kept states of each row."""
    model, device, longest = role.model, role.model.device, decoding.max_new_tokens
    logits, stream, tree, of_prompts = prefill(role, prompts, longest + 1, keep, record)
    of_prompt = [nodes[len(nodes) - len(prompt) :] for nodes, prompt in zip(tree.nodes, prompts, strict=True)]
    if record is not None:
        record.begin([nodes for nodes in of_prompt for _ in range(samples)], len(tree.first))
    if samples > 1:  # the prompt was run once for all its samples
        repeat = torch.arange(len(prompts), device=device).repeat_interleave(samples)
        stream.select(repeat)
        logits = logits[repeat]
    total = logits.shape[0]
    active = torch.arange(total, device=device)
    tokens = torch.zeros(total, longest, dtype=torch.long, device=device)
    logs = torch.zeros(total, longest, device=device)
    lengths = torch.full((total,), longest, dtype=torch.long, device=device)
    alive = torch.ones(total, dtype=torch.bool, device=device)
    seen = None
    if decoding.repetition_penalty != 1:
        seen = torch.zeros(total, model.config.vocab_size, dtype=torch.bool, device=device)
        for row in range(total):
            seen[row, list(prompts[row // samples])] = True
    states = {depth: torch.empty(total, longest + 1, model.config.d_model, device=device) for depth in keep}

    def feed(token: Tensor, place: int, record: Recording | None = None) -> Tensor:
        fresh = dict.fromkeys(keep, token)
        logits = decode_one_token(stepper, token, stream, fresh, record)
        if record is not None:
            record.append(active)
        for depth, state in fresh.items():
            states[depth][active, place] = state
        return logits

    for step in range(longest):
        token, log_prob = choose(logits, decoding, uniforms[active, step], None if seen is None else seen[active])
        tokens[active, step], logs[active, step] = token, log_prob
        if seen is not None:
            seen[active, token] = True
        ended = alive[active] & (token == eos_id)
        lengths[active[ended]] = step + 1
        alive[active[ended]] = False
        living = alive[active]
        if step + 1 == longest or not bool(living.any()):
            break
        staying = living | ended if keep else living  # the state of a row's EOS is known once it was fed
        if int((~staying).sum()) * 8 >= living.numel():  # finished rows leave once they are an eighth of the batch
            chosen = staying.nonzero()[:, 0]
            stream.select(chosen)
            active, token = active[chosen], token[chosen]
        logits = feed(token, step, record)
    if keep:
        feed(token, step)
        if bool(alive.any()):  # cut off: closed by an EOS that was not drawn
            feed(torch.full_like(token, eos_id), step + 1)
    results = []
    for row in range(total):
        own, length = of_prompt[row // samples], int(lengths[row])
        closed = length + int(alive[row])
        kept = {depth: torch.cat((of_prompts[depth][own], states[depth][row, :closed])) for depth in keep}
        results.append((tokens[row, :length].tolist(), logs[row, :length].cpu(), kept))
    return results


def prefill(
    role: Role, prompts: Sequence[Sequence[int]], new_tokens: int, keep: Sequence[int] = (), record: Recording | None = None
) -> tuple[Tensor, Stream, PrefixTree, dict[int, Tensor]]:
    """Run prompts, padded on the left to (B, P), into a cache with room for new tokens, what they share once.

    Returns logits (B, V) of the next token, the rows in flight, the prompts' tree, and the states (N, d) of its nodes after `keep`
    layers (ascending).
    """
    model, device = role.model, role.model.device
    tree = PrefixTree.of(prompts, device, left=True)
    rows, widest = tree.nodes.shape
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = torch.arange(widest, device=device) >= widest - lengths[:, None]
    ids = torch.zeros(rows, widest, dtype=torch.long, device=device)
    ids[mask] = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    even = bool(mask.all())
    seen = None if even else causal_mask(mask)  # without one attention skips what lies ahead
    cache = KeyValueCache(model.config, rows, widest + new_tokens, device)
    hidden, done, states = model.embed_tree(ids, tree), 0, {}
    for depth in (*keep, role.last_layer):
        hidden = model.blocks(hidden, done, depth, adapters=role.adapters, mask=seen, cache=cache, tree=tree, record=record)
        states[depth], done = hidden[0], depth
    cache.length = widest
    stream = Stream(cache, lengths, None if even else widest - lengths)
    return model.logits(model.final_norm(hidden[0, tree.nodes[:, -1]])), stream, tree, states


def choose(logits: Tensor, decoding: Decoding, uniform: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pick one token per row from (B, V) logits with one uniform (B,) each; its log-prob under what was sampled from."""
    if seen is not None:
        penalised = torch.where(logits > 0, logits / decoding.repetition_penalty, logits * decoding.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if decoding.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and not decoding.truncated and compiled() is not None:
        return choose_plainly(logits, decoding.temperature, uniform)
    logits = logits / decoding.temperature if decoding.temperature != 1 else logits
    probs = truncate(logits, decoding).softmax(-1)
    token = inverse_cdf(probs, uniform)
    return token, probs.gather(1, token[:, None])[:, 0].log()


def choose_plainly(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """`choose` without truncation, on the kernels: log-probs are those of `rollout.logprobs` on a bf16 head, to the last bit."""
    logits = logits.contiguous()
    token, log_prob = torch.empty(len(logits), dtype=torch.long), torch.empty(len(logits))
    call("punster_choose", logits, *sizes(logits), c.c_float(1 / temperature), uniform.contiguous(), token, log_prob)
    return token, log_prob


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
