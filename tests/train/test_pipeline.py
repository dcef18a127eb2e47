"""Pipelines: estimated times count the rows that the stages name; recipes are what they say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from punster.config import DpoConfig, PipelineConfig, PpoConfig, RewardConfig, SftConfig, TrainConfig
from punster.data import corpus
from punster.data.schema import texts_of
from punster.errors import UserError
from punster.train import estimate
from punster.train.dpo import given_pairs


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Seven rows that serve as texts, as pairs, and as KTO's labelled texts."""
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "p", "completion": "c", "chosen": "a", "rejected": "b", "label": True}
    path.write_text(f"{json.dumps(row)}\n" * 7)
    return str(path)


def count(stage: TrainConfig) -> tuple[int, int]:
    return estimate.given(stage, {})


def test_own_rows_are_counted(rows: str, tmp_path: Path) -> None:
    train = len(corpus.part("train"))
    assert count(SftConfig(data=[rows])) == (7, 1)  # the completion; what is chosen or rejected is for other verbs
    assert count(SftConfig(data=["embedded", rows])) == (train + 7, train + 1)
    assert count(DpoConfig(data=[rows])) == (7, 2)
    assert count(DpoConfig()) == (2 * train, len({text for row in given_pairs() for text in texts_of(row)}))
    assert count(DpoConfig(data=[rows], loss_type="kto"))[0] == 4  # two texts for a pair
    assert count(DpoConfig(data=[rows], online=True, reward_model="r")) == (0, 0)
    assert count(RewardConfig(data=["embedded", rows])) == (7, 2)  # `stage_work` counts the embedded corpus by itself
    assert count(RewardConfig()) == count(PpoConfig()) == (0, 0)


def test_a_recipe_with_fewer_rows_takes_less_time(
    rows: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from punster.cli import main

    monkeypatch.setattr("punster.train.estimate.measured_speed", lambda *_: 1e9)  # multiply-adds a second, whatever else runs

    def minutes(data: str) -> float:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"name: r\nstages: [sft, reward, gold]\nsft: {{epochs: 1000000, data: [{data}]}}\n")
        assert main(["run", str(recipe), "--model", str(tiny_llama), "--out", str(tmp_path / "runs"), "--dry-run"]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("sft"))
        return float(line.split()[2])

    whole = minutes("embedded")
    assert whole > 10 and minutes(rows) == pytest.approx(7 / len(corpus.part("train")) * whole, rel=0.05)


def test_where_it_takes_long_a_scale_is_named() -> None:
    from punster.train.pipeline import shorter

    assert shorter(20, 1) == ""
    assert shorter(42, 1) == " (--scale 0.4: about 17)"
    assert shorter(30, 0.5) == " (--scale 0.2: about 12)"
    assert shorter(60000, 1) == " (--scale 0.01: about 600)"


def test_a_run_fits_into_its_minutes_and_keeps_the_scale_that_it_began_with(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from punster.train import pipeline

    monkeypatch.chdir(tmp_path)
    seconds = 3000.0
    monkeypatch.setattr(pipeline, "time_left", lambda *parts: {"sft": seconds})
    given = PipelineConfig(name="r", model=str(tiny_llama), minutes=20)
    found = pipeline.fitted(given, {})
    assert found.scale == 0.4 and "about 50 minutes on this machine: --scale 0.4" in capsys.readouterr().err
    assert pipeline.fitted(replace(given, minutes=0), {}).scale == 1
    assert pipeline.fitted(replace(given, scale=0.5), {}).scale == 0.2  # 50 minutes at that scale
    capsys.readouterr()
    seconds = 1300.0
    assert pipeline.fitted(given, {}) == given and not capsys.readouterr().err  # a little more is no matter
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("minutes: 0.0\nscale: 0.4\n")
    assert pipeline.fitted(replace(given, resume=True), {}).scale == 0.4
    assert (
        pipeline.fitted(replace(given, resume=True, scale=0.3), {}).scale == 0.3
    )  # wanted: what was done otherwise is refused later
    assert pipeline.fitted(replace(given, resume=True, minutes=0), {}).scale == 1


def test_the_human_recipe_is_the_reward_recipe_on_halves() -> None:
    import yaml

    from punster.data.mix import recipe_folder
    from punster.train.pipeline import evaluation_config, load_recipe, stage_config

    recipe = load_recipe("human")
    settings = yaml.safe_load((recipe_folder() / "reward-human.yaml").read_text(encoding="utf-8"))
    for stage, half in (("reward", 1), ("gold", 2)):
        found = stage_config(recipe, stage)
        assert isinstance(found, RewardConfig) and found.half == half
        assert {key: getattr(found, key) for key in settings} == settings
    assert [type(stage_config(recipe, stage)) for stage in recipe.stages] == [SftConfig, RewardConfig, RewardConfig, PpoConfig]
    assert evaluation_config(recipe, Path("runs/human")).call_puns


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("section", ["reward: {data: [human]}", "evaluate: {call_puns: true}"])
def test_data_that_cannot_be_had_are_missed_before_anything_is_written(
    section: str,
    quiet: bool,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from punster.cli import main

    monkeypatch.setenv("PUNSTER_DATA", str(tmp_path / "nowhere"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: r\nstages: [sft, reward, gold]\n{section}\n")
    command = ["run", str(recipe), "--model", str(tiny_llama), "--out", str(tmp_path / "runs"), *(["--quiet"] if quiet else [])]
    assert main(command) == 2
    said = capsys.readouterr()
    assert "nowhere: no such folder (PUNSTER_DATA names it)" in said.err and said.out == ""
    assert not (tmp_path / "runs").exists()


def test_labels_that_puns_are_called_by_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from punster.data.sources import SOURCES
    from punster.evaluate.success import labels_at_hand

    for name in SOURCES["puneval"].files:
        (tmp_path / "puneval" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "puneval" / name).touch()
    monkeypatch.setenv("PUNSTER_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"--call-puns needs pungen_he2019, semeval2017_task7, which is not there"):
        labels_at_hand()


def test_options_that_a_saved_run_does_not_know_count_as_by_default(tmp_path: Path) -> None:
    from punster.train.run import changed_settings

    (tmp_path / "config.yaml").write_text("batch_size: 16\n")
    assert changed_settings(tmp_path, RewardConfig(batch_size=16)) == ""
    assert changed_settings(tmp_path, RewardConfig(batch_size=16, half=1)) == "half: 0 -> 1"
