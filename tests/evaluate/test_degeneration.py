"""Repetition, loops, diversity and MAUVE against hand values."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

from punster.api import load
from punster.evaluate import degeneration as d
from punster.evaluate.metrics import copy_rate, words

ROOT = Path(__file__).resolve().parents[2]


def test_repetition_by_hand() -> None:
    assert d.seq_rep(["a", "b", "c", "a", "b", "c", "a", "b", "c"], 3) == pytest.approx(1 - 3 / 7)
    assert d.seq_rep(["a", "b"], 4) == 0
    assert d.rep(["a", "b", "a", "c", "b"], reach=2) == pytest.approx(1 / 5)
    assert d.rep([]) == 0


@pytest.mark.parametrize(
    ("text", "onset"),
    [
        ("x y a b a b a b", 2), ("x y a b a b a b z", None), ("a a a a a a", 0), ("x a a a a a", None),
        ("p q r s t u v w", None), ("z a b c a b c a b c a", 1), ("", None),
    ],
)  # fmt: skip
def test_loops(text: str, onset: int | None) -> None:
    assert d.loop_onset(text.split()) == onset


def test_self_bleu_ends() -> None:
    same = ["the cat sat on the mat today"] * 3
    assert d.self_bleu(same) == pytest.approx(1)
    apart = ["one two three four five", "six seven eight nine ten", "red green blue black white"]
    assert d.self_bleu(apart) < 0.01
    mixed = d.self_bleu(["the cat sat on the mat", "the cat sat on the hat", "a dog ran off at noon"])
    assert 0.2 < mixed < 0.8
    assert d.self_bleu(["alone"]) == 0
    # By hand, n = 1: precision 1/2 of "a b" against {"a c"}, and the other way round.
    assert d.self_bleu(["a b", "a c"], n=1) == pytest.approx(0.5)


def test_zipf_slope_is_planted() -> None:
    text = " ".join(f"w{rank}" for rank in range(1, 60) for _ in range(round(10_000 / rank**1.2)))
    assert d.zipf_slope([text]) == pytest.approx(1.2, abs=0.01)
    assert math.isnan(d.zipf_slope(["a b"]))


def test_templates_uniqueness_and_neighbours() -> None:
    texts = ["Why did the baker leave", "why did the baker! stay", "short one", "Why did the cook go"]
    assert d.commonest_start(texts) == 0.5
    assert d.unique_share([["a b", "A b!", "c"], ["x"]]) == pytest.approx((2 / 3 + 1) / 2)
    assert d.unique_share([["a", "a", "b"]], size=2) == 0.5
    training = ["the cat sat on the mat", "dogs bark at night"]
    assert d.nearest_training(["dogs bark at noon", "something else entirely"], training) == [3 / 5, 0.0]
    assert d.offence_rate(["what a shit day", "a fine day"]) == 0.5


def test_perplexity_and_the_gap() -> None:
    human, own = [torch.tensor([-1.0, -3.0]), torch.tensor([-2.0])], [torch.tensor([-1.5, -0.5])]
    assert d.perplexity(human) == pytest.approx(math.exp(2))
    assert d.exposure_gap(human, own) == pytest.approx(1.0)
    assert math.isnan(d.perplexity([]))


def test_mauve_of_equal_shifted_and_disjoint_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(400, 4, generator=generator) for _ in range(2))
    same, near, far = d.mauve(one, two), d.mauve(one, two + 0.7), d.mauve(one, two + 20)
    assert same > 0.9
    assert same > near > far
    assert far < 0.05
    assert d.mauve(one, one) == pytest.approx(1, abs=1e-6)


def test_describe_texts_tells_degenerate_from_varied() -> None:
    varied = [["A baker kneads the dough at dawn", "The sea was full of ships"], ["Clocks keep time for the town"]]
    stuck = [["go on and on and on and on and on"] * 2, ["go on and on and on and on and on"]]
    good, bad = d.describe_texts(varied), d.describe_texts(stuck, ["go on and on and on"])
    assert (good["loop_rate"], bad["loop_rate"]) == (0, 1)
    for key in ("seq_rep_4", "seq_rep_2", "rep_16", "self_bleu_4", "commonest_start"):
        first, second = good[key], bad[key]
        assert first is not None
        assert second is not None
        assert first < second
    assert (good["unique_share"], bad["unique_share"]) == (1, 0.75)
    assert (good["nearest_training"], bad["nearest_training"]) == (None, 1)


@pytest.mark.slow
def test_decoders_come_out_in_the_order_of_holtzman() -> None:
    """Their Table 1 on the default model: what maximises is likeliest and repeats itself, the less a sampler cuts off the less likely it is."""
    script = runpy.run_path(str(ROOT / "scripts" / "compare_decoders.py"))
    found = dict(script["measured"](load(), 12, 64))
    order = ["beam 8", "greedy", "min-p .05", "top-k 40", "nucleus .95", "sampling", "people"]
    perplexities = [found[name]["perplexity"] for name in order]
    assert perplexities == sorted(perplexities)
    assert perplexities[1] < 4 < perplexities[2]
    stuck, free = order[:2], order[2:]
    for key, factor in (("seq_rep_4", 3), ("loops", 1.5)):
        assert min(found[name][key] for name in stuck) > factor * max(found[name][key] for name in free), key
    assert max(found[name]["distinct_2"] for name in stuck) < min(found[name]["distinct_2"] for name in free) - 0.1
    assert min(found[name]["zipf"] for name in stuck) > max(found[name]["zipf"] for name in free)


def test_words_of_other_alphabets() -> None:
    """A copy in another alphabet is a copy, and a letter with an accent ends no word."""
    assert words("Crème brûlée isn't Пирог, 2x!") == ["crème", "brûlée", "isn't", "пирог", "2x"]
    assert copy_rate(["Пирог с капустой вкусный"], ["пирог с капустой, вкусный!"]) == 1.0
