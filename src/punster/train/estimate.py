"""Estimated seconds of each stage of a pipeline on this machine: counted products over measured speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from statistics import fmean

from punster.config import DpoConfig, EvaluateConfig, GrpoConfig, PipelineConfig, PpoConfig, TrainConfig
from punster.data.schema import texts_of
from punster.errors import UserError
from punster.model.tokenizer import Tokenizer
from punster.train.plan import PROMPT, RESPONSE, drawing_work, layers_of, measured_speed, stage_work
from punster.train.rows import kind_of_rows, load_prompts, load_rows
from punster.train.setup import shared_base

Given = tuple[int, int, float, float]  # rows and distinct texts of a pass, mean tokens of a prompt and of a text
Counts = dict[tuple[str, ...], Given]  # by what was read
NOTHING: Given = (0, 0, PROMPT, RESPONSE)
MEASURED = 400  # rows whose lengths stand for all


def pipeline_seconds(
    config: PipelineConfig, stages: dict[str, TrainConfig], evaluation: EvaluateConfig, done: Sequence[str], counts: Counts
) -> dict[str, float]:
    """Of each stage that is not done, and of the evaluation. counts: of data read before, and now."""
    base = shared_base(config.model, config)
    tokenizer = Tokenizer.load(config.model, config.prompt_format)
    speed = 0.95 * measured_speed(base.dtype, str(base.device))
    judge = layers_of(stages["reward"], base) if "reward" in stages else 0  # whose adapter the critic starts from
    _, _, prompt, response = NOTHING
    with suppress(KeyError, UserError):  # a stage that is done may have lost its data since
        _, _, prompt, response = given(stages["sft"], counts, tokenizer)
    result = {}
    for name, stage in stages.items():
        if name not in done:
            seen = given(stage, counts, tokenizer)
            if isinstance(stage, PpoConfig | GrpoConfig | DpoConfig) and seen == NOTHING:  # a policy writes as it was taught
                seen = (0, 0, prompt, min(response, stage.max_new_tokens))
            result[name] = stage_work(stage, base, judge, *seen) / speed
    policies = max(0, len(set(evaluation.models)) - 1)  # the reference draws a pool
    pool = max(evaluation.samples, evaluation.pool or 2 * evaluation.best_of)
    prompts = len(load_prompts(evaluation.prompts, "test", True))
    texts = min(evaluation.limit or prompts, prompts) * (evaluation.samples * policies + pool)
    response = min(response, evaluation.max_new_tokens)
    result["evaluate"] = drawing_work(base, texts, prompt, response) / speed
    return result


def given(stage: TrainConfig, counts: Counts, tokenizer: Tokenizer) -> Given:
    """Rows and distinct texts of a pass of what a stage is given: of sft, of dpo (pairs), and of reward those beside the embedded
    corpus; and their mean lengths in tokens.

    No rows where pairs are sampled; --pretrain is not counted. counts: of data read before.
    """
    kind, columns = kind_of_rows(stage), getattr(stage, "columns", [])
    names = [name for name in getattr(stage, "data", []) if kind != "judged" or name != "embedded"]
    if kind == "prompt" or (kind == "judged" and not names):
        return NOTHING
    key = (*names, kind, *columns)
    if key not in counts:
        rows = load_rows(names, kind, columns=columns, quiet=True)
        shares: dict[str, float] = {}  # of the passes, in which a text is drawn
        for row in rows:
            for text in texts_of(row):
                shares[text] = max(shares.get(text, 0.0), row.get("pass_share") or 1.0)
        some = rows[:: max(1, len(rows) // MEASURED)]
        prompt = fmean(len(tokenizer.prompt_ids(row["prompt"])) for row in some)
        response = fmean(len(tokenizer.response_ids(text)) for row in some for text in texts_of(row))
        counts[key] = round(sum(row.get("pass_share") or 1.0 for row in rows)), round(sum(shares.values())), prompt, response
    count, texts, prompt, response = counts[key]
    return math.ceil(count / 2) if kind == "unpaired" else count, texts, prompt, response  # two texts cost what a pair does
