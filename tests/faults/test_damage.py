"""Damaged files, seeded: none gives a traceback, and what cannot be trusted is refused or passed over by name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import yaml
from tokenizers import Tokenizer as RawTokenizer

from punster.cli import main
from punster.errors import UserError
from punster.train import setup
from punster.train.checkpoint import damage, load_run, newest_step


def truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def flipped(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def head_flipped(content: bytes, draw: random.Random) -> bytes:
    """In the first part, where the structure is: a flipped weight is a number like any other."""
    place = draw.randrange(min(len(content), 600))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def test_forty_damaged_checkpoints_are_named_and_passed_over(
    jobs: Any, reader: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any file of the newest checkpoint, cut off or with one bit flipped: the one before is used; resumed, the end is the same."""
    config, train = jobs(tmp_path, keep=9)["ppo"]
    whole = train(replace(config, name="whole"))
    draw = random.Random("checkpoints")
    files = sorted(path.relative_to(reader.final(whole)) for path in reader.final(whole).rglob("*") if path.is_file())
    assert len(files) >= 6
    for number in range(40):
        run = tmp_path / "run"
        shutil.copytree(whole, run)
        (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("name: whole", "name: run"))
        path = reader.final(run) / files[number % len(files)]
        path.write_bytes((truncated, flipped)[number % 2](path.read_bytes(), draw))
        assert damage(reader.final(run)) != ""
        assert newest_step(run) == 3
        said = capsys.readouterr().err
        assert "step-4" in said and "trying an older checkpoint" in said
        load_run(run)
        with pytest.raises(UserError, match="damaged"):
            load_run(run / "checkpoints" / "step-4")
        if number % 8 == 0:
            (run / "summary.json").unlink()
            train(replace(config, name="run", resume=True))
            assert reader.tensor_bytes(run) == reader.tensor_bytes(whole) and reader.lines(run) == reader.lines(whole)
        shutil.rmtree(run)


def tiny_gguf(folder: Path, model: Path) -> Path:
    """The tiny model's shapes with random weights, and its tokenizer, as a GGUF file."""
    config = json.loads((model / "config.json").read_text())
    vocabulary = RawTokenizer.from_file(str(model / "tokenizer.json"))
    tokens = [vocabulary.id_to_token(i) for i in range(config["vocab_size"])]
    merges = json.loads((model / "tokenizer.json").read_text())["model"]["merges"]
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    numbers = numpy.random.default_rng(1)
    shapes = {"token_embd.weight": (len(tokens), 32), "output.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    for layer in range(config["num_hidden_layers"]):
        inner = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32),
                 "attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}  # fmt: skip
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in inner.items()}
    for name, shape in shapes.items():
        writer.add_tensor(name, numbers.normal(0, 0.1, shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Mutation = Callable[[bytes, random.Random], bytes]


def commands(kind: str, path: Path, model: Path, tmp_path: Path) -> list[str]:
    if kind == "jsonl":
        return [
            "sft",
            "-n",
            "x",
            "--model",
            str(model),
            "--data",
            str(path),
            "--out",
            str(tmp_path / "runs"),
            "--steps",
            "1",
            "--quiet",
        ]
    target = path if kind == "gguf" else path.parent
    return ["generate", str(target), "pun: sea 1", "--max-new-tokens", "2", "--dtype", "fp32", "--device", "cpu"]


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "jsonl"])
def test_sixty_damaged_inputs(
    kind: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 of each kind: refused in one line that names the file; or, where a flipped bit leaves a valid file, read without a traceback."""
    monkeypatch.setenv("PUNSTER_CACHE", str(tmp_path / "cache"))
    if kind == "gguf":
        path = tiny_gguf(tmp_path, tiny_llama)
    elif kind == "safetensors":
        shutil.copytree(tiny_llama, tmp_path / "model")
        path = tmp_path / "model" / "model.safetensors"
    else:
        path = tmp_path / "rows.jsonl"
        path.write_text(
            "".join(json.dumps({"prompt": f"pun: sea {i}", "completion": "the sea made doe."}) + "\n" for i in range(8))
        )
    arguments = commands(kind, path, tiny_llama, tmp_path)
    good = path.read_bytes()
    assert main(arguments) == 0, capsys.readouterr().err
    draw = random.Random(kind)
    codes = []
    for number in range(20):
        mutate: Mutation = truncated if number < 10 else head_flipped
        setup._BASES.clear()  # the next command reads the file again
        path.unlink()  # the weights in memory are a map of the old file
        path.write_bytes(mutate(good, draw))
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        capsys.readouterr()
        code = main(arguments)
        said = capsys.readouterr().err.strip()
        codes.append(code)
        assert code in (0, 2), (number, said)
        assert "Traceback" not in said and "unexpected" not in said
        if code == 2:
            assert path.name in said or str(path.parent) in said, said
            assert not (tmp_path / "runs").exists()
        if kind != "jsonl" and number < 10:
            assert code == 2, f"{kind} cut off at {len(path.read_bytes())} of {len(good)} bytes was read"
    assert codes.count(2) >= 10


def test_twenty_damaged_caches_of_judge_answers(tmp_path: Path) -> None:
    """SQLite: an error that names the file and the option, or what is still there to read; never an answer from nowhere."""
    from punster.evaluate.judge_client import Cache

    path = tmp_path / "judge.sqlite"
    cache = Cache(path)
    for number in range(200):
        cache.keep(f"key {number}", "judge", "model", "request", f"answer {number}", 3, 4)
    cache.keep_calibration("judge", {"kappa": 0.5})
    cache.db.close()
    good = path.read_bytes()
    draw = random.Random("sqlite")
    refused = 0
    for number in range(20):
        path.unlink()
        path.write_bytes((truncated if number < 10 else head_flipped if number < 15 else flipped)(good, draw))
        message = ""
        try:
            damaged = Cache(path)
            assert len(damaged.answers([f"key {i}" for i in range(200)])) <= 200
            damaged.keep("new", "judge", "model", "request", "answer", 1, 1)
            damaged.calibration("judge")
            damaged.db.close()
        except UserError as error:
            message = str(error)
            refused += 1
        assert not message or (str(path) in message and "--judge-cache" in message)
    assert refused >= 10


def test_a_damaged_summary_or_settings_file(jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from punster.train.pipeline import stage_summary

    config, train = jobs(tmp_path)["sft"]
    run = train(replace(config, name="sft"))
    assert stage_summary(tmp_path, "sft")["steps"] == 4
    for content in (b"", b"{", b"\xff\xfe", b"[1]", b"{}"):
        (run / "summary.json").write_bytes(content)
        assert stage_summary(tmp_path, "sft") == {}  # the stage is gone on with, not taken for done
    for content in (b"", b"{", b"\xff\xfe", b"a: [", b"- 1"):
        (run / "config.yaml").write_bytes(content)
        with pytest.raises(UserError, match=r"config.yaml is damaged"):
            train(replace(config, name="sft", resume=True))


def test_torn_logs_are_cut_where_the_checkpoint_was(jobs: Any, reader: Any, tmp_path: Path) -> None:
    config, train = jobs(tmp_path, keep=9)["grpo"]
    whole = train(replace(config, name="whole"))
    copy = reader.interrupted_copy(whole, tmp_path / "copy", 2)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("name: whole", "name: copy"))
    for log in ("metrics.jsonl", "samples.jsonl"):
        with (copy / log).open("ab") as handle:
            handle.write(b'{"step": 2, "torn": "\xff\xfe')
    (copy / ".metrics.jsonl.part").write_text("left")
    (copy / "checkpoints" / ".step-3.part").mkdir()
    resumed = train(replace(config, name="copy", resume=True))
    for log in ("metrics.jsonl", "samples.jsonl"):
        assert reader.lines(resumed, log) == reader.lines(whole, log)
    assert not list(copy.rglob("*.part"))


def test_a_pipeline_does_not_mix_stages_of_two_sft_runs(pipeline: Any, tmp_path: Path) -> None:
    """The SFT stage was deleted to run it again: what was trained on the old one must go, too."""
    config, train = pipeline(tmp_path)
    folder = train(replace(config, name="run"))
    shutil.rmtree(folder / "sft")
    with pytest.raises(
        UserError, match=r"reward, gold, ppo rest on a stage that is to be run again; delete these, too: .*run/reward"
    ):
        train(replace(config, name="run", resume=True))
    assert not (folder / "sft").exists()
    for stage in ("reward", "gold", "ppo"):
        shutil.rmtree(folder / stage)
    train(replace(config, name="run", resume=True))
    shutil.rmtree(folder / "gold")  # nothing rests on it
    train(replace(config, name="run", resume=True))
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["resume"] is False and saved["name"] == "run"
