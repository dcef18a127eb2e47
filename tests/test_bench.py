"""The benchmark's arithmetic on synthetic timings: ratios, merging, tables, slopes, FLOPs. No peer is installed here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import results, scaling
from benchmarks.__main__ import PAGE, chosen_keys, measure
from benchmarks.flops import Shape, rollout_flops
from benchmarks.forced import without_eos
from benchmarks.keys import EPOCHS, KEYS, NEW, STEPS, points, side
from benchmarks.line import BenchError, Worker
from punster.rollout.sampler import Decoding, choose


def test_ratios_are_paired_and_more_is_better_for_us() -> None:
    ours = [{"seconds": s} for s in (1.0, 2.0, 4.0)]
    theirs = [{"seconds": s} for s in (3.0, 10.0, 8.0)]
    found = results.compare("seconds", ours, theirs, "s")
    assert found == {"ratio": 3.0, "low": 2.0, "high": 5.0, "ours": 2.0, "theirs": 8.0, "unit": "s"}
    rates = results.compare("rate", [{"seconds": 2.0, "tokens": 100}], [{"seconds": 4.0, "tokens": 50}], "tokens/s")
    assert (rates["ratio"], rates["ours"], rates["theirs"]) == (4.0, 50.0, 12.5)
    share = results.compare("share", [{"seconds": 2.0, "flops": 4e11}], [{"seconds": 9.0, "rate": 4e11}], "GFLOP/s")
    assert (share["ratio"], share["ours"], share["theirs"]) == (0.5, 200.0, 400.0)
    memory = results.compare("peak", [{"seconds": 1.0, "peak": 2e9}], [{"seconds": 1.0, "peak": 8e9}], "GB")
    assert (memory["ratio"], memory["theirs"]) == (4.0, 8.0)
    marks = [{"seconds": 9.0, "marks": [float(n) for n in range(1, 13)]}]
    assert results.compare("epoch", marks, marks, "s")["ours"] == STEPS


def test_merging_keeps_other_keys_and_replaces_measured_ones(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "latest.json"
    results.merge(path, {"a": {"ratio": 1}, "measured": {"a": {"when": "then"}}})
    held = results.merge(path, {"b": {"ratio": 2}, "a": {"ratio": 3}, "measured": {"b": {"when": "now"}}})
    assert held == {"a": {"ratio": 3}, "b": {"ratio": 2}, "measured": {"a": {"when": "then"}, "b": {"when": "now"}}}
    assert json.loads(path.read_text()) == held and [p.name for p in path.parent.iterdir()] == ["latest.json"]


def test_page_tables_come_from_the_results_and_can_be_written_twice(tmp_path: Path) -> None:
    entry = {"ratio": 2.25, "low": 2.0, "high": 2.5, "ours": 2.0, "theirs": 4.5, "unit": "s"}
    growth = {"sizes": [1.0, 2.0], "seconds": [3.0, 6.0], "memory": [1.0, 2.0], "time_slope": 1.0, "memory_slope": 1.0}
    top = {"eval_score": 0.5, "score": 0.25, "exact_kl": 3.0, "steps": 7, "seconds": 300.0}
    held = {
        "sft_step": entry,
        "dpo_step": {**entry, "ratio": 9.0},
        "scaling": {"batch/step/punster": growth},
        "topk": {"all": top, "5": top, "10": top},
    }
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    results.write_page(page, held)
    once = page.read_text()
    results.write_page(page, held)
    assert page.read_text() == once
    assert "| 2 s | 4.5 s | 2.25 [2.00, 2.50] | 2.5 (missed) |" in once and "| 9.00 [2.00, 2.50] | 2.5 |" in once
    assert "| batch | step | punster | 1, 2 | 3, 6 | 1.00 | 1.00 |" in once
    assert [line.split(" | ")[0] for line in once.splitlines() if line.endswith("| 3.00 |")] == ["| 5", "| 10", "| all"]
    page.write_text(once.replace("<!-- topk -->", ""))
    with pytest.raises(ValueError, match="topk"):
        results.write_page(page, held)


def test_the_committed_page_shows_the_committed_results(tmp_path: Path) -> None:
    latest = PAGE.parents[1] / "benchmarks" / "results" / "latest.json"
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    results.write_page(page, json.loads(latest.read_text()) if latest.exists() else {})
    assert page.read_text() == PAGE.read_text()


def test_flops_equal_a_count_by_hand() -> None:
    # One layer with sites (4 x 3) and (3 x 4), one head of 2, width 3, 10 tokens, LoRA of rank 1.
    shape = Shape(layers=1, sites=((4, 3), (3, 4)), heads=1, head_size=2, width=3, vocabulary=10, rank=1)
    dense, low_rank, attention = 24 + 24, 14 + 14, 8
    assert shape.block(5) == dense + low_rank + 5 * attention and shape.head == 60
    # Prompts (1 2) and (1 3): prefixes (1), (1 2), (1 3) at contexts 1, 2, 2. Two new tokens: the first is fed at context 3.
    prefill, decode, head = 3 * (dense + low_rank) + 5 * attention, 2 * (dense + low_rank) + 6 * attention, 4 * 60
    assert rollout_flops(shape, [[1, 2], [1, 3]], 2) == prefill + decode + head
    assert Shape(2, ((4, 3),), 1, 2, 3, 10).block(1) == 2 * (24 + 8)


def test_slopes() -> None:
    sizes = [8.0, 16.0, 64.0]
    assert results.slope(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    order = points("batch", "step")
    reports = iter([order[n % len(order)] for n in range(1, 2 * len(order) + 1)])

    def repetition() -> dict[str, float]:  # the worker's warm-up was the first point
        size = next(reports).size
        return {"seconds": 0.5 * size, "memory": size**2}

    found = scaling.growth(repetition, "batch", "step", 2)
    assert found["seconds"] == [0.5 * size for size in found["sizes"]]
    assert (found["time_slope"], found["memory_slope"]) == (1.0, 2.0)


def test_every_key_of_the_issue_is_there_and_can_be_chosen() -> None:
    named = {key.name: key.must for key in KEYS}
    assert len(named) == len(KEYS)
    must = {"rollout_b1": 2.5, "rollout_b32": 4, "rollout_b128": 4, "rollout_natural": 5, "rollout_merged_b32": 2.5, "rollout_merged_b128": 2.2,
            "matmul_share_b128": 0.6, "sft_step": 2.5, "reward_step": 2.5, "dpo_step": 2.5, "sft_cached": 6, "reward_cached": 6, "dpo_cached": 6,
            "grpo_iteration": 4, "ppo_all_layers": 4, "ppo_iteration": 8, "ppo_memory": 3}  # fmt: skip
    assert {name: goal for name, goal in named.items() if goal is not None} == must
    assert [key.name for key in chosen_keys(["ppo_i*", "sft_step"])] == ["ppo_iteration", "sft_step"]
    with pytest.raises(BenchError, match="unknown key"):
        chosen_keys(["nothing"])


ECHO = """
import json, sys
from benchmarks.line import Line
task = json.loads(sys.argv[1])
line = Line(task["warmup"], task["every"])
print("library noise")
for number in range(100):
    if number == task.get("fails"):
        raise SystemExit("no more")
    line.step(number=number)
"""


def echo(tmp_path: Path, **task: int) -> Worker:
    (tmp_path / "echo_worker.py").write_text(ECHO)
    root = str(Path(results.__file__).parents[1])
    return Worker(sys.executable, "echo_worker", task, tmp_path / "log", path=f"{tmp_path}:{root}")


def test_workers_do_one_repetition_when_asked(tmp_path: Path) -> None:
    worker = echo(tmp_path, warmup=2, every=3)
    worker.ready()
    first, second = worker.repetition(), worker.repetition()
    worker.close()
    assert (first["number"], second["number"]) == (4, 7)  # units 0 and 1 are warm-up
    assert len(first["marks"]) == 3 and first["seconds"] == first["marks"][-1] > 0 and first["peak"] > 1e6
    assert worker.process.returncode == 0 and "library noise" in worker.log.read_text()
    failing = echo(tmp_path, warmup=1, every=1, fails=1)
    failing.ready()
    with pytest.raises(BenchError, match="no more"):
        failing.repetition()
    failing.close()


@pytest.mark.slow
def test_our_side_of_every_comparison_runs(
    tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny model: the tasks call the package's functions, so a change of those must show here."""
    shutil.copytree(make_model("llama", max_position_embeddings=512), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "torch_dtype": "float32"}))
    monkeypatch.setenv("PUNSTER_BENCH", str(tmp_path))
    root = Path(results.__file__).parents[1]
    subprocess.run([sys.executable, "-m", "benchmarks.prepare"], cwd=root, check=True)
    tasks = dict.fromkeys((key.ours.task, key.ours.settings) for key in KEYS if key.ours.task not in ("rollout", "peak"))
    workers = []  # all at once: most of the time is theirs to start
    for name, settings in [*tasks, ("rollout", (("batch", 2),)), ("rollout", (("batch", 2), ("mode", "natural")))]:
        task = {"task": name, "settings": dict(settings), "warmup": 1, "every": 1}
        log = tmp_path / f"log{len(workers)}"
        workers.append((name, settings, Worker(sys.executable, "benchmarks.ours", task, log, path=str(root / "src"))))
    for name, settings, worker in workers:
        worker.ready()
        report = worker.repetition()
        worker.close()
        assert report["seconds"] > 0 and len(report["marks"]) == (EPOCHS * STEPS if name == "runs" else 1), name
        assert name != "rollout" or len(settings) == 2 or report["tokens"] == 2 * NEW


def test_forced_lengths_leave_the_log_probs_of_the_policy() -> None:
    """PPO refuses samples whose log-probs are not those that it trains on."""
    eos_id = 3
    logits = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    logits[:, eos_id] += 3  # what would be chosen mostly
    log_probs = logits.log_softmax(-1)
    token, log_prob = without_eos(choose, eos_id)(logits, Decoding(4), torch.linspace(0, 0.999, 200))
    assert eos_id not in token and len(set(token.tolist())) == 7
    torch.testing.assert_close(log_prob, log_probs.gather(1, token[:, None])[:, 0], rtol=0, atol=1e-6)


def test_sides_alternate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Fake:
        def __init__(self, who: str):
            self.who = who

        def ready(self) -> None:
            calls.append(f"{self.who} ready")

        def repetition(self) -> dict[str, float]:
            calls.append(self.who)
            return {"seconds": 1.0}

        def close(self) -> None:
            calls.append(f"{self.who} closed")

    monkeypatch.setattr("benchmarks.__main__.start", lambda side, log: Fake(side.who))
    key = next(key for key in KEYS if key.name == "sft_step")
    reports = measure([key], 2)
    assert calls == ["punster ready", "1.16.0 ready", "punster", "1.16.0", "punster", "1.16.0", "punster closed", "1.16.0 closed"]
    assert (
        len(reports[key.ours]) == len(reports[key.theirs]) == 2
        and side("punster", "steps", warmup=2, verb="sft", top_layers="all") == key.ours
    )
