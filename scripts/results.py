"""The table of results, cell by cell: every cell trains one policy, evaluates it, and writes results/CELL/summary.json.

    python scripts/results.py --list                 # the cells, and which are there
    python scripts/results.py ppo-1 rloo-2           # these (those that are there are skipped)
    python scripts/results.py --minutes 60           # as many missing ones as fit
    python scripts/results.py --table                # results/table.md and results/gold-against-kl.png out of what is there

A cell takes at most 8 minutes on two cores, is deterministic from commit, seed and data, and runs in a process of its own, so that its
peak memory is its own. The three runs that all cells stand on (sft, reward, gold of the demo recipe) are trained where they are
missing, with the settings that the demo had when the first cells were made. Gold is never trained against.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 480  # seconds of one cell
ENSEMBLE = "reward-ensemble"  # a second reward model: the first one's recipe, three members


def cells() -> dict[str, tuple[str, int, dict[str, Any]]]:
    """Name -> (verb, seed, what differs from the demo recipe's section of that verb). Steps are set for about equal wall time."""
    table: dict[str, tuple[str, int, dict[str, Any]]] = {"base": ("none", 1, {}), "sft": ("none", 1, {})}
    table |= {f"sft-{seed}": ("none", seed, {}) for seed in (2, 3)}  # the same model, other samples: the best-of-n curve again
    ppo, grpo = {"steps": 24, "beta": 0.1}, {"steps": 30, "beta": 0.1}
    dpo: dict[str, Any] = {
        "online": False, "pairs": "sampled", "prompt_limit": 260, "pairs_per_prompt": 2, "batch_size": 8, "steps": None, "epochs": 1.0, "lr": 0.0005,
    }  # fmt: skip
    online: dict[str, Any] = {"online": True, "steps": 18}
    for seed in (1, 2, 3):
        table[f"ppo-{seed}"] = ("ppo", seed, ppo)
        table[f"grpo-{seed}"] = ("grpo", seed, grpo)
        table[f"rloo-{seed}"] = ("grpo", seed, {**grpo, "variant": "rloo"})
        table[f"dpo-{seed}"] = ("dpo", seed, dpo)
        table[f"online-dpo-{seed}"] = ("dpo", seed, online)
    for beta in (0.02, 0.05, 0.2):
        table[f"ppo-beta-{beta}"] = ("ppo", 1, {**ppo, "beta": beta})
    for kind in ("clamped", "k2", "k3", "js", "none", "exact"):
        table[f"ppo-kl-{kind}"] = ("ppo", 1, {**ppo, "kl_penalty": kind})
    table["ppo-all-layers"] = ("ppo", 1, {**ppo, "top_layers": "all", "steps": 8})
    for seed in (1, 2, 3):  # twice the time of the others
        table[f"ppo-all-layers-long-{seed}"] = ("ppo", seed, {**ppo, "top_layers": "all", "steps": 16})
    table["ppo-joined-critic"] = ("ppo", 1, {**ppo, "critic": "joined", "value_coef": 0.1})
    for mode in ("hydra", "lora", "separate"):
        table[f"ppo-memory-{mode}"] = ("ppo", 1, {**ppo, "memory": mode, "steps": 6})
    table["ppo-long-1"] = ("ppo", 1, {**ppo, "steps": 48})  # twice as long as the others: how far it goes
    table["grpo-long"] = ("grpo", 1, {**grpo, "steps": 60})
    # Three reward models, their mean less their spread (Coste et al. 2023), and best-of-n by the same.
    table["sft-ensemble"] = ("none", 1, {"reward": ENSEMBLE})
    table["ppo-ensemble"] = ("ppo", 1, {**ppo, "reward": ENSEMBLE})
    table |= {f"ppo-ensemble-{seed}": ("ppo", seed, {**ppo, "reward": ENSEMBLE}) for seed in (2, 3)}
    for seed in (1, 2, 3):
        table[f"grpo-ensemble-{seed}"] = ("grpo", seed, {**grpo, "reward": ENSEMBLE})
    table["kto"] = ("dpo", 1, {**dpo, "loss_type": "kto"})
    table["distill"] = ("distill", 1, {})
    table["direct"] = ("ppo", 1, {**ppo, "actor": "base", "missing_eos_penalty": 2.0})
    return table


# The demo's settings when the cells of docs/RESULTS.md were made: later ones must not be mixed with them.
BOTH = {"top_layers": 0.2, "lr": 4e-4, "normalise_samples": 64, "test_limit": 40}
PINNED: dict[str, dict[str, Any]] = {
    "sft": {"epochs": 2, "lr": 8e-4},
    "reward": {**BOTH, "negatives": ["literal", "off_topic", "sampled"], "sampled_rows": 400, "depth": 0.667},
    "gold": {**BOTH, "split": "gold", "negatives": ["synonym_swap", "homophone", "weak", "garbled", "spliced"], "depth": 0.5},
}


def recipe(options: argparse.Namespace) -> Any:
    from punster.train.pipeline import load_recipe

    config = load_recipe("demo")
    for section, settings in PINNED.items():
        setattr(config, section, dict(settings))
    for section in ("ppo", "grpo"):
        setattr(config, section, {**getattr(config, section), "batch_size": 48})
    config.name, config.out, config.scale, config.quiet = "results", str(options.runs), options.scale, True
    for name in ("model", "device", "dtype"):
        if getattr(options, name):
            setattr(config, name, getattr(options, name))
    return config


def train_shared(options: argparse.Namespace, stage: str) -> None:
    from punster.train.pipeline import STAGES, stage_config

    kind, more = ("reward", {"name": ENSEMBLE, "members": 3, "combine": "cautious"}) if stage == ENSEMBLE else (stage, {})
    settings = replace(stage_config(recipe(options), kind), **more)
    settings.resume = (Path(settings.out) / stage / "config.yaml").exists()
    STAGES[kind][1](settings)


def judge_of(name: str) -> str:
    """The reward model that a cell is trained against."""
    return str(cells()[name][2].get("reward", "reward"))


def train_cell(options: argparse.Namespace, name: str) -> Path | None:
    """The run of a cell, trained unless it is there; None where nothing is trained."""
    from punster.config import DistillConfig
    from punster.data import corpus
    from punster.train.distill import distill
    from punster.train.pipeline import STAGES, stage_config

    verb, seed, changes = cells()[name]
    config = recipe(options)
    folder = Path(config.out) / config.name
    if verb == "none":
        return None
    if (folder / name / "summary.json").exists():
        return folder / name
    if verb == "distill":
        few = folder / "distill-prompts.jsonl"
        prompts = corpus.prompts("train")[: max(4, round(300 * options.scale))]
        few.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        start = stage_config(config, "sft")
        settings: Any = DistillConfig(
            name=name, out=str(folder), model=config.model, seed=seed, device=start.device, dtype=start.dtype, quiet=True, lr=start.lr,
            actor=str(folder / "sft"), reward_model=str(folder / "reward"), best_of=8, prompts=str(few), max_new_tokens=32, epochs=1,
        )  # fmt: skip
        train: Callable[[Any], Path | None] = distill
    else:
        own = {key: value for key, value in changes.items() if key != "reward"}
        setattr(config, verb, {**getattr(config, verb), **own})
        settings = replace(stage_config(config, verb), name=name, seed=seed, reward_model=str(folder / judge_of(name)))
        train = STAGES[verb][1]
    settings.resume = (folder / name / "config.yaml").exists()
    return train(settings)


def count_tokens(counter: dict[str, int]) -> None:
    """Count what the trainers sample from here on."""
    import importlib

    for module_name in ("experience", "dpo", "distill", "shaping"):
        module = importlib.import_module(f"punster.train.{module_name}")
        original: Callable[..., Any] = module.generate

        def counted(*arguments: Any, _original: Callable[..., Any] = original, **rest: Any) -> Any:
            rollout = _original(*arguments, **rest)
            counter["responses"] += len(rollout.examples)
            counter["tokens"] += sum(len(example.response) for example in rollout.examples)
            return rollout

        module.generate = counted


def make(options: argparse.Namespace, name: str) -> None:
    """Train and evaluate one cell in this process, and write its summary."""
    from punster.config import EvaluateConfig
    from punster.disk import whole_file
    from punster.errors import Aborted
    from punster.evaluate.compare import evaluate
    from punster.train.pipeline import commit, evaluation_config

    verb, seed, changes = cells()[name]
    started, sampled = time.monotonic(), {"responses": 0, "tokens": 0}
    count_tokens(sampled)
    config = recipe(options)
    folder = Path(config.out) / config.name
    try:
        run = train_cell(options, name)
    except Aborted:  # a result too: the run is back at its last good step
        run = folder / name
    trained, peak = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    settings: EvaluateConfig = evaluation_config(config, folder)
    best_of: dict[str, Any] = {"best_of": 0, "pool": 0, "proxy": None}
    if name.startswith("sft"):
        best_of = {"best_of": 16, "pool": 32, "proxy": str(folder / judge_of(name))}
    shown = "base" if name == "base" else str(run or folder / "sft")
    settings = replace(
        settings, models=[shown], reference=str(folder / "sft"), gold=str(folder / "gold"), out=None,
        quiet=True, seed=seed if verb == "none" else 1, **best_of,
    )  # fmt: skip
    rows = evaluate(settings)
    data = hashlib.sha256((ROOT / "src" / "punster" / "data" / "puns.jsonl").read_bytes()).hexdigest()
    summary = {
        "cell": name, "row": rows["models"][Path(shown).name], "best_of_n": rows.get("best_of_n"), "best_of": rows["models"].get("best_of_16"),
        "proxy": judge_of(name), "gold": "gold", "sampled": sampled, "train_seconds": round(trained, 1),
        "wall_seconds": round(time.monotonic() - started, 1), "peak_memory_gb": round(peak, 3), "aborted": json.loads((run / "summary.json").read_text()).get("aborted") if run else None,
        "seed": seed, "commit": commit(), "data_sha256": data, "scale": options.scale, "prompts": rows["prompts"],
        "samples": rows["samples"], "decoding": rows["decoding"], "model": config.model, "settings": changes,
    }  # fmt: skip
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    assert len(text) < 20_000
    target = options.results / name
    target.mkdir(parents=True, exist_ok=True)
    with whole_file(target / "summary.json") as handle:
        handle.write(text)


# ---- the table ----------------------------------------------------------------------------------------------------
COLUMNS = ("cell", "gold reward", "win rate vs SFT", "success", "exact KL", "distinct-2", "self-BLEU", "words", "EOS", "copies", "sampled tokens", "minutes", "GB")  # fmt: skip


def load_cells(folder: Path) -> dict[str, dict[str, Any]]:
    found = {name: folder / name / "summary.json" for name in cells()}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


def line(name: str, summary: dict[str, Any]) -> list[str]:
    from punster.evaluate.table import show, show_kl

    row = summary["row"]
    return [
        name + (" (stopped)" if summary["aborted"] else ""), show(row["held_out_reward"], signed=True),
        show(row["win_rate_vs_sft"], 0, percent=True), show(row.get("success_rate"), 0, percent=True), show_kl(row), show(row["distinct_2"]),
        show(row.get("self_bleu_4")), show(row["length"], 1), show(row["eos_rate"], 0, percent=True),
        show(row["copy_rate"], 1, percent=True), f"{summary['sampled']['tokens']:,}", show(summary["train_seconds"] / 60, 1),
        show(summary["peak_memory_gb"]),
    ]  # fmt: skip


def seed_lines(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Mean and range of the gold reward over the seeds of a method."""
    lines = []
    for method in ("ppo", "grpo", "rloo", "dpo", "online-dpo", "ppo-ensemble", "grpo-ensemble", "ppo-all-layers-long"):
        names = [name for name in (method, *(f"{method}-{seed}" for seed in (1, 2, 3))) if name in found]
        if len(names) > 1:
            rows = [found[name]["row"] for name in names]
            golds, kl = [row["held_out_reward"]["mean"] for row in rows], sum(row["exact_kl"] for row in rows) / len(rows)
            gold = f"{sum(golds) / len(golds):+.2f} ({min(golds):+.2f} to {max(golds):+.2f})"
            lines.append([f"{method}, {len(names)} seeds", gold, f"{kl:.1f}"])
    return lines


def best_of_lines(found: dict[str, dict[str, Any]]) -> str:
    """Gold reward of best-of-n: by three sets of samples, and by the ensemble."""
    names = [name for name in ("sft", "sft-2", "sft-3", "sft-ensemble") if found.get(name, {}).get("best_of_n")]
    if not names:
        return ""
    curves = {name: found[name]["best_of_n"] for name in names}
    heads = ["best of n", "KL at most", *(f"gold reward ({name})" for name in names)]
    text = "\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads) + "\n"
    for place, n in enumerate(curves[names[0]]["n"]):
        golds = " | ".join(f"{curve['gold'][place]:+.2f}" for curve in curves.values())
        text += f"| {n:.0f} | {curves[names[0]]['kl_bound'][place]:.2f} | {golds} |\n"
    return text


def write_table(folder: Path) -> None:
    found = load_cells(folder)
    text = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS) + "\n"
    text += "".join("| " + " | ".join(line(name, summary)) + " |\n" for name, summary in found.items())
    text += best_of_lines(found)
    if lines := seed_lines(found):
        text += "\n| method | gold reward, mean and range | exact KL |\n|---|---|---|\n"
        text += "".join("| " + " | ".join(cell) + " |\n" for cell in lines)
    (folder / "table.md").write_text(text)
    page = ROOT / "docs" / "RESULTS.md"
    before, begin, rest = page.read_text().partition("<!-- cells -->\n")
    if folder == ROOT / "results" and begin:
        page.write_text(before + begin + text + "<!-- end -->" + rest.partition("<!-- end -->")[2])
    plot(found, folder / "gold-against-kl.png")
    print(text)


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Gold reward against KL: a point a cell, and the best-of-n curve, which a policy should lie above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6))
    for name, summary in found.items():
        kl, gold = summary["row"]["exact_kl"], summary["row"]["held_out_reward"]["mean"]
        if name != "base" and kl:
            axes.plot(kl, gold, "o", markersize=4)
            axes.annotate(name, (kl, gold), fontsize=7, xytext=(3, 3), textcoords="offset points")
    for name, style in (("sft", "k.-"), ("sft-ensemble", "k.:")):
        if curve := found.get(name, {}).get("best_of_n"):
            axes.plot(curve["kl_bound"], curve["gold"], style, label=f"best of n, by {found[name]['proxy']} (KL at most)")
            if 16 in curve["n"]:  # where a policy crosses this line, training has bought what sixteen samples buy
                axes.axhline(curve["gold"][curve["n"].index(16)], color="k", linestyle=style[-1], linewidth=0.5)
            axes.legend()
    axes.set_xlabel("exact KL to SFT, nats a response")
    axes.set_ylabel("gold reward")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


# ---- the command --------------------------------------------------------------------------------------------------
def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", help="cells to make (default: all that are missing)")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("--table", action="store_true", help="write the table and the plot and stop")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell that might end after so long")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the cost, as for punster run: .02 tries everything")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the summaries")
    for name in ("model", "device", "dtype"):
        parser.add_argument(f"--{name}", help="as for punster run")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # what a process of its own is to do
    options = parser.parse_args(arguments)
    for name in options.cells:
        if name not in cells():
            parser.error(f"unknown cell {name}; --list names them")
    return options


def main() -> int:
    options = parse()
    if options.inside:
        stage, _, name = options.inside.partition(":")
        train_shared(options, name) if stage == "shared" else make(options, name)
        return 0
    if options.table:
        write_table(options.results)
        return 0
    there = {name for name in cells() if (options.results / name / "summary.json").exists()}
    if options.list:
        print("\n".join(f"{name:20s} {'there' if name in there else 'missing'}" for name in cells()))
        return 0
    started, failed = time.monotonic(), 0
    folder = options.runs / "results"
    wanted = [name for name in options.cells or cells() if name not in there]
    tasks = [
        f"shared:{stage}"
        for stage in ("sft", "gold", *sorted({"reward", *map(judge_of, wanted)}))
        if wanted and not (folder / stage / "summary.json").exists()
    ]
    for task in [*tasks, *(f"cell:{name}" for name in wanted)]:
        if (time.monotonic() - started + LIMIT) / 60 > options.minutes:
            print(f"{task}: not started, it might not end within --minutes {options.minutes:g}")
            break
        begun = time.monotonic()
        passed = [argument for argument in sys.argv[1:] if argument not in options.cells]
        done = subprocess.run([sys.executable, __file__, *passed, "--inside", task], check=False)
        took = time.monotonic() - begun
        print(f"{task}: {took:.0f} s" + (f", exit code {done.returncode}" if done.returncode else "") + (", over the limit" if took > LIMIT else ""), flush=True)  # fmt: skip
        failed += done.returncode != 0
        if done.returncode and task.startswith("shared"):
            return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
