"""Laws of Gao et al. recovered from planted curves; where to stop; when two reward models part."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest

script = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "over_optimisation.py"))
Fit, fit_law, split_at, stop_step, summary_of = (
    script[name] for name in ("Fit", "fit_law", "split_at", "stop_step", "summary_of")
)


@pytest.mark.parametrize("law", ["best_of_n", "rl"])
def test_planted_laws_are_recovered(law: str) -> None:
    truth = Fit(law, 0.8, 0.15, 1.0)
    kl = [0.0, 0.5, 1, 2, 4, 8, 16, 30]
    found = fit_law(kl, [truth(math.sqrt(k)) for k in kl], law)
    assert (found.a, found.b, found.r2) == pytest.approx((0.8, 0.15, 1.0))
    around = [found(found.peak * f) for f in (0.98, 1, 1.02)]
    assert around[1] == max(around)
    height = truth.a**2 / (4 * truth.b) if law == "best_of_n" else truth.b * found.peak
    assert found(found.peak) == pytest.approx(height)


def test_a_law_that_does_not_turn_and_too_few_points() -> None:
    assert fit_law([1, 4, 9], [1, 2, 3], "best_of_n").b == pytest.approx(0, abs=1e-9)
    assert Fit("rl", 1.0, -0.1, 1.0).peak == math.inf
    with pytest.raises(ValueError, match="at least 3"):
        fit_law([0, 1, 1], [0, 1, 1], "rl")


def test_stop_is_the_smoothed_peak() -> None:
    assert stop_step([0, 1, 2, 3, 4, 5], [0, 5, 0, 2, 4, 2], reach=1) == 4  # the lone spike is noise
    assert stop_step([], []) is None


def test_split_of_two_reward_models() -> None:
    assert split_at([0, 1, 2, 3], [0, 1.0, 2, 3], [0, 0.7, 1.0, 1.0], 0.5) == 2
    assert split_at([0, 1, 2], [0, 1, 1], [0, 0, 1], 0.5) is None  # they meet again


def test_summary_of_an_over_optimised_run() -> None:
    proxy, gold = Fit("rl", 1.0, 0.1, 1.0), Fit("rl", 0.7, 0.3, 1.0)
    kl = [0.0, 0.5, 1, 2, 4, 8, 16, 32, 64, 128]
    rows = [
        {"step": i, "kl": k, "proxy": 0.2 + proxy(k**0.5), "gold": -0.1 + gold(k**0.5), "length": 10 + i}
        for i, k in enumerate(kl)
    ]
    truth = {"n": [1, 2, 4, 8], "gold": [0.5, 0.8, 1.0, 1.1]}
    found = summary_of(rows, truth)
    assert found["fit_gold"]["peak"] == pytest.approx(math.exp(0.7 / 0.3 - 1))
    assert kl[found["stop"]] == 16  # d = 4 lies nearest to 3.79
    assert found["length_proxy_spearman"] == pytest.approx(1.0)
    assert found["best_of_n"]["gold"] == pytest.approx([0, 0.3, 0.5, 0.6])
    assert found["best_of_n"]["fit"]["r2"] > 0.95
    assert "fit_gold" not in summary_of(rows[:3])
