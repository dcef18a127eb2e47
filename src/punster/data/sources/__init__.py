"""Public pun and humour sources: what each is and what may be done with it (catalog.yaml), and its rows, checked and named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import yaml

from punster.data.schema import Row, check_row, kind_of
from punster.data.sources.reading import Skips
from punster.errors import UserError, near_matches


@dataclass(frozen=True)
class Source:
    """tie: what the split follows: the SemEval id, the lemma of the pun word, or likeness to held-out texts; "none" trains nothing.

    open: whether weights trained on it may be used for everything. files: local name -> (path upstream, SHA-256 or "" where
    the hash is recorded at the first download). by_hand: why a download does not do, or "". rude: filtered for offence.
    """

    name: str
    title: str
    judgement: str
    rows: str
    good_for: str
    licence: str
    open: bool
    repository: str
    commit: str
    files: dict[str, tuple[str, str]]
    tie: Literal["id", "lemma", "text", "none"] = "text"
    by_hand: str = ""
    rude: bool = False
    needs: Sequence[str] = ()

    @property
    def home(self) -> str:
        return f"https://github.com/{self.repository}/tree/{self.commit}"


def _catalogue() -> Iterator[Source]:
    for name, entry in yaml.safe_load(Path(__file__).with_name("catalog.yaml").read_text(encoding="utf-8")).items():
        hashes = entry.pop("sha256", {})
        entry["files"] = {file: (path, hashes.get(file, "")) for file, path in entry["files"].items()}
        yield Source(name, **entry)


SOURCES: dict[str, Source] = {source.name: source for source in _catalogue()}


def find_source(name: str) -> Source:
    if name not in SOURCES:
        raise UserError(f"unknown source {name!r}.{near_matches(name, SOURCES)} 'punster data list --names' lists them")
    return SOURCES[name]


def own_folder(source: Source, folder: Path) -> Path:
    """The source's own folder, given that or the folder of all copies."""
    for candidate in (folder / source.name, folder):
        if all((candidate / name).is_file() for name in source.files):
            return candidate
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    candidate = folder / source.name if (folder / source.name).is_dir() else folder
    missing = [name for name in source.files if not (candidate / name).is_file()]
    raise UserError(f"{candidate}: {missing[0]} is missing; {source.name} needs {', '.join(source.files)} (from {source.home})")


def read_source(source: Source, folder: Path, skips: Skips) -> Iterator[Row]:
    """All rows of a source's own folder with source, id and licence, each valid and each id once for its kind of row."""
    from punster.data.sources import simple

    own = None if source.name in simple.FORMS else import_module(f"punster.data.sources.{source.name}")
    seen: set[tuple[str, str]] = set()
    for place, row in own.read(folder, skips) if own else simple.read(source, folder, skips):
        row = {**row, "source": source.name, "licence": source.licence}
        kind = kind_of(row)
        if (kind, row["id"]) in seen:
            skips.append((place, "repeated id"))
            continue
        if kind == "preference" and row["chosen"] == row["rejected"]:
            skips.append((place, "both texts of the pair are the same"))
            continue
        try:
            row = check_row(row, kind, "")
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        except (UserError, ValueError) as error:  # half of a surrogate pair, say
            skips.append((place, f"not a valid row ({str(error).lstrip(':, ')[:80]})"))
            continue
        seen.add((kind, row["id"]))
        yield row
