"""He et al. 2019: crowd ratings of six systems' puns on 130 word pairs, and mean ratings of the analysis sentences."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from punster.data.leakage import jaccard, words
from punster.data.prompts import request
from punster.data.schema import Row
from punster.data.sources.reading import BadRecord, Located, Place, Skips, each, json_values, lines, need, number, table
from punster.data.sources.wording import clean, detokenise

SEMEVAL = ("hetero_dev.json", "hetero_test.json", "homo_dev.json", "homo_test.json")
RANGES = {"funniness": (0, 5), "grammar": (1, 5), "success": (1, 2)}
Ratings = dict[str, list[float]]  # aspect -> ratings
# Analysis sentences name the word in the sentence first; in these types that is the pun word, in the others the alternative.
WITH_PUN_WORD = ("pun", "retrieved_aw_alter", "retrieved_pw")


class SemEvalTexts:
    """The SemEval puns as this source lists them: a sentence is tied to the text that it equals or nearly equals."""

    def __init__(self, folder: Path, skips: Skips) -> None:
        self.ids: dict[tuple[str, ...], str] = {}
        self.sets: list[tuple[frozenset[str], str]] = []
        for name in SEMEVAL:
            for _ in each(json_values(folder / name), self._add, skips):
                pass

    def _add(self, record: Any) -> list[Row]:
        tokens = need(record, "tokens", list)
        if not all(isinstance(token, str) for token in tokens):
            raise BadRecord("a token is not text")
        text = " ".join(tokens)
        self.ids[_sequence(text)] = need(record, "id")
        self.sets.append((words(text), record["id"]))
        return []

    def find(self, text: str) -> str | None:
        """The id of the text with the same words, or of the nearest with Jaccard >= .5; None if there is none."""
        if exact := self.ids.get(_sequence(text)):
            return exact
        best = max(((jaccard(words(text), own), key) for own, key in self.sets), default=(0.0, ""))
        return best[1] if best[0] >= 0.5 else None


def _sequence(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


def read(folder: Path, skips: Skips) -> Located:
    """text rows (one a sentence, with mean ratings) and group rows (the sentences of one pair of words, best first)."""
    known = SemEvalTexts(folder, skips)
    yield from _crowd(folder / "mturk_ratings_long.csv", known, skips)
    yield from _analysis(folder / "analysis_pun_scores.txt", known, skips)


def _crowd(path: Path, known: SemEvalTexts, skips: Skips) -> Located:
    found: dict[str, dict[tuple[str, str], Ratings]] = {}  # pair of words -> (system, sentence) -> ratings
    first: dict[str, Place] = {}

    def collect(record: dict[str, str]) -> list[Row]:
        aspect, rating = need(record, "aspect"), number(need(record, "rating"), "rating")
        low, high = RANGES.get(aspect, (1, 0))
        if not low <= rating <= high:
            raise BadRecord("unknown aspect, or a rating out of its range")
        pair, system = need(record, "pun_alter"), need(record, "system")
        sentence = clean(detokenise(need(record, "sentence")))
        found.setdefault(pair, {}).setdefault((system, sentence), {}).setdefault(aspect, []).append(rating)
        return []

    columns = ("aspect", "worker_hash", "pun_alter", "system", "sentence", "rating")
    for place, record in table(path, columns, skips):
        first.setdefault(record["pun_alter"], place)
        yield from each([(place, record)], collect, skips)

    def convert(pair: str) -> list[Row]:
        human = [sentence for system, sentence in found[pair] if system == "human"]
        return _group("crowd", pair, known.find(human[0]) if human else None, [
            (sentence, system, statistics.fmean(r["funniness"]), len(r["funniness"]), _means(r))
            for (system, sentence), r in found[pair].items() if r.get("funniness")
        ], {(system, sentence): _means(r) for (system, sentence), r in found[pair].items() if not r.get("funniness")})  # fmt: skip

    yield from each(((first[pair], pair) for pair in found), convert, skips)


def _means(ratings: Ratings) -> Row:
    row: Row = {}
    if ratings.get("grammar"):
        row["grammar"] = round(statistics.fmean(ratings["grammar"]), 4)
    if ratings.get("success"):  # 1 is yes, 2 is no
        row["success"] = round(statistics.fmean(2 - vote for vote in ratings["success"]), 4)
    return row


def _analysis(path: Path, known: SemEvalTexts, skips: Skips) -> Located:
    groups: dict[str, list[tuple[str, str, float, int, Row]]] = {}
    first: dict[str, Place] = {}

    def collect(located: tuple[Place, str]) -> list[Row]:
        cells = located[1].split("\t")
        if len(cells) != 4 or "-" not in cells[1]:
            raise BadRecord("expected sentence, pair of words, type and score with tabs between")
        pair = "-".join(sorted(cells[1].split("-")))
        own, other = cells[1].split("-", 1)
        pun_word, alternative = (own, other) if cells[2] in WITH_PUN_WORD else (other, own)
        more = {"pair": cells[1], "pun_word": pun_word, "alternative_word": alternative}
        entry = (clean(detokenise(cells[0])), cells[2], number(cells[3], "score"), 5, more)
        groups.setdefault(pair, []).append(entry)
        first.setdefault(pair, located[0])
        return []

    yield from each(((place, (place, line)) for place, line in lines(path)), collect, skips)

    def convert(pair: str) -> list[Row]:
        ties = [tie for text, kind, *_ in groups[pair] if kind == "pun" and (tie := known.find(text)) is not None]
        return _group("analysis", pair, min(ties, default=None), groups[pair], {})

    yield from each(((first[pair], pair) for pair in groups), convert, skips)


def _group(part: str, pair: str, tie: str | None, entries: list[tuple[str, str, float, int, Row]], unrated: Any) -> list[Row]:
    """The text rows of one pair of words, and their group if at least two of them are rated."""
    words = dict(zip(("pun_word", "alternative_word"), [*pair.split("-"), ""], strict=False))
    for *_, more in entries[:1]:  # pairs of the analysis are sorted: the entries know which word is which
        words |= {name: more[name] for name in words if name in more}
    shared = {"semeval_id": tie, **words}
    rows = []
    for number_, (text, system, rating, raters, more) in enumerate(entries):
        row = {"id": f"{part}/{pair}/{system}/{number_}", **shared, "text": text, "system": system, "rating": round(rating, 4)}
        rows.append({**row, "raters": raters, "is_pun": True if system in ("human", "pun") else None, **more})
    for number_, ((system, text), more) in enumerate(unrated.items()):
        rows.append({"id": f"{part}/{pair}/{system}/unrated{number_}", **shared, "text": text, "system": system, **more})
    if len(entries) >= 2:
        ranked = sorted(entries, key=lambda entry: -entry[2])
        # All systems were given these words.
        group: Row = {"id": f"{part}/{pair}/group", **shared, "prompt": request(None, words["pun_word"])}
        group |= {"completions": [entry[0] for entry in ranked], "scores": [round(entry[2], 4) for entry in ranked]}
        rows.append({**group, "systems": [entry[1] for entry in ranked], "raters": min(entry[3] for entry in ranked)})
    return rows
