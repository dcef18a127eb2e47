"""Decoding that the sampler does not do: beam search, and one text under several prompts at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from punster.errors import UserError
from punster.model.role import Role
from punster.rollout.decode import Stepper, decode_one_token
from punster.rollout.sampler import Decoding, choose, prefill


@torch.no_grad()
def beam_search(
    role: Role, prompt: Sequence[int], eos_id: int, beams: int = 4, max_new_tokens: int = 48
) -> tuple[list[int], float]:
    """The likeliest text that `beams` hypotheses find, and its log-prob; finished texts go before unfinished ones; no length penalty."""
    stepper = Stepper(role.model, role.adapters, role.last_layer)
    logits, stream, *_ = prefill(role, [prompt], max_new_tokens)
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    for step in range(max_new_tokens):
        scores = logits.log_softmax(-1) + torch.tensor([score for score, _ in live], device=logits.device)[:, None]
        values, flat = scores.flatten().topk(min(2 * beams, scores.numel()))
        found = [(float(v), *divmod(int(i), scores.shape[1])) for v, i in zip(values, flat, strict=True)]
        done += [(v, [*live[row][1], token]) for v, row, token in found[:beams] if token == eos_id]
        kept = [(v, row, token) for v, row, token in found if token != eos_id][:beams]
        live = [(v, [*live[row][1], token]) for v, row, token in kept]
        # Log-probs only fall: nothing can overtake a finished text that is ahead of every live one.
        if step + 1 == max_new_tokens or (done and max(done)[0] >= live[0][0]):
            break
        stream.select(torch.tensor([row for _, row, _ in kept], device=logits.device))
        logits = decode_one_token(stepper, torch.tensor([token for *_, token in kept], device=logits.device), stream)
    score, ids = max(done or live)
    return ids, score


@torch.no_grad()
def joint_decode(
    role: Role, prompts: Sequence[Sequence[int]], decoding: Decoding, eos_id: int, generator: torch.Generator
) -> list[int]:
    """One text that fits several prompts: each token is drawn from the normalised geometric mean of their distributions.

    Yu, Tan & Wan 2018 decode a homograph's two senses jointly so; here the senses are stated in the prompts.
    """
    if decoding.repetition_penalty != 1:
        raise UserError("joint decoding has no repetition penalty: its prompts differ in the tokens that they have used")
    stepper = Stepper(role.model, role.adapters, role.last_layer)
    logits, stream, *_ = prefill(role, prompts, decoding.max_new_tokens)
    tokens: list[int] = []
    while True:
        uniform = torch.rand(1, generator=generator).to(logits.device)
        token, _ = choose(logits.log_softmax(-1).mean(0, keepdim=True), decoding, uniform)
        tokens.append(int(token))
        if tokens[-1] == eos_id or len(tokens) == decoding.max_new_tokens:
            return tokens
        logits = decode_one_token(stepper, token.expand(len(prompts)), stream)
