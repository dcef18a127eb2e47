"""What is wrong with a file of rows, and what is in it: problems with file and line, statistics, duplicates, suspected leakage."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from punster.data.files import json_row, located_rows
from punster.data.leakage import Index
from punster.data.pool import data_folder, embedded_evaluation, pool_of
from punster.data.schema import check_row, kind_of, texts_of
from punster.data.sources.reading import lines
from punster.errors import UserError

SHOWN = 20  # problems, duplicates and leaks that are printed


@dataclass
class Findings:
    """problems make the file unusable as it is; duplicates and leaks are for people to judge."""

    problems: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    longer_wins: list[float] = field(default_factory=list)
    prompts: set[str] = field(default_factory=set)
    compared: str = ""


def check(path: Path) -> Findings:
    """Look at every row of a file or folder."""
    found = Findings()
    held_out, found.compared = held_out_texts()
    texts: dict[tuple[str, ...], str] = {}
    ids: dict[tuple[str, str, str], str] = {}
    for place, row in _rows(path, found):
        kind = kind_of(row)
        if kind == "unpaired" and row.get("completion") is None and row.get("text") is not None:
            kind = "text"  # SFT leaves it out where the label is false
        try:
            row = check_row(row, kind, place)
        except UserError as error:
            found.problems.append(str(error))
            continue
        found.kinds[kind] += 1
        found.sources[str(row.get("source") or "no source given")] += 1
        if row.get("prompt") is not None:
            found.prompts.add(str(row["prompt"]))
        own = texts_of(row)
        lengths = [len(text.split()) for text in own]
        found.lengths += lengths
        if kind == "preference":
            found.longer_wins.append((lengths[0] > lengths[1]) + 0.5 * (lengths[0] == lengths[1]))
        key = (kind, str(row.get("prompt", "")), *(" ".join(text.lower().split()) for text in own))
        if (first := texts.setdefault(key, place)) != place:
            found.duplicates.append(f"{place}: the same texts as {first}")
        if row.get("id") is not None:
            name = kind, str(row.get("source", "")), str(row["id"])
            if (first := ids.setdefault(name, place)) != place:
                found.duplicates.append(f"{place}: the id {name[2]!r} again, first at {first}")
        if row.get("split") != "val" and any(map(held_out.has_near, own)):
            found.leaks.append(f"{place}: near to a held-out text")
    if not found.kinds and not found.problems:
        found.problems.append(f"{path}: no rows in this file")
    return found


def _rows(path: Path, found: Findings) -> Iterator[tuple[str, Any]]:
    """Rows with their places; of JSONL a line that is not JSON is one problem among others."""
    if path.suffix != ".jsonl" or not path.is_file():
        yield from located_rows(path)
        return
    for place, line in lines(path):
        try:
            row = json_row(line, str(place))
        except UserError as error:
            found.problems.append(str(error))
            continue
        yield str(place), row


def held_out_texts() -> tuple[Index, str]:
    """The embedded evaluation texts and, where local copies are, SemEval's held-out ones; and a line that says so."""
    sets = embedded_evaluation().sets
    try:
        semeval = pool_of(data_folder()).held_out_semeval.sets
        told = f"compared with {len(sets)} embedded and {len(semeval)} SemEval evaluation texts"
    except UserError:
        semeval, told = [], f"compared with {len(sets)} embedded evaluation texts only: no local copy of SemEval"
    return Index([*sets, *semeval]), told


def told(found: Findings) -> list[str]:
    """The findings in lines for people."""
    counts = {"problems": found.problems, "duplicates": found.duplicates, "suspected leakage": found.leaks}
    lines = [
        f"rows: {found.kinds.total()} ({', '.join(f'{n} {kind}' for kind, n in found.kinds.most_common()) or 'none'})",
        f"sources: {', '.join(f'{name} {n}' for name, n in found.sources.most_common()) or 'none'}",
    ]
    if found.lengths:
        middle, longest = statistics.median(found.lengths), max(found.lengths)
        lines.append(f"words a text: median {middle:g}, longest {longest}; prompts: {len(found.prompts)}")
    if found.longer_wins:
        lines.append(f"the longer text is the chosen one in {statistics.fmean(found.longer_wins):.1%} of the pairs (ties half)")
    lines.append(found.compared)
    for name, entries in counts.items():
        lines += [f"{name}: {len(entries)}", *(f"  {entry}" for entry in entries[:SHOWN])]
        if len(entries) > SHOWN:
            lines.append(f"  ... and {len(entries) - SHOWN} more")
    return lines
