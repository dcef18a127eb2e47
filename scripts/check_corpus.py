"""Check a file of our own puns: schema, originality, repetition, and surface shortcuts.

    python scripts/check_corpus.py src/punster/data/puns.jsonl [--sources DIR]
    python scripts/check_corpus.py src/punster/data/contrasts.jsonl [--sources DIR]

Originality means: no pun or literal of ours has token-set Jaccard >= 0.5 with any text found under DIR (default:
``PUNSTER_DATA`` or ../shared/data), nor with a text of another of our records. Exit code 1 if anything is found.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gzip
import itertools
import json
import math
import os
import random
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from punster.data import corpus
from punster.data.leakage import Index, jaccard
from punster.data.split import lemma, part_of_lemma
from punster.evaluate.metrics import words as tokens

Pair = tuple[str, str, str]  # group, pun, what is no pun
FIELDS = ("id", "topic", "prompt", "pun", "pun_word", "alternative_word", "kind", "literal")
EXTRA = ("synonym_swap", "plain", "weak")
KINDS = ("homophonic", "homographic", "near")
FOLDS = 5


def strings_in(value: object) -> Iterator[str]:
    """Every string in a decoded JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        if value and all(isinstance(item, str) for item in value):  # a tokenised sentence, or a list of texts
            yield " ".join(value)
        for item in value:
            yield from strings_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings_in(item)


def texts_under(folder: Path) -> Iterator[str]:
    """Every text of every data file under a folder, whatever its format."""
    for path in sorted(folder.rglob("*")):
        name = path.name
        opener = gzip.open if name.endswith(".gz") else open
        stem = name.removesuffix(".gz")
        if stem.endswith(".json"):
            with opener(path, "rt", encoding="utf-8") as handle:
                yield from strings_in(json.load(handle))
        elif stem.endswith(".jsonl"):
            with opener(path, "rt", encoding="utf-8") as handle:
                for line in handle:
                    yield from strings_in(json.loads(line))
        elif stem.endswith(".xml"):
            for node in ElementTree.parse(path).getroot().iter("text"):
                yield " ".join(word.text or "" for word in node)
        elif stem.endswith((".csv", ".tsv", ".txt")) and name not in ("PROVENANCE.txt", "LICENSE.txt"):
            with opener(path, "rt", encoding="utf-8", newline="") as handle:
                if stem.endswith(".csv") or path.parent.name == "potd_reddithumor":
                    for row in csv.reader(handle):
                        yield from row
                else:
                    for line in handle:
                        yield from line.split("\t")


def overlaps(queries: dict[str, list[str]], texts: Iterable[str]) -> dict[str, tuple[float, str]]:
    """For each query (key -> tokens) its nearest text with Jaccard >= 0.5."""
    sets = {key: frozenset(words) for key, words in queries.items()}
    keys, index = list(sets), Index(list(sets.values()))
    best: dict[str, tuple[float, str]] = {}
    for text in texts:
        other = frozenset(tokens(text))
        for place in index.near(other) if len(other) >= 3 else ():
            key = keys[place]
            near = jaccard(sets[key], other)
            if near > best.get(key, (0.0, ""))[0]:
                best[key] = (near, text)
    return best


def own_overlaps(texts: list[tuple[str, str, str]]) -> list[str]:
    """Pairs of texts (record, field, text) of different records with Jaccard >= 0.5."""
    pairs = Index([frozenset(tokens(text)) for _, _, text in texts]).pairs()
    return [
        f"{texts[later][0]}.{texts[later][1]} ~ {texts[earlier][0]}.{texts[earlier][1]}"
        for earlier, later in sorted(sorted(pair) for pair in pairs)
        if texts[earlier][0] != texts[later][0]
    ]


def shortcut_accuracy(pairs: list[Pair]) -> dict[str, float]:
    """How often length alone, and a Naive Bayes on word 1-2-grams (the last word marked), tell the pun in held-out groups."""

    @functools.cache
    def grams(text: str) -> list[str]:
        words = tokens(text)
        return words + [f"{a} {b}" for a, b in itertools.pairwise([*words, "."])]

    groups = sorted({group for group, _, _ in pairs})
    random.Random(0).shuffle(groups)
    fold_of = {group: place % FOLDS for place, group in enumerate(groups)}
    lengths = [len(tokens(pun)) - len(tokens(other)) for _, pun, other in pairs]
    shorter = sum((gap < 0) + 0.5 * (gap == 0) for gap in lengths) / max(1, len(pairs))
    hits = 0.0
    for fold in range(FOLDS):
        counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for group, *texts in pairs:
            if fold_of[group] != fold:
                for count, text in zip(counts, texts, strict=True):
                    count.update(grams(text))
        known = set(counts[0]) | set(counts[1])
        pun, other = (sum(count.values()) + len(known) + 1 for count in counts)
        weight = {g: math.log((counts[0][g] + 1) / pun) - math.log((counts[1][g] + 1) / other) for g in known}
        unseen = math.log(other / pun)
        for group, *texts in pairs:
            if fold_of[group] == fold:
                a, b = (sum(weight.get(g, unseen) for g in grams(text)) for text in texts)
                hits += 1.0 if a > b else 0.5 if a == b else 0.0
    return {"length": max(shorter, 1 - shorter), "naive_bayes": hits / max(1, len(pairs))}


def shortcuts(name: str, pairs: list[Pair]) -> list[str]:
    """What tells more than 65 % of these pairs without a look at the wordplay; the figures go to stderr."""
    accuracy = shortcut_accuracy(pairs)
    print(f"{name}: {len(pairs)} pairs, {accuracy} (0.5 is no shortcut)", file=sys.stderr)
    return [f"{way} alone tells pun from {name} in {value:.0%} of held-out pairs (at most 65 %)"
            for way, value in accuracy.items() if value > 0.65]  # fmt: skip


def problems(path: Path, sources: Path | None) -> list[str]:
    records: list[dict[str, str]] = []
    found: list[str] = []
    seen: dict[str, set[str]] = {"id": set(), "pun_word": set(), "prompt": set()}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            found.append(f"line {number}: not JSON ({error})")
            continue
        missing = [field for field in FIELDS if not isinstance(record.get(field), str) or not record[field].strip()]
        if missing:
            found.append(f"line {number}: missing {missing}")
            continue
        if record["kind"] not in KINDS:
            found.append(f"line {number}: kind {record['kind']!r}")
        pun_tokens = " ".join(tokens(record["pun"]))
        if " ".join(tokens(record["pun_word"])) not in pun_tokens:
            found.append(f"line {number}: pun word {record['pun_word']!r} is not in the pun")
        if not 6 <= len(tokens(record["pun"])) <= 26:
            found.append(f"line {number}: pun has {len(tokens(record['pun']))} words (6 to 26)")
        if not record["prompt"].startswith("make a pun about "):
            found.append(f"line {number}: prompt must start with 'make a pun about '")
        for field, values in seen.items():
            value = record[field].lower()
            if value in values:
                found.append(f"line {number}: {field} {record[field]!r} occurs twice")
            values.add(value)
        records.append(record)
    found += own_overlaps([(r["id"], field, r[field]) for r in records for field in ("pun", "literal")])
    if sources is not None:
        queries = {f"{r['id']}.{field}": tokens(r[field]) for r in records for field in ("pun", "literal")}
        for key, (near, text) in overlaps(queries, texts_under(sources)).items():
            found.append(f"{key}: Jaccard {near:.2f} with a public text: {text[:120]!r}")
    print(f"{len(records)} records, kinds {dict(Counter(r['kind'] for r in records))}", file=sys.stderr)
    return found + shortcuts("literal", [(r["id"], r["pun"], r["literal"]) for r in records])


def contrast_problems(path: Path, sources: Path | None) -> list[str]:
    """The same for contrasts: puns on a word, each with words that undo it and a literal twin (or ""), and failed attempts."""
    found: list[str] = []
    texts: list[tuple[str, str, str]] = []
    pairs: dict[str, list[Pair]] = {"literal": [], "fail": []}
    held_out = {lemma(record["pun_word"]) for record in corpus.records() if record["split"] != "train"}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"line {number}"
        try:
            record = json.loads(line)
            word, other, fails = record["pun_word"], record["alternative_word"], record["fails"]
            puns, literals = record["puns"], record["literals"]
            told = [word, other, *fails, *literals, *(text for text, _ in puns), *(swap for _, words in puns for swap in words)]
            if not puns or len(literals) not in (0, len(puns)) or not all(isinstance(text, str) for text in told):
                raise ValueError("a text is none, there are no puns, or literals for some of the puns only")
        except (ValueError, KeyError, TypeError) as error:
            found.append(
                f"{where}: pun_word, alternative_word, puns [[text, [word]]], literals (for all puns or none), fails: {error!r}"
            )
            continue
        for held in {word, other, *tokens(word), *tokens(other)}:
            if lemma(held) in held_out or part_of_lemma(held) == "val":
                found.append(f"{where}: {held!r} is a held-out pun word")
        for place, (text, words) in enumerate(puns):
            times = len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))
            if not times:
                found.append(f"{where}, pun {place + 1}: {word!r} is not in it")
            blank = corpus.blank_of({"text": text, "pun_word": word, "alternative_word": other})
            if words and (times > 1 or blank is None):
                found.append(
                    f"{where}, pun {place + 1}: words can replace {word!r} only where it stands once, at the beginning or after a space"
                )
            for swap in words if blank else ():
                if not swap.strip() or not blank.takes(swap):
                    found.append(
                        f"{where}, pun {place + 1}: {swap!r} cannot replace {word!r} (number of words, a or an, capital, or a form of it)"
                    )
        texts += [(where, f"pun {place}", text) for place, (text, _) in enumerate(puns, 1)]
        texts += [(where, f"literal {place}", text) for place, text in enumerate(literals, 1) if text]
        texts += [(where, f"fail {place}", text) for place, text in enumerate(fails, 1)]
        pairs["literal"] += [(where, pun, text) for (pun, _), text in zip(puns, literals, strict=False) if text]
        pairs["fail"] += [(where, pun, text) for pun, _ in puns for text in fails
                          if corpus.ends_with(pun, word) == corpus.ends_with(text, word)]  # fmt: skip
    found += own_overlaps(texts)
    queries = {f"{where}, {field}": tokens(text) for where, field, text in texts}
    ours = [record[field] for record in corpus.records() for field in ("pun", "literal", *EXTRA)]
    ours += [row[side] for split in ("train", "test") for row in corpus.template_rows(split) for side in ("chosen", "rejected")]
    for key, (near, text) in overlaps(queries, ours).items():
        found.append(f"{key}: Jaccard {near:.2f} with the embedded corpus: {text[:120]!r}")
    if sources is not None:
        for key, (near, text) in overlaps(queries, texts_under(sources)).items():
            found.append(f"{key}: Jaccard {near:.2f} with a public text: {text[:120]!r}")
    for name, some in pairs.items():
        found += shortcuts(name, some)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--sources", type=Path, default=Path(os.environ.get("PUNSTER_DATA", "../shared/data")))
    options = parser.parse_args()
    judge = contrast_problems if '"puns":' in options.file.read_text(encoding="utf-8").split("\n", 1)[0] else problems
    result = judge(options.file, options.sources if options.sources.is_dir() else None)
    print("\n".join(result) or "no problems")
    sys.exit(1 if result else 0)
