"""The embedded corpus: original puns written for this project, and the rows that are made of it.

Each record: id, topic, prompt, pun, pun_word, alternative_word, kind, literal (the same set-up without wordplay),
synonym_swap, plain (an ordinary sentence with the alternative word), weak (a clumsy attempt), split. The split is by pun
word: train (SFT and the reward model that is trained against), gold (the yardstick reward model), val, test.

Beside it: contrasts, a few puns on a word with words that undo them, literal twins and failed attempts, for reward models (their
puns also for fine-tuning); and words that undo puns of the public sources, by id. Their pun words are none of the held-out ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import zip_longest
from typing import Any

import torch

from punster.data.prompts import GENERIC_PROMPT, topic_key
from punster.data.replace import Replacement, blank_of
from punster.data.schema import Row
from punster.data.split import lemma

PARTICLES = frozenset((
    "a", "an", "the", "to", "of", "in", "on", "i", "i'm", "i'll", "i've", "it", "it's", "is", "be", "me", "my", "you", "your", "we", "he", "she", "they",
))  # fmt: skip
OWN = ("embedded", "contrasts")  # sources that come with the package
CONTRASTS = ("synonym_swap", "literal", "weak")
NEGATIVES = ("literal", "off_topic", "synonym_swap", "homophone", "weak", "garbled", "spliced")


def _lines(name: str) -> tuple[dict[str, Any], ...]:
    text = (files("punster") / "data" / name).read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.split("\n") if line)


@cache
def records() -> tuple[dict[str, str], ...]:
    return _lines("puns.jsonl")


def by_id() -> dict[str, Row]:
    return {record["id"]: dict(record) for record in records()}


@cache
def template_rows(split: str = "train") -> tuple[Row, ...]:
    """Pairs of one joke template with and without wordplay, equally long; the test part has templates of its own."""
    return tuple(
        {"prompt": GENERIC_PROMPT, "chosen": r["pun"], "rejected": r["plain"], "kind": "template", "id": r["id"], "template": r["template"]}
        for r in _lines("templates.jsonl") if r["split"] == split
    )  # fmt: skip


@cache
def contrast_halves() -> tuple[int, ...]:
    """1 or 2 for each record of the contrasts; records that differ in it share no pun word and no word evoked (`spoken_words`).

    Half 1 goes with the train part of the embedded corpus in this, half 2 with its gold part; 0 where a record would link them.
    """
    taken: dict[int, set[str]] = {
        half: {word for record in part(split) for word in spoken_words(record)} for half, split in ((1, "train"), (2, "gold"))
    }
    found: list[int] = []
    for record in _lines("contrasts.jsonl"):
        near = [half for half, words in taken.items() if words & spoken_words(record)] or [1 + (found.count(1) > found.count(2))]
        found.append(near[0] if len(near) == 1 else 0)
        if len(near) == 1:
            taken[near[0]] |= spoken_words(record)
    return tuple(found)


def spoken_words(record: Mapping[str, Any]) -> set[str]:
    """Lemmas of a record's pun word and of what it evokes, whole and in their parts (a bridge, bridge)."""
    told = [record["pun_word"].lower(), record["alternative_word"].lower()]
    return {lemma(word) for phrase in told for word in (phrase, *re.findall(r"[a-z0-9']+", phrase)) if word not in PARTICLES}


@cache
def contrast_rows(kind: str, half: int = 0) -> tuple[Row, ...]:
    """Pairs of a pun with another word in the pun word's place (synonym_swap) or without wordplay (literal); or groups (weak).

    weak: puns on a word above failed attempts at one that end with the pun word where the puns do, and elsewhere where they do
    not, as most puns end with it. Rows of one record share their group. All are for training. half: of `contrast_halves` (0: all).
    """
    rows: list[Row] = []
    for number, record in enumerate(_lines("contrasts.jsonl")):
        if half and contrast_halves()[number] != half:
            continue
        shared = {"prompt": GENERIC_PROMPT, "kind": kind, "source": "contrasts", "licence": "MIT", "group": f"contrast-{number}",
                  "pun_word": record["pun_word"], "alternative_word": record["alternative_word"]}  # fmt: skip
        if kind == "weak":
            for last in (True, False):
                puns, fails = (
                    [text for text in texts if ends_with(text, record["pun_word"]) is last]
                    for texts in ([text for text, _ in record["puns"]], record["fails"])
                )
                scores, identity = [1] * len(puns) + [0] * len(fails), f"contrast-{number}/{'last' if last else 'inside'}"
                rows += [{**shared, "completions": [*puns, *fails], "scores": scores, "id": identity}] if puns and fails else []
        for place, ((text, words), literal) in enumerate(zip_longest(record["puns"], record["literals"])):
            others = [literal] if kind == "literal" and literal else []
            if kind == "synonym_swap" and (blank := blank_of({**shared, "text": text})):
                others = [blank.filled(word) for word in words]  # that they fit is checked by scripts/check_corpus.py
            rows += [{**shared, "chosen": text, "rejected": other, "id": f"contrast-{number}/{place}{turn}"}
                     for turn, other in enumerate(others)]  # fmt: skip
    return tuple(rows)


@cache
def contrast_puns(half: int = 0) -> tuple[Row, ...]:
    """The puns of the contrasts as texts to learn to write; a mixture gives them their prompts."""
    return tuple(
        {"text": text, "pun_word": record["pun_word"], "alternative_word": record["alternative_word"], "source": "contrasts",
         "licence": "MIT", "id": f"contrast-{number}/{place}", "is_pun": True}
        for number, record in enumerate(_lines("contrasts.jsonl")) if half in (0, contrast_halves()[number])
        for place, (text, _) in enumerate(record["puns"])
    )  # fmt: skip


@cache
def held_out_topics() -> frozenset[str]:
    """The words of the topics of held-out records, as `topic_key` writes them."""
    topics = (record["topic"] for split in ("val", "test") for record in part(split))
    return frozenset(topic_key(word) for topic in topics for word in topic.split())


def ends_with(text: str, word: str) -> bool:
    return text.lower().rstrip(" .!?\"')").endswith(word.lower())


@cache
def replacements() -> dict[str, Replacement]:
    """By source and id of a public pun: words that leave a plain sentence in its pun word's place, near to either sense or just plausible."""
    text = (files("punster") / "data" / "replacements.tsv").read_text(encoding="utf-8")
    fields = (line.split("\t") for line in text.split("\n") if line)
    return {key: Replacement(tuple(words.split("|")), *pun_word) for key, words, *pun_word in fields}


def part(split: str) -> list[dict[str, str]]:
    chosen = [record for record in records() if record["split"] == split]
    if not chosen:
        raise ValueError(f"unknown split {split!r}: train, gold, val, test")
    return chosen


def sft_rows(split: str = "train") -> list[Row]:
    kept = ("prompt", "id", "pun_word", "alternative_word")
    return [{**{name: record[name] for name in kept}, "completion": record["pun"]} for record in part(split)]


def prompts(split: str = "train") -> list[str]:
    return [record["prompt"] for record in part(split)]


def preference_rows(negatives: Iterable[str], split: str = "train", seed: int = 1) -> list[Row]:
    """One pair for each record and kind of negative; off-topic partners are a seeded derangement of the same part."""
    chosen = part(split)
    shift = 1 + int(torch.randint(len(chosen) - 1, (1,), generator=torch.Generator().manual_seed(seed))) if len(chosen) > 1 else 0

    def rejected(kind: str, index: int) -> str:
        record, other = chosen[index], chosen[(index + shift) % len(chosen)]["pun"]
        if kind in ("garbled", "spliced"):
            return (garbled if kind == "garbled" else spliced)(record["pun"], other, index)
        if kind == "homophone":
            return homophone_sentence(record, index, chosen)
        return other if kind == "off_topic" else record[kind]

    return [
        {"prompt": r["prompt"], "chosen": r["pun"], "rejected": rejected(kind, index), "kind": kind, "id": r["id"]}
        for kind in negatives for index, r in enumerate(chosen)
    ]  # fmt: skip


def pairs(split: str = "train") -> list[Row]:
    """Puns over their literal twins, and over puns on other topics: what "embedded" stands for among pairs."""
    return preference_rows(("literal", "off_topic"), split)


def unpaired(rows: Sequence[Row]) -> list[Row]:
    """KTO's rows out of pairs: the chosen text is desirable, the rejected one is not."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows for side in ("chosen", "rejected")
    ]  # fmt: skip


def garbled(text: str, other: str, index: int) -> str:
    """Every third longer word replaced by one of another text, in its case and punctuation: as long, on the topic, senseless."""
    donors = re.findall(r"[a-z]{4,}", other.lower()) or ["thing"]
    count = index

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return match[0] if count % 3 else _cased(donors[count // 3 % len(donors)], match[0])

    return re.sub(r"[A-Za-z]{4,}", replace, text)


def spliced(text: str, other: str, index: int) -> str:
    """Half of this text and half of another, by turns its beginning and its end: as long, well written, about two things."""
    own, strange = text.split(), other.split()
    half, rest = len(own) // 2, len(own) - len(own) // 2
    return " ".join(own[:half] + strange[-rest:] if index % 2 else strange[:half] + own[-rest:])


def groups(split: str = "train") -> list[Row]:
    """Ranked triples: the pun, a clumsy attempt at one, the same set-up without wordplay."""
    return [
        {"prompt": r["prompt"], "completions": [r["pun"], r["weak"], r["literal"]], "scores": [2, 1, 0], "id": r["id"],
         "source": "embedded", "licence": "MIT", "pun_word": r["pun_word"], "alternative_word": r["alternative_word"]}
        for r in part(split) if r["weak"]
    ]  # fmt: skip


def homophone_dropped_in(record: dict[str, str]) -> str:
    """The plain sentence with the alternative word replaced by the pun word (unchanged for homographs)."""
    pattern = rf"(?<!\w){re.escape(record['alternative_word'])}(?!\w)"
    return re.sub(pattern, lambda match: _cased(record["pun_word"], match[0]), record["plain"], flags=re.IGNORECASE)


_LOWERED = {"a", "an", "the", "she", "he", "they", "we", "it", "his", "her", "my", "our", "their", "two", "three", "there", "every",
            "both", "after", "before", "when", "each", "most", "some", "one", "you", "your", "at", "on", "in"}  # fmt: skip


_CONNECTIVES = ("and", "but", "so", "while")


def homophone_sentence(record: dict[str, str], index: int, others: list[dict[str, str]]) -> str:
    """The pun word dropped into a plain sentence, joined with another plain one to exactly the pun's length where possible.

    Alone plain sentences are half as long as puns, and any two of them a little longer: either would give them away.
    """
    first = homophone_dropped_in(record)
    if len(others) == 1:
        return first
    # A third aims one word lower, since where no partner is short enough the sentence comes out longer.
    missing = len(record["pun"].split()) - len(first.split()) - 1 - (index % 3 == 0)
    plain = [others[(index + k) % len(others)]["plain"] for k in range(1, len(others))]
    second = min(plain, key=lambda text: abs(len(text.split()) - missing))
    if second.split(" ", 1)[0].lower() in _LOWERED:
        second = second[:1].lower() + second[1:]
    return f"{first.rstrip('.!?')}, {_CONNECTIVES[index % len(_CONNECTIVES)]} {second}"


def _cased(word: str, like: str) -> str:
    return word[:1].upper() + word[1:] if like[:1].isupper() and like[1:].islower() else word
