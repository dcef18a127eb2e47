"""The fourteen sources: counts against an independent count, every row valid, the split table honoured."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mini import NEITHER, TRAIN, VAL, make

from punster.data.check import check
from punster.data.pool import Pool
from punster.data.prepare import prepare
from punster.data.schema import check_row, kind_of
from punster.data.sources import SOURCES
from punster.data.split import lemma, part_of_id, part_of_lemma, table


# ---- the tiny versions --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("sources"))


MINI = {  # kind -> rows that the tiny versions hold
    "semeval2017_task7": {"text": 7}, "expunations": {"text": 3}, "puneval": {"text": 14, "preference": 8, "group": 4},
    "pungen_he2019": {"text": 8, "group": 3}, "kao_puns": {"text": 2}, "cup_context_situated": {"sft": 2},
    "davidbau_puns": {"preference": 8}, "hahackathon2021": {"text": 3}, "rjokes": {"text": 3}, "potd_reddithumor": {"text": 3},
    "short_jokes": {"text": 2}, "crowdtruth_shorttext": {"text": 3}, "jacksonpaull_rlhf": {"sft": 3}, "hh_rlhf": {"preference": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_tiny_version(name: str, mini: Path, tmp_path: Path) -> None:
    report = prepare(name, tmp_path, mini, say=lambda _: None)
    found: Counter[str] = Counter()
    written = 0
    for file, count in report["files"].items():
        rows = [json.loads(line) for line in (tmp_path / file).read_text(encoding="utf-8").splitlines()]
        assert len(rows) == count
        written += count
        for row in rows:
            found[kind_of(row)] += 1
            assert check_row(row, kind_of(row), "here") == row
            assert row["source"] == name and row["licence"] == SOURCES[name].licence and row["id"]
            assert file == f"{name}.{kind_of(row)}.{row['split']}.jsonl"
        assert not check(tmp_path / file).problems
    assert written == report["rows"] - report["in_neither_part"]
    parts = Pool(mini).located(name)
    assert Counter(kind_of(row) for row, _ in parts) == MINI[name]
    assert sum(found.values()) == sum(part is not None for _, part in parts)


def test_rows_follow_the_split_table(mini: Path) -> None:
    pool = Pool(mini)
    for name in ("semeval2017_task7", "expunations", "puneval", "pungen_he2019"):
        for row, part in pool.located(name):
            key = row["semeval_id"]
            assert part == table()["semeval"].get(key), row["id"]
            assert {
                "train": key in TRAIN or key.startswith("het"),
                "val": key in VAL or key.startswith("het"),
                None: key == NEITHER,
            }[part]
    assert [part for _, part in pool.located("cup_context_situated")] == ["train", "val"]
    assert {part for _, part in pool.located("kao_puns")} == {"val"}  # nothing trains on it
    painter = next(part for row, part in pool.located("potd_reddithumor") if "painter" in row["text"])
    assert painter == "val"  # a copy of a held-out text


def test_copies_of_texts_that_the_table_does_not_name_are_in_neither_part(tmp_path: Path) -> None:
    """A download has SemEval texts that the table leaves out; other sources' versions of them must not be trained on."""
    root = make(tmp_path)
    with (root / "short_jokes" / "reddit-cleanjokes.csv").open("a", encoding="utf-8") as handle:
        handle.write("3,A sentence that no table names!\n")
    pool = Pool(root)
    assert {row["id"]: part for row, part in pool.located("short_jokes")} == {"1": "train", "2": "train", "3": None}
    assert pool.evaluation.has_near("A sentence that no table names!")


def test_details_of_rows(mini: Path) -> None:
    pool = Pool(mini)
    semeval = {row["id"]: row for row, _ in pool.located("semeval2017_task7")}
    assert semeval["hom_10"]["text"] == "The rower said 'I can't keep my oars straight', and he caught a crab."
    assert semeval["het_1"]["pun_word"] == "sole" and semeval["het_1"]["alternative_word"] == "two" and semeval["het_1"]["is_pun"]
    rated = {row["id"]: row for row, _ in pool.located("expunations")}
    assert rated["hom_10"]["rating"] == 1.5 and rated["hom_10"]["raters"] == 2 and rated["hom_10"]["joke_rate"] == 0.5
    # Annotator 1 gave 3, 1, 3 and annotator 2 gave 0, 1, 0: z .7071 and -.7071 for the first text.
    assert rated["hom_10"]["rating_z"] == pytest.approx(0.0, abs=1e-3)
    assert rated["hom_1013"]["offensive"] == 1
    swaps = [row for row, _ in pool.located("puneval") if kind_of(row) == "preference" and row["id"].startswith("hom_100/")]
    assert {row["rejected"] for row in swaps} == {
        "Gardeners like their lobster off in the evening.",
        "Gardeners like their grip off in the evening.",
    }
    group = next(row for row, _ in pool.located("puneval") if row["id"] == "hom_10/group")
    assert group["scores"] == [1.2, 1.2, 0.0] and group["recited"] == [False, True, False]
    crowd = next(row for row, _ in pool.located("pungen_he2019") if row["id"] == "crowd/crab-crab/group")
    # "thyme-rhyme" and "rhyme-thyme" are one pair, and thyme is the pun word of both.
    analysis = {row["id"]: row for row, _ in pool.located("pungen_he2019") if row["id"].startswith("analysis/")}
    assert {(row["pun_word"], row["alternative_word"]) for row in analysis.values()} == {("thyme", "rhyme")}
    assert crowd["systems"] == ["human", "retrieve", "njd"] and crowd["scores"] == [4, 2, 1] and crowd["semeval_id"] == "hom_10"
    kao = [row for row, _ in pool.located("kao_puns")]
    assert kao[0]["text"] == "The cook took a leek in the garden." and kao[0]["ambiguity"] == 2.9e-10
    talk = [row for row, _ in pool.located("jacksonpaull_rlhf") if row["kind"] == "conversation"]
    assert talk[0]["prompt"] == "Human: hey, is it warm? Assistant:"
    dialogue = pool.located("hh_rlhf")[0][0]
    assert [m["role"] for m in dialogue["prompt"]] == ["user", "assistant", "user"] and dialogue["chosen"] == "Lettuce begin."
    cup = pool.located("cup_context_situated")[0][0]
    assert cup["prompt"] == "make a pun about waiters and soup bowls"


def test_lemma_rule() -> None:
    assert lemma("Leaves") == "leaf" and lemma("xyzzy") == "xyzzy"  # leaf, leave: the shorter one
    assert part_of_id(None) is None and part_of_id("hom_99999") is None and part_of_lemma("") is None
    assert Counter(table()["semeval"].values()) == {"train": 3021, "val": 404}
    assert Counter(table()["pun_word_lemma"].values()) == {"train": 1460, "val": 196}


def test_without_semeval_rows_cannot_be_guarded_and_say_so(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "short_jokes"
    alone.mkdir()
    (alone / "reddit-cleanjokes.csv").write_bytes((mini / "short_jokes" / "reddit-cleanjokes.csv").read_bytes())
    report = prepare("short_jokes", tmp_path / "out", alone)
    assert list(report["files"]) == ["short_jokes.text.unguarded.jsonl"] and "cannot be told" in capsys.readouterr().out
    assert report["in_neither_part"] == 0 and report["rows"] == sum(report["files"].values()) > 0


# ---- the local copies: counted a second time, by other means ------------------------------------------------------
def lines_of(path: Path) -> list[str]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [line for line in content.decode("utf-8").split("\n") if line.strip()]


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def quoted_records(path: Path) -> int:
    """Records of a CSV file: line ends outside quotes."""
    content = path.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
    return sum(part.count("\n") for part in content.split('"')[::2]) + 1


def semeval_count(folder: Path) -> int:
    return sum(len(re.findall(r"<text\s", file.read_text(encoding="utf-8"))) for file in folder.glob("subtask1-*.xml"))


def puneval_count(folder: Path) -> int:
    items = {**load(folder / "hom_dataset.json"), **load(folder / "het_dataset.json")}
    outputs = load(folder / "pun_generation.json")
    assert isinstance(outputs, dict)
    texts = len(items) + sum(len(m) for item in outputs.values() for m in item.values() if isinstance(m, dict))
    words = sum(
        len({(folder and w["gpt-4-0613_synonyms"][k]) and k for k in ("pun_word_synonym", "alter_word_synonym")})
        for w in load(folder / "synonyms.json").values()
    )
    return texts + words + len(load(folder / "pun_generation_manual_indicators.json"))


def he_count(folder: Path) -> int:
    """Sentences (pair and system) with a rating and groups of the crowd file, the same of the analysis file."""
    crowd = {
        (c[2], c[3])
        for line in lines_of(folder / "mturk_ratings_long.csv")[1:]
        for c in [line.split(",", 4)]
        if not c[4].startswith(",")
    }
    analysis = [line.split("\t") for line in lines_of(folder / "analysis_pun_scores.txt")]
    pairs = {frozenset(cells[1].split("-")) for cells in analysis}
    rated = {line.split(",")[2] for line in lines_of(folder / "mturk_ratings_long.csv")[1:] if line.startswith("funniness,")}
    return len(crowd) + len(rated) + len(analysis) + len(pairs)


def cloze_count(folder: Path) -> int:
    records = [r for name in ("annotated_samples", "annotated_new_jokes") for r in load(folder / f"{name}.json")]
    return sum(len(r["straight"]) * len(r["punny"]) for r in records)


COUNTS: dict[str, tuple[Callable[[Path], int], int]] = {  # independent count; records that may be skipped, all of them logged
    "semeval2017_task7": (semeval_count, 0),
    "expunations": (lambda f: sum(len(re.findall(r'"ID"', p.read_text(encoding="utf-8"))) for p in f.glob("*.json")), 0),
    "puneval": (puneval_count, 60),
    "pungen_he2019": (he_count, 140),
    "kao_puns": (lambda f: quoted_records(f / "data-agg.csv") - 1, 0),
    "cup_context_situated": (lambda f: quoted_records(f / "context_situated_pun.csv") - 1, 1686),
    "davidbau_puns": (cloze_count, 20),
    "hahackathon2021": (lambda f: sum(quoted_records(f / n) - 1 for n in ("train8000.csv", "dev1000.csv")), 0),
    "rjokes": (lambda f: sum(len(lines_of(f / f"{n}.tsv.gz")) for n in ("dev", "test")), 1),
    "potd_reddithumor": (lambda f: sum(len(lines_of(f / f"puns_{n}.tsv")) for n in ("train", "dev")), 0),
    "short_jokes": (lambda f: quoted_records(f / "reddit-cleanjokes.csv") - 1, 0),
    "crowdtruth_shorttext": (lambda f: sum(len(load(f / f"{n}.json")) for n in ("proverbs", "wiki_sentences")), 0),
    "jacksonpaull_rlhf": (lambda f: 2 * len(load(f / "Pun_Dataset.json")), 31),
    "hh_rlhf": (lambda f: len(lines_of(f / "test.jsonl.gz")), 9),
}  # fmt: skip


@pytest.fixture(scope="module")
def full(punster_data: Path) -> Pool:
    return Pool(punster_data)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_counts_of_the_local_copy(name: str, full: Pool, punster_data: Path, tmp_path: Path) -> None:
    count, skippable = COUNTS[name]
    report = prepare(name, tmp_path, punster_data, say=lambda _: None)
    skipped = sum(report["skipped"].values())
    assert skipped <= skippable, report["skipped"]
    if name == "pungen_he2019":  # its skips are ratings, not rows
        assert report["rows"] == count(punster_data / name)
    elif name == "puneval":  # an item without synonym pairs is one skip and two rows
        assert 0 <= count(punster_data / name) - report["rows"] <= 2 * skipped + 10
    else:
        assert report["rows"] + skipped == count(punster_data / name)
    assert sum(report["files"].values()) == report["rows"] - report["in_neither_part"]
    for file in report["files"]:
        found = check(tmp_path / file)
        assert found.kinds.total() == report["files"][file] and not found.problems
