"""The peers' side, run in their own environments: transformers, PEFT and TRL. python -m benchmarks.peers '{"task": ...}'

Each in the mode in which it is fastest here without changing what it computes: see docs/PERFORMANCE.md.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    TrainerCallback,
)

from benchmarks.keys import ALPHA, BATCH, NEW, RANK, ROWS, Point, llama_config, points
from benchmarks.line import BENCH, Line, serve, timed

DATA = json.loads((BENCH / "data.json").read_text())
MODEL, DTYPE = str(BENCH / "model"), getattr(torch, DATA["peer_dtype"])
BF16 = DTYPE is torch.bfloat16
SITES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def language_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=DTYPE)


def score_model() -> Any:
    return AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=1, dtype=DTYPE)


def lora(task_type: str, layers: str = "all") -> Any:
    from peft import LoraConfig

    count = json.loads((BENCH / "model" / "config.json").read_text())["num_hidden_layers"]
    chosen = None if layers == "all" else list(range(count - round(count / 3), count))
    head = ["score"] if task_type == "SEQ_CLS" else None
    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=SITES, task_type=task_type,
                      layers_to_transform=chosen, modules_to_save=head)  # fmt: skip


# ---- sampling -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def rollout(line: Line, batch: int, mode: str) -> None:
    """`generate` with a cache, sampling from the whole distribution. mode: peft, peft-bf16, merged, natural."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = language_model()
    folder = BENCH / ("sft-peft" if mode == "natural" else "lora")
    model = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=mode != "peft-bf16")
    if mode == "merged":
        model = model.merge_and_unload()
    if mode == "peft-bf16":
        model.to(DTYPE)
    model.eval()
    new, eos = (48, tokenizer.eos_token_id) if mode == "natural" else (NEW, None)
    model.generation_config.eos_token_id = eos
    config = GenerationConfig(max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                              eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    prompts = [row["ids"] for row in DATA["prompts"][:batch]]
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    while True:
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:]
        lengths = [out.shape[1]] * batch
        if eos is not None:
            ended = (out == eos).int()
            lengths = torch.where(ended.any(1), ended.argmax(1) + 1, out.shape[1]).tolist()
        line.step(tokens=sum(lengths))


# ---- training -------------------------------------------------------------------------------------------------------
class Steps(TrainerCallback):
    """A step of the trainer is a step of the line."""

    def __init__(self, line: Line):
        self.line = line

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.line.step()


def plain(**more: Any) -> dict[str, Any]:
    """No evaluation, no saving, no logging, no checkpointing of gradients, data in this process, in the given order."""
    return {
        "output_dir": str(BENCH / "work" / "trl"), "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "max_steps": 1000,
        "learning_rate": 1e-4, "gradient_checkpointing": False, "logging_strategy": "no", "save_strategy": "no", "report_to": "none",
        "eval_strategy": "no", "dataloader_num_workers": 0, "disable_tqdm": True, "use_cpu": True, "seed": 1, "bf16": BF16,
        **more,
    }  # fmt: skip


def supervised(line: Line, verb: str, layers: str, autocast: bool = True) -> None:
    """SFT, reward, DPO. Single steps see the batches that punster sees; whole trainings the first ROWS rows, over and over."""
    import trl
    from datasets import Dataset

    chosen = [DATA["pairs"][i] for i in DATA["order"]] if line.every == 1 else DATA["pairs"][:ROWS]
    columns = {"prompt": "prompt", "chosen": "completion"} if verb == "sft" else {c: c for c in ("prompt", "chosen", "rejected")}
    prefix = {"sft": "SFT", "reward": "Reward", "dpo": "DPO"}[verb]
    more = {"completion_only_loss": True} if verb == "sft" else {}
    config = getattr(trl, f"{prefix}Config")(
        **plain(train_sampling_strategy="sequential", max_length=None, bf16=BF16 and autocast, **more)
    )
    trainer = getattr(trl, f"{prefix}Trainer")(
        model=score_model() if verb == "reward" else language_model(), args=config,
        train_dataset=Dataset.from_list([{new: row[old] for old, new in columns.items()} for row in chosen]),
        processing_class=AutoTokenizer.from_pretrained(MODEL), callbacks=[Steps(line)],
        peft_config=lora("SEQ_CLS" if verb == "reward" else "CAUSAL_LM", layers),
    )  # fmt: skip
    trainer.train()


def grpo(line: Line) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        **plain(per_device_train_batch_size=32, learning_rate=1e-6), num_generations=8, steps_per_generation=1, num_iterations=1,
        max_completion_length=NEW, generation_kwargs={"min_new_tokens": NEW}, beta=0.02, temperature=1.0, shuffle_dataset=False,
        loss_type="grpo",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=language_model(), reward_funcs=[score_model()], args=config, peft_config=lora("CAUSAL_LM"), callbacks=[Steps(line)],
        train_dataset=Dataset.from_list([{"prompt": row["text"]} for row in DATA["prompts"]]),
        processing_class=AutoTokenizer.from_pretrained(MODEL, padding_side="left"),
    )  # fmt: skip
    trainer.train()


def ppo(line: Line) -> None:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    config = PPOConfig(
        **{**plain(per_device_train_batch_size=32, learning_rate=1e-6), "max_steps": -1}, total_episodes=32 * 1000, num_ppo_epochs=4,
        num_mini_batches=1, local_rollout_forward_batch_size=32, num_sample_generations=0, response_length=NEW, temperature=1.0, kl_coef=0.02,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=config, processing_class=AutoTokenizer.from_pretrained(MODEL, padding_side="left"), model=language_model(), ref_model=None,
        reward_model=score_model(), value_model=score_model(), peft_config=lora("CAUSAL_LM"), callbacks=[Steps(line)],
        train_dataset=Dataset.from_list([{"input_ids": row["ids"]} for row in DATA["prompts"]]),
    )  # fmt: skip
    trainer.train()


# ---- growth ---------------------------------------------------------------------------------------------------------
def growth(line: Line, axis: str, work: str) -> None:
    """transformers and PEFT at the points of an axis in turn, over and over; all of one model shape."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    every = points(axis, work)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**llama_config(*every[0].shape))).to(DTYPE), lora("CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    config = GenerationConfig(
        max_new_tokens=16, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True, eos_token_id=None, pad_token_id=0
    )

    def once(point: Point) -> None:
        ids = torch.randint(0, point.shape[2], (point.rows, point.length), generator=torch.Generator().manual_seed(1))
        if work == "rollout":
            model.eval()
            with torch.no_grad():
                model.generate(input_ids=ids[:, :-16], attention_mask=torch.ones_like(ids[:, :-16]), generation_config=config)
            return
        labels = torch.cat((torch.full_like(ids[:, :16], -100), ids[:, 16:]), 1)
        with torch.autocast("cpu", DTYPE, enabled=BF16):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for number, point in enumerate(itertools.cycle(every)):
        if number < len(every):
            once(point)
        line.step(**timed(functools.partial(once, point)))


TASKS: dict[str, Callable[..., None]] = {"rollout": rollout, "supervised": supervised, "grpo": grpo, "ppo": ppo, "growth": growth}


if __name__ == "__main__":
    torch.manual_seed(1)
    serve(TASKS)
