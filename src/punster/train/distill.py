"""Distilled best-of-n (rejection-sampling SFT): sample n a prompt, keep the best by reward, fine-tune on those.

punster distill -n NAME -a runs/SFT -c runs/REWARD --best-of 8
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

from punster.config import DistillConfig
from punster.errors import UserError
from punster.model.role import score_examples
from punster.rollout.sampler import Decoding, generate
from punster.train.held_out import own_rows
from punster.train.optim import seeded
from punster.train.plan import drawing_work, measured_speed
from punster.train.rows import check_prompts, load_prompts
from punster.train.run import check_name
from punster.train.setup import open_reward_model, open_start
from punster.train.sft import sft


def distill(config: DistillConfig) -> Path | None:
    """Returns the run folder (None for a dry run)."""
    if not config.actor or not config.reward_model:
        raise UserError("distill needs a run to sample from (-a) and a reward-model run (-c)")
    config = replace(config)  # the caller's stays as it is
    started = check_name(config, "distill")
    policy, tokenizer = open_start(config.actor, config)
    judge = open_reward_model(config.reward_model, config, policy, tokenizer)
    prompts = load_prompts(config.prompts, quiet=config.quiet)
    own_rows(replace(config, quiet=True))  # a mistake in --eval-data must not cost the samples
    ids = check_prompts(tokenizer, policy.model, prompts, config.max_new_tokens)
    rows = []
    if config.dry_run:
        work = drawing_work(policy.model, config.best_of * len(ids), fmean(map(len, ids)), config.max_new_tokens)
        minutes = work / measured_speed(policy.model.dtype, str(policy.model.device)) / 0.95 / 60
        print(f"{config.best_of} samples to each of {len(ids)} prompts: at most about {minutes:.1f} minutes; then")
        rows = [{"prompt": prompt, "completion": "x" * 60} for prompt in prompts]
    else:
        decoding = Decoding(config.max_new_tokens)
        rollout = generate(policy, ids, decoding, tokenizer.eos_id, seeded(config.seed, "sampling"), config.best_of)
        scores = score_examples(judge, rollout.closed)
        for i, prompt in enumerate(prompts):
            places = [k for k in range(i * config.best_of, (i + 1) * config.best_of) if rollout.finished[k]]
            if places:
                best = rollout.examples[max(places, key=lambda k: scores[k])]
                if text := tokenizer.decode(best.response):
                    rows.append({"prompt": prompt, "completion": text, "_completion_ids": list(best.response)})
    if not rows:
        raise UserError("no sample ended with EOS, so there is nothing to distil; raise --max-new-tokens")
    return sft(replace(config, pretrained=config.actor, data=[]), rows, verb="distill", started=started)
