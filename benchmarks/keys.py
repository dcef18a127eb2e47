"""What is compared: every key of the results, who works for it, and in which mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TRL, TRL_PPO = "1.16.0", "1.12.0"  # 1.12.0 is the last release with PPO
NEW, PROMPT = 32, 16  # new tokens of forced-length rollouts; prompts of about so many tokens are chosen
RANK, ALPHA = 8, 16.0  # LoRA on every linear layer
ROWS, EPOCHS, BATCH = 32, 3, 16  # whole trainings: rows of data, passes, rows of a step
STEPS = ROWS // BATCH  # steps in one pass
POOL = 128  # rows that single steps are drawn from


@dataclass(frozen=True)
class Side:
    """One worker: whose libraries, which task, its settings; equal sides of several keys are one process."""

    who: str  # "punster", or the TRL version whose environment is used
    task: str
    settings: tuple[tuple[str, Any], ...] = ()
    warmup: int = 1
    every: int = 1


@dataclass(frozen=True)
class Key:
    """One line of the table. value: what is compared of the reports, see results.VALUES."""

    name: str
    group: str  # keys of one group are measured together
    ours: Side
    theirs: Side
    value: str
    unit: str
    must: float | None  # what the ratio must reach
    what: str


def side(who: str, task: str, warmup: int = 1, every: int = 1, **settings: Any) -> Side:
    return Side(who, task, tuple(sorted(settings.items())), warmup, every)


def rollout_keys() -> list[Key]:
    keys = []
    for batch, lora, merged in ((1, 2.5, None), (32, 4.0, 2.5), (128, 4.0, 2.2)):
        ours = side("punster", "rollout", batch=batch)
        group = f"rollout_b{batch}"
        for name, mode, must, text in (
            (group, "peft", lora, f"rollout, batch {batch}, forced length, against the LoRA policy through peft"),
            (f"{group}_bf16_adapters", "peft-bf16", None, f"the same, the peer's adapters cast to bf16, batch {batch}"),
            (f"rollout_merged_b{batch}", "merged", merged, f"the same against the plain merged model, batch {batch}"),
        ):
            theirs = side(TRL, "rollout", batch=batch, mode=mode)
            keys.append(Key(name, group, ours, theirs, "rate", "tokens/s", must, text))
        if batch == 128:
            text = "share of the measured bf16 matrix peak in a rollout of batch 128 (theirs: the peak)"
            keys.append(Key("matmul_share_b128", group, ours, side("punster", "peak"), "share", "GFLOP/s", 0.6, text))
    text = "rollout as PPO draws it: SFT policy, batch 64, up to 48 new tokens, natural EOS, against peft"
    ours, theirs = (side(who, "rollout", batch=64, mode="natural") for who in ("punster", TRL))
    keys.append(Key("rollout_natural", "rollout_natural", ours, theirs, "rate", "tokens/s", 5.0, text))
    return keys


def step_keys() -> list[Key]:
    keys = []
    for verb, title in (("sft", "SFT"), ("reward", "reward model"), ("dpo", "DPO")):
        task = {"task": "dpo_step"} if verb == "dpo" else {"task": "steps", "verb": verb}
        ours = side("punster", **task, warmup=2, top_layers="all")
        theirs = side(TRL, "supervised", warmup=2, verb=verb, layers="all")
        other = side(TRL, "supervised", warmup=2, verb=verb, layers="all", autocast=False)
        whole = side("punster", "runs", verb=verb, top_layers="auto")
        peer, same = (side(TRL, "supervised", every=EPOCHS * STEPS, verb=verb, layers=layers) for layers in ("all", "top"))
        step, cached = f"{verb}_step", f"{verb}_cached"
        once = f"{title}, one step of {BATCH} rows, LoRA in all layers, nothing cached"
        text = (
            f"{title}, {EPOCHS} epochs of {ROWS} rows, default top layers and cached trunk, filling included; theirs: all layers"
        )
        keys += [
            Key(step, step, ours, theirs, "seconds", "s", 2.5, once),
            Key(f"{step}_no_autocast", step, ours, other, "seconds", "s", None, "the same, theirs without autocast"),
            Key(cached, cached, whole, peer, "seconds", "s", 6.0, text),
            Key(f"{cached}_1epoch", cached, whole, peer, "epoch", "s", None, "the same after the first epoch"),
            Key(f"{cached}_same_layers", cached, whole, same, "seconds", "s", None, "3 epochs, theirs: the same top layers"),
        ]
    return keys


def policy_keys() -> list[Key]:
    grpo_ours, grpo_theirs = side("punster", "grpo", top_layers="all"), side(TRL, "grpo")
    text = f"GRPO iteration, LoRA in all layers: 32 completions, 8 a prompt, {NEW} new tokens, one epoch, KL on"
    keys = [Key("grpo_iteration", "grpo", grpo_ours, grpo_theirs, "seconds", "s", 4.0, text)]
    peer = side(TRL_PPO, "ppo")
    every, top = (side("punster", "ppo", top_layers=layers) for layers in ("all", "auto"))
    text = f"PPO iteration, 32 prompts, {NEW} new tokens, 4 epochs; "
    keys += [
        Key("ppo_all_layers", "ppo", every, peer, "seconds", "s", 4.0, text + "LoRA in all layers, nothing cached"),
        Key("ppo_iteration", "ppo", top, peer, "seconds", "s", 8.0, text + "default top layers and cached trunk; theirs: all layers"),
        Key("ppo_memory", "ppo", top, peer, "peak", "GB", 3.0, "peak memory of PPO, default top layers"),
        Key("ppo_memory_all_layers", "ppo", every, peer, "peak", "GB", None, "the same, LoRA in all layers"),
    ]  # fmt: skip
    return keys


KEYS = rollout_keys() + policy_keys() + step_keys()

# ---- growth ---------------------------------------------------------------------------------------------------------
# Random Llama models: width, layers, vocabulary; heads of 64, a third or half as many key-value heads, 8/3 width in the MLP.
DEFAULT_SHAPE = (576, 30, 49152)
SIZES = {"10M": (256, 10, 8192), "30M": (384, 14, 8192), "80M": (576, 22, 8192), "190M": (768, 28, 8192), "360M": (960, 36, 8192)}


def llama_config(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    heads = width // 64
    return {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": width * 8 // 3 // 32 * 32,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // (3 if heads % 3 == 0 else 2),
        "head_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "hidden_act": "silu",
    }  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One size on an axis of growth: `rows` prompts (rollout) or texts (step) of `length` tokens, new ones included."""

    size: float
    rows: int
    length: int
    samples: int = 1
    shape: tuple[int, int, int] = DEFAULT_SHAPE


def points(axis: str, work: str) -> list[Point]:
    """rollout: 16 new tokens a row; step: one SFT step, 16 tokens of it prompt."""
    if axis == "model size":
        return [Point(float(name[:-1]) * 1e6, 16, 48, shape=shape) for name, shape in SIZES.items()]
    if axis == "sequence length":
        return [Point(length, 8 if work == "rollout" else 4, length) for length in (64, 128, 256, 512, 1024)]
    if axis == "batch":
        return [Point(rows, rows, 48) for rows in (8, 16, 32, 64, 128)]
    return [Point(samples, 8, 48, samples) for samples in (1, 2, 4, 8, 16)]


GROWTH = [("model size", "rollout"), ("model size", "step"), ("sequence length", "rollout"), ("sequence length", "step"),
          ("batch", "rollout"), ("batch", "step"), ("samples", "rollout")]  # fmt: skip
