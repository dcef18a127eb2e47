"""Tiny versions of the fourteen public sources in their formats, with sentences written for these tests."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

# Ids of the split table: two of each part. "hom_99999" is in neither.
TRAIN, VAL, NEITHER = ("hom_10", "hom_100"), ("hom_1013", "hom_1021"), "hom_99999"
PUNS = {
    "hom_10": ("The rower said ' I can ' t keep my oars straight ' , and he caught a crab .", "crab"),
    "hom_100": ("Gardeners like their thyme off in the evening .", "thyme"),
    "hom_1013": ("The painter had a brush with the law , and he was framed for it .", "framed"),
    "hom_1021": ("A clockmaker with no orders has plenty of hands on his time .", "hands"),
}
PLAIN = {"hom_99999": "A sentence that no table names ."}
HET = {
    "het_1": ("The shoemaker put his whole sole into the work .", "sole"),
    "het_1002": ("Beekeepers earn their living honeystly .", "honeystly"),
}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def dump(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=1, ensure_ascii=False))


def table(path: Path, header: list[str] | None, rows: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(([header] if header else []) + rows)


def semeval(folder: Path) -> None:
    for kind, puns, plain in (("homographic", PUNS, PLAIN), ("heterographic", HET, {})):
        texts = {**{key: text for key, (text, _) in puns.items()}, **plain}
        for task in (1, 2, 3):
            body, gold = [], []
            for key, text in texts.items():
                tokens = text.split()
                words = "".join(f'<word id="{key}_{i}">{escape(token)}</word>\n' for i, token in enumerate(tokens, 1))
                if key in puns:
                    place = f"{key}_{tokens.index(puns[key][1]) + 1}"
                    gold.append({1: f"{key}\t1", 2: f"{key}\t{place}", 3: f"{place}\tone%1:01:00::\ttwo%1:02:00::"}[task])
                elif task == 1:
                    gold.append(f"{key}\t0")
                if key in puns or task == 1:
                    body.append(f'<text id="{key}">\n{words}</text>\n')
            write(
                folder / f"subtask{task}-{kind}-test.xml",
                f'<?xml version="1.0"?>\n<corpus lang="en">\n{"".join(body)}</corpus>\n',
            )
            write(folder / f"subtask{task}-{kind}-test.gold", "\n".join(gold) + "\n")


def make(root: Path) -> Path:
    """All sources under `root`; returns it."""
    semeval(root / "semeval2017_task7")
    rated = {"Is a Joke?": [1, 0], "Funniness (1-5)": [3, 0], "Offensive/Inappropriate?": [0, ""], "Annotator_IDs": [1, 2],
             "Natural language explanation": ["Two senses of the word.", ""], "Joke keywords": [["oars", "crab"], [""]]}  # fmt: skip
    full = [{"ID": "hom_10", **rated}, {"ID": "hom_100", **rated, "Funniness (1-5)": [1, 1]}]
    dump(root / "expunations" / "expunations_annotated_full.json", full)
    pilot = {k: v for k, v in rated.items() if k != "Is a Joke?"} | {"Offensive/Inappropriate?": ["0", "1"]}
    dump(root / "expunations" / "expunations_annotated_pilot_100.json", [{"ID": "hom_1013", **pilot}])

    items, outputs, labels, synonyms = {}, {}, {}, {}
    for key, (text, word) in PUNS.items():
        items[key] = {"pun_word": word, "alter_word": word, "pun_sense": "one sense", "alter_sense": "another", "human_text": text,
                      "pun_word_ind": f"{key}_{text.split().index(word) + 1}", "human_keywords": text.split()[1:3], "human_rating": 1.5}  # fmt: skip
        outputs[key] = {"human_text": text, "m_text": {"method 0": f"The {word} was there on a Monday.", "method 1": text}}
        label = {"success": 1, "coherence": 4, "funniness": 3}
        labels[key] = {"human_text": label, "m_text": {"method 0": {**label, "success": 0, "funniness": 1}, "method 1": label}}
        synonyms[key] = {"gpt-4-0613_synonyms": {"pun_word_synonym": "lobster", "alter_word_synonym": "grip"}}
    dump(root / "puneval" / "hom_dataset.json", {**items, "hom_99999": {"human_text": PLAIN["hom_99999"]}})
    dump(root / "puneval" / "het_dataset.json", {"het_1": {"human_text": HET["het_1"][0]}})
    dump(root / "puneval" / "pun_generation.json", outputs)
    dump(root / "puneval" / "pun_generation_manual_indicators.json", labels)
    dump(root / "puneval" / "synonyms.json", synonyms)

    he = root / "pungen_he2019"
    for name in ("hetero_dev", "hetero_test", "homo_test"):
        dump(he / f"{name}.json", [])
    known = [{"id": key, "tokens": text.lower().split(), "pun_word": word} for key, (text, word) in PUNS.items()]
    dump(he / "homo_dev.json", known)
    votes = []
    for pair, human in (("crab-crab", PUNS["hom_10"][0]), ("framed-framed", PUNS["hom_1013"][0])):
        for system, text, score in (
            ("human", human, 4),
            ("njd", "we saw a crab on the wide shore .", 1),
            ("retrieve", "he hung the picture .", 2),
        ):
            for worker in range(2):
                votes += [
                    ["funniness", worker, pair, system, text.lower(), score],
                    ["success", worker, pair, system, text.lower(), 1 if score > 3 else 2],
                ]
    table(he / "mturk_ratings_long.csv", ["aspect", "worker_hash", "pun_alter", "system", "sentence", "rating"], votes)
    analysis = [
        (PUNS["hom_100"][0].lower(), "thyme-rhyme", "pun", 3.5),
        ("gardeners like their rhyme off .", "rhyme-thyme", "depun", 1.5),
    ]
    write(he / "analysis_pun_scores.txt", "".join("\t".join(map(str, row)) + "\n" for row in analysis))

    header = ["", "punType", "sentenceID", "sentenceType", "entropy", "m1KL", "m2KL", "KL", "m1Focus", "m2Focus", "funniness",
              "homophoneID", "version", "sentence", "m1", "m2", "funniness"]  # fmt: skip
    kao = [[i, "near", 7, kind, "2.9E-10", 1, 2, 3.5, "a;b", "", z, 1, "a", text, "leek", "leak", z]
           for i, (kind, z, text) in enumerate([("pun", 1.2, "The cook took a #leek in the garden."), ("nonpun", -0.4, "The #leek is green.")], 1)]  # fmt: skip
    table(root / "kao_puns" / "data-agg.csv", header, kao)

    cup = [["waiters,soup bowls", "note", "note", "a sound", "a text", "yes", "Waiters who sing leave soup bowls and a note."],
           ["judges", "key", "key", "a", "b", "yes", "The judges sang off key and locked up early."],
           ["judges", "note", "note", "a", "b", "no", "{}"], ["waiters", "note", "note", "a", "b", "yes", "{}"]]  # fmt: skip
    table(root / "cup_context_situated" / "context_situated_pun.csv",
          ["context", "pun_word", "alter_word", "pun_word_sense", "alter_word_sense", "new_pun", "user_pun"], cup)  # fmt: skip

    cloze = [{"id": i, "sentence": s, "straight": ["tools", "hammer"], "punny": [p], "gemini_rating": 6, "openai_rating": 4}
             for i, (s, p) in enumerate([("The carpenter forgot his lines but nailed the ___", "part"),
                                         ("Every sailor wants a ___ with a view", "pier"), ("The barber took a ___ way home", "short cut"), ("The pianist was locked out and had lost the ___", "key")])]  # fmt: skip
    dump(root / "davidbau_puns" / "annotated_samples.json", cloze[:2])
    dump(root / "davidbau_puns" / "annotated_new_jokes.json", cloze[2:])

    haha = ["id", "text", "is_humor", "humor_rating", "humor_controversy", "offense_rating"]
    table(root / "hahackathon2021" / "train8000.csv", haha, [
        [1, "My umbrella left me, it said I was too clingy.", 1, 3.0, 0, 0.1], [2, "The library opens at nine on most days.", 0, "", "", 0.0]])  # fmt: skip
    table(
        root / "hahackathon2021" / "dev1000.csv", haha, [[3, "My kettle has no feelings, it just boils things.", 1, 1.5, 1, 2.5]]
    )
    for name, lines in (("dev", ["5\tMy snail tried racing without a shell, it was sluggish all day.", "0\tA chair walks into a bar and sits down."]),
                        ("test", ["2\tPencils make a point of it."])):  # fmt: skip
        path = root / "rjokes" / f"{name}.tsv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))
    potd = root / "potd_reddithumor"
    table(
        potd / "puns_train.tsv",
        None,
        [[0, 1, "a", "the oven won t quit it s baked into it"], [1, 0, "a", "I m told we ll see prices rise"]],
    )
    table(potd / "puns_dev.tsv", None, [[0, 1, "a", "the painter had a brush with the law and he was framed for it"]])
    table(
        root / "short_jokes" / "reddit-cleanjokes.csv",
        ["ID", "Joke"],
        [[1, "What do you call a shy clock? Self-winding."], [2, "I like lamps, they lighten up."]],
    )
    dump(root / "crowdtruth_shorttext" / "proverbs.json", ["Slow Water Digs The Deepest Bed"])
    dump(
        root / "crowdtruth_shorttext" / "wiki_sentences.json",
        ["The bridge , built in 1931 , crosses the river .", "It has two towers ."],
    )
    dump(root / "jacksonpaull_rlhf" / "Pun_Dataset.json", [
        {"Direct Prompt": "make a pun about ovens", "Conversation Prompt": "hey, is it warm?", "Example Response": "i am baked", "Original": "Yes"},
        {"Direct Prompt": "make a pun about bees", "Conversation Prompt": None, "Example Response": "let it bee", "Original": "No"}])  # fmt: skip
    pair = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A pun?\n\nAssistant: Lettuce begin.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A pun?\n\nAssistant: No."}  # fmt: skip
    path = root / "hh_rlhf" / "test.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress((json.dumps(pair) + "\n").encode(), mtime=0))
    return root
