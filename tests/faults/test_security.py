"""No pickles, no remote code, no escapes from folders, no secrets on disk, nothing that drives a terminal or a browser."""

from __future__ import annotations

import ast
import io
import json
import pickletools
import re
import shutil
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from punster.cli import main
from punster.errors import UserError
from punster.safe import json_line, plain, redact, scrub
from punster.train.run import config_dict

SOURCE = Path(__file__).resolve().parents[2] / "src" / "punster"
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x1b]8;;http://x\x1b\\<script>alert(1)</script>\u202e\x00\r{{7*7}}"
SECRETS = {"PUNSTER_TEST_API_KEY": "kjh3-very-hidden-77", "MY_TOKEN": "t0ken-of-mine-123", "DB_PASSWORD": "open sesame!"}


def test_the_source_never_unpickles_or_runs_foreign_code() -> None:
    """torch.load, pickle, eval, exec, os.system, shell=True, yaml.load and trust_remote_code=True occur nowhere."""
    banned_calls = {"torch.load", "eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "pickle.load", "pickle.loads", "joblib.load",
                    "numpy.load", "np.load", "__import__"}  # fmt: skip
    harmless = {"np.load": "allow_pickle=False"}
    banned_modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    files = list(SOURCE.rglob("*.py"))
    assert len(files) > 60
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in banned_calls or harmless.get(name, "nothing is") in ast.unparse(node), where
                for keyword in node.keywords:
                    on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                    assert not (keyword.arg in ("trust_remote_code", "shell", "allow_pickle") and on), where
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not banned_modules & {name.split(".")[0] for name in names}, where


def test_dependencies_are_pinned_with_hashes() -> None:
    """Every direct dependency has one version, and all but torch the hashes of that version's files."""
    root = SOURCE.parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[^\w.-]", wish)[0].lower().replace("_", "-") for wish in wanted}
    pinned = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (root / "constraints.txt").read_text().lower().replace("_", "-"), re.MULTILINE)
    )
    assert names <= set(pinned)
    hashed = re.findall(
        r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", (root / "hashes.txt").read_text(), re.MULTILINE
    )
    assert {name: version for name, version, _ in hashed} | {"torch": pinned["torch"]} == pinned


def test_run_folders_hold_no_pickles(jobs: Any, tmp_path: Path) -> None:
    for config, train in jobs(tmp_path).values():
        run = train(replace(config, name=train.__name__ if train.__name__ != "<lambda>" else type(config).__name__))
        for path in run.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert path.suffix in (".json", ".jsonl", ".yaml", ".safetensors", ".log") or path.name.startswith("events."), (
                    path
                )
                assert not zipfile.is_zipfile(io.BytesIO(content)), path
                with pytest.raises(ValueError):  # no pickle: an unknown opcode, or one without what it needs
                    pickletools.dis(content, out=io.StringIO())


def test_a_model_folder_with_a_pickle_is_refused(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert main(["generate", str(folder), "hi"]) == 2
    assert "never pickles" in capsys.readouterr().err


def test_weights_and_adapters_outside_their_folder_are_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    assert main(["generate", str(folder), "hi"]) == 2
    assert "outside.safetensors is missing" in capsys.readouterr().err


def test_custom_code_of_a_model_is_not_run(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass T: pass\n")
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        described = json.loads((folder / name).read_text())
        value: Any = "evil.T" if key == "AutoConfig" else ["evil.T", None]
        (folder / name).write_text(json.dumps({**described, "auto_map": {key: value}}))
    assert main(["generate", str(folder), "hi", "--max-new-tokens", "2", "--dtype", "fp32"]) in (0, 2)
    assert not marker.exists()


def test_generated_text_cannot_drive_a_terminal_or_a_browser(
    sft_run: str, jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that writes escape sequences, in every place where samples are shown or kept."""
    from punster.model.tokenizer import Tokenizer

    assert plain(HOSTILE) == "<script>alert(1)</script> {{7*7}}" or "owned" not in plain(HOSTILE)
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: HOSTILE)
    assert main(["generate", sft_run, "hi", "--max-new-tokens", "2", "--dtype", "fp32", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip().isprintable() and "owned" not in printed and "31m" not in printed
    config, train = jobs(tmp_path)["ppo"]
    run = train(replace(config, name="run"))
    raw = (run / "samples.jsonl").read_text()
    assert json.loads(raw.splitlines()[0])["completion"] == HOSTILE  # kept as it is, shown as escapes
    assert all(line.isprintable() for line in raw.splitlines())
    for events in (run / "events").iterdir():
        content = events.read_bytes()  # TensorBoard shows texts as Markdown
        # Two bytes alone stand in some binary records by chance, so the whole sequences are looked for.
        assert not any(part in content for part in (b"<script", b"owned", b"\x1b]8;;http", b"\x1b[2J"))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    card = (run / "README.md").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "<script" not in card
    for text in (page, card):
        assert not {"\x1b", "\x9b", "\x07", "\x00", "\u202e"} & set(text) and "owned" not in text


def test_messages_cannot_drive_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": HOSTILE, "completion": ""}) + "\n" + '{"\x9b31m": 1}\n')
    for command in (["sft", "-n", HOSTILE], ["run", HOSTILE], ["data", "check", str(file)], ["score", HOSTILE, "x"], [HOSTILE]):
        assert main(command) == 2
        said = capsys.readouterr()
        assert not {"\x1b", "\x9b", "\x07", "\x00", "\u202e"} & set(said.err + said.out), command


def test_scrubbing_keeps_honest_text() -> None:
    for text in ("Doughn't worry.", "naïve café", "日本語", "🥐 emoji", "tab\tand\nline", "שלום"):
        assert scrub(text) == text and json.loads(json_line({"a": text})) == {"a": text}
    for text in ("\x9b31m", "\u202e", "\ud800", HOSTILE):
        line = json_line({"a": text})
        assert line.rstrip("\n").isprintable() and json.loads(line) == {"a": text}


# ---- secrets ------------------------------------------------------------------------------------------------------
def test_secrets_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHORT_KEY", "abc")
    monkeypatch.setenv("KEYBOARD", "mechanical-one")
    text = "Bearer abcdefghijkl and https://user:pass1234@host/x?api_key=q1w2e3r4 hf_" + "a1B2" * 8 + " sk-" + "z9" * 12
    shown = redact({"a": [*SECRETS.values(), text], "b": 3, "c": None})
    assert shown == {"a": [*(f"<{name}>" for name in SECRETS),
                           "Bearer <secret> and https://<secret>@host/x?<secret> <secret> <secret>"], "b": 3, "c": None}  # fmt: skip
    assert redact("abc mechanical-one") == "abc mechanical-one"
    monkeypatch.setenv("A_KEY", "abcdefgh")
    monkeypatch.setenv("B_KEY", "abcdefghSECRETPART")
    assert redact({"abcdefghSECRETPART": ("abcdefghSECRETPART",)}) == {"<B_KEY>": ["<B_KEY>"]}, "the longer one, in keys too"
    assert redact("Authorization: Basic dXNlcjpwYXNz AIza" + "b" * 35) == "Authorization: Basic <secret> <secret>"
    assert scrub(("\x1b[31mred",)) == ["red"]
    address = "https://host/v1?version=2&code=q1w2&subscription-key=e3r4&access_token=t5&sig=z6%3D"
    assert redact(address) == "https://host/v1?version=2&<secret>&<secret>&<secret>&<secret>"
    assert (
        redact("a key to the door, a token of love, lr=3e-4, runs/sk-1")
        == "a key to the door, a token of love, lr=3e-4, runs/sk-1"
    )
    for name in (
        "skateboard-puns-2024.jsonl",
        "./hf_smollm2-135m-instruct",
        "pk-of-the-year-2024-and-2025",
        "hf_internationalisation",
    ):
        assert redact(name) == name
    for key in (
        "hf_" + "aBcDeFgHiJkLmNoPq" * 2,
        "sk-ant-api03-" + "aB3_dE-" * 13,
        "glpat-" + "a_1.-" * 6,
        "glpat-" + "a_1-" * 5,
        "xoxb-1234-5678-" + "aB3" * 4,
        "AKIA" + "A1B2" * 4,
        "sk-proj-" + "aB3_" + "dE6f" * 9 + "-x_y",
    ):
        assert redact(f"at {key}, say") == "at <secret>, say"


def test_no_secret_reaches_the_run_folder(jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the settings, in the arguments and in an exception: in no file of the run, crash report included."""
    import sys

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    key = SECRETS["PUNSTER_TEST_API_KEY"]
    config, train = jobs(tmp_path)["sft"]
    config = replace(config, name="run", keep_best=f"metric-{key}")
    monkeypatch.setattr(sys, "argv", ["punster", "sft", f"--x={key}"])
    assert key not in str(config_dict(config))

    def broken(*rest: Any) -> Any:
        raise RuntimeError(f"request with {key} and {SECRETS['DB_PASSWORD']} failed")

    with monkeypatch.context() as patch:
        patch.setattr("punster.train.sft.accumulate_nll", broken)
        with pytest.raises(RuntimeError):
            train(config)
    run = tmp_path / "run"
    crash = json.loads((run / "crash.json").read_text())
    assert crash["config"]["batch_size"] == 5 and crash["machine"]["torch"] and crash["verb"] == "sft"
    assert crash["versions"]["transformers"] and crash["metrics"] == {}
    assert "request with <PUNSTER_TEST_API_KEY>" in crash["error"] and any("broken" in line for line in crash["traceback"])
    train(replace(config, resume=True))  # compared without the secret, too
    for path in run.rglob("*"):
        if path.is_file():
            assert not any(value.encode() in path.read_bytes() for value in SECRETS.values()), path
    events = [json.loads(line)["event"] for line in (run / "run.log").read_text().splitlines()]
    assert events[:2] == ["started", "failed"] and events[-1] == "finished"


def test_a_fault_of_punster_itself_is_one_line_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("punster.cli.dispatch", lambda verb, rest: 1 // 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().err
    assert "unexpected ZeroDivisionError" in said and "Traceback" not in said and len(said.strip().splitlines()) == 1
    report = json.loads(next(tmp_path.rglob("crash.json")).read_text())
    assert report["verb"] == "doctor" and any("ZeroDivisionError" in line for line in report["traceback"])


def test_a_fault_between_the_stages_of_a_pipeline_is_reported_in_its_folder(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a log of the stages; gone on with, the seconds of the stages that were done before are kept."""
    config, train = pipeline(tmp_path)
    config = replace(config, name="run", stages=["sft", "reward", "gold"], evaluate={"limit": 2, "samples": 1})

    def broken(*rest: Any) -> Any:
        raise RuntimeError("no yardstick")

    with monkeypatch.context() as patch:
        patch.setattr("punster.evaluate.compare.evaluate", broken)
        with pytest.raises(RuntimeError, match="no yardstick"):
            train(config)
    run = tmp_path / "run"
    crash = json.loads((run / "crash.json").read_text())
    assert crash["verb"] == "run" and crash["config"]["stages"] == config.stages and crash["versions"]["torch"]
    log = [json.loads(line) for line in (run / "run.log").read_text().splitlines()]
    assert [line["event"] for line in log] == ["started", *["stage"] * 4, "stopped"] and not (run / "run.lock").exists()
    train(replace(config, resume=True))
    found = json.loads((run / "summary.json").read_text())
    assert found["stages"]["sft"]["seconds"] == json.loads((run / "sft" / "summary.json").read_text())["wall_seconds"] > 0
    assert found["wall_seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"].values()), abs=0.1)
    said = capsys.readouterr()
    assert said.out + said.err == "", "quiet"


def test_names_stay_inside_the_folder_of_runs(tmp_path: Path) -> None:
    from punster.config import PipelineConfig, SftConfig

    for name in ("..", "../x", "/etc/x", "a/../../x", "a\\..\\x", "~root", "a\x00b", "$(id)", "x" * 300):
        for kind in (SftConfig, PipelineConfig):
            with pytest.raises(UserError):
                kind(name=name)


def test_doctor_tells_what_a_report_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from punster import doctor, machine

    monkeypatch.setenv("PUNSTER_CACHE", str(tmp_path))
    monkeypatch.setattr("punster.train.plan.measured_speed", lambda dtype, device, seconds: 1e9 if seconds == 5.0 else 0.0)
    assert doctor.doctor() == 0
    said = capsys.readouterr().out
    for part in (
        "torch ",
        "CPU features",
        "memory",
        "available",
        "disk",
        "cache",
        "not fetched yet",
        "2 GFLOP/s",
        "frozen weights default to",
        "C kernels",
        "5 seconds",
    ):
        assert part in said, part
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))  # a service's user
    monkeypatch.setenv("PUNSTER_CACHE", str(tmp_path / "not" / "yet"))
    assert doctor.doctor() == 0 and "NOT writable" not in capsys.readouterr().out
    assert machine.available_bytes() > 1e6
