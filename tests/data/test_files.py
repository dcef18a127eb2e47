"""People's own data: folders, hub data sets, columns with other names, chat rows."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from punster.cli import main
from punster.config import SftConfig
from punster.data.files import hub_rows, is_held_out, read_rows, read_texts
from punster.data.mix import build
from punster.data.recipe import load_mixture
from punster.data.schema import check_row, kind_of, texts_of
from punster.errors import UserError

ASK, ANSWER = "make a pun about bakers", "He kneads the dough."


def test_a_folder_of_files_of_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": ASK, "completion": "one"}) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([{"prompt": ASK, "completion": "two"}]))
    (tmp_path / "c.csv").write_text(f"prompt,completion\n{ASK},three\n")
    pq.write_table(pa.Table.from_pylist([{"prompt": ASK, "completion": "four"}]), tmp_path / "sub" / "d.parquet")
    (tmp_path / "notes.txt").write_text("not data")
    assert [row["completion"] for row in read_rows(tmp_path, "sft")] == ["one", "two", "three", "four"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.jsonl, \.json, \.csv, \.parquet files in this folder"):
        read_rows(tmp_path / "empty", "sft")


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps({"prompt": ASK, "completion": c}) + "\n" for c in ("one", "two")))
    assert len(read_rows(path, "sft")) == 2


def test_columns_with_other_names(tmp_path: Path) -> None:
    path = tmp_path / "qa.csv"
    path.write_text(f"question,answer\n{ASK},{ANSWER}\n")
    assert read_rows(path, "sft", ["prompt=question", "completion=answer"])[0]["completion"] == ANSWER
    for columns, message in (
        (["prompt=ask"], "line 2: no column 'ask' (found: question, answer)"),
        (["prompt"], "expected FIELD=COLUMN"),
    ):
        with pytest.raises(UserError) as raised:
            read_rows(path, "sft", columns)
        assert message in str(raised.value)


def test_numbers_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected,margin,weight,pass_share\np,a,b,.5,2,.25\np,c,d,,,\n")
    full, empty = read_rows(str(path), "preference", [])
    assert (full["margin"], full["weight"], full["pass_share"]) == (0.5, 2.0, 0.25)
    assert {empty[name] for name in ("margin", "weight", "pass_share")} == {None}
    path.write_text("prompt,chosen,rejected,pass_share\np,a,b,most\n")
    with pytest.raises(UserError, match=r"pairs\.csv, line 2: pass_share must be a number from \.01 to 1, found 'most'"):
        read_rows(str(path), "preference", [])


def test_columns_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from punster.config.parsing import parse

    config = parse("sft", SftConfig, ["-n", "x", "--data", "qa.csv", "--columns", "prompt=question", "completion=answer"])
    assert config.columns == ["prompt=question", "completion=answer"] and config.data == ["qa.csv"]
    assert main(["sft", "-n", "x", "--out", str(tmp_path), "--data", str(tmp_path / "none.csv")]) == 2
    assert "none.csv: no such file or folder" in capsys.readouterr().err


def test_a_data_set_in_the_form_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([{"question": ASK, "answer": ANSWER}] * 2), folder / "train-00000-of-00001.parquet")
    rows = list(hub_rows(str(folder)))
    assert [place.rsplit(", ", 1)[1] for place, _ in rows] == ["row 1", "row 2"] and rows[0][1] == {
        "question": ASK,
        "answer": ANSWER,
    }


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="owner/puns: not a file here, and the hub's data set cannot be loaded"):
        read_rows("owner/puns", "sft")


def test_chat_rows_with_implicit_prompts() -> None:
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", ASK), ("assistant", ANSWER), ("assistant", "No.")))
    row = check_row({"messages": [user, good]}, "sft", "here")
    assert (row["prompt"], row["completion"]) == ([user], ANSWER)
    row = check_row({"chosen": [user, good], "rejected": [user, bad]}, "preference", "here")
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([user], ANSWER, "No.")


@pytest.mark.parametrize(
    ("scores", "completions"),
    [([1], ["a"]), ([1, 2], ["a", "b"]), ([2, True], ["a", "b"]), ([2, 1, 0], ["a", "b"]), (None, ["a"]), ([2, 1], ["a", " "])],
)
def test_groups_that_are_none(scores: object, completions: list[str]) -> None:
    with pytest.raises(UserError):
        check_row({"prompt": ASK, "completions": completions, "scores": scores}, "group", "here")


def test_reports_beside_prepared_rows_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    for name in ("puneval.report.json", "rows.jsonl.statement.json"):
        (tmp_path / name).write_text(json.dumps({"rows": 1}, indent=1))
    assert [row["completion"] for row in read_rows(tmp_path, "sft")] == ["c"]


def test_columns_that_are_empty_do_not_tell_the_kind() -> None:
    """As Parquet writes rows of several kinds into one schema."""
    row = {"prompt": "p", "completion": "c", "chosen": None, "rejected": None, "completions": None, "label": None}
    assert kind_of(row) == "sft" and texts_of(row) == ["c"]
    assert texts_of(check_row({"prompt": "the question", "completion": "c", "text": "the question"}, "sft", "here")) == ["c"]


def test_what_prepare_held_out_is_not_trained_on_with_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from punster.train.rows import load_prompts, load_rows

    names = ("puneval.sft.train", "puneval.sft.val", "rjokes.sft.unguarded", "mine.sft.val", "puneval.val")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": name}) + "\n")
    assert [is_held_out(f"{name}.jsonl") for name in names] == [False, True, True, False, False]
    ours = {"puneval.sft.train", "mine.sft.val", "puneval.val"}
    assert {row["completion"] for row in load_rows([str(tmp_path)], "sft", list)} == ours
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "2 of 5 files are held out and not read" in told, told
    assert "(puneval.sft.val.jsonl, rjokes.sft.unguarded.jsonl)" in told
    assert set(load_prompts(str(tmp_path), quiet=True)) == ours and capsys.readouterr().err == ""
    # What is measured on is what was held out, where anything was; a file that is named itself is taken as it is.
    assert load_prompts(str(tmp_path), "val") == ["puneval.sft.val"]
    told = capsys.readouterr().err
    assert "4 of 5 files are no val files and not read (mine.sft.val.jsonl, " in told and "named itself is" in told, told
    assert len(load_rows([str(tmp_path)], "sft", list, training=False)) == 1 and len(read_rows(tmp_path, "sft")) == 5
    capsys.readouterr()
    assert len(load_rows([str(tmp_path / "puneval.sft.val.jsonl")], "sft", list)) == 1
    assert len(load_rows([str(tmp_path / "puneval.sft.train.jsonl")], "sft", list, training=False)) == 1
    assert capsys.readouterr().err == ""
    (tmp_path / "puneval.sft.val.jsonl").unlink()
    assert len(load_prompts(str(tmp_path), "val")) == 4  # a folder of one's own has no such names: all of it
    for name in ours:
        (tmp_path / f"{name}.jsonl").unlink()
    with pytest.raises(UserError, match=r"are all held out \(rjokes.*name one itself"):
        load_rows([str(tmp_path)], "sft", list)


SAID = {role: {"role": role, "content": f"the {role}'s words"} for role in ("user", "assistant", "tool")}


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": [SAID["user"], SAID["assistant"], SAID["user"]]}, "messages"),
        ({"messages": [SAID["user"], SAID["tool"]]}, "messages"),
        ({"prompt": ASK, "completion": [SAID["user"]]}, "completion"),
        ({"prompt": ASK, "completion": [{"content": "whose?"}]}, "completion"),
        ({"prompt": ASK, "chosen": [SAID["user"]], "rejected": [SAID["assistant"]]}, "chosen"),
        ({"chosen": [SAID["user"], SAID["assistant"]], "rejected": [SAID["user"], SAID["user"]]}, "rejected"),
        ({"prompt": ASK, "completion": [SAID["user"]], "label": True}, "completion"),
    ],
)
def test_answers_are_the_assistants(row: dict, field: str) -> None:
    with pytest.raises(
        UserError, match=f"rows, line 3, field '{field}': .* role .*, expected 'assistant'.*leave that message out"
    ):
        check_row(row, kind_of(row), "rows, line 3")


def test_dialogues_with_their_prompt_beside_them() -> None:
    """As ultrafeedback_binarized has them."""
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}
    good, bad = {"role": "assistant", "content": ANSWER}, {"role": "assistant", "content": "No."}
    row = {"prompt": f"{ASK}\n", "chosen": [system, user, good], "rejected": [system, user, bad]}
    for kind in ("preference", "judged"):
        found = check_row(row, kind, "here")
        assert (found["prompt"], found["chosen"], found["rejected"]) == ([system, user], ANSWER, "No.")
    for prompt, message in (
        ("make a pun about cooks", r"prompt 'make a pun about cooks' is no user's turn .*found: .*bakers.*leave the prompt out"),
        (ANSWER, "is no user's turn"),
    ):
        with pytest.raises(UserError, match=f"here: .*{message}"):
            check_row({**row, "prompt": prompt}, "preference", "here")


def test_texts_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from punster.train.rows import load_prompts, load_rows

    path = tmp_path / "puns.txt"
    path.write_text("  Bakers trade recipes on a knead-to-know basis.\r\n\nOh, why not?\n", encoding="utf-8-sig")
    texts = ["Bakers trade recipes on a knead-to-know basis.", "Oh, why not?"]
    assert [row["completion"] for row in read_texts(path)] == texts == load_prompts(str(path))
    rows = load_rows([str(path)], "sft", list)
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        ("make a pun about recipes", texts[0]),
        ("make a pun", texts[1]),
    ]
    assert "2 of 2 rows have no prompt and get one (the first: 'make a pun about recipes')" in capsys.readouterr().err
    table = tmp_path / "rows.csv"
    table.write_text("q,a\nask,answer\n")
    both = load_rows([str(table), str(path)], "sft", list, ["prompt=q", "completion=a"], quiet=True)
    assert [row["completion"] for row in both] == ["answer", *texts]  # it has no columns to be renamed
    table.unlink()
    with pytest.raises(UserError, match=r"puns\.txt, line 1: field 'prompt' is missing"):
        read_rows(path, "preference")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    assert [row["completion"] for row in read_rows(tmp_path, "sft")] == ["c"]  # in a folder it may be a licence


def test_rows_with_a_text_alone_are_written_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TRL's plain schema, with a prompt beside it or not; what has a completion, or messages, has no use for a text."""
    from punster.train.rows import load_rows

    chat = [{"role": "user", "content": ASK}, {"role": "assistant", "content": ANSWER}]
    given = [{"text": "Bees hum.", "completion": None, "prompt": None}, {"text": "It hums.", "prompt": "about bees"},
             {"text": "rendered", "messages": chat}, {"text": "other", "prompt": "p", "completion": "c"}]  # fmt: skip
    rows = load_rows(given, "sft", list)
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        ("make a pun about bees", "Bees hum."), ("about bees", "It hums."), (chat[:1], ANSWER), ("p", "c"),
    ]  # fmt: skip
    assert "1 of 4 rows have no prompt" in capsys.readouterr().err
    load_rows(given, "sft", list, quiet=True)
    assert capsys.readouterr().err == ""
    for bad, found in ((["x"], "found list"), ({"prompt": "p"}, "or text alone"), ({"text": " "}, "'text' is empty"),
                       ({"text": "t", "prompt": 3}, "prompt must be text")):  # fmt: skip
        with pytest.raises(UserError, match=found):
            check_row(bad, "written", "here")
    file = tmp_path / "mine.txt"
    file.write_text("Bees hum.\nIt hums.\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("kind: sft\nparts:\n- {file: mine.txt}\n")
    assert {row["completion"] for row in load_rows([str(recipe)], "sft", list, quiet=True)} == {"Bees hum.", "It hums."}


def test_topics_of_the_held_out_part_are_not_given_to_own_texts() -> None:
    from punster.data import corpus
    from punster.data.prompts import topic_key, topics_in
    from punster.train.rows import load_rows

    record = next(r for r in corpus.part("test") if topic_key(r["topic"]) in {topic_key(t) for t in topics_in(r["pun"], None)})
    [row] = load_rows([{"text": record["pun"]}], "sft", list, quiet=True)
    topic = row["prompt"].removeprefix("make a pun").removeprefix(" about ")
    assert topic != record["topic"] and (not topic or topic_key(topic) not in corpus.held_out_topics())


@pytest.mark.parametrize("more", [
    {"topic": "insects"}, {"topic": 3}, {"topic": " "}, {"keywords": None}, {"keywords": ["a", 2]}, {"pun_word": 7}, {"id": 1},
    {"topic": None, "prompt": ""},
])  # fmt: skip
def test_other_columns_of_own_texts_mean_nothing_to_us(more: dict, capsys: pytest.CaptureFixture[str]) -> None:
    from punster.train.rows import load_rows

    [row] = load_rows([{"text": "Bees hum.", **more}], "sft", list)
    assert (row["prompt"], row["completion"]) == ("make a pun about bees", "Bees hum.") and "text" not in row
    assert {name: row[name] for name in more if name != "prompt"} == {name: more[name] for name in more if name != "prompt"}
    assert "1 of 1 rows have no prompt and get one" in capsys.readouterr().err
    [row] = load_rows([{"text": "Bees hum.", **more, "prompt": "tell me a joke"}], "sft", list)
    assert row["prompt"] == "tell me a joke" and capsys.readouterr().err == ""


def test_a_mixture_of_own_texts_keeps_off_the_held_out_topics(tmp_path: Path) -> None:
    from punster.data import corpus
    from punster.data.mix import build
    from punster.data.prompts import topic_key
    from punster.data.recipe import load_mixture

    topics = sorted({r["topic"] for r in corpus.part("test") if " " not in r["topic"]})[:40]
    (tmp_path / "mine.txt").write_text("".join(f"Nobody likes the {topic}.\n" for topic in topics))
    (tmp_path / "mine.yaml").write_text("kind: sft\nguard: false\nrepeats: 0\nparts:\n- {file: mine.txt}\n")
    rows, _ = build(load_mixture(str(tmp_path / "mine.yaml")))
    assert len(rows) == len(topics)
    assert not {topic_key(row["topic"]) for row in rows if row.get("topic")} & corpus.held_out_topics()


def test_texts_that_are_no_puns_are_not_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from punster.train.rows import load_rows

    rows = [{"text": "Bees hum."}, {"text": "It rains.", "is_pun": False}, {"text": "It snows.", "label": False},
            {"text": "Fish swim.", "source": "puneval", "system": "gpt-4"}, {"text": "Fish sing.", "system": "mine", "pun_word": 3},
            {"prompt": "p", "completion": "as given", "label": True},
            {"prompt": "p", "completion": "not wanted", "label": False}]  # fmt: skip
    texts = ["Bees hum.", "Fish sing.", "as given"]
    assert [row["completion"] for row in load_rows(rows, "sft", list)] == texts
    told = capsys.readouterr().err
    for left_out in ("1 of 7 rows left out: their text is no pun", "2 of 7 rows left out: their text is labelled false",
                     "1 of 7 rows left out: their text is a machine's"):  # fmt: skip
        assert left_out in told
    alone = load_rows(
        [{"prompt": "p", "completion": text, "label": label} for text, label in (("good", 1), ("bad", 0))], "sft", list
    )
    assert [row["completion"] for row in alone] == ["good"] and "1 of 2 rows left out" in capsys.readouterr().err
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text("kind: sft\nguard: false\nrepeats: 0\nparts:\n- {file: mine.jsonl}\n")
    found = load_rows([str(tmp_path / "mine.yaml")], "sft", list, quiet=True)
    assert sorted(row["completion"] for row in found) == sorted(texts)
    dropped = build(load_mixture(str(tmp_path / "mine.yaml")))[1]["parts"][0]["dropped"]
    assert dropped == {"no pun": 1, "labelled false": 2, "a machine's": 1}
    assert not any("is_pun" in row for row in found)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[1:3]))
    with pytest.raises(UserError, match=r"the mixture is empty: .*mine.jsonl: 2 rows read, 1 no pun, 1 labelled false"):
        build(load_mixture(str(tmp_path / "mine.yaml")))
    with pytest.raises(UserError, match="no row is left: their text is no pun or labelled false"):
        load_rows(rows[1:3], "sft", list, quiet=True)


def test_prompts_of_prepared_rows_in_a_file_stay_as_they_are(tmp_path: Path) -> None:
    from punster.data import corpus
    from punster.train.rows import load_rows

    topic = next(r["topic"] for r in corpus.part("test") if " " not in r["topic"])
    row = {
        "prompt": f"make a pun about {topic}",
        "topic": topic,
        "completion": "An oak nut told a corny joke.",
        "source": "cup_context_situated",
    }
    (tmp_path / "cup.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "cup.yaml").write_text("kind: sft\nguard: false\nparts:\n- {file: cup.jsonl}\n")
    assert [found["prompt"] for found in load_rows([str(tmp_path / "cup.yaml")], "sft", list, quiet=True)] == [row["prompt"]]


def test_hidden_folders_are_not_read(tmp_path: Path) -> None:
    """An editor's copies, of held-out files too, under names that say nothing of that."""
    folder = tmp_path / ".cache" / "mine"  # of which the hidden part is not the folder's own
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "a.jsonl").write_text(json.dumps({"prompt": ASK, "completion": "one"}) + "\n")
    (folder / ".ipynb_checkpoints" / "puneval.sft.val-checkpoint.jsonl").write_text('{"prompt": "p", "completion": "two"}\n')
    assert [row["completion"] for row in read_rows(folder, "sft", training=True)] == ["one"]


def test_columns_called_as_ours_that_hold_no_text_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "Bees hum.", "source": {"site": "x"}, "id": [1], "group": 7}) + "\n")
    (row,) = read_rows(path, "written")
    assert row == {"text": "Bees hum.", "group": 7}
    (tmp_path / "m.yaml").write_text("kind: sft\nguard: false\nparts: [{file: a.jsonl}]\n")
    assert build(load_mixture(str(tmp_path / "m.yaml")))[1]["by_source"] == {str(path): 1}


def test_headers_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"\n\nprompt,completion\n{ASK},one\n")
    assert [row["completion"] for row in read_rows(path, "sft")] == ["one"]
    path.write_text(f"prompt,completion,completion\n{ASK},one,two\n")
    with pytest.raises(UserError, match="line 1: two columns are called 'completion'; rename one"):
        read_rows(path, "sft")
    path.write_text(f",prompt,,completion\n0,{ASK},,one\n")  # as a table with an index is written
    assert [row["completion"] for row in read_rows(path, "sft")] == ["one"]
