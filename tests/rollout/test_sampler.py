"""The sampler against the training path, against transformers, and against the distribution it claims to draw from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from punster.data.batch import Example, collate
from punster.errors import UserError
from punster.model.kernels import compiled
from punster.model.load import load_model
from punster.model.lora import Adapter
from punster.model.role import Role, Trunk
from punster.rollout import sampler
from punster.rollout.decode import Stepper
from punster.rollout.logprobs import token_log_probs
from punster.rollout.sampler import Decoding, Rollout, _generate, choose, generate, inverse_cdf, truncate

EOS = 3
PROMPTS = [[5, 6, 7], [8], [1, 2, 4, 5, 9, 10, 11, 0], [3, 3], [7, 7, 7, 2, 1], [10, 0, 1, 6]]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Path:
    """A vocabulary of 12, so that EOS comes early and often."""
    return make_model(request.param, vocab_size=12, pad_token_id=None, eos_token_id=EOS, bos_token_id=0)


@pytest.fixture(scope="module")
def role(folder: Path) -> Role:
    return Role(load_model(str(folder)))


@pytest.fixture(scope="module")
def adapted(role: Role) -> Role:
    """Two stacked adapters that matter: sampling joins them, training does not."""
    adapters = []
    for number, layers in enumerate((range(4), range(2, 4))):
        adapter = Adapter.create(str(number), role.model.config, rank=3, alpha=5, layers=layers, generator=seeded(number))
        for site in adapter.b:
            adapter.b[site] = torch.randn(adapter.b[site].shape, generator=seeded(9)) * 0.2
        adapters.append(adapter)
    return Role(role.model, tuple(adapters))


def training_log_probs(role: Role, rollout: Rollout, temperature: float) -> list[Tensor]:
    batch = collate(rollout.examples)
    with torch.no_grad():
        flat = token_log_probs(role.response_hidden(batch), role.model.head, batch.targets(), temperature)
    return list(flat.split([len(example.response) for example in rollout.examples]))


def ids_of(rollout: Rollout) -> list[tuple[int, ...]]:
    return [example.response for example in rollout.examples]


# ---- one distribution ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_adapters", [False, True])
def test_sampler_log_probs_equal_training_log_probs(role: Role, adapted: Role, with_adapters: bool, temperature: float) -> None:
    chosen = adapted if with_adapters else role
    rollout = generate(chosen, PROMPTS, Decoding(12, temperature), EOS, seeded(1), samples=3)
    assert len({len(ids) for ids in ids_of(rollout)}) > 3, "rows should leave the batch at different steps"
    for own, trained in zip(rollout.log_probs, training_log_probs(chosen, rollout, temperature), strict=True):
        torch.testing.assert_close(own, trained, rtol=0, atol=1e-4)


def test_adapters_are_in_effect(role: Role, adapted: Role) -> None:
    plain, changed = (generate(r, PROMPTS, Decoding(12), EOS, seeded(1)) for r in (role, adapted))
    assert ids_of(plain) != ids_of(changed)


def test_many_samples_follow_the_softmax(role: Role) -> None:
    """Chi-square of 4000 first tokens of one prompt, prefilled once, against the model's own distribution."""
    prompt, count = PROMPTS[0], 4000
    rollout = generate(role, [prompt], Decoding(1), EOS, seeded(4), samples=count, max_rows=count)
    with torch.no_grad():
        probs = role.model.forward(torch.tensor([prompt]))[0, -1].double().softmax(-1)
    counts = torch.bincount(torch.tensor([ids[0] for ids in ids_of(rollout)]), minlength=12).double()
    assert chi_square(counts, probs * count) < threshold(11)


# ---- greedy -------------------------------------------------------------------------------------------------------
def test_greedy_is_the_argmax_of_the_full_forward(role: Role) -> None:
    rollout = generate(role, PROMPTS, Decoding(10, temperature=0), EOS, seeded(1))
    for example, log_probs in zip(rollout.examples, rollout.log_probs, strict=True):
        with torch.no_grad():
            logits = role.model.forward(torch.tensor([example.prompt + example.response]))[0, len(example.prompt) - 1 : -1]
        assert tuple(logits.argmax(-1).tolist()) == example.response
        torch.testing.assert_close(log_probs, logits.log_softmax(-1).amax(-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_transformers_generate(folder: Path, role: Role, penalty: float) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rollout = generate(role, PROMPTS, Decoding(10, temperature=0, repetition_penalty=penalty), EOS, seeded(1))
    for prompt, ours in zip(PROMPTS, ids_of(rollout), strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, eos_token_id=EOS, pad_token_id=0,
            repetition_penalty=penalty,
        )  # fmt: skip
        assert tuple(out[0, len(prompt) :].tolist()) == ours


def test_greedy_does_not_depend_on_the_seed(role: Role) -> None:
    greedy = Decoding(8, temperature=0)
    assert ids_of(generate(role, PROMPTS, greedy, EOS, seeded(1))) == ids_of(generate(role, PROMPTS, greedy, EOS, seeded(2)))


# ---- rows ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("max_rows", [1, 4, 7])
def test_a_row_does_not_depend_on_how_the_batch_is_cut(adapted: Role, max_rows: int) -> None:
    whole = generate(adapted, PROMPTS, Decoding(12), EOS, seeded(5), samples=2, max_rows=128)
    cut = generate(adapted, PROMPTS, Decoding(12), EOS, seeded(5), samples=2, max_rows=max_rows)
    assert ids_of(whole) == ids_of(cut)
    for a, b in zip(whole.log_probs, cut.log_probs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_row_depends_on_its_own_uniforms_only(role: Role) -> None:
    """Each row alone, all rows, and all rows the other way round: the same ids (finished rows leave in between)."""
    uniforms = torch.rand(len(PROMPTS), 12, generator=seeded(6))
    stepper = Stepper(role.model, role.adapters, role.last_layer)
    together = _generate(role, stepper, PROMPTS, 1, Decoding(12), EOS, uniforms)
    lengths = [len(ids) for ids, _, _ in together]
    assert min(lengths) <= 6 and max(lengths) >= 10
    backward = _generate(role, stepper, PROMPTS[::-1], 1, Decoding(12), EOS, uniforms.flip(0))[::-1]
    alone = [_generate(role, stepper, [prompt], 1, Decoding(12), EOS, uniforms[i : i + 1])[0] for i, prompt in enumerate(PROMPTS)]
    changed = uniforms.clone()
    changed[1:] = torch.rand(len(PROMPTS) - 1, 12, generator=seeded(7))
    for i, (ids, logs, _) in enumerate(together):
        assert backward[i][0] == ids and alone[i][0] == ids
        torch.testing.assert_close(alone[i][1], logs, rtol=0, atol=1e-5)
    assert _generate(role, stepper, PROMPTS, 1, Decoding(12), EOS, changed)[0][0] == together[0][0]


def test_samples_of_one_prompt_equal_separate_rows(role: Role) -> None:
    """Prefilling once and branching is the same as giving the prompt several times, uniform for uniform."""
    branched = generate(role, PROMPTS[:3], Decoding(10), EOS, seeded(8), samples=4)
    separate = generate(role, [p for p in PROMPTS[:3] for _ in range(4)], Decoding(10), EOS, seeded(8))
    assert ids_of(branched) == ids_of(separate)
    assert [example.prompt for example in branched.examples] == [tuple(p) for p in PROMPTS[:3] for _ in range(4)]
    assert len(set(ids_of(branched)[:4])) > 1, "the samples of a prompt must differ"


def test_nothing_follows_eos_and_eos_is_included(role: Role) -> None:
    rollout = generate(role, PROMPTS, Decoding(9), EOS, seeded(9), samples=20)
    ended = 0
    for ids, logs, finished in zip(ids_of(rollout), rollout.log_probs, rollout.finished, strict=True):
        assert 1 <= len(ids) <= 9 and len(logs) == len(ids)
        assert EOS not in ids[:-1]
        assert finished == (ids[-1] == EOS)
        assert finished or len(ids) == 9
        ended += finished
    assert 10 < ended < len(rollout.examples), "the test needs both kinds of ending"


def test_the_same_seed_gives_the_same_samples_and_another_does_not(role: Role) -> None:
    first, again, other = (generate(role, PROMPTS, Decoding(8), EOS, seeded(s)) for s in (1, 1, 2))
    assert ids_of(first) == ids_of(again)
    assert all(torch.equal(a, b) for a, b in zip(first.log_probs, again.log_probs, strict=True))
    assert ids_of(first) != ids_of(other)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cap_on_rows_holds_within_one_prompt(adapted: Role, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    plain = sampler.prefill
    monkeypatch.setattr(sampler, "choose", lambda logits, *rest: rows.append(len(logits)) or choose(logits, *rest))
    monkeypatch.setattr(sampler, "prefill", lambda *rest: rows.append(len(rest[1])) or plain(*rest))
    decoding = Decoding(12, temperature)
    whole = generate(adapted, PROMPTS, decoding, EOS, seeded(5), samples=11, max_rows=128, keep=(1,))
    assert max(rows) == 66
    rows.clear()
    cut = generate(adapted, PROMPTS, decoding, EOS, seeded(5), samples=11, max_rows=4, keep=(1,))
    assert max(rows) == 4
    assert cut.examples == whole.examples and cut.finished == whole.finished
    for a, b in zip(whole.log_probs, cut.log_probs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert whole.trunk is not None and cut.trunk is not None
    for key, states in whole.trunk.rows.items():
        for a, b in zip(states, cut.trunk.rows[key], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.skipif(compiled() is None, reason="no AVX2 (or AMX), or no C compiler: nothing is recorded by plain PyTorch")
def test_only_a_rollout_in_one_piece_is_recorded(make_model: Callable[..., Path]) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    model = load_model(str(make_model("llama", **wide)), torch.bfloat16)
    mine = Adapter.create("policy", model.config, rank=4, alpha=8.0, layers=range(2, 4), generator=seeded(1)).trainable()
    policy = Role(model, (mine,), trained=("policy",))
    for prompts, samples, max_rows, recorded in (
        (PROMPTS[:1], 8, 8, True), (PROMPTS[:1], 8, 7, False), (PROMPTS[:2], 4, 8, True), (PROMPTS[:2], 4, 7, False),
    ):  # fmt: skip
        rollout = generate(policy, prompts, Decoding(4), EOS, seeded(1), samples, max_rows, record=True)
        assert (rollout.record is not None) == recorded


def test_uniforms_lie_below_1(role: Role, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is nearest to 1 in fp64 would round to it; nothing else is changed."""
    drawn: list[Tensor] = []
    values = torch.tensor([[0.0, 0.5, 1 - 2**-24, 1 - 2**-53]], dtype=torch.float64)
    monkeypatch.setattr(
        sampler, "choose", lambda logits, how, uniform, seen: drawn.append(uniform) or choose(logits, how, uniform)
    )
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: values.clone())
    generate(role, PROMPTS[:1], Decoding(4), -1, seeded(1))
    assert torch.cat(drawn).tolist() == [0.0, 0.5, 1 - 2**-24, 1 - 2**-24]


# ---- errors -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prompts", [[[5], [6], [7]], [[5, 6], [7], [5, 6, 8]], [[5, 6]] * 3])
def test_shared_prompts_are_prefilled_once_and_right(role: Role, prompts: list[list[int]]) -> None:
    rollout = generate(role, prompts, Decoding(3, temperature=0), -1, torch.Generator().manual_seed(0))
    for prompt, example in zip(prompts, rollout.examples, strict=True):
        ids = list(prompt)
        for token in example.response:
            assert token == int(role.model.forward(torch.tensor([ids]), role.adapters)[0, -1].argmax())
            ids.append(token)


def test_closed_examples_all_end_with_eos_within_the_context() -> None:
    some = [Example((5, 6), (7, 2)), Example((5, 6), (7, 8)), Example((5, 6, 7), (8, 9))]
    rollout = Rollout(some, [], [True, False, False], eos_id=2, max_positions=5)
    assert [example.response for example in rollout.closed] == [(7, 2), (7, 8, 2), (8, 2)]
    assert [example.prompt for example in rollout.closed] == [example.prompt for example in some]


def test_a_prompt_that_leaves_no_room_is_refused(role: Role) -> None:
    assert role.model.config.max_positions == 128
    generate(role, [[1] * 124], Decoding(4), EOS, seeded(1))  # fits exactly
    with pytest.raises(UserError, match="125 tokens leaves no room for 4 new ones: the context is 128"):
        generate(role, [[1], [1] * 125], Decoding(4), EOS, seeded(1))


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_bad_decoding_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad)).replace("_", "-")):
        Decoding(**bad)


# ---- inverse CDF --------------------------------------------------------------------------------------------------
def chi_square(observed: Tensor, expected: Tensor) -> float:
    kept = expected > 0
    assert (observed[~kept] == 0).all(), "a token of probability 0 was drawn"
    return float(((observed - expected)[kept].square() / expected[kept]).sum())


def threshold(degrees: int) -> float:
    """Mean plus five standard deviations of chi-square; the seeds are fixed, so this never fails by chance."""
    return degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("size", [7, 256, 700])
def test_inverse_cdf_follows_the_probabilities(size: int) -> None:
    draws = 120_000
    probs = (torch.randn(size, generator=seeded(10)) * 1.2).softmax(-1)
    probs[torch.randperm(size, generator=seeded(11))[: size // 3]] = 0
    probs = probs / probs.sum()
    picked = []
    for part in torch.rand(draws, generator=seeded(12)).split(20_000):
        picked.append(inverse_cdf(probs.expand(len(part), -1), part))
    counts = torch.bincount(torch.cat(picked), minlength=size).double()
    assert chi_square(counts, probs.double() * draws) < threshold(int((probs > 0).sum()) - 1)


def test_inverse_cdf_is_the_smallest_index_beyond_u() -> None:
    """Against a search in the plain cumulative sum, in fp64, several rows with different distributions."""
    probs = torch.rand(40, 600, generator=seeded(13), dtype=torch.float64)
    probs = probs * (torch.rand(probs.shape, generator=seeded(14)) < 0.4)
    probs = probs / probs.sum(-1, keepdim=True)
    uniform = torch.rand(40, generator=seeded(15), dtype=torch.float64)
    expected = torch.searchsorted(probs.cumsum(-1), uniform[:, None], right=True)[:, 0]
    assert torch.equal(inverse_cdf(probs, uniform), expected)


@pytest.mark.parametrize("u", [0.0, 1e-45, 0.25, 0.5, 0.75, 1 - 2**-24, 1.0])
def test_a_token_of_probability_zero_is_never_drawn(u: float) -> None:
    """Zeros in front, at the end, on block boundaries, whole blocks of them; u = 1 is what rounding to fp32 can give."""
    rows = []
    for places in ([0], [5], [255], [256], [511], [767], [3, 300], [255, 256], [0, 767], [10, 20, 30, 600]):
        row = torch.zeros(768)
        row[torch.tensor(places)] = 1 / len(places)
        rows.append(row)
    for seed in range(20):
        row = (torch.randn(768, generator=seeded(seed)) * 6).softmax(-1)
        rows.append(row * (torch.rand(768, generator=seeded(seed + 100)) < 0.05))
    probs = torch.stack(rows)
    probs = probs / probs.sum(-1, keepdim=True)
    picked = inverse_cdf(probs, torch.full((len(rows),), u))
    assert (probs.gather(1, picked[:, None]) > 0).all()
    if u == 0.0:
        assert torch.equal(picked, (probs > 0).int().argmax(1))
    if u == 1.0:
        assert torch.equal(picked, 767 - (probs > 0).flip(1).int().argmax(1))


def test_rounding_at_a_block_border_never_draws_a_zero() -> None:
    """u on the border of two blocks of 256, the second beginning with zeros: edge - sum may round to above u there."""
    probs = torch.rand(4000, 512, generator=seeded(19)).square()
    probs[:, 256:300] = 0
    probs = probs / probs.sum(-1, keepdim=True)
    edges = probs.view(-1, 2, 256).sum(-1).cumsum(-1)
    border = edges[:, 0] / edges[:, 1]
    for u in (border, border.nextafter(torch.ones(())), border.nextafter(torch.zeros(()))):
        picked = inverse_cdf(probs, u)
        assert (probs.gather(1, picked[:, None]) > 0).all()


# ---- truncation ---------------------------------------------------------------------------------------------------
LOGITS = torch.randn(50, 200, generator=torch.Generator().manual_seed(16)) * 3


def warped(logits: Tensor, decoding: Decoding) -> Tensor:
    """What transformers' logits warpers leave, in its order."""
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    scores = logits
    if decoding.top_k:
        scores = TopKLogitsWarper(decoding.top_k)(ids, scores)
    if decoding.top_p < 1:
        scores = TopPLogitsWarper(decoding.top_p)(ids, scores)
    if decoding.min_p:
        scores = MinPLogitsWarper(decoding.min_p)(ids, scores)
    return scores


@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"top_k": 20}, {"top_k": 500}, {"top_p": 0.1}, {"top_p": 0.9}, {"top_p": 1e-6}, {"min_p": 0.05}, {"min_p": 1.0},
     {"top_k": 30, "top_p": 0.8}, {"top_k": 60, "top_p": 0.95, "min_p": 0.1}],
)  # fmt: skip
def test_kept_tokens_equal_transformers_warpers(options: dict[str, Any]) -> None:
    decoding = Decoding(**options)
    ours = truncate(LOGITS, decoding)
    assert torch.equal(ours, warped(LOGITS, decoding))
    assert torch.isfinite(ours).any(-1).all()


def test_only_kept_tokens_are_drawn_with_the_renormalised_log_prob() -> None:
    decoding = Decoding(temperature=0.8, top_k=12, top_p=0.7)
    kept = warped(LOGITS / 0.8, decoding)
    for seed in range(10):
        token, log_prob = choose(LOGITS, decoding, torch.rand(50, generator=seeded(seed)))
        expected = kept.log_softmax(-1).gather(1, token[:, None])[:, 0]
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-5)


def test_repetition_penalty_equals_transformers() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    ids = torch.randint(200, (50, 30), generator=seeded(17))
    seen = torch.zeros(50, 200, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, LOGITS)
    uniform = torch.rand(50, generator=seeded(18))
    token, log_prob = choose(LOGITS, Decoding(repetition_penalty=1.7), uniform, seen)
    plain_token, plain_log_prob = choose(expected, Decoding(), uniform)
    assert torch.equal(token, plain_token)
    torch.testing.assert_close(log_prob, plain_log_prob, rtol=0, atol=1e-6)
    greedy, _ = choose(LOGITS, Decoding(temperature=0, repetition_penalty=1.7), uniform, seen)
    assert torch.equal(greedy, expected.argmax(-1))


def test_truncated_says_whether_the_distribution_is_the_models_own() -> None:
    assert not Decoding(temperature=0.5).truncated
    for options in ({"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.2}):
        assert Decoding(**options).truncated


def kept(role: Role, new: int = 12, depths: tuple[int, ...] = (1, 2, 3)) -> Rollout:
    return generate(role, PROMPTS, Decoding(new), EOS, seeded(3), 2, max_rows=4, keep=depths)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_states_collected_while_sampling_equal_a_pass_over_the_texts(role: Role, adapted: Role, with_adapters: bool) -> None:
    """Of every closed text: ended ones in all lengths, and cut-off ones with the EOS that closes them."""
    used = adapted if with_adapters else role
    rollout = kept(used)
    plain = generate(used, PROMPTS, Decoding(12), EOS, seeded(3), 2, max_rows=4)
    assert rollout.examples == plain.examples and plain.trunk is None
    assert 0 < sum(rollout.finished) < len(rollout.finished)
    assert rollout.trunk is not None
    expected = Trunk.compute(used, rollout.closed, (1, 2, 3))
    assert expected.rows and set(rollout.trunk.rows) == set(expected.rows)
    for key, rows in expected.rows.items():
        for found, state in zip(rollout.trunk.rows[key], rows, strict=True):
            torch.testing.assert_close(found, state, atol=1e-4, rtol=0)


def test_no_states_are_kept_where_the_closing_eos_has_no_room(tiny_gpt2: Path) -> None:
    model = load_model(str(tiny_gpt2))
    prompt = [list(range(3, 3 + 116))]
    assert kept(Role(model), 3).trunk is not None
    assert generate(Role(model), prompt, Decoding(12), -1, seeded(3), keep=(1,)).trunk is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_over_collected_states_equal_those_over_computed_ones(tiny_llama: Path, dtype: torch.dtype) -> None:
    """1e-4 in fp32; in bf16, where products of other shapes round otherwise, a cosine of at least .999."""
    model = load_model(str(tiny_llama), dtype)
    mine = Adapter.create("policy", model.config, rank=4, alpha=8.0, layers=range(2, 4), generator=seeded(1))
    for site in mine.b:
        mine.b[site] = torch.randn(mine.b[site].shape, generator=seeded(2)) * 0.1
    policy = Role(model, (mine.trainable(),), trained=("policy",))
    rollout = generate(policy, PROMPTS, Decoding(12), EOS, seeded(3), 2, keep=(2,))
    found = []
    for trunk in (rollout.trunk, Trunk({})):
        assert trunk is not None
        batch = trunk.collate(rollout.examples, range(len(rollout.examples)))
        assert bool(batch.trunk) == bool(trunk.rows)
        token_log_probs(policy.response_hidden(batch), model.head, batch.targets()).sum().backward()
        found.append(torch.cat([tensor.grad.flatten() for tensor in policy.parameters()]))
        for tensor in policy.parameters():
            tensor.grad = None
    if dtype == torch.float32:
        torch.testing.assert_close(found[0], found[1], atol=1e-4 * float(found[1].abs().max()), rtol=0)
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.999
