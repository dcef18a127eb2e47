"""Workers that keep a model loaded and do one timed repetition on request: one JSON object a line over stdin and stdout.

Two sides of a comparison are two processes, so that each has its own libraries and its own peak memory; only one computes
at a time. This module needs the standard library alone, for it also runs in the peers' environments.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.keys import Side

ROOT = Path(__file__).resolve().parents[1]
BENCH = Path(os.environ.get("PUNSTER_BENCH") or ROOT / ".bench").resolve()  # runs remember where their model lies


class BenchError(RuntimeError):
    """A worker failed; the message ends with the end of its log."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> int:
    """Let peak_memory count anew (Linux) and return what is resident now; elsewhere 0, and peaks are of the whole process.

    Freed memory goes back first: punster keeps it (`model.kernels.keep_memory`), and what is kept would hide what is needed.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return peak_memory()


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of a piece of work and the memory it needed beyond what was resident before, in bytes."""
    before, began = reset_peak(), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - began, "memory": max(1e6, peak_memory() - before)}


class Line:
    """The worker's end. `step` is called whenever one unit of work is done, be it at the end of a loop or from a callback.

    The first `warmup` units are not timed. After them, and after every `every` further ones, it reports and waits to be asked.
    """

    def __init__(self, warmup: int, every: int):
        self.warmup, self.every, self.done = warmup, every, 0
        self.began, self.marks = 0.0, [0.0]
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print goes to the log

    def step(self, **measured: Any) -> None:
        """Report; `measured` is added to the report and may replace what the clock says."""
        now = time.perf_counter()
        self.done += 1
        if self.done < self.warmup:
            return
        if self.done > self.warmup:
            self.marks.append(now - self.began)
            if (self.done - self.warmup) % self.every:
                return
            self.say({"seconds": self.marks[-1], "marks": self.marks, "peak": peak_memory(), **measured})
        else:
            self.say({"ready": True})
        if not sys.stdin.readline():
            os._exit(0)  # in the middle of somebody's training loop: there is nothing to clean up
        self.marks, self.began = [], time.perf_counter()

    def say(self, message: Mapping[str, Any]) -> None:
        self.out.write(json.dumps(message) + "\n")


class Worker:
    """The bench's end of a worker process."""

    def __init__(self, python: Path | str, module: str, task: Mapping[str, Any], log: Path, path: str | None = None):
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "GOMP_SPINCOUNT")}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
        if path:
            environment["PYTHONPATH"] = path
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(python), "-m", module, json.dumps(task)], cwd=ROOT, env=environment, text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def ready(self) -> None:
        self._read()

    def repetition(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            code = self.process.wait()
            raise BenchError(f"a worker ended with exit code {code}; {self.log} ends with:\n{self.log.read_text()[-3000:]}")
        message: dict[str, Any] = json.loads(text)
        return message

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def environment_python(version: str) -> Path:
    return BENCH / f"trl-{version}" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def start(side: Side, log: str) -> Worker:
    task = {"task": side.task, "settings": dict(side.settings), "warmup": side.warmup, "every": side.every}
    if side.who == "punster":
        return Worker(sys.executable, "benchmarks.ours", task, BENCH / "logs" / f"{log}.log", path=str(ROOT / "src"))
    return Worker(environment_python(side.who), "benchmarks.peers", task, BENCH / "logs" / f"{log}.log")


def serve(tasks: Mapping[str, Callable[..., None]]) -> None:
    """A worker's main: the task named on its command line, as JSON, does its repetitions until nobody asks for more."""
    task = json.loads(sys.argv[1])
    tasks[task["task"]](Line(task["warmup"], task["every"]), **task["settings"])
