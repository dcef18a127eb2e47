"""Negatives after SurGen (He et al. 2019, arXiv 1904.06828, section 3): a plain sentence with a pun's word in it, and one of its topic.

They retrieve a sentence with the alternative word, put the pun word there, and a word of its topic early in the sentence; their
systems' outputs are what people rate far below the puns of people. Here the topic's word is one of the pun that it is set against.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from punster.data.corpus import cased
from punster.data.pool import Pool
from punster.data.schema import Row
from punster.errors import UserError

PLAIN = ("crowdtruth_shorttext", "hh_rlhf", "semeval2017_task7")  # whose texts that are no puns are retrieved
NEAREST, LATEST = (
    10,
    6,
)  # of the sentences with the word, those that are about as long as the pun; of these, where it stands latest
CLOSE = 4  # words that the lengths may differ by
TOPICAL = 0.55  # share of the sentences that get a word of the pun
_WORD = re.compile(r"[A-Za-z]{4,}")
_SENTENCE = re.compile(r"(?<=[.!?…])\s+|\n+")
_NOT_PROSE = re.compile(r"https?:|www\.|[*_\[(]")
_COMMON = set(
    re.findall(
        r"\w+",
        "this that with from have were they their them then than when what where which would could should about there your been into "
        "after before because some just like very more most much many said says told make made does didn doesn isn wasn will over",
    )
)


def plain_sentences(pool: Pool) -> list[str]:
    """Sentences of 6 to 26 words from the training part's texts that are no puns; UserError if no source of such is there."""
    found: dict[str, None] = {}
    there = [name for name in PLAIN if pool.has(name)]
    for name in there:
        for row in pool.rows(name, "train"):
            if row.get("is_pun", False) is False and row.get("kind") != "proverbs":  # which are set like headlines
                texts = [row["text"]] if "text" in row else [row["chosen"], row["rejected"]]
                for sentence in (s.strip("\"'“” ") for text in texts for s in _SENTENCE.split(str(text))):
                    whole = sentence[:1].isupper() and sentence[-1:] in (".", "!", "?") and 6 <= len(sentence.split()) <= 26
                    if whole and not _NOT_PROSE.search(sentence):
                        found[sentence] = None
    if not found:
        raise UserError(f"use: retrieved needs plain texts of {', '.join(PLAIN)}; found: {', '.join(there) or 'none of them'}")
    return list(found)


def retrieved_pairs(rows: Sequence[Row], sentences: Sequence[str], cap: int, prompt: str, draw: random.Random) -> list[Row]:
    """Each pun whose word is known against at most `cap` sentences that were made of plain ones."""
    by_word: dict[str, list[str]] = {}
    for sentence in sentences:
        for word in sorted(set(re.findall(r"[a-z']+", sentence.lower()))):
            by_word.setdefault(word, []).append(sentence)
    pairs = []
    for row in rows:
        if row.get("pun_word"):
            shared = {name: row[name] for name in ("source", "licence", "pun_word", "alternative_word") if row.get(name)}
            asked = {"prompt": row.get("prompt") or prompt, "topic": row.get("topic"), "chosen": row["text"]}
            made = _made(row, by_word, cap, draw)
            pairs += [{**shared, **asked, "rejected": text, "id": f"{row['id']}/retrieved{n}"} for n, text in enumerate(made)]
    return pairs


def _made(row: Row, by_word: dict[str, list[str]], cap: int, draw: random.Random) -> list[str]:
    pun, word = str(row["text"]), str(row["pun_word"]).lower()
    other = str(row.get("alternative_word") or word).lower()
    size = len(pun.split())
    far = lambda sentence: abs(len(sentence.split()) - size)
    found = dict.fromkeys(s for name in (other, word) for s in by_word.get(name, ()) if far(s) <= CLOSE)
    near = sorted(draw.sample(list(found), len(found)), key=far)[:NEAREST]
    late = sorted(near, key=lambda s: -max(s.lower().rfind(name) / len(s) for name in (other, word)))[:LATEST]
    made = []
    for sentence in sorted(late, key=far)[:cap]:
        text = re.sub(rf"(?<!\w){re.escape(other)}(?!\w)", lambda found: cased(word, found[0]), sentence, flags=re.IGNORECASE)
        made.append(_on_topic(text, pun, {word, other}, draw) if draw.random() < TOPICAL else text)
    return [text for text in dict.fromkeys(made) if text.lower() != pun.lower()]


def _on_topic(text: str, pun: str, taken: set[str], draw: random.Random) -> str:
    """One of the first longer words, if it can be before the pun word, replaced by a word of the pun."""
    longer = lambda text: [found for found in _WORD.finditer(text) if found[0].lower() not in _COMMON | taken]
    topics, spots = [found[0].lower() for found in longer(pun)], longer(text)
    place = min((at for name in taken if (at := text.lower().find(name)) >= 0), default=0)
    spots = [spot for spot in spots if spot.start() < place][:2] or spots[:2]
    if not topics or not spots:
        return text
    spot = draw.choice(spots)
    return text[: spot.start()] + cased(draw.choice(topics), spot[0]) + text[spot.end() :]
