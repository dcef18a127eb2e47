"""One source as files of rows in TRL's schemas: SOURCE.KIND.PART.jsonl, and a report of what was read and passed over."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from punster.data.fetch import fetch_source
from punster.data.pool import TEXTS_OF_SPLIT, Pool, pool_of
from punster.data.schema import FIELDS, Row, kind_of
from punster.data.sources import SOURCES, find_source, own_folder
from punster.disk import cache_folder, write_lines
from punster.errors import UserError


def prepare(name: str, out: Path, given: Path | None = None, say: Callable[[str], None] = print) -> Row:
    """Write the rows of one source; returns the report.

    given: the folder of all copies or the source's own; without it the source is downloaded. Rows that follow the likeness to
    held-out texts need SemEval beside the source: without it they go to PART "unguarded". Kao's rows are all val.
    """
    source = find_source(name)
    folder = own_folder(source, given) if given else fetch_source(source, cache_folder() / "data", say=say)
    folder = Path(os.path.abspath(folder))  # "." has neighbours, too; links keep their names
    pool = Pool(folder.parent, {name: folder})
    located: Sequence[tuple[Row, str | None]]
    if source.tie != "text" or pool.has(TEXTS_OF_SPLIT):
        located = pool.located(name)
    else:  # a part's name that no recipe or verb takes for training data
        say(f"{name}: no {TEXTS_OF_SPLIT} beside it, so rows near to held-out texts cannot be told; the files say 'unguarded'")
        located = [(row, "unguarded") for row, _ in pool.located(name, guarded=False)]
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out names a folder")
    files: dict[str, list[Row]] = {}
    for row, part in located:
        if part is not None:
            files.setdefault(f"{name}.{kind_of(row)}.{part}.jsonl", []).append({**row, "split": part})
    parts, skips = Counter(part for _, part in located), pool.skips[name]
    report: Row = {
        "source": name, "title": source.title, "licence": source.licence, "open": source.open, "from": source.home,
        "rows": parts.total(), "train": parts["train"], "val": parts["val"], "in_neither_part": parts[None],
        "skipped": dict(Counter(reason for _, reason in skips).most_common()),
        "skipped_where": [f"{place}: {reason}" for place, reason in skips[:50]],
        "files": {file: len(rows) for file, rows in sorted(files.items())},
    }  # fmt: skip
    if not files:
        raise UserError(f"{folder}: no usable rows; skipped: {report['skipped']}, in neither part: {report['in_neither_part']}")
    out.mkdir(parents=True, exist_ok=True)
    ours = {f"{name}.{kind}.{part}.jsonl" for kind in FIELDS for part in ("train", "val", "unguarded")}
    for stale in ours - set(files):  # of an earlier preparation
        (out / stale).unlink(missing_ok=True)
    for file, rows in files.items():
        write_lines(out / file, (json.dumps(row, ensure_ascii=False) for row in rows))
    write_lines(out / f"{name}.report.json", [json.dumps(report, indent=1, ensure_ascii=False)])
    return report


def listing(names: bool, folder: Path | None) -> list[str]:
    """The lines of 'punster data list'."""
    if names:
        return list(SOURCES)
    found = []
    for source in SOURCES.values():
        here = "" if folder is None or pool_of(folder).has(source.name) else " (no local copy)"
        flag = "" if source.open else "  ** not cleared for commercial use **"
        get = f"by hand: {source.by_hand}" if source.by_hand else "downloaded when no --from is given"
        found += [
            f"{source.name}: {source.title}{here}", f"  rows       {source.rows}", f"  judgement  {source.judgement}",
            f"  good for   {source.good_for}", f"  licence    {source.licence}{flag}", f"  from       {source.home} ({get})",
        ]  # fmt: skip
    return found
