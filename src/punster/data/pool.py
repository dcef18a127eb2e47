"""All sources of a folder at once: rows with their part, the texts that are held out, and what was left out on the way."""

from __future__ import annotations

import os
from functools import cached_property, lru_cache
from pathlib import Path

from punster.data import corpus
from punster.data.leakage import Index, words
from punster.data.offence import VOTES
from punster.data.prompts import held_out_prompts
from punster.data.schema import Row, texts_of
from punster.data.sources import SOURCES, own_folder, read_source
from punster.data.sources.reading import Skips
from punster.data.split import Part, assign
from punster.errors import UserError

TEXTS_OF_SPLIT = "semeval2017_task7"  # the held-out texts that rows without an id are compared with
HELD_OUT_TOPICS = 400


def data_folder(given: str | Path | None = None) -> Path:
    """The folder of local copies: as given, else PUNSTER_DATA, else ../shared/data beside the checkout."""
    if given or os.environ.get("PUNSTER_DATA"):
        folder = Path(given or os.environ["PUNSTER_DATA"])
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder{'' if given else ' (PUNSTER_DATA names it)'}")
        return folder
    folder = Path(__file__).resolve().parents[3].parent / "shared" / "data"
    if not folder.is_dir():
        raise UserError("no local copies of the public sources: set PUNSTER_DATA to their folder (see 'punster data list')")
    return folder


def embedded_evaluation() -> Index:
    """The texts of the embedded val and test parts."""
    sets = {words(r[f]) for split in ("val", "test") for r in corpus.part(split) for f in ("pun", "literal", "weak", "plain")}
    return Index(sets - {frozenset()})


class Pool:
    """Rows of the sources under one folder, read once."""

    def __init__(self, folder: Path, own: dict[str, Path] | None = None) -> None:
        self.folder = folder
        self.own = own or {}
        self.skips: dict[str, Skips] = {}
        self._rows: dict[str, list[tuple[Row, Part | None]]] = {}

    def has(self, name: str) -> bool:
        folder = self.own.get(name, self.folder / name)
        return all((folder / file).is_file() for file in SOURCES[name].files)

    def located(self, name: str, guarded: bool = True) -> list[tuple[Row, Part | None]]:
        """All rows of a source, each with its part; not guarded: with none, where it cannot be known."""
        if name not in self._rows:
            source, skips = SOURCES[name], self.skips.setdefault(name, [])
            folder = self.own.get(name) or own_folder(source, self.folder)
            rows = list(read_source(source, folder, skips))
            known = (self.held_out_semeval, self.unnamed_semeval) if source.tie == "text" and guarded else None
            parts = assign(rows, source.tie, known) if guarded else [None] * len(rows)
            self._rows[name] = list(zip(rows, parts, strict=True))
        return self._rows[name]

    def rows(self, name: str, part: Part) -> list[Row]:
        return [row for row, its in self.located(name) if its == part]

    @cached_property
    def held_out_semeval(self) -> Index:
        if not self.has(TEXTS_OF_SPLIT):
            need = f"{TEXTS_OF_SPLIT} is needed beside the other sources, for its held-out texts must be known"
            raise UserError(f"{self.folder}: {need}")
        return Index([words(row["text"]) for row in self.rows(TEXTS_OF_SPLIT, "val")])

    @cached_property
    def unnamed_semeval(self) -> Index:
        """SemEval texts that the split table does not name (a download has them): no row near to one is in any part."""
        return Index([words(row["text"]) for row, part in self.located(TEXTS_OF_SPLIT) if part is None])

    @cached_property
    def evaluation(self) -> Index:
        """Every text that anything may be evaluated on: val rows of all sources here, and the embedded val and test parts."""
        sets = set(embedded_evaluation().sets)
        if self.has(TEXTS_OF_SPLIT):
            sets.update(self.unnamed_semeval.sets)
        for name, source in SOURCES.items():
            if source.tie != "none" and self.has(name):
                sets.update(words(text) for row in self.rows(name, "val") for text in texts_of(row))
        return Index(sets)

    @cached_property
    def flagged(self) -> set[str]:
        """SemEval ids of texts that ExPUNations' annotators called offensive."""
        if not self.has("expunations"):
            return set()
        return {row["semeval_id"] for row, _ in self.located("expunations") if row["offensive"] >= VOTES}

    @cached_property
    def held_out_prompts(self) -> list[Row]:
        """Prompts on topics of held-out puns; no training prompt is on one of these topics."""
        names = [name for name in (TEXTS_OF_SPLIT, "cup_context_situated") if self.has(name)]
        puns = [row for name in names for row in self.rows(name, "val") if row["is_pun"] and row["id"] not in self.flagged]
        return held_out_prompts(puns, HELD_OUT_TOPICS)


@lru_cache(maxsize=1)
def pool_of(folder: Path) -> Pool:
    """The pool of a folder, kept: a run reads its training mixture and its held-out one from the same sources.

    The folder of one source alone stands for its neighbours too, whose held-out texts must be known.
    """
    folder = Path(os.path.abspath(folder))  # "." has neighbours, too; links keep their names
    own = [name for name, source in SOURCES.items() if folder.name == name and all((folder / f).is_file() for f in source.files)]
    return Pool(folder.parent, dict.fromkeys(own, folder)) if own else Pool(folder)
