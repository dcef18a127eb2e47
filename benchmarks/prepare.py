"""Everything the bench needs, made once in its own folder: the peers' environments, the model, adapters, data, trained runs.

.bench/trl-VERSION/   virtual environments of the peers
.bench/model/         the default model as a Hugging Face folder in the type that both sides use
.bench/lora/          a LoRA adapter on every linear layer, in PEFT's format
.bench/sft-peft/      the SFT adapter of runs/sft-auto, in PEFT's format
.bench/data.json      prompts and rows, as text and ids
.bench/runs/          what punster trained: sft and reward, for all layers and for the default top layers
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from benchmarks.keys import ALPHA, BATCH, POOL, PROMPT, RANK
from benchmarks.line import BENCH, ROOT, BenchError, environment_python, say

MODEL, LORA, SFT_PEFT, DATA, RUNS = BENCH / "model", BENCH / "lora", BENCH / "sft-peft", BENCH / "data.json", BENCH / "runs"


def prepare(versions: Iterable[str]) -> None:
    for version in sorted(set(versions)):
        install(version)
    shutil.rmtree(BENCH / "work", ignore_errors=True)
    # In a process of its own, whose memory is given back before anything is measured.
    subprocess.run([sys.executable, "-m", "benchmarks.prepare"], cwd=ROOT, check=True)


def install(version: str) -> None:
    """TRL of one release with this project's pins of torch, transformers and peft, in a folder of its own."""
    folder, python = BENCH / f"trl-{version}", environment_python(version)
    if (folder / ".ready").exists():
        return
    say(f"installing TRL {version} into {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pins = ROOT / "constraints.txt"
    torch = next(line for line in pins.read_text().splitlines() if line.startswith("torch=="))
    index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for arguments in ([*index, torch], ["-c", str(pins), f"trl=={version}", "peft", "transformers"]):
        done = subprocess.run([*pip, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"pip install {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    (folder / ".ready").touch()


def installed_versions(versions: Iterable[str]) -> dict[str, str]:
    """What the peers' environments hold; all but TRL is the same in each."""
    names, held = ("transformers", "peft", "torch"), {"trl": " and ".join(sorted(versions))}
    code = f"from importlib.metadata import version; print(*(version(n) for n in {names}))"
    for version in versions:
        done = subprocess.run([str(environment_python(version)), "-c", code], capture_output=True, text=True, check=True)
        held |= dict(zip(names, done.stdout.split(), strict=True))
    return held


def model_and_data() -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from punster.model.export import export
    from punster.model.load import load_model
    from punster.model.lora import Adapter
    from punster.model.role import Role
    from punster.model.tokenizer import Tokenizer
    from punster.train.setup import pick_dtype

    if not (MODEL / "config.json").exists():
        say(f"exporting the default model to {MODEL}")
        dtype = pick_dtype("auto", "cpu")
        base, tokenizer = load_model(), Tokenizer.load("smollm2-135m-instruct-q4")
        tokenizer.hf.pad_token = tokenizer.hf.convert_ids_to_tokens(0)  # peers need a pad token that is not EOS
        export(Role(base), tokenizer, "hf", BENCH / "model.new")
        weights = {name: tensor.to(dtype) for name, tensor in load_file(BENCH / "model.new" / "model.safetensors").items()}
        save_file(weights, BENCH / "model.new" / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((BENCH / "model.new" / "config.json").read_text())
        name = str(dtype).removeprefix("torch.")
        (BENCH / "model.new" / "config.json").write_text(json.dumps({**config, "torch_dtype": name}))
        (BENCH / "model.new").rename(MODEL)
    base, tokenizer = load_model(str(MODEL)), Tokenizer.load(str(MODEL))
    if not LORA.exists():
        layers = range(base.config.n_layer)
        generator = torch.Generator().manual_seed(1)
        adapter = Adapter.create("policy", base.config, rank=RANK, alpha=ALPHA, layers=layers, generator=generator)
        for tensor in adapter.b.values():  # small: the policy still writes as the base does
            tensor.normal_(0, 1e-3, generator=generator)
        adapter.save(LORA, str(MODEL), base.config)
    if not DATA.exists():
        DATA.write_text(json.dumps(data(tokenizer)))
    train()


def data(tokenizer: Any) -> dict[str, Any]:
    """Prompts, those of about PROMPT tokens first; pairs, and the order in which a punster run of seed 1 takes them."""
    from punster.data import corpus
    from punster.model.product import multiplies_bf16
    from punster.train.optim import Cursor, seeded

    dtype = json.loads((MODEL / "config.json").read_text())["torch_dtype"]

    def text(prompt: str) -> str:
        return str(tokenizer.hf.decode(tokenizer.prompt_ids(prompt)))

    prompts = sorted(set(corpus.prompts("train")), key=lambda prompt: (abs(len(tokenizer.prompt_ids(prompt)) - PROMPT), prompt))
    pairs = corpus.preference_rows(("literal",), "train")[:POOL]
    return {
        "dtype": dtype,
        "peer_dtype": dtype if multiplies_bf16() else "float32",  # the same values in the type that PyTorch multiplies fast here
        "prompts": [{"plain": prompt, "text": text(prompt), "ids": tokenizer.prompt_ids(prompt)} for prompt in prompts],
        "pairs": [
            {"plain": row["prompt"], "prompt": text(row["prompt"]), **{k: row[k] for k in ("chosen", "rejected")}}
            for row in pairs
        ],
        "order": Cursor(len(pairs), seeded(1, "data")).next(len(pairs)),
    }


def train() -> None:
    """An SFT and a reward run for all layers and for the default ones; only the SFT run that is sampled from is trained well."""
    from punster.config import RewardConfig, SftConfig
    from punster.model.export import export
    from punster.train.reward import train_reward
    from punster.train.setup import open_role
    from punster.train.sft import sft

    for layers in ("auto", "all"):
        shared: dict[str, Any] = {"out": str(RUNS), "model": str(MODEL), "lora_r": RANK, "lora_alpha": ALPHA, "top_layers": layers,
                                  "batch_size": BATCH, "quiet": True}  # fmt: skip
        run = RUNS / f"sft-{layers}"
        if not (run / "summary.json").exists():
            say(f"training {run}")
            shutil.rmtree(run, ignore_errors=True)
            sft(SftConfig(name=run.name, epochs=2.0, lr=8e-4, steps=None if layers == "auto" else 2, **shared))
        if not (RUNS / f"reward-{layers}" / "summary.json").exists():
            shutil.rmtree(RUNS / f"reward-{layers}", ignore_errors=True)
            small = {"rows_per_kind": 32, "normalise_samples": 0, "test_limit": 1, "steps": 2}
            train_reward(RewardConfig(name=f"reward-{layers}", pretrained=str(run), **small, **shared))
    if not SFT_PEFT.exists():
        config = SftConfig(name="export", model=str(MODEL))
        role, tokenizer = open_role(str(RUNS / "sft-auto"), config)
        export(role, tokenizer, "peft", SFT_PEFT)


if __name__ == "__main__":
    model_and_data()
