"""make bench: python -m benchmarks [--only KEY,...] [--repeats N] [--quick] [--out FILE]

Workers of both sides alternate, one repetition each in turn, in one run. Results are merged into the JSON key by key, so a
long list can be measured in parts; the tables of docs/PERFORMANCE.md are written from it.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import prepare, results
from benchmarks.keys import KEYS, TRL, Key, Side
from benchmarks.line import ROOT, BenchError, Worker, say, start
from benchmarks.scaling import measure_growth

LATEST, PAGE = ROOT / "benchmarks" / "results" / "latest.json", ROOT / "docs" / "PERFORMANCE.md"


def chosen_keys(wanted: Sequence[str]) -> list[Key]:
    """Keys by name; NAME* stands for all that begin with NAME."""
    for name in wanted:
        if not any(fnmatch.fnmatchcase(key.name, name) for key in KEYS):
            raise BenchError(f"--only {name}: unknown key; known: {', '.join(key.name for key in KEYS)}, scaling")
    return [key for key in KEYS if any(fnmatch.fnmatchcase(key.name, name) for name in wanted)]


def measure(keys: Sequence[Key], repeats: int) -> dict[Side, list[dict[str, Any]]]:
    """Repetitions of every side of the keys, in turn: a, b, c, a, b, c, …"""
    sides = list(dict.fromkeys(side for key in keys for side in (key.ours, key.theirs)))
    workers: dict[Side, Worker] = {}
    try:
        for number, side in enumerate(sides):
            workers[side] = start(side, f"{keys[0].group}-{number}-{side.who}-{side.task}")
            workers[side].ready()  # one after the other: nothing else runs while a worker warms up
        reports: dict[Side, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(repeats):
            for side in sides:
                reports[side].append(workers[side].repetition())
            times = ", ".join(f"{side.who} {side.task} {reports[side][-1]['seconds']:.2f}" for side in sides)
            say(f"  {number + 1}/{repeats}: {times}")
        return reports
    finally:
        for worker in workers.values():
            worker.close()


def provenance(repeats: int, versions: dict[str, str]) -> dict[str, Any]:
    from punster.machine import machine
    from punster.train.pipeline import commit

    dtype = json.loads(prepare.DATA.read_text())["dtype"]
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"machine": machine(), "versions": versions, "commit": commit(), "when": when, "repeats": repeats, "dtype": dtype}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", help="keys, separated by commas; NAME* is all that begin so; scaling is the growth part (default: everything)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each side after warm-up")
    parser.add_argument("--quick", action="store_true", help="one repetition: shows that everything runs, measures nothing")
    parser.add_argument("--out", type=Path, default=LATEST, help="JSON that the results are merged into")
    parser.add_argument("--table", action="store_true", help="only write the page from the JSON")
    arguments = parser.parse_args()
    repeats = 1 if arguments.quick else arguments.repeats
    try:
        if not arguments.table:
            names = arguments.only.split(",") if arguments.only else ["*", "scaling"]
            run(chosen_keys([name for name in names if name != "scaling"]), repeats, arguments.out)
            if "scaling" in names:
                prepare.prepare([TRL])
                versions = prepare.installed_versions([TRL])
                measure_growth(min(repeats, 3), arguments.out, provenance(min(repeats, 3), versions))
        if arguments.out == LATEST:
            results.write_page(PAGE, results.merge(LATEST, {}))
    except BenchError as error:
        say(f"bench: {error}")
        return 1
    return 0


def run(keys: Sequence[Key], repeats: int, out: Path) -> None:
    peers = {side.who for key in keys for side in (key.ours, key.theirs)} - {"punster"}
    prepare.prepare(peers)
    versions = prepare.installed_versions(peers)
    for group in dict.fromkeys(key.group for key in keys):
        members = [key for key in keys if key.group == group]
        began = time.monotonic()
        say(f"{group}: {', '.join(key.name for key in members)}")
        reports = measure(members, repeats)
        found = {key.name: results.compare(key.value, reports[key.ours], reports[key.theirs], key.unit) for key in members}
        part = provenance(repeats, versions)
        held = results.merge(out, {**found, "measured": {key.name: part for key in members}})
        say(results.comparison_table({key.name: held[key.name] for key in members}, members))
        say(f"  {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
