"""The reward model's table: every measure by the one score, on held-out groups only, with intervals and shallow baselines.

    python scripts/reward_table.py runs/human-1 runs/human-2 runs/human-3       the table, mean over runs
    python scripts/reward_table.py --config recipes/reward-human.yaml --folds 5      train and judge He's pairs by cross-validation
    python scripts/reward_table.py --config recipes/reward-human.yaml --leave-out davidbau_puns    (or puneval, embedded, own)
    python scripts/reward_table.py --config recipes/reward-human.yaml --share 0.5

These three train a model for each of --seeds (runs/human-2-fold1); what is there already is gone on with, or scored as it is.

Texts are scored as {"text"} rows are, under the generic prompt; --prompts scores them under their own. Intervals are 95 %, by
bootstrap over groups (SemEval id, cloze sentence, pair of words, record, template). The baselines: the longer text, Naive Bayes
on 1-2-grams (SemEval, train part). Sources are read from --sources or PUNSTER_DATA; none of their text is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from punster.api import load
from punster.config import RewardConfig
from punster.data import corpus
from punster.data.leakage import Index, words
from punster.data.pool import Pool, data_folder, pool_of
from punster.data.prompts import GENERIC_PROMPT
from punster.data.schema import Row, texts_of
from punster.data.split import lemma
from punster.evaluate.metrics import auc
from punster.train.halves import row_words

Text = tuple[str, str]  # prompt, text
Score = Callable[[Sequence[Text]], Sequence[float]]


@dataclass(frozen=True)
class Measure:
    """Pairs (better, worse, group), or for an AUC texts with label and group; all of them held out."""

    name: str
    bar: float | None
    pairs: tuple[tuple[Text, Text, str], ...] = ()
    texts: tuple[tuple[Text, bool, str], ...] = ()

    def all_texts(self) -> list[Text]:
        return [text for a, b, _ in self.pairs for text in (a, b)] + [text for text, _, _ in self.texts]


# ---- what is measured ---------------------------------------------------------------------------------------------
def own_pairs(kind: str) -> list[Row]:
    """Of the corpus's test part, without pun words of which training has another form (raise and raised)."""
    trained = {lemma(record["pun_word"]) for record in corpus.part("train")}
    fresh = {record["id"] for record in corpus.part("test") if lemma(record["pun_word"]) not in trained}
    return [row for row in corpus.preference_rows((kind,), "test") if row["id"] in fresh]


def measures(pool: Pool) -> list[Measure]:
    """The held-out measures; He's pairs are those of the val part (cross-validation has its own)."""
    semeval = [((GENERIC_PROMPT, r["text"]), bool(r["is_pun"]), lemma(r["pun_word"]) if r.get("pun_word") else r["id"])
               for r in pool.rows("semeval2017_task7", "val")]  # fmt: skip
    puneval, groups = pool.rows("puneval", "val"), []
    for row in (row for row in puneval if "completions" in row):
        listed = [(row["prompt"], text, score >= 0.9) for text, score in zip(row["completions"], row["scores"], strict=True)]
        groups += [((p, a), (p, b), row["id"]) for p, a, good in listed if good for _, b, bad in listed if not bad and a != b]
    by_length = {
        way: tuple(pair for pair in groups if way * (len(pair[0][1].split()) - len(pair[1][1].split())) > 0) for way in (1, -1)
    }
    human = [row for row in pool.rows("expunations", "val") if row.get("is_pun")]
    funnier = [((GENERIC_PROMPT, a["text"]), (GENERIC_PROMPT, b["text"]), a["id"]) for a in human for b in human
               if a["rating"] - b["rating"] >= 1.0]  # fmt: skip
    random.Random(1).shuffle(funnier)
    template = corpus.template_rows("test")
    return [
        Measure("SemEval pun or not, AUC", 0.96, texts=tuple(semeval)),
        Measure("davidbau, punny over straight", 0.90, tuple(sided(pool.rows("davidbau_puns", "val"), "sentence"))),
        Measure("PunEval success, one prompt", 0.76, tuple(groups)),
        *he_measures([row for row in pool.rows("pungen_he2019", "val") if "completions" in row]),
        Measure("own minimal pairs: literal", 0.90, tuple(sided(own_pairs("literal"), "id"))),
        Measure("own minimal pairs: synonym", 0.90, tuple(sided(own_pairs("synonym_swap"), "id"))),
        Measure("own minimal pairs: homophone in a plain text", None, tuple(sided(own_pairs("homophone"), "id"))),
        Measure("PunEval, pun over synonym", None, tuple(sided((r for r in puneval if "chosen" in r), "semeval_id"))),
        Measure("own templates, AUC", 0.80, texts=tuple(
            ((GENERIC_PROMPT, row[side]), side == "chosen", row["template"]) for row in template for side in ("chosen", "rejected"))),
        Measure("own templates, twins", None, tuple(sided(template, "template"))),
        Measure("one prompt, the longer is right", 0.65, by_length[1]),
        Measure("one prompt, the shorter is right", 0.65, by_length[-1]),
        Measure("ExPUN funniness within puns", None, tuple(funnier[:4000])),
    ]  # fmt: skip


def sided(rows: Any, group: str) -> list[tuple[Text, Text, str]]:
    return [
        ((r["prompt"], r["chosen"]), (r["prompt"], r["rejected"]), str(r[group])) for r in rows if r["chosen"] != r["rejected"]
    ]


def he_measures(groups: Sequence[Row]) -> list[Measure]:
    """Crowd pairs with a gap of at least .5, all and between machines, and the true pun against the homophone swapped in."""
    every, machine, swap = [], [], []
    for row in (row for row in groups if row["id"].startswith("crowd/")):
        listed = [((row["prompt"], text), score, system)
                  for text, score, system in zip(row["completions"], row["scores"], row["systems"], strict=True)]  # fmt: skip
        for a, high, first in listed:
            for b, low, second in listed:
                if high - low >= 0.5:
                    every.append((a, b, row["id"]))
                    machine += [(a, b, row["id"])] if "human" not in (first, second) else []
                if first == "human" and second == "retrieve_swap":
                    swap.append((a, b, row["id"]))
    return [Measure("He crowd, gap >= .5, all", 0.80, tuple(every)), Measure("He crowd, machines only", 0.60, tuple(machine)),
            Measure("He, true pun over swapped homophone", 0.75, tuple(swap))]  # fmt: skip


# ---- how it is measured -------------------------------------------------------------------------------------------
def figure(measure: Measure, scores: dict[Text, float], resamples: int = 1000) -> dict[str, float]:
    """Pair accuracy (ties half) or AUC, with the interval by bootstrap over groups."""
    grouped: dict[str, list[Any]] = defaultdict(list)
    for a, b, group in measure.pairs:
        grouped[group].append((scores[a] > scores[b]) + 0.5 * (scores[a] == scores[b]))
    for text, label, group in measure.texts:
        grouped[group].append((scores[text], label))
    value = auc if measure.texts else (lambda wins: sum(wins) / len(wins))
    names, draw = sorted(grouped), random.Random(1)
    whole = value([x for name in names for x in grouped[name]])
    drawn = sorted(value([x for name in draw.choices(names, k=len(names)) for x in grouped[name]]) for _ in range(resamples))
    return {"value": whole, "low": drawn[int(0.025 * resamples)], "high": drawn[int(0.975 * resamples)], "groups": len(names),
            "count": len(measure.pairs or measure.texts)}  # fmt: skip


def naive_bayes(rows: Sequence[Row]) -> Score:
    """Log-odds of pun against non-pun from 1-2-grams, add-one smoothed, of the training part."""
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for row in rows:
        counts[bool(row["is_pun"])].update(grams(row["text"]))
    known = set(counts[True]) | set(counts[False])
    total = {label: sum(count.values()) + len(known) for label, count in counts.items()}
    odds = {g: math.log((counts[True][g] + 1) / total[True]) - math.log((counts[False][g] + 1) / total[False]) for g in known}
    return lambda texts: [sum(odds.get(g, 0.0) for g in grams(text)) for _, text in texts]


def grams(text: str) -> list[str]:
    found = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower()).split()
    return found + [f"{a} {b}" for a, b in pairwise(found)]


def scored(score: Score, wanted: Sequence[Measure]) -> dict[Text, float]:
    texts = sorted({text for measure in wanted for text in measure.all_texts()})
    return dict(zip(texts, score(texts), strict=True))


def by_run(run: str, own_prompts: bool) -> Score:
    model = load(run, dtype="fp32", merge=True)  # as punster score and the export
    return lambda texts: model.score([p if own_prompts else GENERIC_PROMPT for p, _ in texts], [text for _, text in texts])


# ---- what is trained on -------------------------------------------------------------------------------------------
def training_rows(config: RewardConfig) -> list[Row]:
    """What `punster reward` with this configuration learns from (without samples of a policy), pre-training included."""
    from punster.model.role import Role
    from punster.train.lessons import named_rows, of_half
    from punster.train.setup import open_base

    base, tokenizer = open_base(config)
    return of_half(config, named_rows(config, [*config.pretrain, *config.data], Role(base), tokenizer))


def from_source(row: Row, source: str | None) -> bool:
    """Rows that --leave-out drops: of PunEval the synonym pairs only, of the embedded corpus all but the templates.

    "own" drops the contrasts with the embedded corpus: they have other pun words, but the same hands wrote both.
    """
    if source == "puneval":
        return row.get("source") == "puneval" and "replaced_by" in row
    left_out = corpus.OWN if source == "own" else (source,)
    return row.get("source", "embedded") in left_out and row.get("kind") != "template"


def in_share(row: Row, share: float) -> bool:
    """Is a row in the drawn share? A family is in it as a whole, or not at all; smaller shares lie within larger ones."""
    from punster.train.judged import family

    return random.Random(family(row)).random() < share


def cross_validated(config: RewardConfig, pool: Pool, folds: int, own_prompts: bool) -> tuple[list[Measure], dict[Text, float]]:
    """He's measures over train + val: each fold by a model that saw none of its texts, words, or versions of them."""
    groups = [row for part in ("train", "val") for row in pool.rows("pungen_he2019", part) if "completions" in row]  # type: ignore[arg-type]
    keys = sorted({str(row.get("semeval_id") or row["id"]) for row in groups})
    random.Random(1).shuffle(keys)
    rows, own, scores = training_rows(config), corpus.by_id(), {}
    for fold in range(folds):
        held = set(keys[fold::folds])
        out = [row for row in groups if str(row.get("semeval_id") or row["id"]) in held]
        index, pun_words = Index([words(t) for row in out for t in texts_of(row)]), {lemma(row["pun_word"]) for row in out}
        kept = [row for row in rows if not pun_words & row_words(row, own) and not any(map(index.has_near, texts_of(row)))]
        print(f"fold {fold + 1}: {len(rows) - len(kept)} of {len(rows)} rows left out", file=sys.stderr)
        scores |= scored(by_run(variant(config, kept, f"fold{fold + 1}"), own_prompts), he_measures(out))
    return he_measures(groups), scores


def variant(config: RewardConfig, rows: Sequence[Row], label: str) -> str:
    """Trains on these rows, with all passes whatever the machine, so that variants compare; goes on where it was stopped."""
    from punster.train.reward import train_reward

    name = f"{config.name or 'human'}-{config.seed}-{label}"
    begun = (Path(config.out) / name / "config.yaml").exists()
    return str(train_reward(replace(config, name=name, pretrain=[], minutes=0.0, resume=begun), list(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--sources", default=None)
    parser.add_argument("--prompts", action="store_true", help="score under the rows' own prompts")
    parser.add_argument("--config", help="train with this configuration, for --folds, --leave-out or --share")
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--leave-out", choices=("davidbau_puns", "puneval", "embedded", "own"))
    parser.add_argument("--share", type=float, default=1.0, help="train on a drawn share of the families (learning curve)")
    parser.add_argument("--seeds", type=int, nargs="+", help="with --config: a model of each (default: the configuration's seed)")
    parser.add_argument("--out", help="write the figures as JSON")
    options = parser.parse_args()
    if not 0 < options.share <= 1:
        parser.error(f"--share must be above 0 and at most 1, got {options.share:g}")
    if (options.folds or options.leave_out or options.share < 1) and not options.config:
        parser.error("--folds, --leave-out and --share train models: say how with --config")
    if options.folds and (options.leave_out or options.share < 1 or options.runs):
        parser.error(
            "--folds goes with neither --leave-out nor --share, nor with finished runs, which may have learned from its texts"
        )
    pool = pool_of(data_folder(options.sources))
    found = measures(pool)
    named: dict[str, list[dict[Text, float]]] = {}
    if options.config:
        from punster.config.parsing import parse

        config = parse("reward", RewardConfig, ["--config", options.config])
        seeds = [replace(config, seed=seed) for seed in options.seeds or [config.seed]]
        if options.folds:
            crossed = [cross_validated(seed, pool, options.folds, options.prompts) for seed in seeds]
            found, named["model"] = crossed[0][0], [scores for _, scores in crossed]
        else:
            parts = [f"without-{options.leave_out}"] if options.leave_out else []
            parts += [f"share-{options.share:g}"] if options.share < 1 else []
            for seed in seeds:
                rows = training_rows(seed)
                kept = [row for row in rows if not from_source(row, options.leave_out) and in_share(row, options.share)]
                print(f"{len(kept)} of {len(rows)} rows", file=sys.stderr)
                options.runs.append(variant(seed, kept, "-".join(parts) or "whole"))
    if options.runs:
        named["model"] = [scored(by_run(run, options.prompts), found) for run in options.runs]
    named["longer"] = [scored(lambda texts: [float(len(text.split())) for _, text in texts], found)]
    named["naive bayes"] = [scored(naive_bayes(pool.rows("semeval2017_task7", "train")), found)]
    report = {}
    print(f"| measure | bar | n (groups) | {' | '.join(named)} |\n|{'---|' * (3 + len(named))}")
    for measure in found:
        figures = {name: [figure(measure, scores) for scores in runs] for name, runs in named.items()}
        report[measure.name] = {"bar": measure.bar, **figures}
        cells = []
        for runs in figures.values():
            mean, low, high = (sum(run[key] for run in runs) / len(runs) for key in ("value", "low", "high"))
            cells.append(f"{mean:.3f} [{low:.3f}, {high:.3f}]")
        size = figures["longer"][0]
        print(f"| {measure.name} | {measure.bar or '–'} | {size['count']} ({size['groups']}) | {' | '.join(cells)} |")
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
