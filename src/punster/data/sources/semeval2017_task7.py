"""SemEval-2017 Task 7: puns and non-puns with pun word and WordNet senses, in the tokens of its XML files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from punster.data.schema import Row
from punster.data.sources.reading import BadRecord, Located, Place, Skips, XmlText, choice, each, lines, xml_texts
from punster.data.sources.wording import clean, detokenise

Gold = dict[str, tuple[Place, list[str]]]  # first column -> place and the other columns


def read(folder: Path, skips: Skips) -> Located:
    """text rows: id, semeval_id, is_pun, kind, and for puns pun_word, pun_position (token, from 0), senses."""
    for kind in ("homographic", "heterographic"):
        labels, locations, senses = (gold(folder / f"subtask{n}-{kind}-test.gold", skips) for n in (1, 2, 3))
        tokens = {text.id: dict(text.words) for n in (2, 3) for _, text in xml_texts(folder / f"subtask{n}-{kind}-test.xml")}
        senses = {word.rsplit("_", 1)[0]: found for word, found in senses.items()}
        texts = list(xml_texts(folder / f"subtask1-{kind}-test.xml"))
        yield from each(texts, _row, skips, kind, labels, locations, senses, tokens)
        seen = {text.id for _, text in texts if text.words}
        skips += [(place, "a label without a text") for key, (place, _) in labels.items() if key not in seen]


def _row(
    text: XmlText, kind: str, labels: Gold, locations: Gold, senses: Gold, tokens: dict[str, dict[str, str]]
) -> Iterable[Row]:
    if not text.id or not text.words:
        raise BadRecord("a text without id or words")
    if text.id not in labels:
        raise BadRecord("no label in the gold file of subtask 1")
    row: Row = {"id": text.id, "semeval_id": text.id, "text": clean(detokenise([token for _, token in text.words]))}
    row |= {"is_pun": choice(labels[text.id][1][0], {"0": False, "1": True}, "label"), "kind": kind}
    if text.id in locations:
        location, words = locations[text.id][1][0], dict(text.words)
        if location not in words or location not in tokens.get(text.id, {}):
            raise BadRecord("the pun word of subtask 2 is not among the words")
        row |= {"pun_position": [word for word, _ in text.words].index(location), "pun_word": words[location].lower()}
    if text.id in senses and len(found := senses[text.id][1]) == 2:
        row |= {"pun_senses": found[0].split(";"), "alternative_senses": found[1].split(";")}
        row["alternative_word"] = found[1].split("%")[0].replace("_", " ")
    yield row


def gold(path: Path, skips: Skips) -> Gold:
    found: Gold = {}
    for place, line in lines(path):
        key, *values = (value.strip() for value in line.split("\t"))
        if not values:
            skips.append((place, "a gold line without a tab"))
        elif key in found:
            skips.append((place, "repeated id in a gold file"))
        else:
            found[key] = place, values
    return found
