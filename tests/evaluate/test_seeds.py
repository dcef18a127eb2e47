"""Runs that differ in their seed alone become one row; decoding options of punster evaluate."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import yaml

from punster.cli import main
from punster.evaluate.figures import bands, curves_of, smoothed
from punster.evaluate.folder import compared, read_run
from punster.evaluate.report import write_comparison
from punster.evaluate.seeds import (
    Measured,
    common_name,
    mean_entry,
    over_seeds,
    recipe_of,
    rows_of,
    rows_of_runs,
    stages_of,
    student,
)


def test_students_quantiles() -> None:
    """Against values from tables of the distribution."""
    known = {1: 12.7062, 2: 4.3027, 4: 2.7764, 10: 2.2281, 11: 2.2010, 30: 2.0423, 120: 1.9799}
    assert {n: round(student(n), 2) for n in known} == {n: round(t, 2) for n, t in known.items()}


def test_the_interval_holds_both_kinds_of_chance() -> None:
    values = [0.50, 0.56, 0.59]
    alone = over_seeds(values)
    assert alone is not None
    half = 4.303 * stdev(values) / math.sqrt(3)
    assert (alone["low"], alone["high"]) == (pytest.approx(0.55 - half), pytest.approx(0.55 + half))
    wide = over_seeds([{"mean": v, "low": v - 0.05, "high": v + 0.03} for v in values])
    assert wide is not None and wide["high"] - wide["low"] == pytest.approx(2 * math.hypot(half, 0.04))
    assert over_seeds([0.5]) is None and over_seeds([0.5, None]) is None and over_seeds([0.5, math.nan]) is None
    entries = [
        {"length": 10.0, "rating": {"mean": 990.0}, "exact_kl": None},
        {"length": 12.0, "rating": {"mean": 1}, "exact_kl": 1.0},
    ]
    assert mean_entry(entries).keys() == {"length"} and mean_entry(entries)["length"]["mean"] == 11


def settings(folder: Path, verb: str = "ppo", **given: Any) -> Path:
    folder.mkdir(parents=True)
    given = {"name": folder.name, "out": str(folder.parent), "model": "m", **given}
    (folder / "config.yaml").write_text(f"# punster {verb}\n" + yaml.safe_dump(given))
    return folder


def test_what_makes_a_recipe(tmp_path: Path) -> None:
    """The seed and the names do not, not of the runs before it either; any other setting does, of these too."""
    for seed in (1, 2):
        sft = settings(tmp_path / f"sft-{seed}", "sft", seed=seed, lr=1e-4)
        settings(tmp_path / f"ppo-{seed}", seed=seed, actor=str(sft), beta=0.1)
    other = settings(tmp_path / "sft-3", "sft", seed=3, lr=2e-4)
    settings(tmp_path / "ppo-3", seed=3, actor=str(other), beta=0.1)
    settings(tmp_path / "grpo-1", "grpo", seed=1, actor=str(tmp_path / "sft-1"), beta=0.1)
    recipes = {p.name: recipe_of(p) for p in sorted(tmp_path.iterdir())}
    assert recipes["ppo-1"] == recipes["ppo-2"] and recipes["sft-1"] == recipes["sft-2"]
    assert len({recipes[name] for name in ("ppo-1", "ppo-3", "grpo-1", "sft-1", "sft-3")}) == 5
    # What changes nothing of what is learned, and an option that an older file does not have yet, are alike, too.
    settings(tmp_path / "ppo-4", seed=4, actor=str(tmp_path / "sft-1"), beta=0.1, eval_every=5, keep=9, critic_warmup=1)
    assert recipe_of(tmp_path / "ppo-4") == recipes["ppo-1"]
    # Of checkpoints those of one step, also of the runs that they began with.
    first, second = (tmp_path / name / "checkpoints" for name in ("ppo-1", "ppo-2"))
    assert recipe_of(first / "step-4") == recipe_of(second / "step-4") != recipes["ppo-1"]
    assert recipe_of(first / "step-4") != recipe_of(first / "step-8")
    begun = [settings(tmp_path / f"b{step}", seed=1, actor=str(tmp_path / f"sft-1/checkpoints/step-{step}")) for step in (1, 2)]
    assert recipe_of(begun[0]) != recipe_of(begun[1])


def test_what_came_from_python_is_told_by_its_hash(tmp_path: Path) -> None:
    made = []
    for name, data in (("a", "rows"), ("b", "rows"), ("c", "other rows"), ("d", None)):
        folder = settings(tmp_path / name, "sft", seed=len(made), data=["(given from Python)"])
        made.append(folder)
        if data:
            (folder / "checkpoints" / "step-2").mkdir(parents=True)
            (folder / "checkpoints" / "step-2" / "state.json").write_text(json.dumps({"keys": {"data": [data]}}))
    a, b, c, d = map(recipe_of, made)
    assert a == b and len({a, c, d}) == 3
    rewarded = [settings(tmp_path / f"p{i}", seed=i, reward=["(given from Python)"]) for i in (1, 2)]
    assert recipe_of(rewarded[0]) != recipe_of(rewarded[1])  # nobody knows what it pays for


def test_pipelines_that_were_moved_are_still_of_one_recipe(tmp_path: Path) -> None:
    for seed, name in ((1, "demo"), (2, "demo-2")):
        settings(tmp_path / "new" / name, "run", seed=seed, name=name, out="runs")
        settings(tmp_path / "new" / name / "sft", "sft", seed=seed, out=f"runs/{name}")
        settings(tmp_path / "new" / name / "ppo", seed=seed, out=f"runs/{name}", actor=f"runs/{name}/sft")
    assert recipe_of(tmp_path / "new" / "demo" / "ppo") == recipe_of(tmp_path / "new" / "demo-2" / "ppo")


def test_rows_are_of_one_recipe_each_and_have_names_of_their_own() -> None:
    model = lambda name, recipe, seed: Measured(name, recipe, seed, {"length": float(len(name))})
    rows = rows_of([model("low-1/ppo", "low", "1"), model("low-2/ppo", "low", "2"), model("high-1/ppo", "high", "1"),
                    model("high-2/ppo", "high", "2"), model("again", "low", "2"), model("alone", "other", "1")])  # fmt: skip
    assert list(rows) == ["PPO (2 seeds)", "PPO (2 seeds): high-1/ppo, high-2/ppo"]  # one seed twice says nothing of another
    assert rows["PPO (2 seeds)"]["runs"] == ["low-1/ppo", "low-2/ppo"]
    assert common_name(["ppo-s1", "ppo-s2"]) == "ppo-s (2 seeds)" and common_name(["a/ppo", "b/ppo"]) == "PPO (2 seeds)"
    assert common_name(["x", "y", "z"]) == "x (3 seeds)"


def test_intervals_stay_where_the_figure_can_be() -> None:
    found = mean_entry(
        [{"eos_rate": 0.9, "length": 2.0, "held_out_reward": 0.1}, {"eos_rate": 1.0, "length": 4.0, "held_out_reward": 1.0}]
    )
    assert (found["eos_rate"]["high"], found["length"]["low"]) == (1.0, 0.0) and found["held_out_reward"]["low"] < 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    out = tmp_path_factory.mktemp("seeds")
    common = ["--model", str(tiny_llama), "--steps", "2", "--quiet", "--eval-prompts", "0", "-b", "4"]
    assert main(["sft", "-n", "sft", "--out", str(out), *common]) == 0
    reward = ["reward", "-n", "gold", "-p", str(out / "sft"), "--normalise-samples", "8", "--test-limit", "2"]
    assert main([*reward, "--out", str(out), *common]) == 0
    for seed in ("1", "2"):
        more = ["sft", "-n", "more", "--out", str(out / f"s{seed}"), "--seed", seed, "-p", str(out / "sft"), "--lr", "0.02"]
        assert main([*more, *common]) == 0
    return out


def asked(runs: Path, *more: str) -> list[str]:
    given = [str(runs / "s1" / "more"), str(runs / "s2" / "more"), "--reference", str(runs / "sft"), "--gold", str(runs / "gold")]
    return ["evaluate", *given, "--limit", "6", "--samples", "2", "--max-new-tokens", "8", "--quiet", *more]


def test_two_seeds_become_a_row(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(asked(runs, "--out", str(tmp_path / "e"))) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Means over seeds" in printed and "more (2 seeds)" in printed
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert list(summary["models"]) == ["sft", "s1/more", "s2/more"]  # of one name, so with their folders
    row, each = summary["over_seeds"]["more (2 seeds)"], [summary["models"][name] for name in ("s1/more", "s2/more")]
    assert row["runs"] == ["s1/more", "s2/more"] and each[0]["held_out_reward"] != each[1]["held_out_reward"]
    rewards = [entry["held_out_reward"] for entry in each]
    assert row["held_out_reward"]["mean"] == pytest.approx((rewards[0]["mean"] + rewards[1]["mean"]) / 2)
    spread = 12.706 * abs(rewards[0]["mean"] - rewards[1]["mean"]) / 2
    half = (row["held_out_reward"]["high"] - row["held_out_reward"]["low"]) / 2
    assert half == pytest.approx(math.hypot(spread, sum(r["high"] - r["low"] for r in rewards) / 4))
    assert main([*asked(runs)[:3], "--reference", str(runs / "s1" / "more"), *asked(runs)[5:], "--out", str(tmp_path / "r")]) == 0
    assert "over_seeds" not in json.loads((tmp_path / "r" / "summary.json").read_text())  # the reference is no figure of its own
    capsys.readouterr()
    shutil.copytree(runs / "s1", tmp_path / "elsewhere" / "s1")
    assert main([*asked(runs)[:3], str(tmp_path / "elsewhere" / "s1" / "more"), *asked(runs)[3:]]) == 2
    assert "two different runs are called s1/more" in capsys.readouterr().err


def test_truncated_samples_have_no_exact_kl(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(asked(runs, "--out", str(tmp_path), "--temperature", "0.8", "--min-p", "0.05", "--top-k", "40")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "T = 0.8, top-k 40, min-p 0.05" in printed and "no exact KL of truncated samples" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["decoding"] == {
        "max_new_tokens": 8, "temperature": 0.8, "top_k": 40, "top_p": 1.0, "min_p": 0.05, "repetition_penalty": 1.0,
    }  # fmt: skip
    assert [entry["exact_kl"] for entry in summary["models"].values()] == [None] * 3
    assert all("exact_kl_interval" not in e and e["exposure_gap"] is None for e in summary["models"].values())


def test_greedy_samples_are_the_likeliest_tokens(runs: Path, tmp_path: Path) -> None:
    """--top-k 1 is greedy, whatever the seed."""
    lines = []
    for seed in ("1", "2"):
        assert main(asked(runs, "--out", str(tmp_path / seed), "--top-k", "1", "--seed", seed)) == 0
        lines.append([json.loads(line)["completions"] for line in (tmp_path / seed / "samples.jsonl").read_text().splitlines()])
    assert lines[0] == lines[1] and all(first == second for first, second in lines[0])


def test_pipelines_of_three_seeds_on_one_page(tmp_path: Path) -> None:
    for seed, reward in ((1, 0.2), (2, 0.5), (3, 0.8)):
        folder = settings(tmp_path / f"demo-{seed}", "run", seed=seed, scale=0.1)
        models = {"sft": {"held_out_reward": {"mean": 0.0, "low": -0.1, "high": 0.1}, "length": 12.0},
                  "ppo": {"held_out_reward": {"mean": reward, "low": reward - 0.1, "high": reward + 0.1}, "length": 11.0 + seed}}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps({"models": models, "prompts": 4, "samples": 2}))
    other = settings(tmp_path / "other", "run", seed=4, scale=0.2)
    shutil.copy(tmp_path / "demo-1" / "summary.json", other / "summary.json")
    folders = [tmp_path / name for name in ("demo-1", "demo-2", "demo-3", "other")]
    rows = rows_of_runs([read_run(folder) for folder in folders])
    assert list(rows) == ["SFT (3 seeds)", "PPO (3 seeds)"]
    assert rows["PPO (3 seeds)"]["runs"] == ["demo-1/ppo", "demo-2/ppo", "demo-3/ppo"]
    assert rows["PPO (3 seeds)"]["held_out_reward"]["mean"] == pytest.approx(0.5)
    page = write_comparison(folders, tmp_path / "page.html").read_text()
    assert "Means over seeds" in page and "PPO (3 seeds)" in page and "13.0" in page
    assert "Means over seeds" not in write_comparison(folders[2:], tmp_path / "two.html").read_text()
    for folder in folders:  # evaluations of the same runs: another seed of theirs is no other training
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("# punster run", "# punster evaluate"))
    assert rows_of_runs([read_run(folder) for folder in folders]) == {}


def test_curves_of_several_seeds_are_one_with_a_band(tmp_path: Path) -> None:
    """The mean over the steps that all runs have, from the lowest to the highest; other runs stay as they are."""
    for seed in (1, 2, 3):
        folder = settings(tmp_path / f"ppo-{seed}", seed=seed, beta=0.1 if seed < 3 else 0.2)
        rows = [{"step": step, "objective/scores": float(seed * step)} for step in range(1, 6 - seed)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [read_run(tmp_path / f"ppo-{seed}") for seed in (1, 2, 3)]
    page = write_comparison([run.place for run in runs], tmp_path / "page.html").read_text()
    assert "PPO (2 seeds) 1.5 to 4.5; ppo-3 3 to 6." in page and "Of several seeds the mean, with a band" in page
    together = compared(runs)
    together.seeds = stages_of(together.stages)
    [(_, lines)] = curves_of(together)
    both, third = bands(together, lines)
    assert (both.steps, both.mean, both.low, both.high) == ([1, 2, 3], [1.5, 3, 4.5], [1, 2, 3], [2, 4, 6])
    assert (third.name, third.steps, third.low) == ("ppo-3", [1, 2], [3, 6])
    assert both.hue != third.hue
    (tmp_path / "ppo-2" / "metrics.jsonl").write_text(json.dumps({"step": 4, "objective/scores": 1.0}) + "\n")
    alone = compared([read_run(tmp_path / f"ppo-{seed}") for seed in (1, 2)])
    alone.seeds = stages_of(alone.stages)
    [(_, lines)] = curves_of(alone)
    assert [(band.name, band.low == band.high) for band in bands(alone, lines)] == [("ppo-1", True)]  # one has no curve
    rows = [{"step": step, "objective/scores": 1.0} for step in (7, 8)]
    (tmp_path / "ppo-2" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    apart = compared([read_run(tmp_path / f"ppo-{seed}") for seed in (1, 2)])
    apart.seeds = stages_of(apart.stages)
    assert [band.name for band in bands(apart, next(curves_of(apart))[1])] == ["ppo-1", "ppo-2"]  # they share no step
    for seed in (1, 2):  # of pipelines the same stages
        folder = settings(tmp_path / f"demo-{seed}", "run", seed=seed)
        for stage in ("sft", "ppo"):
            settings(folder / stage, stage, seed=seed, out=str(folder))
        for stage, own in (("reward", seed), ("gold", seed + 1)):
            settings(folder / stage, "reward", seed=own, out=str(folder))
    pipelines = compared([read_run(tmp_path / f"demo-{seed}") for seed in (1, 2)])
    assert stages_of(pipelines.stages) == {
        "SFT (2 seeds)": ["demo-1: SFT", "demo-2: SFT"], "PPO (2 seeds)": ["demo-1: PPO", "demo-2: PPO"],
        "reward (2 seeds)": ["demo-1: reward", "demo-2: reward"], "gold (2 seeds)": ["demo-1: gold", "demo-2: gold"],
    }  # fmt: skip
    for place, seed in (("x", 1), ("y", 2)):  # of one name and parent
        settings(tmp_path / place / "runs" / "ppo", seed=seed)
        rows = [{"step": step, "objective/scores": float(seed * step)} for step in (1, 2)]
        (tmp_path / place / "runs" / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    twins = compared([read_run(tmp_path / place / "runs" / "ppo") for place in ("x", "y")])
    twins.seeds = stages_of(twins.stages)
    [band] = bands(twins, next(curves_of(twins))[1])
    assert (band.name, band.mean, band.low) == ("PPO (2 seeds)", [1.5, 3.0], [1.0, 2.0])
    # Runs of a verb alone may be called as a stage is; an option that a file is too old to know is as by default.
    settings(tmp_path / "runs" / "ppo", seed=1)
    settings(tmp_path / "runs" / "ppo-2", seed=2, eval_data=[])
    named = compared([read_run(tmp_path / "runs" / name) for name in ("ppo", "ppo-2")])
    assert stages_of(named.stages) == {"PPO (2 seeds)": ["ppo", "ppo-2"]}
    settings(tmp_path / "z", seed=3, reward=None, eval_data=["mine.jsonl"])  # measured on other rows
    assert stages_of(compared([read_run(tmp_path / "z"), read_run(tmp_path / "x" / "runs" / "ppo")]).stages) == {}


def test_running_means_are_not_bent_at_the_ends() -> None:
    assert smoothed([0.0, 3.0, 6.0, 9.0], 2) == [0.0, 3.0, 6.0, 9.0]
    assert smoothed([0.0, 3.0, 0.0, 3.0, 0.0], 1) == [0.0, 1.0, 2.0, 1.0, 0.0]
