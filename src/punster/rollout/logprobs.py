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


class _TokenStatistics(torch.autograd.Function):
    """(hidden, head, targets) -> log-prob of each target and entropy of each distribution, both (N,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
        log_probs, entropies = [], []
        for start in range(0, hidden.shape[0], chunk):
            logits = F.linear(hidden[start : start + chunk], head) / temperature
            log_z = logits.logsumexp(-1)
            log_probs.append(logits.gather(1, targets[start : start + chunk, None])[:, 0] - log_z)
            probs = (logits - log_z[:, None]).exp()
            entropies.append(log_z - (probs * logits).sum(-1))
        ctx.save_for_backward(hidden, head, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        return torch.cat(log_probs), torch.cat(entropies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_prob: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        with_entropy = bool(grad_entropy.any())
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = F.linear(hidden[part], head) / ctx.temperature
            log_p = logits - logits.logsumexp(-1, keepdim=True)
            p = log_p.exp()
            g = -p * grad_log_prob[part, None]  # d log p(y) / d logits = onehot(y) - p
            g.scatter_add_(1, targets[part, None], grad_log_prob[part, None])
            if with_entropy:  # d H / d logits = -p (log p + H)
                entropy = -(p * log_p).sum(-1, keepdim=True)
                g -= p * (log_p + entropy) * grad_entropy[part, None]
            g /= ctx.temperature
            grad_hidden[part] = g @ head
            if grad_head is not None:
                grad_head += g.T @ hidden[part]
        return grad_hidden, grad_head, None, None, None


def token_log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies, both (N,) fp32, differentiable in hidden and head.

    hidden (N, d): states after the final norm that predict `targets` (N,); head (V, d).
    """
    log_probs, entropies = _TokenStatistics.apply(hidden, head, targets, temperature, chunk)
    return log_probs, entropies


@torch.no_grad()
def compare_policies(
    hidden: Tensor, head: Tensor, reference: Tensor, reference_head: Tensor, targets: Tensor,
    temperature: float = 1.0, chunk: int = 512,
) -> dict[str, Tensor]:  # fmt: skip
    """Per token, (N,) each: log_prob, ref_log_prob, entropy, and the exact KL(pi || ref) over the whole vocabulary.

    The exact KL is sum_v pi(v) (log pi(v) - log ref(v)) >= 0 at the state before each target.
    """
    out: dict[str, list[Tensor]] = {"log_prob": [], "ref_log_prob": [], "entropy": [], "kl": []}
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = F.linear(hidden[part], head) / temperature
        log_z = logits.logsumexp(-1)
        log_p = logits - log_z[:, None]
        log_q = (F.linear(reference[part], reference_head) / temperature).log_softmax(-1)
        p = log_p.exp()
        # The same expression as in training, so that the two agree to the last bit.
        out["log_prob"].append(logits.gather(1, targets[part, None])[:, 0] - log_z)
        out["ref_log_prob"].append(log_q.gather(1, targets[part, None])[:, 0])
        out["entropy"].append(-(p * log_p).sum(-1))
        out["kl"].append((p * (log_p - log_q)).sum(-1))
    return {name: torch.cat(parts) for name, parts in out.items()}
