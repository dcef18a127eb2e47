"""The report and the model card, on synthetic run folders, in text and in a real browser."""

from __future__ import annotations

import html
import json
import math
import random
import re
import shlex
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from punster.cli import main
from punster.errors import UserError
from punster.evaluate.card import blocks, md, sources_used, write_card
from punster.evaluate.folder import compared, differences, read_run, scrub
from punster.evaluate.report import frontier_figure, opening, write_comparison, write_report
from punster.evaluate.table import COLUMNS, show

MODELS = ("base", "sft", "ppo", "grpo", "dpo", "best_of_8")
PUNS = (
    "Bakers trade bread recipes on a knead-to-know basis.",
    "The tailor's jokes were sew-sew, but he had everyone in stitches by the end of the evening, seamstresses included.",
    "I would tell a joke about the sea, but it is too deep.",
)
HOSTILE = '<script>window.hacked=1</script></svg></table><img src=x onerror="window.hacked=1"> "\'`| $x$ \x1b[31mred\x1b[0m \x1b]8;;http://evil.example\x07link'


def interval(mean: float, half: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stage(folder: Path, verb: str, metrics: list[dict[str, float]], **config: Any) -> None:
    folder.mkdir(parents=True)
    shared = {
        "name": folder.name,
        "model": "smollm2-135m-instruct-q4",
        "lr": 3e-4,
        "batch_size": 16,
        "adapter": "lora",
        "data": ["embedded"],
    }
    (folder / "config.yaml").write_text(f"# punster {verb}\n" + yaml.safe_dump({**shared, **config}))
    lines(folder / "metrics.jsonl", [{"step": i, "seconds": 1.5 * i, **row} for i, row in enumerate(metrics, 1)])


def pipeline(root: Path, prompts: int = 24) -> Path:
    """What `punster run` leaves behind, with known numbers."""
    folder, noise = root / "demo", random.Random(1)
    drift = lambda n: [i / n for i in range(n)]
    stage(folder / "sft", "sft", [{"loss": 3 - 1.5 * t + noise.gauss(0, 0.1)} for t in drift(90)])
    for name in ("reward", "gold"):
        stage(folder / name, "reward", [{"loss": 0.69 - 0.4 * t, "accuracy": 0.5 + 0.4 * t} for t in drift(60)])
    for name in ("ppo", "grpo"):
        policy = [
            {"objective/scores": 1.7 * t, "objective/exact_kl": 9 * t, "objective/entropy_per_token": 2 - t, "length": 17 + t}
            for t in drift(20)
        ]
        stage(folder / name, name, policy, beta=0.02)
    stage(folder / "dpo", "dpo", [{"loss": 0.693 - 0.3 * t, "rewards/margins": 2 * t} for t in drift(50)], loss_type="sigmoid")
    models: dict[str, Any] = {}
    for i, name in enumerate(MODELS):
        kl = {"base": 6.25, "sft": 0.0, "best_of_8": None}.get(name, 4.0 + i)
        models[name] = {
            "held_out_reward": interval(-0.51 + 0.37 * i), "win_rate_vs_sft": None if name == "sft" else interval(0.4 + 0.06 * i, 0.03),
            "exact_kl": kl, "distinct_2": 0.91, "length": 14.3, "eos_rate": 0.987, "copy_rate": 0.0123,
        }  # fmt: skip
    models["best_of_8"]["kl_bound"] = 1.2044
    sizes = [1, 2, 4, 8, 16]
    summary = {
        "models": models, "prompts": 100, "samples": 4, "decoding": {"temperature": 1.0, "top_k": 0}, "wall_seconds": 1234.5, "seed": 1,
        "machine": {"cpu": "Some CPU", "cores": 2, "torch": "2.99.0"}, "commit": "0123456789abcdef0123456789abcdef01234567",
        "stages": {"sft": {"seconds": 61.0}, "ppo": {"seconds": 400.0}},
        "reward_models": {"reward": {"accuracy": {"literal": 0.813, "off_topic": 0.942}}, "gold": {"accuracy": {"literal": 0.777}}},
        "best_of_n": {"n": sizes, "gold": [0.1 * n**0.7 for n in sizes], "kl_bound": [math.log(n) - (n - 1) / n for n in sizes]},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text("# punster run\n" + yaml.safe_dump({"name": "demo", "model": "smollm2-135m-instruct-q4"}))
    rows = [{"prompt": f"make a pun about topic {p}", "model": m, "completions": [PUNS[(p + i) % 3], "Not the first."], "gold": [0.25 * i, 0.0]}
            for p in range(prompts) for i, m in enumerate(MODELS)]  # fmt: skip
    lines(folder / "samples.jsonl", rows)
    return folder


def single(root: Path) -> Path:
    """What `punster ppo` leaves behind."""
    folder = root / "mine"
    stage(folder, "ppo", [{"objective/scores": 0.1 * i, "objective/exact_kl": 0.2 * i} for i in range(5)], data=None)
    (folder / "summary.json").write_text(json.dumps({"steps": 5, "eval/score": 0.4375, "wall_seconds": 12.0}))
    rows = [{"step": 5, "prompt": "make a pun about bees", "completion": "Bee there.", "score": 0.5, "held_out": True},
            {"step": 1, "prompt": "make a pun about cows", "completion": "Moo.", "score": 0.1}]  # fmt: skip
    lines(folder / "samples.jsonl", rows)
    return folder


class Page(HTMLParser):
    """Tags with attributes, the visible text, and the cells of each table row."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.rows, self._skip, self._cell = "", [[]], False, False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skip = tag == "style"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._skip = False
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.text += data
            if self._cell:
                self.rows[-1][-1] += data

    def row(self, head: str) -> list[str]:
        return next([cell.strip() for cell in row] for row in self.rows if row and row[0].strip() == head)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def load(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(pipeline(tmp_path_factory.mktemp("report")))


# ---- the report -----------------------------------------------------------------------------------------------------
def test_numbers_of_a_pipeline_are_shown(report: Path) -> None:
    page = load(report)
    assert page.row("PPO")[1:] == ["+0.23 [+0.13, +0.33]", "52% [49%, 55%]", "6.0", "0.91", "14.3", "99%", "1.2%"]
    assert page.row("best-of-8")[3] == "≤ 1.20"
    assert page.row("SFT")[2:4] == ["–", "0.0"]
    assert page.row("literal") == ["literal", "81.3%", "77.7%"]
    assert page.row("off topic") == ["off topic", "94.2%", "–"]
    assert page.row("cpu")[1] == "Some CPU"
    assert page.row("torch")[1] == "2.99.0"  # as recorded by the run, not as installed
    lead = page.text[page.text.index("DPO has the highest") :]
    assert lead.startswith(
        "DPO has the highest gold reward of the trained models, 0.97 [0.87, 1.07] against -0.14 [-0.24, -0.04] of SFT"
    )
    assert "64% [61%, 67%] of comparisons with SFT" in lead
    assert "100 held-out prompts, 4 samples each; 20.6 minutes in all; seed 1." in lead
    assert "4-bit (Q4_1) copy" in page.text
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in page.text
    assert "First to last: SFT" in page.text
    assert "0.693 to 0.399" in page.text  # DPO's loss in the caption of its figure


def test_an_interval_across_one_half_is_called_no_improvement(tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    for mean, words in ((0.51, "so no improvement is shown"), (0.3, "so it is worse"), (0.9, None)):
        summary["models"]["dpo"]["win_rate_vs_sft"] = interval(mean, 0.05)
        (folder / "summary.json").write_text(json.dumps(summary))
        text = opening(read_run(folder))
        assert [w for w in ("so no improvement is shown", "so it is worse") if w in text] == ([words] if words else [])


def test_figures_tables_and_prompts(report: Path) -> None:
    page = load(report)
    assert len(page.all("figure")) == len(page.all("svg")) == len(page.all("figcaption")) == 10
    prompts = [row[0].strip() for row in page.rows if row and row[0].startswith("make a pun about topic")]
    assert prompts == [f"make a pun about topic {p}" for p in range(20)]
    assert PUNS[1] in page.row("make a pun about topic 0")[2]
    assert "Not the first." not in page.text
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    titles = {attributes["aria-labelledby"] for attributes in page.all("svg")}
    assert titles <= set(identifiers)
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_figures_hold_the_points_in_place(tmp_path: Path) -> None:
    """The frontier's error bars: a higher gold reward lies higher (smaller y), a larger KL further right."""
    run = read_run(pipeline(tmp_path))
    figure = frontier_figure(run)
    assert figure is not None
    places = {}
    for name in ("sft", "ppo", "grpo", "dpo"):
        group = re.search(
            rf'<use href="#[^"]*" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--hue{run.hue(name)}\); stroke', figure["svg"]
        )
        assert group is not None
        places[name] = (float(group[1]), float(group[2]))
    assert places["sft"][0] < places["ppo"][0] < places["grpo"][0] < places["dpo"][0]
    assert places["sft"][1] > places["ppo"][1] > places["grpo"][1] > places["dpo"][1]
    # 0 -> 6 -> 7 -> 8 nats on a square-root axis
    ratio = (places["dpo"][0] - places["sft"][0]) / (places["ppo"][0] - places["sft"][0])
    assert ratio == pytest.approx(math.sqrt(8 / 6), rel=0.01)


def test_nothing_is_loaded_from_anywhere(report: Path) -> None:
    page, text = load(report), report.read_text()
    assert not [t for t, _ in page.tags if t in ("script", "iframe", "img", "object", "embed", "base", "form")]
    assert not re.search(r"@import|url\(|javascript:", text)
    for tag, attributes in page.tags:
        assert "src" not in attributes
        assert not [a for a in attributes if a.startswith("on")]
        for name in ("href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#") or (tag, attributes[name]) == ("link", "data:,")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert str(report.parents[2]) not in text  # no folders of this machine


def test_text_of_samples_is_inert(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, prompts=0)
    lines(
        folder / "samples.jsonl",
        [{"prompt": HOSTILE, "model": m, "completions": [HOSTILE], "gold": [0.5]} for m in ("sft", HOSTILE)],
    )
    summary = json.loads((folder / "summary.json").read_text())
    summary["models"][HOSTILE] = {**summary["models"]["ppo"], "held_out_reward": interval(9.0)}
    summary["machine"][HOSTILE] = HOSTILE
    summary["reward_models"][HOSTILE] = {"accuracy": {HOSTILE: 0.5}}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines(folder / "ppo" / "metrics.jsonl", [{"step": 1, HOSTILE: 1}, {"step": 2, HOSTILE: 2}])
    path = write_report(folder)
    page, text = load(path), path.read_text()
    shown = scrub(HOSTILE)
    assert "\x1b" not in shown
    assert shown.endswith("red link")
    assert page.text.count(shown) >= 6  # as text, whole: prompt, samples, model, machine, opening, legend
    assert "\x1b" not in text
    assert "evil.example" not in text
    assert not [t for t, a in page.tags if t in ("script", "img") or any(k.startswith("on") for k in a)]
    assert len(page.all("svg")) == text.count("</svg>")
    card = write_card(folder).read_text()
    for raw in ("<script", "<img", "</svg>", "\x1b", "evil.example"):
        assert raw not in card
    # every table row keeps its number of cells: no pipe of a sample splits one
    table = [row for row in card.splitlines() if row.startswith("| ") and "window.hacked" in row]
    cells = {len(re.findall(r"(?<!\\)\|", row)) - 1 for row in table}
    assert cells == {3, 4, len(COLUMNS) + 1}  # samples: prompt and 2 models; accuracies: kind and 3 reward models; results


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"), ("\x1b]0;title\x07x", "x"), ("\x1b]8;;http://e.x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b31mred", "red"), ("\x9d0;title\x9cx", "x"), ("\x1bPq#0\x1b\\x", "x"), ("\x1b[2J\x1b(Bx", "x"), ("a\x00b\x08c\rd\x7f", "abcd"),
        ("\u202etxt\u2066", "txt"), ("tab\tline\n", "tab\tline\n"), ("caf\u00e9 \U0001f600", "caf\u00e9 \U0001f600"), ("\ud800x", "?x"),
        ("end\x1b", "end"), ("\x1b]unfinished", "unfinished"),
    ],
)  # fmt: skip
def test_control_sequences_are_stripped(given: str, left: str) -> None:
    assert scrub(given) == left
    assert scrub({given: [given, 1, None]}) == {left: [left, 1, None]}


def test_missing_and_damaged_parts_are_left_out(tmp_path: Path) -> None:
    full = pipeline(tmp_path / "full")
    for parts in (["summary.json"], ["samples.jsonl", "config.yaml", "dpo"], ["sft", "reward", "gold", "ppo", "grpo"]):
        folder = tmp_path / parts[0] / "demo"
        shutil.copytree(full, folder)
        for part in parts:
            shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()
        page, card = load(write_report(folder)), write_card(folder).read_text()
        assert ("PPO" in [r[0] for r in page.rows if r]) == ("summary.json" not in parts)
        assert ("make a pun about topic 1" in page.text) == ("samples.jsonl" not in parts)
        assert ("Loss of supervised" in page.text) == ("sft" not in parts)
        assert ("Margins of DPO" in page.text) == ("- **DPO**" in card) == ("dpo" not in parts)
    bare = tmp_path / "bare" / "demo"
    bare.mkdir(parents=True)
    page = load(write_report(bare))
    assert not page.all("figure")
    assert page.text.count("demo") >= 2
    write_card(bare)
    with pytest.raises(UserError, match="no such run"):
        write_report(tmp_path / "nothing")


def test_damaged_files_and_odd_values(tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    with (folder / "grpo" / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 21, "objective/scores": NaN}\n[1]\n{"step": 22, "objec')
    (folder / "ppo" / "config.yaml").write_text("# punster ppo\n: [")
    (folder / "reward" / "summary.json").write_text("{")
    with (folder / "samples.jsonl").open("a") as handle:
        handle.write(
            '{"prompt": [{"role": "user", "content": "chat pun"}], "model": "sft", "completions": [], "gold": 3}\n"x"\n{'
        )
    summary = json.loads((folder / "summary.json").read_text())
    summary["models"] |= {"odd": {"held_out_reward": 3, "exact_kl": float("nan"), "win_rate_vs_sft": "?"}, "none": None}
    summary["best_of_n"]["gold"] = [None, 1.0, "x"]
    summary["stages"] = summary["decoding"] = None
    (folder / "summary.json").write_text(json.dumps(summary))
    page = load(write_report(folder))
    assert page.row("odd") == ["odd", "+3.00", *["–"] * 6]
    assert page.row("none") == ["none", *["–"] * 7]
    for found in ({"kl": [0, 1]}, {"kl": 3}, {"kl": [0, 1], "proxy": [0, "x"], "gold": [0, 1]}):
        (folder / "summary.json").write_text(json.dumps(summary | {"over_optimisation": found}))
        assert "Over-optimisation" not in load(write_report(folder)).text
    law = {"kl": [0, 1], "proxy": [0, 1], "gold": [0, 1], "fit_gold": {"a": 1}, "best_of_n": {"kl": [1]}}
    (folder / "summary.json").write_text(json.dumps(summary | {"over_optimisation": law}))
    assert "Over-optimisation" in load(write_report(folder)).text  # the points, without the curves that are damaged
    assert "nan" not in page.text.lower()
    assert "Reward while training" in page.text
    write_card(folder)


def test_run_of_a_single_verb(tmp_path: Path) -> None:
    folder = single(tmp_path)
    page = load(write_report(folder))
    assert "A run of punster ppo over 5 steps; reward while training: 0 at first, 0.4 at last." in page.text
    assert page.row("eval/score")[1] == "0.4375"
    assert page.row("make a pun about bees") == ["make a pun about bees", "Bee there.", "0.50"]
    assert "cows" not in page.text  # an earlier step, and not held out
    assert len(page.all("figure")) == 2
    assert "punster ppo --config" in page.text
    card = write_card(folder).read_text()
    assert "| Bee there. |" in card
    assert f"punster generate {folder.parent.name}/mine" in card


def test_the_report_is_the_same_twice(tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    first = write_report(folder).read_bytes()
    card = write_card(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert write_card(folder).read_bytes() == card
    assert not list(folder.glob(".*.part"))


JUDGED = {
    "endpoint": "http://127.0.0.1:8000/v1", "model": "some-judge", "pairs": 500, "answers": 3200, "consistency": 0.71, "first_position": 0.58,
    "tie_rate": 0.31, "unusable": 0.004, "wording_disagreement": {"pairs": 0.12, "pun": 0.06},
    "calibration": {"texts": 200, "pun": interval(0.7), "neutral": interval(0.66)},
}  # fmt: skip


def judged(folder: Path) -> Path:
    """The pipeline's folder with the results of a judge."""
    summary = json.loads((folder / "summary.json").read_text())
    for i, name in enumerate(MODELS):
        found = {"rating": interval(900 + 40 * i, 60), "pun_rate": interval(0.3 + 0.05 * i), "funniness": interval(1.5)}
        if name != "sft":
            found |= {"win_rate": interval(0.4 + 0.05 * i), "wins": 40 + i, "ties": 20, "losses": 40 - i, "sign_test": 0.0213}
        summary["models"][name]["judge"] = found
    (folder / "summary.json").write_text(json.dumps({**summary, "judge": JUDGED}))
    return folder


def test_what_the_judge_found_is_shown_with_what_is_known_of_it(tmp_path: Path) -> None:
    folder = judged(pipeline(tmp_path))
    page, card = load(write_report(folder)), write_card(folder).read_text()
    heads = next(row for row in page.rows if "Won" in row)
    row = [row for row in page.rows if row and row[0].strip() == "PPO"][1]
    shown = dict(zip(heads, row, strict=True))
    assert shown["Win rate against SFT"] == "50% [40%, 60%]"
    assert [shown[head] for head in ("Won", "Tied", "Lost", "Sign test, p", "Is a pun")] == [
        "42",
        "20",
        "38",
        "0.021",
        "40% [30%, 50%]",
    ]
    assert "Coherence" not in heads  # nobody has a value
    for words in ("(consistency): 71%", "shown first wins 58%", "ties: 31%", "0.70 [0.60, 0.80]", "some-judge"):
        assert words in page.text
        assert md(words) in card


# ---- several runs -----------------------------------------------------------------------------------------------------
def test_several_runs_share_one_page(tmp_path: Path) -> None:
    first = judged(pipeline(tmp_path / "a"))
    second = (tmp_path / "b").joinpath("second")
    pipeline(tmp_path / "b").rename(second)
    config = second / "ppo" / "config.yaml"
    config.write_text(config.read_text().replace("beta: 0.02", "beta: 0.5"))
    page = load(write_comparison([first, second], tmp_path / "page.html"))
    models = [row[0] for row in page.rows if row and row[0].endswith((": PPO", ": SFT"))]
    assert models[:4] == ["demo: SFT", "demo: PPO", "second: SFT", "second: PPO"]
    assert page.row("ppo.beta") == ["ppo.beta", "0.02", "0.5"]
    assert [row[0] for row in page.rows if row and row[0].startswith("ppo.")] == ["ppo.beta"]
    assert page.row("literal") == ["literal", *["81.3%", "77.7%"] * 2]
    assert page.text.count("demo: Judge some-judge") == 1
    assert "First to last: demo: PPO 0 to 1.61" in page.text and "second: PPO 0 to 1.61" in page.text
    assert PUNS[1] in page.row("make a pun about topic 0")[2]
    colours = {run.hues[name] for run in [compared([read_run(first), read_run(second)])] for name in ("demo: PPO", "second: PPO")}
    assert len(colours) == 2
    run = compared([read_run(first), read_run(second)])
    judges = [f"{owner}: {name}" for owner in ("demo", "second") for name in ("reward", "gold")]
    assert {stage.name for stage in run.stages if stage.verb == "reward"} == set(judges), judges
    assert len({run.hue(name) for name in judges}) == 4


def test_a_comparison_of_texts_and_the_base_claims_no_best_model(tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "config.yaml").write_text("# punster evaluate\nmodels: [base, theirs.jsonl]\n")
    theirs = summary["models"]["ppo"] | {"eos_rate": None}
    summary["models"] = {"base": summary["models"]["base"], "sft": summary["models"]["sft"], "theirs": theirs}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = load(write_report(folder)).text
    assert "A comparison of base, SFT, theirs; no trained model was compared with another." in " ".join(text.split())
    assert "has the highest" not in text and "A pipeline" not in text


def test_a_stage_that_stopped_itself_says_so(tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    stopped = {"steps": 6, "aborted": "exact KL 31.0 nats a response, above --max-kl 30", "aborted_at": 7, "wall_seconds": 3.0}
    (folder / "ppo" / "summary.json").write_text(json.dumps(stopped))
    sentence = "stopped itself at step 7 (exact KL 31.0 nats a response, above --max-kl 30) and is back at step 6"
    assert f"PPO {sentence}" in opening(read_run(folder))
    assert sentence in write_card(folder).read_text()


def test_a_comparison_inside_a_run_is_no_stage_of_it(tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    before = [one.name for one in read_run(folder).stages]
    (folder / "eval").mkdir()
    (folder / "eval" / "config.yaml").write_text("# punster evaluate\nprompts: mine.jsonl\n")
    assert [one.name for one in read_run(folder).stages] == before
    assert "mine.jsonl" not in write_card(folder).read_text()


def test_where_runs_lie_does_not_make_them_differ(tmp_path: Path) -> None:
    folders = [pipeline(tmp_path / name) for name in ("a", "b")]
    for folder, beta in zip(folders, (0.1, 0.2), strict=True):
        for verb, actor in (("ppo", folder / "sft"), ("dpo", folder / "sft")):
            told = {"name": verb, "out": str(folder), "actor": str(actor), "beta": beta if verb == "ppo" else 1}
            (folder / verb / "config.yaml").write_text(f"# punster {verb}\n" + yaml.safe_dump(told))
        told = {"name": folder.name, "out": str(folder.parent)}
        (folder / "config.yaml").write_text("# punster run\n" + yaml.safe_dump(told))
    assert differences([read_run(folder) for folder in folders]) == [["ppo.beta", "0.1", "0.2"]]


def test_a_comparison_repeats_its_own_command_and_a_reference_is_no_candidate(tmp_path: Path) -> None:
    folders = [pipeline(tmp_path / "a b"), pipeline(tmp_path / "c")]
    page = write_comparison(folders, tmp_path / "page.html").read_text()
    shown = " ".join(shlex.quote(read_run(folder).shown) for folder in folders)
    command = page.split('<pre tabindex="0">')[1].split("</pre>")[0]
    assert html.unescape(command) == f"punster report {shown}"
    summary = json.loads((folders[1] / "summary.json").read_text())
    (folders[1] / "summary.json").write_text(json.dumps(summary | {"reference": "dpo"}))  # the best of the trained models
    text = load(write_report(folders[1])).text
    assert "DPO has the highest" not in text and "comparisons with DPO" in text
    assert "Win rate against DPO" in text and "Win rate against SFT" not in text


def test_single_runs_and_runs_of_one_name_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        folders.append(str(single(tmp_path / place)))
    assert main(["report", *folders]) == 0
    out = Path(capsys.readouterr().out.strip())
    assert out == tmp_path / "x" / "comparison.html"
    page = load(out)
    assert "x/mine" in page.text and "y/mine" in page.text
    assert len(page.all("figure")) == 2
    assert main(["report", *folders, "--out", str(tmp_path / "c.html")]) == 0
    assert (tmp_path / "c.html").stat().st_size > 2000
    assert main(["report", folders[0], str(tmp_path / "none")]) == 2


# ---- the card -------------------------------------------------------------------------------------------------------
def test_card(tmp_path: Path) -> None:
    text = write_card(pipeline(tmp_path)).read_text()
    _, head, body = text.split("---\n", 2)
    parsed = yaml.safe_load(head)
    assert parsed["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert parsed["base_model_relation"] == "adapter"
    assert parsed["library_name"] == "punster"
    assert parsed["license"] == "apache-2.0"
    assert {"ppo", "dpo", "puns"} <= set(parsed["tags"])
    assert "| DPO | +0.97 \\[+0.87, +1.07\\] | 64% \\[61%, 67%\\] | 8.0 |" in body
    wanted = ["How to load", "Results", "Samples", "Curves", "Method", "Data and what their licences allow", "Limits", "Hyper-parameters",
              "Commands", "Versions and machine"]  # fmt: skip
    assert re.findall(r"^## (.+)$", body, re.MULTILINE) == wanted
    for words in ("4-bit (Q4\\_1) copy", "--model HuggingFaceTB/SmolLM2-135M-Instruct", "MIT licence", "offensive", "English", "- torch: 2.99.0",
                  "git checkout 0123456789abcdef", "demo/config.yaml --name again", "/demo/gold --samples 4 --best-of 8", "| `lr` | 0.0003 |"):  # fmt: skip
        assert words in body
    assert f"punster generate {tmp_path.name}/demo/dpo " in body  # the best trained model
    assert str(tmp_path) not in text


def test_curves_and_licences_in_the_card(tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    assert "| Reward while training | PPO | ▁▁▂▂▂▃▃▄▄▄▅▅▅▆▆▇▇▇██ | 0 | 1.61 |" in write_card(folder).read_text()
    assert blocks([3.0, 3.0]) == "▄▄"
    assert blocks([0.0] * 50 + [1.0] * 50, 4) == "▁▁██"
    stage(tmp_path / "public", "sft", [{"loss": 1.0}], data=["puns"])
    text = write_card(tmp_path / "public").read_text()
    assert re.search(r"- SemEval-2017 Task 7 \(.*\): .*NonCommercial; not for commercial use", text)
    assert "the user's own data" not in text
    assert yaml.safe_load(text.split("---\n", 2)[1])["license"] == "other"
    stage(tmp_path / "judged", "reward", [{"loss": 1.0}], data=["human"])
    text = write_card(tmp_path / "judged").read_text()
    assert (
        "not for commercial use" in text
        and "Contrasts of punster" in text
        and "Embedded corpus" in text
        and "own data" not in text
    )


def test_the_card_of_the_demo_names_its_own_data(tmp_path: Path) -> None:
    from punster.train.pipeline import load_recipe, stage_config

    demo = load_recipe("demo")
    for name in ("reward", "gold"):
        data = vars(stage_config(demo, name))["data"]
        stage(tmp_path / name, "reward", [{"loss": 1.0}], data=data)
        text = write_card(tmp_path / name).read_text()
        assert "Contrasts of punster" in text and "Embedded corpus" in text and "own data" not in text
        assert yaml.safe_load(text.split("---\n", 2)[1])["license"] == "apache-2.0"


def test_card_of_own_data_and_local_base(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    stage(folder, "sft", [{"loss": 1.0}], model=str(tmp_path / "weights"), data=[str(tmp_path / "puns.jsonl")])
    text = write_card(folder).read_text()
    head = yaml.safe_load(text.split("---\n", 2)[1])
    assert "base_model" not in head
    assert head["license"] == "other"
    assert "`puns.jsonl`: the user's own data" in text
    assert "Embedded corpus" not in text
    assert "4-bit" not in text
    stage(tmp_path / "judge", "reward", [{"loss": 1.0}])
    assert "A reward model of puns" in write_card(tmp_path / "judge").read_text()
    stage(tmp_path / "gpt2", "sft", [{"loss": 1.0}], model="gpt2")
    head = yaml.safe_load(write_card(tmp_path / "gpt2").read_text().split("---\n", 2)[1])
    assert (head["base_model"], head["license"]) == ("openai-community/gpt2", "mit")


def test_words_and_numbers() -> None:
    assert show({"mean": 0.5, "low": 0.25, "high": 0.75}) == "0.50 [0.25, 0.75]"
    assert show({"mean": 0.5, "low": 0.25}, 0, percent=True) == "50%"
    assert [show(v) for v in (None, float("inf"), True, "1", {})] == ["–"] * 5
    assert md("a|b *c* <d> `e` [f](http://g.h)\nnext") == r"a\|b \*c\* &lt;d&gt; \`e\` \[f\](http&#58;//g.h) next"


# ---- a real browser -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser() -> Any:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if program is None:
        # A browser is a system package that pip cannot install.
        pytest.skip("no chromium found: the report is not rendered in a browser")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.mark.parametrize("kind", ["pipeline", "single", "hostile", "comparison"])
def test_in_a_browser(browser: Any, tmp_path: Path, kind: str) -> None:
    folder = single(tmp_path) if kind == "single" else pipeline(tmp_path)
    if kind == "hostile":
        rows = [
            {"prompt": HOSTILE + "x" * 300, "model": m, "completions": [HOSTILE + "y" * 300], "gold": [1]}
            for m in (*MODELS, HOSTILE)
        ]
        lines(folder / "samples.jsonl", rows)
    address = write_report(folder).as_uri()
    if kind == "comparison":
        shutil.copytree(judged(folder), tmp_path / "another")
        address = write_comparison([folder, tmp_path / "another"], tmp_path / "page.html").as_uri()
    for scheme, width in (("light", 390), ("dark", 390), ("light", 1280)):
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        messages: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message, kept=messages: kept.append(message.text))
        page.on("pageerror", lambda error, kept=messages: kept.append(str(error)))
        page.on("request", lambda request, kept=requests: kept.append(request.url))
        page.goto(address)
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert messages == []
        assert [url for url in requests if url not in (address, "data:,")] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("window.hacked") is None
        body = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert body == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
        # Figures are drawn, fill their column, and their text has the contrast of the page's.
        for box in page.locator("figure svg").all():
            size = box.bounding_box()
            assert size is not None
            assert size["width"] > 250
            assert size["height"] > 120
        ink = page.evaluate("[...document.querySelectorAll('figure svg text')].map(t => getComputedStyle(t).fill)")
        assert set(ink) == {page.evaluate("getComputedStyle(document.body).color")}
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height))"
        )
        assert smallest > 9
        # Nothing of a figure, legends included, is cut off at its edge; names of 300 letters cannot fit.
        cut = page.evaluate("""[...document.querySelectorAll('figure svg')].filter(s => { const b = s.getBoundingClientRect();
            return [...s.querySelectorAll('text')].some(t => { const r = t.getBoundingClientRect();
                return r.left < b.left - 2 || r.right > b.right + 2 || r.bottom > b.bottom + 2 }) }).length""")
        assert cut == 0 or kind == "hostile"
        if kind != "single" and width == 390:
            wide = page.locator(".scroll:has(.puns)")
            assert wide.evaluate("e => e.scrollWidth > e.clientWidth")  # the table scrolls, the page does not
        page.close()


def licence_of(folder: Path) -> str:
    return str(yaml.safe_load(write_card(folder).read_text().split("---\n", 2)[1])["license"])


def test_a_card_knows_what_the_runs_before_it_learned_from(tmp_path: Path) -> None:
    stage(tmp_path / "open", "sft", [{"loss": 1.0}])
    stage(tmp_path / "puns", "sft", [{"loss": 1.0}], data=["puns"])
    stage(tmp_path / "judge", "reward", [{"loss": 1.0}], pretrained=str(tmp_path / "open"), pretrain=["votes"])
    chained = {"a": ("open", None), "b": ("puns", None), "c": ("open", "judge"), "d": ("gone", None)}
    for name, (actor, judge) in chained.items():
        model = str(tmp_path / judge) if judge else None
        stage(tmp_path / name, "ppo", [{"loss": 1.0}], actor=str(tmp_path / actor), reward_model=model, prompts="embedded")
    assert [licence_of(tmp_path / name) for name in chained] == ["apache-2.0", "other", "other", "other"]
    assert "SemEval-2017 Task 7" in (tmp_path / "b" / "README.md").read_text()
    assert "`gone (a run that is not here)`" in (tmp_path / "d" / "README.md").read_text()
    stage(tmp_path / "moved" / "sft", "sft", [{"loss": 1.0}])
    stage(tmp_path / "moved" / "ppo", "ppo", [{"loss": 1.0}], actor="elsewhere/moved/sft")
    assert licence_of(tmp_path / "moved" / "ppo") == "apache-2.0"  # found beside it
    stage(tmp_path / "moved" / "other", "ppo", [{"loss": 1.0}], actor="elsewhere/else/sft")
    assert licence_of(tmp_path / "moved" / "other") == "other"  # another run of that name
    stage(tmp_path / "mixed", "ppo", [{"loss": 1.0}], actor="base", sft_coef=0.1, sft_data=["puns"])
    stage(tmp_path / "unmixed", "ppo", [{"loss": 1.0}], actor="base", sft_coef=0.0, sft_data=["puns"])
    assert [licence_of(tmp_path / name) for name in ("mixed", "unmixed")] == ["other", "apache-2.0"]


def test_a_card_of_trained_weights_offers_what_can_be_exported(tmp_path: Path) -> None:
    stage(tmp_path / "full", "sft", [{"loss": 1.0}], adapter="none")
    text = write_card(tmp_path / "full").read_text()
    assert "--format hf --out exported" in text and "PeftModel" not in text and 'from_pretrained("exported")' in text


def test_a_card_quotes_its_folder_for_the_shell_and_for_python(tmp_path: Path) -> None:
    stage(tmp_path / 'my "own" run', "sft", [{"loss": 1.0}])
    text = write_card(tmp_path / 'my "own" run').read_text()
    place = f'{tmp_path.name}/my "own" run'
    assert f"punster generate '{place}' " in text
    assert f"model = load({json.dumps(place)})" in text
    folder = pipeline(tmp_path)
    (folder / "summary.json").unlink()  # interrupted: no model is known to be the best, so the last stage is shown
    stage(folder / "zz bob's", "ppo", [{"loss": 1.0}])
    text = write_card(folder).read_text()
    place = f"{tmp_path.name}/demo/zz bob's"
    assert f"punster generate {shlex.quote(place)} " in text and f"punster export {shlex.quote(place)} " in text
    assert f"model = load({json.dumps(place)})" in text
    assert f" {shlex.quote(place)} --gold " in next(line for line in text.splitlines() if line.startswith("punster evaluate"))


def test_the_commands_repeat_the_evaluation_as_it_was(tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    saved |= {
        "seed": 1,
        "dtype": "fp32",
        "evaluate": {
            "x; touch y #": "a",
            "judge": "a\n```",
            "seed": 3,
            "limit": 100,
            "samples": 4,
            "best_of": 8,
            "pool": 10,
            "max_new_tokens": 32,
            "call_puns": True,
            "quiet": False,
        },
    }
    (folder / "config.yaml").write_text("# punster run\n" + yaml.safe_dump(saved))
    line = next(line for line in write_card(folder).read_text().splitlines() if line.startswith("punster evaluate"))
    assert "--quiet" not in line and "touch" not in line and "--judge" not in line
    for part in (
        "--call-puns",
        "--limit 100",
        "--samples 4",
        "--best-of 8",
        "--pool 10",
        "--max-new-tokens 32",
        "--seed 3",
        "--dtype fp32",
    ):
        assert f"{part} " in f"{line} ", line
    assert line.count("--best-of") == line.count("--samples") == line.count("--limit") == 1


def test_data_of_ones_own_under_the_name_of_ours_are_not_ours(tmp_path: Path) -> None:
    """A folder "puns" elsewhere, or somebody's data set of that name, is no source of punster's."""
    for place, (data, ours) in enumerate(
        (("puns", True), ("corpora/puns", False), ("someone/embedded", False), ("embedded", True))
    ):
        stage(tmp_path / f"run{place}", "sft", [{"loss": 1.0}], data=[data])
        found = sources_used(read_run(tmp_path / f"run{place}"))
        assert list(found) == [data] and bool(found[data]) == ours
