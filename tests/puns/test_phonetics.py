"""Pronunciations, homophones, near-homophones and the fallback by spelling, with the two figures that they must reach."""

from __future__ import annotations

import importlib.util
import logging
import time
from itertools import combinations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from punster.errors import UserError
from punster.puns import g2p as spelling
from punster.puns import phonetics
from punster.puns.phonetics import distance, g2p, homophones, lemma, nearest, parts_of, plain, pronunciations

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("cat", "bat", "office", "orifice", "dough", "through", "knight", "steak", "hair", "sorry", "philately", "umbrella")


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_phonetics", ROOT / "scripts" / "measure_phonetics.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small() -> spelling.Model:
    """A model of every tenth dictionary word."""
    known = [(word, found) for word, found in phonetics.dictionary().items() if word.isalpha()][::10]
    return spelling.fit((word, tuple(text.split())) for word, found in known for text in found)


def test_dictionary_words() -> None:
    assert pronunciations("flower") == [("F", "L", "AW1", "ER0")]
    assert ("F", "L", "AW1", "ER0") in pronunciations("Flour")
    assert len(pronunciations("either")) > 1
    assert ("D", "OW1", "N", "T") in pronunciations("don’t")
    assert pronunciations("Brontë") == pronunciations("bronte")


def test_phrases_are_said_one_word_after_the_other() -> None:
    assert pronunciations("stir up")[0] == pronunciations("stir")[0] + pronunciations("up")[0]
    assert pronunciations("stir_up") == pronunciations("stir-up") == pronunciations("stir up")
    assert len(pronunciations("either either either either")) == phonetics.VARIANTS


@pytest.mark.parametrize(
    ("one", "two"),
    [("flour", "flower"), ("knight", "night"), ("bear", "bare"), ("sole", "soul"), ("dough", "doe"), ("kernel", "colonel")],
)
def test_known_homophones(one: str, two: str) -> None:
    assert two in homophones(one) and one in homophones(two)
    assert distance(one, two) == 0
    assert nearest(one, 3, [two, "banana", "table"])[0][0] == two


def test_no_word_is_its_own_homophone() -> None:
    assert "flower" not in homophones("flower")
    assert homophones("banana") == []
    assert homophones("floughr") == [] or "floughr" not in homophones("floughr")


@pytest.mark.parametrize(
    ("word", "near", "far"),
    [("pear", "bear", "chair"), ("sink", "zinc", "wink"), ("mutter", "mother", "manner"), ("lute", "loot", "lift"),
     ("orifice", "office", "edifice"), ("dog", "dogs", "fogs"), ("grossly", "gross", "gloss"), ("hair", "air", "pair")],
)  # fmt: skip
def test_alike_sounds_are_nearer(word: str, near: str, far: str) -> None:
    assert 0 <= distance(word, near) < distance(word, far)


def test_distance_is_symmetric_and_nearly_a_metric() -> None:
    table = phonetics._table(WORDS)
    apart = np.stack([phonetics._distances(word, table) for word in WORDS])
    assert np.allclose(apart, apart.T, atol=1e-6)
    for a, b in combinations(WORDS, 2):
        assert distance(a, b) == distance(b, a) == pytest.approx(apart[WORDS.index(a), WORDS.index(b)], abs=1e-6)
    assert np.all(np.diag(apart) == 0) and np.all(apart[~np.eye(len(WORDS), dtype=bool)] > 0)
    detour = (apart[:, :, None] + apart[None]).min(1)  # over one word between, which may be either end
    assert np.all(apart <= 1.5 * detour + 1e-6)
    assert apart.max() < 1  # everything lost and gained, at the edges' rate


def test_homophones_are_interchangeable() -> None:
    for word in WORDS:
        assert distance("flour", word) <= distance("flower", word) + 1e-6  # it has one more pronunciation
        assert distance("bear", word) == pytest.approx(distance("bare", word))


def test_nearest_is_sorted_and_leaves_out_forms_of_the_word() -> None:
    found = nearest("Baked", 10, ["bakes", "baking", "bake", "baked", "backed", "Naked", "raked", "bicker"])
    assert found[0][0] == "backed" and {word for word, _ in found} == {"backed", "Naked", "raked", "bicker"}
    scores = [score for _, score in found]
    assert scores == sorted(scores) and len(found) == 4
    assert nearest("cat", 3, []) == [] and len(nearest("cat", 2, ["bat", "hat", "rat"])) == 2
    assert "catch on" in [word for word, _ in nearest("cotton", 2, ["catch on", "umbrella", "table", "giraffe"])]


def test_one_question_to_all_common_words_is_quick() -> None:
    found = nearest("doggedly")
    assert len(phonetics.common_words()) == 20_000 and len(found) == 10 and "dog" in [word for word, _ in found]
    start = time.process_time()
    for word in ("orifice", "stirrup", "wickerd", "alloys"):
        nearest(word)
    assert time.process_time() - start < 4 * 0.5


@pytest.mark.parametrize(
    ("word", "stem"),
    [("planes", "plane"), ("plans", "plan"), ("planned", "plan"), ("baking", "bake"), ("visited", "visit"), ("boxes", "box"),
     ("ponies", "pony"), ("ties", "tie"), ("rolling", "roll"), ("controlled", "control"), ("pies", "pie"), ("bus", "bus"), ("glass", "glass"), ("red", "red"), ("sing", "sing")],
)  # fmt: skip
def test_lemma(word: str, stem: str) -> None:
    assert lemma(word) == stem


@pytest.mark.parametrize("text", ["", "   ", "--", "4th", "R2D2", "!", "a/b", "naïve?", "日本", "'", "a\0b"])
def test_what_cannot_be_said_is_refused(text: str) -> None:
    for ask in (pronunciations, homophones, g2p, nearest, lambda word: distance("cat", word)):
        with pytest.raises(UserError, match=r"empty text|expected letters"):
            ask(text)
    with pytest.raises(UserError, match="at least 1"):
        nearest("cat", 0)


def test_invented_spellings(measure: ModuleType) -> None:
    """The fallback says what a reader would, whether or not the dictionary knows the word."""
    for invented, like in (
        ("fuelish", "foolish"),
        ("phlower", "flower"),
        ("nite", "night"),
        ("kwik", "quick"),
        ("bakery", "bakery"),
    ):
        assert measure.edits(plain(g2p(invented)), plain(pronunciations(like)[0])) <= 1, (invented, g2p(invented))
    for invented, like in (("fuelish", "foolish"), ("souled", "sold"), ("wickerd", "wicked")):
        assert invented not in phonetics.dictionary()
        assert like in [word for word, _ in nearest(invented)]


@given(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_every_spelling_has_a_sound(small: spelling.Model, word: str) -> None:
    sounds = small.pronounce(word)
    assert sounds == small.pronounce(word) and len(sounds) <= 2 * len(word)
    assert all(sound in phonetics.NUMBER and sound for sound in sounds)


def test_units_spell_the_word_and_say_its_sounds() -> None:
    entries = [
        (word, tuple(phonetics.dictionary()[word][0].split())) for word in sorted(phonetics.dictionary())[::50] if word.isalpha()
    ]
    for (word, sounds), units in zip(entries, spelling.align(entries), strict=True):
        if len(sounds) <= 2 * len(word):
            assert "".join(unit.split(":")[0] for unit in units) == word
            assert tuple(sound for unit in units for sound in unit.split(":")[1].split()) == sounds
        else:
            assert units == []


def test_probabilities_of_what_may_follow_sum_to_one(small: spelling.Model) -> None:
    node = small.step(0, spelling.START)[1]
    for unit in (None, "t:T", "h:", "e:IY1"):
        node = node if unit is None else small.step(node, small.units.index(unit))[1]
        total = sum(np.exp(small.step(node, index)[0]) for index in range(1, len(small.units)))
        assert total == pytest.approx(1, abs=0.01)


def test_the_model_is_kept_and_a_damaged_one_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    some = {word: found for word, found in list(phonetics.dictionary().items())[::20] if word.isalpha()}
    monkeypatch.setattr(phonetics, "dictionary", lambda: some)
    monkeypatch.setenv("PUNSTER_CACHE", str(tmp_path / "cache"))
    fresh = spelling.trained.__wrapped__()
    (kept,) = (tmp_path / "cache").iterdir()
    size = kept.stat().st_size
    monkeypatch.setattr(spelling, "fit", lambda entries: pytest.fail("fitted twice"))
    stored = spelling.trained.__wrapped__()
    assert [stored.pronounce(word) for word in WORDS] == [fresh.pronounce(word) for word in WORDS]
    monkeypatch.undo()
    monkeypatch.setattr(phonetics, "dictionary", lambda: some)
    monkeypatch.setenv("PUNSTER_CACHE", str(tmp_path / "cache"))
    kept.write_bytes(kept.read_bytes()[: size // 2])
    spelling.trained.__wrapped__()
    assert kept.stat().st_size == size and len(list((tmp_path / "cache").iterdir())) == 1
    (tmp_path / "file").touch()
    monkeypatch.setenv("PUNSTER_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        assert spelling.trained.__wrapped__().pronounce("cat") == fresh.pronounce("cat")
    assert "not kept" in caplog.text


def test_loading_is_quick() -> None:
    spelling.trained()
    start = time.process_time()
    spelling.trained.__wrapped__().pronounce("zorbly")
    assert time.process_time() - start < 2


@pytest.mark.slow
def test_phoneme_errors_on_words_held_back(measure: ModuleType) -> None:
    errors = measure.held_back_errors(2000)
    print(errors)
    assert errors.phonemes <= 0.08 and errors.stressed <= 0.11  # the bar is 25 %


@pytest.mark.slow
def test_alternatives_of_heterographic_puns(measure: ModuleType, punster_data: Path) -> None:
    if not (punster_data / "semeval2017_task7").is_dir():
        # PUNSTER_DATA may name a folder that holds some of the sources only.
        pytest.skip(f"no semeval2017_task7 in {punster_data}: its puns are what this test measures")
    found = measure.recall(punster_data)
    print(found)
    assert {part: total for part, (_, total) in found.items()} == {"train": 817, "val": 114, "all": 931}
    assert all(hits / total >= 0.83 for hits, total in found.values())  # the bar is 55 %


def test_parts() -> None:
    assert parts_of("Rock’n’Roll-Star") == ("rock'n'roll", "star")
