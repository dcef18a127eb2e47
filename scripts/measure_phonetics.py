"""What punster.puns.phonetics can do, in two figures: errors of the fallback, and pun pairs found.

    python scripts/measure_phonetics.py [--data ../shared/data]

1. Phoneme error rate of grapheme-to-phoneme conversion on 2,000 dictionary words that the model was not fitted on.
2. Heterographic puns of SemEval-2017 task 7 subtask 3: how often the alternative word is among the 10 nearest of the 20,000
   most frequent words and all true alternatives. Every pair counts, lemmas are matched, other forms of the pun word left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from lemminflect import getAllLemmas

from punster.errors import UserError
from punster.puns.g2p import fit
from punster.puns.phonetics import common_words, dictionary, lemma, nearest, plain


class Errors(NamedTuple):
    phonemes: float  # share of wrong phonemes, stress apart
    stressed: float  # the same, a vowel with the wrong stress counted as wrong
    words: float  # share of words with a wrong phoneme


def edits(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Levenshtein distance in phonemes."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, two in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (one != two))
    return row[-1]


def held_back_errors(count: int = 2000, seed: int = 0) -> Errors:
    """Error rates on words that a newly fitted model has not seen, each against the nearest of its listed pronunciations."""
    known = {word: [tuple(text.split()) for text in found] for word, found in dictionary().items() if word.isalpha()}
    held = random.Random(seed).sample(sorted(known), count)
    unseen = set(held)
    model = fit((word, sounds) for word, found in known.items() if word not in unseen for sounds in found)
    wrong = stressed = total = words = 0
    for word in held:
        guess = model.pronounce(word)
        errors, length = min((edits(plain(guess), plain(truth)), len(truth)) for truth in known[word])
        wrong, total, words = wrong + errors, total + length, words + (errors > 0)
        stressed += min(edits(guess, truth) for truth in known[word])
    return Errors(wrong / total, stressed / total, words / count)


class Pair(NamedTuple):
    id: str
    part: str  # train or val
    pun_word: str  # as it stands in the text
    alternatives: frozenset[str]  # lemmas of the second sense, any of which is right


def pairs(data: Path) -> Iterator[Pair]:
    """The heterographic pairs with their part of the split."""
    task = data / "semeval2017_task7"
    part = json.loads((data / "splits" / "semeval_group_split.json").read_text())["semeval"]
    words = {word.get("id"): word.text or "" for word in ElementTree.parse(task / "subtask3-heterographic-test.xml").iter("word")}
    for line in (task / "subtask3-heterographic-test.gold").read_text().splitlines():
        place, _, senses = line.split()
        text = place.rsplit("_", 1)[0]
        lemmas = frozenset(sense.split("%")[0].replace("_", " ") for sense in senses.split(";"))
        yield Pair(text, part[text], words[place], lemmas)


def lemmas(word: str) -> list[str]:
    """Lemmas by lemminflect's dictionary, for `lemma` takes off regular endings only."""
    return [base for bases in getAllLemmas(word).values() for base in bases]


def found(pair: Pair, candidates: tuple[str, ...], k: int = 10) -> bool:
    """Whether a form of a true alternative is among the k nearest; no for pun words that cannot be pronounced."""
    try:
        words = [word for word, _ in nearest(pair.pun_word, k, candidates)]
    except UserError:
        return False
    return any(form in pair.alternatives for word in words for form in (word, lemma(word), *lemmas(word)))


def recall(data: Path, k: int = 10) -> dict[str, tuple[int, int]]:
    """Pairs found and pairs in all, for train, val and both."""
    every = list(pairs(data))
    candidates = tuple(dict.fromkeys([*common_words(), *sorted(set().union(*(pair.alternatives for pair in every)))]))
    hits = {pair.id: found(pair, candidates, k) for pair in every}
    parts = {name: [pair.id for pair in every if name in (pair.part, "all")] for name in ("train", "val", "all")}
    return {name: (sum(hits[i] for i in ids), len(ids)) for name, ids in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="errors of the pronunciation fallback, and pun pairs found by sound")
    parser.add_argument("--data", type=Path, default=os.environ.get("PUNSTER_DATA") or "../shared/data")
    folder = parser.parse_args().data
    errors = held_back_errors()
    print(
        f"2,000 unseen words: phoneme errors {errors.phonemes:.1%}, with stress {errors.stressed:.1%}, words {errors.words:.1%}"
    )
    for part, (hits, total) in recall(folder).items():
        print(f"alternative among the 10 nearest, {part}: {hits} of {total} = {hits / total:.1%}")


if __name__ == "__main__":
    main()
