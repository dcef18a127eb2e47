"""The actions of 'punster data': parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from punster.errors import UserError
from punster.safe import scrub

USAGE = """punster data list [--names]                                 public sources: what they are and what may be done with them
punster data prepare SOURCE [--from DIR] --out DIR            one source as JSONL in TRL's schemas (downloaded without --from)
punster data check FILE                                       problems with file and line, statistics, duplicates, leakage
punster data mix RECIPE.yaml [--from DIR] --out FILE          a mixture; built in: puns, preferences, votes, prompts, eval-prompts

DIR is the folder of all local copies, or a source's own; PUNSTER_DATA names the default for mix."""


def _options(action: str, description: str, *arguments: tuple[str, dict[str, Any]], rest: list[str]) -> dict[str, Any]:
    from punster.cli import parsed_values, simple_parser

    parser = simple_parser(f"data {action}", description)
    for name, options in arguments:
        parser.add_argument(name, **options)
    return parsed_values(parser, rest, [name.lstrip("-") for name, _ in arguments])


FROM: tuple[str, dict[str, Any]] = (
    "--from",
    {"type": str | None, "default": None, "help": "folder of local copies, or the source's own"},
)


def list_verb(rest: list[str]) -> int:
    names = ("--names", {"action": "store_true", "help": "the names alone, one a line"})
    options = _options("list", "The public sources of puns and humour.", names, rest=rest)
    from punster.data.pool import data_folder
    from punster.data.prepare import listing

    try:
        folder = data_folder()
    except UserError:
        folder = None
    print("\n".join(listing(options["names"], folder)))
    return 0


def prepare_verb(rest: list[str]) -> int:
    source = ("source", {"type": str, "help": "name of a source (punster data list --names)"})
    out = ("--out", {"type": str, "default": "", "help": "folder for the files"})
    options = _options("prepare", "One source as JSONL files in TRL's schemas.", source, FROM, out, rest=rest)
    if not options["out"]:
        raise UserError("--out DIR is needed")
    from punster.data.prepare import prepare

    given = Path(options["from"]) if options["from"] else None
    report = prepare(options["source"], Path(options["out"]), given)
    for file, count in report["files"].items():
        print(f"{Path(options['out']) / file}: {count} rows")
    for reason, count in report["skipped"].items():
        print(f"passed over: {count} ({reason})")
    if report["in_neither_part"]:
        print(f"in neither part of the split, left out: {report['in_neither_part']}")
    if not report["open"]:
        print(f"NOT cleared for commercial use: {report['licence']}")
    return 0


def check_verb(rest: list[str]) -> int:
    file = ("file", {"type": str, "help": "JSONL, JSON, CSV or Parquet, or a folder of such files"})
    options = _options("check", "Problems, statistics, duplicates and suspected leakage of a file of rows.", file, rest=rest)
    from punster.data.check import check, told

    found = check(Path(options["file"]))
    print("\n".join(map(scrub, told(found))))
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise UserError(f"{found.problems[0]}{more}")
    return 0


def mix_verb(rest: list[str]) -> int:
    recipe = ("recipe", {"type": str, "help": "a .yaml file, or puns, preferences, votes, prompts, eval-prompts"})
    out = ("--out", {"type": str, "default": "", "help": "JSONL file to write; what went in is stated beside it"})
    options = _options("mix", "A mixture of sources and files.", recipe, FROM, out, rest=rest)
    if not options["out"]:
        raise UserError("--out FILE is needed")
    from punster.data.mix import build, load_mixture
    from punster.data.prepare import write_lines

    path = Path(options["out"])
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(
            f"{path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}; --out names the file to write"
        )
    rows, statement = build(load_mixture(options["recipe"]), options["from"], say=print)
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))
    write_lines(path.with_name(f"{path.name}.statement.json"), [json.dumps(statement, indent=1, ensure_ascii=False)])
    print(path)
    return 0
