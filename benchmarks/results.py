"""From repetitions to ratios, to benchmarks/results/latest.json, to the tables of docs/PERFORMANCE.md."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.keys import KEYS, STEPS, Key

Report = Mapping[str, Any]  # of one repetition: seconds, marks, peak (bytes) and what the task adds: tokens, flops, rate

# What is read off a report, in the key's unit. For times and memory the ratio is theirs over ours, for rates ours over theirs:
# more is better for us throughout.
VALUES: dict[str, Callable[[Report], float]] = {
    "seconds": lambda report: report["seconds"],
    "epoch": lambda report: report["marks"][STEPS - 1],
    "peak": lambda report: report["peak"] / 1e9,
    "rate": lambda report: report["tokens"] / report["seconds"],
    "share": lambda report: report["rate"] / 1e9 if "rate" in report else report["flops"] / report["seconds"] / 1e9,
}
GROWS = ("rate", "share")  # more is better


def compare(value: str, ours: Sequence[Report], theirs: Sequence[Report], unit: str) -> dict[str, Any]:
    """Median, lowest and highest of the ratios of paired repetitions, and the medians of both sides."""
    pairs = [(VALUES[value](a), VALUES[value](b)) for a, b in zip(ours, theirs, strict=True)]
    ratios = [a / b if value in GROWS else b / a for a, b in pairs]
    mine, other = zip(*pairs, strict=True)
    return {
        "ratio": rounded(statistics.median(ratios)), "low": rounded(min(ratios)), "high": rounded(max(ratios)),
        "ours": rounded(statistics.median(mine)), "theirs": rounded(statistics.median(other)), "unit": unit,
    }  # fmt: skip


def rounded(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def merge(path: Path, new: Mapping[str, Any]) -> dict[str, Any]:
    """Put newly measured keys (and sections of keys) beside those that the file already has; returns what it now holds."""
    held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for key, value in new.items():
        held[key] = {**held.get(key, {}), **value} if key in ("scaling", "topk", "measured") else value
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)
    return held


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log value over log size: 1 is linear growth."""
    from math import log

    fit = statistics.linear_regression([log(size) for size in sizes], [log(value) for value in values])
    return fit.slope


# ---- tables -------------------------------------------------------------------------------------------------------
def comparison_table(held: Mapping[str, Any], keys: Sequence[Key] = KEYS) -> str:
    lines = ["| key | what | punster | peer | ratio [low, high] | must reach |", "|---|---|---|---|---|---|"]
    for key in keys:
        if key.name in held:
            r = held[key.name]
            sides = f"{r['ours']:g} {r['unit']} | {r['theirs']:g} {r['unit']}"
            goal = "–" if key.must is None else f"{key.must:g}"
            met = "" if key.must is None or r["ratio"] >= key.must else " (missed)"
            lines.append(
                f"| {key.name} | {key.what} | {sides} | {r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}] | {goal}{met} |"
            )
    return "\n".join(lines)


def measured_table(held: Mapping[str, Any]) -> str:
    lines = ["| measured | commit | when | repetitions | machine | versions |", "|---|---|---|---|---|---|"]
    parts: dict[str, list[str]] = {}
    for key, part in sorted(held.get("measured", {}).items()):
        machine, versions = part["machine"], ", ".join(f"{n} {v}" for n, v in part["versions"].items())
        where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gb']:g} GB"
        text = f"{part['commit'] or '–'} | {part['when']} | {part['repeats']} | {where}, {part['dtype']} | {versions}"
        parts.setdefault(text, []).append(key)
    return "\n".join([*lines, *(f"| {', '.join(keys)} | {text} |" for text, keys in parts.items())])


def scaling_table(held: Mapping[str, Any]) -> str:
    lines = ["| grows with | of | side | sizes | seconds | slope of time | slope of memory |", "|---|---|---|---|---|---|---|"]
    for name, part in sorted(held.get("scaling", {}).items()):
        axis, work, who = name.split("/")
        sizes, seconds = (", ".join(f"{v:.3g}" for v in part[k]) for k in ("sizes", "seconds"))
        lines.append(f"| {axis} | {work} | {who} | {sizes} | {seconds} | {part['time_slope']:.2f} | {part['memory_slope']:.2f} |")
    return "\n".join(lines)


def topk_table(held: Mapping[str, Any]) -> str:
    lines = [
        "| top layers | rollouts | seconds | held-out score | training score (last 3) | exact KL |",
        "|---|---|---|---|---|---|",
    ]
    rows = sorted(held.get("topk", {}).items(), key=lambda item: (item[0] == "all", len(item[0]), item[0]))
    for name, r in rows:
        scores = f"{r['eval_score']:+.3f} | {r['score']:+.3f} | {r['exact_kl']:.2f}"
        lines.append(f"| {name} | {r['steps']} | {r['seconds']:.0f} | {scores} |")
    return "\n".join(lines)


TABLES = {"comparison": comparison_table, "measured": measured_table, "scaling": scaling_table, "topk": topk_table}


def write_page(page: Path, held: Mapping[str, Any]) -> None:
    """Replace what stands between the page's markers `<!-- NAME -->` and `<!-- end -->` by the tables of the results."""
    text = page.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{page} must have exactly one pair of markers <!-- {name} --> and <!-- end -->")
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table(held)}\n{match[2]}", text)  # type: ignore[misc]
    page.write_text(text, encoding="utf-8")
