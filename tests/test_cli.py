"""The command line: every verb end to end on a tiny model, and one clear message for every kind of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from punster.cli import main

SHORT = ["--steps", "2", "--quiet"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """sft and reward runs of the tiny model, made through the command line."""
    out = tmp_path_factory.mktemp("runs")
    common = ["--out", str(out), "--model", str(tiny_llama), *SHORT]
    assert main(["sft", "-n", "sft", "-b", "4", *common]) == 0
    extra = ["--normalise-samples", "8", "--test-limit", "4"]
    assert main(["reward", "-n", "reward", "-b", "4", "-p", str(out / "sft"), *extra, *common]) == 0
    return out


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "punster run" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("punster 0.")


def test_policy_verbs(runs: Path, tiny_llama: Path) -> None:
    common = ["--out", str(runs), "--model", str(tiny_llama), "--max-new-tokens", "8", *SHORT]
    policy = ["-a", str(runs / "sft"), "-c", str(runs / "reward")]
    assert main(["ppo", "-n", "ppo", "-b", "8", "-s", "naive", "--eval-prompts", "2", *policy, *common]) == 0
    assert main(["grpo", "-n", "grpo", "-b", "8", "--samples", "4", "--eval-prompts", "2", *policy, *common]) == 0
    assert main(["dpo", "-n", "dpo", "-b", "4", "-a", str(runs / "sft"), *common]) == 0
    metrics = [json.loads(line) for line in (runs / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert metrics[0]["objective/exact_kl"] == pytest.approx(0, abs=1e-6)
    summary = json.loads((runs / "ppo" / "summary.json").read_text())
    assert summary["episodes"] == 16
    for name in ("ppo", "grpo", "dpo"):
        files = {p.name for p in (runs / name).iterdir()}
        assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "events"} <= files
        assert not [p for p in (runs / name).rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pickle")]


def test_python_reward_on_the_command_line(runs: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "taste.py").write_text("def short(prompts, completions):\n    return [-len(c) for c in completions]\n")
    spec = f"{tmp_path / 'taste.py'}:short:0.5"
    common = ["--out", str(tmp_path), "--model", str(tiny_llama), "--max-new-tokens", "6", "--eval-prompts", "2", *SHORT]
    assert main(["ppo", "-n", "p", "-b", "4", "-a", str(runs / "sft"), "--reward", spec, *common]) == 0
    sample = json.loads((tmp_path / "p" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["score"] == pytest.approx(-0.5 * len(sample["completion"]))


def test_generate_prints_k_different_lines(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(runs / "sft"), "make a pun about bakers", "-k", "4", "--max-new-tokens", "12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 4
    assert all(line.isprintable() for line in lines)


def test_generate_samples_for_reading_by_default_on_the_command_line_and_from_python(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import punster
    from punster.cli import plain

    policy, prompt = punster.load(str(runs / "sft")), "make a pun about bakers"
    told = {"temperature": 0.8, "min_p": 0.05, "max_new_tokens": 12, "k": 4, "seed": 3}
    assert main(["generate", str(runs / "sft"), prompt, "-k", "4", "--max-new-tokens", "12", "--seed", "3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [plain(text) for text in policy.generate(prompt, **told)]
    assert printed == [plain(text) for text in policy.generate(prompt, k=4, max_new_tokens=12, seed=3)]
    assert printed != [plain(text) for text in policy.generate(prompt, **{**told, "temperature": 1.0, "min_p": 0.0})]


def test_generate_best_of_prefers_what_the_reward_model_prefers(runs: Path) -> None:
    import punster

    policy, judge = punster.load(str(runs / "sft")), punster.load(str(runs / "reward"))
    prompt = "make a pun about bakers"
    plain = policy.generate(prompt, k=8, max_new_tokens=10, distinct=False)
    chosen = policy.generate(prompt, k=8, best_of=8, judge=judge, max_new_tokens=10, distinct=False)
    mean = [sum(judge.score([prompt] * 8, texts)) / 8 for texts in (plain, chosen)]
    assert mean[1] > mean[0]


def test_score_keeps_order_and_does_not_depend_on_neighbours(runs: Path, tmp_path: Path) -> None:
    import punster

    rows: list[dict[str, str]] = [{"text": f"line {i} " * (1 + i % 3)} for i in range(7)]
    rows.append({"prompt": "make a pun about cats", "completion": "A cat."})
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", str(runs / "reward"), str(file), "--out", str(tmp_path / "all.jsonl")]) == 0
    scores = [json.loads(line)["score"] for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert len(scores) == 8
    exact = punster.load(str(runs / "reward"), dtype="fp32").score(["make a pun about cats"], ["A cat."])
    assert scores[-1] == pytest.approx(exact[0], abs=1e-6), "in fp32, as the export scores"
    assert main(["score", str(runs / "reward"), str(file), "--dtype", "bf16", "--out", str(tmp_path / "rough.jsonl")]) == 0
    rough = [json.loads(line)["score"] for line in (tmp_path / "rough.jsonl").read_text().splitlines()]
    assert max(abs(a - b) for a, b in zip(scores, rough, strict=True)) > 1e-5, "bf16 is told from fp32"
    for row, score in zip(rows, scores, strict=True):
        file.write_text(json.dumps(row) + "\n")
        assert main(["score", str(runs / "reward"), str(file), "--out", str(tmp_path / "one.jsonl")]) == 0
        assert json.loads((tmp_path / "one.jsonl").read_text())["score"] == pytest.approx(score, abs=1e-4)


def test_evaluate_and_report(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--gold", str(runs / "reward"), "--proxy", str(runs / "reward"), "--reference", str(runs / "sft")]
    short = ["--limit", "4", "--samples", "2", "--best-of", "2", "--max-new-tokens", "8", "--out", str(tmp_path / "e")]
    assert main(["evaluate", "base", str(runs / "sft"), *names, *short]) == 0
    printed = capsys.readouterr().out
    assert "best-of-2" in printed and "SFT" in printed
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert list(summary["models"]) == ["base", "sft", "best_of_2"]
    keys = {"held_out_reward", "win_rate_vs_sft", "exact_kl", "distinct_2", "length", "eos_rate", "copy_rate"}
    assert keys <= set(summary["models"]["base"])
    assert summary["models"]["sft"]["exact_kl"] == 0
    assert summary["models"]["best_of_2"]["kl_bound"] == pytest.approx(0.1931, abs=1e-3)
    # Best-of-n by the yardstick itself cannot be worse than one sample.
    assert summary["models"]["best_of_2"]["held_out_reward"]["mean"] > summary["models"]["sft"]["held_out_reward"]["mean"]
    assert main(["report", str(runs / "sft")]) == 0
    assert (runs / "sft" / "report.html").stat().st_size > 2000


def test_evaluate_calls_puns(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from punster.evaluate import success

    class Texts:
        def rows(self, source: str, part: str) -> list[dict[str, object]]:
            return [{"text": "a tide", "is_pun": True}, {"text": "a fact", "is_pun": False}]

    outputs = [success.Labelled(f"text {n}", float(n % 4 == 0), str(n), "m") for n in range(20)]
    monkeypatch.setattr(success, "labels_at_hand", Texts)
    monkeypatch.setattr(success, "labelled", lambda pool: outputs)
    names = ["--gold", str(runs / "reward"), "--proxy", str(runs / "reward"), "--reference", str(runs / "sft"), "--call-puns"]
    short = ["--limit", "4", "--samples", "2", "--best-of", "2", "--max-new-tokens", "8", "--out", str(tmp_path / "e")]
    assert main(["evaluate", str(runs / "sft"), *names, *short]) == 0
    told = capsys.readouterr().out
    assert "called puns" in told and "machine outputs puns as people do (25%)" in told
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert summary["called_puns"]["outputs"] == 20 and summary["called_puns"]["people"] == 0.25
    for model in summary["models"].values():
        assert 0 <= model["called_puns"]["low"] <= model["called_puns"]["mean"] <= model["called_puns"]["high"] <= 1


def test_dry_run_writes_nothing(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "-n", "x", "--model", str(tiny_llama), "--out", str(tmp_path / "runs"), "--dry-run"]) == 0
    assert "minutes" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_yaml_config_is_a_round_trip(runs: Path, tmp_path: Path, tiny_llama: Path) -> None:
    import yaml

    saved = yaml.safe_load((runs / "sft" / "config.yaml").read_text())
    assert saved["batch_size"] == 4 and saved["model"] == str(tiny_llama) and saved["lr"] == 3e-4
    again = ["sft", "--config", str(runs / "sft" / "config.yaml"), "--out", str(tmp_path)]
    assert main(again) == 0
    first, second = ((folder / "sft" / "metrics.jsonl").read_text().splitlines() for folder in (runs, tmp_path))
    assert [json.loads(line)["loss"] for line in first] == [json.loads(line)["loss"] for line in second]


# ---- bad input: one clear message, exit 2, nothing half-written ------------------------------------------------------
BAD = {
    "unknown command": (["sfft"], ["unknown command 'sfft'", "sft"]),
    "unknown option": (["sft", "-n", "x", "--bach-size", "3"], ["unknown option --bach-size", "--batch-size"]),
    "batch size of 0": (["sft", "-n", "x", "-b", "0"], ["batch-size", "at least 1", "0"]),
    "not a number": (["sft", "-n", "x", "-b", "many"], ["batch_size", "many"]),
    "missing name": (["sft", "--model", "TINY"], ["needs a name", "-n NAME"]),
    "bad name": (["sft", "-n", "../evil", "--model", "TINY"], ["../evil", "letters"]),
    "missing data file": (["sft", "-n", "x", "--data", "nowhere.jsonl", "--model", "TINY"], ["nowhere.jsonl", "no such file"]),
    "unknown model": (
        ["sft", "-n", "x", "--model", "smolm2-135m-instruct"],
        ["smolm2-135m-instruct", "Did you mean smollm2-135m"],
    ),
    "missing model folder": (["sft", "-n", "x", "--model", "./nowhere"], ["./nowhere", "no such"]),
    "missing run": (["generate", "./runs/nowhere", "hello"], ["nowhere", "no such"]),
    "no actor": (["ppo", "-n", "x"], ["-a runs/SFT"]),
    "missing actor": (["ppo", "-n", "x", "-a", "runs/none", "-c", "runs/none"], ["runs/none", "no such run"]),
    "unknown strategy": (["ppo", "-n", "x", "-a", "a", "-s", "fsdp"], ["fsdp", "naive"]),
    "a name after the options": (
        ["evaluate", "SFT", "--samples", "2", "base"],
        ["unknown option base: no option takes it", "before"],
    ),
    "another prompt format than the run's": (
        ["generate", "SFT", "hi", "--prompt-format", "Q: {prompt}"],
        ["trained with --prompt-format", "no other"],
    ),
    "best-of-n's settings without it": (["evaluate", "SFT", "--pool", "8"], ["--pool and --proxy need --best-of N"]),
    "a text too long to be scored": (
        ["score", "REWARD", "LONG"],
        ["THE FILE, line 2: ", "tokens, but the model's context is 128"],
    ),
    "unknown recipe": (["run", "dmeo"], ["dmeo", "demo"]),
    "temperature below 0": (["generate", "TINY", "hi", "--temperature", "-1"], ["temperature"]),
    "unknown format": (["export", "TINY", "--format", "onnx", "--out", "o"], ["onnx", "hf"]),
    "score with a policy": (["score", "SFT", "FILE"], ["not a reward model"]),
    "score a missing file": (["score", "SFT", "none.jsonl"], ["none.jsonl", "no such file"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, runs: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "ok.jsonl"
    file.write_text('{"text": "hello"}\n')
    (tmp_path / "long.jsonl").write_text('{"text": "hello"}\n' + json.dumps({"text": "very long " * 200}) + "\n")
    names = {"TINY": str(tiny_llama), "SFT": str(runs / "sft"), "REWARD": str(runs / "reward"), "FILE": str(file),
             "LONG": str(tmp_path / "long.jsonl")}  # fmt: skip
    arguments, expected = BAD[case]
    before = set(tmp_path.rglob("*"))
    assert main([names.get(a, a) for a in arguments]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert len(message.strip().splitlines()) == 1
    for part in expected:
        assert part.replace("THE FILE", str(tmp_path / "long.jsonl")) in message, message
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "expected"),
    [("{not json", "not JSON"), ('{"prompt": "p"}', "'completion' is missing"), ('["a"]', "expected an object"), ('{"prompt": 3, "completion": "c"}', "prompt must be text")],
)  # fmt: skip
def test_bad_rows_name_file_and_line(
    line: str, expected: str, tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p", "completion": "c"}\n' + line + "\n")
    assert main(["sft", "-n", "x", "--data", str(file), "--model", str(tiny_llama), "--out", str(tmp_path / "runs")]) == 2
    message = capsys.readouterr().err
    assert f"{file}, line 2" in message and expected in message
    assert not (tmp_path / "runs").exists()


def test_a_run_that_exists_is_refused(runs: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (runs / "sft" / "metrics.jsonl").read_bytes()
    assert main(["sft", "-n", "sft", "--out", str(runs), "--model", str(tiny_llama)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (runs / "sft" / "metrics.jsonl").read_bytes() == before


def test_a_prompt_longer_than_the_context_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(runs / "sft"), "very long " * 200]) == 2
    message = capsys.readouterr().err
    assert "context of 128 tokens" in message


def test_unknown_yaml_key_suggests_the_right_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("lora_rr: 4\n")
    assert main(["sft", "-n", "x", "--config", str(tmp_path / "c.yaml")]) == 2
    message = capsys.readouterr().err
    assert "lora_rr" in message and "lora_r" in message


def test_a_terminal_of_another_alphabet_shows_what_it_can() -> None:
    """A process, as the streams of this one are pytest's; the message quotes a word that Latin-1 has no characters for."""
    code = "import sys; from punster.cli import main; sys.exit(main(['sft', '-n', 'x', '--kätzchen→', '1']))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert found.returncode == 2 and rb"k\xe4tzchen" not in found.stderr
    assert "--kätzchen".encode("latin-1") + rb"\u2192" in found.stderr and b"Traceback" not in found.stderr


def test_generated_control_characters_never_reach_the_terminal() -> None:
    from punster.cli import plain

    assert plain("a\x1b]0;evil\x07b").isprintable()


CONFIGS = {
    "a text for a list": (b"data: mine.jsonl\n", ["data must be a list", "mine.jsonl"]),
    "a text for a switch": (b"resume: 'false'\n", ["resume must be true or false"]),
    "not UTF-8": (b"name: caf\xe9\n", ["not UTF-8", "byte 9"]),
}


@pytest.mark.parametrize("joined", [True, False], ids=["--config=FILE", "--config FILE"])
@pytest.mark.parametrize("case", CONFIGS)
def test_configuration_files_are_checked_before_anything_runs(
    case: str, joined: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, expected = CONFIGS[case]
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    assert main(["sft", "-n", "x", *([f"--config={file}"] if joined else ["--config", str(file)])]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in (*expected, str(file))) and len(message.strip().splitlines()) == 1


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    from punster.cli import VERBS

    for verb in VERBS:
        with suppress(SystemExit):
            assert main([verb, "--help"]) == 0
        told = capsys.readouterr().out
        assert "usage" in told.lower() or verb == "data"
        if verb == "run":
            assert "--config CONFIG" not in told  # it takes its file as a plain word


def test_lists_on_the_command_line_take_several_words(tmp_path: Path) -> None:
    from punster.config import PpoConfig
    from punster.config.parsing import parse

    assert parse("ppo", PpoConfig, ["-n", "x", "--sft-data", "embedded", "mine.jsonl"]).sft_data == ["embedded", "mine.jsonl"]
    assert parse("ppo", PpoConfig, ["-n", "x", "--sft-data", "mine.jsonl"]).sft_data == ["mine.jsonl"]


@pytest.mark.parametrize("arguments", [["ppo", "--help"], ["run", "--help"], ["evaluate", "--help"], ["sft", "--nmae", "x"]])
def test_help_and_mistakes_are_answered_before_torch_is_loaded(arguments: list[str]) -> None:
    code = "import sys\nfrom punster.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
