"""Estimated seconds of each stage of a pipeline on this machine: counted products over measured speed."""

from __future__ import annotations

from collections.abc import Sequence

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
from punster.data.mix import is_mixture, load_mixture
from punster.data.schema import Row
from punster.model.transformer import Decoder
from punster.train.plan import measured_speed
from punster.train.setup import layer_count, pick_device, pick_dtype, shared_base, top_layers

PROMPT, RESPONSE = 16, 21  # mean tokens of the embedded corpus in the default model's tokenizer


def pipeline_seconds(config: PipelineConfig, stages: dict[str, TrainConfig], evaluation: EvaluateConfig) -> dict[str, float]:
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    base = shared_base(config.model, dtype, device)
    speed = 0.95 * measured_speed(dtype, device)
    block = sum(out * into for out, into in base.config.sites(0).values())
    head, layers = base.head.weight.numel(), base.config.n_layer
    sampled = (PROMPT + RESPONSE) * block * layers + RESPONSE * head  # one sampled response
    result = {}
    judge = layers_of(stages["reward"], base) if "reward" in stages else 0  # whose adapter the critic starts from
    for name, stage in stages.items():
        depth = (layer_count(stage.depth, layers) if isinstance(stage, RewardConfig) else 0) or layers
        branch = layers_of(stage, base)
        trunk, tokens = depth - branch, PROMPT + RESPONSE
        if isinstance(stage, RewardConfig):
            records = min(len(corpus.part(stage.split)), stage.rows_per_kind or 10_000)
            drawn = min(records, stage.sampled_rows) if "sampled" in stage.negatives else 0
            pairs = records * len([kind for kind in stage.negatives if kind != "sampled"]) + drawn
            own = contrasts(stage.data)
            records, pairs = records + len({row["chosen"] for row in own}), pairs + len(own)
            # In families each text runs once a step, and about half of its tokens are a prefix of another.
            texts, trained = records + pairs, (0.5 * (records + pairs) if stage.families else 2 * pairs) * stage.epochs
            work = tokens * block * (texts * trunk + 2 * trained * branch) + stage.normalise_samples * (
                sampled + tokens * block * depth
            )
            work += drawn * sampled
            work += stage.test_limit * 6 * tokens * block * depth
        elif isinstance(stage, SftConfig):
            records = len(corpus.part("train"))
            work = records * tokens * block * trunk + stage.epochs * records * (2 * tokens * block * branch + 3 * RESPONSE * head)
        elif isinstance(stage, PolicyConfig):
            passes = stage.epochs if isinstance(stage, PpoConfig | GrpoConfig) else 1
            critic = (judge or branch) if isinstance(stage, PpoConfig) else 0
            once = sampled + tokens * block * (layers + 2 * branch + (judge or branch) + critic) + 2 * RESPONSE * head
            each = 2 * tokens * block * (branch + critic) + 3 * RESPONSE * head
            work = (stage.steps or 1) * stage.batch_size * (once + passes * each)
        else:
            assert isinstance(stage, DpoConfig)
            count = stage.prompt_limit or len(corpus.part("train"))
            if stage.online and stage.steps:
                count = stage.steps * stage.batch_size
            work = (
                count * stage.samples * (sampled + tokens * block * layers) if stage.pairs == "sampled" or stage.online else 0.0
            )
            work += 2 * count * (tokens * block * layers + stage.epochs * (2 * tokens * block * branch + 3 * RESPONSE * head))
        result[name] = work / speed
    policies = 1 + len([stage for stage in stages if stage not in ("sft", "reward", "gold", "placebo_reward")])
    pool = max(evaluation.samples, evaluation.pool or 2 * evaluation.best_of)
    texts = (evaluation.limit or len(corpus.part("test"))) * (evaluation.samples * policies + pool)
    result["evaluate"] = texts * (sampled + (PROMPT + RESPONSE) * block * layers) / speed
    return result


def layers_of(stage: TrainConfig, base: Decoder) -> int:
    """How many layers a stage trains."""
    depth = layer_count(stage.depth, base.config.n_layer) if isinstance(stage, RewardConfig) else 0
    return len(top_layers(stage, base, depth or base.config.n_layer))


def contrasts(data: Sequence[str]) -> list[Row]:
    """The pairs that mixtures take from our own contrasts, before the guard leaves a few out."""
    parts = [part for name in data if name != "embedded" and is_mixture(name) for part in load_mixture(name).parts]
    rows = [row for part in parts if part.source == "contrasts" for row in corpus.contrast_rows(part.use, part.half)]
    return [row for row in rows if "chosen" in row]
