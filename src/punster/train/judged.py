"""What reward models learn from: pairs, ranked groups and labelled texts as examples with places, and their losses."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from punster.algorithms.losses import plackett_luce
from punster.config import RewardConfig
from punster.data.batch import Example, epoch_order
from punster.data.prompts import GENERIC_PROMPT
from punster.data.schema import Row, texts_of
from punster.model.role import Role, Trunk
from punster.model.tokenizer import Tokenizer
from punster.model.transformer import Decoder
from punster.train.optim import seeded
from punster.train.rows import encode

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Item:
    """One row: the places of its texts in the list of examples, the best first, and what people said of them."""

    texts: tuple[int, ...]
    ratings: tuple[float, ...]
    margin: float = 0.0  # that the best text must be ahead by, in a pair
    weight: float = 1.0  # of its loss
    label: float = math.nan  # of a single text: is it a pun
    rating: float = math.nan  # of a single text: how funny, standardised


def encode_items(rows: Sequence[Row], tokenizer: Tokenizer, model: Decoder) -> tuple[list[Example], list[Item]]:
    """Examples in the order of the rows, and an item for each row."""
    examples: list[Example] = []
    items = []
    for number, row in enumerate(rows, 1):
        answers = [{**row, "completion": text} for text in row.get("completions") or ()] or [row]
        sides = SIDES if "chosen" in row else ("completion",)
        texts = [encode(tokenizer, model, answer, side, f"row {number}") for answer in answers for side in sides]
        examples += texts
        places = tuple(range(len(examples) - len(texts), len(examples)))
        ratings = tuple(row.get("scores") or range(len(texts), 0, -1))
        single = [math.nan if row.get(name) is None or len(texts) > 1 else float(row[name]) for name in ("label", "rating")]
        items.append(Item(places, ratings, float(row.get("margin") or 0.0), float(row.get("weight") or 1.0), *single))
    return examples, items


def weighed(rows: Sequence[Row]) -> list[Row]:
    """The rows with weights whose mean is 1; a row without one counts 1 before that."""
    weights = [row.get("weight") or 1.0 for row in rows]
    total = sum(weights)
    return [{**row, "weight": weight * len(rows) / total} for row, weight in zip(rows, weights, strict=True)]


def family(row: Row) -> str:
    """What a row is about: the group that it comes from, or its first text."""
    return str(row.get("_family") or row.get("group") or texts_of(row)[0])


def source_of(row: Row) -> str:
    """The source of a row; pairs of the embedded corpus name their kind alone, one's own rows (which have a place) none but their own."""
    return str(row.get("source") or ("embedded" if "kind" in row and "_place" not in row else ""))


def families(rows: Sequence[Row]) -> list[list[int]]:
    """Places of the rows that are about one text or group."""
    found: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        found.setdefault(family(row), []).append(place)
    return list(found.values())


def item_batches(examples: Sequence[Example], items: Sequence[Item], max_tokens: int) -> list[list[int]]:
    """Items in micro-batches, in their order: at most max_tokens tokens of distinct texts (at least one item).

    Some ways of attention see padded rows, so the padded size is bounded too, at four times as many tokens.
    """
    groups: list[list[int]] = []
    seen: set[Example] = set()
    for place, item in enumerate(items):
        own = {examples[text] for text in item.texts}
        seen |= own
        lengths = [example.length for example in seen]
        if not groups or sum(lengths) > max_tokens or len(lengths) * max(lengths) > 4 * max_tokens:
            groups.append([])
            seen = own
        groups[-1].append(place)
    return groups


def item_loss(
    model: Role, trunk: Trunk, examples: Sequence[Example], items: Sequence[Item], config: RewardConfig
) -> tuple[Tensor, dict[str, float]]:
    """Weighted sum over items: Plackett-Luce of the ranked, cross-entropy and squared error of the auxiliary heads of single ones.

    The head "pun" reads the score itself, so that labels train it; "funniness" reads the state.
    Also sums over the ranked items: share of their comparisons that are right (accuracy), best minus worst score (margin).
    """
    assert model.head is not None
    places = [text for item in items for text in item.texts]
    distinct = {examples[text]: text for text in places}  # a text that several items have runs once
    rows = list(distinct.values())
    state = model.pooled(trunk.collate(examples, rows, model.model.device))
    device = state.device
    number = {example: row for row, example in enumerate(distinct)}
    read = torch.tensor([number[examples[text]] for text in places], device=device)
    weights = torch.tensor([item.weight for item in items], device=device)
    widest = max(len(item.texts) for item in items)
    ratings = torch.full((len(items), widest), math.nan)
    for row, item in enumerate(items):
        ratings[row, : len(item.texts)] = torch.tensor(item.ratings, dtype=torch.float32)
    there = ~ratings.isnan().to(device)
    scores = torch.zeros(ratings.shape, device=device).masked_scatter(there, model.head(state)[read])
    ranked = there.sum(1) > 1
    ratings = torch.where(ranked[:, None], ratings.to(device), math.nan)
    ahead = F.pad(torch.tensor([item.margin for item in items], device=device)[:, None], (0, widest - 1))
    loss = (weights * plackett_luce(scores - ahead, ratings)).sum()
    count = there.sum(1)
    centre, square = (scores.sum(1) * 2 / count).square(), scores.square().sum(1) * 2 / count  # of a pair: (w + l)^2, w^2 + l^2
    loss = loss + ((config.center_rewards * centre + config.l2_rewards * square) * ranked * weights).sum()
    labels = torch.tensor([item.label for item in items], device=device)
    if "pun" in model.aux and (known := ~labels.isnan()).any():
        errors = F.binary_cross_entropy_with_logits(model.aux["pun"](scores[:, :1][known]), labels[known], reduction="none")
        loss = loss + config.pun_head * (weights[known] * errors).sum()
    funniness = torch.tensor([item.rating for item in items], device=device)
    if "funniness" in model.aux and (known := ~funniness.isnan()).any():
        first = torch.tensor([number[examples[item.texts[0]]] for item in items], device=device)
        errors = (model.aux["funniness"](state[first][known]) - funniness[known]).square()
        loss = loss + config.funniness_head * (weights[known] * errors).sum()
    with torch.no_grad():
        better = ratings[:, :, None] > ratings[:, None, :]
        right = ((scores[:, :, None] > scores[:, None, :]) & better).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)
        last = scores.gather(1, (count - 1)[:, None])[:, 0]
        sums = {"accuracy": float((right * ranked).sum()), "margin": float(((scores[:, 0] - last) * ranked).sum())}
    return loss, sums


def neutral(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """The rows with this share of the prompts, drawn by hash, replaced by the generic one.

    A row that has no group and whose first text another row is then asked for generically follows it, so that the text runs once.
    """
    if not share:
        return list(rows)

    def asked(row: Row) -> bool:
        prompt = row["prompt"]
        return prompt == GENERIC_PROMPT or zlib.crc32(f"{seed}/{prompt}".encode()) % 10_000 < share * 10_000

    plain = {texts_of(row)[0] for row in rows if asked(row)}
    return [
        {**row, "prompt": GENERIC_PROMPT} if asked(row) or ("group" not in row and texts_of(row)[0] in plain) else row
        for row in rows
    ]


def balanced(rows: Sequence[Row], tokenizer: Tokenizer, width: int = 4) -> list[Row]:
    """As many pairs whose chosen text is the longer as whose rejected text is, at every difference in length, in each source.

    Pairs are bucketed by the difference in tokens and the surplus is dropped (ChatGLM-RLHF, arXiv 2404.00934): a reward
    model must not learn length from what the sampling model happens to write. Rows that are no pairs stay.
    """
    buckets: dict[tuple[str, int], tuple[list[Row], list[Row]]] = {}
    kept = []
    for row in rows:
        gap = 0
        if "chosen" in row:
            chosen, rejected = (len(row.get(f"_{side}_ids") or tokenizer.response_ids(row[side])) for side in SIDES)
            gap = chosen - rejected
        if gap == 0:
            kept.append(row)
        else:
            key = (str(row.get("source", row.get("kind", ""))), (abs(gap) - 1) // width)
            buckets.setdefault(key, ([], []))[gap > 0].append(row)
    for shorter, longer in buckets.values():
        fewer = min(len(shorter), len(longer))
        kept += shorter[:fewer] + longer[:fewer]
    return kept


def shuffled(rows: list[Row], config: RewardConfig) -> list[Row]:
    """The placebo, seeded: pairs and labels turned round by the toss of a coin, ranked texts in a drawn order, ratings dealt anew."""
    if not config.shuffle_labels:
        return rows
    generator = seeded(config.seed, "labels")
    coins = torch.rand(len(rows), generator=generator) < 0.5
    found = []
    for row, coin in zip(rows, coins.tolist(), strict=True):
        turned = swapped(row) if coin else row
        if "completions" in row:
            order = epoch_order(len(row["completions"]), generator)
            turned = {**row, "completions": [row["completions"][place] for place in order]}
        found.append({**turned, "_family": family(row)})  # stays what it is: the placebo takes the same steps
    rated = [place for place, row in enumerate(rows) if "completion" in row and row.get("rating") is not None]
    for place, other in zip(rated, epoch_order(len(rated), generator), strict=True):
        found[place]["rating"] = rows[rated[other]]["rating"]
    return found


def swapped(row: Row) -> Row:
    """A pair or a labelled text the other way round, ids of sampled texts included."""
    if "chosen" not in row:
        return {**row, **({"label": not row["label"]} if row.get("label") is not None else {})}
    ids = {f"_{side}_ids": row.get(f"_{other}_ids") for side, other in (SIDES, SIDES[::-1])}
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"], **ids}


def share_right(gaps: Sequence[float]) -> float:
    """Share of pairs whose right text scores higher than the wrong one; ties count half."""
    return sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / max(1, len(gaps))


def calibration(gaps: Sequence[float], bins: int = 8) -> Row:
    """Does the winner's probability sigmoid(|gap|) come true? gaps: score of the right text minus that of the wrong one.

    {"error": expected calibration error, "curve": [{"predicted", "accuracy", "pairs"}, ...]} over bins of equally many pairs.
    """
    ordered = sorted(gaps, key=abs)
    edges = [round(k * len(ordered) / bins) for k in range(bins + 1)]
    curve, error = [], 0.0
    for low, high in pairwise(edges):
        if part := ordered[low:high]:
            predicted = sum(1 / (1 + math.exp(-min(abs(gap), 500))) for gap in part) / len(part)
            accuracy = share_right(part)
            curve.append({"predicted": round(predicted, 4), "accuracy": round(accuracy, 4), "pairs": len(part)})
            error += abs(predicted - accuracy) * len(part) / len(ordered)
    return {"error": round(error, 4), "curve": curve}


def reliability(rows: Sequence[Row], gaps: Sequence[float]) -> Row:
    """Accuracy on pairs, by source and by which text is the longer one (in words): name -> {"accuracy", "pairs"}."""
    groups: dict[str, list[float]] = {}
    for row, gap in zip(rows, gaps, strict=True):
        words = len(row["chosen"].split()) - len(row["rejected"].split())
        length = "longer right" if words > 0 else "shorter right" if words < 0 else "equally long"
        for name in (source_of(row) or "no source named", length):
            groups.setdefault(name, []).append(gap)
    return {name: {"accuracy": round(share_right(part), 4), "pairs": len(part)} for name, part in sorted(groups.items())}
