"""How time and memory grow: log-log slopes of rollouts and training steps along model size, length, batch and samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.keys import GROWTH, TRL, points, side
from benchmarks.line import say, start


def measure_growth(repeats: int, out: Path, part: dict[str, Any]) -> None:
    """Every axis and kind of work for punster, sequence length for transformers too; merged into `out` under "scaling"."""
    for axis, work in GROWTH:
        for who, name in (("punster", "punster"), (TRL, "transformers")):
            if who == TRL and axis != "sequence length":
                continue
            # The first warm-up is of the first point, and its first report is thrown away with it.
            worker = start(side(who, "growth", axis=axis, work=work), f"growth-{axis.replace(' ', '-')}-{work}-{name}")
            try:
                worker.ready()
                found = growth(worker.repetition, axis, work, repeats)
            finally:
                worker.close()
            results.merge(out, {"scaling": {f"{axis}/{work}/{name}": found}, "measured": {"scaling": part}})
            say(f"growth with {axis}, {work}, {name}: time {found['time_slope']:.2f}, memory {found['memory_slope']:.2f}")


def growth(repetition: Callable[[], dict[str, Any]], axis: str, work: str, repeats: int) -> dict[str, Any]:
    """Medians at each point, and slopes. The worker's warm-up was the first point, so reports begin with the second."""
    sizes = [point.size for point in points(axis, work)]
    seconds: list[list[float]] = [[] for _ in sizes]
    memory: list[list[float]] = [[] for _ in sizes]
    for number in range(1, len(sizes) * repeats + 1):
        report = repetition()
        seconds[number % len(sizes)].append(report["seconds"])
        memory[number % len(sizes)].append(report["memory"])
    times, peaks = ([results.rounded(statistics.median(v)) for v in series] for series in (seconds, memory))
    return {
        "sizes": sizes, "seconds": times, "memory": peaks, "time_slope": results.rounded(results.slope(sizes, times)),
        "memory_slope": results.rounded(results.slope(sizes, peaks)),
    }  # fmt: skip
