"""Runs that differ in their seed alone, as one row: means over them, with intervals that hold for another seed, too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import NormalDist, mean, stdev
from typing import Any

from punster.evaluate.folder import RunData, home, read_config
from punster.evaluate.table import as_dict, label, number
from punster.evaluate.winrate import LEVEL, Interval

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; beyond, a normal's with the first terms of its expansion.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
OWN = ("seed", "name", "out", "resume", "quiet", "dry_run")  # of a run, whatever recipe it follows
BEGUN_WITH = ("actor", "pretrained", "reward_model")


def student(degrees: int) -> float:
    """Quantile at which LEVEL lies within plus and minus it."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    expanded = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return STUDENT[degrees - 1] if degrees <= len(STUDENT) else expanded


def over_seeds(values: Sequence[Any]) -> Interval | None:
    """The mean of a figure over runs of different seeds, numbers or intervals; None if there are not two.

    Half an interval is the root of two squares: Student's t over the runs, and the mean of their own halves, since all of them
    were measured on the same prompts, whose choice the runs do not tell of.
    """
    means = [value for value in map(number, values) if value is not None]
    if len(means) < len(values) or len(means) < 2:
        return None
    ends = [(number(as_dict(value).get("low")), number(as_dict(value).get("high"))) for value in values]
    own = [(high - low) / 2 for low, high in ends if low is not None and high is not None]
    half = math.hypot(student(len(means) - 1) * stdev(means) / math.sqrt(len(means)), mean(own) if own else 0.0)
    centre = mean(means)
    return {"mean": centre, "low": centre - half, "high": centre + half}


def mean_entry(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What models say of one another's figures, key by key; a rating or a test of one of them has no mean."""
    keys = [key for key in entries[0] if key != "rating" and all(key in entry for entry in entries)]
    found = {key: over_seeds([entry[key] for entry in entries]) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def recipe_of(path: Path, depth: int = 3) -> str:
    """A run's settings without its seed and its own names, those of the runs that it began with in the place of their paths."""
    settings, verb = read_config(home(path) / "config.yaml")
    if not settings or not depth:
        return str(path)
    followed = {key: recipe_of(Path(str(settings[key])), depth - 1) for key in BEGUN_WITH if settings.get(key)}
    kept = {key: value for key, value in settings.items() if key not in OWN}
    return repr((verb, sorted((kept | followed).items(), key=lambda item: item[0])))


def grouped(recipes: Mapping[str, tuple[str, Any]]) -> list[list[str]]:
    """Names whose recipe is the same and whose seeds differ, of {name: (recipe, seed)}."""
    found: dict[str, dict[str, str]] = {}
    for name, (recipe, seed) in recipes.items():
        found.setdefault(recipe, {}).setdefault(str(seed), name)
    return [list(names.values()) for names in found.values() if len(names) > 1]


def common_name(names: Sequence[str]) -> str:
    """What runs have in common in their names: the last part of their paths, or how they all begin."""
    last = {Path(name).name for name in names}
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    start = last.pop() if len(last) == 1 else "".join(letters[0] for letters in alike).rstrip("-_./ :0123456789")
    return f"{label(start or names[0])} ({len(names)} seeds)"


def rows_of_models(models: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """{name: means} of an evaluation's models that are runs (`paths`) of one recipe with different seeds."""
    runs = {name: Path(paths[name]) for name in models if name in paths and (home(Path(paths[name])) / "config.yaml").is_file()}
    recipes = {name: (recipe_of(path), read_config(home(path) / "config.yaml")[0].get("seed")) for name, path in runs.items()}
    return {common_name(names): {"runs": names, **mean_entry([models[name] for name in names])} for names in grouped(recipes)}


def rows_of_runs(runs: Sequence[RunData]) -> dict[str, Any]:
    """The same of whole pipelines that differ in their seed: of each model that all of them have."""
    recipes = {str(place): (repr(sorted((k, str(v)) for k, v in run.config.items() if k not in OWN)), run.config.get("seed"))
               for place, run in enumerate(runs) if run.config}  # fmt: skip
    rows: dict[str, Any] = {}
    for places in grouped(recipes):
        some = [runs[int(place)] for place in places]
        for name in (n for n in some[0].models if all(n in run.models for run in some)):
            row = f"{label(name)} ({len(some)} seeds)"
            row = row if row not in rows else f"{some[0].name}: {row}"
            rows[row] = {"runs": [run.name for run in some], **mean_entry([run.models[name] for run in some])}
    return rows
