"""Command lines and YAML to settings: one option for each field of a dataclass, and errors that say what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from punster.config.shared import check_version, default_of
from punster.errors import UserError, near_matches

# What TRL calls our options: its users get the right name, and nothing is accepted under another.
TRL_NAMES = {
    "learning-rate": "lr", "per-device-train-batch-size": "batch-size", "num-train-epochs": "epochs", "max-steps": "steps",
    "kl-coef": "beta", "cliprange": "clip", "response-length": "max-new-tokens", "max-completion-length": "max-new-tokens",
    "num-generations": "samples", "model-name-or-path": "model", "dataset-name": "data", "output-dir": "out",
}  # fmt: skip


def parser_for(
    verb: str, kind: type, positional: Sequence[str] = (), config_help: str = "YAML file with any of these options"
) -> Any:
    """A jsonargparse parser with one option for each field of the verb's dataclass; --config reads the same keys from YAML."""
    from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser

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
            parser.add_argument(*flags, action=ActionYesNo(no_prefix="no-"), **options)  # --no-X for what a file turns on
        elif hints[item.name] == list[str]:
            parser.add_argument(*flags, type=str, nargs="+", **options)
        else:
            parser.add_argument(*flags, type=hints[item.name], **options)
    return parser


def parse(verb: str, kind: type, rest: list[str], positional: Sequence[str] = ()) -> Any:
    """Command line and YAML to the verb's dataclass; raises UserError with one clear message."""
    return kind(**parsed_values(parser_for(verb, kind, positional), rest))


def parsed_values(parser: Any, rest: list[str]) -> dict[str, Any]:
    """The values of all options, by name; what stands on the command line wins over --config files, wherever these stand."""
    from jsonargparse import ArgumentError

    files, others = files_apart(rest, parser)
    files = [own_recipe(path) for path in files]
    in_files = check_files(files, parser)
    try:
        values: dict[str, Any] = parser.parse_args([f"--config={path}" for path in files] + others).as_dict()
    except ArgumentError as error:
        raise UserError(readable(str(error), parser)) from None
    except SystemExit as leaving:
        if leaving.code in (0, None):
            raise
        raise UserError("the command line could not be read; see --help") from None
    for action in parser._actions:  # no words at all are written over a file's list, as an empty one
        if not action.option_strings and not values.get(action.dest) and action.dest in in_files:
            values[action.dest] = in_files[action.dest]
    return {name: value for name, value in values.items() if name != "config"}


def own_recipe(path: str) -> str:
    """recipes/NAME.yaml where no such file is here: the one that the package has, which README's commands mean."""
    if not path.startswith("recipes/") or Path(path).exists():
        return path
    from punster.data.recipe import recipe_folder

    packaged = recipe_folder() / path.removeprefix("recipes/")
    return str(packaged) if packaged.is_file() else path


def files_apart(rest: Sequence[str], parser: Any) -> tuple[list[str], list[str]]:
    """The --config files in their order, and the other words: jsonargparse would let a file override what stands before it."""
    flags, takes_words = parser._option_string_actions, any(not action.option_strings for action in parser._actions)
    end = rest.index("--") if "--" in rest else len(rest)
    files: list[str] = []
    others: list[str] = []
    place = 0
    while place < end:
        flag, joined, path = rest[place].partition("=")
        behind = place + 1 if joined else place + 2
        named = flag == "--config" or [known for known in flags if known.startswith(flag)] == ["--config"]
        complete = joined or (place + 1 < end and not rest[place + 1].startswith("-"))
        # A stray word must not become one of a list that stands before the file: it is left where it is refused.
        stray = behind < end and not rest[behind].startswith("-") and not takes_words
        if "--config" in flags and named and complete and not stray:
            files.append(path if joined else rest[place + 1])
            place = behind
        else:
            others.append(rest[place])
            place += 1
    return files, others + list(rest[end:])


def check_files(files: Sequence[str], parser: Any) -> dict[str, Any]:
    """What jsonargparse lets pass or would not say clearly of --config files: other versions, lists and switches of other types.

    Returns what all of them say together.
    """
    together: dict[str, Any] = {}
    for path in files:
        values = None
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except (OSError, ValueError, yaml.YAMLError):
            continue  # said when it is parsed
        if isinstance(values, dict):
            check_values(values, parser, path)
            together |= values
    return together


def check_values(values: dict[str, Any], parser: Any, place: str) -> None:
    if "config_version" in values:
        check_version(values["config_version"], place)
    defaults = parser.get_defaults().as_dict()
    for key, value in values.items():
        off = re.match("no[-_](.+)", str(key))  # jsonargparse would turn the switch on
        if off and key not in defaults and isinstance(defaults.get(off[1].replace("-", "_")), bool):
            raise UserError(f"{place}: unknown key {key!r} in the configuration; switches are turned off by `false`")
        default = defaults.get(key)
        if isinstance(default, list) and not isinstance(value, list):
            raise UserError(f"{place}: {key} must be a list, found {value!r}")
        if isinstance(default, bool) and not isinstance(value, bool):
            raise UserError(f"{place}: {key} must be true or false, found {value!r}")


def readable(message: str, parser: Any) -> str:
    """jsonargparse's message in one line, with near matches for unknown options and keys."""
    text = " ".join(message.split())
    options = [[flag for flag in action.option_strings if not flag.startswith("--no-")] for action in parser._actions]
    known = {flag: "/".join(flags) for flags in options for flag in flags if flag.startswith("--")}
    if match := re.search(r"[Uu]nrecognized arguments: (\S+)", text):
        if not match[1].startswith("-"):
            return f"unknown option {match[1]}: no option takes it (what is no option stands together, before them)"
        return f"unknown option {match[1]}.{suggestion(match[1].split('=')[0], known)}"
    if match := re.search(r"[Kk]ey '?([\w.]+)'? is not expected|Option '([\w.]+)' is not accepted|Key \"([\w.]+)\"", text):
        key = next(group for group in match.groups() if group)
        names = [flag.removeprefix("--").replace("-", "_") for flag in known]
        return f"unknown key {key!r} in the configuration.{suggestion(key, {name: name for name in names})}"
    return text


def suggestion(word: str, known: Mapping[str, str]) -> str:
    """' Did you mean ...?' for an unknown option or key: TRL's name of a known one, the same with _ for -, else what is spelt alike.

    known: how each is shown, by its name.
    """
    bare = lambda name: name.removeprefix("--").replace("_", "-")
    shown = {bare(name): text for name, text in known.items()}
    meant = bare(word) if bare(word) in shown else TRL_NAMES.get(bare(word), "")
    return f" Did you mean {shown[meant]}?" if meant in shown else near_matches(word, known)


def simple_parser(verb: str, description: str) -> Any:
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=f"punster {verb}", description=description, exit_on_error=False)
