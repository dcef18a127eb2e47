"""What all training loops share: the run folder, the log, checkpoints, optimizer steps, data order.

A run is a folder: config.yaml, metrics.jsonl, samples.jsonl, summary.json, checkpoints/step-N (safetensors and JSON,
written under a temporary name and renamed), events for TensorBoard. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from punster.config import TrainConfig
from punster.data.batch import epoch_order
from punster.errors import UserError, near_matches
from punster.model.role import Role
from punster.model.saved import load_role, save_role
from punster.model.tokenizer import Tokenizer


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; a checkpoint has been written."""


class Cursor:
    """Seeded passes over n rows: a fresh permutation each epoch, and a place in it that can be saved."""

    def __init__(self, rows: int, generator: torch.Generator):
        if rows < 1:
            raise UserError("there is no data to train on")
        self.rows, self.generator = rows, generator
        self.order: list[int] = []

    def next(self, count: int) -> list[int]:
        """The next `count` rows; never the same row twice in a pass."""
        taken: list[int] = []
        while len(taken) < count:
            if not self.order:
                self.order = epoch_order(self.rows, self.generator)
            need = count - len(taken)
            taken += self.order[:need]
            self.order = self.order[need:]
        return taken


def rows_used(rows: int, seed: int, count: int) -> set[int]:
    """The rows that a fresh cursor of this seed hands out in its first `count`: all of them, unless the run is short."""
    return set(Cursor(rows, seeded(seed, "data")).next(count))


class Run:
    """One run's folder, log and checkpoints."""

    def __init__(self, config: TrainConfig, verb: str, steps: int):
        self.config, self.verb, self.steps = config, verb, steps
        self.folder = Path(config.out) / config.name
        self.started = time.monotonic()
        self.step = 0
        self.held_out: tuple[int, dict[str, float]] = (0, {})  # step and figures of the last evaluation on held-out prompts
        self._stop = False
        self._progress: Any = None
        if self.folder.exists() and not config.resume:
            raise UserError(f"run {self.folder} exists already: choose another name (-n), or go on with --resume")
        if config.resume and not (self.folder / "config.yaml").exists():
            raise UserError(f"--resume: there is no run {self.folder}")
        self.checkpoints = self.folder / "checkpoints"
        if config.resume:
            self._same_config()
            self.step = newest_step(self.folder) or 0
            _cut_log(self.folder / "metrics.jsonl", self.step)
            _cut_log(self.folder / "samples.jsonl", self.step)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            write_text(self.folder / "config.yaml", f"# punster {verb}\n" + yaml.safe_dump(config_dict(config), sort_keys=False))
        self._events: Any = None

    def _same_config(self) -> None:
        if changed := changed_settings(self.folder, self.config):
            raise UserError(f"--resume with other settings than the run was started with ({changed})")

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

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._progress:
            self._progress.stop()
        if self._events:
            self._events.close()
        if kind is not None and issubclass(kind, UserError) and not self.config.resume and not steps_of(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)  # bad input found late leaves nothing half-written

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        print("\nfinishing this step and writing a checkpoint (once more to stop at once)", file=sys.stderr)

    def log(self, step: int, metrics: dict[str, float], note: str = "") -> None:
        """One line of metrics.jsonl; TensorBoard and the progress bar show the same."""
        line = {"step": step, "seconds": round(time.monotonic() - self.started, 3), **{k: float(v) for k, v in metrics.items()}}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        for key, value in line.items():
            if key != "step" and math.isfinite(value):
                self._tensorboard().add_scalar(key, value, step)
        if self._progress:
            self._progress.update(self._task, completed=step, note=note)

    def _tensorboard(self) -> Any:
        if self._events is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._events = SummaryWriter(str(self.folder / "events"))
        return self._events

    def show(self, step: int, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]], on_screen: int = 5) -> None:
        """A table of texts and numbers: all of it to TensorBoard, the first rows to the terminal. Texts stay plain text."""
        from punster.evaluate.card import md, md_table
        from punster.evaluate.folder import prompt_text, scrub
        from punster.evaluate.table import show, text_table

        cells = [[show(c) if c is None or isinstance(c, float) else scrub(prompt_text(c)) for c in row] for row in rows]
        self._tensorboard().add_text(title, md_table(list(head), [[md(cell) for cell in row] for row in cells]), step)
        if self._progress:
            self._progress.console.print(text_table(f"step {step}: {title}", head, cells[:on_screen], wrap=True))

    def samples(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as handle:
            for row in rows:
                handle.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")

    def save_due(self, step: int) -> bool:
        every = self.config.save_every
        return self._stop or step == self.steps or bool(every and step % every == 0)

    def raise_if_stopped(self) -> None:
        if self._stop:
            raise Interrupted(f"interrupted at step {self.step}; go on with --resume")

    def finish(self, summary: dict[str, Any]) -> None:
        for key, value in self.held_out[1].items():
            self._tensorboard().add_scalar(key, value, self.held_out[0])
        write_json(self.folder / "summary.json", {**summary, "wall_seconds": round(time.monotonic() - self.started, 1)})


def changed_settings(folder: Path, config: TrainConfig) -> str:
    """How a run's saved settings differ from these, as text; what does not change the result is left aside."""
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    ignored = {"resume", "quiet", "dry_run", "save_every", "keep", "eval_every", "out"}
    changed = {k: v for k, v in config_dict(config).items() if k not in ignored and saved.get(k, v) != v}
    return ", ".join(f"{key}: {saved[key]!r} -> {value!r}" for key, value in changed.items())


# ---- files --------------------------------------------------------------------------------------------------------
def config_dict(config: Any) -> dict[str, Any]:
    return {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, flush, rename: the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _cut_log(path: Path, step: int) -> None:
    """Drop lines after a step, so that a resumed run's log equals an uninterrupted one's."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            if line and json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue  # torn by a kill or a full disk: its step is done again
    write_text(path, "".join(line + "\n" for line in kept))


# ---- checkpoints --------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class State:
    """Everything a loop needs to go on exactly: roles, optimizers, generators, cursors, and plain numbers."""

    policy: Role
    optimizers: dict[str, tuple[torch.optim.Optimizer, list[str]]]
    generators: dict[str, torch.Generator]
    cursors: dict[str, Cursor] = dataclasses.field(default_factory=dict)
    others: dict[str, Role] = dataclasses.field(default_factory=dict)  # roles that are not the result, such as the critic
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Named tensors, and what JSON can hold. The tensors may share storage with the live ones."""
        tensors: dict[str, Tensor] = {}
        for role_name, role in {"policy": self.policy, **self.others}.items():
            for name, tensor in role.named_parameters():
                tensors[f"{role_name}|{name}"] = tensor.detach().cpu().contiguous()
        for name, (optimizer, names) in self.optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for label, parameter in zip(names, parameters, strict=True):
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer|{name}|{label}|{key}"] = value.detach().cpu().contiguous()
        for name, generator in self.generators.items():
            tensors[f"generator|{name}"] = generator.get_state()
        return tensors, {"cursors": {n: list(c.order) for n, c in self.cursors.items()}, "numbers": dict(self.numbers)}

    @torch.no_grad()
    def unpack(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Bring everything back to a packed state."""
        for role_name, role in {"policy": self.policy, **self.others}.items():
            for name, tensor in role.named_parameters():
                tensor.copy_(tensors[f"{role_name}|{name}"])
        for name, (optimizer, names) in self.optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for label, parameter in zip(names, parameters, strict=True):
                prefix = f"optimizer|{name}|{label}|"
                found = {k.removeprefix(prefix): t.clone() for k, t in tensors.items() if k.startswith(prefix)}
                optimizer.state.pop(parameter, None)
                if found:
                    optimizer.state[parameter] = {k: t.to(parameter.device) if k != "step" else t for k, t in found.items()}
        for name, generator in self.generators.items():
            generator.set_state(tensors[f"generator|{name}"])
        for name, cursor in self.cursors.items():
            cursor.order = numbers["cursors"][name]
        self.numbers.update(numbers["numbers"])


def save_checkpoint(run: Run, step: int, state: State, tokenizer: Tokenizer, result: Role | None = None) -> None:
    """checkpoints/step-N: the result (the policy, unless another form of it is given), state.safetensors, state.json, a manifest."""
    target = run.checkpoints / f"step-{step}"
    temporary = run.checkpoints / f".step-{step}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_role(temporary, result or state.policy, tokenizer)
    tensors, numbers = state.pack()
    save_file(tensors, temporary / "state.safetensors")
    write_json(temporary / "state.json", {"step": step, **numbers})
    manifest = {str(p.relative_to(temporary)): _sha256(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
    write_json(temporary / "manifest.json", manifest)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    run.step = step
    for old in sorted(steps_of(run.folder))[: -run.config.keep]:
        shutil.rmtree(run.checkpoints / f"step-{old}", ignore_errors=True)


def restore(run: Run, state: State) -> None:
    """Bring roles, optimizers, generators, cursors and numbers to the newest valid checkpoint of a resumed run."""
    if run.step == 0:
        return
    folder = run.checkpoints / f"step-{run.step}"
    state.unpack(load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text()))


def steps_of(folder: Path) -> list[int]:
    found = (folder / "checkpoints").glob("step-*")
    return [int(p.name.removeprefix("step-")) for p in found if p.name.removeprefix("step-").isdigit()]


def newest_step(folder: Path) -> int | None:
    """The newest checkpoint whose files match its manifest; damaged ones are named and skipped."""
    for step in sorted(steps_of(folder), reverse=True):
        place = folder / "checkpoints" / f"step-{step}"
        if problem := damage(place):
            print(f"{place}: {problem}; trying an older checkpoint", file=sys.stderr)
            continue
        return step
    return None


def damage(place: Path) -> str:
    """What is wrong with a checkpoint, or an empty string."""
    try:
        manifest = json.loads((place / "manifest.json").read_text())
    except (OSError, ValueError):
        return "the manifest is missing or damaged"
    for name, digest in manifest.items():
        path = place / name
        if not path.is_file() or _sha256(path) != digest:
            return f"{name} is missing or damaged"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def load_run(path: str | Path, **options: Any) -> Any:
    """The trained role of a run folder (see `punster.model.saved.load_role`), from its newest valid checkpoint."""
    folder = Path(path)
    if not folder.is_dir():
        known = [str(p) for p in sorted(folder.parent.glob("*")) if p.is_dir()] if folder.parent.is_dir() else []
        raise UserError(f"{path}: no such run.{near_matches(str(path), known)}")
    step = newest_step(folder)
    if step is None:
        raise UserError(f"{path}: this folder holds no usable checkpoint of a run")
    return load_role(folder / "checkpoints" / f"step-{step}", **options)


# ---- optimizer steps ----------------------------------------------------------------------------------------------
def make_optimizer(role: Role, lr: float, weight_decay: float = 0.0) -> tuple[torch.optim.Optimizer, list[str]]:
    """AdamW with eps 1e-5 (Huang et al. 2022, detail 3) over a role's trainable parameters, and their names."""
    names, tensors = zip(*role.named_parameters(), strict=True)
    return torch.optim.AdamW(list(tensors), lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=weight_decay), list(names)


def learning_rate(peak: float, step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then linear to 0; `step` counts from 0."""
    rising = max(1, round(warmup * steps)) if warmup > 0 else 0
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (steps - step) / max(1, steps - rising)


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float, max_norm: float) -> dict[str, float]:
    """Clip the accumulated gradients, step, clear. A non-finite gradient is skipped and counted, never applied."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    skipped = not math.isfinite(norm)
    if not skipped:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm if not skipped else 0.0, "skipped_steps": float(skipped), "lr": lr}


def seeded(seed: int, stream: str) -> torch.Generator:
    """The named generator of a run: its seed mixed with the stream's name."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def total_steps(config: TrainConfig, rows: int, epochs: float) -> int:
    return config.steps or max(1, math.ceil(rows * epochs / config.batch_size))
