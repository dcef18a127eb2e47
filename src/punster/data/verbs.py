"""The actions of 'punster data': parse, call, print."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from punster.errors import UserError, near_matches
from punster.safe import scrub

USAGE = """punster data list [--names]                                 public sources: what they are and what may be done with them
punster data prepare SOURCE [--from DIR] --out DIR            one source as JSONL in TRL's schemas (downloaded without --from)
punster data check FILE                                       problems with file and line, statistics, duplicates, leakage
punster data mix RECIPE.yaml [--from DIR] --out FILE          a mixture; built in: puns, preferences, votes, prompts, eval-prompts

DIR is the folder of all local copies, or a source's own; PUNSTER_DATA names the default for mix."""


def data(rest: list[str]) -> int:
    """punster data ACTION …"""
    from punster.config.parsing import parsed_values, simple_parser

    if not rest or rest[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if rest[0] not in ACTIONS:
        raise UserError(f"unknown action {rest[0]!r}.{near_matches(rest[0], ACTIONS)} One of {', '.join(ACTIONS)}")
    action, description, arguments = ACTIONS[rest[0]]
    parser = simple_parser(f"data {rest[0]}", description)
    for name, options in arguments.items():
        parser.add_argument(name, **options)
    values = parsed_values(parser, rest[1:])
    if values.get("out") == "":
        raise UserError(f"--out {'FILE' if rest[0] == 'mix' else 'DIR'} is needed")
    action(**{name.replace("from", "given"): value for name, value in values.items()})
    return 0


def list_sources(names: bool) -> None:
    from punster.data.pool import data_folder
    from punster.data.prepare import listing

    try:
        folder = data_folder()
    except UserError:
        folder = None
    print("\n".join(listing(names, folder)))


def prepare_source(source: str, given: str | None, out: str) -> None:
    from punster.data.prepare import prepare

    report = prepare(source, Path(out), Path(given) if given else None)
    for file, count in report["files"].items():
        print(f"{Path(out) / file}: {count} rows")
    for reason, count in report["skipped"].items():
        print(f"passed over: {count} ({reason})")
    if report["in_neither_part"]:
        print(f"in neither part of the split, left out: {report['in_neither_part']}")
    if not report["open"]:
        print(f"NOT cleared for commercial use: {report['licence']}")


def check_file(file: str) -> None:
    from punster.data.check import check, told

    found = check(Path(file))
    print("\n".join(map(scrub, told(found))))
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise UserError(f"{found.problems[0]}{more}")


def mix(recipe: str, given: str | None, out: str) -> None:
    from punster.data.mix import build
    from punster.data.recipe import load_mixture
    from punster.disk import write_lines

    path = Path(out)
    check_target(path)
    beside = path.with_name(f"{path.name}.statement.json")
    for target in (path, beside):
        keep_inputs(target, mixture_files(recipe))
    rows, statement = build(load_mixture(recipe), given, print)
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))
    write_lines(beside, [json.dumps(statement, indent=1, ensure_ascii=False)])
    print(path)


def mixture_files(recipe: str) -> list[Path]:
    """A mixture's own file and the files, or folders, that it names."""
    from punster.data.recipe import load_mixture, recipe_path

    return [recipe_path(recipe), *(Path(part.file) for part in load_mixture(recipe).parts if part.file)]


def input_files(source: str) -> list[Path]:
    """The files, or folders, that are read for the name of some data."""
    from punster.data.mix import is_mixture

    return mixture_files(source) if is_mixture(source) else [Path(source)]


def check_target(path: Path, inputs: Iterable[Path] = ()) -> None:
    """UserError if --out names what is no file, or a file that is read, before anything is written."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # a device, a pipe: renaming onto it would replace it
        raise UserError(f"{path}: no regular file; leave --out away to write to the terminal or a pipe")
    if path.is_dir() or not path.parent.is_dir():
        fault = "is a folder" if path.is_dir() else "its folder does not exist"
        raise UserError(f"{path}: {fault}; --out names the file to write")
    keep_inputs(path, inputs)


def check_folder(path: Path) -> None:
    """UserError if --out names a folder that cannot be made or written into, before anything is computed for it."""
    standing = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        fault = "cannot be written into" if standing.is_dir() else "is no folder"
        raise UserError(f"--out {path}: {standing} {fault}; name another")


def keep_inputs(path: Path, inputs: Iterable[Path]) -> None:
    """UserError if a file that is to be written is one of those that are read (in folders: all files of data)."""
    from punster.data.files import SUFFIXES

    if not path.exists():
        return
    for given in inputs:
        read = [file for file in given.rglob("*") if file.suffix in SUFFIXES] if given.is_dir() else [given]
        if any(file.exists() and path.samefile(file) for file in read):
            raise UserError(f"--out {path}: this file is read here, and would be overwritten; give another name")


def _text(help: str, default: str | None = None) -> dict[str, Any]:
    return {"type": str | None if default is None else str, "default": default, "help": help}


COPIES = _text("folder of local copies, or the source's own")
ACTIONS: dict[str, tuple[Any, str, dict[str, dict[str, Any]]]] = {
    "list": (list_sources, "The public sources of puns and humour.", {
        "--names": {"action": "store_true", "help": "the names alone, one a line"}}),
    "prepare": (prepare_source, "One source as JSONL files in TRL's schemas.", {
        "source": {"type": str, "help": "name of a source (punster data list --names)"},
        "--from": COPIES, "--out": _text("folder for the files", "")}),
    "check": (check_file, "Problems, statistics, duplicates and suspected leakage of a file of rows.", {
        "file": {"type": str, "help": "JSONL, JSON, CSV or Parquet, or a folder of such files"}}),
    "mix": (mix, "A mixture of sources and files.", {
        "recipe": {"type": str, "help": "a .yaml file, or puns, preferences, votes, prompts, eval-prompts"},
        "--from": COPIES, "--out": _text("JSONL file to write; what went in is stated beside it", "")}),
}  # fmt: skip
