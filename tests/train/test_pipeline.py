"""Pipelines: estimated times count the rows that the stages name; recipes are what they say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from punster.config import DpoConfig, GrpoConfig, PipelineConfig, PpoConfig, RewardConfig, SftConfig, TrainConfig
from punster.data import corpus
from punster.data.schema import texts_of
from punster.errors import UserError
from punster.model.tokenizer import Tokenizer
from punster.train import estimate, pipeline


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Seven rows that serve as texts, as pairs, and as KTO's labelled texts."""
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "p", "completion": "c", "chosen": "a", "rejected": "b", "label": True}
    path.write_text(f"{json.dumps(row)}\n" * 7)
    return str(path)


def test_own_rows_are_counted_and_their_lengths_measured(rows: str, tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = Tokenizer.load(str(tiny_llama))

    def count(stage: TrainConfig) -> tuple[int, int]:
        return estimate.given(stage, {}, tokenizer)[:2]

    train = len(corpus.part("train"))
    assert count(SftConfig(data=[rows])) == (7, 1)  # the completion; what is chosen or rejected is for other verbs
    assert count(SftConfig(data=["embedded", rows])) == (train + 7, train + 1)
    assert count(DpoConfig(data=[rows])) == (7, 2)
    assert count(DpoConfig()) == (2 * train, len({text for row in corpus.pairs() for text in texts_of(row)}))
    assert count(DpoConfig(data=[rows], loss_type="kto"))[0] == 4  # two texts for a pair
    assert count(DpoConfig(online=True, reward_model="r")) == (0, 0)
    assert count(RewardConfig(data=["embedded", rows])) == (7, 2)  # `stage_work` counts the embedded corpus by itself
    assert count(RewardConfig()) == count(PpoConfig()) == (0, 0)
    _, _, prompt, response = estimate.given(SftConfig(data=[rows]), {}, tokenizer)
    assert (prompt, response) == (len(tokenizer.prompt_ids("p")), len(tokenizer.response_ids("c")))


def test_longer_texts_and_more_held_out_prompts_take_longer(
    rows: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("punster.train.estimate.measured_speed", lambda *_: 1e9)
    long = tmp_path / "long.jsonl"
    long.write_text(f"{json.dumps({'prompt': 'p', 'completion': 'c' * 60})}\n" * 7)
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')

    def seconds(data: str, **evaluate: Any) -> dict[str, float]:
        config = PipelineConfig(name="r", out=str(tmp_path), model=str(tiny_llama), stages=["sft", "reward", "gold", "ppo"], sft={"data": [data]},
                                ppo={"max_new_tokens": 40}, evaluate=evaluate)  # fmt: skip
        return estimate.pipeline_seconds(config, *pipeline.parts_of(config), [], {})

    short, long_texts = seconds(rows), seconds(str(long))
    for stage in ("sft", "ppo", "evaluate"):
        assert long_texts[stage] > 1.5 * short[stage], stage
    assert long_texts["reward"] == short["reward"], "which reads the embedded corpus in both"
    one, both = seconds(rows, prompts=str(few), limit=1), seconds(rows, prompts=str(few))
    assert both["evaluate"] == pytest.approx(2 * one["evaluate"])
    assert seconds(rows, prompts=str(few), limit=50) == both, "there are but two"


def test_a_recipe_with_fewer_rows_takes_less_time(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from punster.cli import main

    monkeypatch.setattr("punster.train.estimate.measured_speed", lambda *_: 1e9)  # multiply-adds a second, whatever else runs

    def minutes(data: str) -> float:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"name: r\nstages: [sft, reward, gold]\nsft: {{epochs: 1000000, data: [{data}]}}\n")
        assert main(["run", str(recipe), "--model", str(tiny_llama), "--out", str(tmp_path / "runs"), "--dry-run"]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("sft"))
        return float(line.split()[2])

    tokenizer, some = Tokenizer.load(str(tiny_llama)), corpus.sft_rows("train")
    length = lambda row: len(tokenizer.prompt_ids(row["prompt"])) + len(tokenizer.response_ids(row["completion"]))
    mean = sum(map(length, some)) / len(some)
    typical = min(some, key=lambda row: abs(length(row) - mean))
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(typical)}\n" * 7)
    whole = minutes("embedded")
    assert whole > 10 and minutes(str(tmp_path / "rows.jsonl")) == pytest.approx(7 / len(some) * whole, rel=0.1)


def test_stages_that_are_there_count_as_done_only_where_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PipelineConfig(name="r", out=str(tmp_path), stages=["sft", "reward", "gold"])
    monkeypatch.setattr(pipeline, "stage_summary", lambda folder, stage: {"steps": 1} if stage == "sft" else {})
    monkeypatch.setattr(pipeline, "pipeline_seconds", lambda config, stages, evaluation, done, counts: dict.fromkeys(done, 1.0))
    assert pipeline.time_left(config, *pipeline.parts_of(config), {}) == {}
    going_on = replace(config, resume=True)
    assert pipeline.time_left(going_on, *pipeline.parts_of(config), {}) == {"sft": 1.0}


def test_where_it_takes_long_a_scale_is_named() -> None:
    from punster.train.pipeline import shorter

    whole = PipelineConfig()
    assert shorter(20, whole) == ""
    assert shorter(42, whole) == " (--scale 0.4: about 17)"
    assert shorter(30, replace(whole, scale=0.5)) == " (--scale 0.2: about 12)"
    assert shorter(60000, whole) == " (--scale 0.01: about 600)"
    assert shorter(42, replace(whole, minutes=60)) == shorter(42, replace(whole, resume=True)) == ""


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which all of any recipe takes 50 minutes, and two at least."""
    monkeypatch.setattr(
        "punster.train.pipeline.pipeline_seconds", lambda config, *rest: {"sft": max(120.0, 3000.0 * config.scale)}
    )


def test_a_run_is_made_to_fit_into_its_minutes(slow: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from punster.train.pipeline import SCALES, fitted

    given = PipelineConfig(name="r", out=str(tmp_path), minutes=20)
    assert fitted(given, {}).scale == 0.4
    assert "about 50 minutes on this machine; --scale 0.4 takes about 20" in capsys.readouterr().err
    assert fitted(replace(given, minutes=0), {}).scale == 1
    assert fitted(replace(given, minutes=46), {}) == replace(given, minutes=46) and not capsys.readouterr().err  # a little more
    assert fitted(replace(given, minutes=1), {}).scale == 0.01 and "takes about 2 " in capsys.readouterr().err
    for scale in (3, 0.41, *SCALES[-10:], 0.005):
        found = fitted(replace(given, scale=scale), {}).scale
        assert found <= scale and (found == scale or 10 < 50 * found <= 21)


def test_a_run_that_was_made_to_fit_goes_on_as_it_began(
    slow: None, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    from punster.cli import main

    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nminutes: 1\nstages: [sft, gold]\nsft: {steps: 200, eval_prompts: 2}\n"
        "gold: {data: [embedded], negatives: [weak], normalise_samples: 8}\nevaluate: {samples: 1, max_new_tokens: 4}\n"
    )
    command = ["run", str(recipe), "--model", str(tiny_llama), "--out", str(tmp_path / "runs"), "--scale", "0.5"]
    folder = tmp_path / "runs" / "r"
    assert main([*command, "--dry-run"]) == 0
    assert "at scale 0.01" in capsys.readouterr().out and not folder.exists()

    def killed(config: RewardConfig) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(pipeline.STAGES, "gold", (RewardConfig, killed, "killed"))
        assert main(command) == 130
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (saved["scale"], saved["minutes"]) == (0.01, 0.0)
    monkeypatch.setattr(pipeline, "pipeline_seconds", lambda *rest: {"sft": 1.0})  # a faster one
    assert main([*command, "--resume", "--quiet"]) == 0
    assert main([*command[:-1], "0.3", "--resume"]) == 0
    assert "r goes on at the scale that it began with, 0.01, not 0.3" in capsys.readouterr().err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["scale"] == 0.01 and "scale 0.01 of the recipe" in (folder / "report.html").read_text()
    assert json.loads((folder / "sft" / "summary.json").read_text())["steps"] == 2
    (folder / "config.yaml").write_text("scale: none of it\n")
    assert main([*command, "--resume"]) == 2 and "scale must be a number above 0" in capsys.readouterr().err


def test_scale_takes_fewer_passes_over_the_same_rows() -> None:
    from punster.train.pipeline import scaled

    reward = scaled(RewardConfig(epochs=2, rows_per_kind=100, sampled_rows=160), 0.5)
    assert isinstance(reward, RewardConfig) and (reward.epochs, reward.rows_per_kind, reward.sampled_rows) == (1, 100, 80)


@pytest.mark.parametrize("scale", [2, 0.6, 0.02])
def test_none_stays_none_and_all_stay_all_at_any_scale(scale: float) -> None:
    from punster.train.pipeline import scaled

    reward = scaled(RewardConfig(normalise_samples=0, test_limit=0, sampled_rows=0), scale)
    assert isinstance(reward, RewardConfig) and (reward.normalise_samples, reward.test_limit, reward.sampled_rows) == (0, 0, 0)
    policy = scaled(PpoConfig(steps=10, eval_prompts=0), scale)
    assert policy.eval_prompts == 0
    assert [scaled(PpoConfig(steps=10, eval_prompts=count), 0.02).eval_prompts for count in (1, 16)] == [1, 2]
    online = {"online": True, "reward_model": "r", "steps": 9}
    pairs = scaled(DpoConfig(**online), scale)
    assert isinstance(pairs, DpoConfig) and pairs.prompt_limit == {2: 0, 0.6: 300, 0.02: 10}[scale]  # for less work: of 500
    limited = scaled(DpoConfig(**online, prompt_limit=100), 2)
    assert isinstance(limited, DpoConfig) and limited.prompt_limit == 200


@pytest.mark.parametrize(
    ("scale", "steps", "size"), [(2, 20, 64), (1, 10, 64), (0.65, 10, 40), (0.25, 10, 16), (0.1, 4, 16), (0.02, 1, 16)]
)
def test_scale_makes_as_many_updates_from_fewer_samples(scale: float, steps: int, size: int) -> None:
    from punster.train.pipeline import scaled

    for config in (PpoConfig(steps=10), GrpoConfig(steps=10), DpoConfig(steps=10, batch_size=64, online=True, reward_model="r")):
        found = scaled(config, scale)
        assert (found.steps, found.batch_size) == (steps, size)
    small = scaled(PpoConfig(steps=10, batch_size=4), scale)  # never more than was asked for
    assert isinstance(small, PpoConfig) and small.batch_size == 4 and small.minibatches <= small.batch_size
    assert scaled(PpoConfig(steps=10, batch_size=100), 1).batch_size == 100
    given = scaled(DpoConfig(steps=10, batch_size=64), scale)  # of given pairs: fewer steps
    assert (given.steps, given.batch_size) == (max(1, round(10 * scale)), 64)


def test_the_human_recipe_is_the_reward_recipe_on_halves() -> None:
    import yaml

    from punster.data.recipe import recipe_folder
    from punster.train.pipeline import evaluation_config, load_recipe, stage_config

    recipe = load_recipe("human")
    settings = yaml.safe_load((recipe_folder() / "reward-human.yaml").read_text(encoding="utf-8"))
    assert settings.pop("minutes") == 25  # a pipeline has minutes for all of its stages
    with pytest.raises(UserError, match="section 'gold' of the recipe: a stage has no minutes of its own"):
        stage_config(replace(recipe, gold={**recipe.gold, "minutes": 5}), "gold")
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


OF_ALL = [
    *((stage, key, value) for stage in ("sft", "ppo") for key, value in (("name", "mine"), ("out", "elsewhere"), ("resume", True))),
    ("ppo", "dry_run", True), ("evaluate", "out", "elsewhere"), ("evaluate", "resume", False),
]  # fmt: skip


@pytest.mark.parametrize(("section", "key", "value"), OF_ALL)
def test_what_is_of_the_whole_run_is_refused_in_a_section(
    section: str, key: str, value: object, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from punster.cli import main

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: r\nstages: [sft, reward, gold, ppo]\n{section}: {{{key}: {json.dumps(value)}}}\n")
    assert main(["run", str(recipe), "--model", str(tiny_llama), "--out", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert f"section '{section}' of the recipe: a stage has no {key} of its own; --{key.replace('_', '-')} is for all" in said
    assert not (tmp_path / "runs").exists()


def test_names_of_others_in_a_section_get_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from punster.cli import main

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: r\nstages: [sft, reward, gold, ppo]\nppo: {kl_coef: 0.1}\n")
    assert main(["run", str(recipe), "--out", str(tmp_path / "runs")]) == 2
    assert "unknown key 'kl_coef'. Did you mean beta?" in capsys.readouterr().err


def test_a_recipes_file_name_that_is_no_name_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from punster.cli import main
    from punster.train.pipeline import load_recipe

    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text("stages: [sft, gold]\n")
    assert main(["run", str(recipe), "--out", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert "run name 'my recipe'" in said and "--name" in said and not (tmp_path / "runs").exists()
    assert load_recipe(str(recipe), ["--name", "mine"]).name == "mine"
    assert load_recipe(str(recipe.rename(tmp_path / "good.yaml"))).name == "good"


def test_a_machine_without_git_knows_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    from punster.train.pipeline import commit

    monkeypatch.setenv("PATH", "/nowhere")
    assert commit() is None
