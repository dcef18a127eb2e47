"""One rollout's experience for the policy-gradient loops: sampled responses, their rewards, and what training needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from punster.config import PolicyConfig
from punster.config.shared import FROM_PYTHON
from punster.data.batch import Example, token_batches
from punster.errors import UserError
from punster.model.role import Role, Trunk
from punster.model.tokenizer import Tokenizer
from punster.rewards import Reward, RewardFunction, load_function
from punster.rollout.logprobs import Known, compare_policies
from punster.rollout.sampler import Decoding, generate, rows_at_once
from punster.train import held_out
from punster.train.plan import stage_work
from punster.train.rows import check_prompts, load_prompts
from punster.train.run import Run
from punster.train.setup import extend, open_reward_model, open_start, own_copy


@dataclass
class Setup:
    """What stays the same over a run."""

    config: PolicyConfig
    policy: Role
    reference: Role
    tokenizer: Tokenizer
    prompts: list[Any]
    prompt_ids: list[list[int]]
    reward: Reward
    decoding: Decoding
    eval_prompts: list[Any]

    @property
    def dry_examples(self) -> list[Example]:
        """Stand-ins of full length, for estimates of time and memory."""
        response = (0,) * self.decoding.max_new_tokens
        return [Example(tuple(ids), response) for ids in self.prompt_ids]

    @property
    def work(self) -> float:
        """Multiply-adds of the run."""
        judge = self.reward.model
        branch = judge.last_layer - judge.first_layer if judge is not None else 0
        prompt = sum(map(len, self.prompt_ids)) / len(self.prompt_ids)
        return stage_work(self.config, self.policy.model, branch, prompt=prompt, response=self.decoding.max_new_tokens)


def open_policy(config: PolicyConfig, prompts: Sequence[Any] | None, function: RewardFunction | None) -> Setup:
    """Policy = SFT run + a fresh adapter; reference = the SFT run; rewards as configured."""
    if not config.actor:
        raise UserError("an SFT run is needed to start from: -a runs/SFT (or -a base)")
    reference, tokenizer = open_start(config.actor, config)
    model = open_reward_model(config.reward_model, config, reference, tokenizer) if config.reward_model else None
    functions = [load_function(name) for name in config.reward if function is None or name != FROM_PYTHON]
    if function is not None:
        functions.append((getattr(function, "__name__", "reward"), function, 1.0))
    texts = load_prompts(prompts if prompts is not None else config.prompts, quiet=config.quiet)
    ids = check_prompts(tokenizer, reference.model, texts, config.max_new_tokens)
    policy = extend(reference, config, "policy")
    if config.memory == "separate":
        reference = own_copy(reference)
    if config.memory in ("lora", "separate") and model is not None:
        model = own_copy(model)
    own = held_out.own_rows(config)
    asked = [row["prompt"] for row in own]
    held_out.say_shared(config, own, [{"prompt": text} for text in texts])
    shown = asked or (texts if prompts is not None else load_prompts(config.prompts, "val", quiet=True))
    shown = held_out.first(shown, config.eval_prompts, tokenizer, reference.model, config.max_new_tokens, config.quiet)
    rewards, decoding = Reward(model, functions, config.reward_timeout), Decoding(config.max_new_tokens, config.temperature)
    return Setup(config, policy, reference, tokenizer, texts, ids, rewards, decoding, shown)


class FirstPass(NamedTuple):
    """The policy's states and the critic's values with their graphs, and the log-probs with their slopes."""

    states: Tensor | None = None
    values: Tensor | None = None
    known: Known | None = None


@dataclass
class Experience:
    """B responses of at most R tokens; per-token tensors are (B, R), zero beyond each response."""

    examples: list[Example]
    texts: list[str]
    prompts: list[Any]
    trunk: Trunk
    groups: list[list[list[int]]]  # minibatches -> micro-batches -> rows, as the old log-probs were computed
    mask: Tensor
    log_prob: Tensor
    ref_log_prob: Tensor
    kl: Tensor
    entropy: Tensor
    values: Tensor
    sampler_log_prob: Tensor
    scores: Tensor  # (B,)
    finished: Tensor  # (B,) bool
    max_tokens: int
    samples: int = 1
    kept: FirstPass | None = None  # of the first micro-batch

    def first_pass(self, rows: list[int]) -> FirstPass:
        """What `collect` kept of the forward pass over these rows; only once."""
        found, self.kept = self.kept, None
        return found if found is not None and rows == self.groups[0][0] else FirstPass()

    def regroup(self, minibatches: int, generator: torch.Generator) -> list[list[list[int]]]:
        """A fresh permutation for another pass."""
        return partition(self.examples, minibatches, generator, self.max_tokens, self.samples)

    def cut(self, groups: list[list[int]], max_tokens: int) -> list[list[int]]:
        """One minibatch's micro-batches, in smaller ones where memory has run out since they were made."""
        if max_tokens in (0, self.max_tokens):
            return groups
        self.kept = None
        rows = [row for group in groups for row in group]
        smaller = token_batches([self.examples[row].length for row in rows], max_tokens)
        return [[rows[i] for i in group] for group in smaller]

    def metrics(self, beta: float, scores: Tensor, penalty: Tensor | None = None) -> dict[str, float]:
        """Rollout metrics under TRL's names; KL and entropy are sums per response and means per token.

        penalty (B, R): the KL that is in the reward, where it is not k1.
        """
        tokens = self.mask.sum()
        k1 = (self.log_prob - self.ref_log_prob) * self.mask
        penalised = k1.sum(1) if penalty is None else (penalty * self.mask).sum(1)
        gap = ((self.log_prob - self.sampler_log_prob) * self.mask).abs().sum() / tokens
        return {
            "objective/kl": float(k1.sum(1).mean()),
            "objective/exact_kl": float(self.kl.sum(1).mean()),
            "objective/entropy": float(self.entropy.sum(1).mean()),
            "objective/entropy_per_token": float(self.entropy.sum() / tokens),
            "objective/scores": float(self.scores.mean()),
            "objective/scores_std": float(self.scores.std()) if len(self.scores) > 1 else 0.0,
            "objective/non_score_reward": float(-beta * penalised.mean()),
            "objective/rlhf_reward": float((scores - beta * penalised).mean()),
            "val/num_eos_tokens": float(self.finished.sum()),
            "eos_rate": float(self.finished.float().mean()),
            "length": float(tokens / len(self.examples)),
            "sampler_gap": float(gap),
        }

    def sample_rows(self, count: int) -> list[dict[str, Any]]:
        first = list(zip(self.prompts, self.texts, self.scores.tolist(), strict=True))[:count]
        return [{"prompt": prompt, "completion": text, "score": round(score, 4)} for prompt, text, score in first]


def partition(
    examples: Sequence[Example], minibatches: int, generator: torch.Generator, max_tokens: int, samples: int = 1
) -> list[list[list[int]]]:
    """Rows permuted, cut into minibatches as even as can be, each cut into micro-batches of similar length.

    The samples of one prompt stay in one minibatch where there are enough prompts, so that it runs less often.
    """
    block = samples if len(examples) >= minibatches * samples else 1
    blocks = torch.randperm(len(examples) // block, generator=generator).tolist()
    order = [place * block + k for place in blocks for k in range(block)]
    parts = min(minibatches, len(blocks))
    cuts = [len(blocks) * part // parts * block for part in range(parts + 1)]
    result = []
    for start, end in pairwise(cuts):
        rows = order[start:end]
        result.append([[rows[i] for i in group] for group in token_batches([examples[row].length for row in rows], max_tokens)])
    return result


@torch.no_grad()
def collect(
    setup: Setup, prompt_rows: Sequence[int], sampling: torch.Generator, shuffling: torch.Generator, max_tokens: int = 0, *,
    critic: Role | None = None, minibatches: int = 1, samples: int = 1, with_graph: bool = False,
) -> Experience:  # fmt: skip
    """Sample, run the trunk once for all roles, score, and read old log-probs, exact KL and values off the training path.

    with_graph: where the first minibatch is one micro-batch, its states and values keep their graph: the first update is made with
    the very weights that are in place now, so its forward pass need not be repeated. Where that micro-batch is the whole rollout,
    and the kernels sampled it, the policy's was never made: sampling has recorded what the gradients need.
    """
    policy, reference = setup.policy, setup.reference
    others = [role for role in (reference, critic, setup.reward.model) if role is not None]
    # States are shared along the policy's path: its frozen part, and where the others leave the base.
    depths = {policy.frozen_depth, *(role.first_layer for role in others)} if setup.config.memory == "trunk" else set()
    max_tokens = max_tokens or setup.config.max_tokens
    share = max_tokens / setup.config.max_tokens  # below 1 where memory has run out
    widest = max(len(setup.prompt_ids[row]) for row in prompt_rows) + setup.decoding.max_new_tokens
    whole = minibatches == 1 and len(prompt_rows) * samples * widest <= max_tokens  # one micro-batch in any case
    rollout = generate(
        policy, [setup.prompt_ids[row] for row in prompt_rows], setup.decoding, setup.tokenizer.eos_id, sampling, samples,
        rows_at_once(share), depths, with_graph and whole,
    )  # fmt: skip
    examples = rollout.examples
    prompts = [setup.prompts[row] for row in prompt_rows for _ in range(samples)]
    texts = [setup.tokenizer.decode(example.response) for example in examples]
    closed = rollout.closed
    trunk = rollout.trunk if rollout.trunk is not None else Trunk.compute(policy, closed, depths, max_tokens)
    scores = setup.reward(prompts, texts, closed, trunk, round(4096 * share))
    groups = partition(examples, minibatches, shuffling, max_tokens, samples)
    lengths = torch.tensor([len(example.response) for example in examples])
    shape = (len(examples), int(lengths.max()))
    device = policy.model.device
    names = ("log_prob", "ref_log_prob", "kl", "entropy", "values", "sampler_log_prob")
    tensors = {name: torch.zeros(shape, device=device) for name in names}
    kept, record = None, rollout.record  # a record is of a rollout that is one micro-batch
    for number, rows in enumerate(group for minibatch in groups for group in minibatch):
        batch = trunk.collate(examples, rows, device)
        width = batch.mask.shape[1]
        keeps = with_graph and number == 0 and len(groups[0]) == 1
        with torch.set_grad_enabled(keeps):
            sampled = batch if record is None else replace(batch, record=record, tree=record.tree(rows))
            states = policy.response_hidden(sampled)
            joined = critic is not None and critic.adapters is policy.adapters
            values = None if critic is None or joined else critic.values(batch)
        if joined and critic is not None and critic.head is not None:
            values = batch.scatter(critic.head(states))
        compared = compare_policies(
            states, policy.model.head, reference.response_hidden(batch),
            reference.model.head, batch.targets(), setup.decoding.temperature, with_slopes=keeps,
        )  # fmt: skip
        slopes = compared.pop("slopes", None)
        if keeps:
            known = None if slopes is None else Known(compared["log_prob"], slopes)
            kept = FirstPass(states, None if joined else values, known)
        for name, flat in compared.items():
            tensors[name][rows, :width] = batch.scatter(flat)
        if values is not None:
            tensors["values"][rows, :width] = values
    for row, log_probs in enumerate(rollout.log_probs):
        tensors["sampler_log_prob"][row, : len(log_probs)] = log_probs
    if record is not None and (gap := float((tensors["sampler_log_prob"] - tensors["log_prob"]).abs().max())) > 1e-4:
        raise RuntimeError(f"what was sampled and what is trained on are {gap:.2e} apart in a log-prob")
    return Experience(
        examples=examples, texts=texts, prompts=prompts, trunk=trunk, groups=groups,
        mask=torch.arange(shape[1], device=device)[None] < lengths[:, None].to(device), scores=torch.tensor(scores, device=device),
        finished=torch.tensor(rollout.finished, device=device), max_tokens=max_tokens, samples=samples, kept=kept, **tensors,
    )  # fmt: skip


def sample_table(run: Run, step: int, setup: Setup) -> dict[str, float]:
    """Samples to held-out prompts with the rewards that are trained against and the exact KL (see `train.held_out`)."""
    return held_out.sample_table(
        run,
        step,
        setup.policy,
        setup.tokenizer,
        setup.eval_prompts,
        setup.decoding,
        score=setup.reward,
        reference=setup.reference,
    )
