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
        tokens = {key: dict(words) for n in (2, 3) for _, (key, words) in xml_texts(folder / f"subtask{n}-{kind}-test.xml")}
        senses = {word.rsplit("_", 1)[0]: found for word, found in senses.items()}
        texts = list(xml_texts(folder / f"subtask1-{kind}-test.xml"))
        yield from each(texts, _row, skips, kind, labels, locations, senses, tokens)
        seen = {key for _, (key, words) in texts if words}
        skips += [(place, "a label without a text") for key, (place, _) in labels.items() if key not in seen]


def _row(
    text: XmlText, kind: str, labels: Gold, locations: Gold, senses: Gold, tokens: dict[str, dict[str, str]]
) -> Iterable[Row]:
    key, words = text
    if not key or not words:
        raise BadRecord("a text without id or words")
    if key not in labels:
        raise BadRecord("no label in the gold file of subtask 1")
    row: Row = {"id": key, "semeval_id": key, "text": clean(detokenise([token for _, token in words]))}
    row |= {"is_pun": choice(labels[key][1][0], {"0": False, "1": True}, "label"), "kind": kind}
    if key in locations:
        location, own = locations[key][1][0], dict(words)
        if location not in own or location not in tokens.get(key, {}):
            raise BadRecord("the pun word of subtask 2 is not among the words")
        row |= {"pun_position": [word for word, _ in words].index(location), "pun_word": own[location].lower()}
    if key in senses and len(found := senses[key][1]) == 2:
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
