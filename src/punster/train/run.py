"""What all training loops share: the run folder, its logs, its lock, signals, and reports of crashes.

A run is a folder: config.yaml, metrics.jsonl, samples.jsonl, run.log, summary.json, checkpoints/step-N (see
`punster.train.checkpoint`), events for TensorBoard, and crash.json where it failed. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout

from punster.config import TrainConfig
from punster.config.shared import FROM_PYTHON, WITHOUT_EFFECT, defaults_of
from punster.disk import write_json, write_text
from punster.errors import Aborted, UserError, near_matches
from punster.machine import machine, versions
from punster.safe import json_line, redact, scrub
from punster.train.checkpoint import context, context_at, cut_logs, log_sizes, newest_step, steps_of, writing
from punster.train.optim import out_of_memory

Config = TypeVar("Config", bound=TrainConfig)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived (`number`); a checkpoint has been written, unless it came twice."""

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number


class Run:
    """One run's folder, logs and checkpoints."""

    def __init__(self, config: TrainConfig, verb: str, steps: int, started: float):
        self.config, self.verb, self.steps = config, verb, steps
        self.folder = Path(config.out) / config.name
        self.checkpoints = self.folder / "checkpoints"
        self.started = started
        self.step = 0
        self.held_out: tuple[int, dict[str, float]] = (0, {})  # step and figures of the last evaluation on held-out prompts
        self.on_failure: Callable[[], None] | None = None  # saves what would be lost if the step that is being done fails
        self._signal = 0
        self._last: dict[str, Any] = {}
        self._logged: set[str] = set()
        self._progress: Any = None
        self._events: Any = None
        if config.resume:
            if changed := changed_settings(self.folder, config):
                raise UserError(f"--resume with other settings than the run was started with ({changed})")
            self._lock = claim(self.folder)
            self.step = newest_step(self.folder) or 0
            then = context_at(self.folder, self.step)
            evaluated, figures = then.get("held_out", self.held_out)
            self.held_out = evaluated, figures
            self.started -= then.get("seconds", 0.0)
        else:
            self._create()
            self._lock = claim(self.folder)
        self.note("started", verb=verb, arguments=sys.argv[1:], step=self.step, steps=steps, **context())

    def _create(self) -> None:
        """The folder appears with its settings in it, or not at all."""
        text = yaml.safe_dump(config_dict(self.config), sort_keys=False)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.folder.with_name(f".{self.folder.name}.{os.urandom(4).hex()}.part")
        (fresh / "checkpoints").mkdir(parents=True)
        write_text(fresh / "config.yaml", f"# punster {self.verb}\n{text}")
        try:
            fresh.rename(self.folder)
        except OSError:
            shutil.rmtree(fresh)
            check_name(self.config, self.verb)  # taken meanwhile
            raise

    def rewind(self) -> None:
        """Of a run that goes on, once nothing speaks against it: the logs as they were then, and no summary of an end to come."""
        if self.config.resume:
            cut_logs(self.folder, self.step)
            if self.step < self.steps:
                (self.folder / "summary.json").unlink(missing_ok=True)

    # ---- while training -----------------------------------------------------------------------------------------
    def __enter__(self) -> Run:
        self._previous = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        except ValueError:  # not in the main thread: the caller handles signals
            self._previous = {}
        if not self.config.quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = ("[bold]{task.description}", BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
                       TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
            parts = [TextColumn(c) if isinstance(c, str) else c for c in columns]
            self._progress = Progress(*parts, console=Console(stderr=True))
            self._progress.start()
            self._task = self._progress.add_task(
                f"{self.verb} {self.config.name}", total=self.steps, completed=self.step, note=""
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._progress:
            self._progress.stop()
        if self._events:
            with suppress(Exception):  # a full disk: what matters has been reported already
                self._events.close()
        if error is None or isinstance(error, KeyboardInterrupt):
            self.note("finished" if error is None else "interrupted", step=self.step)
        elif isinstance(error, UserError) and not self._last and not self.config.resume and not steps_of(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)  # bad input found late leaves nothing half-written
        else:
            self._save_begun(error)
            self.note("failed", step=self.step, error=f"{type(error).__name__}: {error}")
            if self._last or not isinstance(error, UserError):  # what is refused before its first step did not crash
                crash_report(self.folder, error, verb=self.verb, config=config_dict(self.config), metrics=self._last)
        release(self._lock)
        if error is None and self._signal:  # it came after the last step
            raise Interrupted(f"interrupted; {self.folder} is finished", self._signal)

    def _save_begun(self, error: BaseException) -> None:
        """After a failure: a checkpoint of the last whole step, as far as that can be had."""
        if self.on_failure is None or (isinstance(error, Aborted) and not out_of_memory(error)):  # went back already; a full disk
            return
        try:
            self.on_failure()
        except BaseException as second:  # what failed first is what counts
            self.note("not_saved", error=f"{type(second).__name__}: {second}")
        if self.step:
            print(f"what was learned until step {self.step} is saved: --resume goes on from there", file=sys.stderr)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            raise Interrupted(f"stopped at once; the last checkpoint is that of step {self.step}", number)
        self._signal = number
        os.write(2, b"\nfinishing this step and writing a checkpoint (once more to stop at once)\n")

    def note(self, event: str, **values: Any) -> None:
        note(self.folder, event, **values)

    def place(self) -> dict[str, Any]:
        """Where the logs and the clock are now."""
        return {"logs": log_sizes(self.folder), "held_out": self.held_out, "seconds": time.monotonic() - self.started}

    def log(self, step: int, metrics: dict[str, float], note: str = "") -> None:
        """One line of metrics.jsonl; TensorBoard and the progress bar show the same."""
        line = {"step": step, "seconds": round(time.monotonic() - self.started, 3), **{k: float(v) for k, v in metrics.items()}}
        path = self.folder / "metrics.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        self._last = line
        self._logged |= set(line)
        if skipped := sum(v for k, v in line.items() if k.endswith("skipped_steps")):
            self.note("skipped", step=step, updates=skipped, reason="a gradient was not finite")
        for key, value in line.items():
            if key != "step" and math.isfinite(value):
                self._picture("add_scalar", key, value, step)
        if self._progress:
            self._progress.update(self._task, completed=step, note=note)

    def _picture(self, method: str, *values: Any) -> None:
        """To TensorBoard, where that can be written: a picture of the run is not worth the run."""
        try:
            if self._events is None:
                from torch.utils.tensorboard.writer import SummaryWriter

                again = self.step + 1 if self.config.resume else None  # hides what is done once more
                self._events = SummaryWriter(str(self.folder / "events"), purge_step=again)
            if self._events:
                getattr(self._events, method)(*values)
        except OSError as error:
            self._events = False
            self.note("no_events", reason=str(error))

    def show(self, step: int, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of texts and numbers: all of it to TensorBoard, the first rows to the terminal. Texts stay plain text."""
        from punster.evaluate.card import md, md_table
        from punster.evaluate.folder import prompt_text
        from punster.evaluate.table import show, text_table

        cells = [[show(c) if c is None or isinstance(c, float) else scrub(prompt_text(c)) for c in row] for row in rows]
        self._picture("add_text", title, md_table(list(head), [[md(cell) for cell in row] for row in cells]), step)
        if self._progress:
            self._progress.console.print(text_table(f"step {step}: {title}", head, cells[:5], wrap=True))

    def samples(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        path = self.folder / "samples.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as handle:
            for row in rows:
                handle.write(json_line({"step": step, **row}))

    def save_due(self, step: int) -> bool:
        every = self.config.save_every
        return bool(self._signal) or step == self.steps or bool(every and step % every == 0)

    def raise_if_stopped(self) -> None:
        if self._signal:
            raise Interrupted(f"interrupted at step {self.step}; go on with --resume", self._signal)

    def finish(self, summary: dict[str, Any]) -> None:
        for key, value in self.held_out[1].items():
            self._picture("add_scalar", key, value, self.held_out[0])
        best = self.config.keep_best.removeprefix("-")
        if self._logged and best not in {"auto", "none"} | self._logged and not self.config.quiet and "aborted" not in summary:
            print(
                f"note: --keep-best {best}: no step has this metric.{near_matches(best, sorted(self._logged))}", file=sys.stderr
            )
        with writing(self.folder / "summary.json"):
            known = {"wall_seconds": round(time.monotonic() - self.started, 1), "machine": machine()}
            write_json(self.folder / "summary.json", {**summary, **known})


def check_name(config: TrainConfig, verb: str) -> float:
    """Refuse a missing or taken name before anything is loaded; returns the time at which the work began."""
    folder = Path(config.out) / config.name
    if not config.name:
        raise UserError(f"punster {verb} needs a name for the run: -n NAME")
    if folder.exists() and not config.resume:
        raise UserError(f"run {folder} exists already: choose another name (-n), or go on with --resume")
    if config.resume and not (folder / "config.yaml").exists():
        raise UserError(f"--resume: there is no run {folder}")
    return time.monotonic()


def note(folder: Path, event: str, **values: Any) -> None:
    """One line of a folder's run.log: what happened when. It is never worth failing for."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **values}
    with suppress(OSError), (folder / "run.log").open("a", encoding="utf-8") as handle:
        handle.write(json_line(redact(line)))


def claim(folder: Path) -> FileLock:
    """Keep every other process out of a run folder until `release`; UserError naming the one that is in it."""
    path = folder / "run.lock"
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        try:
            holder = json.loads(path.read_text())
            who = f"process {holder['process']} on {holder['machine']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another process"
        raise UserError(f"{folder} is being written by {who}; wait for it, or choose another name") from None
    since = datetime.now(UTC).isoformat(timespec="seconds")
    with suppress(OSError):
        path.write_text(json.dumps({"process": os.getpid(), "machine": socket.gethostname(), "since": since}))
    return lock


def release(lock: FileLock) -> None:
    with suppress(OSError):
        os.unlink(lock.lock_file)  # while it is held: whoever opened it meanwhile finds it gone and tries again
    lock.release()


def crash_report(folder: Path, error: BaseException, **known: Any) -> None:
    """Write crash.json, where that can be written: what a bug report needs, without secrets. The error then names it."""
    report = {"time": datetime.now(UTC).isoformat(), "arguments": sys.argv[1:], "machine": machine(), "versions": versions(), **known,
              "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exception(error)}  # fmt: skip
    with suppress(OSError):
        write_json(folder / "crash.json", redact(report))
        error.add_note(str(folder / "crash.json"))


def changed_settings(folder: Path, config: TrainConfig) -> str:
    """How a run's saved settings differ from these, as text; what does not change the result is left aside."""
    saved = defaults_of(type(config)) | saved_settings(folder)  # options newer than the file: as by default
    ignored = set(WITHOUT_EFFECT)
    if saved["dtype"] == "auto":  # what it came to is in the checkpoint
        ignored.add("dtype")
    if getattr(config, "target_kl", None) is None:
        ignored.add("kl_horizon")
    # What came from Python, and what distill samples, is known by its hash alone.
    unnamed: tuple[Any, ...] = ([], FROM_PYTHON, [FROM_PYTHON])
    now = config_dict(config)
    changed = {k: v for k, v in now.items() if k not in ignored and saved[k] != v
               and not (k in ("data", "prompts") and v in unnamed)}  # fmt: skip
    return ", ".join(f"{key}: {saved[key]!r} -> {value!r}" for key, value in changed.items())


def saved_settings(folder: Path) -> dict[str, Any]:
    """What a run's config.yaml holds."""
    path = folder / "config.yaml"
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged and cannot be read ({' '.join(str(error).split())})") from None


def marked(config: Config, **given: Any) -> Config:
    """The settings of a run on rows, prompts or a reward that came from Python (not None): its config.yaml must say so."""
    own = [*(name for name in getattr(config, "reward", []) if name != FROM_PYTHON), FROM_PYTHON]
    named: dict[str, Any] = {"data": [FROM_PYTHON], "eval_data": [FROM_PYTHON], "prompts": FROM_PYTHON, "reward": own}
    return dataclasses.replace(config, **{name: named[name] for name, value in given.items() if value is not None})


def config_dict(config: Any) -> dict[str, Any]:
    """The settings as they are kept and compared: without secrets."""
    return {item.name: redact(getattr(config, item.name)) for item in dataclasses.fields(config)}
