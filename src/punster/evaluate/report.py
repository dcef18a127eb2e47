"""report.html of a run folder: one self-contained page with tables, figures (inline SVG), samples and settings.

Text of samples is escaped by the template; colours are CSS variables, so that figures follow light and dark mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from punster.disk import write_text
from punster.evaluate import folder as folder_data
from punster.evaluate.figures import curve_figure, curves_of, frontier_figure, overoptimisation_figure
from punster.evaluate.folder import RunData
from punster.evaluate.seeds import rows_of_runs, stages_of
from punster.evaluate.table import as_dict, judge_sentences, label, number, result_tables, show, show_kl

SAMPLED_PROMPTS = 20


# ---- words ----------------------------------------------------------------------------------------------------------
def opening(run: RunData) -> str:
    """Two sentences with the key figures."""
    summary = run.summary
    size = ", ".join(f"{summary[key]} {what}" for key, what in folder_data.SIZES if key in summary)
    time = folder_data.seconds_text(summary.get("wall_seconds"))
    facts = [f"model {run.model}" if run.model else "", f"evaluated on {size}" if size else "", f"{time} in all" if time else "",
             f"scale {scale:g} of the recipe" if (scale := number(summary.get("scale"))) not in (None, 1) else "",
             f"seed {seed}" if (seed := summary.get("seed", run.config.get("seed"))) is not None else ""]  # fmt: skip
    second = "; ".join(filter(None, facts))
    second = f" {second[0].upper()}{second[1:]}." if second else ""
    second += "".join(f" {label(stage.name)} {stage.stopped}." for stage in run.stages if stage.stopped)
    if run.pipeline:
        best = folder_data.best_model(run)
        of = f"pipeline of {', '.join(label(s.name) for s in run.stages) or 'no stages yet'}"
        if run.verb == "evaluate":
            of = f"comparison of {', '.join(map(label, run.models))}"
        return (verdict(run, best) if best else f"A {of}; no trained model was compared with another.") + second
    stage = run.stages[0]
    first = f"A run of punster {stage.verb}" if stage.verb else "A run of punster"
    steps = max((number(row.get("step")) or 0 for row in stage.metrics), default=0)
    first += f" over {steps:.0f} steps" if steps else ""
    if drawn := next(curves_of(run), None):
        curve, [(_, points)] = drawn
        first += f"; {curve.title[0].lower() + curve.title[1:]}: {points[0][1]:.3g} at first, {points[-1][1]:.3g} at last"
    return first + "." + second


def verdict(run: RunData, best: str) -> str:
    """What the best trained model reached against the reference, and whether the interval shows an improvement."""
    entry, name = run.models[best], run.reference
    reference = run.models.get(name, {})
    text = f"{label(best)} has the highest gold reward of the trained models, {show(entry.get('held_out_reward'))}"
    text += f" against {show(reference['held_out_reward'])} of {label(name)}" if "held_out_reward" in reference else ""
    wins = as_dict(entry.get("win_rate_vs_sft"))
    low, high = number(wins.get("low")), number(wins.get("high"))
    if number(wins) is not None:
        text += f"; it wins {show(wins, 0, percent=True)} of comparisons with {label(name)}"
        if low is not None and high is not None and low <= 0.5:
            text += ", so no improvement is shown" if high >= 0.5 else ", so it is worse"
    return text + (f", at an exact KL of {kl} nats." if (kl := show_kl(entry)) != "–" else ".")


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of key and text."""
    if isinstance(value, dict):
        return [row for k, v in value.items() for row in flat(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list):
        return [(prefix, ", ".join(map(str, value)) or "–")]
    return [(prefix, "–" if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value))]


def settings(run: RunData) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled tables: evaluation, time, machine, versions, and every config."""
    summary = run.summary
    times = [(label(n), folder_data.seconds_text(as_dict(v).get("seconds"))) for n, v in as_dict(summary.get("stages")).items()]
    if in_all := folder_data.seconds_text(summary.get("wall_seconds")):
        times.append(("in all", in_all))
    tables = [
        ("Decoding in the evaluation", flat(as_dict(summary.get("decoding")))),
        ("Time", times),
        ("Machine", flat(as_dict(summary.get("machine")))),
        ("Versions", flat({**folder_data.versions(run), **{k: summary[k] for k in ("commit", "seed", "scale") if k in summary}})),
        ("Settings of the run", flat(run.config)),
        *((f"Settings of the stage {s.name}", flat(s.config)) for s in run.stages if run.pipeline),
    ]
    return [(title, rows) for title, rows in tables if rows]


def write_report(folder: Path) -> Path:
    """Write folder/report.html."""
    run = folder_data.read_run(Path(folder))
    commands = [*folder_data.commands(run), *filter(None, [folder_data.usage(run)[1]])]
    return write_page(run, opening(run), Path(folder) / "report.html", judge_sentences(run.summary), commands)


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Several runs on one page."""
    runs = [folder_data.read_run(Path(folder)) for folder in folders]
    run = folder_data.compared(runs)
    run.summary["over_seeds"], run.seeds = rows_of_runs(runs), stages_of(run.stages)
    text = (
        f"{len(runs)} runs compared: {run.name}. Each has its own reference, gold reward model and training reward: compare gold "
        "rewards, scores, ratings, win rates and KL within a run; lengths, distinct-2 and other shares also between runs, as far as "
        "prompts and decoding agree." + " Means over seeds are of each run's own figures." * bool(run.summary["over_seeds"])
    )
    judge = [f"{one.name}: {line}" for one in runs for line in judge_sentences(one.summary)]
    command = "punster report " + " ".join(one.path() for one in runs)
    return write_page(run, text, path, judge, [command], [one.name for one in runs], folder_data.differences(runs))


def write_page(
    run: RunData, lead: str, path: Path, judge: Sequence[str], commands: Sequence[str], names: Sequence[str] = (),
    differing: Sequence[Sequence[str]] = (),
) -> Path:  # fmt: skip
    """The template, filled; `names` and `differing` head and fill the table of settings that differ between runs."""
    import jinja2

    models, table = folder_data.side_by_side(run, SAMPLED_PROMPTS)
    judges, accuracies = folder_data.accuracy_table(run)
    figures = [overoptimisation_figure(as_dict(run.summary.get("over_optimisation")))]
    figures += [curve_figure(run, curve, lines) for curve, lines in curves_of(run)]
    template = (files("punster") / "evaluate" / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(
        run=run, opening=lead, note=folder_data.base_of(run)[1], names=names, differing=differing,
        results=result_tables(run.shown_summary), judge=judge, plain=list(folder_data.final_figures(run).items()),
        frontier=frontier_figure(run), figures=list(filter(None, figures)),
        judges=["Rejected text", *judges], accuracies=accuracies,
        labels=[label(m) for m in models], table=[(prompt, [cells.get(m, ("", "")) for m in models]) for prompt, cells in table],
        last=folder_data.last_samples(run, SAMPLED_PROMPTS), settings=settings(run),
        commands="\n".join(commands),
    )  # fmt: skip
    write_text(path, page)
    return path
