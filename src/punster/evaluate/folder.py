"""What a run folder holds, read forgivingly and made safe to show: for the report and the model card.

Two kinds of folder: a pipeline run, with stage folders and a summary of compared models, and the run of a single verb.
A missing or damaged part is left out. All text is scrubbed of terminal control characters as it is read.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from punster import __version__
from punster.config import EvaluateConfig
from punster.data.corpus import OWN
from punster.data.recipe import built_in
from punster.errors import UserError
from punster.evaluate.table import as_dict, label, number, reference_of, show
from punster.model.load import ALIASES, BUILT_IN
from punster.safe import scrub

STAGES = ("sft", "reward", "gold", "ppo", "grpo", "dpo", "placebo_reward", "placebo")
VERB_OF_STAGE = {"gold": "reward", "placebo_reward": "reward", "placebo": "ppo"}
LICENCES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0", "HuggingFaceTB/SmolLM2-135M": "apache-2.0",
            "HuggingFaceTB/SmolLM2-360M-Instruct": "apache-2.0", "openai-community/gpt2": "mit",
            "openai-community/gpt2-medium": "mit", "distilbert/distilgpt2": "apache-2.0"}  # fmt: skip
METHODS = {
    "sft": "supervised fine-tuning: cross-entropy on the pun and its end token, not on the prompt",
    "reward": "Bradley-Terry reward model on pairs of a preferred and a rejected text, normalised on samples",
    "ppo": "proximal policy optimisation (Schulman et al. 2017) with a per-token critic and GAE, and a KL penalty to the model that it began with",
    "grpo": "group-relative policy optimisation (Shao et al. 2024) or a relative (see `variant`): no critic, samples in groups",
    "dpo": "direct preference optimisation (Rafailov et al. 2023) or a relative (see `loss_type`)",
    "distill": "rejection sampling: supervised fine-tuning on the best of n samples, chosen by the reward model",
}
SIZES = (("prompts", "held-out prompts"), ("samples", "samples each"))
SHOWN_SETTINGS = (
    "batch_size", "steps", "epochs", "lr", "critic_lr", "beta", "clip", "temperature", "max_new_tokens", "adapter", "lora_r",
    "lora_alpha", "top_layers", "variant", "samples", "loss_type", "pairs", "negatives", "split", "dtype", "seed",
)  # fmt: skip

HUES = {"base": 0, "sft": 1, "best_of": 2, "ppo": 3, "grpo": 4, "dpo": 5, "gold": 2, "reward": 1}


# ---- reading --------------------------------------------------------------------------------------------------------
@dataclass
class Stage:
    """One verb's run."""

    name: str
    verb: str
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    place: Path = Path()

    @property
    def stopped(self) -> str:
        """What must be known where the run stopped itself: it is back at an earlier step."""
        why, at, back = (self.summary.get(key) for key in ("aborted", "aborted_at", "steps"))
        return f"stopped itself at step {show(at, 0)} ({why}) and is back at step {show(back, 0)}" if why else ""


@dataclass
class RunData:
    """A run folder; `stages` of a single verb's run is that run alone."""

    name: str
    shown: str  # the path as people see it: relative, without the machine's own folders
    pipeline: bool
    config: dict[str, Any]
    summary: dict[str, Any]
    samples: list[dict[str, Any]]
    stages: list[Stage]
    verb: str = ""  # that config.yaml names: "run" of a pipeline, "evaluate" of a comparison of runs that lie elsewhere
    config_sha256: str = ""
    place: Path = Path()
    hues: dict[str, int] = field(default_factory=dict)  # of the names of a comparison, which are nobody's standing ones
    seeds: dict[str, list[str]] = field(default_factory=dict)  # of a comparison: stages that differ in their seed, by a name

    def path(self, part: str = "") -> str:
        """The folder, or something in it, as a word of a shell line."""
        return shlex.quote(f"{self.shown}/{part}" if part else self.shown)

    def hue(self, name: str) -> int:
        """Number of a model's colour and marker, the same in all figures."""
        names = dict.fromkeys((*self.models, *(stage.name for stage in self.stages), name))
        standing = {one: HUES.get("best_of" if one.startswith("best_of") else one) for one in names}
        free = [hue for hue in (6, 7, *range(6)) if hue not in standing.values()] or [6, 7]
        others = [one for one, hue in standing.items() if hue is None]
        own = standing[name]
        return self.hues.get(name, free[others.index(name) % len(free)] if own is None else own)

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """Entries of summary["models"] in the order of the pipeline; best-of-n stands behind the model it samples from."""
        given = as_dict(self.summary.get("models"))
        first = ("base", "sft", *sorted(n for n in given if n.startswith("best_of")), *STAGES)
        names = [n for n in dict.fromkeys((*first, *given)) if n in given]
        return {name: as_dict(given[name]) for name in names}

    @property
    def reference(self) -> str:
        """Name of the model that the others are compared with."""
        return reference_of(self.summary)

    @property
    def shown_summary(self) -> dict[str, Any]:
        """The summary with its models in that order."""
        return {**self.summary, "models": self.models}

    @property
    def model(self) -> str:
        return str(self.config.get("model") or next((s.config["model"] for s in self.stages if s.config.get("model")), ""))

    @property
    def policies(self) -> list[str]:
        """Names of the stages whose result writes text."""
        return [s.name for s in self.stages if s.verb in ("sft", "ppo", "grpo", "dpo", "distill")]

    @property
    def accuracies(self) -> dict[str, dict[str, Any]]:
        """{reward model: {kind of negative: accuracy}}, from the pipeline's summary or the reward runs' own."""
        given = {n: as_dict(as_dict(v).get("accuracy")) for n, v in as_dict(self.summary.get("reward_models")).items()}
        own = {s.name: as_dict(s.summary.get("accuracy")) for s in self.stages if s.verb == "reward"}
        return {name: kinds for name, kinds in {**own, **given}.items() if kinds}


def read_run(folder: Path) -> RunData:
    """Everything that the report and the card show of a run folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    summary = read_json(folder / "summary.json")
    inner = {p.name for p in folder.iterdir() if p.is_dir() and any((p / f).is_file() for f in ("metrics.jsonl", "config.yaml"))}
    # Less a comparison that lies in it.
    inner = {name for name in inner if read_config(folder / name / "config.yaml")[1] != "evaluate"}
    names = [n for n in STAGES if n in inner] + sorted(inner.difference(STAGES))
    config_file = folder / "config.yaml"
    config, verb = read_config(config_file)
    pipeline = "models" in summary or bool(names) or verb == "run"
    place, here = folder.resolve(), Path.cwd()
    shown = place.relative_to(here).as_posix() if place.is_relative_to(here) else f"{place.parent.name}/{place.name}"
    shown = " ".join(scrub(shown).split())
    stages = [_read_stage(folder / name, name) for name in names] if pipeline else [_read_stage(folder, place.name)]
    return RunData(
        name=scrub(place.name), shown=shown, pipeline=pipeline, config=config, summary=summary,
        samples=read_lines(folder / "samples.jsonl"), stages=stages, verb=verb,
        config_sha256=hashlib.sha256(config_file.read_bytes()).hexdigest() if config_file.is_file() else "", place=place,
    )  # fmt: skip


def compared(runs: Sequence[RunData]) -> RunData:
    """Several runs as one: stages and models are named after their run, so that they share tables and figures."""
    names = [run.name for run in runs]
    shown, placed = [run.shown for run in runs], [str(run.place) for run in runs]
    names = next(each for each in (names, shown, placed) if len(set(each)) == len(each) or each is placed)
    titled = lambda owner, name: owner if name == owner else f"{owner}: {label(name)}"
    models: dict[str, dict[str, Any]] = {}
    rewards: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    stages: list[Stage] = []
    for owner, run in zip(names, runs, strict=True):
        models |= {titled(owner, name): entry for name, entry in run.models.items()}
        rewards |= {titled(owner, name): {"accuracy": kinds} for name, kinds in run.accuracies.items()}
        samples += [{**row, "model": titled(owner, row["model"])} for row in run.samples if isinstance(row.get("model"), str)]
        stages += [replace(stage, name=titled(owner, stage.name) if run.pipeline else owner) for stage in run.stages]
    references = {label(run.reference) for run in runs}
    hues: dict[str, int] = {}
    families = (models, [s.name for s in stages if s.verb not in ("reward", "")], [s.name for s in stages if s.verb == "reward"])
    for family in families:
        hues |= {name: place % 8 for place, name in enumerate(n for n in family if n not in hues)}
    return RunData(
        name=" and ".join(names), shown=" ".join(run.shown for run in runs), pipeline=True, config={}, summary={"models": models, "reward_models": rewards, "reference": references.pop() if len(references) == 1 else "its reference"},
        samples=samples, stages=stages, hues=hues,
    )  # fmt: skip


def differences(runs: Sequence[RunData]) -> list[list[str]]:
    """Settings that are not the same in all runs: key, then each run's value."""
    # Where a run lies, and which of its own stages it begins with, is not what makes it another.
    inside = lambda run, value: value and str(value).replace(f"{run.config.get('out')}/{run.config.get('name')}/", "")
    told = [{f"{s.name}.{k}" if run.pipeline else k: inside(run, v) if k in ("actor", "pretrained", "reward_model") else v
             for s in run.stages for k, v in s.config.items() if k not in ("out", "name")} for run in runs]  # fmt: skip
    keys = [k for k in dict.fromkeys(k for one in told for k in one) if len({str(one.get(k)) for one in told}) > 1]
    return [[key, *(", ".join(listed(one.get(key))) or "–" for one in told)] for key in keys]


def _read_stage(folder: Path, name: str) -> Stage:
    config, verb = read_config(folder / "config.yaml")
    verb = verb or VERB_OF_STAGE.get(name, name if name in STAGES else "")
    return Stage(scrub(name), verb, config, read_lines(folder / "metrics.jsonl"), read_json(folder / "summary.json"), folder)


def read_config(path: Path) -> tuple[dict[str, Any], str]:
    """Settings, and the verb that the first line names ("# punster ppo")."""
    try:
        text = path.read_text(encoding="utf-8")
        found = re.match(r"# punster ([a-z]+)", text)
        return as_dict(scrub(yaml.safe_load(text))), found[1] if found else ""
    except (OSError, ValueError, yaml.YAMLError):
        return {}, ""


def read_json(path: Path) -> dict[str, Any]:
    try:
        return as_dict(scrub(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError):
        return {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a line cut short by an interruption is skipped."""
    rows: list[dict[str, Any]] = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError):
                if isinstance(row := json.loads(line), dict):
                    rows.append(scrub(row))
    return rows


# ---- words and numbers ----------------------------------------------------------------------------------------------
def best_model(run: RunData) -> str | None:
    """The trained model of the highest gold reward but the reference.

    Best-of-n and a file of texts, of which nobody knows where it would end, are no models of their own; a placebo is no candidate.
    """
    models = {n for n, entry in run.models.items() if entry.get("eos_rate", 0) is not None and not n.startswith("best_of")}
    names = [n for n in run.models if n in models and n not in ("base", run.reference, "placebo")]
    names = [n for n in names if n != "sft"] or names
    scores = {n: reward for n in names if (reward := number(run.models[n].get("held_out_reward"))) is not None}
    return max(scores, key=lambda n: scores[n]) if scores else None


def prompt_text(prompt: Any) -> str:
    """A prompt as text; of chat messages, their contents."""
    if isinstance(prompt, list):
        return "\n".join(str(as_dict(message).get("content", "")) for message in prompt)
    return str(prompt)


def side_by_side(run: RunData, count: int) -> tuple[list[str], list[tuple[str, dict[str, tuple[str, str]]]]]:
    """Model names, and for the first prompts each model's first completion with its gold reward, if that is known."""
    table: dict[str, dict[str, tuple[str, str]]] = {}
    for row in run.samples:
        texts, gold = row.get("completions"), row.get("gold")
        if "model" in row and isinstance(texts, list) and texts:
            score = number(gold[0]) if isinstance(gold, list) and gold else None
            cell = (str(texts[0]), "" if score is None else show(score))
            table.setdefault(prompt_text(row.get("prompt", "")), {}).setdefault(str(row["model"]), cell)
    chosen = list(table.items())[:count]
    found = {name for _, cells in chosen for name in cells}
    return [n for n in dict.fromkeys((*run.models, *sorted(found))) if n in found], chosen


def last_samples(run: RunData, count: int) -> list[list[str]]:
    """Of a single verb's run: prompt, completion and score of the last step's samples, of held-out prompts if there are any."""
    rows = [r for r in run.samples if isinstance(r.get("completion"), str)]
    rows = [r for r in rows if r.get("held_out")] or rows
    rows = [r for r in rows if r.get("step") == rows[-1].get("step")]
    return [[prompt_text(r.get("prompt", "")), r["completion"], show(r.get("score"))] for r in rows[:count]]


def accuracy_table(run: RunData) -> tuple[list[str], list[list[str]]]:
    """Names of the reward models, and a row for each kind of rejected text: its name and their accuracies on it."""
    accuracies = run.accuracies
    kinds = dict.fromkeys(kind for given in accuracies.values() for kind in given)
    rows = [[kind.replace("_", " "), *(show(a.get(kind), 1, percent=True) for a in accuracies.values())] for kind in kinds]
    return [label(name) for name in accuracies], rows


def base_of(run: RunData) -> tuple[str, str]:
    """Hub id of the (full) base model, empty if unknown or local, and one sentence on what was used."""
    model = ALIASES.get(run.model, run.model)
    if model in BUILT_IN:
        origin = BUILT_IN[model].origin
        note = f"The base is {model}, a 4-bit (Q4_1) copy of {origin}; the full model is used with --model {origin}."
        return origin, note
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.endswith(".gguf") and not Path(model).exists():
        return model, f"The base is {model}."
    return "", f"The base is a local model, {Path(model).name}." if model else ""


def versions(run: RunData) -> dict[str, str]:
    """Versions that the run recorded with its machine; others as installed where this is written."""
    found = {"punster": __version__, "python": platform.python_version()}
    found |= {package: version(package) for package in ("torch", "transformers", "safetensors")}
    machine = as_dict(run.summary.get("machine"))
    return {name: str(machine.get(name) or given) for name, given in found.items()}


def commands(run: RunData) -> list[str]:
    """Shell lines that repeat the run and use its result."""
    lines = [f"git checkout {commit}"] if re.fullmatch(r"[0-9a-f]{7,40}", commit := str(run.summary.get("commit", ""))) else []
    if run.verb == "evaluate":
        lines.append(f"punster evaluate --config {run.path('config.yaml')} --out again")
    elif run.pipeline:
        if run.config:
            lines.append(f"punster run {run.path('config.yaml')} --name again")
        if policies := run.policies:
            options = f" --gold {run.path('gold')}" if any(s.name == "gold" for s in run.stages) else ""
            given = {key: run.config.get(key) for key in ("seed", "dtype", "device")}
            given |= {"samples": run.summary.get("samples"), **as_dict(run.config.get("evaluate"))}
            given["best_of"] = max((int(n[8:]) for n in run.models if re.fullmatch(r"best_of_\d+", n)), default=None)
            given["limit"] = run.summary.get("prompts")
            known = {item.name for item in fields(EvaluateConfig)} - {"out"}
            for key, value in given.items():
                if key in known and value is not False and isinstance(value, str | int | float) and str(value).isprintable():
                    options += f" --{key.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(str(value))}")
            lines.append(f"punster evaluate base {' '.join(map(run.path, policies))}{options}")
    elif run.config and run.stages[0].verb:
        lines.append(f"punster {run.stages[0].verb} --config {run.path('config.yaml')} -n again")
    return [*lines, f"punster report {run.path()}"]


def usage(run: RunData) -> tuple[str, str]:
    """The policy to use, as a part of the folder (empty: the folder itself), and the shell line that does; ("", "") without one."""
    policies, best = run.policies, best_model(run)
    if not policies:
        return "", ""
    last = [p for p in policies if p != "placebo"][-1:] or policies
    part = "" if not run.pipeline else best if best in policies else last[0]
    return part, f'punster generate {run.path(part)} "make a pun about bakers" -k 8'


def data_used(run: RunData) -> list[str]:
    """Names of the data of all stages, and of the runs that they start from or are rewarded by: 'embedded', or file names.

    A run that cannot be read any more stands there itself: nobody knows what it learned from.
    """
    settings, missing = chain(run, ("actor", "pretrained", "reward_model"))
    found = []
    for each in settings:
        keys = ("data", "prompts", "pretrain", *(["sft_data"] if each.get("sft_coef") else []))
        found += [_data_name(d) for key in keys for d in listed(each.get(key))]
    return list(dict.fromkeys([*found, *(f"{name} (a run that is not here)" for name in missing)]))


def _data_name(given: str) -> str:
    """The base name; with its folder where the name alone would be that of data that come with punster."""
    path = Path(given)
    return "/".join(path.parts[-2:]) if path.name in ("puns", *OWN, *built_in()) else path.name


def chain(run: RunData, keys: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The settings of all stages and of the runs that these keys name, theirs included; names of those that cannot be read."""
    owners = (run.place.name, str(run.config.get("name"))) if run.pipeline else ()
    return followed(
        [s.config for s in run.stages], keys, {f"{owner}/{s.name}" for s in run.stages for owner in owners}, run.place.parent
    )


def followed(
    settings: list[dict[str, Any]], keys: Sequence[str], known: set[str], beside: Path
) -> tuple[list[dict[str, Any]], list[str]]:  # fmt: skip
    """known: paths, or "folder/name", of runs whose settings these are; beside: the folder in which the runs of a pipeline lie now."""
    settings, missing, seen = list(settings), [], {"", "None", "base", *known}
    for each in settings:
        for path in (home(Path(str(each.get(key)))) for key in keys):
            if seen & {str(path), f"{path.parent.name}/{path.name}"}:
                continue
            seen.add(str(path))
            if before := read_config(located(path, beside) / "config.yaml")[0]:
                settings.append(before)
            else:
                missing.append(path.name)
    return settings, missing


def home(path: Path) -> Path:
    """The run's folder, of a run or of one of its checkpoints."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def located(path: Path, beside: Path) -> Path:
    """Where a run lies that settings name; of a pipeline that was moved or renamed, in the folder that its runs lie in now."""
    path = home(path)
    owners = (beside.name, str(read_config(beside / "config.yaml")[0].get("name")))
    return beside / path.name if path.parent.name in owners and not (path / "config.yaml").exists() else path


def listed(value: Any) -> list[str]:
    return [] if value is None else [str(v) for v in value] if isinstance(value, list) else [str(value)]


def final_figures(run: RunData) -> dict[str, str]:
    """The numbers in the summary of a single verb's run."""
    return {} if run.pipeline else {k: f"{v:g}" for k, raw in run.summary.items() if (v := number(raw)) is not None}


def seconds_text(seconds: Any) -> str:
    value = number(seconds)
    if value is None:
        return ""
    return f"{value:.0f} seconds" if value < 120 else f"{value / 60:.1f} minutes" if value < 7200 else f"{value / 3600:.1f} hours"
