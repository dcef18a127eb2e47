"""He et al. 2019: crowd ratings of six systems' puns on 130 word pairs, and mean ratings of the analysis sentences."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from punster.data.leakage import jaccard, words
from punster.data.prompts import request
from punster.data.schema import Row
from punster.data.sources.reading import BadRecord, Located, Place, Skips, each, json_values, lines, need, number, table
from punster.data.sources.wording import clean, detokenise

SEMEVAL = ("hetero_dev.json", "hetero_test.json", "homo_dev.json", "homo_test.json")
RANGES = {"funniness": (0, 5), "grammar": (1, 5), "success": (1, 2)}
Tie = Callable[[str], str | None]  # sentence -> id of its SemEval text
Ratings = dict[str, list[float]]  # aspect -> ratings
# Analysis sentences name the word in the sentence first; in these types that is the pun word, in the others the alternative.
WITH_PUN_WORD = ("pun", "retrieved_aw_alter", "retrieved_pw")


def read(folder: Path, skips: Skips) -> Located:
    """text rows (one a sentence, with mean ratings) and group rows (the sentences of one pair of words, best first)."""
    known = [row for name in SEMEVAL for _, row in each(json_values(folder / name), _known, skips)]
    yield from _crowd(folder / "mturk_ratings_long.csv", partial(_tie, known), skips)
    yield from _analysis(folder / "analysis_pun_scores.txt", partial(_tie, known), skips)


def _known(record: Any) -> Iterable[Row]:
    """A SemEval pun as this source lists it."""
    tokens = need(record, "tokens", list)
    if not all(isinstance(token, str) for token in tokens):
        raise BadRecord("a token is not text")
    text = " ".join(tokens)
    yield {"sequence": _sequence(text), "words": words(text), "id": need(record, "id")}


def _sequence(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _tie(known: list[Row], text: str) -> str | None:
    """The id of the text with the same words in the same order, or of the nearest with Jaccard >= .5."""
    sequence, own = _sequence(text), words(text)
    best = max(((row["sequence"] == sequence, jaccard(own, row["words"]), row["id"]) for row in known), default=(False, 0.0, ""))
    return best[2] if best[0] or best[1] >= 0.5 else None


def _crowd(path: Path, tie: Tie, skips: Skips) -> Located:
    found: dict[str, dict[tuple[str, str], Ratings]] = {}  # pair of words -> (system, sentence) -> ratings
    first: dict[str, Place] = {}
    columns = ("aspect", "worker_hash", "pun_alter", "system", "sentence", "rating")
    for place, vote in each(table(path, skips, columns), _vote, skips):
        first.setdefault(vote["pair"], place)
        sentences = found.setdefault(vote["pair"], {})
        sentences.setdefault((vote["system"], vote["text"]), defaultdict(list))[vote["aspect"]].append(vote["rating"])
    for pair, sentences in found.items():
        human = next((text for system, text in sentences if system == "human"), None)
        entries = [{"text": text, "system": system, **_means(ratings)} for (system, text), ratings in sentences.items()]
        yield from ((first[pair], row) for row in _group("crowd", pair, tie(human) if human else None, entries))


def _vote(record: Row) -> Iterable[Row]:
    aspect, rating = need(record, "aspect"), number(need(record, "rating"), "rating")
    low, high = RANGES.get(aspect, (1, 0))
    if not low <= rating <= high:
        raise BadRecord("unknown aspect, or a rating out of its range")
    vote = {"aspect": aspect, "rating": rating, "pair": need(record, "pun_alter"), "system": need(record, "system")}
    yield {**vote, "text": clean(detokenise(need(record, "sentence")))}


def _means(ratings: Ratings) -> Row:
    row: Row = {}
    if ratings["funniness"]:
        row |= {"rating": round(statistics.fmean(ratings["funniness"]), 4), "raters": len(ratings["funniness"])}
    if ratings["grammar"]:
        row["grammar"] = round(statistics.fmean(ratings["grammar"]), 4)
    if ratings["success"]:  # 1 is yes, 2 is no
        row["success"] = round(statistics.fmean(2 - vote for vote in ratings["success"]), 4)
    return row


def _analysis(path: Path, tie: Tie, skips: Skips) -> Located:
    groups: dict[str, list[Row]] = {}
    first: dict[str, Place] = {}
    for place, entry in each(lines(path), _sentence, skips):
        pair = "-".join(sorted(entry["pair"].split("-")))
        groups.setdefault(pair, []).append(entry)
        first.setdefault(pair, place)
    for pair, entries in groups.items():
        ties = [found for entry in entries if entry["system"] == "pun" and (found := tie(entry["text"])) is not None]
        yield from ((first[pair], row) for row in _group("analysis", pair, min(ties, default=None), entries))


def _sentence(line: str) -> Iterable[Row]:
    cells = line.split("\t")
    if len(cells) != 4 or "-" not in cells[1]:
        raise BadRecord("expected sentence, pair of words, type and score with tabs between")
    own, other = cells[1].split("-", 1)
    pun_word, alternative = (own, other) if cells[2] in WITH_PUN_WORD else (other, own)
    entry: Row = {"text": clean(detokenise(cells[0])), "system": cells[2], "rating": round(number(cells[3], "score"), 4)}
    yield {**entry, "raters": 5, "pair": cells[1], "pun_word": pun_word, "alternative_word": alternative}


def _group(part: str, pair: str, semeval_id: str | None, entries: list[Row]) -> Iterable[Row]:
    """The text rows of one pair of words, and their group if at least two of them are rated."""
    shared: Row = {"semeval_id": semeval_id, **dict(zip(("pun_word", "alternative_word"), [*pair.split("-"), ""], strict=False))}
    # Pairs of the analysis are sorted: the entries know which word is which.
    shared |= {name: value for name, value in entries[0].items() if name in shared}
    rated = [entry for entry in entries if "rating" in entry]
    for place, entry in enumerate(rated):
        first = {name: entry[name] for name in ("text", "system", "rating", "raters")}
        is_pun = True if entry["system"] in ("human", "pun") else None
        yield {"id": f"{part}/{pair}/{entry['system']}/{place}", **shared, **first, "is_pun": is_pun, **entry}
    for place, entry in enumerate(entry for entry in entries if "rating" not in entry):
        yield {"id": f"{part}/{pair}/{entry['system']}/unrated{place}", **shared, **entry}
    if len(rated) >= 2:
        ranked = sorted(rated, key=lambda entry: -entry["rating"])
        # All systems were given these words.
        group = {"id": f"{part}/{pair}/group", **shared, "prompt": request(None, shared["pun_word"])}
        columns = {"completions": "text", "scores": "rating", "systems": "system"}
        group |= {name: [entry[column] for entry in ranked] for name, column in columns.items()}
        yield {**group, "raters": min(entry["raters"] for entry in ranked)}
