"""The closing table in the terminal."""

from __future__ import annotations

from typing import Any

LABELS = {"base": "base", "sft": "SFT", "ppo": "PPO", "grpo": "GRPO", "dpo": "DPO", "placebo": "PPO, shuffled labels"}


def label(name: str) -> str:
    if name.startswith("best_of_"):
        return f"best-of-{name.removeprefix('best_of_')}"
    return LABELS.get(name, name)


def interval(value: dict[str, float] | None, percent: bool = False) -> str:
    if value is None or (percent and value["low"] == value["high"] == 0.5):
        return "–"
    if percent:
        return f"{value['mean']:.0%} [{value['low']:.0%}, {value['high']:.0%}]"
    return f"{value['mean']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"


def kl_text(row: dict[str, Any]) -> str:
    if row.get("exact_kl") is not None:
        return f"{row['exact_kl']:.1f}"
    return f"≤ {row['kl_bound']:.2f}" if "kl_bound" in row else "–"


COLUMNS = ("model", "held-out reward", "win rate vs SFT", "exact KL", "distinct-2", "words", "EOS", "copies")


def rows_of(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table as text cells."""
    return [
        (
            label(name), interval(row["held_out_reward"]), interval(row["win_rate_vs_sft"], percent=True), kl_text(row),
            f"{row['distinct_2']:.2f}", f"{row['length']:.1f}", f"{row['eos_rate']:.0%}", "–" if row["copy_rate"] is None else f"{row['copy_rate']:.1%}",
        )
        for name, row in summary["models"].items()
    ]  # fmt: skip


def markdown_table(summary: dict[str, Any]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows_of(summary)])


def print_table(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{summary['prompts']} held-out prompts, {summary['samples']} samples each, T = {summary['decoding']['temperature']:g}, untruncated"
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in rows_of(summary):
        table.add_row(*row)
    Console(width=max(Console().width, 118)).print(table)
    print(
        "held-out reward: yardstick reward model, 95 % bootstrap over prompts; exact KL to SFT in nats a response; EOS: share that ends"
    )
