"""Results as tables: which columns there are, how a value is written, and the closing table in the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")

LABELS = {"base": "base", "sft": "SFT", "ppo": "PPO", "grpo": "GRPO", "dpo": "DPO", "placebo": "PPO, shuffled labels"}


def label(name: str) -> str:
    """A model's name as people read it."""
    if name.startswith("best_of_"):
        return f"best-of-{name.removeprefix('best_of_')}"
    return LABELS.get(name, name)


# ---- values ---------------------------------------------------------------------------------------------------------
def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """A finite number (the mean, of an interval), or None."""
    value = value.get("mean") if isinstance(value, dict) else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def show(value: Any, digits: int = 2, percent: bool = False, signed: bool = False) -> str:
    """'mean [low, high]' of an interval, or a plain number; a dash where there is none."""
    form = f"{'+' if signed else ''}.{digits}{'%' if percent else 'f'}"
    mean, low, high = number(value), number(as_dict(value).get("low")), number(as_dict(value).get("high"))
    if mean is None:
        return "–"
    return f"{mean:{form}}" + ("" if low is None or high is None else f" [{low:{form}}, {high:{form}}]")


def show_kl(entry: Mapping[str, Any]) -> str:
    """Exact KL; for best-of-n, which has none, its upper bound."""
    if number(entry.get("exact_kl")) is None and number(entry.get("kl_bound")) is not None:
        return f"≤ {show(entry['kl_bound'])}"
    return show(entry.get("exact_kl_interval") or entry.get("exact_kl"), 1)


@dataclass(frozen=True)
class Column:
    """One column of the results: the key in a model's entry (dots lead into nested ones), its heads in the terminal and on a page.

    It is shown where some model has a value. To add one, put the value into a model's entry (compare.describe) and a Column here.
    """

    key: str
    short: str
    title: str
    note: str  # for the line under the table
    digits: int = 2
    percent: bool = False
    signed: bool = False

    def value(self, entry: Mapping[str, Any]) -> Any:
        found: Any = entry
        for part in self.key.split("."):
            found = as_dict(found).get(part)
        return found

    def cell(self, entry: Mapping[str, Any]) -> str:
        value = self.value(entry)
        if self.key == "exact_kl":
            return show_kl(entry)
        if self.key == "win_rate_vs_sft" and as_dict(value).get("low") == as_dict(value).get("high") == 0.5:
            return "–"  # the reference against itself
        return show(value, self.digits, self.percent, self.signed)


COLUMNS = (
    Column("held_out_reward", "held-out reward", "Gold reward",
           "score by the yardstick reward model; compare it within one run only", signed=True),
    Column("win_rate_vs_sft", "win rate vs SFT", "Win rate against SFT", "chance that a sample scores above one of the SFT model",
           0, percent=True),
    Column("exact_kl", "exact KL", "Exact KL (nats)",
           "full-vocabulary KL to the SFT model, summed over a response, mean over one a prompt; for best-of-n, an upper bound (≤)", 1),
    Column("distinct_2", "distinct-2", "Distinct-2", "share of distinct word pairs"),
    Column("length", "words", "Words", "words in a text", 1),
    Column("eos_rate", "EOS", "Ends by itself", "share of texts that end before the length limit", 0, percent=True),
    Column("copy_rate", "copies", "Copies", "share of texts that nearly repeat a training pun", 1, percent=True),
)  # fmt: skip
PAIRED_COLUMNS = (
    Column("versus_sft.wilson", "Wilson interval", "Win rate, Wilson's interval", "of the win rate where each prompt is won, tied or lost, from a formula", 0, percent=True),
    Column("versus_sft.length_controlled", "at equal length", "Win rate at equal length",
           "what is left of the win rate when the difference in words is taken out", 0, percent=True),
    Column("versus_sft.sign_test", "sign test p", "Sign test, p", "on the prompts that one side won", 3),
    Column("versus_sft.prompts_needed", "prompts needed", "Prompts needed", "to find a difference of this size with 80 % power", 0),
    Column("rating", "rating", "Rating", "Bradley-Terry rating of all models against each other, mean 1000, on the scale of Elo", 0),
)  # fmt: skip
TEXT_COLUMNS = (
    Column("success_rate", "success", "Success estimate",
           "share that a person would call a pun, interval widened by the error on unseen generators; the same estimate puts people's puns at .31 to .38, GPT-4's at .28, 7B chat models' at .24 to .25 (default model): not for ranking",
           0, percent=True),
    Column("called_puns", "called puns", "Called puns", "share that the gold reward model calls puns; its threshold is set on texts that people labelled",
           0, percent=True),
    Column("mauve", "MAUVE", "MAUVE", "likeness of all texts together to people's test puns, from 100 prompts on; other puns of people reach .95 (default model)"),
    Column("seq_rep_4", "seq-rep-4", "Repeated 4-grams", "share within a text", 3), Column("loop_rate", "loops", "Loops", "", 1, percent=True),
    Column("self_bleu_4", "self-BLEU", "Self-BLEU-4", "likeness of the texts to one another"),
    Column("zipf", "Zipf", "Zipf exponent", ""), Column("commonest_start", "start", "Commonest start", "share that begins with the same 4 words", 1, percent=True),
    Column("unique_share", "unique", "Unique", "of the samples of one prompt", 0, percent=True),
    Column("nearest_training", "nearest", "Nearest training pun", "mean Jaccard, 0 below .3"),
    Column("perplexity_plain", "ppl plain", "Perplexity, plain text", "rises where the model forgets", 1),
    Column("exposure_gap", "exposure gap", "Exposure gap", "log-perplexity on people's puns less that on own samples, nats a token"),
    Column("offence_rate", "offence", "Offence", "share with a profane word", 1, percent=True),
)  # fmt: skip
JUDGE_COLUMNS = (
    Column("judge.win_rate", "win rate", "Win rate against SFT", "ties half, mean of both wordings; won, tied, lost: prompts", 0, percent=True),
    Column("judge.wins", "won", "Won", "", 0), Column("judge.ties", "tied", "Tied", "", 0),
    Column("judge.losses", "lost", "Lost", "", 0),
    Column("judge.length_controlled", "at equal length", "Win rate at equal length",
           "what is left of the win rate when the difference in words is taken out", 0, percent=True),
    Column("judge.sign_test", "sign test p", "Sign test, p", "on the prompts that one side won", 3),
    Column("judge.prompts_needed", "prompts needed", "Prompts needed", "to find a difference of this size with 80 % power", 0),
    Column("judge.rating", "rating", "Rating", "Bradley-Terry, mean 1000, on the scale of Elo", 0),
    Column("judge.pun_rate", "is a pun", "Is a pun", "share of texts that the judge calls a pun", 0, percent=True),
    Column("judge.funniness", "funniness", "Funniness", "1 to 5", 2), Column("judge.coherence", "coherence", "Coherence", "1 to 5", 2),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Columns that have values, with a row a model."""

    title: str
    columns: list[Column]
    rows: list[list[str]]

    @property
    def note(self) -> str:
        return "; ".join(f"{column.title}: {column.note}" for column in self.columns if column.note) + "."

    def against(self, reference: str) -> Table:
        """The same table with this name in the place of SFT, which is the usual one."""
        if reference == "SFT":
            return self
        told = lambda text: re.sub("the SFT model|SFT", lambda _: reference, text)
        return replace(
            self, columns=[replace(c, short=told(c.short), title=told(c.title), note=told(c.note)) for c in self.columns]
        )


def table(title: str, columns: Sequence[Column], models: Mapping[str, Any], keep_all: bool = False) -> Table | None:
    """A table, without the columns that are empty (unless all are kept) and, where a column is left out, without bare models."""
    entries = {name: as_dict(entry) for name, entry in models.items()}
    used = [c for c in columns if keep_all or any(number(c.value(entry)) is not None for entry in entries.values())]
    rows = [[label(name), *(column.cell(entry) for column in used)] for name, entry in entries.items()]
    rows = rows if keep_all else [row for row in rows if set(row[1:]) != {"–"}]
    return Table(title, used, rows) if used and rows else None


def result_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Every table that a summary has values for; the first is the one that everybody reads."""
    models, against = as_dict(summary.get("models")), label(reference_of(summary))
    main = table("Models compared", COLUMNS, models, keep_all=True)
    paired = table(f"Against {against}, prompt by prompt, by the gold reward", PAIRED_COLUMNS, models)
    judged = table(f"Judged by {as_dict(summary.get('judge')).get('model', 'a language model')}", JUDGE_COLUMNS, models)
    texts = table("What the texts are like", TEXT_COLUMNS, models)
    seeds = table("Means over seeds: intervals of Student's t over the runs and of the bootstrap over prompts together",
                  COLUMNS + TEXT_COLUMNS[:2], as_dict(summary.get("over_seeds")))  # fmt: skip
    return [found.against(against) for found in (main, seeds, paired, texts, judged) if found]


def reference_of(summary: Mapping[str, Any]) -> str:
    """Name of the model that the others are compared with."""
    return name if isinstance(name := summary.get("reference"), str) and len(name) < 200 else "sft"


def judge_sentences(summary: Mapping[str, Any]) -> list[str]:
    """What must be known of a judge, or of the yardstick as one, before its table is believed."""
    about, lines = as_dict(summary.get("judge")), []
    if (trained := summary.get("not_held_out")) and isinstance(trained, list):
        lines.append(
            f"NOT held out: {', '.join(label(str(name)) for name in trained)} learned from this very yardstick, or is chosen by it; its "
            "rewards, win rates and ratings show how well that was learned, not how good the texts are."
        )
    if (unknown := summary.get("lineage_unknown")) and isinstance(unknown, list):
        lines.append(
            f"Not known whether held out: {', '.join(label(str(name)) for name in unknown)}, as the settings of a run that this began with, "
            "or its own, are not here any more: nothing can tell what was learned from."
        )
    if calls := as_dict(summary.get("called_puns")):
        lines.append(
            f"Called puns: the yardstick calls as many of {show(calls.get('outputs'), 0)} machine outputs puns as people do "
            f"({show(calls.get('people'), 0, percent=True)}), and tells which with an AUC of {show(calls.get('auc'))} (chance: 0.5); of "
            f"SemEval's puns it calls {show(calls.get('semeval_puns'), 0, percent=True)} so, of its other sentences "
            f"{show(calls.get('semeval_others'), 0, percent=True)}."
        )
    if not about:
        return lines
    differ, people = as_dict(about.get("wording_disagreement")), as_dict(about.get("calibration"))
    lines += [
        f"Judge {about.get('model')} at {about.get('endpoint')}: {show(about.get('pairs'), 0)} pairs, each in both orders and two "
        f"wordings; {show(about.get('answers'), 0)} answers, {show(about.get('unusable'), 1, percent=True)} of them unusable.",
        f"The same verdict in both orders (consistency): {show(about.get('consistency'), 0, percent=True)}; the text shown first wins "
        f"{show(about.get('first_position'), 0, percent=True)} (50% is fair); ties: {show(about.get('tie_rate'), 0, percent=True)}; "
        f"the two wordings disagree on {show(differ.get('pairs'), 0, percent=True)} of the pairs and on "
        f"{show(differ.get('pun'), 0, percent=True)} of 'is it a pun'.",
    ]
    if people:
        lines.append(
            f"Agreement with people on {show(people.get('texts'), 0)} labelled texts, Cohen's kappa: "
            f"{show(people.get('pun'))} (wording that leans towards puns), {show(people.get('neutral'))} (neutral)."
        )
    else:
        lines.append("Agreement with people is not known: --calibrate 200 measures it.")
    return lines


def text_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], wrap: bool = False) -> Any:
    """A rich table whose cells are plain text: nothing in them is read as mark-up."""
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=Text(title), show_lines=wrap)
    for place, column in enumerate(head):
        shown.add_column(Text(column), justify="left" if place == 0 or wrap else "right", no_wrap=not wrap, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def decoding_text(decoding: Mapping[str, Any]) -> str:
    """How the texts were sampled: "T = 1, untruncated", or "T = 0.8, min-p 0.05"."""
    whole = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    cut = [f"{key.replace('_', '-')} {decoding[key]:g}" for key, value in whole.items() if decoding.get(key, value) != value]
    return f"T = {decoding['temperature']:g}, {', '.join(cut) or 'untruncated'}"


def print_table(summary: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=max(Console().width, 200))
    size = f"{summary['prompts']} held-out prompts, {summary['samples']} samples each, {decoding_text(summary['decoding'])}"
    for place, found in enumerate(result_tables(summary)):
        title = size if place == 0 else found.title
        console.print(text_table(title, ["model", *(column.short for column in found.columns)], found.rows))
    known = any(number(as_dict(entry).get("exact_kl")) is not None for entry in summary["models"].values())
    kl = f"exact KL to {label(reference_of(summary))} in nats a response" if known else "no exact KL of truncated samples"
    print(f"held-out reward: yardstick reward model, 95 % bootstrap over prompts; {kl}; EOS: share that ends")
    for line in judge_sentences(summary):
        print(line)


def shown_progress(items: Iterable[T], text: str, quiet: bool, total: int) -> Iterable[T]:
    """The items, with a progress bar and the time left unless quiet."""
    if quiet or not total:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, text, total=total, console=Console(stderr=True))
