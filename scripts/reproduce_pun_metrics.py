"""The tables of docs/EVALUATION.md that reproduce published figures, from local copies of the public sources.

    python scripts/reproduce_pun_metrics.py [--sources DIR] [--model M] [--parts ratings kao he location alternatives]

ratings: Table 3 of He et al. 2019 from the crowd's ratings. kao, he: Spearman correlations with funniness (their Table 2).
location: the pun word of SemEval-2017 task 7, subtask 2; weights fitted on the train part. alternatives: the word that the pun
word of a heterographic pun stands for. No text of these sources is stored or printed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

import torch

from punster.api import load
from punster.data.pool import Pool, data_folder
from punster.data.schema import Row
from punster.data.sources.wording import detokenise
from punster.data.split import lemma
from punster.evaluate.metrics import spearman
from punster.puns import locate
from punster.puns.ambiguity import text_meanings
from punster.puns.surprisal import CODE, PAPER, find_word, log_probs, surprisals, unusualness

Entry = tuple[str, str, str, str, float]  # text, pun word, alternative word, type, funniness


def clipped(values: list[float]) -> list[float]:
    """z-scores within +-2, as He et al. take them before the rank correlation."""
    mean, spread = statistics.fmean(values), statistics.pstdev(values) or 1.0
    return [min(2.0, max(-2.0, (v - mean) / spread)) for v in values]


def with_p(a: list[float], b: list[float], draws: int = 2000) -> str:
    """Spearman and its two-sided p-value by permutation."""
    rho = spearman(clipped(a), b)
    left, right = (torch.tensor(clipped([float(x) for x in torch.tensor(v).argsort().argsort()])) for v in (a, b))
    generator = torch.Generator().manual_seed(1)
    nulls = torch.tensor(
        [torch.corrcoef(torch.stack((left, right[torch.randperm(len(b), generator=generator)])))[0, 1] for _ in range(draws)]
    )
    return f"{rho:+.2f} ({float((nulls.abs() >= abs(rho)).double().mean()):.2f})"


def ratings(folder: Path) -> None:
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (folder / "pungen_he2019" / "mturk_ratings_long.csv").open(encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            found[row["system"], row["aspect"]][row["pun_alter"]].append(float(row["rating"]))
    print("| system | success % | funniness | grammar |\n|---|---|---|---|")
    for system in dict.fromkeys(system for system, _ in found):
        fun = [statistics.fmean(v) for r in found[system, "funniness"].values() if (v := [x for x in r if x])]
        grammar = [statistics.fmean(r) for r in found[system, "grammar"].values()]
        yes = [statistics.fmean(2 - x for x in r) for r in found[system, "success"].values()]
        print(f"| {system} | {100 * statistics.fmean(yes):.1f} | {statistics.fmean(fun):.2f} | {statistics.fmean(grammar):.2f} |")


def correlations(model: str, name: str, rows: list[Entry], subsets: dict[str, set[str]]) -> None:
    loaded = load(model)
    role, tokenizer = loaded.role, loaded.tokenizer
    places = [find_word(text, word) for text, word, *_ in rows]
    kept = [(row, place) for row, place in zip(rows, places, strict=True) if place]
    print(f"{name}: {len(kept)} of {len(rows)} texts contain their word")
    texts = [row[0] for row, _ in kept]
    columns: dict[str, list[float]] = {}
    for label, reach in (("window of the paper", PAPER), ("window of the code", CODE)):
        values = surprisals(role, tokenizer, [(row[0], place, row[2]) for row, place in kept], reach)
        columns[f"S_ratio, {label}"] = [v.ratio for v in values]
        columns[f"S_local, {label}"] = [v.near for v in values]
        columns[f"S_local - S_global, {label}"] = [v.near - v.far for v in values]
    columns["S_global"] = [v.far for v in values]
    columns["unusualness"] = [unusualness(log, text) for log, text in zip(log_probs(role, tokenizer, texts), texts, strict=True)]
    both = text_meanings(role, tokenizer, [row[:3] for row, _ in kept])
    columns["ambiguity"], columns["distinctiveness"] = [m.ambiguity for m in both], [m.distinctiveness for m in both]
    chosen = {key: [i for i, (row, _) in enumerate(kept) if row[3] in types] for key, types in subsets.items()}
    print("| metric | " + " | ".join(f"{key} ({len(k)})" for key, k in chosen.items()) + " |\n|" + "---|" * (len(chosen) + 1))
    for metric, values_ in columns.items():
        cells = [with_p([values_[i] for i in k], [kept[i][0][4] for i in k]) for k in chosen.values()]
        print(f"| {metric} | " + " | ".join(cells) + " |", flush=True)


def kao(pool: Pool) -> list[Entry]:
    return [
        (r["text"], r["pun_word"], r["alternative_word"], "pun" if r["is_pun"] else "non", r["rating"])
        for r, _ in pool.located("kao_puns")
    ]


def he(folder: Path) -> list[Entry]:
    rows = []
    for line in (folder / "pungen_he2019" / "analysis_zscored_pun_scores.txt").read_text(encoding="utf-8").splitlines():
        text, pair, kind, score = line.split("\t")
        word, alternative = pair.split("-", 1)
        rows.append((detokenise(text), word, alternative, kind, float(score)))
    return rows


def location(pool: Pool, model: str) -> None:
    loaded = load(model)
    rows = [(row, part) for row, part in pool.located("semeval2017_task7") if row["is_pun"]]
    logs = locate.word_log_probs(loaded.role, loaded.tokenizer, [row["text"] for row, _ in rows])
    tables = [locate.features(row["text"], found) for (row, _), found in zip(rows, logs, strict=True)]
    gold = [
        [k for k, p in enumerate(found) if row["text"][slice(*p)].lower() == row["pun_word"]]
        for (row, _), found in zip(rows, logs, strict=True)
    ]
    train = [i for i, (_, part) in enumerate(rows) if part == "train" and gold[i]]
    weights = fitted([tables[i] for i in train], [gold[i][-1] for i in train])
    print("weights", [round(w, 3) for w in weights.tolist()], "of", ", ".join(locate.FEATURES))
    print("| part | texts | last content word | located |\n|---|---|---|---|")
    for kind in ("homographic", "heterographic"):
        for name in ("train", "val", "all"):
            chosen = [i for i, (row, part) in enumerate(rows) if row["kind"] == kind and name in (part, "all")]
            last = sum(len(tables[i]) - 1 in gold[i] for i in chosen) / len(chosen)
            used = torch.tensor(locate.WEIGHTS, dtype=torch.float64)
            right = sum(int((tables[i] @ used).argmax()) in gold[i] for i in chosen) / len(chosen)
            print(f"| {kind}, {name} | {len(chosen)} | {last:.3f} | {right:.3f} |")


def fitted(tables: list[torch.Tensor], gold: list[int], penalty: float = 1e-3) -> torch.Tensor:
    """Weights of the conditional logit: the pun word against the other candidates of its text."""
    longest = max(map(len, tables))
    x = torch.zeros(len(tables), longest, tables[0].shape[1], dtype=torch.float64)
    absent = torch.ones(len(tables), longest, dtype=torch.bool)
    for i, table in enumerate(tables):
        x[i, : len(table)], absent[i, : len(table)] = table, False
    weights = torch.zeros(x.shape[2], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        scores = (x @ weights).masked_fill(absent, -1e9).log_softmax(1)
        loss = -scores[torch.arange(len(gold)), torch.tensor(gold)].mean() + penalty * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def alternatives(pool: Pool, model: str) -> None:
    loaded = load(model)
    rows: list[Row] = [
        row for row in pool.rows("semeval2017_task7", "val") if row["kind"] == "heterographic" and "alternative_word" in row
    ]
    placed = [(row, place) for row in rows if (place := find_word(row["text"], row["pun_word"])) and row["pun_word"].isalpha()]
    found = locate.alternatives(loaded.role, loaded.tokenizer, [(row["text"], place) for row, place in placed])
    right = sum(lemma(word) == lemma(row["alternative_word"]) for word, (row, _) in zip(found, placed, strict=True))
    print(f"alternative words, heterographic val puns: {right} of {len(placed)} = {right / len(placed):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--parts", nargs="+", default=["ratings", "kao", "he", "location", "alternatives"])
    options = parser.parse_args()
    folder = data_folder(options.sources)
    pool = Pool(folder)
    if "ratings" in options.parts:
        ratings(folder)
    if "kao" in options.parts:
        rows = kao(pool)
        puns = [i for i, row in enumerate(rows) if row[3] == "pun"]
        for name in ("ambiguity", "distinctiveness"):
            values = [r[name] for r, _ in pool.located("kao_puns")]
            both = spearman(values, [row[4] for row in rows]), spearman([values[i] for i in puns], [rows[i][4] for i in puns])
            print(f"the file's own {name}: all {both[0]:.3f}, puns {both[1]:.3f}")
        correlations(options.model, "Kao", rows, {"pun + non-pun": {"pun", "non"}, "pun": {"pun"}})
    if "he" in options.parts:
        subsets = {"pun + non-pun": {"pun", "retrieved_aw", "retrieved_pw"}, "pun + swap": {"pun", "depun"}, "pun": {"pun"}}
        correlations(options.model, "He, analysis file", he(folder), subsets)
    if "location" in options.parts:
        location(pool, options.model)
    if "alternatives" in options.parts:
        alternatives(pool, options.model)
