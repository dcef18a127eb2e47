"""SemEval-2017 Task 7: puns and non-puns with pun word and WordNet senses, in the tokens of its XML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from punster.data.schema import Row
from punster.data.sources.reading import BadRecord, Located, Skips, XmlText, choice, each, lines, xml_texts
from punster.data.sources.wording import clean, detokenise

KINDS = ("homographic", "heterographic")


def read(folder: Path, skips: Skips) -> Located:
    """text rows: id, semeval_id, is_pun, kind, and for puns pun_word, pun_position (token, from 0), senses."""
    for kind in KINDS:
        labels, locations, senses = (gold(folder / f"subtask{n}-{kind}-test.gold", skips) for n in (1, 2, 3))
        tokens = {text.id: dict(text.words) for n in (2, 3) for _, text in xml_texts(folder / f"subtask{n}-{kind}-test.xml")}
        sense_of = {word.rsplit("_", 1)[0]: (word, *keys) for word, keys in senses.items()}
        seen: set[str] = set()

        def convert(text: XmlText, kind: str = kind, labels: Any = labels, locations: Any = locations, sense_of: Any = sense_of,
                    tokens: Any = tokens, seen: Any = seen) -> list[Row]:  # fmt: skip
            if not text.id or not text.words:
                raise BadRecord("a text without id or words")
            seen.add(text.id)
            if text.id not in labels:
                raise BadRecord("no label in the gold file of subtask 1")
            row: Row = {"id": text.id, "semeval_id": text.id, "text": clean(detokenise([token for _, token in text.words]))}
            row |= {"is_pun": choice(labels[text.id][0], {"0": False, "1": True}, "label"), "kind": kind}
            if location := locations.get(text.id):
                words = [word for word, _ in text.words]
                if location[0] not in words or location[0] not in tokens.get(text.id, {}):
                    raise BadRecord("the pun word of subtask 2 is not among the words")
                row |= {"pun_position": words.index(location[0]), "pun_word": dict(text.words)[location[0]].lower()}
            if (found := sense_of.get(text.id)) and len(found) == 3:
                row |= {"pun_senses": found[1].split(";"), "alternative_senses": found[2].split(";")}
                row["alternative_word"] = found[2].split("%")[0].replace("_", " ")
            return [row]

        yield from each(xml_texts(folder / f"subtask1-{kind}-test.xml"), convert, skips)
        for place, orphan in labels_without_text(folder / f"subtask1-{kind}-test.gold", seen):
            skips.add(place, orphan)


def gold(path: Path, skips: Skips) -> dict[str, list[str]]:
    """First column -> the others of a tab-separated gold file."""
    found: dict[str, list[str]] = {}
    for place, line in lines(path):
        key, *values = line.split("\t")
        if not values:
            skips.add(place, "a gold line without a tab")
        elif key in found:
            skips.add(place, "repeated id in a gold file")
        else:
            found[key.strip()] = [value.strip() for value in values]
    return found


def labels_without_text(path: Path, seen: set[str]) -> Any:
    return ((place, "a label without a text") for place, line in lines(path) if line.split("\t")[0].strip() not in seen)
