"""The model card (README.md) of a run folder."""

from __future__ import annotations

import hashlib
import html
import json
import re
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from punster.data.corpus import OWN
from punster.data.recipe import DEFAULTS, built_in, load_mixture
from punster.data.sources import SOURCES
from punster.disk import write_text
from punster.evaluate.figures import curves_of
from punster.evaluate.folder import (
    LICENCES,
    METHODS,
    SHOWN_SETTINGS,
    SIZES,
    RunData,
    accuracy_table,
    base_of,
    chain,
    commands,
    data_used,
    final_figures,
    last_samples,
    listed,
    read_run,
    seconds_text,
    side_by_side,
    usage,
    versions,
)
from punster.evaluate.table import as_dict, judge_sentences, label, result_tables
from punster.model.load import BUILT_IN


def md(text: Any) -> str:
    """Text that stays text in Markdown and in its tables: no HTML, no formatting, no links, one line."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    escaped = re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", escaped)
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;")


def md_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(text: str) -> str:
    """One line as inline code that nothing in it can end, in or out of a table."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"


def write_card(folder: Path) -> Path:
    """Write folder/README.md."""
    run = read_run(Path(folder))
    path = Path(folder) / "README.md"
    write_text(path, "\n\n".join(part for part in (_head(run), *_body(run)) if part) + "\n")
    return path


def _head(run: RunData) -> str:
    base, _ = base_of(run)
    free = all(sources and all(map(is_open, sources)) for sources in sources_used(run).values())
    licence = LICENCES.get(base, "other") if free else "other"
    head: dict[str, Any] = (
        {"base_model": base, "base_model_relation": "adapter" if is_adapter(run) else "finetune"} if base else {}
    )
    head |= {"model_name": run.name, "library_name": "punster", "language": ["en"]}
    if run.stages:
        head["pipeline_tag"] = "text-generation" if run.policies else "text-classification"
    head |= {"tags": ["punster", "puns", "humor", "rlhf", *sorted({s.verb for s in run.stages if s.verb})], "license": licence}
    if licence == "other":
        head["license_name"] = "base-model-and-data"  # the hub asks for a name with "other"; the section on data says why
    return "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---"


def _body(run: RunData) -> list[str]:
    base, note = base_of(run)
    what = "A small language model taught to make puns" if run.policies else "A reward model of puns"
    about = f"{what}, trained with punster {md(versions(run)['punster'])}. {md(note)}".rstrip()
    about = about if run.stages else "A comparison of models that write puns, by punster evaluate. It holds no model of its own."
    parts = [f"# {md(run.name)}", about, *_loading(run, base), *_results(run), *_samples(run)]
    if drawn := _curves(run):
        parts += [
            "## Curves",
            "First to last step, with the values there; report.html has them as figures.",
            md_table(["Metric", "Stage", "Curve", "From", "To"], drawn),
        ]
    told = [stage for stage in run.stages if stage.verb in METHODS]
    methods = [f"- **{md(label(s.name))}**: {METHODS[s.verb]}{s.stopped and f'; it {md(s.stopped)}'}" for s in told]
    if methods:
        lora = any(s.config.get("adapter") == "lora" for s in run.stages)
        parts += ["## Method", "\n".join(methods), "Low-rank adapters (Hu et al. 2021) on frozen weights." if lora else ""]
    if not run.stages:
        return [*parts, "## Commands", "```sh\n" + "\n".join(commands(run)) + "\n```"]
    licence = LICENCES.get(base, "not known to punster: see its own card")
    unknown = "the user's own data; whether results may be passed on depends on its licence, which punster does not know."
    used = sources_used(run) or {"embedded": ["embedded"]}
    data = [source_line(source) for source in dict.fromkeys(source for sources in used.values() for source in sources)]
    data += [f"- {code(name)}: {unknown}" for name, sources in used.items() if not sources]
    data.append(f"- Base model: {md(base or 'local')}, licence: {licence}.")
    limits = (
        "A small model: it often writes sentences that are no pun or make no sense, knows little, and must not be asked for facts. "
        "Its output can be offensive; nothing filters it. English only. Reward models are imperfect, and training finds their "
        "gaps: a higher reward is not in itself a better joke."
    )
    copy = " The base was a 4-bit copy; results with the full model can differ." if run.model in BUILT_IN else ""
    parts += ["## Data and what their licences allow", "\n".join(data), "## Limits", limits + copy, *_settings(run)]
    summary = run.summary
    facts = {**versions(run), **{k: v for k, v in as_dict(summary.get("machine")).items() if not isinstance(v, dict)}}
    facts |= {k: summary.get(k) for k in ("commit", "seed", "scale")} | {"wall time": seconds_text(summary.get("wall_seconds"))}
    facts |= {"SHA-256 of config.yaml": run.config_sha256}
    lines = [f"- {md(k)}: {md(v)}" for k, v in facts.items() if v not in (None, "")]
    return [*parts, "## Commands", "```sh\n" + "\n".join(commands(run)) + "\n```", "## Versions and machine", "\n".join(lines)]


def _loading(run: RunData, base: str) -> list[str]:
    part, line = usage(run)
    if not line:
        return []
    peft = is_adapter(run)
    python = ["from punster import load", "", f"model = load({json.dumps('/'.join(filter(None, (run.shown, part))), ensure_ascii=False)})", 'print(model.generate("make a pun about bakers", k=8))', "",
              "# or, after the export above, without punster:", "from transformers import AutoModelForCausalLM"]  # fmt: skip
    if peft:
        python += ["from peft import PeftModel", "", f'base = AutoModelForCausalLM.from_pretrained("{base or "BASE"}")',
                   'model = PeftModel.from_pretrained(base, "exported")']  # fmt: skip
    else:
        python += ["", 'model = AutoModelForCausalLM.from_pretrained("exported")']
    shell = f"```sh\n{line}\npunster export {run.path(part)} --format {'peft' if peft else 'hf'} --out exported\n```"
    return ["## How to load", shell, "```python\n" + "\n".join(python) + "\n```"]


def is_adapter(run: RunData) -> bool:
    """Whether adapters alone were trained, also in the runs that it began with."""
    return all(settings.get("adapter") != "none" for settings in chain(run, ("actor", "pretrained"))[0])


def _results(run: RunData) -> list[str]:
    parts = []
    if tables := result_tables(run.shown_summary):
        parts.append(", ".join(f"{md(run.summary[k])} {what}" for k, what in SIZES if k in run.summary))
        for table in tables:
            head = ["Model", *(md(column.title) for column in table.columns)]
            parts += [f"**{md(table.title)}**", md_table(head, [[md(c) for c in row] for row in table.rows]), md(table.note)]
        parts += [md(line) for line in judge_sentences(run.summary)]
    elif figures := final_figures(run):
        parts.append(md_table(["Figure", "Value"], [[md(k), v] for k, v in figures.items()]))
    names, accuracies = accuracy_table(run)
    if accuracies:
        parts.append("Accuracy of the reward models on held-out pairs, by kind of rejected text (50 % is chance):")
        parts.append(md_table(["Rejected text", *map(md, names)], [list(map(md, row)) for row in accuracies]))
    return ["## Results", *filter(None, parts)] if parts else []


def _samples(run: RunData) -> list[str]:
    models, table = side_by_side(run, 5)
    if table:
        body = [[md(p), *(md(cells[m][0]) if m in cells else "–" for m in models)] for p, cells in table]
        head = ["Prompt", *(md(label(m)) for m in models)]
        return ["## Samples", "The first sample to each of the first prompts, not selected.", md_table(head, body)]
    rows = [list(map(md, row)) for row in last_samples(run, 5)]
    return ["## Samples", md_table(["Prompt", "Completion", "Score"], rows)] if rows else []


def sources_used(run: RunData) -> dict[str, list[str]]:
    """The data that a run learned from, with the sources of mixtures that come with punster; none of what is the user's own."""
    found = {}
    for name in data_used(run):
        recipes = list(DEFAULTS.values()) if name == "puns" else [name] if name in built_in() else []
        parts = dict.fromkeys(part.source for recipe in recipes for part in load_mixture(recipe).parts)
        found[name] = ["embedded"] if name == "embedded" else list(parts)
    return found


def is_open(source: str) -> bool:
    """Whether what is trained on a source may be used for anything."""
    return source in OWN or SOURCES[source].open


def source_line(name: str) -> str:
    """What a source's licence allows; of our own texts which they are, too."""
    own = {"embedded": ("puns.jsonl", "Embedded corpus of punster: original puns"),
           "contrasts": ("contrasts.jsonl", "Contrasts of punster: original puns, and texts that only look like puns")}  # fmt: skip
    if name in own:
        file, title = own[name]
        digest = hashlib.sha256((files("punster") / "data" / file).read_bytes()).hexdigest()
        return f"- {title}, MIT licence, free for any use (SHA-256 {code(digest)})."
    source = SOURCES[name]
    allowed = "the results may be used for anything." if source.open else "not for commercial use, as far as weights inherit it."
    return f"- {md(source.title)} ({md(source.home)}): {md(source.licence)}; {allowed}"


def _curves(run: RunData) -> list[list[str]]:
    """Every curve of the report as a line of blocks."""
    drawn = ((curve, stage, [y for _, y in points]) for curve, lines in curves_of(run) for stage, points in lines)
    return [[md(c.title), md(label(stage.name)), blocks(ys), f"{ys[0]:.3g}", f"{ys[-1]:.3g}"] for c, stage, ys in drawn]


def blocks(values: list[float], width: int = 24) -> str:
    """A curve as block characters, the mean of each stretch from lowest to highest."""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / (high - low))] if high > low else "▄" for mean in means)


def _settings(run: RunData) -> list[str]:
    stages = {s.name: s.config for s in run.stages if s.config}
    keys = [k for k in SHOWN_SETTINGS if any(config.get(k) is not None for config in stages.values())]
    rows = [[code(k), *(md(", ".join(listed(config.get(k))) or "–") for config in stages.values())] for k in keys]
    return ["## Hyper-parameters", md_table(["Setting", *(md(label(n)) for n in stages)], rows)] if rows else []
