"""The success estimate: calibrated on planted labels, honest about unseen generators, apart from all training data."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from punster.api import load
from punster.config.shared import DEFAULT_MODEL
from punster.data.batch import Example
from punster.data.leakage import words
from punster.data.pool import Pool
from punster.evaluate import success
from punster.evaluate.success import Labelled
from punster.model.heads import ScalarHead
from punster.model.load import load_model
from punster.model.role import Role, score_examples
from punster.model.tokenizer import Tokenizer


def planted(n: int, systems: dict[str, float], seed: int = 0) -> tuple[torch.Tensor, list[Labelled]]:
    """Features of which two matter, and labels drawn from the logistic truth plus a shift of the system."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n * len(systems), 4, generator=generator, dtype=torch.float64)
    rows = []
    for i, (name, shift) in enumerate(s for s in systems.items() for _ in range(n)):
        p = torch.sigmoid(1.5 * x[i, 0] - x[i, 1] - 0.5 + shift)
        rows.append(Labelled(f"t{i}", float(torch.rand((), generator=generator, dtype=torch.float64) < p), str(i), name))
    return x, rows


def test_it_is_calibrated() -> None:
    x, rows = planted(1500, {"a": 0.0, "b": 0.0})
    estimator = success.fit_estimator(x[:2000], rows[:2000])
    p, y = estimator.probabilities(x[2000:]), torch.tensor([r.success for r in rows[2000:]])
    assert float(p.mean()) == pytest.approx(float(y.mean()), abs=0.03)
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (p >= low) & (p < low + 0.25)
        assert float(p[inside].mean()) == pytest.approx(float(y[inside].mean()), abs=0.08)
    own = torch.tensor([r.success for r in rows[:2000]])
    assert float(estimator.probabilities(x[:2000]).mean()) == pytest.approx(float(own.mean()), abs=1e-6)


def test_an_odd_generator_widens_the_interval() -> None:
    x, rows = planted(400, {"a": 0.0, "b": 0.0, "c": 0.0})
    narrow = success.fit_estimator(x, rows)
    assert all(abs(error) < 0.06 for error in narrow.errors.values())
    x, rows = planted(400, {"a": 0.0, "b": 0.0, "odd": 2.0, "human": 1.0})
    wide = success.fit_estimator(x, rows)
    assert set(wide.errors) == {"a", "b", "odd"}  # people are no generator
    assert wide.errors["odd"] < -0.15
    one, two = (success.success_rate(e, x[:400]) for e in (narrow, wide))
    assert one is not None
    assert two is not None
    assert two["high"] - two["mean"] > one["high"] - one["mean"] + 0.1
    assert 0 <= two["low"] <= two["mean"] <= two["high"] <= 1
    assert success.success_rate(None, x) is None


def test_features_do_not_depend_on_the_batch(tiny_llama: Path) -> None:
    role, tokenizer = Role(load_model(str(tiny_llama))), Tokenizer.load(str(tiny_llama))
    texts = ["make a pun about bakers", "dough", "", "The sailor had a whale of a time, and the tide turned."]
    together = success.features(role, tokenizer, texts)
    alone = torch.cat([success.features(role, tokenizer, [text]) for text in texts])
    assert torch.isfinite(together).all()
    assert torch.allclose(together, alone, atol=1e-4)


def test_no_data_no_estimate(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    role, tokenizer = Role(load_model(str(tiny_llama))), Tokenizer.load(str(tiny_llama))
    monkeypatch.setenv("PUNSTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PUNSTER_DATA", str(tmp_path / "nowhere"))
    assert success.open_estimator(role, tokenizer) is None


@pytest.mark.slow
def test_the_numbers_of_the_default_model_are_those_of_a_fit(punster_data: Path) -> None:
    loaded = load(DEFAULT_MODEL)
    role = Role(loaded.role.model)
    rows = success.labelled(Pool(punster_data))
    x = success.features(role, loaded.tokenizer, [row.text for row in rows])
    known, fresh = success.open_estimator(role, loaded.tokenizer), success.fit_estimator(x, rows)
    assert known is not None
    torch.testing.assert_close(known.probabilities(x), fresh.probabilities(x), rtol=0, atol=0.01)
    assert known.errors == pytest.approx(fresh.errors, abs=0.01)


@pytest.mark.slow
def test_estimator_and_training_share_no_item_group_or_text(punster_data: Path) -> None:
    """Whatever a training mixture may read is of other PunEval items and other He groups, and the guard knows every text."""
    pool = Pool(punster_data)
    own = success.labelled(pool)
    items = {row.item for row in own}
    assert len(items) >= 30
    assert len(own) >= 400
    for name in ("puneval", "pungen_he2019", "expunations", "semeval2017_task7"):
        training = pool.rows(name, "train")
        assert training
        assert not items & {row.get("semeval_id") for row in training}
        if name == "pungen_he2019":  # a pair of words is the same group either way round
            assert not {frozenset(i.split("-")) for i in items} & {
                frozenset(row["id"].split("/")[1].split("-")) for row in training
            }
    guard = set(pool.evaluation.sets)
    assert all(words(row.text) in guard for row in own)
    assert success.PART != "train"


# ---- what the yardstick calls a pun -----------------------------------------------------------------------------------
class Texts:
    """SemEval's texts: two puns and two sentences."""

    def rows(self, source: str, part: str) -> list[dict[str, object]]:
        assert (source, part) == ("semeval2017_task7", "val")
        return [{"text": text, "is_pun": is_pun} for text, is_pun in (("9", True), ("2", True), ("8", False), ("1", False))]


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten machine outputs whose text is their score, 0 to 9; people call 9, 8 and 5 puns."""
    outputs = [Labelled(str(i), float(i in (9, 8, 5)), str(i), "m") for i in range(10)] + [Labelled("7", 1.0, "h", "human")]
    monkeypatch.setattr(success, "labels_at_hand", Texts)
    monkeypatch.setattr(success, "labelled", lambda pool: outputs)
    monkeypatch.setattr(
        success, "pun_scores", lambda gold, tokenizer, texts: torch.tensor([float(t) for t in texts], dtype=torch.float64)
    )


@pytest.mark.usefixtures("labels")
def test_as_many_outputs_are_called_puns_as_people_call(tiny_llama: Path) -> None:
    calls = success.Calls.open(Role(load_model(str(tiny_llama))), Tokenizer.load(str(tiny_llama)))
    assert 6 < calls.threshold < 7  # of the ten outputs three lie above, as three are called puns; people's text does not count
    # Pairs of a pun and another: 9 and 8 are above all seven, 5 is above five of them.
    assert calls.about == pytest.approx(
        {"outputs": 10, "people": 0.3, "auc": 19 / 21, "semeval_puns": 0.5, "semeval_others": 0.5}
    )
    found = calls.rate([["9", "1"], ["7", "8"], ["2", "3"], ["9", "0"]])
    assert found["mean"] == 0.5 and 0 <= found["low"] < 0.5 < found["high"] <= 1
    assert calls.rate([["1"], ["6"]])["high"] == 0.0


def test_scores_of_calls_hang_on_the_text_alone(tiny_llama: Path) -> None:
    tokenizer = Tokenizer.load(str(tiny_llama))
    model = load_model(str(tiny_llama))
    gold = Role(model, head=ScalarHead.create(model.config.d_model, torch.Generator().manual_seed(1)))
    texts = ["the tide was tied", "", "a fact"]
    together = success.pun_scores(gold, tokenizer, texts)
    assert together.shape == (3,) and len(set(together.tolist())) == 3
    own = Example(tuple(tokenizer.prompt_ids("make a pun")), tuple(tokenizer.response_ids(texts[0])))
    assert float(together[0]) == pytest.approx(score_examples(gold, [own])[0], abs=1e-5)
    assert float(together[2]) == pytest.approx(float(success.pun_scores(gold, tokenizer, texts[2:])), abs=1e-5)


def test_a_fit_that_cannot_be_kept_is_a_fit(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    role, tokenizer = Role(load_model(str(tiny_llama))), Tokenizer.load(str(tiny_llama))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PUNSTER_CACHE", str(tmp_path / "file"))  # below which no folder can be made
    found = success.Estimator(**dict.fromkeys((item.name for item in fields(success.Estimator)), None))
    monkeypatch.setattr(success, "pool_of", lambda folder: None)
    monkeypatch.setattr(success, "data_folder", lambda: None)
    monkeypatch.setattr(success, "labelled", lambda pool: [])
    monkeypatch.setattr(success, "features", lambda *_: None)
    monkeypatch.setattr(success, "fit_estimator", lambda *_: found)
    assert success.open_estimator(role, tokenizer) is found
