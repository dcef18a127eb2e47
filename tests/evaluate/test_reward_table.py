"""The reward model's table: its arithmetic, and that no figure in it comes from a text or a group that was trained on."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from punster.config import RewardConfig
from punster.data import corpus
from punster.data.leakage import Index, jaccard, words
from punster.data.schema import texts_of
from punster.evaluate.metrics import auc
from punster.train.halves import halves_of

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes" / "reward-human.yaml")


@pytest.fixture(scope="module")
def table() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("reward_table", ROOT / "scripts" / "reward_table.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["reward_table"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def overlap(rows: list[dict[str, Any]], wanted: list[Any]) -> list[tuple[str, str]]:
    """(measure, group) wherever a training text is a measured one or a version of it (Jaccard >= .5)."""
    trained = Index([words(text) for text in sorted({text for row in rows for text in texts_of(row)})])
    found = []
    for measure in wanted:
        members = [(text, group) for a, b, group in measure.pairs for text in (a, b)]
        members += [(text, group) for text, _, group in measure.texts]
        near = {text: trained.has_near(text[1]) for text, _ in members}
        found += sorted({(measure.name, group) for text, group in members if near[text]})
    return found


def test_accuracy_and_area_by_hand(table: ModuleType) -> None:
    a, b, c = ("p", "a"), ("p", "b"), ("p", "c")
    scores = {a: 2.0, b: 1.0, c: 2.0}
    pairs = table.Measure("m", None, pairs=((a, b, "g"), (b, c, "g"), (a, c, "h")))
    found = table.figure(pairs, scores)
    assert found["value"] == pytest.approx(0.5) and found["groups"] == 2 and found["count"] == 3
    assert found["low"] == found["high"] == 0.5, "both groups are half right, however they are drawn"
    assert auc([(0.1, False), (0.4, False), (0.35, True), (0.8, True)]) == pytest.approx(0.75)
    assert auc([(1.0, True), (1.0, False)]) == 0.5
    labelled = table.Measure("m", None, texts=((a, True, "g"), (b, False, "h"), (c, False, "i")))
    assert table.figure(labelled, scores)["value"] == pytest.approx(0.75)


def test_naive_bayes_counts_one_and_two_grams(table: ModuleType) -> None:
    rows = [{"text": "good old pun", "is_pun": True}, {"text": "plain old text", "is_pun": False}]
    pun, plain, even = table.naive_bayes(rows)([("", "Good pun!"), ("", "plain text"), ("", "old")])
    assert pun > 0 > plain and even == pytest.approx(0)
    assert table.grams("It's a pun.") == ["it's", "a", "pun", "it's a", "a pun"]


def test_the_check_for_leaks_sees_a_version_of_a_trained_text(table: ModuleType) -> None:
    wanted = [table.Measure("m", None, pairs=((("p", "one two three four"), ("p", "something else here"), "group"),))]
    assert overlap([{"chosen": "One two, three five!", "rejected": "nothing"}], wanted) == [("m", "group")]
    assert overlap([{"chosen": "two six seven", "rejected": "nothing"}], wanted) == []


def test_what_is_left_out_with_a_source(table: ModuleType) -> None:
    rows: dict[str, dict[str, Any]] = {
        "own literal": {**corpus.preference_rows(("literal",))[0]}, "own group": {**corpus.groups()[0]},
        "template": {**corpus.template_rows()[0]}, "contrast": {**corpus.contrast_rows("literal")[0]},
        "davidbau": {"source": "davidbau_puns"}, "synonym": {"source": "puneval", "replaced_by": "x"}, "group": {"source": "puneval"},
    }  # fmt: skip
    left_out = {source: {name for name, row in rows.items() if table.from_source(row, source)}
                for source in ("davidbau_puns", "puneval", "embedded", "own")}  # fmt: skip
    assert left_out == {"davidbau_puns": {"davidbau"}, "puneval": {"synonym"}, "embedded": {"own literal", "own group"},
                        "own": {"own literal", "own group", "contrast"}}  # fmt: skip


def test_a_share_keeps_whole_groups(table: ModuleType) -> None:
    rows = [{"group": f"g{n // 2}", "chosen": f"text {n}", "rejected": "other"} for n in range(2000)]
    rows += [{"chosen": f"pun {n // 3}", "rejected": f"version {n}"} for n in range(3000)]
    kept = [row for row in rows if table.in_share(row, 0.25)]
    assert 0.22 * len(rows) < len(kept) < 0.28 * len(rows) and all(table.in_share(row, 1.0) for row in rows)
    whole = {row.get("group", row["chosen"]) for row in kept}
    assert len(kept) == sum(row.get("group", row["chosen"]) in whole for row in rows)
    assert all(table.in_share(row, 0.5) for row in kept)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--config", "r.yaml", "--share", "50"], "above 0 and at most 1, got 50"),
        (["--share", ".5"], "say how with --config"),
        (["--leave-out", "own", "runs/A"], "say how with --config"),
        (["--config", "r.yaml", "--folds", "5", "--share", ".5"], "goes with neither"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    given: list[str], said: str, table: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["reward_table.py", *given])
    with pytest.raises(SystemExit, match="2"):
        table.main()
    assert said in capsys.readouterr().err


def test_words_of_a_row_are_those_of_its_record(table: ModuleType) -> None:
    row = corpus.preference_rows(("literal",))[0]
    record = corpus.part("train")[0]
    assert "pun_word" not in row and table.row_words(row, corpus.by_id()) == {
        table.lemma(record[f"{name}_word"]) for name in ("pun", "alternative")
    }
    assert (
        table.row_words({"pun_word": "souls", "alternative_word": "sole"}, {}) == {"soul", "sole"}
        and table.row_words({}, {}) == set()
    )


def test_templates_are_matched_and_those_of_the_test_part_are_left_out_of_training() -> None:
    parts = {split: corpus.template_rows(split) for split in ("train", "test")}
    names = {split: {row["template"] for row in rows} for split, rows in parts.items()}
    assert not names["train"] & names["test"] and len(names["test"]) >= 6 and 2 * len(parts["test"]) >= 300
    for rows in parts.values():
        texts = [text for row in rows for text in texts_of(row)]
        assert len(set(texts)) == len(texts)
        gaps = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows]
        assert abs(sum(gaps)) / len(gaps) < 0.15, "neither side is given away by its length"
        longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows)
        assert 0.4 < longer < 0.6
        assert all(row["chosen"].split()[:2] == row["rejected"].split()[:2] for row in rows)
    trained = [words(text) for row in parts["train"] for text in texts_of(row)]
    assert all(jaccard(words(text), other) < 0.5 for row in parts["test"] for text in texts_of(row) for other in trained)


@pytest.mark.slow
def test_no_figure_comes_from_a_text_whose_group_was_trained_on(
    table: ModuleType, punster_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUNSTER_DATA", str(punster_data))
    from punster.config.parsing import parse
    from punster.data.mix import build
    from punster.data.pool import Pool, data_folder
    from punster.data.recipe import load_mixture
    from punster.data.split import lemma, part_of_id, part_of_lemma

    config: Any = parse("reward", RewardConfig, ["--config", RECIPE])
    assert config.data == ["human"], "own rows come through the mixture too, whose guard templates need"
    rows = mixed = table.training_rows(config)
    of = Counter(row.get("source", "own") for row in mixed if "replaced_by" in row)
    assert of["puneval"] > 2_000 and of["semeval2017_task7"] > 5_000
    assert sum(str(row.get("group")).startswith("contrast-") for row in mixed) > 13_000
    assert 40 <= sum(row.get("kind") == "template" for row in mixed) < 80
    assert {"literal", "synonym_swap", "homophone", "weak"} < {row.get("kind") for row in mixed}
    for name in config.pretrain:
        rows = rows + build(load_mixture(name))[0]
    measured = table.measures(Pool(data_folder()))
    assert len(measured) == 15 and all(measure.pairs or measure.texts for measure in measured)
    assert Counter(name for name, _ in overlap(rows, measured)) == {}
    # Groups, not only texts: SemEval ids and lemmas of pun words of the split, the cloze sentences, the corpus's pun words.
    assert {part_of_id(row["semeval_id"]) for row in mixed if row.get("semeval_id")} == {"train"}
    groups = {measure.name: {group for *_, group in (*measure.pairs, *measure.texts)} for measure in measured}
    lemmas = {part_of_lemma(group) for group in groups["SemEval pun or not, AUC"] if part_of_id(group) is None}
    assert "val" in lemmas and "train" not in lemmas
    assert not {row.get("sentence") for row in mixed} & groups["davidbau, punny over straight"]
    assert not {row.get("group") for row in mixed} & (groups["PunEval success, one prompt"] | groups["He crowd, gap >= .5, all"])
    contrasts = [row for kind in corpus.CONTRASTS for row in corpus.contrast_rows(kind)]
    trained = {lemma(row["pun_word"]) for row in (*corpus.part("train"), *contrasts)} | {
        lemma(row["alternative_word"]) for row in contrasts
    }
    of_record = {record["id"]: lemma(record["pun_word"]) for record in corpus.part("test")}
    for kind in ("literal", "synonym", "homophone in a plain text"):
        own = {of_record[group] for group in groups[f"own minimal pairs: {kind}"]}
        assert len(own) > 120 and not own & trained
    # The two halves of the rows, for a reward model and a yardstick: no text, no pun word and no word evoked in both.
    sides = halves_of(mixed)
    halves = [[row for row, half in zip(mixed, sides, strict=True) if half == side] for side in (1, 2)]
    assert all(20_500 < len(half) < 22_500 for half in halves) and len(mixed) - sum(map(len, halves)) < 700
    assert not set.intersection(*({frozenset(words(text)) for row in half for text in texts_of(row)} for half in halves))
    records = corpus.by_id()
    assert not set.intersection(*(set().union(*(table.row_words(row, records) for row in half)) for half in halves))
    # And the check itself sees a leak: one measured text among the training rows.
    leaked = measured[0].texts[0][0][1]
    assert overlap([{"text": leaked}], measured[:1]) != []


def test_folds_refuse_finished_runs(table: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["reward_table.py", "runs/a", "--config", "x.yaml", "--folds", "5"])
    with pytest.raises(SystemExit):
        table.main()
    assert "nor with finished runs" in capsys.readouterr().err
