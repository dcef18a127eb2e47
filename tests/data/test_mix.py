"""Mixtures: what goes in, what the guard keeps out, what is stated; and the two default mixtures from the local copies."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mini import PUNS, make

from punster.data import corpus
from punster.data.leakage import jaccard, words
from punster.data.mix import build, mixture, told
from punster.data.pool import Pool, embedded_evaluation
from punster.data.prompts import pun_word_share, topic_key
from punster.data.recipe import Ingredient, Recipe, load_mixture
from punster.data.schema import check_row, texts_of
from punster.errors import UserError


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("sources"))


@pytest.fixture(autouse=True)
def no_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own files are compared with the texts of all copies that are at hand, and to read the real ones takes long."""
    monkeypatch.setenv("PUNSTER_DATA", str(tmp_path / "nowhere"))


def sft(mini: Path, *sources: str, **settings: Any) -> tuple[list[dict], dict]:
    return build(Recipe("sft", parts=[Ingredient(source, use="puns") for source in sources], **settings), mini)


def test_sft_takes_puns_of_the_training_part_with_prompts(mini: Path) -> None:
    rows, statement = sft(mini, "semeval2017_task7", "cup_context_situated")
    assert {row["id"] for row in rows} == {"hom_10", "hom_100", "het_1", "line2"}
    for row in rows:
        check_row(row, "sft", "here")
    assert statement["rows"] == 4 and statement["by_source"] == {"semeval2017_task7": 3, "cup_context_situated": 1}
    assert statement["not_open"] == ["CC BY 4.0, part CC BY-NC 4.0: treat as NonCommercial", "CC BY-NC 4.0"]
    assert rows == sft(mini, "semeval2017_task7", "cup_context_situated")[0]  # drawn with a seed


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """Short jokes of which three are versions of evaluation texts: SemEval's, the embedded corpus's, a held-out cloze's."""
    root = make(tmp_path / "sources")
    val = PUNS["hom_1013"][0].replace(" ,", "") + " Again."
    ours = corpus.part("test")[0]["pun"] + " Indeed."
    held = next(row["chosen"] for row in Pool(root).rows("davidbau_puns", "val"))
    jokes = [val, ours, held + " Ha.", "I like lamps, they lighten up."]
    body = "".join(f'{i},"{joke.replace(chr(34), chr(39))}"\n' for i, joke in enumerate(jokes, 1))
    (root / "short_jokes" / "reddit-cleanjokes.csv").write_text("ID,Joke\n" + body, encoding="utf-8")
    return root


def test_planted_leaks_are_found_and_counted(leaky: Path) -> None:
    parts = [Ingredient("short_jokes", use="texts")]
    rows, statement = build(Recipe("sft", parts=parts), leaky)
    assert [row["completion"] for row in rows] == ["I like lamps, they lighten up."]
    # The SemEval one was put into the val part on reading, so two are left for the guard.
    assert statement["parts"][0]["dropped"] == {"near to an evaluation text": 2} and statement["parts"][0]["read"] == 3


def test_with_the_guard_off_planted_leaks_get_in(leaky: Path) -> None:
    """The counter-check: what the guard test shows is the guard's work."""
    rows, _ = build(Recipe("sft", guard=False, parts=[Ingredient("short_jokes", use="texts")]), leaky)
    assert len(rows) == 3


def test_preferences(mini: Path) -> None:
    parts = [
        Ingredient("puneval", use="groups", gap=0.5, margin=0.25), Ingredient("puneval", use="pairs"),
        Ingredient("pungen_he2019", ids="crowd/", gap=0.5, cap=2), Ingredient("davidbau_puns", weight=2.0, filter=True),
        Ingredient("expunations", use="ratings", by="rating_z", gap=0.1), Ingredient("embedded", limit=5),
    ]  # fmt: skip
    rows, statement = build(Recipe("preference", guard=False, parts=parts), mini)
    for row in rows:
        check_row(row, "preference", "here")
    taken = {f"{p['part']} {p['use']}": p["taken"] for p in statement["parts"]}
    train_cloze = len(Pool(mini).rows("davidbau_puns", "train"))
    # Two training items of PunEval: of each the human text beats method 0; its copy was recited.
    assert taken == {"puneval groups": 2, "puneval pairs": 4, "pungen_he2019 ": 2, "davidbau_puns ": 2 * train_cloze,
                     "expunations ratings": 0, "embedded ": 5}  # fmt: skip
    assert sum(taken.values()) == len(rows) == statement["rows"]
    assert {row["margin"] for row in rows if row["source"] == "puneval" and "group" in row} == {0.3}


def test_a_part_can_be_asked_for_generically(mini: Path) -> None:
    parts = [Ingredient("embedded", use="literal", generic=True), Ingredient("puneval", use="groups", gap=0.5)]
    rows, _ = build(Recipe("preference", guard=False, parts=parts), mini)
    prompts = {source: {row["prompt"] for row in rows if row.get("source", "own") == source} for source in ("own", "puneval")}
    assert prompts["own"] == {"make a pun"} and "make a pun" not in prompts["puneval"]


def test_a_pass_may_draw_a_share_of_a_part(mini: Path) -> None:
    parts = [Ingredient("embedded", use="literal", pass_share=0.25), Ingredient("puneval", use="groups", gap=0.5)]
    rows, statement = build(Recipe("preference", guard=False, parts=parts), mini)
    told_of = [line for line in told(statement) if "a pass draws 25% of their families" in line]
    assert len(told_of) == 1 and "embedded literal" in told_of[0]
    assert {(row.get("source"), row.get("pass_share")) for row in rows} == {(None, 0.25), ("puneval", None)}


def test_kao_is_never_trained_on_and_recipes_are_checked(tmp_path: Path, mini: Path) -> None:
    cases = {
        "kind: preference\nparts: [{source: kao_puns}]": "part 1: kao_puns is for the validation of metrics only",
        "kind: preference\nparts: [{source: kao_pun}]": "unknown source 'kao_pun'. Did you mean kao_puns",
        "kind: poetry\nparts: [{source: embedded}]": "kind must be one of sft, preference, prompt",
        "kind: sft\npart: []": "unknown key 'part'. Did you mean parts",
        "kind: sft\nparts: []": "'parts' must be a list",
        "kind: sft\nparts: [{source: embedded, file: x}]": "part 1: give either a source or a file",
        "kind: sft\nparts: [{source: embedded, weight: heavy}]": "part 1: weight must be a number, found 'heavy'",
        "kind: sft\nparts: [{source: embedded, weight: 0}]": "weight must be above 0",
        "kind: sft\nparts: [{source: embedded, weight: .inf}]": "part 1: weight must be a number, found inf",
        "kind: sft\nparts: [{source: embedded, limit: 2.5}]": "part 1: limit must be a whole number, found 2.5",
        "kind: sft\nparts: [{source: embedded, filter: maybe}]": "part 1: filter must be true or false",
        "kind: sft\nparts: [{file: x.csv, columns: prompt=q}]": "part 1: columns must be a list of texts",
        "kind: sft\nguard: 0.7\nparts: [{source: embedded}]": "guard must be true or false",
        "kind: sft\nrepeats: 2\nparts: [{source: embedded}]": "repeats must lie in [0, 1]",
        "kind: preference\nparts: [{source: rjokes, use: ratings, cap: 0}]": "cap must be at least 1",
        "kind: sft\nparts: [{source: embedded, generic: true}]": "part 1: generic is for kind: preference",
        "kind: preference\nparts: [{source: embedded, pass_share: 0}]": "part 1: pass_share must lie in [.01, 1]",
        "kind: preference\nparts: [{source: embedded, pass_share: 3}]": "part 1: pass_share must lie in [.01, 1]",
        "kind: sft\nparts: [{source: embedded, pass_share: .5}]": "pass_share must lie in [.01, 1], and is for kind: preference",
        "kind: preference\nparts: [{source: embedded, use: literal, columns: [prompt=x]}]": "part 1: columns is for files",
        "kind: preference\nparts: [{source: embedded, use: literal, margin: 3}]": "margin is for pairs made of groups or ratings",
        "kind: sft\nparts: [3]": "part 1: expected a mapping",
        "kind: sft\nparts: [": "line 2: not YAML",
        "- a": "expected a mapping",
    }
    for content, message in cases.items():
        (tmp_path / "r.yaml").write_text(content)
        with pytest.raises(UserError) as raised:
            load_mixture(str(tmp_path / "r.yaml"))
        assert message in str(raised.value)
    with pytest.raises(UserError, match=r"unknown mixture 'pun'\. Did you mean puns"):
        load_mixture("pun")


def test_a_part_that_finds_nothing_in_its_source_is_refused(mini: Path) -> None:
    texts = r"rjokes: use: puns finds nothing among \d+ train rows; use: texts takes what is no pun"
    cases: list[tuple[str, Recipe]] = [
        (texts, Recipe("sft", parts=[Ingredient("rjokes", use="puns")])),
        (
            r"davidbau_puns: the default use finds nothing among \d+ train rows$",
            Recipe("sft", parts=[Ingredient("davidbau_puns")]),
        ),
        (r"kao_puns: no id of \d+ val rows begins 'none'$", Recipe("sft", "val", parts=[Ingredient("kao_puns", ids="none")])),
    ]
    for message, recipe in cases:
        recipe.parts.append(Ingredient("embedded"))  # the others do not hide it
        with pytest.raises(UserError, match=message):
            build(recipe, mini)


def test_files_and_the_embedded_corpus_need_no_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNSTER_DATA", str(tmp_path / "nowhere"))
    (tmp_path / "mine.jsonl").write_text(json.dumps({"question": "make a pun", "completion": "my own words"}) + "\n")
    (tmp_path / "r.yaml").write_text(
        "kind: sft\nparts:\n- {file: mine.jsonl, columns: [prompt=question], weight: 3}\n- {source: embedded, weight: .5}\n"
    )
    recipe = load_mixture(str(tmp_path / "r.yaml"))
    rows, statement = build(recipe)
    assert Counter(row["completion"] for row in rows)["my own words"] == 3  # a weight is no repeat
    recipe.repeats = 0
    rows, statement = build(recipe)
    assert Counter(row["completion"] for row in rows)["my own words"] == 3
    assert len(rows) == 3 + round(len(corpus.part("train")) / 2) and statement["not_open"] == []


def test_own_files_are_guarded_without_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNSTER_DATA", str(tmp_path / "nowhere"))
    leak = corpus.part("val")[0]["pun"] + " Indeed."
    rows = [{"prompt": "make a pun", "completion": text} for text in (leak, "I like lamps, they lighten up.")]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, statement = build(Recipe("sft", parts=[Ingredient(file=str(tmp_path / "mine.jsonl"))]))
    assert [row["completion"] for row in found] == ["I like lamps, they lighten up."]
    assert statement["parts"][0]["dropped"] == {"near to an evaluation text": 1} and statement["evaluation_texts"] > 0


def test_own_files_are_guarded_by_the_copies_at_hand(
    mini: Path, leaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leaks = [PUNS["hom_1013"][0].replace(" ,", "") + " Again.", Pool(mini).rows("davidbau_puns", "val")[0]["chosen"] + " Ha."]
    rows = [{"prompt": "make a pun", "completion": text} for text in (*leaks, "I like lamps, they lighten up.")]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe("sft", parts=[Ingredient(file=str(tmp_path / "mine.jsonl"))])
    ours = len(embedded_evaluation().sets)
    told: list[str] = []

    def built(folder: Path | None = None, recipe: Recipe = recipe) -> tuple[int, int]:
        statement = build(recipe, folder, told.append)[1]
        return statement["rows"], statement["evaluation_texts"]

    assert built() == (3, ours), "no copies"
    assert built(mini) == (1, len(Pool(mini).evaluation.sets)) > (1, ours)
    monkeypatch.setenv("PUNSTER_DATA", str(mini))
    assert built() == built(mini)
    assert (
        built(None, Recipe("sft", guard=False, parts=recipe.parts))
        == built(None, Recipe("sft", "val", parts=recipe.parts))
        == (3, 0)
    )
    assert build(Recipe("sft", parts=[Ingredient("contrasts", limit=3)]))[1]["evaluation_texts"] == ours
    assert build(Recipe(parts=[Ingredient("embedded", use="templates")]))[1]["evaluation_texts"] > ours
    assert not any("alone" in line for line in told)
    # Copies that cannot be used are told of; where they were asked for, they are needed.
    (leaky / "semeval2017_task7" / "subtask1-homographic-test.xml").unlink()
    monkeypatch.setenv("PUNSTER_DATA", str(leaky))
    assert built() == (3, ours) and any("compared with the embedded evaluation texts alone: " in line for line in told)
    for folder in (leaky, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no such file|no such folder"):
            built(folder)


def test_held_out_files_of_a_folder_are_in_no_training_mixture(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for part, text in (("train", "a text of the training part"), ("val", "one that is held out")):
        (folder / f"puneval.sft.{part}.jsonl").write_text(json.dumps({"prompt": "p", "completion": text}) + "\n")
    told: list[str] = []
    for split, text in (("train", "a text of the training part"), ("val", "one that is held out")):
        recipe = Recipe("sft", split, parts=[Ingredient(file=str(folder))])
        assert [row["completion"] for row in build(recipe, say=told.append)[0]] == [text]
    for left in ("held out and not read (puneval.sft.val.jsonl)", "no val files and not read (puneval.sft.train.jsonl)"):
        assert sum(f"1 of 2 files are {left}" in line for line in told) == 1


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            "{source: pungen_he2019, use: ratings, by: is_pun}",
            "pungen_he2019: by: is_pun is true of all texts that have it. Its ratings: is_pun, raters, rating",
        ),
        ("{source: pungen_he2019, use: ratings, by: pun_word}", "by: pun_word is no rating of its texts"),
        ("{source: expunations, use: ratings, by: rating_zz}", r"by: rating_zz is no rating .* Did you mean rating_z.*joke_rate"),
        (
            "{source: hahackathon2021, use: ratings, by: funniness}",
            "Its ratings: is_humour, offence, rating|controversial, is_humour",
        ),
        ("{source: semeval2017_task7, use: labels}", "semeval2017_task7: by: rating is no rating .*Its ratings: is_pun"),
        ("{source: semeval2017_task7, use: labels, by: kind}", "by: kind is no rating"),
    ],
)
def test_a_rating_that_texts_do_not_have_is_named(part: str, message: str, tmp_path: Path, mini: Path) -> None:
    recipe = recipe_of(tmp_path, f"kind: preference\nguard: false\nparts: [{part}, {{source: embedded, use: literal}}]")
    with pytest.raises(UserError, match=message):
        build(recipe, mini)


def test_texts_without_the_rating_are_left_aside(tmp_path: Path, mini: Path) -> None:
    """He's texts of machines are puns or not, nobody knows; labels that are known need no rating."""
    parts = [Ingredient(name, use="labels", by="is_pun") for name in ("pungen_he2019", "semeval2017_task7", "potd_reddithumor")]
    rows = build(Recipe(guard=False, parts=parts), mini)[0]
    assert {row["source"] for row in rows} == {part.source for part in parts}
    assert all(isinstance(row["label"], bool) and "rating" not in row for row in rows)
    rated = build(Recipe(guard=False, parts=[Ingredient("pungen_he2019", use="labels")]), mini)[0]
    assert rated and all("rating" in row for row in rated) and {row["label"] for row in rated} == {True, None}


def test_no_copies_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNSTER_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere: no such folder \(PUNSTER_DATA names it\)"):
        mixture("puns", "sft")
    with pytest.raises(UserError, match="rows of the kind prompt; sft is needed"):
        mixture("prompts", "sft")


# ---- the default mixtures, from the local copies ------------------------------------------------------------------
@pytest.mark.slow
def test_default_sft_mixture(punster_data: Path) -> None:
    rows, statement = build(load_mixture("puns"), punster_data)
    assert len(rows) >= 4_500 and statement["rows"] == len(rows)
    pool = Pool(punster_data)
    held_out = [words(row["text"]) for row in pool.rows("semeval2017_task7", "val")]
    for row in rows:  # by comparing with all, not by the index
        check_row(row, "sft", row["id"])
        own = words(row["completion"])
        assert all(jaccard(own, other) < 0.5 for other in held_out), row["id"]
    assert 0.0 < pun_word_share(rows) <= 0.3
    prompts = mixture("eval-prompts", "prompt", punster_data)
    topics = {topic_key(row["topic"]) for row in prompts}
    assert len(prompts) == len(topics) >= 200
    assert not topics & {topic_key(part) for row in rows if row.get("topic") for part in row["topic"].split(" and ")}


@pytest.mark.slow
def test_default_preference_mixture(punster_data: Path) -> None:
    rows, statement = build(load_mixture("preferences"), punster_data)
    assert len(rows) >= 12_000
    assert (
        statement["pun_word_in_prompt"] <= 0.3
        and "rjokes" not in statement["by_source"]
        and "kao_puns" not in statement["by_source"]
    )
    per_group = Counter((row["source"], row["group"]) for row in rows if "group" in row)
    assert max(n for (source, _), n in per_group.items() if source == "puneval") <= 20
    held_out = [words(row["text"]) for row in Pool(punster_data).rows("semeval2017_task7", "val")]
    for text in {text for row in rows for text in texts_of(row)}:  # by comparing with all, not by the index
        own = words(text)
        assert all(jaccard(own, other) < 0.5 for other in held_out), text
    for row in rows:
        check_row(row, "preference", row["id"])
        assert row["chosen"] != row["rejected"]
    for source in ("puneval", "expunations", "davidbau_puns"):
        own = [[len(text.split()) for text in texts_of(row)] for row in rows if row["source"] == source]
        longer = sum((a > b) + 0.5 * (a == b) for a, b in own) / len(own)
        assert 0.4 <= longer <= 0.6, (source, longer)


def test_preference_mixtures_can_have_ranked_groups_labels_and_contrasts(tmp_path: Path) -> None:
    root = make(tmp_path / "sources")
    lines = ["1,1,a,the baker kneads a little dough now", "2,0,a,seven ministers of trade met on monday", "3,0,a,rates rose"]
    (root / "potd_reddithumor" / "puns_train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def made(**part: Any) -> list[dict]:
        return build(Recipe("preference", parts=[Ingredient(**part)]), root)[0]

    labels = made(source="potd_reddithumor", use="labels", by="is_pun")
    texts = {row["completion"]: row["label"] for row in labels}
    assert set(texts.values()) == {True, False} and all(row["prompt"] == "make a pun" for row in labels)
    (pair,) = made(source="potd_reddithumor", use="ratings", by="is_pun", gap=1)
    assert pair["chosen"] == "The baker kneads a little dough now." and texts[pair["rejected"]] is False
    assert len(pair["chosen"].split()) == len(pair["rejected"].split())
    groups = made(source="embedded", use="ranked")
    assert groups and all(len(row["completions"]) > 1 and "chosen" not in row for row in groups)
    for row in [*labels, *groups]:
        check_row(row, "judged", "here")


def recipe_of(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text)
    return load_mixture(str(tmp_path / "recipe.yaml"))


def test_files_of_ones_own_bring_pairs_groups_and_labels(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "a fine pun", "rejected": "a bad one"},
        {"prompt": "p", "completions": ["best of them", "second", "third"], "scores": [3, 2, 1]},
        {"prompt": "p", "completion": "is it a pun", "label": True},
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def built(use: str) -> list[dict]:
        return build(recipe_of(tmp_path, f"kind: preference\nparts: [{{file: own.jsonl, use: '{use}'}}]"))[0]

    assert {row["chosen"] for row in built("pairs")} == {"a fine pun"}
    assert len(built("groups")) == 3 and all("chosen" in row for row in built("groups"))
    assert [row["scores"] for row in built("ranked")] == [[3, 2, 1]]
    assert [row["label"] for row in built("labels")] == [True]
    assert len(built("")) == 5  # the pair, three of the group, the labelled text


def test_further_columns_of_ones_own_mean_nothing(tmp_path: Path) -> None:
    """Prompts stay as they are, whatever a column "topic" says; "offensive" is none of our ratings; empty cells are no texts."""
    rows = [
        {
            "prompt": "one question",
            "completion": f"answer {i} {'xyz'[i] * 5}",
            "topic": topic,
            "offensive": "no",
            "text": text,
            "chosen": None,
        }
        for i, (topic, text) in enumerate(((None, None), (["a"], "one question"), ("  ", "one question")))
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, statement = build(recipe_of(tmp_path, "kind: sft\nparts: [{file: own.jsonl}, {source: embedded, limit: 3}]"))
    mine = [row for row in found if row.get("source", "").endswith("own.jsonl")]
    assert [row["prompt"] for row in mine] == ["one question"] * 3 and statement["repeats_dropped"] == 0
    assert all(set(row) == {"prompt", "completion", "source", "id"} for row in mine)


def test_one_sources_own_folder_is_guarded_as_the_folder_of_all(mini: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "kind: preference\nparts: [{source: semeval2017_task7, use: labels, by: is_pun}]")
    (rows, statement), (own, of_own) = build(recipe, mini), build(recipe, mini / "semeval2017_task7")
    assert own == rows and of_own == statement and statement["evaluation_texts"] > len(embedded_evaluation().sets)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("kind: prompt\nparts: [{source: semeval2017_task7, weight: 2}]", "weight must be at most 1"),
        ("parts: [{source: contrasts, use: literal, ids: crowd/}]", "ids is for public sources"),
        ("kind: sft\nparts: [{source: embedded, ids: a}]", "ids is for public sources"),
    ],
)
def test_settings_without_an_effect_are_refused(recipe: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        recipe_of(tmp_path, recipe)


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a pun on knights"}]
    rows = [{"prompt": "a pun on bees"}, {"prompt": "a pun on bees", "text": 12, "rejected": ["a", "b"]},
            {"prompt": chat, "completion": [{"role": "assistant", "content": "so knightly"}]}]  # fmt: skip
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = build(recipe_of(tmp_path, "kind: prompt\nparts: [{file: own.jsonl}]"))[0]
    assert sorted(str(row["prompt"]) for row in found) == sorted(["a pun on bees", str(chat)])
    with pytest.raises(UserError, match="split: val are those of the public sources"):
        recipe_of(tmp_path, "kind: prompt\nsplit: val\nparts: [{file: own.jsonl}]")
    with pytest.raises(UserError, match="choose none of them"):
        recipe_of(tmp_path, "kind: prompt\nsplit: val\nparts: [{source: semeval2017_task7, use: puns, limit: 5}]")


@pytest.mark.parametrize(
    "part",
    [
        "{file: own.jsonl, use: ratings}",
        "{file: own.jsonl, use: synonym_swap}",
        "{source: embedded, use: labels}",
        "{source: puneval, use: synonym_swap}",
        "{source: puneval, use: texts}",
    ],
)
def test_uses_that_a_part_does_not_have_are_refused(part: str, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError, match=r"part 1: use of .* must be one of .*groups.*, found"):
        recipe_of(tmp_path, f"kind: preference\nparts: [{part}]")
    with pytest.raises(UserError, match="must be one of puns, texts"):
        recipe_of(tmp_path, "kind: sft\nparts: [{source: embedded, use: literal}]")


def test_rows_that_are_no_pairs_are_refused_where_pairs_are_needed(tmp_path: Path) -> None:
    from punster.train.rows import load_rows

    (tmp_path / "own.jsonl").write_text('{"prompt": "p", "completion": "a text", "label": true}\n')
    (tmp_path / "recipe.yaml").write_text("kind: preference\nparts: [{file: own.jsonl}]")
    assert load_rows([str(tmp_path / "recipe.yaml")], "judged", list)[0]["label"] is True
    with pytest.raises(UserError, match="rows are no pairs"):
        load_rows([str(tmp_path / "recipe.yaml")], "preference", list)
