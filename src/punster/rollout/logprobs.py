"""Log-probabilities, entropy and exact KL of response tokens, in chunks: never a (B, T, V) tensor.

The head runs on the states that predict response tokens only, `CHUNK` rows at a time, in fp32. The gradient of a log-prob
with respect to its state, W[y] - sum_v p(v) W[v], does not depend on the loss: it is formed while the chunk's probabilities
are at hand, and backward only scales it. N response tokens, d width, V vocabulary.
"""

from __future__ import annotations

import ctypes as c
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from punster.model.kernels import call
from punster.model.product import LogitHead

# Rows of logits at a time: 128 x 49,152 in fp32 are 25 MB. Beyond 32 MB each tensor is a fresh mapping of memory, and
# touching its pages for the first time costs several times what is computed with them.
CHUNK = 128


def chunks(rows: int) -> list[slice]:
    """Slices of at most CHUNK rows."""
    return [slice(start, start + CHUNK) for start in range(0, rows, CHUNK)]


class Known(NamedTuple):
    """Log-probs (N,) of targets and their gradients (N, d) in the states, from an earlier pass with the same weights."""

    log_probs: Tensor
    slopes: Tensor


class _LogProbs(torch.autograd.Function):
    """(hidden, head weight, targets) -> log-prob of each target (N,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, head: LogitHead, targets: Tensor, temperature: float, known: Known | None
    ) -> Tensor:
        log_probs = hidden.new_empty(hidden.shape[0]) if known is None else known.log_probs.clone()
        slopes = (torch.empty_like(hidden) if known is None else known.slopes) if ctx.needs_input_grad[0] else None
        for part in chunks(len(hidden)) if known is None else []:
            log_probs[part], probs = target_log_probs(head, hidden[part], targets[part], temperature, slopes is not None)
            if slopes is not None and probs is not None:
                slopes[part] = slopes_of(head, log_probs[part], probs, targets[part], temperature)
        ctx.slopes = slopes
        ctx.save_for_backward(*((hidden, targets) if ctx.needs_input_grad[1] else ()))
        ctx.head, ctx.temperature = head, temperature
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden = ctx.slopes * gradient[:, None] if ctx.slopes is not None else None
        grad_weight = None
        if ctx.needs_input_grad[1]:  # a trained head: its probabilities are computed again, chunk by chunk
            hidden, targets = ctx.saved_tensors
            grad_weight = torch.zeros_like(ctx.head.weight)
            for part in chunks(len(hidden)):
                p = log_softmax(ctx.head, hidden[part], ctx.temperature).exp_()
                slope = p.mul_(-gradient[part, None])
                slope.scatter_add_(1, targets[part, None], gradient[part, None])
                grad_weight.addmm_(slope.T, hidden[part], alpha=1 / ctx.temperature)
        return grad_hidden, grad_weight, None, None, None, None


def slopes_of(head: LogitHead, log_probs: Tensor, probs: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """(n, d) gradient of each log-prob in its state; probs (n, V) of the other tokens."""
    # d log p(y) / d logits = onehot(y) - p; expm1 gives 1 - p(y) without cancellation
    own = -torch.expm1(log_probs[:, None]) * head.weight.detach()[targets]
    return (own - head.pull_back(probs)) / temperature


def log_softmax(head: LogitHead, hidden: Tensor, temperature: float) -> Tensor:
    """(n, d) -> (n, V) log-probs; one expression everywhere, so that all uses agree to the last bit."""
    logits = head.logits(hidden)
    log_p: Tensor = (logits if temperature == 1 else logits.div_(temperature)).log_softmax(-1)
    return log_p


def target_log_probs(
    head: LogitHead, hidden: Tensor, targets: Tensor, temperature: float, with_probs: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (n,) of the targets, and on demand the other tokens' probabilities (0 at the target) for `LogitHead.pull_back`."""
    if head.packed is None:
        log_p = log_softmax(head, hidden, temperature)
        chosen = log_p.gather(1, targets[:, None])[:, 0]
        return chosen, log_p.exp_().scatter_(1, targets[:, None], 0.0) if with_probs else None
    return on_kernels(head.logits(hidden), targets, temperature, with_probs)


def on_kernels(logits: Tensor, targets: Tensor, temperature: float, with_probs: bool) -> tuple[Tensor, Tensor | None]:
    found, stride = torch.empty(len(logits)), logits.shape[1] + logits.shape[1] % 2  # products read pairs
    probs = torch.empty(len(logits), stride, dtype=torch.bfloat16) if with_probs else None
    call("punster_log_probs", logits, *sizes(logits), c.c_float(1 / temperature), targets, found, probs, stride)
    return found, probs


def sizes(logits: Tensor) -> tuple[c.c_long, int]:
    return c.c_long(logits.shape[0]), logits.shape[1]


def token_log_probs(
    hidden: Tensor, head: LogitHead, targets: Tensor, temperature: float = 1.0, known: Known | None = None
) -> Tensor:
    """Log-probs (N,) fp32 of the targets, differentiable in hidden and in a trained head.

    hidden (N, d): states after the final norm that predict `targets` (N,); head: (V, d). known: the same, found before.
    """
    log_probs: Tensor = _LogProbs.apply(hidden, head.weight, head, targets, temperature, known)
    return log_probs


@torch.no_grad()
def compare_policies(
    hidden: Tensor, head: LogitHead, reference: Tensor, reference_head: LogitHead, targets: Tensor,
    temperature: float = 1.0, with_slopes: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Per token, (N,) each: log_prob, ref_log_prob, entropy, and the exact KL(pi || ref) over the whole vocabulary.

    The exact KL is sum_v pi(v) (log pi(v) - log ref(v)) >= 0 at the state before each target. with_slopes: also "slopes" (N, d),
    the gradients of log_prob in the states, where the kernels serve both heads (see `Known`).
    """
    names, parts = ("log_prob", "entropy", "ref_log_prob", "kl"), []
    on_both = head.packed is not None and reference_head.packed is not None
    slopes = torch.empty_like(hidden) if with_slopes and on_both else None
    for part in chunks(len(hidden)):
        aims = targets[part]
        if on_both:
            found = torch.empty(4, len(aims))
            logits, others = head.logits(hidden[part]), reference_head.logits(reference[part])
            call("punster_compare", logits, others, *sizes(logits), c.c_float(1 / temperature), aims, found)
            if slopes is not None:
                log_probs, probs = on_kernels(logits, aims, temperature, True)
                assert probs is not None
                slopes[part] = slopes_of(head, log_probs, probs, aims, temperature)
        else:
            log_p = log_softmax(head, hidden[part], temperature)
            log_q = log_softmax(reference_head, reference[part], temperature)
            chosen, others, p = log_p.gather(1, aims[:, None])[:, 0], log_q.gather(1, aims[:, None])[:, 0], log_p.exp()
            kl = log_q.neg_().add_(log_p).mul_(p).sum(-1)
            found = torch.stack((chosen, -p.mul_(log_p).sum(-1), others, kl))
        parts.append(found)
    result = dict(zip(names, torch.cat(parts, 1), strict=True))
    return result if slopes is None else {**result, "slopes": slopes}


@torch.no_grad()
def token_statistics(hidden: Tensor, head: LogitHead, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies of their distributions in nats, both (N,) fp32, without gradients."""
    parts = []
    for part in chunks(len(hidden)):
        aims = targets[part]
        if head.packed is not None:
            found, logits = torch.empty(2, len(aims)), head.logits(hidden[part])
            call("punster_compare", logits, None, *sizes(logits), c.c_float(1 / temperature), aims, found)
        else:
            log_p = log_softmax(head, hidden[part], temperature)
            found = torch.stack((log_p.gather(1, aims[:, None])[:, 0], -log_p.exp().mul_(log_p).sum(-1)))
        parts.append(found)
    log_probs, entropies = torch.cat(parts, 1)
    return log_probs, entropies
