"""What compared models learned from: copies are looked for in it, and a yardstick that is part of it is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from punster.config import EvaluateConfig
from punster.data.files import is_file_of_rows
from punster.errors import UserError
from punster.evaluate.folder import followed, home, located, read_config
from punster.train.rows import load_rows


def sibling(models: Sequence[str], name: str) -> str | None:
    """The run of this name beside any of the runs."""
    beside = [home(Path(path)).parent / name for path in models if path != "base"]
    return next((str(path) for path in beside if (path / "checkpoints").is_dir()), None)


def lineage(paths: Sequence[Path], keys: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The settings of these runs and of the runs that these keys name, theirs included; names of those that cannot be read."""
    settings: list[dict[str, Any]] = []
    missing: list[str] = []
    for path in (home(path.resolve()) for path in paths):
        found = read_config(path / "config.yaml")[0]
        each, lost = followed([found] if found else [], keys, {str(path)}, path.parent)
        settings += [one for one in each if one not in settings]
        missing += lost if found else [path.name]
    return settings, missing


def training_texts(paths: Sequence[str]) -> list[str] | None:
    """What these runs, and the runs that they began with, were taught to write; None if one of them cannot be read any more."""
    settings, missing = lineage([Path(path) for path in paths if path != "base"], ("actor", "pretrained"))
    if missing:
        return None
    rows: list[str] = []
    try:
        for each in settings:
            if "loss_type" in each:  # DPO and its relatives
                kind, data = "unpaired" if each["loss_type"] == "kto" else "preference", [] if makes_pairs(each) else each["data"]
            else:  # PPO with a supervised term; supervised fine-tuning
                kind, data = "sft", each["sft_data"] if each.get("sft_coef") else [] if "actor" in each else each["data"]
            found = load_rows(data, kind, columns=each.get("columns") or [], quiet=True) if data else []
            side = "chosen" if kind == "preference" else "completion"
            rows += [row[side] for row in found if kind != "unpaired" or row["label"]]
    except (OSError, KeyError, UserError):
        return None
    return list(dict.fromkeys(rows)) or None


def makes_pairs(settings: dict[str, Any]) -> bool:
    """Whether a run of DPO learned from samples that the reward model ranked."""
    return bool(settings.get("online")) or settings.get("pairs") == "sampled"


def not_held_out(paths: dict[str, str], gold: str, config: EvaluateConfig) -> dict[str, list[str]]:
    """{"not_held_out": the models that the yardstick was trained into, or chooses the texts of; "lineage_unknown": models of which
    nobody can know, as a run that they began with is not there any more}, without what is empty."""
    yardstick = home(Path(gold)).resolve()
    same = lambda path: bool(path) and located(Path(str(path)), yardstick.parent).resolve() == yardstick
    found, unknown = [], []
    for name, path in paths.items():
        settings, missing = lineage([Path(path)] if path != "base" and not is_file_of_rows(path) else [], ("actor", "pretrained"))
        # DPO on given pairs has a reward model for the scores that it shows, and learns nothing from it.
        if any(same(each.get("reward_model")) for each in settings if "loss_type" not in each or makes_pairs(each)):
            found.append(name)
        elif missing:
            unknown.append(name)
    chooser = config.proxy or sibling(config.models, "reward")
    found += [f"best_of_{config.best_of}"] if config.best_of and same(chooser) else []
    return {key: names for key, names in (("not_held_out", found), ("lineage_unknown", unknown)) if names}
