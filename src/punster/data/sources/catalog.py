"""What each source is, what may be done with it, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Source:
    """tie: what the split follows: the SemEval id, the lemma of the pun word, or likeness to held-out texts; "none" trains nothing.

    open: whether weights trained on it may be used for everything. files: local name -> (path upstream, SHA-256 or "" where
    the hash is recorded at the first download). by_hand: why a download does not do, or "". rude: filtered for offence.
    """

    name: str
    title: str
    judgement: str
    rows: str
    good_for: str
    licence: str
    open: bool
    repository: str
    commit: str
    files: dict[str, tuple[str, str]]
    tie: Literal["id", "lemma", "text", "none"] = "text"
    by_hand: str = ""
    rude: bool = False
    needs: tuple[str, ...] = ()

    @property
    def home(self) -> str:
        return f"https://github.com/{self.repository}/tree/{self.commit}"


def _same(folder: str, *names: str) -> dict[str, tuple[str, str]]:
    return {name: (f"{folder}{name}", "") for name in names}


_NC = "CC BY-NC 4.0"
_NONE = "none stated: research only"
_SEMEVAL = tuple(
    f"subtask{n}-{kind}-test.{suffix}"
    for n in (1, 2, 3)
    for kind in ("homographic", "heterographic")
    for suffix in ("xml", "gold")
)

SOURCES: dict[str, Source] = {source.name: source for source in (
    Source(
        "semeval2017_task7", "SemEval-2017 Task 7", "pun or not, pun word, two senses", "3,425 texts, 2,481 puns",
        "SFT, prompts, pun and non-pun class", "CC BY 4.0, part CC BY-NC 4.0: treat as NonCommercial", False,
        "hhexiy/pungen", "db733d26a366caa8df0eb14b09f509ca446ec32b", _same("data/semeval2017_task7/data/test/", *_SEMEVAL), "id",
    ),
    Source(
        "expunations", "ExPUNations", "funniness by 5 people, joke or not, offence, explanations, keywords", "1,638 + 83 texts",
        "length-matched preference pairs, ratings", _NC, False, "amazon-science/expunations", "8ca1f404d288d8621f63d4b66239c44ade91dcbc",
        _same("data/", "expunations_annotated_full.json", "expunations_annotated_pilot_100.json"), "id", needs=("semeval2017_task7",),
    ),
    Source(
        "puneval", "PunEval", "success, coherence, funniness of 18 texts on 170 items; synonyms",
        "2,197 human and 21,573 LLM texts, 170 groups, about 2,500 synonym pairs", "same-prompt pairs, ranked groups, matched pairs",
        _NONE, False, "Zhijun-Xu/PunEval", "932693e23269269f323f9d385596ae1e54f939bc",
        {**_same("dataset/", "hom_dataset.json", "het_dataset.json", "synonyms.json"),
         **_same("results/", "pun_generation.json", "pun_generation_manual_indicators.json")}, "id",
    ),
    Source(
        "pungen_he2019", "He et al. 2019", "crowd ratings of 6 systems on 130 pairs of words: funniness, grammar, success",
        "780 + 240 texts, 178 groups", "same-prompt pairs, ranked groups, validation of metrics", _NONE, False,
        "hhexiy/pungen", "db733d26a366caa8df0eb14b09f509ca446ec32b",
        {**_same("data/funniness_annotation/", "analysis_pun_scores.txt"), "mturk_ratings_long.csv": ("", ""),
         **{f"{kind}_{part}.json": (f"data/semeval/{kind}/{part}.json", "") for kind in ("hetero", "homo") for part in ("dev", "test")}},
        "id", by_hand="mturk_ratings_long.csv is a re-laid form of MTurk_aggregate_results/*.csv without worker ids",
    ),
    Source(
        "kao_puns", "Kao, Levy and Goodman", "z-scored funniness, ambiguity, distinctiveness", "435 texts, 145 puns",
        "validation of metrics; trains nothing", "repository BSD-3; data by the authors", False,
        "amoudgl/pun-model", "bf18335a58ecfb8624d5b40b619a2bf7bbb72714",
        {"data-agg.csv": ("data/data-agg.csv", "3c4543ee8fbeac925778a3c3cf498d3ef2d41411b92f9c153b46e56eda698d46")}, "none",
    ),
    Source(
        "cup_context_situated", "Context-situated puns (CUP)", "written by people for given context words", "2,142 puns",
        "SFT with prompts", _NC, False, "amazon-science/context-situated-pun-generation", "26ba8d80b7f74eeb5b2f16677bf97fe1e13a0a40",
        _same("data/", "context_situated_pun.csv"), "lemma",
    ),
    Source(
        "davidbau_puns", "Cloze puns", "4 LLM ratings (AI feedback)", "2,841 punny/straight pairs of 835 sentences", "minimal pairs",
        _NONE, False, "davidbau/puns", "d0bb0e84af28abd239629c8eafc49bf787a27ec1",
        {"annotated_samples.json": (
            "datasets/rawdata/annotated_samples.json", "6eebb484f727fb6c31b7d7bc5be43ac09fc4a9baa347cf5017fb653e5a5c3708"),
         "annotated_new_jokes.json": (
            "datasets/rawdata/annotated_new_jokes.json", "1ee2a35a95f37a704145eef62e4a3b1e9a8b1de4b62730af91230f874cee6192")},
    ),
    Source(
        "hahackathon2021", "HaHackathon 2021", "humour or not, funniness, offence", "8,993 texts, 5,561 rated",
        "weak preference pairs, non-humour", "none stated (task data): research only", False,
        "tian1327/LOL", "f216fdae2fd0b8d52b7881de73cf157dd2aabc4c", _same("Data/", "train8000.csv", "dev1000.csv"),
        by_hand="the upstream files differ from the UTF-8 form that is read here; convert them first", rude=True,
    ),
    Source(
        "rjokes", "rJokes", "votes (log score 0 to 11)", "75,122 jokes", "weak preference pairs, text", "Reddit terms: research only",
        False, "orionw/rJokesData", "d48bedd71bdacc7557b84ad697bf556e7aad7c21", _same("data/", "dev.tsv.gz", "test.tsv.gz"), rude=True,
    ),
    Source(
        "potd_reddithumor", "Pun of the Day", "pun or not", "1,982 puns, 2,105 others", "SFT after removing duplicates, pun class",
        "none stated (code MIT): research only", False, "orionw/RedditHumorDetection", "09c86e22adc48d0d87962fea8f6311e5dadc1eb3",
        {"puns_train.tsv": ("data/puns/train.tsv", ""), "puns_dev.tsv": ("data/puns/dev.tsv", "")},
    ),
    Source(
        "short_jokes", "Reddit clean jokes", "none", "1,620 jokes", "clean joke text", "scraped; repository GPL-2.0: research only", False,
        "abhinavmoudgil95/short-jokes-dataset", "79c59bf8392929da3c560a3fa207be44e15b65db", _same("data/", "reddit-cleanjokes.csv"),
        rude=True,
    ),
    Source(
        "crowdtruth_shorttext", "Proverbs and plain sentences", "none", "984 + 5,251 texts", "non-pun class", _NONE, False,
        "CrowdTruth/Short-Text-Corpus-For-Humor-Detection", "72c8c2a0aadff67d5457921b64bdd553ca342221",
        {"proverbs.json": ("", ""), "wiki_sentences.json": ("", "")},
        by_hand="upstream has pickle files, which are never opened; the lists are needed as JSON arrays",
    ),
    Source(
        "jacksonpaull_rlhf", "The original project's puns", "none", "113 records, 226 rows", "historical baseline", "MIT", True,
        "JacksonPaull/RLHF", "834852538879932edd637be5d2a61765343cbb88", _same("", "Pun_Dataset.json"),
    ),
    Source(
        "hh_rlhf", "Anthropic HH-RLHF (harmless-base, test)", "which of two answers is better", "2,312 pairs", "loader and format tests",
        "MIT", True, "anthropics/hh-rlhf", "354e5c3cb8960630860dd5774a6ac2a58313bf4d",
        {"test.jsonl.gz": ("harmless-base/test.jsonl.gz", "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03")},
        rude=True,
    ),
)}  # fmt: skip
