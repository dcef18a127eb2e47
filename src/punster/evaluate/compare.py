"""Compare models on held-out prompts by a yardstick reward model that no training used.

punster evaluate runs/demo/ppo base runs/demo/sft [--gold runs/demo/gold] [--samples 4]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from punster.algorithms.bestofn import best_of_win_share, kl_bound, selection_weights
from punster.config import EvaluateConfig
from punster.data import corpus
from punster.data.batch import Example, token_batches
from punster.errors import UserError
from punster.evaluate.metrics import copy_rate, distinct_n, words
from punster.evaluate.winrate import bootstrap, win_share
from punster.model.role import Role, Trunk, score_examples
from punster.model.tokenizer import Tokenizer
from punster.rollout.logprobs import compare_policies
from punster.rollout.sampler import Decoding, Rollout, generate
from punster.train.run import seeded, write_json, write_text
from punster.train.setup import check_prompts, load_prompts, load_rows, open_policy_role, open_reward_model, open_role, plain_base


def evaluate(config: EvaluateConfig, prompts: Sequence[Any] | None = None) -> dict[str, Any]:
    """The summary as written to summary.json: one row a model, intervals by bootstrap over prompts."""
    if not config.models:
        raise UserError("nothing to evaluate: give runs, or 'base'")
    reference_path = config.reference or sibling(config.models, "sft")
    gold_path = config.gold or sibling(config.models, "gold")
    if reference_path is None:
        raise UserError("--reference RUN is needed: the runs lie beside no run named 'sft'")
    if gold_path is None:
        raise UserError("--gold RUN is needed: a reward model that no training used")
    reference, tokenizer = open_policy_role(reference_path, config)
    gold = open_reward_model(gold_path, config, reference, tokenizer)
    texts = load_prompts(prompts if prompts is not None else config.prompts, "test")
    texts = texts[: config.limit] if config.limit else texts
    ids = check_prompts(tokenizer, reference.model, texts, config.max_new_tokens)
    paths = {label_of(path): path for path in config.models}
    if len(paths) < len(set(config.models)) or (
        label_of(reference_path) in paths and Path(paths[label_of(reference_path)]).resolve() != Path(reference_path).resolve()
    ):
        raise UserError("two different runs have the same folder name: the table could not tell them apart; copy or rename one")
    reference_label = label_of(reference_path)
    order = list(dict.fromkeys(["base"] * ("base" in paths) + [reference_label] + list(paths)))
    training = training_texts(reference_path)
    decoding = Decoding(config.max_new_tokens, config.temperature)
    pool = max(config.samples, config.pool or 2 * config.best_of)
    results: dict[str, Any] = {}
    kept: list[dict[str, Any]] = []
    gold_by_model: dict[str, list[list[float]]] = {}
    proxy_scores: list[list[float]] = []
    for label in shown_progress(order, config.quiet):
        role = reference if label == reference_label else opened(label, paths[label], reference, config, tokenizer)
        count = pool if label == reference_label else config.samples
        rollout = generate(role, ids, decoding, tokenizer.eos_id, seeded(config.seed, f"evaluate/{label}"), count)
        scores = by_prompt(score_examples(gold, rollout.closed), count)
        gold_by_model[label] = scores
        if label == reference_label and config.best_of:
            proxy_scores = by_prompt(proxy_of(config, rollout, reference, tokenizer), count)
            pool_rollout = rollout
        kl = (
            None if label == reference_label else exact_kl(role, reference, first_of(rollout.examples, count), config.temperature)
        )
        shown = Rollout(first_of(rollout.examples, count, config.samples), [], first_of(rollout.finished, count, config.samples))
        results[label] = describe(shown, scores, tokenizer, training, config, config.samples)
        results[label] |= {"exact_kl": 0.0 if label == reference_label else kl}
        kept += sample_lines(
            label, texts, by_prompt([tokenizer.decode(e.response) for e in shown.examples], config.samples), scores
        )
    for label in order:
        pairs = zip(gold_by_model[label], gold_by_model[reference_label], strict=True)
        same = label == reference_label
        results[label]["win_rate_vs_sft"] = (
            {"mean": 0.5, "low": 0.5, "high": 0.5} if same else bootstrap([win_share(a, b) for a, b in pairs], config.seed)
        )
    summary = {"models": results, "prompts": len(texts), "samples": config.samples, "decoding": {
        "temperature": config.temperature, "top_k": 0, "top_p": 1.0, "max_new_tokens": config.max_new_tokens}}  # fmt: skip
    if config.best_of:
        name = f"best_of_{config.best_of}"
        results[name], lines = best_of_row(
            config, texts, pool_rollout, proxy_scores, gold_by_model[reference_label], tokenizer, training
        )
        kept += lines
        summary["best_of_n"] = best_of_curve(proxy_scores, gold_by_model[reference_label])
    if config.out:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(config.out) / "summary.json", summary)
        write_text(Path(config.out) / "samples.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
    return summary


def shown_progress(labels: list[str], quiet: bool) -> Iterable[str]:
    """The labels, with a progress bar and the time left unless quiet."""
    if quiet:
        return labels
    from rich.console import Console
    from rich.progress import track

    return track(labels, "evaluate " + ", ".join(labels), console=Console(stderr=True))


# ---- parts --------------------------------------------------------------------------------------------------------
def sibling(models: Sequence[str], name: str) -> str | None:
    """The run of this name beside any of the runs."""
    for path in models:
        if path != "base" and (Path(path).parent / name / "checkpoints").is_dir():
            return str(Path(path).parent / name)
    return None


def label_of(path: str) -> str:
    return Path(path).name


def opened(label: str, path: str, reference: Role, config: EvaluateConfig, tokenizer: Tokenizer) -> Role:
    if path == "base":
        return Role(plain_base(reference, config))
    role, other = open_role(path, config, tokenizer)
    if role.model.name != reference.model.name or other.prompt_format != tokenizer.prompt_format:
        raise UserError(f"{path}: another base model or prompt format than the reference run")
    if role.head is not None:
        raise UserError(f"{path} is a reward model, not a policy")
    return role


def training_texts(path: str) -> list[str] | None:
    """What the reference run was fine-tuned on, as its config.yaml names it; None if that cannot be read."""
    import yaml

    try:
        sources = yaml.safe_load((Path(path) / "config.yaml").read_text())["data"]
        return [row["completion"] for row in load_rows(sources, "sft", corpus.sft_rows)]
    except (OSError, KeyError, TypeError, UserError):
        return None


def by_prompt(values: Sequence[Any], count: int) -> list[list[Any]]:
    return [list(values[i : i + count]) for i in range(0, len(values), count)]


def first_of(values: Sequence[Any], count: int, take: int = 1) -> list[Any]:
    """The first `take` of every `count` values."""
    return [value for i, value in enumerate(values) if i % count < take]


def proxy_of(config: EvaluateConfig, rollout: Rollout, reference: Role, tokenizer: Tokenizer) -> list[float]:
    path = config.proxy or sibling(config.models, "reward")
    if path is None:
        raise UserError("--best-of needs the reward model that selects: --proxy RUN")
    return score_examples(open_reward_model(path, config, reference, tokenizer), rollout.closed)


@torch.no_grad()
def exact_kl(role: Role, reference: Role, examples: Sequence[Example], temperature: float, max_tokens: int = 2048) -> float:
    """KL(role || reference) in nats a response: full-vocabulary KL summed over each response's tokens, averaged."""
    trunk = Trunk.compute(reference, examples, [min(role.first_layer, reference.first_layer)], max_tokens)
    total = 0.0
    for rows in token_batches([example.length for example in examples], max_tokens):
        batch = trunk.collate(examples, rows, reference.model.device)
        compared = compare_policies(
            role.response_hidden(batch), role.model.head, reference.response_hidden(batch),
            reference.model.head, batch.targets(), temperature,
        )  # fmt: skip
        total += float(compared["kl"].sum())
    return total / len(examples)


def describe(
    rollout: Rollout,
    gold: Sequence[Sequence[float]],
    tokenizer: Tokenizer,
    training: Sequence[str] | None,
    config: EvaluateConfig,
    per_prompt: int,
) -> dict[str, Any]:
    """One model's row: reward by the yardstick with its interval, and what can be counted in its texts.

    distinct-2 falls with the number of texts, so it is taken over one text a prompt and averaged over the samples.
    """
    texts = [tokenizer.decode(example.response) for example in rollout.examples]
    return {
        "held_out_reward": bootstrap([sum(scores) / len(scores) for scores in gold], config.seed),
        "distinct_2": sum(distinct_n(texts[k::per_prompt], 2) for k in range(per_prompt)) / per_prompt,
        "length": sum(len(words(text)) for text in texts) / len(texts),
        "eos_rate": sum(rollout.finished) / len(rollout.finished),
        "copy_rate": None if training is None else copy_rate(texts, training),
    }


def best_of_row(
    config: EvaluateConfig, prompts: Sequence[Any], pool: Rollout, proxy: list[list[float]], gold: list[list[float]],
    tokenizer: Tokenizer, training: Sequence[str] | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """Best-of-n of the reference: unbiased reward and win rate from the whole pool; texts from disjoint n-blocks of it."""
    n, size = config.best_of, len(proxy[0])
    expected, shares, chosen = [], [], []
    for row, (proxy_row, gold_row) in enumerate(zip(proxy, gold, strict=True)):
        weights = selection_weights(proxy_row, n)
        expected.append(sum(w * g for w, g in zip(weights, gold_row, strict=True)))
        shares.append(best_of_win_share(proxy_row, gold_row, n))
        for start in range(0, size - n + 1, n):
            best = max(range(start, start + n), key=lambda i: proxy_row[i])
            chosen.append(row * size + best)
    picked = Rollout([pool.examples[i] for i in chosen], [], [pool.finished[i] for i in chosen])
    blocks = size // n
    row_of = describe(picked, [[value] for value in expected], tokenizer, training, config, blocks)
    row_of |= {"win_rate_vs_sft": bootstrap(shares, config.seed), "exact_kl": None, "kl_bound": kl_bound(n)}
    texts = by_prompt([tokenizer.decode(e.response) for e in picked.examples], blocks)
    scores = by_prompt([gold[i // size][i % size] for i in chosen], blocks)
    return row_of, sample_lines(f"best_of_{n}", prompts, texts, scores)


def best_of_curve(proxy: list[list[float]], gold: list[list[float]]) -> dict[str, list[float]]:
    """Expected gold reward for every power of two up to the pool size."""
    sizes = [2**i for i in range(20) if 2**i <= len(proxy[0])]
    means = []
    for n in sizes:
        expected = [sum(w * g for w, g in zip(selection_weights(p, n), q, strict=True)) for p, q in zip(proxy, gold, strict=True)]
        means.append(sum(expected) / len(expected))
    return {"n": [float(n) for n in sizes], "gold": means, "kl_bound": [kl_bound(n) for n in sizes]}


def sample_lines(
    label: str, prompts: Sequence[Any], texts: Sequence[Sequence[str]], gold: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "model": label, "completions": list(t), "gold": [round(g, 4) for g in scores[: len(t)]]}
        for prompt, t, scores in zip(prompts, texts, gold, strict=True)
    ]
