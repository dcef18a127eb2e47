"""What a run will cost, before it starts: counted multiply-adds against a short speed check of this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from punster.config import DpoConfig, GrpoConfig, PolicyConfig, PpoConfig, RewardConfig, SftConfig, TrainConfig
from punster.data import corpus
from punster.data.batch import Example
from punster.model import fused, kernels
from punster.model.product import Matrix
from punster.model.role import Role
from punster.model.transformer import Decoder
from punster.train.setup import layer_count, top_layers

PROMPT, RESPONSE = 16, 21  # mean tokens of the embedded corpus in the default model's tokenizer
IN_BYTES = 0.8  # what is left of a step's time where frozen products are in 8 bits (docs/PERFORMANCE.md)
# Of the products' speed, what training reaches from end to end; the second where the kernels multiply in 8 bits.
REACHED, REACHED_IN_BYTES = 0.6, 0.75
# The same where own weights learn in bf16, and how many times as long a head that learns takes, in fp32 (docs/PERFORMANCE.md).
REACHED_MIXED, HEAD_IN_FP32 = 0.5, 4


@cache
def measured_speed(dtype: torch.dtype, device: str = "cpu", seconds: float = 0.6) -> float:
    """Multiply-adds per second of a matrix product of the size that training uses: the upper quartile over fifths of a second.

    Whatever else runs for a moment makes it slower, and a core that others leave alone for a moment is faster than it stays.
    """
    a, b = torch.randn(1024, 576, device=device).to(dtype), torch.randn(576, 1536, device=device).to(dtype)
    own = device == "cpu" and dtype == torch.bfloat16 and not kernels.in_halves()  # else PyTorch's are as fast as those that run
    multiply: Callable[[Tensor], Tensor] = Matrix(b.T) if own else lambda rows: rows @ b
    multiply(a)
    settle(device)
    found = []
    for _ in range(round(seconds / 0.2)):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < 0.2:
            multiply(a)
            count += 1
        settle(device)
        found.append(count * 1024 * 576 * 1536 / (time.perf_counter() - start))
    return sorted(found)[len(found) * 3 // 4]


def settle(device: str) -> None:
    """Wait for what a GPU has been given to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def block_size(model: Decoder) -> int:
    """Multiply-adds per token of one block."""
    return sum(out * into for out, into in model.config.sites(0).values())


def mixes(role: Role) -> bool:
    """Whether weights that learn are multiplied in bf16."""
    return role.model.own_type == torch.bfloat16


def training_cost(role: Role, examples: Sequence[Example], passes: float) -> float:
    """Multiply-adds: the trunk once for a text that is used, and forward, input gradients and recomputed head for each pass (LoRA:
    no weight gradients)."""
    tokens = sum(example.length for example in examples)
    responses = sum(len(example.response) for example in examples)
    block, head = block_size(role.model), role.model.head.weight.numel()
    branch = role.last_layer - role.frozen_depth
    slower = HEAD_IN_FP32 if mixes(role) and role.model.head.weight.requires_grad else 1
    use_head = 0 if role.head is not None else 3 * head * responses * slower
    weights = 1 if role.model.trained_from is not None else 0
    return tokens * block * (role.frozen_depth * min(1.0, passes) + (2 + weights) * branch * passes) + use_head * passes


def stage_work(
    stage: TrainConfig, base: Decoder, judge: int = 0, rows: int = 0, texts: float = 0, prompt: float = PROMPT, response: float = RESPONSE
) -> float:  # fmt: skip
    """Multiply-adds of a stage on the embedded corpus, or, of sft and dpo, on so many rows, pairs or prompts (`rows`).

    rows, texts: of reward, those that come beside the embedded corpus, and how many distinct texts a pass has of them.
    judge: layers of the reward model's branch, with whose adapter the critic starts; prompt, response: mean lengths in tokens.
    """
    block, head, layers = block_size(base), base.head.weight.numel(), base.config.n_layer
    depth = (layer_count(stage.depth, layers) if isinstance(stage, RewardConfig) else 0) or layers
    branch = layers_of(stage, base)
    trunk, tokens = depth - branch, prompt + response
    sampled = tokens * block * layers + response * head  # one sampled response
    passes_back = 3 if stage.adapter == "none" else 2  # forward, gradients of the inputs, and of weights where these learn
    learned = passes_back * tokens * block * branch + 3 * response * head
    if isinstance(stage, RewardConfig):
        records = min(len(corpus.part(stage.split)), stage.rows_per_kind or 10_000) if "embedded" in stage.data else 0
        drawn = min(records, stage.sampled_rows) if "sampled" in stage.negatives else 0
        pairs = records * len([kind for kind in stage.negatives if kind != "sampled"]) + drawn
        texts += records + pairs
        # In families each text runs once a step, and about half of its tokens are a prefix of another.
        passed = 0.5 * texts if stage.families else 2 * (pairs + rows)
        share = IN_BYTES if stage.int8 and fused.quantises(base, trunk) else 1
        work = tokens * block * (texts * trunk + 2 * passed * stage.epochs * branch * share) * (0.5 if stage.half else 1)
        work += stage.normalise_samples * (sampled + tokens * block * depth) + drawn * sampled
        return work + stage.test_limit * 6 * tokens * block * depth
    if isinstance(stage, SftConfig):
        records = rows or len(corpus.part("train"))
        passes = stage.steps * stage.batch_size / records if stage.steps else stage.epochs
        return records * (tokens * block * trunk + passes * learned)
    if isinstance(stage, PolicyConfig):
        passes = stage.epochs if isinstance(stage, PpoConfig | GrpoConfig) else 1
        critic = (judge or branch) if isinstance(stage, PpoConfig) else 0
        once = sampled + tokens * block * (layers + 2 * branch + (judge or branch) + critic) + 2 * response * head
        each = learned + 2 * tokens * block * critic
        return (stage.steps or 1) * stage.batch_size * (once + passes * each)
    assert isinstance(stage, DpoConfig)
    count = rows or stage.prompt_limit or len(corpus.part("train"))
    if stage.online:  # fresh pairs at each step, learned from once
        count = (stage.steps or math.ceil(count * stage.epochs / stage.batch_size)) * stage.batch_size
    samples = stage.samples if stage.online or stage.pairs == "sampled" else 0
    texts = 2 * count * (stage.pairs_per_prompt if samples else 1)
    drawn = (stage.steps or 0) * stage.batch_size * (1 if stage.loss_type == "kto" else 2)  # texts
    passes = 1 if stage.online else drawn / texts if drawn else stage.epochs
    return count * samples * (sampled + tokens * block * layers) + texts * (tokens * block * layers + passes * learned)


def drawing_work(model: Decoder, texts: int, prompt: float, response: float) -> float:
    """Multiply-adds of so many sampled responses that a reward model reads."""
    return texts * (2 * block_size(model) * model.config.n_layer * (prompt + response) + response * model.head.weight.numel())


def layers_of(stage: TrainConfig, base: Decoder) -> int:
    """How many layers a stage trains."""
    depth = layer_count(stage.depth, base.config.n_layer) if isinstance(stage, RewardConfig) else 0
    return len(top_layers(stage, base, depth))


def training_seconds(config: TrainConfig, role: Role, examples: Sequence[Example], passes: float, check: float = 0.6) -> float:
    """About how long so many passes over the examples take on this machine, by a speed check of so many seconds."""
    speed = measured_speed(role.model.own_type if mixes(role) else role.model.dtype, str(role.model.device), check)
    in_bytes = isinstance(config, RewardConfig) and config.int8 and fused.quantises(role.model, role.frozen_depth)
    reached = REACHED_IN_BYTES / IN_BYTES if in_bytes else REACHED_MIXED if mixes(role) else REACHED
    return training_cost(role, examples, passes) / speed / reached


def announce(
    config: TrainConfig, verb: str, role: Role, steps: int, examples: Sequence[Example], passes: float = 0.0, work: float = 0.0
) -> bool:
    """For --dry-run print the plan and return True.

    passes: over the texts (default: as many as the steps make with a text a row); work: multiply-adds, where they are more than
    training on the examples.
    """
    if not config.dry_run:
        return False
    passes = passes or steps * config.batch_size / max(1, len(examples))
    speed = measured_speed(role.model.dtype, str(role.model.device))
    seconds = work / speed / 0.95 if work else training_seconds(config, role, examples, passes)
    trainable = sum(tensor.numel() for tensor in role.parameters())
    base = sum(t.numel() * t.element_size() for t in role.model.weights.values())
    stored = sum(example.length for example in examples) * role.model.config.d_model * 4 if role.frozen_depth else 0
    kept = 11 if fused.usable(role.model, role.last_layer - 1) else 40  # so many fp32 states a layer are kept for the gradients
    working = config.max_tokens * role.model.config.d_model * 4 * kept * (role.last_layer - role.frozen_depth)
    copies = 40 if isinstance(config, PolicyConfig) else 16  # bytes: gradients and Adam's state; what the guard may go back to
    memory = base + trainable * copies + stored + working + 512 * role.model.config.vocab_size * 12
    print(f"{verb} {Path(config.out) / config.name}: {steps} steps of {config.batch_size} rows, {len(examples)} texts")
    print(
        f"  model {role.model.name}, layers {role.frozen_depth}..{role.last_layer - 1} trained, {trainable:,} trainable parameters, {role.model.dtype}"
    )
    print(f"  about {seconds / 60:.1f} minutes at {2 * speed / 1e9:.0f} GFLOP/s here, about {memory / 1e9:.1f} GB of memory")
    return True
