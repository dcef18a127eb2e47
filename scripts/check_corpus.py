"""Check a file of our own puns: schema, originality, repetition, and surface shortcuts.

    python scripts/check_corpus.py src/punster/data/puns.jsonl [--sources DIR]
    python scripts/check_corpus.py src/punster/data/contrasts.jsonl [--sources DIR]

Originality means: no pun or literal of ours has token-set Jaccard >= 0.5 with any text found under DIR (default:
``PUNSTER_DATA`` or ../shared/data), nor with a text of another of our records. Exit code 1 if anything is found.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import math
import os
import random
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

FIELDS = ("id", "topic", "prompt", "pun", "pun_word", "alternative_word", "kind", "literal")
EXTRA = ("synonym_swap", "plain", "weak")
KINDS = ("homophonic", "homographic", "near")
WORD = re.compile(r"[a-z0-9']+")


def tokens(text: str) -> list[str]:
    return WORD.findall(text.lower().replace("’", "'"))


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


def overlaps(queries: dict[str, list[str]], texts: Iterable[str], threshold: float = 0.5) -> dict[str, tuple[float, str]]:
    """For each query (key -> tokens) its nearest text with Jaccard >= threshold, by exact prefix filtering."""
    sets = {key: set(words) for key, words in queries.items()}
    frequency = Counter(word for words in sets.values() for word in words)
    prefix: dict[str, list[str]] = defaultdict(list)
    for key, words in sets.items():
        # Jaccard >= t needs at least ceil(t |a|) common tokens, so one of the rarest |a| - ceil(t |a|) + 1 is among them.
        rare_first = sorted(words, key=lambda word: (frequency[word], word))
        for word in rare_first[: len(words) - math.ceil(threshold * len(words)) + 1]:
            prefix[word].append(key)
    best: dict[str, tuple[float, str]] = {}
    for text in texts:
        other = set(tokens(text))
        if len(other) < 3:
            continue
        for key in {key for word in other for key in prefix.get(word, ())}:
            common = len(sets[key] & other)
            jaccard = common / (len(sets[key]) + len(other) - common)
            if jaccard >= threshold and jaccard > best.get(key, (0.0, ""))[0]:
                best[key] = (jaccard, text)
    return best


def own_overlaps(texts: list[tuple[str, str, str]], threshold: float = 0.5) -> list[str]:
    """Pairs of texts (record, field, text) of different records whose Jaccard reaches the threshold."""
    items = [(record, field, set(tokens(text))) for record, field, text in texts]
    by_word: dict[str, list[int]] = defaultdict(list)
    for index, (_, _, words) in enumerate(items):
        for word in words:
            by_word[word].append(index)
    found = []
    for index, (identity, field, words) in enumerate(items):
        counts = Counter(j for word in words for j in by_word[word] if j < index)
        for other, common in counts.items():
            identity2, field2, words2 = items[other]
            if identity2 != identity and common / (len(words) + len(words2) - common) >= threshold:
                found.append(f"{identity}.{field} ~ {identity2}.{field2}")
    return found


def shortcut_accuracy(records: list[dict[str, str]], seed: int = 0, folds: int = 5) -> dict[str, float]:
    """How often length alone, and a Naive Bayes on word 1-2-grams, tell pun from literal in held-out records."""

    def grams(text: str) -> list[str]:
        words = tokens(text)
        return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]

    order = list(records)
    random.Random(seed).shuffle(order)
    shorter = sum(
        (len(tokens(r["pun"])) < len(tokens(r["literal"]))) + 0.5 * (len(tokens(r["pun"])) == len(tokens(r["literal"])))
        for r in order
    ) / max(1, len(order))
    hits = 0.0
    for fold in range(folds):
        counts: dict[str, Counter[str]] = {"pun": Counter(), "literal": Counter()}
        for index, record in enumerate(order):
            if index % folds != fold:
                for label in counts:
                    counts[label].update(grams(record[label]))
        total = {label: sum(counts[label].values()) for label in counts}
        size = len(set(counts["pun"]) | set(counts["literal"])) + 1
        weight = {
            g: math.log((counts["pun"][g] + 1) / (total["pun"] + size))
            - math.log((counts["literal"][g] + 1) / (total["literal"] + size))
            for g in set(counts["pun"]) | set(counts["literal"])
        }
        unseen = math.log((total["literal"] + size) / (total["pun"] + size))
        for record in order[fold::folds]:
            a, b = (sum(weight.get(g, unseen) for g in grams(record[side])) for side in ("pun", "literal"))
            hits += 1.0 if a > b else 0.5 if a == b else 0.0
    return {"length": max(shorter, 1 - shorter), "naive_bayes": hits / max(1, len(order))}


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
        for key, (jaccard, text) in overlaps(queries, texts_under(sources)).items():
            found.append(f"{key}: Jaccard {jaccard:.2f} with a public text: {text[:120]!r}")
    accuracy = shortcut_accuracy(records)
    print(f"{len(records)} records, kinds {dict(Counter(r['kind'] for r in records))}", file=sys.stderr)
    print(f"shortcuts (0.5 is none): length {accuracy['length']:.3f}, Naive Bayes {accuracy['naive_bayes']:.3f}", file=sys.stderr)
    for name, value in accuracy.items():
        if value > 0.65:
            found.append(f"{name} alone tells pun from literal in {value:.0%} of held-out pairs (at most 65 %)")
    return found


def contrast_problems(path: Path, sources: Path | None) -> list[str]:
    """The same for contrasts: puns on a word, each with words that undo it, literal twins (of all of them or none), failed attempts."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found: list[str] = []
    queries: dict[str, list[str]] = {}
    longer: dict[str, list[float]] = defaultdict(list)
    for number, record in enumerate(records, 1):
        word, puns = record["pun_word"], [text for text, _ in record["puns"]]
        if len(puns) < 2 or len(record["fails"]) < 2 or len(record["literals"]) not in (0, len(puns)):
            found.append(f"line {number}: at least two puns and fails are needed, and as many literals as puns, or none")
        if not all(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for text in puns):
            found.append(f"line {number}: pun word {word!r} is not in each pun")
        if not all(words and word not in words for _, words in record["puns"]):
            found.append(f"line {number}: each pun needs words that can replace {word!r}")
        for field, texts in (("pun", puns), ("literal", record["literals"]), ("fail", record["fails"])):
            queries |= {f"line {number}, {field} {place + 1}": tokens(text) for place, text in enumerate(texts)}
        for kind, pairs in (
            ("literals", zip(puns, record["literals"], strict=False)),
            ("fails", itertools.product(puns, record["fails"])),
        ):
            for sizes in ([len(tokens(text)) for text in pair] for pair in pairs):
                longer[kind].append((sizes[0] > sizes[1]) + 0.5 * (sizes[0] == sizes[1]))
    found += own_overlaps([(f"line {n}", "pun", text) for n, record in enumerate(records, 1) for text, _ in record["puns"]])
    if sources is not None:
        for key, (jaccard, text) in overlaps(queries, texts_under(sources)).items():
            found.append(f"{key}: Jaccard {jaccard:.2f} with a public text: {text[:120]!r}")
    for kind, wins in longer.items():
        share = sum(wins) / len(wins)
        print(f"{len(records)} records; the pun is longer than {kind}: {share:.3f} (0.5 is no shortcut)", file=sys.stderr)
        if not 0.35 <= share <= 0.65:
            found.append(f"length alone tells puns from {kind}: the pun is the longer in {share:.0%} (35 to 65 %)")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--sources", type=Path, default=Path(os.environ.get("PUNSTER_DATA", "../shared/data")))
    options = parser.parse_args()
    judge = contrast_problems if options.file.name == "contrasts.jsonl" else problems
    result = judge(options.file, options.sources if options.sources.is_dir() else None)
    print("\n".join(result) or "no problems")
    sys.exit(1 if result else 0)
