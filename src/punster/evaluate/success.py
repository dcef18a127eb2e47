"""Would a person call this a pun? A calibrated estimate from people's labels, which no training reads.

A ridge logistic model on what the frozen base says of the text alone (log-probs and entropies of its tokens), fitted to the labelled
outputs of PunEval and of He et al. in the part below: the numbers for the default model are in success.json, those for another base
are found on demand and kept in the cache folder. Text by text it tells little; its mean over many texts is a rate, and its interval is
widened by the errors that it made on generators it had not seen.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.resources import files

import torch
from torch import Tensor

from punster.data.batch import Example, collate, prefix_batches
from punster.data.pool import Pool, data_folder, pool_of
from punster.data.prompts import GENERIC_PROMPT
from punster.data.schema import Row, kind_of
from punster.data.split import Part
from punster.disk import cache_folder, write_json
from punster.errors import UserError
from punster.evaluate.metrics import auc
from punster.evaluate.winrate import Interval, bootstrap, logistic_fit
from punster.model.role import Role, score_examples
from punster.model.tokenizer import Tokenizer
from punster.puns.surprisal import document_start
from punster.rollout.logprobs import token_statistics

# Its items and groups are the estimator's own: training mixtures are made of "train" and guarded against these texts.
PART: Part = "val"
PENALTY = 3.0


@dataclass(frozen=True)
class Labelled:
    text: str
    success: float  # 0 or 1, or the share of yes votes
    item: str  # SemEval id, or pair of words
    system: str


@dataclass(frozen=True)
class Estimator:
    weights: list[float]  # one a feature, then the intercept
    centre: list[float]
    scale: list[float]
    errors: dict[str, float]  # system left out -> estimated minus human rate on its outputs

    def probabilities(self, features: Tensor) -> Tensor:
        """(N, F) -> (N,) P(a person calls it a pun)."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        x = (features - torch.tensor(self.centre, dtype=torch.float64)) / torch.tensor(self.scale, dtype=torch.float64)
        return (x @ weights[:-1] + weights[-1]).sigmoid()


def labelled(pool: Pool) -> list[Labelled]:
    """The labels of the part: PunEval's outputs and human texts, and He's sentences with success votes."""
    rows = []
    for row in pool.rows("puneval", PART):
        if kind_of(row) == "group":  # score = success + (funniness - 1) / 10, funniness 1 to 5
            for text, score, system in zip(row["completions"], row["scores"], row["systems"], strict=True):
                rows.append(Labelled(text, float(score >= 0.95), row["semeval_id"], system.split("/")[0]))
    # A pair of words whose mirror image is in another part (role-roll, roll-role) is left out.
    elsewhere = {_pair(row) for row, its in pool.located("pungen_he2019") if its != PART}
    for row in pool.rows("pungen_he2019", PART):
        if kind_of(row) == "text" and "success" in row and _pair(row) not in elsewhere:
            name = row["system"] if row["system"] != "human" else "human_he"
            rows.append(Labelled(row["text"], row["success"], row["id"].split("/")[1], name))
    return rows


def _pair(row: Row) -> frozenset[str]:
    return frozenset(row["id"].split("/")[1].split("-"))


@torch.no_grad()
def features(role: Role, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """(N, 9) fp64: length; mean, least, spread of log-probs, end and last words, first half; mean entropy; what is beyond it."""
    start, limit = document_start(tokenizer), role.model.config.max_positions - 1
    examples = [Example((start,), (*tokenizer.text_ids(t or ".")[: limit - 1], tokenizer.eos_id)) for t in texts]
    found = torch.zeros(len(texts), 9, dtype=torch.float64)
    for rows in prefix_batches(examples, 4096):
        batch = collate([examples[row] for row in rows], device=role.model.device)
        logs, entropies = token_statistics(role.response_hidden(batch), role.model.head, batch.targets())
        lengths = batch.response_lengths.tolist()
        for row, log, h in zip(rows, logs.double().cpu().split(lengths), entropies.double().cpu().split(lengths), strict=True):
            inner, h = (log[:-1], h[:-1]) if len(log) > 1 else (log, h)
            half = inner[: max(1, len(inner) // 2)]
            found[row] = torch.stack((torch.tensor(float(len(inner))).log().double(), inner.mean(), inner.min(), inner.std(correction=0),
                                      log[-1], inner[-3:].mean(), half.mean(), h.mean(), (inner + h).mean()))  # fmt: skip
    return found


def fit(x: Tensor, y: Tensor) -> Estimator:
    """Ridge logistic regression by Newton steps of y in [0, 1]. Its mean estimate is the mean of y; its errors are not known yet."""
    centre, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    z = torch.cat(((x - centre) / scale, x.new_ones(len(x), 1)), 1)
    ridge = torch.tensor([PENALTY] * x.shape[1] + [1e-6], dtype=z.dtype)
    weights = logistic_fit(z, y, z.new_ones(1, len(z)), ridge)[0]
    return Estimator(weights.tolist(), centre.tolist(), scale.tolist(), {})


def fit_estimator(x: Tensor, rows: Sequence[Labelled]) -> Estimator:
    """The estimator, with its errors on every machine that is left out of the fit in turn."""
    y = torch.tensor([row.success for row in rows], dtype=torch.float64)
    errors = {}
    for system in sorted({row.system for row in rows if not row.system.startswith("human")}):
        own = torch.tensor([row.system == system for row in rows])
        errors[system] = float(fit(x[~own], y[~own]).probabilities(x[own]).mean() - y[own].mean())
    return replace(fit(x, y), errors=errors)


@dataclass(frozen=True)
class Calls:
    """Which texts a reward model calls puns: those above the score above which as many machine outputs lie as people called puns."""

    gold: Role
    tokenizer: Tokenizer
    threshold: float
    about: dict[str, float | None]  # how it agrees with people; see `open`

    @classmethod
    def open(cls, gold: Role, tokenizer: Tokenizer) -> Calls:
        """From the estimator's labels, and SemEval's texts of the same part to see what it makes of people's; UserError without copies.

        about: outputs (their number), people (the share that people called puns, and so the model), auc (of the score, on outputs),
        semeval_puns, semeval_others (shares of people's puns and other sentences that it calls puns).
        """
        pool = labels_at_hand()
        outputs = [row for row in labelled(pool) if not row.system.startswith("human")]
        scores = pun_scores(gold, tokenizer, [row.text for row in outputs])
        people = sum(row.success for row in outputs) / len(outputs)
        threshold = float(torch.quantile(scores, 1 - people))
        about: dict[str, float | None] = {"outputs": len(outputs), "people": people}
        agreement = auc([(float(score), row.success > 0.5) for score, row in zip(scores, outputs, strict=True)])
        about["auc"] = agreement if math.isfinite(agreement) else None
        for name, is_pun in (("semeval_puns", True), ("semeval_others", False)):
            texts = [row["text"] for row in pool.rows("semeval2017_task7", PART) if row["is_pun"] is is_pun]
            about[name] = float((pun_scores(gold, tokenizer, texts) > threshold).double().mean())
        return cls(gold, tokenizer, threshold, about)

    def rate(self, by_prompt: Sequence[Sequence[str]], seed: int = 1) -> Interval:
        """Share of all texts, with a bootstrap interval over prompts (of sampling alone: the judge's own errors are not in it)."""
        scores = pun_scores(self.gold, self.tokenizer, [text for texts in by_prompt for text in texts])
        called = iter((scores > self.threshold).tolist())
        return bootstrap([sum(next(called) for _ in texts) / len(texts) for texts in by_prompt], seed)


def labels_at_hand() -> Pool:
    """The pool, if it has the labels that `Calls` reads; UserError if not."""
    pool = pool_of(data_folder())
    if missing := [name for name in ("puneval", "pungen_he2019", "semeval2017_task7") if not pool.has(name)]:
        raise UserError(f"{pool.folder}: --call-puns needs {', '.join(missing)}, which is not there (see 'punster data list')")
    return pool


def pun_scores(gold: Role, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """(N,) fp64: scores of texts under the generic prompt, whatever they answered."""
    prompt = tuple(tokenizer.prompt_ids(GENERIC_PROMPT))
    room = gold.model.config.max_positions - len(prompt)
    examples = [Example(prompt, tuple(tokenizer.response_ids(text or ".")[:room])) for text in texts]
    return torch.tensor(score_examples(gold, examples), dtype=torch.float64)


def open_estimator(role: Role, tokenizer: Tokenizer) -> Estimator | None:
    """The estimator of a base: known, in the cache, or fitted to the local copies of the sources; None where these are missing."""
    known = json.loads((files("punster") / "evaluate" / "success.json").read_text(encoding="utf-8"))
    if role.model.name in known:
        return Estimator(**known[role.model.name])
    key = zlib.crc32(f"{role.model.fingerprint()}/{PART}/{PENALTY}/2".encode())
    path = cache_folder() / "success" / f"{key:08x}.json"
    if path.is_file():
        try:
            return Estimator(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            path.unlink(missing_ok=True)
    try:
        rows = labelled(pool_of(data_folder()))
    except UserError:
        return None
    found = fit_estimator(features(role, tokenizer, [row.text for row in rows]), rows)
    with suppress(OSError):  # then it is fitted again the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(found))
    return found


def success_rate(estimator: Estimator | None, x: Tensor | None, seed: int = 1) -> dict[str, float] | None:
    """Mean over texts, one a prompt, with a bootstrap interval, widened on each side by the worst error on an unseen generator."""
    if estimator is None or x is None:
        return None
    found = bootstrap(estimator.probabilities(x).tolist(), seed)
    over, under = max([0.0, *estimator.errors.values()]), min([0.0, *estimator.errors.values()])
    return {"mean": found["mean"], "low": max(0.0, found["low"] - over), "high": min(1.0, found["high"] - under)}
