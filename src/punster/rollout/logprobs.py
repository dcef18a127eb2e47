"""Log-probabilities, entropy and exact KL of response tokens, in chunks: never a (B, T, V) tensor.

The head runs on the states that predict response tokens only, `chunk` rows at a time; backward recomputes each chunk's
logits and forms the gradient directly. All in fp32. N response tokens, d width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Rows of logits at a time: 512 x 49,152 in fp32 are 100 MB; fewer rows make the products slower, more save nothing.
CHUNK = 512


class _TokenStatistics(torch.autograd.Function):
    """(hidden, head, targets) -> log-prob of each target and entropy of each distribution, both (N,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk: int, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        log_probs, entropies, log_zs = [], [], []
        for start in range(0, hidden.shape[0], chunk):
            logits = scaled_logits(hidden[start : start + chunk], head, temperature)
            log_z = logits.logsumexp(-1)
            log_probs.append(logits.gather(1, targets[start : start + chunk, None])[:, 0] - log_z)
            log_zs.append(log_z)
            if with_entropy:
                probs = (logits - log_z[:, None]).exp_()
                entropies.append(log_z - probs.mul_(logits).sum(-1))
        ctx.save_for_backward(hidden, head, targets, torch.cat(log_zs))
        ctx.temperature, ctx.chunk, ctx.with_entropy = temperature, chunk, with_entropy
        log_prob = torch.cat(log_probs)
        return log_prob, torch.cat(entropies) if with_entropy else torch.zeros_like(log_prob)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_prob: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, log_zs = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        with_entropy = ctx.with_entropy and bool(grad_entropy.any())
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            log_p = scaled_logits(hidden[part], head, ctx.temperature).sub_(log_zs[part, None])
            p = log_p.exp() if with_entropy else log_p.exp_()
            if with_entropy:  # d H / d logits = -p (log p + H)
                entropy = -(p * log_p).sum(-1, keepdim=True)
                slope = log_p.add_(entropy).mul_(p).mul_(grad_entropy[part, None])
            g = p.mul_(-grad_log_prob[part, None])  # d log p(y) / d logits = onehot(y) - p
            g.scatter_add_(1, targets[part, None], grad_log_prob[part, None])
            if with_entropy:
                g.sub_(slope)
            grad_hidden[part] = (g @ head).div_(ctx.temperature)
            if grad_head is not None:
                grad_head.addmm_(g.T, hidden[part], alpha=1 / ctx.temperature)
        return grad_hidden, grad_head, None, None, None, None


def scaled_logits(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    logits = F.linear(hidden, head)
    return logits if temperature == 1 else logits.div_(temperature)


def token_log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = CHUNK, with_entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies (zeros if not wanted), both (N,) fp32, differentiable in hidden and head.

    hidden (N, d): states after the final norm that predict `targets` (N,); head (V, d).
    """
    log_probs, entropies = _TokenStatistics.apply(hidden, head, targets, temperature, chunk, with_entropy)
    return log_probs, entropies


@torch.no_grad()
def compare_policies(
    hidden: Tensor, head: Tensor, reference: Tensor, reference_head: Tensor, targets: Tensor,
    temperature: float = 1.0, chunk: int = CHUNK,
) -> dict[str, Tensor]:  # fmt: skip
    """Per token, (N,) each: log_prob, ref_log_prob, entropy, and the exact KL(pi || ref) over the whole vocabulary.

    The exact KL is sum_v pi(v) (log pi(v) - log ref(v)) >= 0 at the state before each target.
    """
    out: dict[str, list[Tensor]] = {"log_prob": [], "ref_log_prob": [], "entropy": [], "kl": []}
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = scaled_logits(hidden[part], head, temperature)
        log_z = logits.logsumexp(-1)
        # The same expression as in training, so that the two agree to the last bit.
        out["log_prob"].append(logits.gather(1, targets[part, None])[:, 0] - log_z)
        log_p = logits.sub_(log_z[:, None])
        log_q = scaled_logits(reference[part], reference_head, temperature)
        log_q.sub_(log_q.logsumexp(-1, keepdim=True))
        out["ref_log_prob"].append(log_q.gather(1, targets[part, None])[:, 0])
        p = log_p.exp()
        out["kl"].append(log_q.neg_().add_(log_p).mul_(p).sum(-1))
        out["entropy"].append(-p.mul_(log_p).sum(-1))
    return {name: torch.cat(parts) for name, parts in out.items()}
