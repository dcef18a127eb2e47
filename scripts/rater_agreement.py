"""How far the raters of He et al. (2019) agree with each other on pairs of texts about one pair of words.

    python scripts/rater_agreement.py

A rater's own preference is set against the mean of the others where that differs by at least .5, as the pairs of docs/REWARD.md do
(ties half). Whoever predicts the mean of five raters can hardly do better than a rater agrees with the other four. The source is
read from PUNSTER_DATA; none of its text is printed.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from statistics import fmean

from punster.data.pool import data_folder

GAP = 0.5


def kind_of_pair(first: str, second: str) -> str:
    if "human" in (first, second):
        return "a person's and a machine's"
    return "machines, NJD one of them" if "njd" in (first, second) else "machines, NJD none of them"


def agreements(folder: Path) -> dict[str, list[float]]:
    """For each kind of pair 1, .5 or 0 for each rater of both texts whose fellow raters tell them apart."""
    votes: dict[str, dict[tuple[str, str], dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with (folder / "pungen_he2019" / "mturk_ratings_long.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["aspect"] == "funniness":
                votes[row["pun_alter"]][row["system"], row["sentence"]][row["worker_hash"]] = float(row["rating"])
    found: dict[str, list[float]] = defaultdict(list)
    for texts in votes.values():
        for (a, first), (b, second) in combinations(texts.items(), 2):
            gaps = {rater: first[rater] - second[rater] for rater in first.keys() & second.keys()}
            for rater, own in sorted(gaps.items()):
                others = [gap for other, gap in gaps.items() if other != rater]
                if others and abs(mean := fmean(others)) >= GAP:
                    found[kind_of_pair(a[0], b[0])].append((own * mean > 0) + 0.5 * (own == 0))
    return found


def main() -> None:
    found = agreements(data_folder())
    found["machines, all"] = [x for kind, each in found.items() if kind.startswith("machines") for x in each]
    found["all"] = [x for kind in ("a person's and a machine's", "machines, all") for x in found[kind]]
    print("| pairs | ratings | a rater agrees with the others |\n|---|---|---|")
    for kind, each in found.items():
        print(f"| {kind} | {len(each)} | {fmean(each):.3f} |")


if __name__ == "__main__":
    main()
