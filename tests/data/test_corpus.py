"""The embedded corpus: size, form, splits, sound, shortcuts, originality, and the rows made of it."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest

from punster.data.corpus import NEGATIVES, homophone_dropped_in, part, preference_rows, prompts, records, sft_rows
from punster.data.schema import check_row

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "gold", "val", "test")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = script("check_corpus")


def words(text: str) -> list[str]:
    found: list[str] = check.tokens(text)
    return found


def test_size_and_fields() -> None:
    assert len(records()) >= 500
    for record in records():
        assert set(record) == {*check.FIELDS, *check.EXTRA, "split"}, record["id"]
        assert all(isinstance(value, str) and value.strip() == value != "" for value in record.values()), record["id"]
        assert record["kind"] in check.KINDS and record["split"] in SPLITS
    for field in ("id", "prompt", "pun"):
        assert len({record[field].lower() for record in records()}) == len(records()), field


def test_the_pun_word_is_in_the_pun_and_not_in_the_negatives() -> None:
    def has(text: str, word: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower().replace("’", "'")) is not None

    for record in records():
        assert has(record["pun"], record["pun_word"]), record["id"]
        assert not has(record["synonym_swap"], record["pun_word"]), record["id"]
    # The ordinary sentence has the alternative word, which is what makes the homophone negative possible.
    without = [record["id"] for record in records() if not has(record["plain"], record["alternative_word"])]
    assert len(without) <= 0.02 * len(records()), without
    different = [r for r in records() if r["kind"] == "homophonic" and homophone_dropped_in(r) == r["plain"]]
    assert not [record["id"] for record in different]


def test_topics_and_kinds_are_varied() -> None:
    topics = Counter(record["topic"].lower() for record in records())
    assert len(topics) >= 0.8 * len(records()) and max(topics.values()) <= 5
    last = Counter(record["topic"].lower().split()[-1] for record in records())
    assert max(last.values()) <= 0.03 * len(records()), last.most_common(3)
    kinds = Counter(record["kind"] for record in records())
    assert min(kinds[kind] for kind in check.KINDS) >= 0.15 * len(records())
    first = Counter(words(record["pun"])[0] for record in records())
    assert max(first.values()) <= 0.25 * len(records()), first.most_common(3)


def test_splits_are_disjoint_by_pun_word() -> None:
    stem = script("split_corpus").stem
    where: dict[str, set[str]] = {}
    for record in records():
        for word in {stem(record["pun_word"]), stem(record["alternative_word"])}:
            where.setdefault(word, set()).add(record["split"])
    assert {word: found for word, found in where.items() if len(found) > 1} == {}
    sizes = Counter(record["split"] for record in records())
    assert set(sizes) == set(SPLITS)
    assert sizes["train"] > sizes["gold"] > sizes["test"] > sizes["val"] >= 25


def test_test_prompts_are_new_and_enough() -> None:
    seen = {prompt.lower() for split in ("train", "gold", "val") for prompt in prompts(split)}
    assert len(set(prompts("test"))) >= 100
    assert not [prompt for prompt in prompts("test") if prompt.lower() in seen]
    trained = {record["pun"] for record in part("train")}
    assert not trained & {record["pun"] for record in part("test")}


@cache
def pronunciations() -> dict[str, set[str]]:
    """Word -> its pronunciations without stress marks, of the dictionary inside the package punsy."""
    found: dict[str, set[str]] = {}
    for line in (files("punsy") / "data" / "cmudict-0.7b.utf8").read_text(encoding="utf-8").splitlines():
        word, bar, phonemes = line.partition("|")
        if bar:
            found.setdefault(re.sub(r"\(\d+\)$", "", word).lower(), set()).add(re.sub(r"\d", "", phonemes).strip())
    return found


def sounds(text: str) -> set[str] | None:
    """All ways to say a word or phrase; None if a part of it is not in the dictionary."""
    said = {""}
    for word in re.split(r"[\s-]+", text.lower().replace("’", "'")):
        known = pronunciations().get(word)
        if known is None:
            return None
        said = {f"{before} {phonemes}" for before in said for phonemes in known}
    return said


def test_homophonic_pairs_sound_alike() -> None:
    assert sounds("dough") == sounds("doe") != sounds("day") and sounds("xyzzyq") is None
    pairs = [(r["pun_word"], r["alternative_word"]) for r in records() if r["kind"] == "homophonic"]
    heard = [(pair, sounds(pair[0]), sounds(pair[1])) for pair in pairs]
    present = [(pair, one, two) for pair, one, two in heard if one is not None and two is not None]
    absent = [pair for pair, one, two in heard if one is None or two is None]
    differ = [pair for pair, one, two in present if not one & two]
    print(f"{len(pairs)} homophonic pairs, {len(absent)} with a word not in the dictionary, {len(differ)} differ: {differ}")
    assert len(pairs) >= 100
    assert len(absent) <= 0.15 * len(pairs), absent
    assert len(differ) <= 0.03 * len(present), differ
    assert not [pair for pair in pairs if pair[0].lower() == pair[1].lower()]


def test_homographic_pairs_are_written_alike() -> None:
    chosen = [record for record in records() if record["kind"] == "homographic"]
    assert not [record["id"] for record in chosen if record["pun_word"].lower() != record["alternative_word"].lower()]


def test_no_surface_shortcut_tells_pun_from_literal() -> None:
    accuracy = check.shortcut_accuracy([(record["id"], record["pun"], record["literal"]) for record in records()])
    print(accuracy)
    assert set(accuracy) == {"length", "naive_bayes"}
    assert max(accuracy.values()) <= 0.65, accuracy
    # The measure can fail: a corpus with a tell-tale word is caught.
    marked = [(record["id"], record["pun"] + " ha ha ha ha", record["literal"]) for record in records()]
    told = check.shortcut_accuracy(marked)
    assert told["naive_bayes"] > 0.9 and told["length"] > 0.9


def test_the_checking_script_finds_no_problem_and_can_find_some(tmp_path: Path) -> None:
    assert check.problems(ROOT / "src" / "punster" / "data" / "puns.jsonl", None) == []
    lines = (ROOT / "src" / "punster" / "data" / "puns.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "copy.jsonl").write_text("\n".join([*lines[:40], lines[0].replace('"id": "', '"id": "x'), "{"]))
    found = " ".join(check.problems(tmp_path / "copy.jsonl", None))
    assert "line 42: not JSON" in found and "line 41: prompt" in found and "~" in found


def test_overlap_search_is_exact() -> None:
    ours = {"a": words("the baker made enough dough"), "b": words("two tired bicycles")}
    near = check.overlaps(ours, ["A baker made enough dough.", "nothing of the kind here"])
    assert set(near) == {"a"} and near["a"][0] == pytest.approx(4 / 6)
    assert not check.overlaps(ours, ["the baker left town early today"])


@pytest.mark.slow
def test_no_text_is_taken_from_public_data(punster_data: Path) -> None:
    queries = {f"{r['id']}.{field}": words(r[field]) for r in records() for field in ("pun", "literal")}
    seen = 0

    def texts():
        nonlocal seen
        for text in check.texts_under(punster_data):
            seen += 1
            yield text

    assert check.overlaps(queries, texts()) == {}
    assert seen > 100_000  # the sources were really read


# ---- rows -----------------------------------------------------------------------------------------------------
def test_sft_rows_and_prompts() -> None:
    rows = sft_rows("val")
    assert [row["prompt"] for row in rows] == prompts("val")
    assert [check_row(row, "sft", "here")["completion"] for row in rows] == [record["pun"] for record in part("val")]
    with pytest.raises(ValueError, match="unknown split"):
        part("nonsense")


@pytest.mark.parametrize("split", SPLITS)
def test_preference_rows(split: str) -> None:
    rows = preference_rows(NEGATIVES, split)
    assert len(rows) == len(NEGATIVES) * len(part(split))
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(NEGATIVES, len(part(split)))
    by_id = {record["id"]: record for record in part(split)}
    for row in rows:
        check_row(row, "preference", row["id"])
        assert row["chosen"] == by_id[row["id"]]["pun"] and row["prompt"] == by_id[row["id"]]["prompt"]
        assert row["chosen"] != row["rejected"], row["id"]
        if row["kind"] in ("literal", "synonym_swap", "weak"):
            assert row["rejected"] == by_id[row["id"]][row["kind"]]


def test_garbled_and_spliced_texts_are_as_long_and_neither_whole_pun() -> None:
    chosen = {record["id"]: record["pun"].split() for record in part("gold")}
    every = [record["pun"].split() for record in part("gold")]
    for row in preference_rows(["garbled"], "gold"):
        own, text = chosen[row["id"]], row["rejected"].split()
        changed = sum(a != b for a, b in zip(own, text, strict=True))
        assert 1 <= changed <= len(own) / 2 + 1, row["id"]
        assert all(a.strip(".,!?'\"")[:1].isupper() == b.strip(".,!?'\"")[:1].isupper() for a, b in zip(own, text, strict=True))
    beginnings = 0
    for row in preference_rows(["spliced"], "gold"):
        own, text = chosen[row["id"]], row["rejected"].split()
        half = len(own) // 2
        beginnings += text[:half] == own[:half]
        assert text[:half] == own[:half] or text[-(len(own) - half) :] == own[-(len(own) - half) :]
        assert abs(len(text) - len(own)) <= half
        assert text not in every
    assert beginnings == pytest.approx(len(chosen) / 2, abs=1.5)


def test_off_topic_partners_are_a_seeded_derangement() -> None:
    rows = preference_rows(["off_topic"], "test", seed=4)
    puns = [record["pun"] for record in part("test")]
    assert sorted(row["rejected"] for row in rows) == sorted(puns)
    assert rows == preference_rows(["off_topic"], "test", seed=4)
    assert len({tuple(r["rejected"] for r in preference_rows(["off_topic"], "test", seed=seed)) for seed in range(4)}) > 1


def test_homophone_is_dropped_in_with_its_case() -> None:
    record = {"pun_word": "dough", "alternative_word": "doe", "plain": "Doe, a deer: the doe and the does."}
    assert homophone_dropped_in(record) == "Dough, a deer: the dough and the does."
    assert homophone_dropped_in({**record, "pun_word": "doe"}) == record["plain"]
    # Nothing in a word is taken for a pattern.
    assert homophone_dropped_in({"pun_word": r"\1", "alternative_word": "a.b", "plain": "a.b axb"}) == r"\1 axb"


@pytest.mark.parametrize("split", ["train", "gold", "test"])
def test_length_does_not_tell_a_homophone_negative(split: str) -> None:
    """Plain sentences are half as long as puns; joined to the pun's length they are not given away by it."""
    rows = preference_rows(("homophone",), split)
    differences = [len(row["rejected"].split()) - len(row["chosen"].split()) for row in rows]
    longer = sum((d > 0) + 0.5 * (d == 0) for d in differences) / len(differences)
    assert 0.4 <= longer <= 0.6
    assert sum(abs(d) <= 1 for d in differences) / len(differences) > 0.8
