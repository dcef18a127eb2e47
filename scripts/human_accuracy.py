"""Accuracy of reward models on pairs that people judged, from local copies of public sources.

    python scripts/human_accuracy.py runs/demo/gold runs/demo/reward [--sources DIR]

Pairs, all within one prompt: PunEval (two generations for one pun word, one of them a successful pun by human label, the
other not; items of the val part), and the crowd ratings of He et al. 2019 (two systems' sentences for one word pair, mean
funniness at least .5 apart). 95 % intervals by bootstrap over prompts. No text of these sources is stored or printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
from collections import defaultdict
from itertools import combinations
from pathlib import Path

from punster.api import load
from punster.evaluate.winrate import bootstrap

Pairs = dict[str, list[tuple[str, str, str]]]  # item -> (prompt, better, worse)


def puneval(folder: Path, cap: int = 20) -> Pairs:
    """Success-labelled generations of val items, at most `cap` pairs an item."""
    split = json.loads((folder / "splits" / "semeval_group_split.json").read_text())["semeval"]
    labels = json.loads((folder / "puneval" / "pun_generation_manual_indicators.json").read_text())
    texts = json.loads((folder / "puneval" / "pun_generation.json").read_text())
    words = {}
    for kind in ("hom", "het"):
        words |= json.loads((folder / "puneval" / f"{kind}_dataset.json").read_text())
    pairs: Pairs = {}
    for identity, labelled in labels.items():
        if split.get(identity) != "val":
            continue
        good, bad = [], []
        for system, value in labelled.items():
            if system == "human_text":
                (good if value["success"] else bad).append(words[identity]["human_text"])
                continue
            for method, judged in value.items():
                text = texts[identity].get(system, {}).get(method)
                if isinstance(text, str) and text.strip():
                    (good if judged["success"] else bad).append(text.strip())
        prompt = f"make a pun about {words[identity]['pun_word']}"
        both = [(prompt, g, b) for g in good for b in bad]
        random.Random(identity).shuffle(both)
        if both:
            pairs[identity] = both[:cap]
    return pairs


def he_crowd(folder: Path, gap: float = 0.5) -> Pairs:
    """Sentences of different systems for one word pair whose mean funniness differs by at least `gap`."""
    ratings: dict[tuple[str, str], list[float]] = defaultdict(list)
    with (folder / "pungen_he2019" / "mturk_ratings_long.csv").open(encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            if row["aspect"] == "funniness":
                ratings[row["pun_alter"], row["sentence"]].append(float(row["rating"]))
    items: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for (words, sentence), values in ratings.items():
        items[words].append((sum(values) / len(values), sentence))
    pairs: Pairs = {}
    for words, sentences in items.items():
        prompt = f"make a pun about {words.split('-')[0]}"
        found = []
        for (a, first), (b, second) in combinations(sentences, 2):
            if abs(a - b) >= gap:
                found.append((prompt, first, second) if a > b else (prompt, second, first))
        if found:
            pairs[words] = found
    return pairs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--sources", type=Path, default=Path(os.environ.get("PUNSTER_DATA", "../shared/data")))
    options = parser.parse_args()
    sets = {"PunEval success, val": puneval(options.sources), "He crowd, gap >= .5": he_crowd(options.sources)}
    for run in options.runs:
        model = load(run)
        for name, pairs in sets.items():
            texts = sorted({(p, t) for item in pairs.values() for p, a, b in item for t in (a, b)})
            scores = dict(zip(texts, model.score([p for p, _ in texts], [t for _, t in texts]), strict=True))
            shares = [
                sum((scores[p, a] > scores[p, b]) + 0.5 * (scores[p, a] == scores[p, b]) for p, a, b in item) / len(item)
                for item in pairs.values()
            ]
            count = sum(len(item) for item in pairs.values())
            length = sum(len(a.split()) < len(b.split()) for item in pairs.values() for _, a, b in item) / count
            value = bootstrap(shares)
            print(
                f"{run}: {name}: {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}] "
                f"({len(pairs)} prompts, {count} pairs; shorter text wins {length:.3f})"
            )
