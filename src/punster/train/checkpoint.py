"""Checkpoints: all that a loop needs to go on bit for bit, whole or not there at all. Nothing is pickled.

checkpoints/step-N holds the result (a role, see `punster.model.saved`), state.safetensors, state.json, context.json and
a manifest of hashes. Everything is written under a temporary name, flushed to the disk and renamed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from punster.disk import flush, sha256_of, write_json
from punster.errors import Aborted, UserError, near_matches
from punster.model.kernels import compiled, in_halves
from punster.model.role import Role
from punster.model.saved import load_role, save_role
from punster.model.tokenizer import Tokenizer
from punster.train.optim import TOKENS, Cursor

if TYPE_CHECKING:
    from punster.train.run import Run

LOGS = ("metrics.jsonl", "samples.jsonl")
# What tells the best checkpoint, by verb: keys of metrics.jsonl, the first that was logged, with "-" where lower is better.
BEST = {
    "sft": ("-eval_loss",), "distill": ("-eval_loss",), "reward": ("eval_accuracy",), "ppo": ("eval/score",), "grpo": ("eval/score",),
    "dpo": ("-eval_loss", "-loss"),
}  # fmt: skip


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """A full disk or a refused permission becomes one message that says what is still there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Aborted(
            f"{what} could not be written ({reason}). What was saved before is whole: make room there, then go on with --resume"
        ) from error


@dataclasses.dataclass
class State:
    """Everything a loop needs to go on exactly: roles, optimizers, generators, cursors, and plain numbers."""

    policy: Role
    optimizers: dict[str, torch.optim.Optimizer]
    generators: dict[str, torch.Generator]
    cursors: dict[str, Cursor] = dataclasses.field(default_factory=dict)
    others: dict[str, Role] = dataclasses.field(default_factory=dict)  # roles that are not the result, such as the critic
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Sequence[Role | None] = ()  # further roles that are read and not trained, such as the reward model
    given: Sequence[Any] = ()  # the tokenised data
    judged: Sequence[Any] = ()  # what people said of them: scores, labels, weights
    drawn_from: Role | None = None  # a role whose samples are learned from, or normalised on
    described: dict[str, Any] = dataclasses.field(default_factory=dict)  # what role.json says of the policy as it is
    keys: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # hashes of what is not trained, set by `restore`
    note: Callable[..., None] = lambda event, **values: None  # set by `restore`: one line of the run's log

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Named tensors, and what JSON can hold. The tensors may share storage with the live ones."""
        tensors: dict[str, Tensor] = {}
        for role_name, role in {"policy": self.policy, **self.others}.items():
            for name, tensor in role.named_parameters():
                tensors[f"{role_name}|{name}"] = tensor.detach().cpu().contiguous()
        for name, optimizer in self.optimizers.items():
            [group] = optimizer.param_groups
            for label, parameter in zip(group["param_names"], group["params"], strict=True):
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer|{name}|{label}|{key}"] = value.detach().cpu().contiguous()
        for name, generator in self.generators.items():
            tensors[f"generator|{name}"] = generator.get_state()
        return tensors, {
            "cursors": {n: list(c.order) for n, c in self.cursors.items()}, "rows": {n: c.rows for n, c in self.cursors.items()},
            "numbers": dict(self.numbers),
        }  # fmt: skip

    def fingerprints(self) -> dict[str, list[str]]:
        """Hashes of what the run rests on and does not change: other adapters, another reward model or other data make another run."""
        adapters, weights = fixed_parts([self.policy, *self.others.values(), *self.fixed])
        drawn = fixed_parts([self.drawn_from])
        judges = [member for role in self.fixed if role is not None for member in (role, *role.others)]
        return {"adapters": adapters, "weights": weights, "drawn_from": [*drawn[0], *drawn[1]],
                "reading": [repr((m.depth, m.pooling, m.normalisation, m.combine, m.caution)) for m in judges],
                "data": [hashlib.sha256(repr(self.given).encode()).hexdigest()],
                "judged": [hashlib.sha256(repr(self.judged).encode()).hexdigest()]}  # fmt: skip

    @torch.no_grad()
    def unpack(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Bring everything back to a packed state."""
        for role_name, role in {"policy": self.policy, **self.others}.items():
            for name, tensor in role.named_parameters():
                tensor.copy_(tensors[f"{role_name}|{name}"])
        for name, optimizer in self.optimizers.items():
            [group] = optimizer.param_groups
            for label, parameter in zip(group["param_names"], group["params"], strict=True):
                prefix = f"optimizer|{name}|{label}|"
                found = {k.removeprefix(prefix): t.clone() for k, t in tensors.items() if k.startswith(prefix)}
                optimizer.state.pop(parameter, None)
                if found:
                    optimizer.state[parameter] = {k: t.to(parameter.device) for k, t in found.items()}
        for name, generator in self.generators.items():
            generator.set_state(tensors[f"generator|{name}"])
        for name, cursor in self.cursors.items():
            cursor.order = numbers["cursors"][name]
        self.numbers.update(numbers["numbers"])


def fixed_parts(given: Sequence[Role | None]) -> tuple[list[str], list[str]]:
    """Hashes of the adapters of these roles, and of their own weights and heads, as far as they are not trained."""
    members = [member for role in given if role is not None for member in (role, *role.others)]
    adapters = [a for member in members for a in member.adapters if a.name not in member.trained]
    weights = [member.model.weights[name] for member in members for name in sorted(member.model.own)]
    weights += [t for member in members if member.head is not None for _, t in member.head.named_parameters()]
    return [a.fingerprint() for a in adapters], [digest(tensor) for tensor in weights if not tensor.requires_grad]


def save_checkpoint(
    run: Run, step: int, state: State, tokenizer: Tokenizer, result: Role | None = None, place: dict[str, Any] | None = None
) -> None:
    """Write checkpoints/step-N, and remove older ones as --keep says.

    The result is the policy, unless another form of it is given; the place in the logs is their end, unless the state is older.
    """
    target, temporary = run.checkpoints / f"step-{step}", run.checkpoints / f".step-{step}.part"
    with writing(target):
        for log in LOGS:  # lines up to here must not be lost where the checkpoint is not
            if (run.folder / log).exists():
                flush(run.folder / log)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            save_role(temporary, result or state.policy, tokenizer, None if result else state.described)
            tensors, numbers = state.pack()
            save_file(tensors, temporary / "state.safetensors")
            write_json(temporary / "state.json", {"step": step, **numbers, "keys": state.keys})
            write_json(temporary / "context.json", {**context(), **(place or run.place())})
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            write_json(temporary / "manifest.json", {str(p.relative_to(temporary)): sha256_of(p) for p in files})
            for path in [*temporary.rglob("*"), temporary]:
                flush(path)
            if target.exists():  # damaged: a run goes on from its newest whole one
                remove(target)
            os.replace(temporary, target)
            flush(run.checkpoints)
        except (OSError, SafetensorError):
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    run.step = step
    run.note("checkpoint", step=step)
    # A damaged one of a later step does not count: it would push out a good one.
    kept = sorted(s for s in steps_of(run.folder) if s <= step)
    metrics = BEST.get(run.verb, ()) if run.config.keep_best == "auto" else (run.config.keep_best,)
    metrics = metrics if run.config.eval_every else metrics[-1:]  # a held-out loss of the last step alone chooses nothing
    limit = getattr(run.config, "max_kl", math.inf)
    best = next((found for metric in metrics if (found := best_step(run.folder, metric, kept, limit)) is not None), None)
    for old in kept[: -run.config.keep]:
        if old != best:
            remove(run.checkpoints / f"step-{old}")


def end_step(
    run: Run, step: int, metrics: dict[str, float], state: State, tokenizer: Tokenizer,
    callback: Callable[[int, dict[str, float]], None] | None = None, result: Role | None = None,
) -> None:  # fmt: skip
    """What ends a step: the caller's callback, a checkpoint where one is due, and the run where it was told to stop."""
    if callback is not None:
        callback(step, metrics)
    if run.save_due(step):
        save_checkpoint(run, step, state, tokenizer, result)
        run.raise_if_stopped()


def remove(place: Path) -> None:
    """A checkpoint goes as a whole, whatever happens while its files are deleted."""
    aside = place.with_name(f".{place.name}.old.part")
    with suppress(OSError):  # one too many is no reason to stop
        os.replace(place, aside)
        shutil.rmtree(aside)


def context() -> dict[str, Any]:
    """What may change the last bits of numbers between two machines or installations."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(),
            "kernels": compiled() is not None, "halves": in_halves()}  # fmt: skip


def log_sizes(folder: Path) -> dict[str, int]:
    return {log: (folder / log).stat().st_size if (folder / log).exists() else 0 for log in LOGS}


def context_at(folder: Path, step: int) -> dict[str, Any]:
    """A checkpoint's context: its place in the logs, the last evaluation before it, the seconds spent; nothing at step 0."""
    return dict(json.loads((folder / "checkpoints" / f"step-{step}" / "context.json").read_text())) if step else {}


def cut_logs(folder: Path, step: int) -> None:
    """Cut the logs back to what they were at a checkpoint, so that a resumed run's equal an uninterrupted one's."""
    sizes = context_at(folder, step).get("logs", {})
    for log, now in log_sizes(folder).items():
        if now > sizes.get(log, 0):
            os.truncate(folder / log, sizes.get(log, 0))
    clear_partial(folder)
    clear_partial(folder / "checkpoints")


def clear_partial(folder: Path) -> None:
    """Remove what a process that was killed had begun to write."""
    for leftover in folder.glob(".*.part"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def restore(run: Run, state: State) -> None:
    """Bring roles, optimizers, generators, cursors and numbers to the newest valid checkpoint of a resumed run."""
    state.note, state.keys = run.note, state.fingerprints()
    most = run.config.max_tokens
    state.numbers |= dict.fromkeys((*TOKENS, "asked_tokens"), most)
    if run.step == 0:
        run.rewind()
        return
    folder = run.checkpoints / f"step-{run.step}"
    base = state.policy.model.trunk_of or state.policy.model
    described = json.loads((folder / "role.json").read_text())
    then_type, now_type = described["dtype"], str(state.policy.model.dtype).removeprefix("torch.")
    if then_type != now_type:
        wanted = {"bfloat16": "bf16", "float32": "fp32"}.get(then_type, then_type)
        raise UserError(
            f"--resume: the run was started with {then_type} weights, and here they are {now_type}: add --dtype {wanted}"
        )
    if (trained_on := described["base_sha256"]) and trained_on != base.fingerprint():
        raise UserError(
            f"--resume: the weights of {base.name} are not those that the run was started with (their SHA-256 differs)"
        )
    then = context_at(run.folder, run.step)
    changed = [f"{key} {then[key]} -> {now}" for key, now in context().items() if then.get(key, now) != now]
    numbers = json.loads((folder / "state.json").read_text())
    found = numbers.get("keys", state.keys)
    # What an older version did not know of is taken for the same.
    other = {kind for kind, now in state.keys.items() if found.get(kind, now) != now}
    rows = {name: cursor.rows for name, cursor in state.cursors.items()}
    # Data that was drawn or chosen by a model may differ where numbers do; but their places must mean something.
    differs = {
        "SFT run or the reward model": bool(other - {"data", "judged"}),
        "data": numbers.get("rows", rows) != rows or ("data" in other and not changed),
        "data (its scores, labels, margins, ratings or weights)": "judged" in other and not changed,
    }
    if what := next((name for name, does in differs.items() if does), ""):
        raise UserError(f"--resume: the {what} is not what the run was started with, so it cannot go on as the same run")
    try:
        state.unpack(load_file(folder / "state.safetensors"), numbers)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: written by another version of punster; it cannot be resumed exactly ({error})") from None
    run.rewind()
    asked = numbers["numbers"].get("asked_tokens", most)  # fewer are left where the process that wrote it ran out of memory
    state.numbers |= {key: min(state.numbers[key], most) if state.numbers[key] < asked else most for key in TOKENS}
    state.numbers["asked_tokens"] = most
    if changed and not run.config.quiet:
        print(f"note: numbers may differ in their last bits from an uninterrupted run ({', '.join(changed)})", file=sys.stderr)
    run.note("resumed", step=run.step, changed=changed)


# ---- which one ----------------------------------------------------------------------------------------------------
def steps_of(folder: Path) -> list[int]:
    found = (folder / "checkpoints").glob("step-*")
    return [int(p.name.removeprefix("step-")) for p in found if p.name.removeprefix("step-").isdigit()]


def best_step(folder: Path, metric: str, saved: Sequence[int], max_kl: float = math.inf) -> int | None:
    """That of these steps whose metric is best ("-NAME": lowest), its exact KL within bounds; None where none has it."""
    values = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError, AttributeError):
            row = json.loads(line)
            value = float(row.get(metric.removeprefix("-"), math.nan))
            if row["step"] in saved and math.isfinite(value) and row.get("eval/exact_kl", 0.0) <= max_kl:
                values[row["step"]] = -value if metric.startswith("-") else value
    return max(values, key=lambda step: (values[step], step), default=None)


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
        manifest = dict(json.loads((place / "manifest.json").read_text()))
    except (OSError, ValueError, TypeError):
        return "the manifest is missing or damaged"
    for name, expected in manifest.items():
        try:
            whole = sha256_of(place / name) == expected
        except (OSError, ValueError):
            whole = False
        if not whole:
            return f"{name} is missing or damaged"
    return "" if {"role.json", "state.safetensors", "state.json"} <= set(manifest) else "the manifest is incomplete"


def checkpoint_of(path: str | Path) -> Path:
    """The newest valid checkpoint of a run folder; a checkpoint's own folder is taken as it is, if it is whole."""
    folder = Path(path)
    if not folder.is_dir():
        known = [str(p) for p in sorted(folder.parent.glob("*")) if p.is_dir()] if folder.parent.is_dir() else []
        raise UserError(f"{path}: no such run.{near_matches(str(path), known)}")
    if (folder / "manifest.json").exists():
        if problem := damage(folder):
            raise UserError(f"{path}: this checkpoint is damaged: {problem}")
        return folder
    step = newest_step(folder)
    if step is None:
        raise UserError(f"{path}: this folder holds no usable checkpoint of a run")
    return folder / "checkpoints" / f"step-{step}"


def load_run(path: str | Path, **options: Any) -> Any:
    """The trained role of a run folder (see `punster.model.saved.load_role`), from its newest valid checkpoint, or of a checkpoint."""
    return load_role(checkpoint_of(path), **options)
