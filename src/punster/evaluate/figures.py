"""The figures of report.html as inline SVG, whose colours are CSS variables."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from punster.evaluate.folder import RunData, Stage
from punster.evaluate.table import as_dict, label, number


class Curve(NamedTuple):
    """A metric over the steps of a run."""

    metric: str  # key of metrics.jsonl
    verbs: tuple[str, ...]  # that write it
    title: str
    unit: str  # of the axis
    caption: str  # what to look for


Points = list[tuple[float, float]]
POLICY = ("ppo", "grpo")
CURVES = (
    Curve("objective/scores", POLICY, "Reward while training", "mean score",
     "The score that is trained against should rise and level off. A rise alone is not success: only the gold reward, which no training saw, can show that."),
    Curve("objective/exact_kl", POLICY, "Exact KL to the reference", "nats per response",
     "The reference is the model that training began with. It starts at 0 and should grow slowly. A sudden jump means that the policy left the language it started from."),
    Curve("objective/entropy_per_token", POLICY, "Entropy", "nats per token",
     "A slow fall is normal. A fall towards 0 means collapse: the same few puns over and over."),
    Curve("length", POLICY, "Length of responses", "tokens",
     "It should stay near the SFT model's. A drift up or down often means that the reward likes length, not puns."),
    Curve("loss", ("sft", "distill"), "Loss of supervised fine-tuning", "nats per token",
     "It falls fast, then slowly. A very low loss means that the model recites the training puns."),
    Curve("loss", ("reward",), "Loss of the reward models", "Bradley-Terry loss",
     "It starts near ln 2 = 0.69, the loss of a coin toss, and should fall clearly below."),
    Curve("accuracy", ("reward",), "Accuracy of the reward models", "share of pairs",
     "Share of training pairs in which the preferred text scores higher; 0.5 is chance. Near 1 at once means that the pairs are too easy."),
    Curve("loss", ("dpo",), "Loss of DPO", "loss", "With the sigmoid loss it starts at ln 2 = 0.69 and falls."),
    Curve("rewards/margins", ("dpo",), "Margins of DPO", "implicit reward, preferred - rejected",
     "It starts at 0 and should rise. Very large margins mean that the pairs are memorised."),
    Curve("eval_loss", ("sft", "distill"), "Loss on held-out rows", "nats per token",
     "Of --eval-data, else of the embedded corpus's puns. Where it turns up while the loss of training falls, the rows are being memorised, or are unlike these."),
    Curve("eval_loss", ("dpo",), "Loss of DPO on held-out pairs", "loss",
     "Of --eval-data. Where it turns up while the loss of training falls, the pairs are being memorised: stop there."),
    Curve("eval_accuracy", ("reward",), "Held-out accuracy of the reward models", "share of pairs",
     "Of pairs that are not trained on. What training pairs gain beyond it is learnt by heart."),
)  # fmt: skip
INK, GRID = "#010101", "#020202"  # stand-ins that become CSS variables in the finished SVG
MARKERS = "osD^vPXh"


def colour(hue: int) -> str:
    return f"#0300{hue:02x}"


def figure(key: str, title: str, caption: str, draw: Callable[[Any], None], xlabel: str, ylabel: str) -> dict[str, str]:
    """What a page shows of a figure; inline SVG without clip paths, metadata or name spaces, with ids of its own, colours from CSS."""
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
    svg = svg.replace("<svg", f'<svg role="img" aria-labelledby="{key}-title"', 1)
    return {"key": key, "title": title, "svg": svg, "caption": caption}


def curves_of(run: RunData) -> Iterator[tuple[Curve, list[tuple[Stage, Points]]]]:
    """Every curve that some stage has two points of: (step, value) wherever both are finite numbers."""
    for curve in CURVES:
        found = []
        for stage in run.stages:
            rows = stage.metrics if stage.verb in curve.verbs else []
            pairs = [(number(row.get("step")), number(row.get(curve.metric))) for row in rows]
            points = [(x, y) for x, y in pairs if x is not None and y is not None]
            if len(points) >= 2:
                found.append((stage, points))
        if found:
            yield curve, found


class Band(NamedTuple):
    """A curve, or of runs that differ in their seed the mean of theirs, from the lowest of them to the highest."""

    name: str
    hue: int
    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def bands(run: RunData, lines: list[tuple[Stage, Points]]) -> list[Band]:
    """Curves, those of several seeds as one, over the steps that all of these have."""
    known = {stage.name: dict(points) for stage, points in lines}
    shared = lambda members: sorted(set.intersection(*(set(known[member]) for member in members)))
    drawn: list[tuple[str, list[str]]] = []
    for name, group in run.seeds.items():
        members = [member for member in group if member in known]
        if len(members) > 1 and len(shared(members)) > 1:
            drawn.append((re.sub(r"\(\d+ seeds\)", f"({len(members)} seeds)", name), members))
    single = set(known).difference(*(members for _, members in drawn))
    found = []
    for name, members in [*drawn, *((name, [name]) for name in known if name in single)]:
        steps = shared(members)
        values = [[known[member][step] for member in members] for step in steps]
        mean = [sum(each) / len(each) for each in values]
        found.append(Band(name, run.hue(members[0]), steps, mean, list(map(min, values)), list(map(max, values))))
    return found


def smoothed(values: list[float], width: int) -> list[float]:
    """A running mean, symmetric, so that the ends are not bent."""
    reach = [min(width, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def curve_figure(run: RunData, curve: Curve, lines: list[tuple[Stage, Points]]) -> dict[str, str]:
    """Lines over steps, of several seeds with a band; long noisy ones pale, with a running mean on top."""
    drawn = bands(run, lines)

    def draw(axes: Any) -> None:
        for band in drawn:
            hue, width = band.hue, len(band.steps) // 12
            # Marker and dashes tell lines apart without colour.
            style = {"color": colour(hue), "linestyle": ("-", "--")[hue % 2]}
            smooth = (lambda values, width=width: smoothed(values, width)) if width >= 3 else list
            if band.low != band.high:
                axes.fill_between(band.steps, smooth(band.low), smooth(band.high), color=style["color"], alpha=0.18, linewidth=0)
            if width < 3:
                size = 3.5 if len(band.steps) <= 30 else 0
                axes.plot(
                    band.steps, band.mean, label=label(band.name), linewidth=1.6, marker=MARKERS[hue], markersize=size, **style
                )
                continue
            if band.low == band.high:
                axes.plot(band.steps, band.mean, color=style["color"], linewidth=0.7, alpha=0.45)
            axes.plot(band.steps, smooth(band.mean), label=label(band.name), linewidth=1.8, **style)

        axes.xaxis.get_major_locator().set_params(integer=True)

    ends = "; ".join(f"{label(band.name)} {band.mean[0]:.3g} to {band.mean[-1]:.3g}" for band in drawn)
    caption = f"{curve.caption} First to last: {ends}."
    caption += " Of several seeds the mean, with a band from the lowest to the highest." * any(b.low != b.high for b in drawn)
    return figure(f"curve{CURVES.index(curve)}", curve.title, caption, draw, "step", curve.unit)


def frontier_figure(run: RunData) -> dict[str, str] | None:
    """Gold reward against exact KL, with the curve of best-of-n at its KL bound."""
    points, reference = [], label(run.reference)
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
            hue = run.hue(name)
            style = {"fmt": MARKERS[hue], "color": colour(hue), "markersize": 7, "capsize": 3, "linewidth": 1.4}
            axes.errorbar([x], [y], yerr=bars, label=label(name), **style)
        largest = max(x for x, *_ in [*line, *((x, y) for _, x, y, _ in points)])
        # A square-root axis spreads the small KLs, where best-of-n lives, and makes its law nearly straight.
        axes.set_xscale("function", functions=(lambda v: abs(v) ** 0.5 * (2 * (v > 0) - 1), lambda v: v * abs(v)))
        axes.set_xlim(-0.002 * largest, max(largest * 1.1, 0.1))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xticks(root_ticks(largest))

    caption = (
        f"Up is better, left is closer to {reference}; bars are 95 % intervals. The dashed line is best-of-n sampling at its KL "
        "bound: a trained model near or above it spends its KL well; one far to the right and not higher has over-optimised the "
        "reward it was trained against. Square-root axis."
    )
    title = "Gold reward against exact KL"
    return figure("frontier", title, caption, draw, f"exact KL to {reference} (nats per response)", "gold reward")


def overoptimisation_figure(found: dict[str, Any]) -> dict[str, str] | None:
    """Proxy and gold reward against sqrt(KL) over a run, with Gao's laws and best-of-n, as scripts/over_optimisation.py measured them."""
    d = [max(k, 0.0) ** 0.5 for k in numbers(found.get("kl"))]
    gains = {name: numbers(found.get(name)) for name in ("proxy", "gold")}
    if len(d) < 2 or any(len(values) != len(d) for values in gains.values()):
        return None

    def draw(axes: Any) -> None:
        for name, key in (("proxy", 1), ("gold", 2)):
            axes.plot(d, gains[name], MARKERS[key], color=colour(key), label=name)
            law = as_dict(found.get(f"fit_{name}"))
            if len(fitted := numbers([law.get("a"), law.get("b")])) == 2:
                xs = [max(d) * i / 100 for i in range(101)]
                ys = [x * (fitted[0] - fitted[1] * math.log(x)) if x > 0 else 0.0 for x in xs]
                axes.plot(xs, ys, "-", color=colour(key), linewidth=1.2)
        best = as_dict(found.get("best_of_n"))
        reached, best_gains = numbers(best.get("kl")), numbers(best.get("gold"))
        if reached and len(reached) == len(best_gains):
            axes.plot([max(k, 0.0) ** 0.5 for k in reached], best_gains, "--.", color=colour(0), label="best of n, gold")

    caption = (
        "Gains over the start. As long as both rise, the proxy is worth climbing; where gold turns down while the proxy goes on, the policy "
        f"exploits the proxy's errors. Lines: R = d (a - b log d). Gold is highest at step {found.get('stop', '–')}: the step at which to stop."
    )
    title = "Over-optimisation: proxy and gold"
    return figure("overoptimisation", title, caption, draw, "square root of the exact KL to SFT", "gain in reward")


def numbers(values: Any) -> list[float]:
    """A list of numbers; empty where it is anything else, or holds anything else."""
    found = [number(value) for value in values] if isinstance(values, list) else []
    return [value for value in found if value is not None] if None not in found else []


def root_ticks(largest: float) -> list[float]:
    """Round places that lie about evenly on a square-root axis."""
    found: list[float] = [0.0]
    for share in (0.04, 0.16, 0.36, 0.64, 1.0):
        if (tick := float(f"{largest * share:.1g}")) > found[-1]:
            found.append(tick)
    return found if len(found) > 1 else [0.0, 0.1]
