"""The pages of the methods: every logged metric is explained, every function they name exists, every option they show too."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from punster.cli import generate_parser
from punster.config import DistillConfig, DpoConfig, EvaluateConfig, GrpoConfig, PpoConfig, SftConfig, TrainConfig
from punster.train import setup
from punster.train.distill import distill
from punster.train.dpo import dpo
from punster.train.grpo import grpo
from punster.train.ppo import ppo
from punster.train.reward import train_reward
from punster.train.sft import sft

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {"PPO.md": PpoConfig, "GRPO.md": GrpoConfig, "DPO.md": DpoConfig, "BEST_OF_N.md": DistillConfig}
PAIRS = [{"prompt": f"pun {i}", "chosen": f"tide {i}", "rejected": f"dull {i}"} for i in range(6)]


def letters(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def keys(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every key that a short run of each loop writes into metrics.jsonl."""
    import json

    from punster.config import RewardConfig

    out = tmp_path_factory.mktemp("runs")
    base: dict[str, Any] = {"out": str(out), "model": str(tiny_llama), "quiet": True, "device": "cpu", "dtype": "fp32", "steps": 2,
                            "eval_every": 1, "batch_size": 4}  # fmt: skip
    sampled = {"actor": str(out / "sft"), "max_new_tokens": 6, "eval_prompts": 2}
    prompts = ["one", "two", "three"]
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "_BASES", {})
        sft(SftConfig(name="sft", **{**base, "steps": 40, "lr": 1e-2}), rows)
        train_reward(RewardConfig(name="reward", **base, pretrained=str(out / "sft"), normalise_samples=0), PAIRS)
        (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
        mixed = {"sft_coef": 0.1, "sft_data": [str(out / "rows.jsonl")], "target_kl": 3.0, "critic_warmup": 0}
        runs: dict[str, list[Path | None]] = {
            "PPO.md": [ppo(PpoConfig(name="ppo", **base, **sampled, **mixed), prompts, letters)],
            "GRPO.md": [grpo(GrpoConfig(name="grpo", **base, **sampled, samples=2), prompts, letters)],
            "DPO.md": [
                dpo(DpoConfig(name=kind, **base, actor=str(out / "sft"), loss_type=kind), data, eval_rows=data)
                for kind, data in (("sigmoid", PAIRS), ("kto", [{**row, "label": i % 2 == 0} for i, row in enumerate(rows)]))
            ],
            "BEST_OF_N.md": [
                distill(DistillConfig(name="distill", **base, actor=str(out / "sft"), reward_model=str(out / "reward"), best_of=3,
                                      prompts=str(out / "prompts.jsonl"), max_new_tokens=40))
            ],
        }  # fmt: skip
    found: dict[str, set[str]] = {}
    for page, folders in runs.items():
        lines = [line for run in folders if run for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[page] = {key for line in lines for key in json.loads(line)}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_logged_metric_is_explained(page: str, keys: dict[str, set[str]]) -> None:
    """In the first column of the page's table of metrics; and the table names no metric that is not logged."""
    cells = [row.split("|")[1] for row in (DOCS / page).read_text().splitlines() if row.startswith("| `")]
    explained = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell) if not name.startswith("--")}
    assert len(keys[page]) >= 6
    assert keys[page] - explained == set()
    # What only some runs log: figures of held-out samples, and those of online pairs.
    assert {key for key in explained - keys[page] if not key.startswith(("eval/", "objective/"))} == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_function_that_is_named_exists(page: str) -> None:
    links = re.findall(r"\[`(\w+)`\]\(\.\./(src/[\w/]+\.py)\)", re.sub(r"\s*\n\s*", " ", (DOCS / page).read_text()))
    assert len(links) >= 4
    for name, file in links:
        assert re.search(rf"^(def|class) {name}\b", (DOCS.parent / file).read_text(), re.M), f"{name} is not in {file}"


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_is_shown_exists(page: str) -> None:
    known: Callable[[type], set[str]] = lambda kind: set(kind.__dataclass_fields__)
    names = known(PAGES[page]) | known(TrainConfig) | known(EvaluateConfig)
    names |= {action.dest for action in generate_parser(with_prompt=True)._actions}
    for option in re.findall(r"--([a-z][a-z-]+)", (DOCS / page).read_text()):
        assert option.replace("-", "_") in names, option


def test_dpo_as_the_demo_trains_it() -> None:
    from punster.train.pipeline import load_recipe

    told = (DOCS / "DPO.md").read_text(encoding="utf-8")
    assert load_recipe("demo").dpo["online"] and "`make demo` trains DPO online" in told
