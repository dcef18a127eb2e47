"""report.html of a run folder: one self-contained page with tables, figures (inline SVG), samples and settings.

Text of samples is escaped by the template; colours are CSS variables, so that figures follow light and dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from punster.evaluate import folder as folder_data
from punster.evaluate.folder import RunData, Stage
from punster.evaluate.table import as_dict, judge_sentences, label, number, result_tables, show, show_kl

SAMPLED_PROMPTS = 20
# (key of metrics.jsonl, verbs that write it, title, unit of the axis, what to look for)
POLICY = ("ppo", "grpo")
CURVES: tuple[tuple[str, tuple[str, ...], str, str, str], ...] = (
    ("objective/scores", POLICY, "Reward while training", "mean score",
     "The score that is trained against should rise and level off. A rise alone is not success: only the gold reward, which no training saw, can show that."),
    ("objective/exact_kl", POLICY, "Exact KL to the SFT model", "nats per response",
     "It starts at 0 and should grow slowly. A sudden jump means that the policy left the language it started from."),
    ("objective/entropy_per_token", POLICY, "Entropy", "nats per token",
     "A slow fall is normal. A fall towards 0 means collapse: the same few puns over and over."),
    ("length", POLICY, "Length of responses", "tokens",
     "It should stay near the SFT model's. A drift up or down often means that the reward likes length, not puns."),
    ("loss", ("sft", "distill"), "Loss of supervised fine-tuning", "nats per token",
     "It falls fast, then slowly. A very low loss means that the model recites the training puns."),
    ("loss", ("reward",), "Loss of the reward models", "Bradley-Terry loss",
     "It starts near ln 2 = 0.69, the loss of a coin toss, and should fall clearly below."),
    ("accuracy", ("reward",), "Accuracy of the reward models", "share of pairs",
     "Share of training pairs in which the preferred text scores higher; 0.5 is chance. Near 1 at once means that the pairs are too easy."),
    ("loss", ("dpo",), "Loss of DPO", "loss", "With the sigmoid loss it starts at ln 2 = 0.69 and falls."),
    ("rewards/margins", ("dpo",), "Margins of DPO", "implicit reward, preferred - rejected",
     "It starts at 0 and should rise. Very large margins mean that the pairs are memorised."),
)  # fmt: skip
INK, GRID = "#010101", "#020202"  # stand-ins that become CSS variables in the finished SVG
MARKERS = "osD^vPXh"


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


# ---- figures --------------------------------------------------------------------------------------------------------
def colour(hue: int) -> str:
    return f"#0300{hue:02x}"


def figure(key: str, draw: Callable[[Any], None], xlabel: str, ylabel: str) -> str:
    """A figure as inline SVG: no clip paths, metadata or name spaces, ids with their own prefix, colours from CSS."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": key, "text.parse_math": False, "font.size": 9, "axes.unicode_minus": False,
             "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
             "grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
             "legend.frameon": False, "path.simplify": True}  # fmt: skip
    with matplotlib.rc_context(style):
        canvas = FigureCanvasSVG(Figure(figsize=(4.4, 2.9), layout="constrained", facecolor="none"))
        axes = canvas.figure.add_subplot()
        draw(axes)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        if names := axes.get_legend_handles_labels()[1]:
            columns = max(1, min(4, 60 // (max(map(len, names)) + 5)))
            canvas.figure.set_figheight(2.7 + 0.2 * -(-len(names) // columns))
            canvas.figure.legend(loc="outside lower center", ncols=columns, columnspacing=1.2, handletextpad=0.5)
        out = io.StringIO()
        canvas.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<clipPath.*?</clipPath>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' clip-path="[^"]*"| xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg)
    svg = re.sub(r' id="([^"]*)"', rf' id="{key}-\1"', svg).replace('xlink:href="#', f'href="#{key}-')
    svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--line)")
    svg = re.sub(r"#0300(\d\d)", lambda m: f"var(--hue{int(m[1])})", svg)
    return svg.replace("<svg", f'<svg role="img" aria-labelledby="{key}-title"', 1)


def curve(key: str, ylabel: str, run: RunData, lines: list[tuple[Stage, list[tuple[float, float]]]]) -> str:
    """Lines over steps; long noisy ones pale, with a running mean on top."""

    def draw(axes: Any) -> None:
        for stage, points in lines:
            hue = run.hue(stage.name)
            xs, ys = zip(*points, strict=True)
            width = len(ys) // 12
            # Marker and dashes tell lines apart without colour.
            style = {
                "color": colour(hue),
                "linestyle": ("-", "--")[hue % 2],
                "marker": MARKERS[hue],
                "markersize": 3.5 if len(ys) <= 30 else 0,
            }
            if width < 3:
                axes.plot(xs, ys, label=label(stage.name), linewidth=1.6, **style)
                continue
            reach = [min(width, i, len(ys) - 1 - i) for i in range(len(ys))]  # symmetric, so that the ends are not bent
            means = [sum(ys[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]
            axes.plot(xs, ys, color=style["color"], linewidth=0.7, alpha=0.45)
            axes.plot(xs, means, label=label(stage.name), linewidth=1.8, color=style["color"], linestyle=style["linestyle"])

        axes.xaxis.get_major_locator().set_params(integer=True)

    return figure(key, draw, "step", ylabel)


def points_of(stage: Stage, metric: str) -> list[tuple[float, float]]:
    """(step, value) of a metric wherever both are finite numbers."""
    pairs = [(number(row.get("step")), number(row.get(metric))) for row in stage.metrics]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def curve_figures(run: RunData) -> list[dict[str, str]]:
    """Every curve for which some stage has at least two points."""
    found = []
    for index, (metric, verbs, title, unit, caption) in enumerate(CURVES):
        runs = [(s, points) for s in run.stages if s.verb in verbs and len(points := points_of(s, metric)) >= 2]
        if runs:
            key = f"curve{index}"
            ends = "; ".join(f"{label(s.name)} {points[0][1]:.3g} to {points[-1][1]:.3g}" for s, points in runs)
            found.append(
                {"key": key, "title": title, "svg": curve(key, unit, run, runs), "caption": f"{caption} First to last: {ends}."}
            )
    return found


def frontier_figure(run: RunData) -> dict[str, str] | None:
    """Gold reward against exact KL, with the curve of best-of-n at its KL bound."""
    points = []
    for name, entry in run.models.items():
        interval = as_dict(entry.get("held_out_reward"))
        y, low, high = (number(interval.get(key)) for key in ("mean", "low", "high"))
        x = number(entry.get("exact_kl"))
        x = x if x is not None else number(entry.get("kl_bound"))
        if x is not None and y is not None:
            bars = [[max(0.0, y - (y if low is None else low))], [max(0.0, (y if high is None else high) - y)]]
            points.append((name, max(x, 0.0), y, bars))
    best = as_dict(run.summary.get("best_of_n"))
    bounds, golds = (best[key] if isinstance(best.get(key), list) else [] for key in ("kl_bound", "gold"))
    numbers = [(number(a), number(b)) for a, b in zip(bounds, golds, strict=False)]
    line = [(max(x, 0.0), y) for x, y in numbers if x is not None and y is not None]
    if not points and len(line) < 2:
        return None

    def draw(axes: Any) -> None:
        if line:
            axes.plot(*zip(*line, strict=True), "--.", color=colour(run.hue("best_of")), linewidth=1.4, label="best of n (bound)")
        for name, x, y, bars in points:
            style = {
                "fmt": MARKERS[run.hue(name)],
                "color": colour(run.hue(name)),
                "markersize": 7,
                "capsize": 3,
                "linewidth": 1.4,
            }
            axes.errorbar([x], [y], yerr=bars, label=label(name), **style)
        largest = max(x for x, *_ in [*line, *((x, y) for _, x, y, _ in points)])
        # A square-root axis spreads the small KLs, where best-of-n lives, and makes its law nearly straight.
        axes.set_xscale("function", functions=(lambda v: abs(v) ** 0.5 * (2 * (v > 0) - 1), lambda v: v * abs(v)))
        axes.set_xlim(-0.002 * largest, max(largest * 1.1, 0.1))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xticks(root_ticks(largest))

    title = "Gold reward against exact KL"
    caption = (
        "Up is better, left is closer to the SFT model; bars are 95 % intervals. The dashed line is best-of-n sampling at its KL "
        "bound: a trained model near or above it spends its KL well; one far to the right and not higher has over-optimised the "
        "reward it was trained against. Square-root axis."
    )
    svg = figure("frontier", draw, "exact KL to SFT (nats per response)", "gold reward")
    return {"key": "frontier", "title": title, "svg": svg, "caption": caption}


def overoptimisation_figure(found: dict[str, Any]) -> dict[str, str] | None:
    """Proxy and gold reward against sqrt(KL) over a run, with Gao's laws and best-of-n, as scripts/over_optimisation.py measured them."""
    from punster.evaluate.overoptimisation import Fit

    kl = [number(k) or 0.0 for k in found.get("kl", [])]
    if len(kl) < 2:
        return None
    d = [max(k, 0.0) ** 0.5 for k in kl]

    def draw(axes: Any) -> None:
        for name, key in (("proxy", 1), ("gold", 2)):
            axes.plot(d, found[name], MARKERS[key], color=colour(key), label=name)
            if law := as_dict(found.get(f"fit_{name}")):
                line = Fit("rl", law["a"], law["b"], law["r2"])
                xs = [max(d) * i / 100 for i in range(101)]
                axes.plot(xs, [line(x) for x in xs], "-", color=colour(key), linewidth=1.2)
        if best := as_dict(found.get("best_of_n")):
            axes.plot([k**0.5 for k in best["kl"]], best["gold"], "--.", color=colour(0), label="best of n, gold")

    caption = (
        "Gains over the start. As long as both rise, the proxy is worth climbing; where gold turns down while the proxy goes on, the policy "
        f"exploits the proxy's errors. Lines: R = d (a - b log d). Gold is highest at step {found.get('stop', '–')}: the step at which to stop."
    )
    svg = figure("overoptimisation", draw, "square root of the exact KL to SFT", "gain in reward")
    return {"key": "overoptimisation", "title": "Over-optimisation: proxy and gold", "svg": svg, "caption": caption}


def root_ticks(largest: float) -> list[float]:
    """Round places that lie about evenly on a square-root axis."""
    found: list[float] = [0.0]
    for share in (0.04, 0.16, 0.36, 0.64, 1.0):
        if (tick := float(f"{largest * share:.1g}")) > found[-1]:
            found.append(tick)
    return found if len(found) > 1 else [0.0, 0.1]


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

    from punster.train.run import write_text

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
