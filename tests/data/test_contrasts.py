"""Contrasts: our own puns beside texts that only look like puns, and words that undo public puns."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data.test_corpus import ROOT, check

from punster.data import corpus
from punster.data.corpus import CONTRASTS, contrast_rows, records, replacements, spoken_words
from punster.data.mix import build
from punster.data.pool import Pool
from punster.data.prompts import topic_key
from punster.data.recipe import load_mixture
from punster.data.replace import Replacement, blank_of, chosen_pairs
from punster.data.schema import check_row, texts_of
from punster.data.split import lemma, part_of_lemma
from punster.errors import UserError

FILE = ROOT / "src" / "punster" / "data" / "contrasts.jsonl"


def test_form_and_length() -> None:
    assert check.contrast_problems(FILE, None) == []


@pytest.mark.slow
def test_no_text_is_taken_from_public_data(punster_data: Path) -> None:
    assert check.contrast_problems(FILE, punster_data) == []


GOOD: dict[str, Any] = {
    "pun_word": "anvil",
    "alternative_word": "anvil",
    "puns": [
        ["The smith's new band is good but their anvil needs tuning.", ["drummer"]],
        ["He quit, under the weight of one anvil.", []],
    ],
    "literals": ["The smith's new band is good but their singer needs lessons.", ""],
    "fails": ["An anvil is heavy, said the smith, who lifted one."],
}


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ({}, ""),
        ({"puns": None}, "line 1: pun_word, alternative_word"),
        ({"fails": [3]}, "line 1: pun_word, alternative_word"),
        ({"literals": ["One only."]}, "line 1: pun_word, alternative_word"),
        ({"pun_word": next(r["pun_word"] for r in records() if r["split"] == "test")}, "is a held-out pun word"),
        ({"alternative_word": "a " + next(r["pun_word"] for r in records() if r["split"] == "gold")}, "is a held-out pun word"),
        ({"pun_word": "hammer"}, "pun 1: 'hammer' is not in it"),
        ({"puns": [["An anvil is an anvil.", ["rose"]]], "literals": []}, "only where it stands once"),
        ({"puns": [['He heard "anvil" and left.', ["rose"]]], "literals": []}, "only where it stands once"),
        ({"puns": [["My smith lost an anvil.", ["hammer"]]], "literals": []}, "'hammer' cannot replace 'anvil'"),
        ({"puns": [["My smith lost his anvil.", ["big hammer"]]], "literals": []}, "'big hammer' cannot replace 'anvil'"),
        ({"puns": [["My smith lost his anvil.", ["anvils"]]], "literals": []}, "'anvils' cannot replace 'anvil'"),
        ({"fails": [next(r["pun"] for r in records())]}, "with the embedded corpus"),
    ],
)
def test_the_checking_script_finds_planted_faults(fault: dict[str, Any], found: str, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(GOOD | fault) + "\n")
    problems = [problem for problem in check.contrast_problems(tmp_path / "c.jsonl", None) if " alone tells " not in problem]
    assert bool(problems) == bool(found) and found in " ".join(problems)


def test_the_checking_script_finds_repetition_and_shortcuts(tmp_path: Path) -> None:
    telling = {
        **GOOD,
        "fails": ["Whatever happens, nobody but the smith ever lifts it, since it is far too heavy for the rest of us."],
    }
    (tmp_path / "c.jsonl").write_text(f"{json.dumps(GOOD)}\n{json.dumps(telling)}\n" + f"{json.dumps(telling)}\n" * 8)
    problems = " ".join(check.contrast_problems(tmp_path / "c.jsonl", None))
    assert "line 2.pun 1 ~ line 1.pun 1" in problems and "line 3.fail 1 ~ line 2.fail 1" in problems
    assert "length alone tells pun from fail" in problems and "naive_bayes alone tells pun from fail" in problems


HELD_OUT = {lemma(record["pun_word"].lower()) for record in records() if record["split"] != "train"}


def is_held_out(word: str) -> bool:
    return lemma(word) in HELD_OUT or part_of_lemma(word) == "val"


def held_out_words(*words: str) -> list[str]:
    """Those that are held out, the parts of compounds included."""
    return list(filter(is_held_out, (*words, *check.tokens(" ".join(words).replace("-", " ")))))


def test_no_word_is_held_out() -> None:
    for row in contrast_rows("synonym_swap"):
        assert not held_out_words(row["pun_word"], row["alternative_word"])


def test_a_replaced_word_is_all_that_differs() -> None:
    rows = contrast_rows("synonym_swap")
    assert len(rows) == sum(len(words) for line in FILE.read_text().splitlines() for _, words in json.loads(line)["puns"])
    for row in rows:
        check_row(row, "preference", row["id"])
        before, after = re.split(rf"(?<!\w){re.escape(row['pun_word'])}(?!\w)", row["chosen"], flags=re.IGNORECASE)
        rejected = row["rejected"]
        assert rejected.startswith(before) and rejected.endswith(after) and rejected != row["chosen"]
        assert len(rejected.split()) == len(row["chosen"].split())


def test_pun_words_do_not_always_stand_at_the_end() -> None:
    """A model that only ever saw them there judges early ones badly: the words that make the pun come after them."""
    lines = [json.loads(line) for line in FILE.read_text().splitlines()]
    texts = [
        re.split(rf"(?<!\w){re.escape(r['pun_word'])}(?!\w)", text, flags=re.IGNORECASE) for r in lines for text, _ in r["puns"]
    ]
    before, after = zip(*((len(check.tokens(text[0])), len(check.tokens(text[-1]))) for text in texts), strict=True)
    assert sum(b < a for b, a in zip(before, after, strict=True)) > 0.2 * len(texts), "in the first half"
    assert sum(a >= 3 for a in after) > 0.28 * len(texts), "not among the last three words"
    assert sum(a == 0 for a in after) < 0.65 * len(texts), "the last word"


def test_rows_of_one_record_are_a_family() -> None:
    by_group: dict[str, list[Any]] = {}
    for row in (row for kind in CONTRASTS for row in contrast_rows(kind)):
        by_group.setdefault(row["group"], []).append(row)
    puns = {f"contrast-{n}": [t for t, _ in json.loads(line)["puns"]] for n, line in enumerate(FILE.read_text().splitlines())}
    for group, rows in by_group.items():
        assert {row["chosen"] for row in rows if "chosen" in row} <= set(puns[group])
        for row in (row for row in rows if "scores" in row):
            assert row["completions"][: row["scores"].count(1)] == [t for t in row["completions"] if t in puns[group]]
            assert row["scores"] == sorted(row["scores"], reverse=True) and set(row["scores"]) == {0, 1}
            assert len({corpus.ends_with(text, row["pun_word"]) for text in row["completions"]}) == 1


def test_a_word_goes_in_as_it_is_written() -> None:
    def filled(text: str, word: str, other: str) -> str:
        blank = blank_of({"text": text, "pun_word": word})
        assert blank is not None
        return blank.filled(other)

    assert filled("We read her Iliad.", "iliad", "Odyssey") == "We read her Odyssey."
    assert filled("We read. Iliads shine.", "iliads", "letters") == "We read. Letters shine."
    assert filled("We read her ILIAD.", "iliad", "odyssey") == "We read her ODYSSEY."


def test_a_word_fits_its_article() -> None:
    after_an, after_the = (blank_of({"text": f"He had {article} hour.", "pun_word": "hour"}) for article in ("an", "the"))
    assert after_an is not None and after_the is not None
    assert [word for word in ("unit", "umbrella", "heir", "house", "4th", "8th") if after_an.takes(word)] == [
        "umbrella",
        "heir",
        "8th",
    ]
    assert all(after_the.takes(word) for word in ("unit", "umbrella", "heir", "house", "4th"))
    assert not any(after_the.takes(word) for word in ("half hour", "hours", "hourly", "Cinderella"))
    name, beginning = (blank_of({"text": text, "pun_word": "iliad"}) for text in ("We read her Iliad.", "Read! Iliad ends."))
    assert name is not None and name.takes("Odyssey") and not name.takes("letters")
    assert beginning is not None and beginning.takes("Odyssey") and beginning.takes("letters")


def test_words_were_chosen_by_id() -> None:
    row = {
        "id": "x",
        "text": "The cobbler saved my sole.",
        "pun_word": "sole",
        "alternative_word": "soul",
        "source": "s",
        "licence": "l",
    }
    other = {**row, "id": "y"}
    chosen = {"s/x": Replacement(("spirit", "souls", "shoe"))}
    pairs = chosen_pairs([row, other], 3, "make a pun", random.Random(1), chosen)
    assert {pair["rejected"] for pair in pairs} == {"The cobbler saved my spirit.", "The cobbler saved my shoe."}
    assert len(chosen_pairs([row], 1, "make a pun", random.Random(1), chosen)) == 1


def test_a_pun_word_that_the_source_does_not_name_stands_beside_the_words() -> None:
    row = {"id": "train/1", "text": "The cobbler saved my sole.", "source": "s", "licence": "l"}
    assert not chosen_pairs([row], 3, "make a pun", random.Random(1), {"s/train/1": Replacement(("shoe",))})
    (pair,) = chosen_pairs([row], 3, "make a pun", random.Random(1), {"s/train/1": Replacement(("shoe",), "sole")})
    assert (pair["rejected"], pair["pun_word"]) == ("The cobbler saved my shoe.", "sole")


def test_an_alternative_of_another_pun_word_is_no_bar() -> None:
    row = {"id": "1", "text": "The cobbler saved my sole.", "source": "s", "licence": "l"}
    for named, count in (
        ({"pun_word": "soles", "alternative_word": "soul"}, 0),
        ({"pun_word": "saved", "alternative_word": "soul"}, 1),
    ):
        pairs = chosen_pairs([{**row, **named}], 3, "make a pun", random.Random(1), {"s/1": Replacement(("souls",), "sole")})
        assert len(pairs) == count
    assert "alternative_word" not in pairs[0] and pairs[0]["pun_word"] == "sole"


def test_the_file_of_chosen_words_is_in_order() -> None:
    lines = [line.split("\t") for line in (FILE.parent / "replacements.tsv").read_text().splitlines()]
    assert {len(line) for line in lines} == {2, 3} and len({line[0] for line in lines}) == len(lines) == len(replacements())
    of_word: Counter[tuple[str, str]] = Counter()
    for key, found in replacements().items():
        assert 1 <= len(found.words) <= 4 and len({word.lower() for word in found.words}) == len(found.words), key
        assert all(word.strip() == word and word for word in found.words), key
        source = key.split("/")[0]
        assert (found.pun_word is None) == (source == "semeval2017_task7"), key
        if found.pun_word:
            assert not held_out_words(found.pun_word), key
            assert not {lemma(word) for word in found.words} & {lemma(found.pun_word)}, key
            of_word[source, found.pun_word.lower()] += 1
    assert max(of_word.values()) <= 5


@pytest.mark.parametrize("source", ["puneval", "cup_context_situated", "rjokes"])
def test_a_mixture_undoes_puns_of_many_sources(source: str, punster_data: Path, tmp_path: Path) -> None:
    """Outputs of models and rows without a mark "pun" included: that they are puns is what the list says."""
    (tmp_path / "r.yaml").write_text(f"parts: [{{source: {source}, use: chosen, cap: 1}}]\n")
    rows, statement = build(load_mixture(str(tmp_path / "r.yaml")), punster_data)
    listed = sum(key.startswith(source + "/") for key in replacements())
    assert statement["parts"][0]["available"] > 0.95 * listed and len(rows) > 0.6 * listed
    assert all(
        row["replaced_by"].lower() in row["rejected"].lower() and row["pun_word"].lower() in row["chosen"].lower() for row in rows
    )


def test_chosen_words_belong_to_training_puns(punster_data: Path) -> None:
    """Of the training part, by id, and nearly all of them fit."""
    pool = Pool(punster_data)
    by_source: dict[str, set[str]] = {}
    for key in replacements():
        source, identity = key.split("/", 1)
        by_source.setdefault(source, set()).add(identity)
    for source, ids in by_source.items():
        train = {row["id"]: row for row in pool.rows(source, "train") if row["id"] in ids}
        assert train.keys() == ids, source
        pairs = chosen_pairs(list(train.values()), 3, "make a pun", random.Random(1), replacements())
        assert len({pair["chosen"] for pair in pairs}) > 0.95 * len(ids), source
        assert Counter(len(texts_of(pair)) for pair in pairs).keys() == {2}


def test_a_mixture_takes_contrasts(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("parts: [{source: contrasts, use: weak, cap: 0, total: 50}, {source: contrasts, use: literal}]\n")
    rows, statement = build(load_mixture(str(recipe)))
    assert statement["not_open"] == []
    made = sum(row["scores"].count(1) * row["scores"].count(0) for row in contrast_rows("weak"))
    assert statement["parts"][0]["available"] == made - sum(statement["parts"][0]["dropped"].values())
    assert sum(row.get("weight", 0) for row in rows) == pytest.approx(50)
    groups = {row["group"] for kind in ("weak", "literal") for row in contrast_rows(kind)}
    assert {row["group"] for row in rows} <= groups and all(row["source"] == "contrasts" for row in rows)


def test_the_halves_share_no_word() -> None:
    halves = [{word for kind in CONTRASTS for row in contrast_rows(kind, half) for word in spoken_words(row)} for half in (1, 2)]
    assert not halves[0] & halves[1] and {"bridge", "a bridge"} <= halves[0] | halves[1]
    sizes = [len(contrast_rows("literal", half)) for half in (0, 1, 2)]
    assert min(sizes[1:]) > 0.4 * sizes[0] and sum(sizes[1:]) > 0.9 * sizes[0]


def test_the_demo_trains_its_yardstick_on_other_words_and_kinds() -> None:
    from punster.train.pipeline import load_recipe, stage_config

    words: dict[str, set[str]] = {}
    own: dict[str, set[str]] = {}
    kinds = {}
    for stage in ("reward", "gold"):
        config: Any = stage_config(load_recipe("demo"), stage)
        mixed = [row for name in config.data if name != "embedded" for row in build(load_mixture(name))[0]]
        assert mixed and "embedded" in config.data
        words[stage], own[stage] = (
            {word for row in rows for word in spoken_words(row)} for rows in (mixed, corpus.part(config.split))
        )
        kinds[stage] = {row["kind"] for row in mixed} | set(config.negatives)
    assert not kinds["reward"] & kinds["gold"]
    assert not words["reward"] & (words["gold"] | own["gold"]) and not words["gold"] & own["reward"]
    assert len(own["reward"] & own["gold"]) < 20, "words evoked, such as dye"


def test_a_policy_learns_to_write_their_puns() -> None:
    rows, statement = build(load_mixture("own-puns"))
    puns = {text for line in FILE.read_text().splitlines() for text, _ in json.loads(line)["puns"]}
    assert {row["completion"] for row in rows} == puns and statement["not_open"] == []
    held_out = {topic_key(word) for split in ("val", "test") for r in corpus.part(split) for word in r["topic"].split()}
    asked = [row for row in rows if row["topic"]]
    assert len(asked) > 0.95 * len(rows) and not {topic_key(row["topic"]) for row in asked} & held_out
    assert all(
        row["topic"] in row["completion"].lower().replace("-", "") and row["prompt"] == f"make a pun about {row['topic']}"
        for row in asked
    )
    assert statement["pun_word_in_prompt"] < 0.03


def test_the_demo_writes_what_its_yardstick_does_not_know() -> None:
    from punster.train.pipeline import load_recipe, stage_config

    written, known = (stage_config(load_recipe("demo"), stage) for stage in ("sft", "gold"))
    assert "embedded" in written.data and "embedded" in known.data and known.split == "gold"
    taught = [row for name in written.data if name != "embedded" for row in build(load_mixture(name))[0]]
    judged = [row for name in known.data if name != "embedded" for row in build(load_mixture(name))[0]]
    own = {split: corpus.part(split) for split in ("train", "gold")}
    texts = {row["completion"] for row in taught} | {row["pun"] for row in own["train"]}
    assert len(texts) > 5_000 and not texts & (
        {text for row in judged for text in texts_of(row)} | {row["pun"] for row in own["gold"]}
    )
    words = [{word for row in rows for word in spoken_words(row)} for rows in (taught, [*judged, *own["gold"]])]
    assert min(map(len, words)) > 1_000 and not words[0] & words[1]


def test_their_puns_can_be_prompts(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("kind: prompt\nparts: [{source: contrasts, half: 2, limit: 30}]\n")
    rows = build(load_mixture(str(tmp_path / "r.yaml")))[0]
    assert 20 < len(rows) <= 30 and not any("completion" in row for row in rows)


@pytest.mark.parametrize(
    "text",
    [
        "parts: [{source: contrasts, use: literal, half: 3}]",
        "parts: [{source: embedded, half: 1}]",
        "split: val\nparts: [{source: contrasts, use: weak}]",
        "kind: sft\nparts: [{source: contrasts, use: weak}]",
        "kind: sft\nsplit: val\nparts: [{source: contrasts}]",
        "parts: [{source: contrasts, use: homophone}]",
        "parts: [{source: davidbau_puns, use: chosen}]",
        "split: val\nparts: [{source: puneval, use: chosen}]",
    ],
)
def test_what_contrasts_are_not_for(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text + "\n")
    with pytest.raises(
        UserError,
        match=r"part 1: (contrasts are for training alone|use of \w+ must be one of|words were chosen for|half must be 1 or 2)",
    ):
        load_mixture(str(tmp_path / "r.yaml"))
