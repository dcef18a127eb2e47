"""punster run: sft -> reward -> ppo, grpo, dpo, best-of-n -> evaluate -> report, as one folder of runs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from punster.config import (
    DpoConfig,
    EvaluateConfig,
    GrpoConfig,
    PipelineConfig,
    PolicyConfig,
    PpoConfig,
    RewardConfig,
    SftConfig,
    TrainConfig,
)
from punster.config.parsing import check_values, parse, parser_for, readable, suggestion
from punster.config.pipeline import NEEDS
from punster.config.shared import require
from punster.data.recipe import recipe_folder
from punster.disk import write_json, write_text
from punster.errors import UserError, near_matches, speaker
from punster.evaluate.folder import read_json
from punster.train.checkpoint import clear_partial
from punster.train.dpo import dpo
from punster.train.estimate import Counts, pipeline_seconds
from punster.train.grpo import grpo
from punster.train.held_out import own_rows
from punster.train.ppo import ppo
from punster.train.reward import train_reward
from punster.train.run import changed_settings, claim, config_dict, crash_report, note, release, saved_settings
from punster.train.setup import open_base
from punster.train.sft import sft

Settings = TypeVar("Settings", TrainConfig, EvaluateConfig)
PATIENCE = 15  # minutes
OF_ALL = ("name", "out", "resume", "dry_run")  # by which the stages find one another: of the whole run alone
SCALES = (50, 20, 10, 5, 3, 2, *(k / 20 for k in range(20, 1, -1)), 0.07, 0.05, 0.03, 0.02, 0.01)
STAGES: dict[str, tuple[type[TrainConfig], Callable[[Any], Path | None], str]] = {
    "sft": (SftConfig, sft, "supervised fine-tuning on puns"),
    "reward": (RewardConfig, train_reward, "reward model that is trained against"),
    "gold": (RewardConfig, train_reward, "yardstick reward model, never trained against"),
    "ppo": (PpoConfig, ppo, "PPO"),
    "grpo": (GrpoConfig, grpo, "GRPO"),
    "dpo": (DpoConfig, dpo, "DPO"),
    "placebo_reward": (RewardConfig, train_reward, "reward model with shuffled labels"),
    "placebo": (PpoConfig, ppo, "PPO against shuffled labels"),
}


def load_recipe(recipe: str, rest: Sequence[str] = ()) -> PipelineConfig:
    """A recipe's name or a YAML file, with options of the command line on top."""
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = recipe_folder() / f"{recipe}.yaml"
        if not path.exists():
            known = sorted(p.stem for p in recipe_folder().glob("*.yaml") if "stages" in p.read_text())
            raise UserError(f"unknown recipe {recipe!r}.{near_matches(recipe, known)} Known: {', '.join(known)}; or a .yaml file")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    config: PipelineConfig = parse("run", PipelineConfig, ["--config", str(path), *rest])
    try:
        return config if config.name else replace(config, name=path.stem)
    except UserError as error:
        raise UserError(f"{path}: the file's name cannot be the run's ({error}); give one with --name") from None


def stage_config(config: PipelineConfig, stage: str) -> TrainConfig:
    """A stage's dataclass: the verb's defaults, what the pipeline shares, the recipe's section, and the scale."""
    folder = Path(config.out) / config.name
    shared: dict[str, Any] = {
        "name": stage, "out": str(folder), "model": config.model, "prompt_format": config.prompt_format, "device": config.device,
        "dtype": config.dtype, "seed": config.seed, "quiet": config.quiet,
    }  # fmt: skip
    if stage in ("reward", "gold", "placebo_reward"):
        shared["pretrained"] = str(folder / "sft")
    if stage in ("ppo", "grpo", "dpo", "placebo"):
        shared |= {
            "actor": str(folder / "sft"),
            "reward_model": str(folder / ("placebo_reward" if stage == "placebo" else "reward")),
        }
    if stage == "placebo_reward":
        shared["shuffle_labels"] = True
    if stage == "gold":
        shared["seed"] = config.seed + 1
    settings = typed(STAGES[stage][0], stage, shared, getattr(config, stage))
    alone = isinstance(settings, RewardConfig) and settings.minutes
    require(not alone, f"section {stage!r} of the recipe: a stage has no minutes of its own; --minutes is for all of them")
    return settings if config.scale == 1 else scaled(settings, config.scale)


def typed(kind: type[Settings], name: str, shared: dict[str, Any], section: dict[str, Any]) -> Settings:
    """A verb's dataclass: what the pipeline shares under the recipe's section, with types checked as on the command line."""
    from jsonargparse import ArgumentError

    place, known = f"section {name!r} of the recipe", [item.name for item in fields(kind)]
    for key in section:
        if key in OF_ALL:
            raise UserError(f"{place}: a stage has no {key} of its own; --{key.replace('_', '-')} is for all of them")
        if key not in known:
            raise UserError(f"{place}: unknown key {key!r}.{suggestion(str(key), {name: name for name in known})}")
    values, parser = {**shared, **section}, parser_for(name, kind)
    check_values(values, parser, place)
    try:
        checked = parser.parse_object(values).as_dict()
    except (ArgumentError, TypeError) as error:
        raise UserError(f"{place}: {readable(str(error), parser)}") from None
    return kind(**{key: checked[key] for key in known})


def scaled(stage: TrainConfig, scale: float) -> TrainConfig:
    """The same stage at a fraction of its cost: fewer passes, fewer samples; of RL as many updates from fewer samples, down to a quarter."""
    changed: dict[str, Any] = {}
    fraction = min(1.0, scale)

    def part(count: int, factor: float, least: int) -> int:
        return max(min(least, count), round(count * factor))  # 0, which is none, stays 0

    samples = isinstance(stage, PolicyConfig) or (isinstance(stage, DpoConfig) and stage.online)
    size = max(fraction, 0.25) if samples else 1.0  # of a step
    if stage.steps is not None:
        changed["steps"] = max(1, round(stage.steps * scale / size))
    elif isinstance(stage, SftConfig | RewardConfig | DpoConfig):
        changed["epochs"] = stage.epochs * scale / size
    if samples:
        eights = min(stage.batch_size, 8 if isinstance(stage, PpoConfig) else 2)
        group = stage.samples if isinstance(stage, GrpoConfig) else eights
        if size != 1:
            changed["batch_size"] = max(group, int(stage.batch_size * size) // group * group)
    if isinstance(stage, PolicyConfig):
        changed["minibatches"] = min(stage.minibatches, changed.get("batch_size", stage.batch_size))
        changed["eval_prompts"] = part(stage.eval_prompts, fraction, 2)
    if isinstance(stage, PpoConfig):
        changed["critic_warmup"] = min(stage.critic_warmup, changed.get("steps", 1) - 1)
    if isinstance(stage, RewardConfig):
        changed["sampled_rows"] = part(stage.sampled_rows, scale, 8)
        changed["normalise_samples"] = part(stage.normalise_samples, fraction, 8)
        changed["test_limit"] = part(stage.test_limit, fraction, 4)
    if isinstance(stage, DpoConfig) and (stage.prompt_limit or scale < 1):  # all prompts stay all; of 500 where less is wanted
        changed["prompt_limit"] = max(8, round((stage.prompt_limit or 500) * scale))
    return replace(stage, **changed)


def run_pipeline(config: PipelineConfig) -> None:
    """All stages, the evaluation, the report; prints the closing table."""
    folder = Path(config.out) / config.name
    if not config.dry_run:
        if folder.exists() and not config.resume:
            raise UserError(f"run {folder} exists already: choose another name (-n), or go on with --resume")
        if config.resume and not folder.exists():
            raise UserError(f"--resume: there is no run {folder}")
    counts: Counts = {}
    config = fitted(config, counts)
    stages, evaluation = parts_of(config)
    for stage, settings in stages.items():  # a mistake in one's --eval-data is found now, and not when its turn has come
        if not stage_summary(folder, stage):
            own_rows(replace(settings, quiet=True))
    if config.dry_run:
        plan(config, stages, time_left(config, stages, evaluation, counts))
        return
    begun = [stage for stage in stages if (folder / stage / "config.yaml").exists()]
    for stage in begun:
        if changed := changed_settings(folder / stage, stages[stage]):
            raise UserError(
                f"--resume: stage {stage} was run with other settings ({changed}); delete {folder / stage}, and the stages that rest "
                "on it, to run it again"
            )
    redone: list[str] = []  # in their order: what rests on a stage that is to be run again must be run again, too
    for stage in begun:
        used = [need for need in NEEDS[stage] if str(folder / need) in vars(stages[stage]).values()]
        redone += [stage] if any(need in redone or need not in begun for need in used) else []
    if redone:
        raise UserError(
            f"--resume: {', '.join(redone)} rest on a stage that is to be run again; delete these, too: "
            + ", ".join(str(folder / stage) for stage in redone)
        )
    # A model, or data to learn from, that cannot be had are found out before anything is written.
    open_base(stages["sft"])
    left = time_left(config, stages, evaluation, counts)
    folder.mkdir(parents=True, exist_ok=True)
    lock = claim(folder)
    try:
        clear_partial(folder)
        note(folder, "started", arguments=sys.argv[1:], stages=config.stages, scale=config.scale)
        run_stages(config, stages, evaluation, folder, left)
    except BaseException as error:
        note(folder, "stopped", error=f"{type(error).__name__}: {error}")
        if isinstance(error, Exception) and not isinstance(error, UserError) and not hasattr(error, "__notes__"):  # of no stage
            crash_report(folder, error, verb="run", config=config_dict(config))
        raise
    finally:
        release(lock)


def parts_of(config: PipelineConfig) -> tuple[dict[str, TrainConfig], EvaluateConfig]:
    """The settings of the stages, in their order, and of the evaluation."""
    stages = {stage: stage_config(config, stage) for stage in config.stages}
    return stages, evaluation_config(config, Path(config.out) / config.name)


def fitted(config: PipelineConfig, counts: Counts) -> PipelineConfig:
    """The same with a scale at which all of it takes about --minutes on this machine; a run that goes on keeps the one it began with."""
    folder = Path(config.out) / config.name
    if config.resume and (folder / "config.yaml").exists():
        begun = saved_settings(folder).get("scale", 1.0)
        wanted = f"{folder / 'config.yaml'}: scale must be a number above 0, found {begun!r}; mend it, then go on with --resume"
        require(isinstance(begun, int | float) and 0 < begun <= 100, wanted)
        if config.scale not in (1.0, begun):
            speaker(config.quiet)(f"{config.name} goes on at the scale that it began with, {begun:g}, not {config.scale:g}")
        return replace(config, scale=float(begun))

    def needed(scale: float) -> float:
        changed = replace(config, scale=scale)
        return sum(time_left(changed, *parts_of(changed), counts).values()) / 60

    if not config.minutes or (whole := needed(config.scale)) <= 1.1 * config.minutes:
        return config
    scale, takes = config.scale, whole
    for lower in (step for step in SCALES if step < config.scale):
        scale, takes = lower, needed(lower)
        if takes <= 1.05 * config.minutes:
            break
    speaker(config.quiet)(
        f"all of it would take about {whole:.0f} minutes on this machine; --scale {scale:g} takes about {takes:.0f} "
        "(--minutes 0: all of it)"
    )
    return replace(config, scale=scale)


def run_stages(
    config: PipelineConfig, stages: dict[str, TrainConfig], evaluation: EvaluateConfig, folder: Path, left: dict[str, float]
) -> None:  # fmt: skip
    """What is left to do of a pipeline (estimated seconds by stage), in a folder that is this process's own."""

    def say(text: str) -> None:
        note(folder, "stage", text=text.strip())
        if not config.quiet:
            print(text, file=sys.stderr)

    if not config.quiet:
        minutes = sum(left.values()) / 60
        say(f"about {minutes:.0f} minutes to go on this machine{shorter(minutes, config)}")
    expected = took = 0.0  # seconds, of what has been done since
    again = config_dict(replace(config, resume=False, minutes=0.0))  # so that the file runs anew elsewhere, under another name
    write_text(folder / "config.yaml", "# punster run\n" + yaml.safe_dump(again, sort_keys=False))
    started = time.monotonic()
    seconds: dict[str, Any] = {}
    for number, (stage, settings) in enumerate(stages.items(), 1):
        _, train, title = STAGES[stage]
        if before := stage_summary(folder, stage):
            say(f"[{number}/{len(stages) + 1}] {title}: done before")
            release(claim(folder / stage))  # a process that was killed at the very end leaves its lock file
        else:
            say(f"[{number}/{len(stages) + 1}] {title}")
            settings.resume = (folder / stage / "config.yaml").exists()
            train(settings)
        seconds[stage] = {"seconds": stage_summary(folder, stage)["wall_seconds"]}  # over all processes that worked on it
        if not before and not config.quiet:
            expected, took = expected + left.pop(stage, 0.0), took + seconds[stage]["seconds"]
            if expected:
                say(f"    about {sum(left.values()) * took / expected / 60:.0f} minutes left")
    say(f"[{len(stages) + 1}/{len(stages) + 1}] evaluation on held-out prompts, report")
    evaluated = time.monotonic()
    from punster.evaluate.card import write_card
    from punster.evaluate.compare import evaluate
    from punster.evaluate.report import write_report
    from punster.evaluate.table import print_table
    from punster.machine import machine

    summary = evaluate(evaluation)
    seconds["evaluate"] = {"seconds": round(time.monotonic() - evaluated, 1)}
    summary |= {
        "wall_seconds": round(sum(item["seconds"] for item in seconds.values()), 1), "machine": machine(), "seed": config.seed,
        "commit": commit(), "stages": seconds, "scale": config.scale,
        "reward_models": {n: {"accuracy": stage_summary(folder, n)["accuracy"]} for n in ("reward", "gold") if n in stages},
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    report = write_report(folder)
    write_card(folder)
    if not config.quiet:
        print_table(summary)
        print(
            f"wall time {summary['wall_seconds'] / 60:.1f} minutes (this call {(time.monotonic() - started) / 60:.1f}); report: {report}"
        )


def time_left(
    config: PipelineConfig, stages: dict[str, TrainConfig], evaluation: EvaluateConfig, counts: Counts
) -> dict[str, float]:  # fmt: skip
    """Estimated seconds of the stages that are not done (of all, unless a run goes on), whose data are read for it, and of the evaluation.

    UserError if data are missing.
    """
    from punster.evaluate.success import labels_at_hand

    if evaluation.call_puns:
        labels_at_hand()
    done = [stage for stage in stages if config.resume and stage_summary(Path(config.out) / config.name, stage)]
    return pipeline_seconds(config, stages, evaluation, done, counts)


def evaluation_config(config: PipelineConfig, folder: Path) -> EvaluateConfig:
    policies = [stage for stage in config.stages if stage not in ("reward", "gold", "placebo_reward")]
    shared = {
        "models": ["base", *(str(folder / stage) for stage in policies)], "seed": config.seed, "device": config.device,
        "dtype": config.dtype, "out": str(folder), "quiet": config.quiet,
    }  # fmt: skip
    settings = typed(EvaluateConfig, "evaluate", shared, config.evaluate)
    # Down to half of the work the intervals stay as narrow as they are.
    limit = max(4, round((settings.limit or 100) * 2 * config.scale)) if config.scale < 0.5 else settings.limit
    return replace(settings, limit=limit)


def stage_summary(folder: Path, stage: str) -> dict[str, Any]:
    """A finished stage's summary; empty where there is none that can be read."""
    result = read_json(folder / stage / "summary.json")
    return result if "wall_seconds" in result else {}


def commit() -> str | None:
    """The commit of a checkout that holds this package; None for an installed wheel."""
    here = Path(__file__).resolve()
    if not (here.parents[3] / ".git").exists():
        return None
    asked = ["git", "-C", str(here.parents[3]), "rev-parse", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        return None


def plan(config: PipelineConfig, stages: dict[str, TrainConfig], expected: dict[str, float]) -> None:
    """--dry-run: the stages and the estimated seconds that each takes on this machine."""
    at_scale = f" at scale {config.scale:g}" if config.scale != 1 else ""
    print(f"{Path(config.out) / config.name}: {', '.join(stages)}, evaluation, report{at_scale}")
    for stage, seconds in expected.items():
        print(f"  {stage:15s} about {seconds / 60:5.1f} minutes")
    base = open_base(stages["sft"])[0]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in base.weights.values())
    memory = (weights + 2.5e9 * base.config.d_model / 576) / 1e9  # as measured for the default model, larger ones in proportion
    minutes = sum(expected.values()) / 60
    print(
        f"  {'in all':15s} about {minutes:5.1f} minutes on this machine, about {memory:.0f} GB of memory{shorter(minutes, config)}"
    )


def shorter(minutes: float, config: PipelineConfig) -> str:
    """How to wait less, where it is long and nothing else was asked for."""
    if minutes < 1.5 * PATIENCE or config.minutes or config.resume:
        return ""
    less = max(0.01, float(f"{config.scale * PATIENCE / minutes:.1g}"))
    return f" (--scale {less:g}: about {minutes * less / config.scale:.0f})"
