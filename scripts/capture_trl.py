"""Capture tensors of one real step of each of TRL's trainers, on tiny random models, for tests/parity/test_parity_trl.py.

TRL is no dependency of this project. Install it beside the project's own packages, in an environment of its own, and run
this once for each release; the fixtures are committed.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0   # then 1.12.0
    /tmp/trl/bin/python scripts/capture_trl.py

Release 1.12.0 is the last one with PPOTrainer, whose advantages and losses sit inside train(); they are read out of its
frame. From other releases: DPO, KTO, ORPO, SimPO, reward, GRPO and RLOO, read out of the frames of their loss functions.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}

import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "parity" / "fixtures"
WORDS = [f"w{i}" for i in range(24)]
Captured = dict[str, torch.Tensor]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model(seed: int, kind: Any = LlamaForCausalLM, scale: float = 0.5) -> Any:
    """A random model of the tokenizer's 27 words, loud enough that log-probs differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=27, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=scale, pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1,
    )  # fmt: skip
    folder = tempfile.mkdtemp()  # some trainers read the configuration again, from where the model came
    kind(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return kind.from_pretrained(folder, dtype=torch.float32)


def frames(functions: tuple[str, ...], run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Local variables of every call of functions of these names in TRL, at their return, while `run` runs."""
    seen: list[dict[str, Any]] = []

    def hook(frame: Any, event: str, value: Any) -> None:
        code = frame.f_code
        if event == "return" and code.co_name in functions and f"{os.sep}trl{os.sep}" in code.co_filename:
            seen.append({"function": code.co_name, "return": value, **frame.f_locals})

    sys.setprofile(hook)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


def keep(prefix: str, values: dict[str, Any], names: dict[str, str]) -> Captured:
    """Tensors and numbers under the names of this project's functions."""
    found = {}
    for ours, theirs in names.items():
        value = torch.as_tensor(values[theirs]).detach().cpu()
        found[f"{prefix}/{ours}"] = (value.float() if value.is_floating_point() else value).clone().contiguous()
    return found


def settings(**more: Any) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(), "report_to": [], "use_cpu": True, "bf16": False, "seed": 1, "logging_steps": 1,
        "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True, **more,
    }  # fmt: skip


def pairs() -> Dataset:
    return Dataset.from_list(
        [{"prompt": "w0 w1 ", "chosen": "w2 w3 w4", "rejected": "w5"}, {"prompt": "w6 ", "chosen": "w7 w8", "rejected": "w9 w10 w11 w12"},
         {"prompt": "w13 w14 w15 ", "chosen": "w16", "rejected": "w17 w18"}, {"prompt": "w1 ", "chosen": "w19 w20 w21 w22 w23", "rejected": "w2 w2"}]
    )  # fmt: skip


def dpo() -> Captured:
    from trl import DPOConfig, DPOTrainer

    found: Captured = {}
    for kind in ("sigmoid", "robust", "ipo", "hinge", "sft"):
        smoothing = {"label_smoothing": 0.1} if kind == "robust" else {}
        args = DPOConfig(**settings(loss_type=[kind], beta=0.3, per_device_train_batch_size=4, **smoothing))
        trainer = DPOTrainer(model(1), ref_model=model(2), args=args, train_dataset=pairs(), processing_class=tokenizer())
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        (frame,) = frames(("_compute_loss",), lambda t=trainer, b=batch: t.compute_loss(t.model, b))
        frame["chosen_length"], frame["rejected_length"] = frame["completion_mask"].sum(1).chunk(2)
        frame["accuracy"], frame["margin"] = (
            trainer._metrics["train"][f"rewards/{name}"][-1] for name in ("accuracies", "margins")
        )
        names = {"chosen": "chosen_logps", "rejected": "rejected_logps", "ref_chosen": "ref_chosen_logps", "ref_rejected": "ref_rejected_logps",
                 "loss": "loss", "losses": "per_sequence_loss", "accuracy": "accuracy", "margin": "margin"}  # fmt: skip
        found |= keep(f"dpo/{kind}", frame, names | {n: n for n in ("chosen_length", "rejected_length")})
    return found


def without_reference(kind: str) -> Captured:
    """SimPO (CPOTrainer with cpo_alpha 0) and ORPO: their experimental trainers' batch loss."""
    folder = importlib.import_module(f"trl.experimental.{'cpo' if kind == 'simpo' else 'orpo'}")
    name = "CPO" if kind == "simpo" else "ORPO"
    more = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5} if kind == "simpo" else {}
    args = getattr(folder, f"{name}Config")(
        **settings(beta=0.3, per_device_train_batch_size=4, max_length=32, remove_unused_columns=False, **more)
    )
    trainer = getattr(folder, f"{name}Trainer")(model(1), args=args, train_dataset=pairs(), processing_class=tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    (frame,) = frames(("get_batch_loss_metrics",), lambda: trainer.get_batch_loss_metrics(trainer.model, batch))
    chosen, rejected = frame["policy_chosen_logps"], frame["policy_rejected_logps"]  # length averages
    labels = [batch[f"{side}_labels"] for side in ("chosen", "rejected")]
    lengths = [(side[:, 1:] != -100).sum(1) for side in labels]
    values = {"chosen": chosen * lengths[0], "rejected": rejected * lengths[1], "chosen_length": lengths[0],
              "rejected_length": lengths[1], "losses": frame["losses"]}  # fmt: skip
    return keep(f"dpo/{kind}", values, {name: name for name in values})


def kto() -> Captured:
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
        for r in pairs()
        for side in ("chosen", "rejected")
    ]
    args = KTOConfig(**settings(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7, per_device_train_batch_size=8))
    trainer = KTOTrainer(
        model(1), ref_model=model(2), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )
    batch = next(iter(trainer.get_train_dataloader()))
    (frame,) = frames(("_compute_loss",), lambda: trainer.compute_loss(trainer.model, batch))
    names = ("chosen_logratios", "rejected_logratios", "kl", "losses", "loss", "KL_logps", "ref_KL_logps")
    frame["loss"] = frame["return"]
    return keep("kto", frame, {name: name for name in names})


def reward() -> Captured:
    from trl import RewardConfig, RewardTrainer

    rows = [{**row, "margin": margin} for row, margin in zip(pairs(), (0.0, 0.5, 1.0, 0.25), strict=True)]
    args = RewardConfig(**settings(per_device_train_batch_size=4, center_rewards_coefficient=0.01))
    trainer = RewardTrainer(
        model(3, LlamaForSequenceClassification), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )
    batch = next(iter(trainer.get_train_dataloader()))
    (frame,) = frames(("compute_loss",), lambda: trainer.compute_loss(trainer.model, batch))
    frame["margin"] = frame["inputs"]["margin"]
    names = {"chosen": "rewards_chosen", "rejected": "rewards_rejected", "loss": "loss", "margin": "margin"}
    return keep("reward", frame, names)


def score(prompts: list[str], completions: list[str], **rest: Any) -> list[float]:
    """Some reward: differs within and between groups, and is constant in one."""
    return [0.25 * len(c.split()) + c.count("w1") if p != "w6" else 1.0 for p, c in zip(prompts, completions, strict=True)]


def group(kind: str) -> Captured:
    """The second pass over the second rollout: the policy is no longer the reference, and the ratio no longer 1."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    rows = Dataset.from_list([{"prompt": text} for text in ("w0 w1", "w6", "w13 w14 w15", "w1")])
    shared = settings(
        learning_rate=0.01, per_device_train_batch_size=16, num_generations=4, max_completion_length=7, num_iterations=2, max_steps=4,
        beta=0.04, lr_scheduler_type="constant", epsilon=0.2,
    )  # fmt: skip
    if kind == "rloo":
        args, trainer_class, more = RLOOConfig(**shared), RLOOTrainer, {"old": "old_logps", "logps": "logps"}
    else:
        name, corrected = kind.removesuffix("_corrected"), kind.endswith("_corrected")  # corrected is TRL's default
        high = {"epsilon_high": 0.28} if kind == "dapo" else {}
        args = GRPOConfig(**shared, loss_type=name, scale_rewards=name != "dr_grpo", use_bias_correction_kl=corrected, **high)
        trainer_class, more = GRPOTrainer, {"old": "old_per_token_logps", "ref": "ref_per_token_logps"}
    trainer = trainer_class(model(1, scale=0.3), reward_funcs=score, args=args, train_dataset=rows, processing_class=tokenizer())
    seen = frames(("_compute_loss", "_generate_and_score_completions"), trainer.train)
    frame = [f for f in seen if f["function"] == "_compute_loss"][-1]
    rollout = [f for f in seen if f["function"] == "_generate_and_score_completions"][-1]
    frame |= {"mask": frame["completion_mask"].bool()}
    found = keep(kind, frame, {"log_prob": "per_token_logps", "mask": "mask", "loss": "loss", "advantages": "advantages", **more})
    names = {"rewards": "rewards", "all_advantages": "advantages"}
    if kind == "rloo":
        names |= {"rollout_old": "old_per_token_logps", "rollout_ref": "ref_per_token_logps", "rollout_mask": "completion_mask"}
    return found | keep(kind, rollout, names)


def ppo() -> Captured:
    """Two passes over one rollout of PPOTrainer, read out of train()'s frame each time it has taken an optimizer step."""
    module = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    seen: list[dict[str, Any]] = []
    original, calls = module.masked_mean, [0]

    def spy(*arguments: Any, **rest: Any) -> Any:
        frame = sys._getframe(1)
        inside = frame.f_code.co_name == "train"
        calls[0] += inside
        if inside and calls[0] % 4 == 0:  # a micro-batch's fourth call: its clip fraction, after the step
            seen.append({**frame.f_locals, "pg_clipfrac": original(*arguments, **rest)})
        return original(*arguments, **rest)

    module.masked_mean = spy
    words = tokenizer()
    rows = Dataset.from_list([{"input_ids": words(text)["input_ids"]} for text in ("w0 w1", "w6 w2", "w13 w14", "w1 w3") * 4])
    args = module.PPOConfig(**settings(
        learning_rate=0.02, per_device_train_batch_size=8, gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=2,
        total_episodes=8, response_length=9, temperature=0.9, stop_token="eos", kl_coef=0.05, missing_eos_penalty=1.0, vf_coef=0.1,
        num_sample_generations=0, local_rollout_forward_batch_size=8, lam=0.95, gamma=0.99,
    ))  # fmt: skip
    trainer = module.PPOTrainer(
        args=args, processing_class=words, model=model(6, scale=0.15), ref_model=model(7, scale=0.3),
        reward_model=model(3, LlamaForSequenceClassification), value_model=model(4, LlamaForSequenceClassification),
        train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    trainer.train()
    found: Captured = {}
    names = {
        "rewards": "rewards", "values": "values", "returns": "returns", "advantages": "advantages", "log_prob": "logprobs",
        "ref_log_prob": "ref_logprobs", "scores": "scores", "kl": "kl", "padding": "padding_mask", "padding_p1": "padding_mask_p1",
    }  # fmt: skip
    step = {"rows": "micro_batch_inds", "new_log_prob": "new_logprobs", "new_values": "vpred", "policy_loss": "pg_loss", "value_loss": "vf_loss",
            "loss": "loss", "clipfrac": "pg_clipfrac", "value_clipfrac": "vf_clipfrac"}  # fmt: skip
    for number, frame in enumerate(seen):
        found |= keep(f"ppo/{number}", frame, step)
    return found | keep("ppo", seen[0], names)


def main() -> None:
    import transformers
    import trl

    FOLDER.mkdir(parents=True, exist_ok=True)
    captured: Captured = {}
    if trl.__version__ == "1.12.0":
        captured = ppo()
    else:
        captured |= dpo() | without_reference("simpo") | without_reference("orpo") | kto() | reward()
        for kind in ("grpo", "grpo_corrected", "dr_grpo", "dapo", "rloo"):
            captured |= group(kind)
    path = FOLDER / f"trl-{trl.__version__}.safetensors"
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    save_file(captured, path, metadata={"versions": json.dumps(versions)})
    print(path, path.stat().st_size, "bytes", len(captured), "tensors")


if __name__ == "__main__":
    main()
