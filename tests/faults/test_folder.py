"""What the machine may do to a run: a full disk, refused permissions, a clock set back, signals, two at once."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from punster.cli import main
from punster.errors import Aborted, UserError
from punster.train import checkpoint
from punster.train.checkpoint import damage, newest_step
from punster.train.run import Interrupted

STAGES = ("sft", "reward", "ppo", "grpo", "dpo")
NOBODY = 65534


def arguments(config: Any, *more: str) -> list[str]:
    return ["sft", "-n", config.name, "--out", config.out, "--model", config.model, "-b", "5", "--seed", "5", "--steps", "4",
            "--lora-r", "4", "--lora-alpha", "8", "--device", "cpu", "--dtype", "fp32", "--save-every", "1", "--quiet", *more]  # fmt: skip


def same(reader: Any, run: Path, other: Path) -> bool:
    return reader.tensor_bytes(run) == reader.tensor_bytes(other) and reader.lines(run) == reader.lines(other)


# ---- disk and permissions -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_message_and_the_run_goes_on_later(
    stage: str, share: float, jobs: Any, child: Any, reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file may grow beyond a share of the largest one (RLIMIT_FSIZE), from the second checkpoint on."""
    config, train = jobs(tmp_path)[stage]
    whole = train(replace(config, name="whole"))
    largest = max(path.stat().st_size for path in whole.rglob("*.safetensors"))
    save = checkpoint.save_file

    def full(tensors: Any, path: Path, **options: Any) -> None:
        if ".step-2" in str(path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), resource.RLIM_INFINITY))
        save(tensors, path, **options)

    def body() -> int:
        checkpoint.save_file = full
        with pytest.raises(Aborted, match=r"could not be written.*--resume"):
            train(replace(config, name="cut"))
        return 7

    code, errors = child(body)
    assert code == 7, errors
    cut = tmp_path / "cut"
    assert newest_step(cut) == 1 and damage(cut / "checkpoints" / "step-1") == ""
    assert not list(cut.glob("checkpoints/.step*"))
    assert same(reader, train(replace(config, name="cut", resume=True)), whole)


def test_a_full_disk_on_the_command_line_exits_1_without_a_traceback(jobs: Any, child: Any, tmp_path: Path) -> None:
    config = replace(jobs(tmp_path)["sft"][0], name="run")

    def body() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return main(arguments(config))

    code, errors = child(body)
    assert code == 1 and "could not be written" in errors and "File too large" in errors
    assert "Traceback" not in errors and len(errors.strip().splitlines()) == 1


def test_disk_full_in_the_logs(jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, train = jobs(tmp_path)["sft"]
    whole_open = Path.open

    def refuse(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if self.name == "metrics.jsonl" and mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole_open(self, mode, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(Aborted, match=r"metrics.jsonl could not be written \(No space left on device\)"):
            train(replace(config, name="run"))
    assert json.loads((tmp_path / "run" / "crash.json").read_text())["error"].startswith("Aborted")
    assert train(replace(config, name="run", resume=True)) == tmp_path / "run"


def as_nobody(body: Callable[[], int]) -> Callable[[], int]:
    def run() -> int:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return body()

    return run


def readable(folder: Path) -> None:
    """Root's temporary folders are closed to others: open the way down, and what is inside."""
    for parent in [folder, *folder.parents]:
        if parent.owner() == folder.owner() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))


def test_folders_that_may_not_be_written(jobs: Any, child: Any, tmp_path: Path) -> None:
    """As another user: a new run in a closed folder, going on in a closed run, a closed cache."""
    config, train = jobs(tmp_path / "runs")["sft"]
    run = train(replace(config, name="run", steps=2))
    readable(Path(config.model))
    readable(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for place in (run.parent, run, run / "checkpoints"):
        place.chmod(0o555)
    config = replace(config, name="new")
    for name, more in (("new", []), ("run", ["--resume", "--steps", "2"])):
        code, errors = child(as_nobody(lambda name=name, more=more: main(arguments(replace(config, name=name), *more))))
        assert code == 2 and "Permission denied" in errors and str(run.parent) in errors, errors
        assert "Traceback" not in errors and len(errors.strip().splitlines()) == 1, errors
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    closed = tmp_path / "data.jsonl"
    closed.write_text('{"prompt": "a", "completion": "b"}\n')
    closed.chmod(0)
    open_out = tmp_path / "open"
    open_out.mkdir()
    open_out.chmod(0o777)
    code, errors = child(as_nobody(lambda: main(arguments(replace(config, out=str(open_out)), "--data", str(closed)))))
    assert code == 2 and "data.jsonl" in errors and "Permission denied" in errors and "Traceback" not in errors
    assert not list(open_out.iterdir())


# ---- signals ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("times", [1, 2])
def test_signals_on_the_command_line(
    number: int, code: int, times: int, jobs: Any, child: Any, reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: the step is finished and written. Twice: it stops at once, and the last checkpoint stands."""
    from punster.train import sft as module

    config, train = jobs(tmp_path)["sft"]
    whole = train(replace(config, name="whole"))
    config = replace(config, name="run")
    step_of = module.accumulate_nll
    steps = [0]

    def stopping(*rest: Any) -> Any:
        steps[0] += 1
        if steps[0] == 3:
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0)
        return step_of(*rest)

    def body() -> int:
        module.accumulate_nll = stopping
        return main(arguments(config, "--save-every", "2", "--eval-every", "2"))

    exit_code, errors = child(body)
    run = tmp_path / "run"
    assert exit_code == code, errors
    assert "Traceback" not in errors and "finishing this step" in errors
    assert newest_step(run) == (3 if times == 1 else 2) and not (run / "summary.json").exists()
    assert ("interrupted at step 3" if times == 1 else "stopped at once; the last checkpoint is that of step 2") in errors
    assert not (run / "crash.json").exists() and not (run / "run.lock").exists()
    assert main([*arguments(config, "--eval-every", "2"), "--resume"]) == 0
    assert same(reader, run, whole)


def test_a_signal_after_the_last_step_is_not_forgotten(
    jobs: Any, child: Any, reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is finished, and what would come after it (a pipeline's next stage) does not begin."""
    from punster.train.run import Run

    config, _ = jobs(tmp_path)["sft"]
    finish = Run.finish

    def stopping(self: Run, summary: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        finish(self, summary)

    def body() -> int:
        monkeypatch.setattr(Run, "finish", stopping)
        return main(arguments(replace(config, name="run")))

    code, errors = child(body)
    assert code == 143 and "interrupted" in errors and "is finished" in errors, errors
    assert reader.summary(tmp_path / "run")["steps"] == 4 and not (tmp_path / "run" / "run.lock").exists()


# ---- clock, locks -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", STAGES)
def test_a_clock_that_is_set_back(stage: str, jobs: Any, reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wall time runs backwards by a day with every look at it, over an interruption too."""
    config, train = jobs(tmp_path)[stage]
    whole = train(replace(config, name="whole"))
    now = [2e9]

    def backwards() -> float:
        now[0] -= 86_400.0
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    run = train(replace(config, name="back"))
    assert same(reader, run, whole) and reader.summary(run)["wall_seconds"] >= 0
    for number, place in enumerate(sorted((run / "checkpoints").glob("step-*"))):
        os.utime(place, (1e9 - number * 1e6, 1e9 - number * 1e6))  # the newest looks oldest
    copy = reader.interrupted_copy(run, tmp_path / "copy", 3)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("name: back", "name: copy"))
    assert newest_step(copy) == 3
    assert same(reader, train(replace(config, name="copy", resume=True)), whole)


def test_two_runs_on_one_folder(jobs: Any, child: Any, tmp_path: Path) -> None:
    """The second is refused, with the first one's process named; the first is not disturbed."""
    from punster.train.run import claim, release

    config, train = jobs(tmp_path)["sft"]
    run = train(replace(config, name="run"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    lock = claim(run)
    code, errors = child(lambda: main([*arguments(replace(config, name="run"), "--eval-every", "2"), "--resume"]))
    assert code == 2 and f"is being written by process {os.getpid()} on" in errors and "since 20" in errors, errors
    release(lock)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    train(replace(config, name="run", resume=True))  # free again

    # A holder that was killed leaves no lock behind, though its file stays.
    def dies() -> None:
        claim(run)
        os.kill(os.getpid(), signal.SIGKILL)

    assert child(dies)[0] == -signal.SIGKILL
    assert (run / "run.lock").exists()
    train(replace(config, name="run", resume=True))
    assert not (run / "run.lock").exists()


def test_two_runs_that_take_one_name(jobs: Any, child: Any, tmp_path: Path) -> None:
    """Eight at the same moment: one makes the run, seven are refused, nothing is mixed."""
    config, train = jobs(tmp_path)["sft"]
    gate = tmp_path / "gate"

    def body() -> int:
        while not gate.exists():
            time.sleep(0.001)
        try:
            train(replace(config, name="run"))
        except UserError as error:
            return 3 if "exists already" in str(error) or "being written" in str(error) else 9
        return 0

    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            code = 9
            try:
                code = body()
            finally:
                os._exit(code)
        children.append(pid)
    gate.touch()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert sorted(codes) == [0, 3, 3, 3, 3, 3, 3, 3]
    assert newest_step(tmp_path / "run") == 4 and not list(tmp_path.glob(".run*"))


def test_interrupted_in_a_thread_is_left_to_the_caller(jobs: Any, tmp_path: Path) -> None:
    config, train = jobs(tmp_path)["sft"]
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(train(replace(config, name="run"))))
    thread.start()
    thread.join()
    assert done == [tmp_path / "run"] and issubclass(Interrupted, KeyboardInterrupt)


# ---- checkpoints that are kept ------------------------------------------------------------------------------------
def test_the_best_checkpoint_is_kept(jobs: Any, tmp_path: Path, reader: Any) -> None:
    from punster.train.checkpoint import load_run

    config, train = jobs(tmp_path, save_every=1, keep=1)["sft"]
    run = train(replace(config, name="run", steps=5, keep_best="lr"))
    rates = reader.values(run, "lr")
    best = max(range(1, 6), key=lambda step: (rates[step - 1], step))  # of equals the later one
    assert best < 4
    assert sorted(place.name for place in (run / "checkpoints").iterdir()) == [f"step-{best}", "step-5"]
    role, _ = load_run(run / "checkpoints" / f"step-{best}")
    assert role.adapters[0].name == "sft"
    run = train(replace(config, name="auto", steps=5, eval_every=1, lr=0.05))
    losses = reader.values(run, "eval_loss")
    assert {place.name for place in (run / "checkpoints").iterdir()} == {f"step-{losses.index(min(losses)) + 1}", "step-5"}
    run = train(replace(config, name="none", steps=5, keep_best="none"))
    assert [place.name for place in (run / "checkpoints").iterdir()] == ["step-5"]


def test_a_damaged_later_checkpoint_does_not_push_out_a_good_one(jobs: Any, tmp_path: Path, reader: Any) -> None:
    config, train = jobs(tmp_path, keep=1)["sft"]
    whole = train(replace(config, name="whole"))
    run = tmp_path / "run"
    train(replace(config, name="run", keep=9))
    for step in (3, 4):
        (run / "checkpoints" / f"step-{step}" / "manifest.json").write_text("{")
    shutil.rmtree(run / "checkpoints" / "step-1")
    (run / "summary.json").unlink()
    assert newest_step(run) == 2
    assert same(reader, train(replace(config, name="run", resume=True)), whole)
