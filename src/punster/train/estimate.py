"""Estimated seconds of each stage of a pipeline on this machine: counted products over measured speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
from punster.data.schema import Row, texts_of
from punster.model.transformer import Decoder
from punster.train.plan import block_size, measured_speed
from punster.train.setup import layer_count, load_rows, shared_base, top_layers

Counts = dict[tuple[str, ...], tuple[int, int]]  # rows and distinct texts, by what was read
PROMPT, RESPONSE = 16, 21  # mean tokens of the embedded corpus in the default model's tokenizer


def pipeline_seconds(
    config: PipelineConfig, stages: dict[str, TrainConfig], evaluation: EvaluateConfig, done: Sequence[str]
) -> dict[str, float]:
    """Of each stage that is not done, and of the evaluation."""
    base = shared_base(config.model, config)
    speed = 0.95 * measured_speed(base.dtype, str(base.device))
    judge = layers_of(stages["reward"], base) if "reward" in stages else 0  # whose adapter the critic starts from
    left = {name: stage for name, stage in stages.items() if name not in done}
    counts: Counts = {}
    result = {name: stage_work(stage, base, judge, *given(stage, counts)) / speed for name, stage in left.items()}
    policies = max(0, len(set(evaluation.models)) - 1)  # the reference draws a pool
    pool = max(evaluation.samples, evaluation.pool or 2 * evaluation.best_of)
    texts = (evaluation.limit or len(corpus.part("test"))) * (evaluation.samples * policies + pool)
    layers = block_size(base) * base.config.n_layer * (PROMPT + RESPONSE)
    result["evaluate"] = texts * (2 * layers + RESPONSE * base.head.weight.numel()) / speed
    return result


def stage_work(
    stage: TrainConfig, base: Decoder, judge: int = 0, rows: int = 0, texts: float = 0, prompt: float = PROMPT, response: float = RESPONSE
) -> float:  # fmt: skip
    """Multiply-adds of a stage on the embedded corpus, or, of sft and dpo, on so many rows, pairs or prompts (`rows`).

    rows, texts: of reward, those that come beside the embedded corpus, and how many distinct texts they have.
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


def given(stage: TrainConfig, counts: Counts) -> tuple[int, int]:
    """Rows and distinct texts that a stage is given: of sft, of dpo (pairs), and of reward those beside the embedded corpus.

    (0, 0) where pairs are sampled; --pretrain is not counted. counts: of data read before.
    """
    from punster.train.dpo import given_pairs, unpaired

    if isinstance(stage, SftConfig):
        return counted(counts, stage.data, "sft", corpus.sft_rows, stage.columns)
    if isinstance(stage, DpoConfig) and not stage.online and stage.pairs == "data":
        if stage.loss_type != "kto":
            return counted(counts, stage.data, "preference", given_pairs, stage.columns)
        rows, texts = counted(counts, stage.data, "unpaired", lambda: unpaired(given_pairs()), stage.columns)
        return math.ceil(rows / 2), texts  # two texts cost what a pair does
    if isinstance(stage, RewardConfig):
        named = [name for name in stage.data if name != "embedded"]
        return counted(counts, named, "judged", list, stage.columns) if named else (0, 0)
    return 0, 0


def counted(
    counts: Counts, names: Sequence[str], kind: str, embedded: Callable[[], list[Row]], columns: Sequence[str]
) -> tuple[int, int]:
    key = (*names, kind, *columns)
    if key not in counts:
        rows = load_rows(names, kind, embedded, columns, quiet=True)
        counts[key] = len(rows), len({text for row in rows for text in texts_of(row)})
    return counts[key]


def layers_of(stage: TrainConfig, base: Decoder) -> int:
    """How many layers a stage trains."""
    depth = layer_count(stage.depth, base.config.n_layer) if isinstance(stage, RewardConfig) else 0
    return len(top_layers(stage, base, depth))
