"""Assign each record of the embedded corpus to train, gold, val or test, by pun word.

    python scripts/split_corpus.py RECORDS.jsonl [MORE.jsonl ...] --out src/punster/data/puns.jsonl

Records that share a pun word or an alternative word (compared without case and common endings) stay together. The
assignment depends on the words alone, so that it is stable when records are added.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path

SHARES = (("train", 0.56), ("gold", 0.24), ("val", 0.06), ("test", 0.14))


def stem(word: str) -> str:
    word = re.sub(r"[^a-z]", "", word.lower())
    return re.sub(r"(ing|ed|es|s|ly|er)$", "", word) if len(word) > 4 else word


def split(records: list[dict[str, str]]) -> None:
    parent: dict[str, str] = {}

    def find(word: str) -> str:
        parent.setdefault(word, word)
        while parent[word] != word:
            word = parent[word]
        return word

    for record in records:
        parent[find(stem(record["alternative_word"]))] = find(stem(record["pun_word"]))
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for record in records:
        groups[find(stem(record["pun_word"]))].append(record)
    for members in groups.values():
        name = min(stem(record["pun_word"]) for record in members)
        place = int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12
        total = 0.0
        for label, share in SHARES:
            total += share
            if place < total or label == "test":
                for record in members:
                    record["split"] = label
                break


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = [json.loads(line) for path in options.files for line in path.read_text(encoding="utf-8").splitlines()]
    split(rows)
    # In no order of meaning, so that the first n of a part are a fair sample of it.
    rows.sort(key=lambda record: hashlib.sha256(record["id"].encode()).hexdigest())
    options.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row["split"]] += 1
    print(f"{len(rows)} records: {dict(counts)}")
