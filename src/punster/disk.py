"""Files: whole or not there, their hashes, and where this machine keeps what was fetched."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO


def cache_folder() -> Path:
    """Where heavy downloads live, outside every run folder: PUNSTER_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("PUNSTER_CACHE"):
        return Path(os.path.expanduser(chosen))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "punster"


def sha256_of(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Write under a temporary name, flush, rename; if anything fails, nothing of it is left. A link stays, its target changes."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The file is whole or not there."""
    with whole_file(path) as handle:
        handle.write(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    with whole_file(path) as handle:
        handle.writelines(line + "\n" for line in lines)


def flush(path: Path) -> None:
    """Make a file, or the names in a folder, outlive a power cut."""
    with suppress(PermissionError, IsADirectoryError):  # where the system cannot open folders there is nothing to flush
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
