"""Command lines and YAML to settings: one option for each field of a dataclass, and errors that say what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from punster.config.shared import check_version, default_of
from punster.errors import UserError, near_matches


def parser_for(
    verb: str, kind: type, positional: Sequence[str] = (), config_help: str = "YAML file with any of these options"
) -> Any:
    """A jsonargparse parser with one option for each field of the verb's dataclass; --config reads the same keys from YAML."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog=f"punster {verb}", description=kind.__doc__, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help=config_help)
    hints = get_type_hints(kind)
    for item in fields(kind):
        default = default_of(item)
        flags = [f"--{item.name.replace('_', '-')}"]
        if short := item.metadata.get("short"):
            flags.insert(0, short)
        options: dict[str, Any] = {"help": item.metadata["help"], "default": default}
        if item.name in positional:
            parser.add_argument(item.name, type=str, nargs="*", **options)
        elif hints[item.name] is bool:
            parser.add_argument(*flags, action="store_true", **options)
        elif hints[item.name] == list[str]:
            parser.add_argument(*flags, type=str, nargs="+", **options)
        else:
            parser.add_argument(*flags, type=hints[item.name], **options)
    return parser


def parse(verb: str, kind: type, rest: list[str], positional: Sequence[str] = ()) -> Any:
    """Command line and YAML to the verb's dataclass; raises UserError with one clear message."""
    return kind(**parsed_values(parser_for(verb, kind, positional), rest))


def parsed_values(parser: Any, rest: list[str]) -> dict[str, Any]:
    """The values of all options, by name."""
    from jsonargparse import ArgumentError

    check_files(rest, parser)
    try:
        values: dict[str, Any] = parser.parse_args(rest).as_dict()
    except ArgumentError as error:
        raise UserError(readable(str(error), parser)) from None
    except SystemExit as leaving:
        if leaving.code in (0, None):
            raise
        raise UserError("the command line could not be read; see --help") from None
    return {name: value for name, value in values.items() if name != "config"}


def check_files(rest: Sequence[str], parser: Any) -> None:
    """What jsonargparse lets pass or would not say clearly of --config files: other versions, lists and switches of other types."""
    files = [path for flag, path in pairwise(rest) if flag == "--config"]
    for path in files + [word.removeprefix("--config=") for word in rest if word.startswith("--config=")]:
        values = None
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except (OSError, ValueError, yaml.YAMLError):
            continue  # said when it is parsed
        if isinstance(values, dict):
            check_values(values, parser, path)


def check_values(values: dict[str, Any], parser: Any, place: str) -> None:
    if "config_version" in values:
        check_version(values["config_version"], place)
    defaults = parser.get_defaults().as_dict()
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(default, list) and not isinstance(value, list):
            raise UserError(f"{place}: {key} must be a list, found {value!r}")
        if isinstance(default, bool) and not isinstance(value, bool):
            raise UserError(f"{place}: {key} must be true or false, found {value!r}")


def readable(message: str, parser: Any) -> str:
    """jsonargparse's message in one line, with near matches for unknown options and keys."""
    text = " ".join(message.split())
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    if match := re.search(r"[Uu]nrecognized arguments: (\S+)", text):
        return f"unknown option {match[1]}.{near_matches(match[1].split('=')[0], known)}"
    if match := re.search(r"[Kk]ey '?([\w.]+)'? is not expected|Option '([\w.]+)' is not accepted|Key \"([\w.]+)\"", text):
        key = next(group for group in match.groups() if group)
        names = [flag.removeprefix("--").replace("-", "_") for flag in known]
        return f"unknown key {key!r} in the configuration.{near_matches(key, names)}"
    return text


def simple_parser(verb: str, description: str) -> Any:
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=f"punster {verb}", description=description, exit_on_error=False)
