"""The sources that are tables or lists of records: how each file is read, and the rows that one record gives."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from punster.data.prompts import request, topic_of, topic_of_context
from punster.data.schema import Row, explicit
from punster.data.sources import Source
from punster.data.sources.reading import MAX_TEXT, BadRecord, Place, Skips, choice, each, json_items, lines, need, number, table
from punster.data.sources.wording import clean, detokenise, filled, restored

Records = Callable[[Path, Skips], Iterable[tuple[Place, Any]]]
YES = {"0": False, "1": True}
RATERS = ("gemini", "openai", "anthropic", "claudecode")
TURN = re.compile(r"\n\n(Human|Assistant): ?")


def read(source: Source, folder: Path, skips: Skips) -> Iterator[tuple[Place, Row]]:
    """The rows of all files of a source."""
    records, convert = FORMS[source.name]
    for name in source.files:
        for place, record in records(folder / name, skips):
            yield from each([(place, record)], convert, skips, place)


def _csv(*columns: str, **form: Any) -> Records:
    return partial(table, columns=columns, **form)


def _both_ways(path: Path, skips: Skips) -> Iterator[tuple[Place, tuple[str, str, Any]]]:
    for kind in ("Direct", "Conversation"):
        yield from ((place, (kind, *item)) for place, item in json_items(path, "["))


def part_of(place: Place) -> str:
    """The beginning of the file's name."""
    return Path(place.file).name.split(".")[0]


def _kao(record: Row, _: Place) -> Iterable[Row]:
    """z-scored funniness; entropy is the ambiguity, KL the distinctiveness; m1 is the word in the text."""
    is_pun = choice(need(record, "sentenceType"), {"pun": True, "nonpun": False}, "sentenceType")
    row = {"id": need(record, ""), "text": clean(need(record, "sentence").replace("#", "")), "is_pun": is_pun}
    row |= {"pun_word": need(record, "m1").lower(), "alternative_word": need(record, "m2").lower(), "kind": record["punType"]}
    row |= {"rating": number(record["funniness"], "funniness"), "ambiguity": number(record["entropy"], "entropy")}
    yield {**row, "distinctiveness": number(record["KL"], "KL"), "homophone": need(record, "homophoneID")}


def _cup(record: Row, place: Place) -> Iterable[Row]:
    """Prompt and topic from the context words that the writer was given."""
    if not choice(need(record, "new_pun"), {"yes": True, "no": False}, "new_pun"):
        raise BadRecord("the writer found no pun (new_pun is no)")
    if record["user_pun"].strip() in ("", "{}"):
        raise BadRecord("no pun was written")
    context = [detokenise(phrase) for phrase in need(record, "context").split(",") if phrase.strip()]
    words = {"pun_word": need(record, "pun_word").lower(), "alternative_word": need(record, "alter_word").lower()}
    topic = topic_of_context(context, words["pun_word"])
    row = {"id": f"line{place.line}", "prompt": request(topic), "completion": clean(record["user_pun"]), **words, "topic": topic}
    senses = {"pun_senses": [record["pun_word_sense"]], "alternative_senses": [record["alter_word_sense"]]}
    yield {**row, **senses, "keywords": context, "is_pun": True}


def _cloze(item: tuple[str, Any], place: Place) -> Iterable[Row]:
    """Every punny word against every straight word of a sentence; rating is the mean of the LLMs'."""
    record = item[1]
    sentence, key = clean(need(record, "sentence")), need(record, "id", int)
    straight, punny = need(record, "straight", list), need(record, "punny", list)
    if not straight or not punny or not all(isinstance(word, str) and word.strip() for word in [*straight, *punny]):
        raise BadRecord("a list of words is empty or holds something else than words")
    ratings = [record[f"{rater}_rating"] for rater in RATERS if isinstance(record.get(f"{rater}_rating"), int | float)]
    rated = {"rating": statistics.fmean(ratings), "raters": len(ratings)} if ratings else {}
    topic = topic_of(sentence, punny[0])
    shared = {"prompt": request(topic), "topic": topic, "sentence": sentence, **rated}
    for p, good in enumerate(punny):
        for s, bad in enumerate(straight):
            texts = {"chosen": clean(filled(sentence, good)), "rejected": clean(filled(sentence, bad))}
            yield {"id": f"{part_of(place)}/{key}/{p}-{s}", **shared, **texts, "pun_word": good.lower()}


def _hahackathon(record: Row, _: Place) -> Iterable[Row]:
    """is_humour, offence (0 to 5), and for humour rating (1 to 5) and controversial, by 20 people each."""
    humour = choice(need(record, "is_humor"), YES, "is_humor")
    row = {"id": need(record, "id"), "text": clean(need(record, "text")), "is_humour": humour}
    row["offence"] = number(need(record, "offense_rating"), "offense_rating")
    if humour:
        controversial = choice(record["humor_controversy"], YES, "humor_controversy")
        row |= {"rating": number(need(record, "humor_rating"), "humor_rating"), "controversial": controversial}
    yield row


def _voted(line: str, place: Place) -> Iterable[Row]:
    """rating is the logarithm of the votes."""
    score, tab, text = line.partition("\t")
    if not tab:
        raise BadRecord("no tab between score and text")
    rating = number(score, "score")
    if not 0 <= rating <= 11:
        raise BadRecord("the score is not within 0 and 11")
    yield {"id": f"{part_of(place)}/{place.line}", "text": clean(text), "rating": rating}


def _potd(record: Row, place: Place) -> Iterable[Row]:
    """Lower-case texts without punctuation: apostrophes, capitals and full stops are put back."""
    is_pun, name = choice(need(record, "label"), YES, "label"), part_of(place).removeprefix("puns_")
    yield {"id": f"{name}/{need(record, 'index')}", "text": restored(clean(need(record, "text"))), "is_pun": is_pun}


def _joke(record: Row, _: Place) -> Iterable[Row]:
    yield {"id": need(record, "ID"), "text": clean(need(record, "Joke"))}


def _plain(item: tuple[str, Any], place: Place) -> Iterable[Row]:
    key, text = item
    if not isinstance(text, str):
        raise BadRecord("not a text")
    yield {"id": f"{part_of(place)}/{key}", "text": detokenise(clean(text)), "is_pun": False, "kind": part_of(place)}


def _original(item: tuple[str, str, Any], _: Place) -> Iterable[Row]:
    """Two rows a record: a direct request, and a remark of a conversation in the form "Human: … Assistant:"."""
    kind, key, record = item
    prompt = clean(need(record, f"{kind} Prompt"))
    prompt = prompt if kind == "Direct" else f"Human: {prompt} Assistant:"
    row = {"id": f"{key}/{kind.lower()}", "prompt": prompt, "completion": clean(need(record, "Example Response"))}
    yield {**row, "is_pun": True, "original": need(record, "Original").strip().lower() == "yes", "kind": kind.lower()}


def _dialogues(line: str, place: Place) -> Iterable[Row]:
    """The common turns as chat messages, the two last answers as texts."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise BadRecord("not JSON") from None
    row = explicit({side: _turns(need(record, side)) for side in ("chosen", "rejected")}, "preference")
    rest = row["chosen"], row["rejected"]
    if not row.get("prompt") or any(len(side) != 1 or side[0]["role"] != "assistant" or not side[0]["content"] for side in rest):
        raise BadRecord("the dialogues do not differ in one last answer only")
    if rest[0] == rest[1]:
        raise BadRecord("both answers are the same")
    chosen, rejected = (side[0]["content"] for side in rest)
    yield {"id": str(place.line), "prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


def _turns(text: str) -> list[dict[str, Any]]:
    """ "\\n\\nHuman: … \\n\\nAssistant: …" as chat messages."""
    if len(text) > MAX_TEXT:
        raise BadRecord(f"the dialogue is longer than {MAX_TEXT} characters")
    before, *parts = TURN.split(text)
    if before.strip() or not parts:
        raise BadRecord("the dialogue does not begin with a turn")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


_text: Records = lambda path, _: lines(path)
_array: Records = lambda path, _: json_items(path, "[")
# Source -> what yields (place, record) of one of its files, and what makes rows of a record.
FORMS: dict[str, tuple[Records, Callable[[Any, Place], Iterable[Row]]]] = {
    "kao_puns": (_csv("", "punType", "sentenceType", "entropy", "KL", "homophoneID", "sentence", "m1", "m2", "funniness"), _kao),
    "cup_context_situated": (_csv("context", "pun_word", "alter_word", "pun_word_sense", "alter_word_sense", "new_pun", "user_pun"), _cup),
    "davidbau_puns": (_array, _cloze),
    "hahackathon2021": (_csv("id", "text", "is_humor", "humor_rating", "humor_controversy", "offense_rating"), _hahackathon),
    "rjokes": (_text, _voted),
    "potd_reddithumor": (_csv("index", "label", "a", "text", header=False), _potd),
    "short_jokes": (_csv("ID", "Joke"), _joke),
    "crowdtruth_shorttext": (_array, _plain),
    "jacksonpaull_rlhf": (_both_ways, _original),
    "hh_rlhf": (_text, _dialogues),
}  # fmt: skip
