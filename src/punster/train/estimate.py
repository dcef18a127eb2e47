"""Estimated seconds of each stage of a pipeline on this machine: counted products over measured speed."""

from __future__ import annotations

import math

from punster.config import (
    DpoConfig,
    EvaluateConfig,
    GrpoConfig,
    PipelineConfig,
    PolicyConfig,
    PpoConfig,
    RewardConfig,
    SftConfig,
    TrainConfig,
)
from punster.data import corpus
from punster.data.mix import NEED_WORDS, is_mixture, load_mixture
from punster.model.transformer import Decoder
from punster.train.plan import block_size, measured_speed
from punster.train.setup import layer_count, load_rows, pick_device, pick_dtype, shared_base, top_layers

PROMPT, RESPONSE = 16, 21  # mean tokens of the embedded corpus in the default model's tokenizer


def pipeline_seconds(config: PipelineConfig, stages: dict[str, TrainConfig], evaluation: EvaluateConfig) -> dict[str, float]:
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    base = shared_base(config.model, dtype, device)
    speed = 0.95 * measured_speed(dtype, device)
    judge = layers_of(stages["reward"], base) if "reward" in stages else 0  # whose adapter the critic starts from
    result = {name: stage_work(stage, base, judge, given_rows(stage)) / speed for name, stage in stages.items()}
    policies = 1 + len([stage for stage in stages if stage not in ("sft", "reward", "gold", "placebo_reward")])
    pool = max(evaluation.samples, evaluation.pool or 2 * evaluation.best_of)
    texts = (evaluation.limit or len(corpus.part("test"))) * (evaluation.samples * policies + pool)
    layers = block_size(base) * base.config.n_layer * (PROMPT + RESPONSE)
    result["evaluate"] = texts * (2 * layers + RESPONSE * base.head.weight.numel()) / speed
    return result


def stage_work(
    stage: TrainConfig, base: Decoder, judge: int = 0, rows: int = 0, prompt: float = PROMPT, response: float = RESPONSE
) -> float:  # fmt: skip
    """Multiply-adds of a stage: on the embedded corpus, or of sft and dpo on so many rows, pairs or prompts (`rows`); reward: besides.

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
        texts = records + pairs + 1.4 * rows  # two or three rows on a text, as in the mixtures
        # In families each text runs once a step, and about half of its tokens are a prefix of another.
        passed = 0.5 * texts if stage.families else 2 * (pairs + rows)
        work = tokens * block * (texts * trunk + 2 * passed * stage.epochs * branch) * (0.5 if stage.half else 1)
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


def given_rows(stage: TrainConfig) -> int:
    """Rows of files and mixtures: of reward all of them, of sft and pairs of dpo with the embedded corpus if that is named beside them.

    0 where the embedded corpus is all, or where pairs are sampled. Mixtures that ask a model for words are not counted.
    """
    if isinstance(stage, RewardConfig):
        asking = [
            name for name in stage.data if is_mixture(name) and any(part.use in NEED_WORDS for part in load_mixture(name).parts)
        ]
        named = [name for name in stage.data if name not in ("embedded", *asking)]
        return len(load_rows(named, "judged", list, stage.columns, quiet=True)) if named else 0
    if isinstance(stage, SftConfig):
        kind = "sft"
    elif isinstance(stage, DpoConfig) and not stage.online and stage.pairs == "data":
        kind = "unpaired" if stage.loss_type == "kto" else "preference"
    else:
        return 0
    if stage.data == ["embedded"]:
        return 0
    count = len(load_rows(stage.data, kind, corpus.sft_rows, stage.columns, quiet=True))
    return math.ceil(count / 2) if kind == "unpaired" else count  # two texts of kto cost what a pair does


def layers_of(stage: TrainConfig, base: Decoder) -> int:
    """How many layers a stage trains."""
    depth = layer_count(stage.depth, base.config.n_layer) if isinstance(stage, RewardConfig) else 0
    return len(top_layers(stage, base, depth or base.config.n_layer))
