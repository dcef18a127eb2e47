"""How far raters agree: each against the mean of the others, on a table made for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "rater_agreement.py"


def test_a_rater_is_set_against_the_mean_of_the_others(tmp_path: Path) -> None:
    votes = {  # raters a, b, c; what b and c have apart decides whether a's own preference counts
        ("human", "one"): (5, 4, 4),
        ("njd", "two"): (1, 1, 1),
        ("surgen", "three"): (2, 1, 0),
    }
    lines = ["aspect,worker_hash,pun_alter,system,sentence,rating"]
    for (system, sentence), ratings in votes.items():
        lines += [f"funniness,{rater},x-y,{system},{sentence},{rating}" for rater, rating in zip("abc", ratings, strict=True)]
        lines.append(f"grammar,a,x-y,{system},{sentence},5")
    (tmp_path / "pungen_he2019").mkdir()
    (tmp_path / "pungen_he2019" / "mturk_ratings_long.csv").write_text("\n".join(lines) + "\n")
    spec = importlib.util.spec_from_file_location("rater_agreement", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.agreements(tmp_path)
    # two against three: gaps -1, 0, 1; for a the others' mean is .5, for b it is 0, for c -.5
    assert found == {
        "a person's and a machine's": [1.0] * 6,
        "machines, NJD one of them": [pytest.approx(0.0), pytest.approx(0.0)],
    }
