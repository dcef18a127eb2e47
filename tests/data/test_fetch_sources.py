"""Downloads from a server on loopback that drops connections, ignores ranges, refuses, or sends something else."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from punster.data.fetch import RECORD, download, fetch_source
from punster.data.sources import SOURCES
from punster.errors import UserError

CONTENT = bytes(range(256)) * 800  # 204,800 bytes


class Server(ThreadingHTTPServer):
    drop_after = 60_000  # bytes sent in one answer before the connection is cut; 0: never
    ranges = True
    fail = 0  # so many answers of 503 first
    content = CONTENT

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        asked = self.headers.get("Range")
        server.seen.append((self.path, asked))
        if server.fail:
            server.fail -= 1
            self.send_error(503)
            return
        if "gone" in self.path:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if start > len(server.content):
            self.send_error(416)
            return
        rest = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: server.drop_after or None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_a_dropped_connection_is_resumed_where_it_broke(server: Server, tmp_path: Path) -> None:
    found = download(f"{address(server)}/x", tmp_path / "x", pause=0)
    assert (tmp_path / "x").read_bytes() == CONTENT and found == hashlib.sha256(CONTENT).hexdigest()
    assert [asked for _, asked in server.seen] == [None, "bytes=60000-", "bytes=120000-", "bytes=180000-"]
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_later_run_goes_on_where_the_first_gave_up(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 attempts failed .* run the command again"):
        download(f"{address(server)}/x", tmp_path / "x", attempts=2, pause=0)
    assert not (tmp_path / "x").exists()
    download(f"{address(server)}/x", tmp_path / "x", attempts=2, pause=0)
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_servers_without_ranges_errors_that_pass_and_a_part_too_long(server: Server, tmp_path: Path) -> None:
    server.ranges, server.fail, server.drop_after = False, 2, 0
    (tmp_path / "x.part").write_bytes(b"leftover")
    download(f"{address(server)}/x", tmp_path / "x", pause=0)
    assert (tmp_path / "x").read_bytes() == CONTENT
    server.ranges = True
    (tmp_path / "y.part").write_bytes(CONTENT + b"too long")
    download(f"{address(server)}/y", tmp_path / "y", pause=0)
    assert (tmp_path / "y").read_bytes() == CONTENT


def test_a_wrong_hash_and_a_missing_file_leave_nothing(server: Server, tmp_path: Path) -> None:
    server.drop_after = 0
    with pytest.raises(UserError, match="expected 00ff; the file was changed"):
        download(f"{address(server)}/x", tmp_path / "x", "00ff", pause=0)
    with pytest.raises(UserError, match=r"/gone: HTTP 404; the public copy is gone"):
        download(f"{address(server)}/gone", tmp_path / "x", pause=0)
    assert not list(tmp_path.iterdir()) and sum("gone" in path for path, _ in server.seen) == 1


def test_a_source_is_fetched_once_at_its_commit_and_its_hashes_are_kept(server: Server, tmp_path: Path) -> None:
    source = SOURCES["short_jokes"]
    folder = fetch_source(source, tmp_path, address(server), pause=0)
    path = f"/{source.repository}/{source.commit}/data/reddit-cleanjokes.csv"
    assert folder == tmp_path / "short_jokes" and {seen for seen, _ in server.seen} == {path}
    record = json.loads((folder / RECORD).read_text())["reddit-cleanjokes.csv"]
    assert record == {"url": address(server) + path, "sha256": hashlib.sha256(CONTENT).hexdigest(), "bytes": len(CONTENT)}
    before = len(server.seen)
    fetch_source(source, tmp_path, address(server), pause=0)
    assert len(server.seen) == before  # nothing is fetched again
    (folder / "reddit-cleanjokes.csv").write_bytes(b"damaged")
    fetch_source(source, tmp_path, address(server), pause=0)
    assert (folder / "reddit-cleanjokes.csv").read_bytes() == CONTENT
    server.content = b"other"
    (folder / "reddit-cleanjokes.csv").unlink()
    with pytest.raises(UserError, match="the file was changed"):
        fetch_source(source, tmp_path, address(server), pause=0)


def test_pinned_hashes_are_enforced_and_needed_sources_come_along(server: Server, tmp_path: Path) -> None:
    server.drop_after = 0
    with pytest.raises(UserError, match="SHA-256"):
        fetch_source(SOURCES["kao_puns"], tmp_path, address(server), pause=0)
    fetch_source(SOURCES["expunations"], tmp_path, address(server), pause=0)
    assert {path.name for path in tmp_path.iterdir()} >= {"expunations", "semeval2017_task7"}


def test_what_must_be_got_by_hand_says_where_it_is(tmp_path: Path) -> None:
    for name in ("pungen_he2019", "crowdtruth_shorttext", "hahackathon2021"):
        with pytest.raises(UserError, match=rf"{name} cannot be downloaded as it is: .*github.com/.*--from DIR"):
            fetch_source(SOURCES[name], tmp_path)


def test_every_other_source_has_an_address_for_each_file() -> None:
    for source in SOURCES.values():
        assert len(source.commit) == 40 and source.repository.count("/") == 1
        assert source.by_hand or all(path for path, _ in source.files.values()), source.name
        assert not any(path.endswith((".pickle", ".pkl")) for path, _ in source.files.values())
        assert replace(source, files={}).home.endswith(source.commit)
