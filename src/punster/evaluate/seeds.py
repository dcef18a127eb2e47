"""Runs that differ in their seed alone, as one row: means over them, with intervals that hold for another seed, too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import NormalDist, mean, stdev
from typing import Any, NamedTuple

import punster.config
from punster.config.shared import FROM_PYTHON, WITHOUT_EFFECT, defaults_of
from punster.evaluate.folder import RunData, Stage, home, listed, located, read_config
from punster.evaluate.table import as_dict, label, number
from punster.evaluate.winrate import LEVEL, Interval

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; beyond, a normal's with the first terms of its expansion.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
OWN = WITHOUT_EFFECT | {"seed", "name"}  # of a run, whatever recipe it follows
BEGUN_WITH = ("actor", "pretrained", "reward_model")
UNBOUNDED = ("held_out_reward", "exposure_gap")  # any other figure is at least 0
SHARES = (
    "win_rate_vs_sft",
    "success_rate",
    "called_puns",
    "distinct_2",
    "mauve",
    "seq_rep_4",
    "unique_share",
    "nearest_training",
)


class Measured(NamedTuple):
    """A model as it was evaluated: the recipe that it was made by, its seed, and its figures."""

    name: str
    recipe: str
    seed: str
    entry: Mapping[str, Any]


def student(degrees: int) -> float:
    """Quantile at which LEVEL lies within plus and minus it."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    expanded = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return STUDENT[degrees - 1] if degrees <= len(STUDENT) else expanded


def over_seeds(values: Sequence[Any], key: str = "held_out_reward") -> Interval | None:
    """The mean of a figure over runs of different seeds, numbers or intervals; None if there are not two.

    Half an interval is the root of two squares: Student's t over the runs, and the mean of their own halves, since all of them
    were measured on the same prompts, whose choice the runs do not tell of. It is cut where the figure (`key`) cannot be.
    """
    means = [value for value in map(number, values) if value is not None]
    if len(means) < len(values) or len(means) < 2:
        return None
    ends = [(number(as_dict(value).get("low")), number(as_dict(value).get("high"))) for value in values]
    own = [(high - low) / 2 for low, high in ends if low is not None and high is not None]
    half = math.hypot(student(len(means) - 1) * stdev(means) / math.sqrt(len(means)), mean(own) if own else 0.0)
    centre = mean(means)
    lowest = -math.inf if key in UNBOUNDED else 0.0
    highest = 1.0 if key in SHARES or key.endswith("_rate") else math.inf
    return {"mean": centre, "low": max(lowest, centre - half), "high": min(highest, centre + half)}


def mean_entry(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What models say of one another's figures, key by key; a rating or a test of one of them has no mean."""
    keys = [key for key in entries[0] if key != "rating" and all(key in entry for entry in entries)]
    found = {key: over_seeds([entry[key] for entry in entries], key) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def recipe_of(path: Path, depth: int = 3) -> str:
    """A run's settings, or a checkpoint's with its step, without its seed and its own names; those of the runs that it began with,
    and what came from Python by its hash, in the place of their names. Of what cannot be known alike the path itself."""
    run = home(path)
    settings, verb = read_config(run / "config.yaml")
    if not settings or not depth or FROM_PYTHON in listed(settings.get("reward")):
        return str(path)
    kept = defaults_of(getattr(punster.config, f"{verb.capitalize()}Config", None)) | settings
    beside = run.resolve().parent
    for key in (key for key in BEGUN_WITH if kept.get(key)):
        path_there = Path(str(kept[key]))
        kept[key] = recipe_of(located(path_there, beside) / path_there.relative_to(home(path_there)), depth - 1)
    if FROM_PYTHON in str(kept):
        kept["given"] = given_hash(run)
    step = path.name if path != run else ""
    return repr((verb, step, sorted((key, str(value)) for key, value in kept.items() if key not in OWN)))


def given_hash(run: Path) -> str:
    """The hash of what a run was given, as its checkpoints hold it for --resume; the run's path where there is none."""
    try:
        newest = max(run.glob("checkpoints/step-*/state.json"), key=lambda file: int(file.parent.name[5:]))
        keys = json.loads(newest.read_text(encoding="utf-8"))["keys"]
        return str((keys["data"], keys.get("judged")))
    except (OSError, ValueError, KeyError, TypeError):
        return str(run)


def groups_of(models: Sequence[Measured]) -> dict[str, list[Measured]]:
    """The models of one recipe with different seeds, each seed once, by a name of their own."""
    recipes: dict[str, dict[str, Measured]] = {}
    for model in models:
        recipes.setdefault(model.recipe, {}).setdefault(model.seed, model)
    groups: dict[str, list[Measured]] = {}
    for group in (list(seeds.values()) for seeds in recipes.values() if len(seeds) > 1):
        names = [model.name for model in group]
        shared = common_name(names)
        groups[shared if shared not in groups else f"{shared}: {', '.join(names)}"] = group
    return groups


def rows_of(models: Sequence[Measured]) -> dict[str, Any]:
    """{name: means} of such models."""
    return {name: {"runs": [model.name for model in group], **mean_entry([model.entry for model in group])}
            for name, group in groups_of(models).items()}  # fmt: skip


def stages_of(stages: Sequence[Stage]) -> dict[str, list[str]]:
    """The names of stages of several runs that differ in their seed alone, by a name for them together.

    What is measured while training hangs on --eval-data, too, and a pipeline's reward model is not its yardstick.
    """
    known = []
    for stage in (stage for stage in stages if stage.config):
        place = stage.place
        own = place.name if read_config(place.parent / "config.yaml")[1] == "run" else ""
        recipe = f"{own} {stage.config.get('eval_data') or []} {recipe_of(place)}"
        known.append(Measured(f"{place.parent.name}/{place.name}", recipe, str(stage.config.get("seed")), {"stage": stage.name}))
    return {name: [model.entry["stage"] for model in group] for name, group in groups_of(known).items()}


def common_name(names: Sequence[str]) -> str:
    """What runs have in common in the last parts of their paths: all of it, or how they begin."""
    last = [Path(name).name for name in names]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*last, strict=False))
    start = last[0] if len(set(last)) == 1 else "".join(letters[0] for letters in alike).rstrip("-_./ :0123456789")
    return f"{label(start or last[0])} ({len(names)} seeds)"


def rows_of_models(models: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """Of an evaluation's models that are runs (`paths`)."""
    runs = {name: Path(path) for name, path in paths.items() if (home(Path(path)) / "config.yaml").is_file()}
    seed = lambda path: str(read_config(home(path) / "config.yaml")[0].get("seed"))
    return rows_of([Measured(name, recipe_of(path), seed(path), models[name]) for name, path in runs.items()])


def rows_of_runs(runs: Sequence[RunData]) -> dict[str, Any]:
    """Of whole pipelines that differ in their seed: each model that they have."""
    found = []
    for run in (run for run in runs if run.verb == "run"):
        recipe = repr(sorted((key, str(value)) for key, value in run.config.items() if key not in OWN))
        seed = str(run.config.get("seed"))
        found += [Measured(f"{run.name}/{name}", f"{name} {recipe}", seed, entry) for name, entry in run.models.items()]
    return rows_of(found)
