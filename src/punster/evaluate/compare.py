"""Compare models on held-out prompts by a yardstick reward model that no training used.

punster evaluate runs/demo/ppo base runs/demo/sft [--gold runs/demo/gold] [--samples 4] [--judge URL --judge-model M]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from os.path import abspath
from pathlib import Path
from typing import Any

import torch
import yaml

from punster.algorithms.bestofn import best_of_n, best_of_win_share, kl_bound
from punster.config import EvaluateConfig
from punster.data.batch import Example, prefix_batches
from punster.data.files import is_file_of_rows, read_rows
from punster.disk import write_json, write_text
from punster.errors import UserError
from punster.evaluate.extra import Extra
from punster.evaluate.folder import home, read_config
from punster.evaluate.judge import judge_texts, labelled_texts
from punster.evaluate.judge_client import Client
from punster.evaluate.lineage import not_held_out, sibling, training_texts
from punster.evaluate.metrics import copy_rate, distinct_n, words
from punster.evaluate.seeds import rows_of_models
from punster.evaluate.success import Calls
from punster.evaluate.table import print_table, shown_progress
from punster.evaluate.winrate import bootstrap, bradley_terry_ratings, versus, win_share
from punster.model.load import identity
from punster.model.role import Role, Trunk, score_examples
from punster.model.tokenizer import Tokenizer
from punster.rollout.logprobs import compare_policies
from punster.rollout.sampler import Decoding, Rollout, generate
from punster.train.checkpoint import checkpoint_of
from punster.train.optim import seeded
from punster.train.rows import check_prompts, load_prompts
from punster.train.run import config_dict
from punster.train.setup import open_policy_role, open_reward_model, open_role, plain_base


@dataclass(frozen=True)
class Sampled:
    """What one model wrote: for every prompt, texts and their gold scores (the reference has more scores than shown texts)."""

    label: str
    rollout: Rollout
    texts: list[list[str]]
    gold: list[list[float]]

    @property
    def lengths(self) -> list[float]:
        """Mean number of words, one a prompt."""
        return [sum(len(words(text)) for text in texts) / len(texts) for texts in self.texts]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The summary as written to summary.json: one row a model, intervals by bootstrap over prompts."""
    if not config.models:
        raise UserError("nothing to evaluate: give runs, or 'base'")
    client = None
    if config.judge is not None:  # only then is openai imported; a missing key is found before anything is sampled
        client = Client(config)
        if config.calibrate:
            labelled_texts(config.calibrate, config.seed)  # refused now where there are none
    reference_path = config.reference or sibling(config.models, "sft")
    gold_path = config.gold or sibling(config.models, "gold")
    if reference_path is None:
        raise UserError("--reference RUN is needed: the runs lie beside no run named 'sft'")
    if gold_path is None:
        raise UserError("--gold RUN is needed: a reward model that no training used")
    reference, tokenizer = open_reference(reference_path, gold_path, config)
    gold = open_reward_model(gold_path, config, reference, tokenizer)
    texts = list({str(p): p for p in load_prompts(config.prompts, "test", config.quiet)}.values())  # the unit of resampling
    texts = texts[: config.limit] if config.limit else texts
    ids = check_prompts(tokenizer, reference.model, texts, config.max_new_tokens)
    labels = labels_of([reference_path, *config.models])
    paths, reference_label = {labels[path]: path for path in config.models}, labels[reference_path]
    limit, files, places = reference.model.config.max_positions, {}, {}
    for label, path in paths.items():  # a mistake must not wait for its turn
        if is_file_of_rows(path):
            files[label] = written(path, texts, ids, config.samples, tokenizer, limit)
        else:
            places[label] = "base" if path == "base" else fitting(path, reference, tokenizer)
    order = list(dict.fromkeys(["base"] * ("base" in paths) + [reference_label] + list(paths)))
    training = training_texts([path for path in {reference_path: 0, **dict.fromkeys(config.models)} if not is_file_of_rows(path)])
    extra = Extra.open(Role(plain_base(reference, config)), tokenizer, training, config.seed, reference.first_layer)
    calls = Calls.open(gold, tokenizer) if config.call_puns else None
    judges = [gold, *([open_proxy(config, reference, tokenizer)] if config.best_of else [])]
    decoding = Decoding(
        config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty
    )
    pool = max(config.samples, config.pool or 2 * config.best_of)
    results: dict[str, Any] = {}
    sampled: dict[str, Sampled] = {}
    for label in shown_progress(order, "evaluate " + ", ".join(order), config.quiet, len(order)):
        is_reference, role = label == reference_label, None
        count, readers = (pool, judges) if is_reference else (config.samples, judges[:1])
        if label not in files:
            role = reference if is_reference else opened(places[label], reference, config, tokenizer)
            keep = {judge.first_layer for judge in readers} | (set() if is_reference else shared_depths(role, reference))
            stream = seeded(config.seed, f"evaluate/{label}")
            rollout = generate(role, ids, decoding, tokenizer.eos_id, stream, count, keep=keep)
        else:
            rollout = files[label]
        scores = [by_prompt(score_examples(judge, rollout.closed, rollout.trunk), count) for judge in readers]
        kls = [0.0] if is_reference and not decoding.truncated else []
        if is_reference:
            pool_rollout, pool_scores = replace(rollout, trunk=None), scores
        elif role is not None and not decoding.truncated:
            kls = exact_kl(role, reference, picked(rollout, range(0, len(rollout.examples), count)), config.temperature)
        shown = picked(rollout, [i for i in range(len(rollout.examples)) if i % count < config.samples])
        sampled[label] = sample_of(label, shown, scores[0], tokenizer, config.samples)
        results[label] = describe(sampled[label], training, config) | kl_entry(kls, config)
        results[label] |= extra.of_texts(sampled[label].texts)
        # A file does not say where its texts would have gone on.
        results[label] |= extra.of_model(role, rollout.log_probs, decoding) if role else {"eos_rate": None}
    for label in order:
        results[label] |= against_reference(sampled[label], sampled[reference_label], config)
    for label, rating in ratings(sampled, config).items():
        results[label]["rating"] = rating
    summary: dict[str, Any] = {"models": results, "reference": reference_label, "prompts": len(texts), "samples": config.samples,
                               "decoding": asdict(decoding)}  # fmt: skip
    summary |= not_held_out({reference_label: reference_path, **paths}, gold_path, config)
    if config.best_of:
        name = f"best_of_{config.best_of}"
        gold_scores, proxy_scores = pool_scores
        results[name], sampled[name] = best_of_row(config, pool_rollout, proxy_scores, gold_scores, tokenizer, training)
        results[name] |= extra.of_texts(sampled[name].texts)
        summary["best_of_n"] = best_of_curve(proxy_scores, gold_scores)
    if calls is not None:
        summary["called_puns"] = calls.about
        for label, each in sampled.items():
            results[label]["called_puns"] = calls.rate(each.texts, config.seed)
    save(config, summary, [line for each in sampled.values() for line in sample_lines(each, texts)])
    if rows := rows_of_models(results, {name: path for name, path in paths.items() if name != reference_label}):
        summary["over_seeds"] = rows
        save(config, summary)
    if client is not None:
        first = {label: [texts_of_prompt[0] for texts_of_prompt in each.texts] for label, each in sampled.items()}
        try:
            judged, summary["judge"] = judge_texts(config, client, texts, first, reference_label)
        except UserError:
            print_table(summary)  # what was found without the judge is not lost
            raise
        for label, found in judged.items():
            results[label]["judge"] = found
        save(config, summary)
    return summary


def save(config: EvaluateConfig, summary: dict[str, Any], lines: Sequence[dict[str, Any]] = ()) -> None:
    if config.out:
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        # A pipeline has its own.
        if not (folder / "config.yaml").exists() or read_config(folder / "config.yaml")[1] == "evaluate":
            settings = yaml.safe_dump(config_dict(replace(config, out=None)), sort_keys=False, allow_unicode=True)
            write_text(folder / "config.yaml", f"# punster evaluate\n{settings}")
        write_json(folder / "summary.json", summary)
        if lines:
            write_text(folder / "samples.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


# ---- parts --------------------------------------------------------------------------------------------------------
def labels_of(paths: Sequence[str]) -> dict[str, str]:
    """{path: name in the tables}: the folder's or file's own; where two of them would share it, with the folder that it lies in."""
    there = {path: Path(path).resolve() for path in paths}
    given = {path: Path(abspath(path)) for path in paths}  # "." has no name
    own = {path: place.stem if is_file_of_rows(path) else place.name for path, place in given.items()}
    shared = lambda names: {name for name in names.values() if len({there[path] for path in paths if names[path] == name}) > 1}
    clash = shared(own)
    owner = lambda path: home(there[path]) if home(there[path]) != there[path] else there[path].parent
    named = {path: f"{owner(path).name}/{name}" if name in clash and path != "base" else name for path, name in own.items()}
    if still := shared(named):
        raise UserError(f"two different runs are called {still.pop()}: the table could not tell them apart; copy or rename one")
    return named


def written(path: str, prompts: Sequence[Any], ids: Sequence[list[int]], count: int, tokenizer: Tokenizer, limit: int) -> Rollout:
    """Texts of a file (rows of prompt and completion) as if a model had written them."""
    given: dict[str, list[str]] = {}
    for row in read_rows(path, "sft"):
        given.setdefault(str(row["prompt"]), []).append(row["completion"])
    if missing := [prompt for prompt in prompts if len(given.get(str(prompt), [])) < count]:
        raise UserError(f"{path}: fewer than {count} completions to the prompt {missing[0]!r}")
    texts = [(tuple(own), text) for own, prompt in zip(ids, prompts, strict=True) for text in given[str(prompt)][:count]]
    examples = [Example(own, tuple(tokenizer.response_ids(text))) for own, text in texts]
    if too_long := next((e for e in examples if e.length > limit), None):
        raise UserError(
            f"{path}: {tokenizer.decode(too_long.response)[:40]!r} … with its prompt exceeds the context of {limit} tokens"
        )
    return Rollout(examples, [], [True] * len(examples), tokenizer.eos_id)


def fitting(path: str, reference: Role, tokenizer: Tokenizer) -> str:
    """The checkpoint of a run that can be compared with the reference; UserError if it cannot."""
    place = checkpoint_of(path)
    told = json.loads((place / "role.json").read_text(encoding="utf-8"))
    if identity(told["model"]) != identity(reference.model.name) or told["prompt_format"] != tokenizer.prompt_format:
        raise UserError(f"{path}: another base model or prompt format than the reference run")
    if told["has_head"]:
        raise UserError(f"{path} is a reward model, not a policy")
    return str(place)


def opened(place: str, reference: Role, config: EvaluateConfig, tokenizer: Tokenizer) -> Role:
    return Role(plain_base(reference, config)) if place == "base" else open_role(place, config, tokenizer)[0]


def kl_entry(kls: Sequence[float], config: EvaluateConfig) -> dict[str, Any]:
    """Mean exact KL, and its interval: exact at every state, it is an average over sampled responses."""
    mean = sum(kls) / len(kls) if kls else None
    return {"exact_kl": mean} | ({"exact_kl_interval": bootstrap(kls, config.seed)} if len(kls) > 1 else {})


def by_prompt(values: Sequence[Any], count: int) -> list[list[Any]]:
    return [list(values[i : i + count]) for i in range(0, len(values), count)]


def picked(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Some of the responses, without the sampler's log-probs."""
    some = lambda values: [values[row] for row in rows]
    trunk = rollout.trunk and Trunk({key: some(states) for key, states in rollout.trunk.rows.items()})
    return replace(rollout, examples=some(rollout.examples), log_probs=[], finished=some(rollout.finished), trunk=trunk)


def open_proxy(config: EvaluateConfig, reference: Role, tokenizer: Tokenizer) -> Role:
    path = config.proxy or sibling(config.models, "reward")
    if path is None:
        raise UserError("--best-of needs the reward model that selects: --proxy RUN")
    return open_reward_model(path, config, reference, tokenizer)


def shared_depths(role: Role, reference: Role) -> set[int]:
    """Depths at which states kept while `role` sampled save work in `exact_kl`: its own last, and where it leaves the reference."""
    return {role.last_layer - 1, role.first_layer, reference.first_layer, *(adapter.first_layer for adapter in role.adapters)}


@torch.no_grad()
def exact_kl(role: Role, reference: Role, rollout: Rollout, temperature: float) -> list[float]:
    """KL(role || reference) in nats, one a response: full-vocabulary KL summed over its tokens."""
    examples, trunk = rollout.examples, rollout.trunk or Trunk({})
    found = [0.0] * len(examples)
    for rows in prefix_batches(examples, 2048):
        batch = trunk.collate(examples, rows, reference.model.device)
        compared = compare_policies(
            role.response_hidden(batch), role.model.head, reference.response_hidden(batch),
            reference.model.head, batch.targets(), temperature,
        )  # fmt: skip
        for row, kl in zip(rows, compared["kl"].split([len(examples[row].response) for row in rows]), strict=True):
            found[row] = float(kl.sum())
    return found


def open_reference(path: str, gold: str, config: EvaluateConfig) -> tuple[Role, Tokenizer]:
    """What the models are compared with; "base" is the yardstick's."""
    if path != "base":
        return open_policy_role(path, config)
    role, tokenizer = open_role(gold, config)
    return Role(plain_base(role, config)), tokenizer


def sample_of(label: str, rollout: Rollout, gold: list[list[float]], tokenizer: Tokenizer, per_prompt: int) -> Sampled:
    texts = [tokenizer.decode(example.response) for example in rollout.examples]
    return Sampled(label, replace(rollout, trunk=None), by_prompt(texts, per_prompt), gold)


def describe(sampled: Sampled, training: Sequence[str] | None, config: EvaluateConfig) -> dict[str, Any]:
    """One model's row: reward by the yardstick with its interval, and what can be counted in its texts.

    distinct-2 falls with the number of texts, so it is taken over one text a prompt and averaged over the samples.
    """
    columns = list(zip(*sampled.texts, strict=True))  # the k-th text to every prompt
    texts = [text for column in columns for text in column]
    return {
        "held_out_reward": bootstrap([sum(scores) / len(scores) for scores in sampled.gold], config.seed),
        "distinct_2": sum(distinct_n(column, 2) for column in columns) / len(columns),
        "length": sum(len(words(text)) for text in texts) / len(texts),
        "eos_rate": sum(sampled.rollout.finished) / len(sampled.rollout.finished),
        "copy_rate": None if training is None else copy_rate(texts, training),
    }


def against_reference(sampled: Sampled, reference: Sampled, config: EvaluateConfig) -> dict[str, Any]:
    """Win rate by the gold reward, with what else can be said of a paired comparison."""
    if sampled.label == reference.label:
        return {"win_rate_vs_sft": {"mean": 0.5, "low": 0.5, "high": 0.5}}
    shares = [win_share(mine, theirs) for mine, theirs in zip(sampled.gold, reference.gold, strict=True)]
    longer = [mine - theirs for mine, theirs in zip(sampled.lengths, reference.lengths, strict=True)]
    found = versus(shares, longer, config.seed)
    return {"win_rate_vs_sft": found.pop("win_rate"), "versus_sft": found}


def ratings(sampled: dict[str, Sampled], config: EvaluateConfig) -> dict[str, Any]:
    """Bradley-Terry ratings by the gold reward: every two models meet at every prompt."""
    games = [
        (a, b, win_share(mine, theirs), prompt)
        for a, b in combinations(sampled, 2)
        for prompt, (mine, theirs) in enumerate(zip(sampled[a].gold, sampled[b].gold, strict=True))
    ]
    return bradley_terry_ratings(games, config.seed) if games else {}


def best_of_row(
    config: EvaluateConfig, pool: Rollout, proxy: list[list[float]], gold: list[list[float]], tokenizer: Tokenizer,
    training: Sequence[str] | None,
) -> tuple[dict[str, Any], Sampled]:  # fmt: skip
    """Best-of-n of the reference: unbiased reward and win rate from the whole pool; texts from disjoint n-blocks of it."""
    n, size = config.best_of, len(proxy[0])
    expected, shares, chosen = [], [], []
    for row, (proxy_row, gold_row) in enumerate(zip(proxy, gold, strict=True)):
        expected.append([best_of_n(proxy_row, gold_row, n)])
        shares.append(best_of_win_share(proxy_row, gold_row, n))
        # From the end: a judge compares with the first sample, which should not be among them.
        for start in range(size - n, -1, -n):
            best = max(range(start, start + n), key=lambda i: proxy_row[i])
            chosen.append(row * size + best)
    blocks = size // n
    sampled = sample_of(f"best_of_{n}", picked(pool, chosen), expected, tokenizer, blocks)
    row_of = describe(sampled, training, config)
    row_of |= {"win_rate_vs_sft": bootstrap(shares, config.seed), "exact_kl": None, "kl_bound": kl_bound(n)}
    scores = by_prompt([gold[i // size][i % size] for i in chosen], blocks)
    return row_of, replace(sampled, gold=scores)


def best_of_curve(proxy: list[list[float]], gold: list[list[float]]) -> dict[str, list[float]]:
    """Expected gold reward for every power of two up to the pool size."""
    sizes = [2**i for i in range(20) if 2**i <= len(proxy[0])]
    means = [sum(best_of_n(p, q, n) for p, q in zip(proxy, gold, strict=True)) / len(proxy) for n in sizes]
    return {"n": [float(n) for n in sizes], "gold": means, "kl_bound": [kl_bound(n) for n in sizes]}


def sample_lines(sampled: Sampled, prompts: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "model": sampled.label, "completions": t, "gold": [round(g, 4) for g in scores[: len(t)]]}
        for prompt, t, scores in zip(prompts, sampled.texts, sampled.gold, strict=True)
    ]
