"""Estimated seconds of each stage of a pipeline on this machine: counted products over measured speed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from punster.config import EvaluateConfig, PipelineConfig, TrainConfig
from punster.data import corpus
from punster.data.schema import texts_of
from punster.train.plan import PROMPT, RESPONSE, block_size, layers_of, measured_speed, stage_work
from punster.train.rows import kind_of_rows, load_rows
from punster.train.setup import shared_base

Counts = dict[tuple[str, ...], tuple[int, int]]  # rows and distinct texts of a pass, by what was read


def pipeline_seconds(
    config: PipelineConfig, stages: dict[str, TrainConfig], evaluation: EvaluateConfig, done: Sequence[str], counts: Counts
) -> dict[str, float]:
    """Of each stage that is not done, and of the evaluation. counts: of data read before, and now."""
    base = shared_base(config.model, config)
    speed = 0.95 * measured_speed(base.dtype, str(base.device))
    judge = layers_of(stages["reward"], base) if "reward" in stages else 0  # whose adapter the critic starts from
    left = {name: stage for name, stage in stages.items() if name not in done}
    result = {name: stage_work(stage, base, judge, *given(stage, counts)) / speed for name, stage in left.items()}
    policies = max(0, len(set(evaluation.models)) - 1)  # the reference draws a pool
    pool = max(evaluation.samples, evaluation.pool or 2 * evaluation.best_of)
    texts = (evaluation.limit or len(corpus.part("test"))) * (evaluation.samples * policies + pool)
    layers = block_size(base) * base.config.n_layer * (PROMPT + RESPONSE)
    result["evaluate"] = texts * (2 * layers + RESPONSE * base.head.weight.numel()) / speed
    return result


def given(stage: TrainConfig, counts: Counts) -> tuple[int, int]:
    """Rows and distinct texts of a pass of what a stage is given: of sft, of dpo (pairs), and of reward those beside the embedded corpus.

    (0, 0) where pairs are sampled; --pretrain is not counted. counts: of data read before.
    """
    kind, columns = kind_of_rows(stage), getattr(stage, "columns", [])
    names = [name for name in getattr(stage, "data", []) if kind != "judged" or name != "embedded"]
    if kind == "prompt" or (kind == "judged" and not names):
        return 0, 0
    key = (*names, kind, *columns)
    if key not in counts:
        rows = load_rows(names, kind, columns=columns, quiet=True)
        shares: dict[str, float] = {}  # of the passes, in which a text is drawn
        for row in rows:
            for text in texts_of(row):
                shares[text] = max(shares.get(text, 0.0), row.get("pass_share") or 1.0)
        counts[key] = round(sum(row.get("pass_share") or 1.0 for row in rows)), round(sum(shares.values()))
    count, texts = counts[key]
    return math.ceil(count / 2) if kind == "unpaired" else count, texts  # two texts cost what a pair does
