"""punster's side: each task runs the package's own functions, step by step. python -m benchmarks.ours '{"task": ...}'"""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import punster  # noqa: F401  before torch, for what it tells OpenMP; the peers have its default

# isort: split

import torch

from benchmarks import prepare
from benchmarks.flops import Shape, matrix_peak, rollout_flops
from benchmarks.forced import without_eos
from benchmarks.keys import ALPHA, BATCH, EPOCHS, NEW, POOL, RANK, ROWS, Point, llama_config, points
from benchmarks.line import BENCH, Line, serve, timed
from punster.config import DpoConfig, GrpoConfig, PpoConfig, RewardConfig, SftConfig
from punster.data import corpus
from punster.data.batch import Example, collate, token_batches
from punster.model.load import random_model
from punster.model.lora import Adapter
from punster.model.role import Role, Trunk
from punster.model.tokenizer import Tokenizer
from punster.model.transformer import Decoder
from punster.rollout import sampler
from punster.rollout.logprobs import token_log_probs
from punster.rollout.sampler import Decoding, generate
from punster.train import dpo, reward, sft
from punster.train.grpo import grpo
from punster.train.optim import Cursor, make_optimizer, optimizer_step, seeded
from punster.train.ppo import ppo
from punster.train.run import Run
from punster.train.setup import extend, open_base, open_policy_role

DATA = json.loads(prepare.DATA.read_text())


NUMBERS = itertools.count()
PART = corpus.part


def settings(name: str, **more: Any) -> dict[str, Any]:
    """What all runs share; a run's folder is new in each call."""
    shared = {"name": f"{name}-{os.getpid()}-{next(NUMBERS)}", "out": str(BENCH / "work"), "model": str(prepare.MODEL)}
    return {**shared, "quiet": True, "eval_prompts": 0, "batch_size": BATCH, "lora_r": RANK, "lora_alpha": ALPHA, **more}


def rollout(line: Line, batch: int, mode: str = "lora") -> None:
    base, tokenizer = open_base(SftConfig(model=str(prepare.MODEL)))
    config = base.config
    if mode == "natural":
        role, _ = open_policy_role(str(prepare.RUNS / "sft-auto"), SftConfig(model=str(prepare.MODEL)))
        new, eos = 48, tokenizer.eos_id
    else:
        role, new, eos = Role(base, (Adapter.load(prepare.LORA, "policy", config),)), NEW, -1  # an id that is never drawn
    prompts = [row["ids"] for row in DATA["prompts"][:batch]]
    sites = tuple(config.sites(0).values())
    shape = Shape(config.n_layer, sites, config.n_head, config.d_head, config.d_model, config.vocab_size, RANK)
    flops = rollout_flops(shape, prompts, new)
    for number in itertools.count():
        out = generate(role, prompts, Decoding(new), eos, seeded(number, "sampling"))
        line.step(tokens=sum(len(example.response) for example in out.examples), flops=flops)


def peak(line: Line) -> None:
    while True:
        rate = matrix_peak(DATA["peer_dtype"])
        line.step(rate=rate)


# ---- supervised, reward, DPO ----------------------------------------------------------------------------------------
def sft_rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": row["plain"], "completion": row["chosen"]} for row in DATA["pairs"][:count]]


def pair_rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": row["plain"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in DATA["pairs"][:count]]


def train(verb: str, count: int, top_layers: str, **more: Any) -> None:
    """A run of the verb on the first `count` rows; like the peers' without evaluation: nothing is held out."""
    corpus.part = lambda split: [] if split == "val" else PART(split)
    shared = settings(verb, top_layers=top_layers, **more)
    if verb == "sft":
        sft.sft(SftConfig(**shared), sft_rows(count))
    elif verb == "reward":
        reward.train_reward(RewardConfig(**shared, normalise_samples=0, test_limit=0), pair_rows(count))
    else:
        dpo.dpo(DpoConfig(**shared, actor=str(prepare.RUNS / f"sft-{top_layers}")), pair_rows(count))


def after_each_step(act: Callable[[], None]) -> None:
    """Run.log is what every loop calls at the end of a step: log, then act."""
    log = Run.log

    def logged(self: Run, step: int, metrics: dict[str, float], note: str = "") -> None:
        log(self, step, metrics, note)
        act()

    Run.log = logged  # type: ignore[method-assign]


def single_steps(line: Line, verb: str, top_layers: str) -> None:
    after_each_step(line.step)
    train(verb, POOL, top_layers, steps=1000)


def dpo_step(line: Line, top_layers: str) -> None:
    """The step of the DPO loop with the reference's log-probs computed in it, as TRL does by default: nothing is kept."""
    config = DpoConfig(**settings("dpo", actor=str(prepare.RUNS / "sft-all"), top_layers=top_layers))
    reference, tokenizer = open_policy_role(config.actor, config)
    policy = extend(reference, config, "policy")
    optimizer = make_optimizer(policy, config.lr)
    examples, _ = dpo.load_examples(config, pair_rows(POOL), [], reference, None, tokenizer)
    cursor, nothing = Cursor(POOL, seeded(1, "data")), Trunk.compute(policy.model, [], [])
    while True:
        pairs = [examples[2 * unit + side] for unit in cursor.next(BATCH) for side in (0, 1)]
        sums = dpo.response_log_probs(reference, pairs, nothing, config.max_tokens)
        dpo.pair_step(config, policy, pairs, list(range(BATCH)), nothing, sums, config.max_tokens)
        optimizer_step(optimizer, config.lr, config.max_grad_norm)
        line.step()


def whole_runs(line: Line, verb: str, top_layers: str) -> None:
    """Trainings of EPOCHS passes, timed from where the trunk is about to be computed to the end of each step."""
    began, marks = 0.0, [0.0]
    enter = Run.__enter__

    def entered(self: Run) -> Run:
        nonlocal began
        result = enter(self)
        began = time.perf_counter()
        marks.clear()
        return result

    Run.__enter__ = entered  # type: ignore[method-assign]
    after_each_step(lambda: marks.append(time.perf_counter() - began))
    while True:
        train(verb, ROWS, top_layers, epochs=EPOCHS)
        line.step(seconds=marks[-1], marks=list(marks))


# ---- reinforcement learning ----------------------------------------------------------------------------------------
def forced_length() -> None:
    """No response ends before its last token, as in the peers' runs: EOS is never chosen."""
    sampler.choose = without_eos(sampler.choose, Tokenizer.load(str(prepare.MODEL)).eos_id)


def policy_settings(verb: str, top_layers: str) -> dict[str, Any]:
    """Steps do not end by themselves; rates are tiny, so that the policy stays where it is."""
    runs = {"actor": str(prepare.RUNS / f"sft-{top_layers}"), "reward_model": str(prepare.RUNS / f"reward-{top_layers}")}
    return settings(verb, **runs, top_layers=top_layers, steps=1000, max_new_tokens=NEW, lr=1e-6) | {"batch_size": 32}


def ppo_task(line: Line, top_layers: str) -> None:
    forced_length()
    config = PpoConfig(
        **policy_settings("ppo", top_layers), epochs=4, minibatches=1, critic_lr=1e-6, critic_warmup=0, stop_kl=1e9
    )
    ppo(config, prompts=[row["plain"] for row in DATA["prompts"]], callback=lambda step, metrics: line.step())


def grpo_task(line: Line, top_layers: str) -> None:
    forced_length()
    config = GrpoConfig(**policy_settings("grpo", top_layers), epochs=1, minibatches=1, samples=8)
    grpo(config, prompts=[row["plain"] for row in DATA["prompts"]], callback=lambda step, metrics: line.step())


# ---- growth ---------------------------------------------------------------------------------------------------------
def growth(line: Line, axis: str, work: str) -> None:
    """The points of an axis in turn, over and over; a point's first run is not timed."""
    ready: dict[Point, Callable[[], object]] = {}
    for point in itertools.cycle(points(axis, work)):
        if point not in ready:
            if len({p.shape for p in points(axis, work)}) > 1:
                ready.clear()  # one model in memory at a time
            ready[point] = (growth_rollout if work == "rollout" else growth_step)(growth_model(point.shape), point)
            ready[point]()
        line.step(**timed(ready[point]))


@functools.lru_cache(1)
def growth_model(shape: tuple[int, int, int]) -> Role:
    base = random_model(llama_config(*shape))
    base = Decoder(base.config, {name: t.to(getattr(torch, DATA["dtype"])) for name, t in base.weights.items()}, "random")
    return extend(Role(base), SftConfig(top_layers="all", lora_r=RANK, lora_alpha=ALPHA), "policy")


def random_ids(point: Point, length: int) -> list[list[int]]:
    return torch.randint(0, point.shape[2], (point.rows, length), generator=torch.Generator().manual_seed(1)).tolist()


def growth_rollout(policy: Role, point: Point) -> Callable[[], object]:
    prompts = random_ids(point, point.length - 16)
    return lambda: generate(policy, prompts, Decoding(16), -1, seeded(1, "sampling"), point.samples)


def growth_step(policy: Role, point: Point) -> Callable[[], object]:
    """A step as train/sft.py does it, micro-batches included."""
    config = SftConfig()
    optimizer = make_optimizer(policy, 1e-6)
    examples = [Example(tuple(ids[:16]), tuple(ids[16:])) for ids in random_ids(point, point.length)]

    def step() -> None:
        for group in token_batches([example.length for example in examples], config.max_tokens):
            batch = collate([examples[row] for row in group])
            states, head = policy.response_hidden(batch), policy.model.head
            (-token_log_probs(states, head, batch.targets()).sum() / 1000).backward()
        optimizer_step(optimizer, 1e-6, 1.0)

    return step


TASKS: dict[str, Callable[..., None]] = {
    "rollout": rollout, "peak": peak, "steps": single_steps, "dpo_step": dpo_step, "runs": whole_runs, "ppo": ppo_task, "grpo": grpo_task,
    "growth": growth,
}  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(1)
    serve(TASKS)
