"""Preference pairs out of ranked groups and of ratings, and single labelled texts; nothing of them is decided by length."""

from __future__ import annotations

import random
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations

from punster.data.schema import Row

Pair = tuple[int, int]  # places of the better and of the worse text


def from_group(group: Row, gap: float, cap: int, draw: random.Random) -> list[Row]:
    """Pairs of one ranked group whose scores differ by at least `gap` (and at all), at most `cap` (0: all).

    Texts that were recited are never the better one. Under a cap the better text is as often the longer as the shorter one,
    as far as there are such pairs.
    """
    texts, scores = group["completions"], group["scores"]
    recited = group.get("recited") or [False] * len(texts)
    lengths = [len(text.split()) for text in texts]
    fine = [
        (a, b) for a, b in combinations(range(len(texts)), 2)
        if scores[a] - scores[b] >= max(gap, 1e-9) and not recited[a] and texts[a] != texts[b]
    ]  # fmt: skip
    draw.shuffle(fine)
    if cap and len(fine) > cap:
        sides: dict[int, list[Pair]] = defaultdict(list)
        for a, b in fine:
            sides[(lengths[a] > lengths[b]) - (lengths[a] < lengths[b])].append((a, b))
        longer, shorter = sides[1], sides[-1]
        both = min(len(longer), len(shorter), (cap + 1) // 2)
        rest = sides[0] + longer[both:] + shorter[both:]
        fine = [*(pair for two in zip(longer[:both], shorter[:both], strict=True) for pair in two), *rest][:cap]
    names = ("prompt", "topic", "pun_word", "alternative_word", "source", "licence", "weight", "pass_share")
    shared: Row = {name: group[name] for name in names if name in group} | {"group": group.get("group", group["id"])}
    return [
        {**shared, "chosen": texts[a], "rejected": texts[b], "gap": round(scores[a] - scores[b], 4), "id": f"{group['id']}/{a}-{b}"}
        for a, b in fine
    ]  # fmt: skip


def ranked(group: Row) -> Row:
    """The group without recited texts: at the top they would be praised, further down a good pun would be blamed."""
    kept = [place for place, known in enumerate(group.get("recited") or [False] * len(group["scores"])) if not known]
    columns = {name: [group[name][place] for place in kept] for name in ("completions", "scores", "systems") if name in group}
    return {name: value for name, value in group.items() if name != "recited"} | columns


def length_matched(rows: Sequence[Row], gap: float, cap: int, limit: int, prompt: str, draw: random.Random, by: str) -> list[Row]:
    """Pairs of rated texts with equally many words whose ratings `by` differ by at least `gap`.

    Every text is in at most `cap` pairs; at most `limit` pairs (0: all that the cap allows).
    """
    buckets: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        buckets[len(row["text"].split())].append(row)
    used: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for bucket in buckets.values():
        bucket.sort(key=lambda row: (row[by], row["id"]))
    ratings = {size: [row[by] for row in bucket] for size, bucket in buckets.items()}
    better = [(size, row) for size, bucket in sorted(buckets.items()) for row in bucket]
    pairs: list[Row] = []
    for _ in range(cap):
        draw.shuffle(better)
        for size, row in better:
            if limit and len(pairs) >= limit:
                return pairs
            lower = min(bisect_right(ratings[size], row[by] - gap), bisect_left(ratings[size], row[by]))  # a tie is no judgement
            if used[row["id"]] >= cap or not lower:
                continue
            for _attempt in range(4):
                other = buckets[size][draw.randrange(lower)]
                key = row["id"], other["id"]
                if used[other["id"]] < cap and key not in seen and row["text"] != other["text"]:
                    seen.add(key)
                    used.update(key)
                    pair = {"prompt": prompt, "chosen": row["text"], "rejected": other["text"], "id": f"{key[0]}>{key[1]}"}
                    pair |= {"gap": round(row[by] - other[by], 4), "source": row["source"], "licence": row["licence"]}
                    pairs.append(pair)
                    break
    return pairs


def labelled(rows: Sequence[Row], by: str, prompt: str) -> list[Row]:
    """Single texts for the auxiliary heads: label (is it a pun, where known) and rating (`by`, standardised over these rows)."""
    rated = [float(row[by]) for row in rows if by != "is_pun" and row.get(by) is not None]
    mean, spread = (statistics.fmean(rated), statistics.pstdev(rated) or 1.0) if rated else (0.0, 1.0)
    found = []
    for row in rows:
        judged: Row = {"prompt": prompt, "completion": row["text"], "label": row.get("is_pun")}
        if by != "is_pun" and row.get(by) is not None:
            judged["rating"] = round((row[by] - mean) / spread, 4)
        kept = ("source", "licence", "id", "pun_word", "alternative_word")
        found.append({**judged, **{name: row[name] for name in kept if row.get(name)}})
    return found
