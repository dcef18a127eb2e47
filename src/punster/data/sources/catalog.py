"""What each source is, what may be done with it, and where it comes from: catalog.yaml."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml


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


def _read() -> Iterator[Source]:
    for name, entry in yaml.safe_load(Path(__file__).with_name("catalog.yaml").read_text(encoding="utf-8")).items():
        hashes = entry.pop("sha256", {})
        entry["files"] = {file: (path, hashes.get(file, "")) for file, path in entry["files"].items()}
        yield Source(name, **entry)


SOURCES: dict[str, Source] = {source.name: source for source in _read()}
