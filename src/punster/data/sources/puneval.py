"""PunEval: SemEval puns with words, senses and keywords, 21,573 outputs of eight LLMs, people's labels for 170 items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from punster.data.leakage import jaccard, words
from punster.data.prompts import request, topic_of
from punster.data.schema import Row
from punster.data.sources.reading import BadRecord, Located, Skips, by_key, each, json_items, need
from punster.data.sources.wording import clean, detokenise, swapped

RANGES = {"success": 1, "coherence": 5, "funniness": 5}  # label -> highest, from 0
RECITED = 0.6  # an output this near to the item's own pun was remembered, not made


def read(folder: Path, skips: Skips) -> Located:
    """text rows (human and LLM), preference rows (a pun against itself with a synonym in it), group rows (labelled outputs)."""
    labels = by_key(json_items(folder / "pun_generation_manual_indicators.json"), skips)
    synonyms = by_key(json_items(folder / "synonyms.json"), skips)
    items: dict[str, Any] = {}
    for name in ("hom_dataset.json", "het_dataset.json"):
        entries = list(json_items(folder / name))
        items |= by_key(entries, skips)
        yield from each(entries, _human, skips)
        yield from each(entries, _synonyms, skips, synonyms)
    outputs = list(json_items(folder / "pun_generation.json"))
    yield from each(outputs, _outputs, skips, items, labels)
    yield from each(outputs, _group, skips, items, labels)


def _human(entry: tuple[str, Any]) -> list[Row]:
    key, item = entry
    row: Row = {"id": key, "semeval_id": key, "text": clean(detokenise(need(item, "human_text"))), "system": "human"}
    row["is_pun"] = "pun_word" in item
    if row["is_pun"]:
        row |= {"pun_word": need(item, "pun_word"), "alternative_word": need(item, "alter_word")}
        row |= {"pun_senses": [need(item, "pun_sense")], "alternative_senses": [need(item, "alter_sense")]}
        row |= {"keywords": keywords(item), "rating": need(item, "human_rating", float), "raters": 5}
    return [row]


def keywords(item: Any) -> list[str]:
    return [word.lower() for word in need(item, "human_keywords", list) if isinstance(word, str) and word.strip()]


def asked(item: Any) -> Row:
    """The prompt of an item: its keywords without the pun word."""
    text = detokenise(need(item, "human_text"))
    topic = topic_of(text, need(item, "pun_word"), keywords(item))
    return {"prompt": request(topic), "topic": topic, "pun_word": item["pun_word"], "alternative_word": need(item, "alter_word")}


def _synonyms(entry: tuple[str, Any], synonyms: dict[str, Any]) -> list[Row]:
    key, item = entry
    if "pun_word" not in (item if isinstance(item, dict) else {}):
        return []
    found = need(synonyms.get(key, {}), "gpt-4-0613_synonyms", dict)
    tokens = need(item, "human_text").split()
    place = pun_word_span(tokens, need(item, "pun_word_ind"), need(item, "pun_word"))
    rows = []
    for kind in ("pun_word_synonym", "alter_word_synonym"):
        word = need(found, kind)
        if word.lower() != " ".join(tokens[place]).lower():
            rejected = clean(swapped(tokens, place, word))
            row = {"id": f"{key}/{kind}", "semeval_id": key, **asked(item), "chosen": clean(detokenise(tokens))}
            rows.append({**row, "rejected": rejected, "replaced_by": word})
    return rows


def pun_word_span(tokens: list[str], index: str, pun_word: str) -> slice:
    """Where the pun word stands; of several words, `index` ("hom_7_12", from 1) names the first or the last."""
    position, parts = index.rsplit("_", 1)[-1], pun_word.lower().split()
    at = int(position) - 1 if position.isascii() and position.isdigit() and len(position) < 6 else -1
    for first in dict.fromkeys((at, at - len(parts) + 1)):
        there = [token.lower() for token in tokens[max(0, first) : first + len(parts)]]
        if first >= 0 and len(there) == len(parts) and all(a[:2] == b[:2] for a, b in zip(there, parts, strict=True)):
            return slice(first, first + len(parts))
    raise BadRecord("the pun word is not at its place (no synonym pairs)")


def _texts(outputs: Any) -> list[tuple[str, str, str]]:
    """(system, method, text) of the outputs of one item."""
    found = []
    for system, methods in outputs.items() if isinstance(outputs, dict) else ():
        if system != "human_text":
            if not isinstance(methods, dict):
                raise BadRecord(f"field {system!r} is not an object")
            found += [(system.removesuffix("_text"), method, need(methods, method)) for method in methods]
    return found


def _outputs(entry: tuple[str, Any], items: dict[str, Any], labels: dict[str, Any]) -> list[Row]:
    key, outputs = entry
    rows = []
    for system, method, text in _texts(outputs):
        label = _label(labels, key, system, method)
        row: Row = {"id": f"{key}/{system}/{method}", "semeval_id": key, "text": clean(text), "system": system, "method": method}
        row |= {"pun_word": need(items.get(key), "pun_word"), "alternative_word": need(items.get(key), "alter_word")}
        if label:
            row |= {name: label[name] for name in RANGES} | {"raters": 1}
        rows.append(row)
    return rows


def _label(labels: dict[str, Any], key: str, system: str, method: str) -> Any:
    """The three labels of one text, or None where the item was not labelled."""
    if key not in labels:
        return None
    label = need(labels[key], "human_text" if system == "human" else f"{system}_text", dict)
    label = label if system == "human" else need(label, method, dict)
    for name, highest in RANGES.items():
        if not 0 <= need(label, name, int) <= highest:
            raise BadRecord(f"label {name!r} is not within 0 and {highest}")
    return label


def _group(entry: tuple[str, Any], items: dict[str, Any], labels: dict[str, Any]) -> list[Row]:
    """Ranked by success first and funniness second: score = success + (funniness - 1) / 10, so a gap of .5 is one in success."""
    key, outputs = entry
    if key not in labels:
        return []
    item = items.get(key)
    own = clean(detokenise(need(item, "human_text")))
    entries = []
    for system, method, text in [("human", "human", own), *_texts(outputs)]:
        label = _label(labels, key, system, method)
        recited = system != "human" and jaccard(words(clean(text)), words(own)) >= RECITED
        entries.append((label["success"] + (label["funniness"] - 1) / 10, clean(text), f"{system}/{method}", recited))
    entries.sort(key=lambda entry: -entry[0])
    scores, texts, systems, remembered = (list(column) for column in zip(*entries, strict=True))
    row = {"id": f"{key}/group", "semeval_id": key, **asked(item), "completions": texts, "scores": scores, "systems": systems}
    return [{**row, "recited": remembered, "raters": 1}]
