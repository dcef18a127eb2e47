"""The columns beside reward and win rate, of a whole evaluation of tiny models; the figure of over-optimisation."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

from punster.data import corpus
from punster.evaluate import extra
from punster.evaluate.report import overoptimisation_figure
from punster.evaluate.success import Estimator
from punster.evaluate.table import result_tables
from punster.model.load import load_model
from punster.model.role import Role
from punster.model.tokenizer import Tokenizer
from punster.puns.surprisal import document_start
from punster.rollout.sampler import Decoding


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> tuple[Role, Tokenizer]:
    return Role(load_model(str(tiny_llama))), Tokenizer.load(str(tiny_llama))


def test_columns_with_and_without_labels(tiny: tuple[Role, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    role, tokenizer = tiny
    texts = [["make a pun about bakers", "on and on and on and on and on"], ["The tide turned.", "The tide turned."]]
    monkeypatch.setattr(extra, "open_estimator", lambda *_: None)
    bare = extra.Extra.open(role, tokenizer, ["the tide turned"], 1).of_texts(texts)
    assert bare["success_rate"] is None
    assert (bare["loop_rate"], bare["unique_share"]) == (0.25, 0.75)
    assert bare["nearest_training"] == pytest.approx(0.5)
    half = Estimator([0.0] * 10, [0.0] * 9, [1.0] * 9, {"x": -0.2, "y": 0.1})
    monkeypatch.setattr(extra, "open_estimator", lambda *_: half)
    full = extra.Extra.open(role, tokenizer, None, 1).of_texts(texts)
    assert full["success_rate"] == pytest.approx({"mean": 0.5, "low": 0.4, "high": 0.7})
    assert full["nearest_training"] is full["mauve"] is None
    tables = result_tables({"models": {"sft": full, "ppo": bare}})
    shown = next(t for t in tables if t.title == "What the texts are like")
    assert shown.columns[0].key == "success_rate"
    assert shown.rows[0][1].startswith("50")
    assert shown.rows[1][1] == "–"


def test_mauve_against_the_puns_of_people(tiny: tuple[Role, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    role, tokenizer = tiny
    monkeypatch.setattr(extra, "open_estimator", lambda *_: None)
    opened = extra.Extra.open(role, tokenizer, None, 1)
    puns = [[record["pun"]] for record in corpus.part("test")]
    stuck = [["on and on"], ["and so on and on and on and on and on and on and on and on"]] * 60
    assert opened.of_texts(puns)["mauve"] == pytest.approx(1, abs=1e-6)
    assert opened.of_texts(stuck)["mauve"] < 0.2
    assert opened.of_texts(puns[:99])["mauve"] is None


def test_perplexity_is_of_the_corpus(tiny: tuple[Role, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    role, tokenizer = tiny
    monkeypatch.setattr(extra, "open_estimator", lambda *_: None)
    monkeypatch.setattr(corpus, "part", lambda _: list(corpus.records())[:2])
    found = extra.Extra.open(role, tokenizer, None, 1).of_model(role, [torch.tensor([-1.0, -2.0])], Decoding())
    total, count = 0.0, 0
    for record in list(corpus.records())[:2]:
        ids = [document_start(tokenizer), *tokenizer.text_ids(record["plain"])]
        logs = role.model.forward(torch.tensor([ids])).log_softmax(-1)[0]
        total += sum(float(logs[i, t]) for i, t in enumerate(ids[1:]))
        count += len(ids) - 1
    assert found["perplexity_plain"] == pytest.approx(math.exp(-total / count), rel=1e-3)
    assert found["exposure_gap"] == pytest.approx(math.log(found["perplexity_puns"]) - 1.5, rel=1e-6)
    for other in (Decoding(temperature=0.7), Decoding(min_p=0.1)):  # own samples of another distribution
        cooler = extra.Extra.open(role, tokenizer, None, 1).of_model(role, [torch.tensor([-1.0, -2.0])], other)
        assert cooler == {**found, "exposure_gap": None}


def test_the_figure_shows_both_rewards_and_where_to_stop() -> None:
    script = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "over_optimisation.py"))
    gold, summary_of = script["Fit"]("rl", 0.7, 0.3, 1.0), script["summary_of"]
    kl = [0.0, 1.0, 4.0, 16.0, 64.0]
    rows = [{"step": i, "kl": k, "proxy": k**0.5, "gold": gold(k**0.5)} for i, k in enumerate(kl)]
    found = overoptimisation_figure(summary_of(rows, {"n": [1, 2, 4, 8], "gold": [0.0, 0.2, 0.3, 0.35]}))
    assert found is not None
    assert found["svg"].startswith("<svg")
    assert "best of n, gold" in found["svg"]
    assert f"highest at step {summary_of(rows)['stop']}" in found["caption"]
    assert overoptimisation_figure({}) is None
