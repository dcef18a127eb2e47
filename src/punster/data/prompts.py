"""Prompts for puns that have none: a topic from context words or keywords, else a noun of the text, seldom the pun word."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from functools import cache

from punster.data.leakage import words
from punster.data.schema import Row
from punster.data.split import lemma

GENERIC_PROMPT = "make a pun"  # texts that come without a prompt are scored as answers to this one
PUN_WORD_SHARE = 0.3  # at most this share of the prompts may contain the pun word
# Nouns that say nothing about a topic, or that stand for a person in a formula ("..., said Tom").
_EMPTY = {"tom", "swifty", "pun", "puns", "joke", "jokes", "die", "thing", "things", "lot", "lots", "bit", "way", "ways", "kind", "sort", "guy", "guys", "today", "yesterday",
          "tomorrow", "night", "time", "times", "day", "days", "year", "years", "man", "men", "woman", "women", "people", "person",
          "anything", "everything", "nothing", "something", "someone", "anyone", "everyone", "anybody", "everybody", "nobody", "somebody",
          "none", "one", "ones", "two", "three", "can",
          "may", "will", "might", "must", "dont", "don", "didn", "isn", "doesn", "couldn", "wasn", "never", "just", "said"}  # fmt: skip


def request(topic: str | None, word: str | None = None) -> str:
    if topic:
        return f"make a pun about {topic}"
    return f"make a pun with the word {word}" if word else GENERIC_PROMPT


@cache
def noun_rank(word: str) -> tuple[bool, float] | None:
    """A sort key for words that can be a topic (nouns only before words that may be something else; rarer first), or None."""
    from lemminflect import getAllLemmas
    from wordfreq import zipf_frequency

    if not 3 <= len(word) <= 30 or not word.isalpha() or word in _EMPTY or "NOUN" not in (kinds := getAllLemmas(word)):
        return None
    frequency = zipf_frequency(word, "en")  # log10 of occurrences in a billion words
    if not 2.0 <= frequency <= 5.3:
        return None
    return len(kinds) > 1, frequency


def topics_in(text: str, pun_word: str | None = None) -> list[str]:
    """The nouns of a text that can be a topic, the best first, without the pun word and its kin."""
    found = [word for word in dict.fromkeys(_ordered(text)) if not same_word(word, pun_word) and noun_rank(word)]
    return sorted(found, key=lambda word: noun_rank(word) or (True, 9.0))


def _ordered(text: str) -> list[str]:
    """The letters of each word; none of a contraction, as "won't" is no "wont"."""
    bare = [word.strip("'\"“”‘.,;:!?()").removesuffix("'s") for word in text.lower().replace("’", "'").split()]
    return ["".join(c for c in word if c.isalpha() and "'" not in word) for word in bare]


def same_word(word: str, pun_word: str | None) -> bool:
    if not pun_word:
        return False
    a, b = word.lower(), pun_word.lower()
    return lemma(a) == lemma(b) or (min(len(a), len(b)) >= 4 and (a.startswith(b) or b.startswith(a)))


def topic_key(topic: str) -> str:
    """What makes two topics the same: the lemma of the last word."""
    return lemma(topic.split()[-1])


def topic_of(text: str, pun_word: str | None, keywords: Iterable[str] = (), avoid: frozenset[str] = frozenset()) -> str | None:
    """A keyword with a noun in it and without the pun word, else the best noun of the text; None if there is none."""
    for keyword in keywords:
        parts = _ordered(keyword)
        if len(parts) <= 3 and parts and noun_rank(parts[-1]) and not any(same_word(part, pun_word) for part in parts):
            topic = " ".join(part for part in parts if part)
            if topic_key(topic) not in avoid:
                return topic
    return next((topic for topic in topics_in(text, pun_word) if topic_key(topic) not in avoid), None)


def topic_of_context(context: Sequence[str], pun_word: str) -> str | None:
    """Up to two of the context's phrases that contain a noun and not the pun word: "bankers and interest rates"."""
    good = [
        phrase for phrase in context
        if (parts := _ordered(phrase)) and noun_rank(parts[-1]) and not any(same_word(part, pun_word) for part in parts)
    ]  # fmt: skip
    return " and ".join(phrase.lower() for phrase in good[:2]) or None


def has_pun_word(row: Row) -> bool:
    return any(lemma(word) == lemma(str(row["pun_word"])) for word in words(str(row["prompt"]))) if row.get("pun_word") else False


def pun_word_share(rows: Sequence[Row]) -> float:
    """Share of the rows whose prompt contains the pun word."""
    return sum(map(has_pun_word, rows)) / max(1, len(rows))


def retopic(row: Row, text: str, avoid: frozenset[str]) -> Row:
    """The row with a prompt on a topic that is not to be avoided; rows that name no topic stay as they are."""
    topic = row.get("topic")
    if topic and all(topic_key(part) not in avoid for part in topic.split(" and ")):
        return row
    if not topic and "prompt" in row:
        return row
    topic = topic_of(text, row.get("pun_word"), row.get("keywords", ()), avoid)
    return {**row, "topic": topic, "prompt": request(topic)}


def with_prompts(rows: Sequence[Row], avoid: frozenset[str] = frozenset(), share: float = PUN_WORD_SHARE) -> list[Row]:
    """Puns (text or completion) as rows with prompt and completion. A prompt without the field "topic" is the source's own and
    stays. Where there is no topic the prompt names the pun word, as long as at most `share` of all prompts do, drawn by hash; then
    it is "make a pun"."""
    found, ours = [], []
    for place, row in enumerate(rows):
        text = row.get("completion") or row["text"]
        rest = {name: value for name, value in row.items() if name not in ("text", "prompt", "completion")}
        given = {"prompt": row["prompt"]} if row.get("prompt") and (row.get("topic") or "topic" not in row) else {}
        found.append({**retopic({**rest, **given}, text, avoid), "completion": text})
        if not given or "topic" in row:
            ours.append(place)
    room = int(share * len(found)) - sum(map(has_pun_word, found))
    bare = [i for i in ours if not found[i].get("topic") and found[i].get("pun_word")]
    for i in sorted(bare, key=lambda i: zlib.crc32(found[i]["completion"].encode()))[: max(0, room)]:
        found[i]["prompt"] = request(None, found[i]["pun_word"])
    for i in [i for i in ours if has_pun_word(found[i])][: max(0, -room)]:  # too many topics contain the pun word
        found[i] = {**found[i], "prompt": request(None), "topic": None}
    return found


def prompted(rows: Sequence[Row], avoid: frozenset[str]) -> tuple[list[Row], list[Row]]:
    """People's own texts as completions, and those of them that had no prompt and got one; rows with a completion as they are.

    Their other columns, such as a topic, may mean anything, and are not read.
    """
    found = [row if row.get("completion") is not None else {**row, "completion": row["text"]} for row in rows]
    found = [{name: value for name, value in row.items() if name != "text"} for row in found]
    bare = [row for row in found if not row.get("prompt")]
    words = [word if isinstance(word := row.get("pun_word"), str) and word.strip() else None for row in bare]
    given = [{"text": row["completion"], "pun_word": word} for row, word in zip(bare, words, strict=True)]
    for row, made in zip(bare, with_prompts(given, avoid) if bare else [], strict=True):
        row["prompt"] = made["prompt"]
    return found, bare


def held_out_prompts(rows: Sequence[Row], count: int = 10_000) -> list[Row]:
    """One prompt for each topic that the held-out rows give, nouns only; at most one a row until all rows had their turn."""
    chosen: dict[str, Row] = {}
    texts = [str(row.get("completion") or row["text"]) for row in rows]
    options = [[topic for topic in topics_in(text, row.get("pun_word")) if topic.isascii()] for text, row in zip(texts, rows)]
    for turn in range(3):
        for row, topics in zip(rows, options, strict=True):
            if turn < len(topics) and len(chosen) < count:
                topic = topics[turn]
                found = {"prompt": request(topic), "topic": topic, "id": row["id"], "source": row["source"]}
                chosen.setdefault(topic_key(topic), found)
    return list(chosen.values())
