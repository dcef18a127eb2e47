"""Intervals, win rates and text metrics against hand values and enumeration."""

from __future__ import annotations

import math
import random
import statistics
from itertools import combinations
from typing import Any

import pytest
import torch

from punster.algorithms.bestofn import best_of_win_share
from punster.evaluate.metrics import copy_rate, distinct_n
from punster.evaluate.winrate import (
    bootstrap,
    bradley_terry_ratings,
    kappa,
    length_controlled,
    logistic_fit,
    prompts_needed,
    sign_test,
    versus,
    wilson,
    win_share,
)


def test_win_share_by_hand() -> None:
    assert win_share([1.0, 3.0], [2.0]) == 0.5
    assert win_share([2.0], [2.0, 1.0]) == 0.75
    assert win_share([0.0], [1.0]) + win_share([1.0], [0.0]) == 1.0


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_win_share_is_the_enumeration(n: int) -> None:
    """Best of n by a proxy against a sample that is not among the n, over all choices."""
    proxy, gold = [0.1, 0.9, 0.4, 0.7, 0.2], [0.3, 0.1, 0.9, 0.5, 0.2]
    wins = []
    for subset in combinations(range(5), n):
        best = max(subset, key=lambda i: proxy[i])
        wins += [float(gold[best] > gold[other]) for other in range(5) if other not in subset]
    assert best_of_win_share(proxy, gold, n) == pytest.approx(sum(wins) / len(wins))
    assert best_of_win_share(gold, gold, n) == pytest.approx(n / (n + 1))


def test_best_of_win_share_needs_an_opponent() -> None:
    with pytest.raises(ValueError, match="more than 3"):
        best_of_win_share([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 3)


def test_bootstrap_covers_a_planted_mean() -> None:
    source = random.Random(3)
    inside = 0
    for trial in range(300):
        value = bootstrap([float(source.random() < 0.6) for _ in range(100)], seed=trial, resamples=400)
        inside += value["low"] <= 0.6 <= value["high"]
    assert 0.91 <= inside / 300 <= 0.98


def test_bootstrap_is_seeded_and_ordered() -> None:
    value = bootstrap([0.0, 1.0, 2.0, 3.0], seed=5)
    assert value == bootstrap([0.0, 1.0, 2.0, 3.0], seed=5)
    assert value["low"] < value["mean"] == 1.5 < value["high"]
    assert bootstrap([2.0, 2.0, 2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0}


def test_distinct_and_copies_by_hand() -> None:
    assert distinct_n(["a b c", "a b d"], 2) == 3 / 4
    assert distinct_n([], 2) == 0
    training = ["the cat sat on the mat", "dogs bark at night"]
    assert copy_rate(["The cat sat on a mat!", "dogs sing at dawn", "dogs bark at night."], training) == pytest.approx(2 / 3)
    assert copy_rate(["something else"], training) == 0


# ---- planted truths ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [100, 200])
def test_a_planted_win_rate_lies_in_the_interval_as_often_as_promised(count: int) -> None:
    """Nominal 95 % intervals around a true 60 % hold it in 93 to 97 % of simulated evaluations."""
    source = random.Random(11)
    inside = {"bootstrap": 0, "wilson": 0}
    for trial in range(1000):
        plain = [float(source.random() < 0.6) for _ in range(count)]
        for name, value in (("bootstrap", bootstrap(plain, seed=trial)), ("wilson", wilson(plain))):
            inside[name] += value["low"] <= 0.6 <= value["high"]
    assert all(0.93 <= hits / 1000 <= 0.97 for hits in inside.values()), inside


def test_wilson_by_hand() -> None:
    """7 of 10, from the closed form with z = 1.959964; ties half; never outside [0, 1]."""
    value = wilson([1.0] * 7 + [0.0] * 3)
    assert (value["low"], value["high"]) == (pytest.approx(0.39678, abs=1e-5), pytest.approx(0.89221, abs=1e-5))
    assert wilson([1.0, 0.5, 0.5, 0.0])["mean"] == 0.5
    assert wilson([1.0] * 5)["high"] == 1.0
    assert wilson([0.0] * 5)["low"] == pytest.approx(0, abs=1e-12)


def test_sign_test_by_enumeration() -> None:
    for wins, losses in ((0, 0), (5, 5), (8, 2), (1, 9), (11, 2)):
        count = wins + losses
        flips = [bin(outcome).count("1") for outcome in range(2**count)]  # every outcome at least as uneven as this one
        extreme = sum(abs(2 * heads - count) >= abs(wins - losses) for heads in flips) / 2**count
        assert sign_test(wins, losses) == pytest.approx(extreme)
        assert sign_test(wins, losses) == sign_test(losses, wins)
    assert versus([1.0, 0.75, 0.5, 0.25], [0.0] * 4)["sign_test"] == sign_test(2, 1)


def test_sample_sizes_of_the_literature() -> None:
    assert [prompts_needed(rate) for rate in (0.55, 0.6, 0.65)] == [783, 194, 85]
    assert prompts_needed(0.4) == 194
    assert prompts_needed(0.5) is None


def test_shares_that_vary_less_need_fewer_prompts() -> None:
    """Simulated: with so many prompts, four of five experiments find the difference (and with a third of them, far fewer)."""
    generator = random.Random(1)
    draw = lambda count: [sum(generator.random() < 0.56 for _ in range(9)) / 9 for _ in range(count)]  # a mean over nine samples
    needed = prompts_needed(0.56, statistics.pstdev(draw(20000)))
    assert needed is not None and needed < 100 < 500 < (prompts_needed(0.56) or 0)

    def found(count: int) -> float:
        trials = [draw(count) for _ in range(400)]
        scores = [(statistics.fmean(one) - 0.5) / (statistics.stdev(one) / math.sqrt(count)) for one in trials]
        return sum(score > 1.96 for score in scores) / len(scores)

    assert 0.74 < found(needed) < 0.88
    assert found(needed // 3) < 0.5
    mixed = versus([0.75, 0.5, 1.0, 0.25], [0.0] * 4)
    assert mixed["wilson"] is None and versus([1.0, 0.5, 0.0, 1.0], [0.0] * 4)["wilson"]["mean"] == 0.625
    assert mixed["prompts_needed"] == prompts_needed(0.625, statistics.pstdev([0.75, 0.5, 1.0, 0.25]))


def test_kappa_by_hand() -> None:
    """Cohen's own kind of table: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no gives (.7 - .5) / .5 = .4."""
    a = [1] * 25 + [0] * 25
    b = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    value = kappa(a, b)
    assert value["mean"] == pytest.approx(0.4)
    # the large-sample standard error of this table is .1293 (Fleiss et al. 1969)
    assert (value["high"] - value["low"]) / 3.92 == pytest.approx(0.13, abs=0.015)
    assert kappa(a, a)["mean"] == 1
    assert kappa([1, 0, 1, 0], [1, 1, 0, 0])["mean"] == 0
    assert kappa([1, 1, 1], [1, 1, 1])["mean"] == 0  # one label only: nothing to agree about


def test_logistic_fit_is_at_the_maximum() -> None:
    """Against torch's own optimiser on random data with soft targets and weights."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(60, 3, generator=generator).double()
    shares = torch.rand(60, generator=generator).double()
    weights = torch.randint(0, 4, (2, 60), generator=generator).double()
    fitted = logistic_fit(inputs, shares, weights, ridge=0.5)
    for row in range(2):
        free = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [free], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def loss(free: torch.Tensor = free, row: int = row) -> torch.Tensor:
            entropy = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ free, shares, weights[row], reduction="sum")
            return entropy + 0.25 * free.square().sum()

        def closure(optimizer: torch.optim.Optimizer = optimizer, loss: Any = loss) -> torch.Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)
        assert fitted[row].tolist() == pytest.approx(free.tolist(), abs=1e-6)


def test_planted_ratings_are_recovered_in_any_order() -> None:
    planted = {"base": -1.2, "sft": -0.3, "ppo": 0.5, "dpo": 1.0}
    source = random.Random(4)
    games = []
    for prompt in range(840):
        for a, b in combinations(planted, 2):  # 5,040 games
            wins = source.random() < 1 / (1 + math.exp(planted[b] - planted[a]))
            games.append((a, b, float(wins), prompt))
    ratings = bradley_terry_ratings(games, resamples=200)
    for name, logit in planted.items():
        assert ratings[name]["mean"] == pytest.approx(1000 + 173.7 * logit, abs=20)
        assert ratings[name]["low"] <= 1000 + 173.7 * logit <= ratings[name]["high"]
    assert sum(value["mean"] for value in ratings.values()) == pytest.approx(4000)
    source.shuffle(games)
    mirrored = [(b, a, 1 - share, prompt) for a, b, share, prompt in games]
    again = bradley_terry_ratings(mirrored, resamples=200)
    for name, value in ratings.items():
        assert again[name] == pytest.approx(value, abs=1e-6)


def test_ratings_of_a_whitewash_are_finite() -> None:
    ratings = bradley_terry_ratings([("a", "b", 1.0, p) for p in range(20)], resamples=50)
    assert 1000 < ratings["a"]["mean"] < 3000
    assert ratings["a"]["mean"] + ratings["b"]["mean"] == pytest.approx(2000)


def test_length_control_takes_out_what_length_explains() -> None:
    """Judge that loves length: share = sigmoid(.4 + 1.5 tanh(gap / sd)); the side writes 5 words more on average."""
    source = random.Random(8)
    gaps = [source.gauss(5, 6) for _ in range(3000)]
    scale = math.sqrt(sum(gap * gap for gap in gaps) / len(gaps))
    shares = [float(source.random() < 1 / (1 + math.exp(-0.4 - 1.5 * math.tanh(gap / scale)))) for gap in gaps]
    raw = sum(shares) / len(shares)
    controlled = length_controlled(shares, gaps)
    truth = 1 / (1 + math.exp(-0.4))
    assert raw > 0.68
    assert controlled["low"] <= truth <= controlled["high"]
    assert controlled["mean"] == pytest.approx(truth, abs=0.03)
    mirrored = length_controlled([1 - share for share in shares], [-gap for gap in gaps])
    assert mirrored["mean"] == pytest.approx(1 - controlled["mean"], abs=1e-6)
    even = length_controlled([1.0, 0.0, 1.0, 1.0], [0.0] * 4)
    assert even["mean"] == pytest.approx(0.75, abs=0.01)
