"""report.html of a run folder: one self-contained page with tables, figures (inline SVG), samples and settings.

Text of samples is escaped by the template; colours are CSS variables, so that figures follow light and dark mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from punster.evaluate import folder as folder_data
from punster.evaluate.figures import CURVES, curve_figures, frontier_figure, overoptimisation_figure, points_of
from punster.evaluate.folder import RunData
from punster.evaluate.table import as_dict, judge_sentences, label, number, result_tables, show, show_kl

SAMPLED_PROMPTS = 20


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{{ run.name }} - punster report</title>
<style>
:root { color-scheme: light dark; --back: #fff; --soft: #f3f4f6; --ink: #1f2328; --faint: #59636e; --line: #d4d8dd;
  --hue0: #6b7280; --hue1: #0b62c4; --hue2: #8f6200; --hue3: #c2410c; --hue4: #15803d; --hue5: #7e22ce; --hue6: #be185d; --hue7: #0e7490 }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --soft: #1e2329; --ink: #e6e9ed; --faint: #9ba5b1; --line: #3a424c;
  --hue0: #a3adba; --hue1: #6cb6ff; --hue2: #e3b341; --hue3: #ff9a62; --hue4: #5fd38a; --hue5: #d2a8ff; --hue6: #ff8ac2; --hue7: #56d4dd } }
body { margin: 0 auto; max-width: 66rem; padding: 1rem; background: var(--back); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
h1 { margin: .5rem 0; line-height: 1.2 }
h2 { margin: 2.5rem 0 .5rem; line-height: 1.25 }
h3 { margin: 1rem 0 .25rem; font-size: 1rem }
.lead { font-size: 1.1rem }
.note, figcaption, caption, .score { color: var(--faint); font-size: .875rem }
.scroll { overflow-x: auto; margin: .75rem 0 }
.scroll:focus-visible { outline: 2px solid var(--hue1) }
table { border-collapse: collapse; font-size: .9rem }
caption { text-align: left; padding-bottom: .35rem }
caption span { display: inline-block; max-width: calc(100vw - 2rem) }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; font-weight: 400 }
thead th { background: var(--soft); vertical-align: bottom; font-weight: 600 }
.numbers td, .numbers th[scope=row] { white-space: nowrap; font-variant-numeric: tabular-nums }
.numbers th { overflow-wrap: normal }
.numbers th[scope=row], .puns th[scope=row] { position: sticky; left: 0; background: var(--back) }
.puns td { min-width: 13rem; white-space: pre-line }
.puns th[scope=row] { min-width: 7rem; max-width: 12rem; white-space: pre-line }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem 2rem }
figure { margin: 0; max-width: 34rem }
figure svg { display: block; width: 100%; height: auto }
figure svg * { stroke-linejoin: round; stroke-linecap: butt }
figure svg text { font-family: inherit !important }
details { margin: .4rem 0 }
summary { cursor: pointer; padding: .2rem 0; font-weight: 600 }
pre { overflow-x: auto; padding: .75rem 1rem; background: var(--soft); border-radius: .4rem; font-size: .85rem; overflow-wrap: normal }
</style>
</head>
<body>
{% macro data_table(title, head, rows, kind, captioned=true) %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ title }}"><table class="{{ kind }}">
{% if captioned %}<caption><span>{{ title }}</span></caption>{% endif %}


{% if head %}<thead><tr>{% for cell in head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>{% endif %}
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% macro plot(f) %}
<figure>
<h3 id="{{ f.key }}-title">{{ f.title }}</h3>
{{ f.svg }}
<figcaption>{{ f.caption }}</figcaption>
</figure>
{% endmacro %}
<main>
<h1>{{ run.name }}</h1>
<p class="lead">{{ opening }}</p>
{% if note %}<p class="note">{{ note }}</p>{% endif %}
{% if results or plain or frontier %}
<h2>Results</h2>
{% for table in results %}
{{ data_table(table.title + ": mean [95 % interval]", ["Model"] + table.columns | map(attribute="title") | list, table.rows, "numbers") }}
<p class="note">{{ table.note }}</p>
{% endfor %}
{% for line in judge %}<p class="note">{{ line }}</p>{% endfor %}
{% if plain %}{{ data_table("Final figures", [], plain, "numbers") }}{% endif %}
{% if frontier %}{{ plot(frontier) }}{% endif %}
{% endif %}
{% if differing %}
<h2>What differs</h2>
{{ data_table("Settings that are not the same", ["Setting"] + names | list, differing, "") }}
{% endif %}
{% if accuracies %}
<h2>Reward models</h2>
{{ data_table("Accuracy on held-out pairs, by kind of rejected text (50 % is chance)", judges, accuracies, "numbers") }}
{% endif %}
{% if figures %}
<h2>Training</h2>
<div class="figures">
{% for f in figures %}{{ plot(f) }}{% endfor %}
</div>
{% endif %}
{% if table %}
<h2>Puns</h2>
<p class="note">The first sample of each model to the first prompts, not selected; below it, its gold reward.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Puns side by side"><table class="puns">
<thead><tr><th scope="col">Prompt</th>{% for name in labels %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for prompt, cells in table %}
<tr><th scope="row">{{ prompt }}</th>
{% for text, score in cells %}<td>{{ text }}{% if score %}<br><span class="score">{{ score }}</span>{% endif %}</td>{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% elif last %}
<h2>Samples</h2>
{{ data_table("Samples of the last step", ["Prompt", "Completion", "Score"], last, "puns") }}
{% endif %}
{% if settings %}
<h2>Settings and machine</h2>
{% for title, pairs in settings %}
<details{% if loop.first %} open{% endif %}><summary>{{ title }}</summary>{{ data_table(title, [], pairs, "", false) }}</details>
{% endfor %}
{% endif %}
<h2>How to reproduce</h2>
<p>In a checkout of punster, with the package installed:</p>
<pre tabindex="0">{{ commands }}</pre>
</main>
</body>
</html>
"""


# ---- words ----------------------------------------------------------------------------------------------------------
def opening(run: RunData) -> str:
    """Two sentences with the key figures."""
    summary = run.summary
    size = ", ".join(f"{summary[key]} {what}" for key, what in folder_data.SIZES if key in summary)
    time = folder_data.seconds_text(summary.get("wall_seconds"))
    facts = [f"model {run.model}" if run.model else "", f"evaluated on {size}" if size else "", f"{time} in all" if time else "",
             f"seed {seed}" if (seed := summary.get("seed", run.config.get("seed"))) is not None else ""]  # fmt: skip
    second = "; ".join(filter(None, facts))
    second = f" {second[0].upper()}{second[1:]}." if second else ""
    if run.pipeline:
        best = folder_data.best_model(run)
        names = ", ".join(label(s.name) for s in run.stages)
        return (
            verdict(run, best) if best else f"A pipeline of {names or 'no stages yet'}; no trained model was compared."
        ) + second
    stage = run.stages[0]
    first = f"A run of punster {stage.verb}" if stage.verb else "A run of punster"
    steps = max((number(row.get("step")) or 0 for row in stage.metrics), default=0)
    first += f" over {steps:.0f} steps" if steps else ""
    for metric, verbs, title, *_ in CURVES:
        values = [y for _, y in points_of(stage, metric)]
        if stage.verb in verbs and len(values) >= 2:
            first += f"; {title[0].lower() + title[1:]}: {values[0]:.3g} at first, {values[-1]:.3g} at last"
            break
    return first + "." + second


def verdict(run: RunData, best: str) -> str:
    """What the best trained model reached against SFT, and whether the interval shows an improvement."""
    entry, sft = run.models[best], run.models.get("sft", {})
    text = f"{label(best)} has the highest gold reward of the trained models, {show(entry.get('held_out_reward'))}"
    text += f" against {show(sft['held_out_reward'])} of SFT" if "held_out_reward" in sft else ""
    wins = as_dict(entry.get("win_rate_vs_sft"))
    low, high = number(wins.get("low")), number(wins.get("high"))
    if number(wins) is not None:
        text += f"; it wins {show(wins, 0, percent=True)} of comparisons with SFT"
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
    tables = [
        ("Decoding in the evaluation", flat(as_dict(summary.get("decoding")))),
        (
            "Time",
            [*times, *([("in all", all_)] if (all_ := folder_data.seconds_text(summary.get("wall_seconds"))) else [])],
        ),
        ("Machine", flat(as_dict(summary.get("machine")))),
        ("Versions", flat({**folder_data.versions(run), **{k: summary[k] for k in ("commit", "seed") if k in summary}})),
        ("Settings of the run", flat(run.config)),
        *((f"Settings of the stage {s.name}", flat(s.config)) for s in run.stages if run.pipeline),
    ]
    return [(title, rows) for title, rows in tables if rows]


def write_report(folder: Path) -> Path:
    """Write folder/report.html."""
    run = folder_data.read_run(Path(folder))
    return write_page(run, opening(run), Path(folder) / "report.html", judge_sentences(run.summary))


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Several runs on one page."""
    runs = [folder_data.read_run(Path(folder)) for folder in folders]
    run = folder_data.compared(runs)
    text = (
        f"{len(runs)} runs compared: {run.name}. Each has its own SFT model, gold reward model and training reward: compare gold "
        "rewards and scores within a run; win rates, KL, lengths and shares also between runs, as far as prompts and decoding agree."
    )
    judge = [f"{one.name}: {line}" for one in runs for line in judge_sentences(one.summary)]
    return write_page(run, text, path, judge, [one.name for one in runs], folder_data.differences(runs))


def write_page(
    run: RunData, lead: str, path: Path, judge: Sequence[str], names: Sequence[str] = (), differing: Sequence[Sequence[str]] = ()
) -> Path:
    """The template, filled; `names` and `differing` head and fill the table of settings that differ between runs."""
    import jinja2
    from markupsafe import Markup

    from punster.train.checkpoint import write_text

    frontier = frontier_figure(run)
    models, table = folder_data.side_by_side(run, SAMPLED_PROMPTS)
    cells = [
        (p, [(found[m][0], show(found[m][1]) if found[m][1] is not None else "") if m in found else ("", "") for m in models])
        for p, found in table
    ]
    last = [
        (folder_data.prompt_text(r.get("prompt", "")), r["completion"], show(r.get("score")))
        for r in folder_data.last_samples(run, SAMPLED_PROMPTS)
    ]
    judges = {label(name): kinds for name, kinds in run.accuracies.items()}
    kinds = list(dict.fromkeys(kind for given in judges.values() for kind in given))
    accuracies = [[kind.replace("_", " "), *(show(a.get(kind), 1, percent=True) for a in judges.values())] for kind in kinds]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE).render(
        run=run, opening=lead, names=names, differing=differing, note=folder_data.base_of(run)[1],
        results=result_tables(run.shown_summary), judge=judge, plain=list(folder_data.final_figures(run).items()), labels=[label(m) for m in models], table=cells,
        frontier=frontier and {**frontier, "svg": Markup(frontier["svg"])}, last=last, accuracies=accuracies,
        figures=[{**f, "svg": Markup(f["svg"])} for f in [*filter(None, [overoptimisation_figure(as_dict(run.summary.get("over_optimisation")))]), *curve_figures(run)]], judges=["Rejected text", *judges],
        settings=settings(run), commands="\n".join([*folder_data.commands(run), *filter(None, [folder_data.usage(run)[1]])]),
    )  # fmt: skip
    write_text(path, page)
    return path
