"""Downloads of public sources at their pinned commits: retries, resume, hashes recorded and checked."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from punster.data.sources import SOURCES, Source
from punster.disk import sha256_of, write_lines
from punster.errors import UserError

BASE = "https://raw.githubusercontent.com"
RECORD = "fetched.json"  # in each source's folder: file -> {url, sha256, bytes}


def fetch_source(
    source: Source, cache: Path, base: str = BASE, say: Callable[[str], None] | None = None, pause: float = 1.0
) -> Path:
    """The folder of a source under `cache`, downloaded where it is not there yet, with the sources that it needs beside it."""
    if source.by_hand:
        then = f"It comes from {source.home}; then: punster data prepare {source.name} --from DIR --out DIR"
        raise UserError(f"{source.name} cannot be downloaded as it is: {source.by_hand}. {then}")
    for name in source.needs:
        fetch_source(SOURCES[name], cache, base, say, pause)
    folder = cache / source.name
    folder.mkdir(parents=True, exist_ok=True)
    record = _record(folder)
    for name, (path, pinned) in source.files.items():
        url = f"{base}/{source.repository}/{source.commit}/{path}"
        known = record.get(name, {})
        expected = pinned or (str(known.get("sha256", "")) if known.get("url") == url else "")
        target = folder / name
        if target.is_file() and expected and sha256_of(target) == expected:
            continue
        if say:
            say(f"{source.name}: {url}")
        found = download(url, target, expected, pause=pause)
        record[name] = {"url": url, "sha256": found, "bytes": target.stat().st_size}
        write_lines(folder / RECORD, [json.dumps(record, indent=1)])
    return folder


def _record(folder: Path) -> dict[str, dict[str, object]]:
    with suppress(OSError, ValueError, AttributeError):
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return {name: entry for name, entry in content.items() if isinstance(entry, dict)}
    return {}


def download(url: str, target: Path, sha256: str = "", attempts: int = 6, pause: float = 1.0, timeout: float = 30.0) -> str:
    """Fetch one file and return its SHA-256. What came before the connection broke is kept beside it, and the rest is asked for."""
    part = target.with_name(f"{target.name}.part")
    reason = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            _more(url, part, timeout)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}"
            if error.code == 416:  # more than there is: begin again
                part.unlink(missing_ok=True)
            elif 400 <= error.code < 500 and error.code not in (408, 425, 429):  # asking again does not change it
                raise UserError(f"{url}: {reason}; the public copy is gone or moved, use a local copy with --from") from None
            continue
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            continue
        found = sha256_of(part)
        if sha256 and found != sha256:
            part.unlink()
            raise UserError(f"{url}: its SHA-256 is {found}, expected {sha256}; the file was changed, nothing is used of it")
        os.replace(part, target)
        return found
    way_out = "run the command again to go on where it stopped, or use --from"
    raise UserError(f"{url}: {attempts} attempts failed ({reason}); {way_out}")


def _more(url: str, part: Path, timeout: float) -> None:
    """Ask for what is missing and append it; OSError if the connection ended early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        if have and answer.status != 206:  # the server sends everything again
            have = 0
        length = answer.headers.get("Content-Length")
        with part.open("ab" if have else "wb") as handle:
            while block := answer.read(1 << 16):
                handle.write(block)
    if length is not None and part.stat().st_size < have + int(length):
        raise OSError("the connection ended early")
