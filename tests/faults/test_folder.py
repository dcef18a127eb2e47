"""What the machine may do to a run: a full disk, refused permissions, no memory, a clock set back, signals, two at once."""

from __future__ import annotations

import errno
import json
import os
import pkgutil
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
import torch

from punster.cli import main
from punster.errors import Aborted, UserError
from punster.train import checkpoint
from punster.train.run import Interrupted, damage, newest_step, optimizer_step, within_memory
from punster.train.sft import sft

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


# ---- memory -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(
    stage: str, jobs: Any, reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first and the fourth backward pass fail when gradients are there already; the figures of the run stay what they are."""
    config, train = jobs(tmp_path, max_tokens=256)[stage]
    whole = train(replace(config, name="whole"))
    backward, calls = torch.Tensor.backward, [0]

    def scarce(self: torch.Tensor, *rest: Any, **options: Any) -> None:
        calls[0] += 1
        backward(self, *rest, **options)  # gradients are there already when it fails
        if calls[0] in (1, 4):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", scarce)
        run = train(replace(config, name="scarce"))
    said = capsys.readouterr().err
    assert (
        "out of memory: going on with micro-batches of 128 tokens instead of 256" in said
        and "of 64 tokens instead of 128" in said
    )
    state = json.loads((reader.final(run) / "state.json").read_text())
    assert state["numbers"]["max_tokens"] == 64
    events = [json.loads(line) for line in (run / "run.log").read_text().splitlines()]
    assert [event["max_tokens"] for event in events if event["event"] == "out_of_memory"] == [128, 64]
    ours, theirs = reader.lines(run), reader.lines(whole)
    for one, other in zip(ours, theirs, strict=True):
        for key in ("loss", "loss/policy_avg", "policy/loss", "grad_norm"):
            if key in other:
                assert one[key] == pytest.approx(other[key], rel=2e-3, abs=2e-5), (one["step"], key)
    assert ours[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=1e-5, abs=1e-7)
    # The smaller micro-batch is part of the checkpoint: a resumed run repeats the rest of this one.
    copy = reader.interrupted_copy(run, tmp_path / "copy", 3)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("name: scarce", "name: copy"))
    assert same(reader, train(replace(config, name="copy", resume=True)), run)


PLACES = {  # where memory runs out outside of a backward pass: stage, settings, function, and which of its calls fails
    "states of the texts": ("sft", {}, "punster.model.role.Trunk.compute", 1),
    "states of held-out texts": ("reward", {}, "punster.model.role.Trunk.compute", 2),
    "log-probs of the reference": ("dpo", {}, "punster.train.dpo.response_log_probs", 1),
    "sampled pairs": ("dpo", {"pairs": "sampled", "samples": 2}, "punster.rollout.sampler._generate", 1),
    "online pairs": ("dpo", {"online": True, "samples": 2}, "punster.rollout.sampler._generate", 1),
    "the reference of online pairs": ("dpo", {"online": True, "samples": 2}, "punster.train.dpo.response_log_probs", 2),
    "unpaired texts": ("dpo", {"loss_type": "kto"}, "punster.train.dpo.mismatched_kl", 1),
    "PPO's rollout": ("ppo", {}, "punster.rollout.sampler._generate", 1),
    "GRPO's rollout": ("grpo", {}, "punster.train.experience.compare_policies", 1),
    "the texts of the SFT term": ("ppo", {"sft_coef": 1.0}, "punster.model.role.Trunk.compute", 1),
    "the SFT term": ("ppo", {"sft_coef": 1.0, "critic_warmup": 0}, "punster.train.shaping.accumulate_nll", 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_elsewhere_is_gone_on_from(
    place: str, jobs: Any, reader: Any, tmp_path: Path, reward_run: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """After its work, one call finds no memory: with half the size the run goes on, and ends where it would have ended."""
    stage, settings, name, failing = PLACES[place]
    config, train = jobs(tmp_path, max_tokens=256)[stage]
    sampled = {"reward_model": reward_run, "prompt_limit": 8, "max_new_tokens": 5} if {"pairs", "online"} & set(settings) else {}
    config = replace(config, steps=2, **settings, **sampled)
    whole = train(replace(config, name="whole"))
    original, calls = import_from(name), [0]

    def scarce(*rest: Any, **options: Any) -> Any:
        result = original(*rest, **options)
        calls[0] += 1
        if calls[0] == failing:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(name, scarce)
        run = train(replace(config, name="scarce"))
    assert "out of memory: going on with micro-batches of 128 tokens instead of 256" in capsys.readouterr().err
    for one, other in zip(reader.lines(run), reader.lines(whole), strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)
    assert reader.lines(run, "samples.jsonl") == reader.lines(whole, "samples.jsonl") if stage != "reward" else True


def import_from(name: str) -> Any:
    module, attribute = name.rsplit(".", 1)
    return getattr(pkgutil.resolve_name(module), attribute)


def test_memory_that_never_suffices_is_one_message(jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, train = jobs(tmp_path)["sft"]
    with monkeypatch.context() as patch:
        patch.setattr("punster.train.sft.token_log_probs", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(Aborted, match="out of memory even with 64 tokens"):
            train(replace(config, name="run"))


def test_a_real_lack_of_memory(jobs: Any, child: Any, reader: Any, tmp_path: Path, make: Any, tiny_llama: Path) -> None:
    """An address space (RLIMIT_AS) in which the whole batch does not fit, but parts of it do."""
    from punster.train.checkpoint import State
    from punster.train.optim import make_optimizer
    from punster.train.run import load_run

    run = sft(make(jobs(tmp_path)["sft"][0].__class__, name="small", out=str(tmp_path), model=str(tiny_llama), steps=1))
    assert run is not None
    role, _ = load_run(run)
    adapter = role.adapters[0].trainable()
    optimizer, names = make_optimizer(replace(role, trained=(adapter.name,)), 1e-3)

    def attempt(tokens: int) -> float:
        """The gradient of a sum of squares over 2^14 rows, in micro-batches; a full one needs 2 GB."""
        total = 0.0
        for start in range(0, 16384, tokens):
            x = torch.arange(start, start + tokens, dtype=torch.float32)[:, None] / 16384 * torch.ones(1, 32768)
            loss = (x @ torch.ones(32768, 1) * next(adapter.parameters()).sum()).square().mean() * tokens / 16384
            loss.backward()
            total += float(loss.detach())
        return total

    def body() -> int:
        state = State(role, {"policy": (optimizer, names)}, {}, numbers={"max_tokens": 16384})
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 900 * 2**20, resource.RLIM_INFINITY))
        assert within_memory(state, attempt) > 0
        (tmp_path / "norm").write_text(f"{state.numbers['max_tokens']} {optimizer_step(optimizer, 0.0, 1e9)['grad_norm']!r}")
        return 0

    code, errors = child(body)
    assert code == 0, errors
    assert "out of memory: going on with micro-batches of 8192 tokens instead of 16384" in errors
    tokens, norm = (tmp_path / "norm").read_text().split()
    assert 64 <= int(tokens) <= 8192
    for start in range(0, 16384, 1024):
        x = torch.arange(start, start + 1024, dtype=torch.float32)[:, None] / 16384 * torch.ones(1, 32768)
        ((x @ torch.ones(32768, 1) * next(adapter.parameters()).sum()).square().mean() * 1024 / 16384).backward()
    assert float(norm) == pytest.approx(optimizer_step(optimizer, 0.0, 1e9)["grad_norm"], rel=1e-4)


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
        Run.finish = stopping  # type: ignore[method-assign]
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
    from punster.train.run import load_run

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
