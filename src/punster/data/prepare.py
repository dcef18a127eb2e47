"""One source as files of rows in TRL's schemas: SOURCE.KIND.PART.jsonl, and a report of what was read and passed over."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from punster.data.fetch import fetch_source
from punster.data.pool import TEXTS_OF_SPLIT, Pool
from punster.data.schema import Row, kind_of
from punster.data.sources import SOURCES, Source, find_source, own_folder
from punster.errors import UserError


def cached_sources() -> Path:
    from punster.model.load import cache_folder

    return cache_folder() / "data"


def prepare(name: str, out: Path, given: Path | None = None, say: Callable[[str], None] = print) -> Row:
    """Write the rows of one source; returns the report.

    given: the folder of all copies or the source's own; without it the source is downloaded. Rows that follow the likeness to
    held-out texts need SemEval beside the source: without it they go to PART "unguarded". Kao's rows are all val.
    """
    source = find_source(name)
    folder = own_folder(source, given) if given else fetch_source(source, cached_sources(), say=say)
    pool = Pool(folder.parent, {name: folder})
    guarded = source.tie != "text" or pool.has(TEXTS_OF_SPLIT)
    if not guarded:
        say(f"{name}: no {TEXTS_OF_SPLIT} beside it, so rows near to held-out texts cannot be told; the files say 'unguarded'")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out names a folder")
    files: dict[str, list[Row]] = {}
    for row, part in pool.located(name) if guarded else unguarded(source, folder, pool):
        if part is not None:
            files.setdefault(f"{name}.{kind_of(row)}.{part}.jsonl", []).append({**row, "split": part})
    report = {"source": name, "title": source.title, "licence": source.licence, "open": source.open, "from": source.home}
    report |= {**pool.describe(source), "files": {file: len(rows) for file, rows in sorted(files.items())}}
    if not files:
        raise UserError(f"{folder}: no usable rows; skipped: {report['skipped']}, in neither part: {report['in_neither_part']}")
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob(f"{name}.*.jsonl"):
        if stale.name not in files:
            stale.unlink()
    for file, rows in files.items():
        write_lines(out / file, (json.dumps(row, ensure_ascii=False) for row in rows))
    write_lines(out / f"{name}.report.json", [json.dumps(report, indent=1, ensure_ascii=False)])
    return report


def unguarded(source: Source, folder: Path, pool: Pool) -> list[tuple[Row, str]]:
    """All rows under a part's name that no recipe or verb takes for training data."""
    from punster.data.sources import Skips, read_source

    rows = list(read_source(source, folder, pool.skips.setdefault(source.name, Skips())))
    pool._rows[source.name] = [(row, None) for row in rows]
    return [(row, "unguarded") for row in rows]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write under a temporary name and rename: the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            for line in lines:
                handle.write(line + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def listing(names: bool, folder: Path | None) -> list[str]:
    """The lines of 'punster data list'."""
    if names:
        return list(SOURCES)
    found = []
    for source in SOURCES.values():
        here = "" if folder is None or Pool(folder).has(source.name) else " (no local copy)"
        flag = "" if source.open else "  ** not cleared for commercial use **"
        get = f"by hand: {source.by_hand}" if source.by_hand else "downloaded when no --from is given"
        found += [
            f"{source.name}: {source.title}{here}", f"  rows       {source.rows}", f"  judgement  {source.judgement}",
            f"  good for   {source.good_for}", f"  licence    {source.licence}{flag}", f"  from       {source.home} ({get})",
        ]  # fmt: skip
    return found
