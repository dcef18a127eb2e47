"""Degeneration, diversity and loops: pure functions on texts, on token ids and on log-probs.

Repetition after Welleck et al. 2020 (arXiv 1908.04319), the comparison of decoders after Holtzman et al. 2020 (1904.09751), loops and
exposure bias after Chiang & Chen 2021 (2109.08705), MAUVE after Pillutla et al. 2021 (2102.01454) on features of one's own.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from punster.data.leakage import Index, jaccard
from punster.data.leakage import words as token_set
from punster.data.offence import is_profane
from punster.evaluate.metrics import ngrams, words


def seq_rep(tokens: Sequence[Hashable], n: int = 4) -> float:
    """1 - unique / all n-grams of one text; 0 where it is shorter than n."""
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def rep(tokens: Sequence[Hashable], reach: int = 16) -> float:
    """Share of tokens that are among the `reach` tokens before them."""
    return sum(t in tokens[max(0, i - reach) : i] for i, t in enumerate(tokens)) / len(tokens) if tokens else 0.0


def loop_onset(tokens: Sequence[Hashable], least: int = 3) -> int | None:
    """Where the text starts to repeat one phrase to its end, at least `least` times in a row and over at least 6 tokens; or None."""
    size, best = len(tokens), None
    for period in range(1, size // least + 1):
        start = size - period  # the longest tail in which every token equals the one a period earlier
        while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        if size - start >= max(least * period, 6) and (best is None or start < best):
            best = start
    return best


def self_bleu(texts: Sequence[str], n: int = 4, most: int = 200) -> float:
    """Mean BLEU-n of each of the first `most` texts against the others (Zhu et al. 2018), add-one smoothing above unigrams."""
    rows = [words(text) for text in texts[:most]]
    counts = [[Counter(ngrams(row, k)) for k in range(1, n + 1)] for row in rows]
    two: list[dict[tuple[Hashable, ...], list[int]]] = [{} for _ in range(n)]  # the two largest counts in any of the texts
    for row in counts:
        for k, grams in enumerate(row):
            for gram, count in grams.items():
                two[k][gram] = sorted([*two[k].get(gram, [0, 0]), count], reverse=True)[:2]
    scores = []
    for own, row in enumerate(counts):
        if len(rows) < 2 or not rows[own]:
            continue
        logs = 0.0
        for k, grams in enumerate(row):
            # Where this text has the largest count, the others have at most the second; elsewhere they have more than this one.
            clipped = sum(c if c < two[k][gram][0] else two[k][gram][1] for gram, c in grams.items())
            logs += math.log(max(clipped + (k > 0), 1e-9) / max(grams.total() + (k > 0), 1)) / n
        length = len(rows[own])
        nearest = min((abs(len(r) - length), len(r)) for i, r in enumerate(rows) if i != own)[1]
        scores.append(math.exp(logs + min(0.0, 1 - nearest / length)))
    return sum(scores) / len(scores) if scores else 0.0


def zipf_slope(texts: Sequence[str], most: int = 1000) -> float:
    """Exponent s of frequency ~ rank^-s by least squares over the `most` commonest words; nan below 3 different words."""
    counts = sorted(Counter(w for text in texts for w in words(text)).values(), reverse=True)[:most]
    if len(counts) < 3:
        return float("nan")
    x = torch.tensor(range(1, len(counts) + 1), dtype=torch.float64).log()
    y = torch.tensor(counts, dtype=torch.float64).log()
    return float(-((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def commonest_start(texts: Sequence[str], n: int = 4) -> float:
    """Share of texts that begin with the commonest n words: templates."""
    starts = Counter(tuple(w[:n]) for text in texts if len(w := words(text)) >= n)
    return max(starts.values(), default=0) / len(texts) if texts else 0.0


def unique_share(groups: Sequence[Sequence[str]], size: int = 100) -> float:
    """Distinct texts per `size` samples of one prompt, as a share: groups of any number are cut to at most `size`."""
    shares = [len({" ".join(words(t)) for t in group[:size]}) / len(group[:size]) for group in groups if group]
    return sum(shares) / len(shares) if shares else 0.0


def nearest_training(texts: Sequence[str], training: Sequence[str], threshold: float = 0.3) -> list[float]:
    """Jaccard of each text and the training text nearest to it; 0 where none reaches the threshold."""
    sets = [token_set(text) for text in training]
    index = Index(sets, threshold)
    return [max((jaccard(own, sets[i]) for i in index.near(own)), default=0.0) for own in map(token_set, texts)]


def perplexity(log_probs: Sequence[Tensor]) -> float:
    """exp of the mean negative log-prob a token over all texts."""
    joined = torch.cat([part.double() for part in log_probs]) if log_probs else torch.zeros(0)
    return float((-joined.mean()).exp()) if len(joined) else float("nan")


def exposure_gap(teacher_forced: Sequence[Tensor], free_running: Sequence[Tensor]) -> float:
    """log perplexity on human text minus on the model's own samples, nats a token: 0 for a model that has the data's distribution."""
    return math.log(perplexity(teacher_forced)) - math.log(perplexity(free_running))


def offence_rate(texts: Sequence[str]) -> float:
    """Share of texts with a profane word, disguised ones included."""
    return sum(map(is_profane, texts)) / len(texts) if texts else 0.0


def mauve(p: Tensor, q: Tensor, seed: int = 1) -> float:
    """MAUVE of two samples of features (N, d), (M, d): area under the divergence curve of their cluster histograms; 1 when equal.

    k-means with N / 10 clusters on standardised features, 25 mixture weights, scaling 5, as the authors have it.
    """
    joint = torch.cat((p, q)).double()
    joint = (joint - joint.mean(0)) / joint.std(0).clamp(min=1e-9)
    k = max(2, min(len(p), len(q)) // 10)
    generator = torch.Generator().manual_seed(seed)
    centres = joint[torch.randperm(len(joint), generator=generator)[:k]]
    for _ in range(30):
        owner = torch.cdist(joint, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, owner, joint)
        sizes = owner.bincount(minlength=k)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    owner = torch.cdist(joint, centres).argmin(1)
    a, b = (part.bincount(minlength=k).double() / len(part) for part in (owner[: len(p)], owner[len(p) :]))
    points = [(0.0, 1.0), (1.0, 0.0)]
    for weight in torch.linspace(1e-6, 1 - 1e-6, 25, dtype=torch.float64).tolist():
        mixture = weight * a + (1 - weight) * b
        points.append((math.exp(-5 * _kl(b, mixture)), math.exp(-5 * _kl(a, mixture))))
    points.sort(key=lambda point: (point[0], -point[1]))
    return sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in itertools.pairwise(points))


def _kl(a: Tensor, b: Tensor) -> float:
    some = a > 0
    return float((a[some] * (a[some] / b[some]).log()).sum())


def describe_texts(by_prompt: Sequence[Sequence[str]], training: Sequence[str] | None = None) -> dict[str, float | None]:
    """The columns that punster evaluate adds for one model; over the first sample of each prompt where the number of texts matters."""
    firsts = [group[0] for group in by_prompt if group]
    texts = [text for group in by_prompt for text in group]
    split = [words(text) for text in texts]
    count = max(1, len(texts))
    near = None if training is None else nearest_training(texts, training)
    return {
        "seq_rep_4": sum(seq_rep(w) for w in split) / count, "seq_rep_2": sum(seq_rep(w, 2) for w in split) / count,
        "rep_16": sum(rep(w) for w in split) / count, "loop_rate": sum(loop_onset(w) is not None for w in split) / count,
        "self_bleu_4": self_bleu(firsts), "zipf": zipf_slope(firsts), "commonest_start": commonest_start(firsts),
        "unique_share": unique_share(by_prompt) if any(len(group) > 1 for group in by_prompt) else None,
        "offence_rate": offence_rate(texts),
        "nearest_training": None if near is None else sum(near) / max(1, len(near)),
    }  # fmt: skip
