"""Roles and the trunk: a cached activation changes nothing, and is used only where it belongs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from punster.data.batch import Batch, Example, collate
from punster.errors import UserError
from punster.model.heads import ScalarHead
from punster.model.load import load_model
from punster.model.lora import Adapter
from punster.model.product import can_reorder
from punster.model.role import Role, Trunk, score_examples
from punster.model.saved import load_role, save_role
from punster.model.tokenizer import Tokenizer
from punster.model.transformer import Decoder


def examples(count: int = 6, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 300, (length,), generator=generator).tolist())

    return [Example(ids(3 + 2 * row), ids(1 + (5 * row) % 11)) for row in range(count)]


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture
def model(folder: Path) -> Decoder:
    return load_model(str(folder))


def adapter(model: Decoder, first: int = 2, seed: int = 0, name: str = "policy") -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    made = Adapter.create(name, model.config, rank=4, alpha=8.0, layers=range(first, 4), generator=generator)
    for site in made.b:
        made.b[site] = torch.randn(made.b[site].shape, generator=generator) * 0.2
    return made


def role_on(model: Decoder, *adapters: Adapter, **options: object) -> Role:
    head = ScalarHead.create(model.config.d_model, torch.Generator().manual_seed(5))
    return Role(model, adapters, head, **options)


def real(batch: Batch, hidden: Tensor) -> Tensor:
    return hidden[torch.arange(batch.ids.shape[1])[None] < batch.lengths[:, None]]


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Equal to 1e-6 of the size of the whole; single elements may differ more, as sums are ordered otherwise."""
    assert (found - expected).norm() <= tolerance * expected.norm()


def gradients(role: Role, batch: Batch) -> list[Tensor]:
    role.scores_and_spread(batch)[0].square().sum().backward()
    found = [tensor.grad.clone() for tensor in role.parameters()]
    for tensor in role.parameters():
        tensor.grad = None
    return found


def twins() -> list[Example]:
    """Samples of one prompt, a text that is the beginning of another, and an equal pair."""
    prompt = (7, 8, 9, 10)
    endings = [(11, 12, 13), (11, 12, 14, 15, 16), (11, 12), (20, 21, 22), (11, 12, 13)]
    return [Example(prompt, ending) for ending in endings] + [Example((7, 8, 30), (11, 12, 13)), Example((5,), (6,))]


@pytest.mark.parametrize("cached", [False, True])
def test_shared_prefixes_run_once_and_change_nothing(model: Decoder, cached: bool) -> None:
    some = twins()
    role = role_on(model, adapter(model).trainable(), trained=("policy",))
    role.head.trainable()
    together = collate(some)
    assert together.tree.first.numel() == 19 < sum(example.length for example in some)  # 44 tokens, 19 distinct prefixes
    batch = Trunk.compute(model, some, [2]).collate(some, range(len(some))) if cached else together
    assert cached == ((2, model.trunk_key(2)) in batch.trunk)
    found_scores, found = role.scores_and_spread(batch)[0].detach(), gradients(role, batch)
    alone = [collate([example]) for example in some]
    assert_same(found_scores, torch.cat([role.scores_and_spread(one)[0].detach() for one in alone]))
    expected = [sum(parts) for parts in zip(*(gradients(role, one) for one in alone), strict=True)]
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b, 2e-6)


def test_a_trunk_of_longer_texts_serves_their_beginnings(model: Decoder) -> None:
    some = examples()
    longer = [Example(example.prompt, (*example.response, 2)) for example in some]
    cached, plain = Trunk.compute(model, longer, [2]).collate(some, [0, 3, 4]), collate([some[row] for row in (0, 3, 4)])
    role = role_on(model, adapter(model))
    assert_same(real(cached, role.hidden(cached)), real(plain, role.hidden(plain)))


@torch.no_grad()
def test_a_merged_role_scores_the_same_and_leaves_the_base_alone(model: Decoder, tiny_llama: Path) -> None:
    some, role = examples(), role_on(model, adapter(model), adapter(model, 1, 3, "more"), depth=3, normalisation=(2.0, -1.0))
    before = model.fingerprint()
    merged = role.merged()
    assert not merged.adapters and merged.model is not model
    assert score_examples(merged, some) == pytest.approx(score_examples(role, some), abs=2e-6)
    orders = [{matrix._reordered is not None for matrix in one.model._matrices.values()} for one in (merged, role)]
    assert orders == [{can_reorder(torch.float32)}, {False}]
    assert score_examples(replace(role, adapters=()), some) != pytest.approx(score_examples(role, some), abs=1e-3)
    model._fingerprints.clear()
    assert model.fingerprint() == before
    half = load_model(str(tiny_llama), torch.bfloat16)
    for left in (replace(role, others=(role,)), role_on(half, adapter(half)), role_on(model)):
        assert left.merged() is left


@pytest.mark.parametrize("depths", [(2,), (1,), (1, 2, 3)])
def test_cached_trunk_equals_uncached_gradients_included(model: Decoder, depths: tuple[int, ...]) -> None:
    some = examples()
    trunk = Trunk.compute(model, some, depths, max_tokens=40)
    mine = adapter(model).trainable()
    role = role_on(model, mine, trained=("policy",))
    assert role.head is not None
    role.head.trainable()
    rows = [4, 0, 3]
    cached, plain = trunk.collate(some, rows), collate([some[row] for row in rows])
    assert {depth for depth, _ in cached.trunk} == set(depths) and not plain.trunk
    assert_same(real(cached, role.hidden(cached)), real(plain, role.hidden(plain)))
    first, second = gradients(role, cached), gradients(role, plain)
    assert len(first) == 2 * len(mine.a) + 2
    assert sum(float(g.abs().sum()) for g in second) > 1
    for one, two in zip(first, second, strict=True):
        assert_same(one, two, 5e-6)  # rounding grows a little on the way back


@torch.no_grad()
def test_the_cache_is_really_used_where_it_fits(model: Decoder) -> None:
    """Otherwise the test above compares a thing with itself."""
    some = examples()
    batch = Trunk.compute(model, some, [1, 2]).collate(some, [0, 1])
    role = role_on(model, adapter(model))
    before = role.hidden(batch)
    one, two = ((depth, model.trunk_key(depth)) for depth in (1, 2))
    batch.trunk[one] = batch.trunk[one] + 1  # not the deepest that fits: not looked at
    assert torch.equal(role.hidden(batch), before)
    batch.trunk[two] = batch.trunk[two] + torch.randn(32, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(role.hidden(batch), before)
    deeper = role_on(model, adapter(model, first=1))  # its branch begins below depth 2: uses depth 1 only
    changed = deeper.hidden(batch)
    del batch.trunk[two]
    assert torch.equal(deeper.hidden(batch), changed)


@torch.no_grad()
def test_a_trunk_of_another_model_is_not_used(model: Decoder, make_model: object, folder: Path) -> None:
    other = load_model(str(make_model(model.config.family, seed=99)))
    some = examples()
    foreign, plain = Trunk.compute(other, some, [2]).collate(some, [0, 5]), collate([some[0], some[5]])
    role = role_on(model, adapter(model))
    assert torch.equal(role.hidden(foreign), role.hidden(plain))
    half = load_model(str(folder), torch.bfloat16)  # the same weights in another precision are another model
    rounded = Trunk.compute(half, some, [2]).collate(some, [0, 5])
    assert torch.equal(role.hidden(rounded), role.hidden(plain))
    assert not torch.equal(half.embed(plain.ids), model.embed(plain.ids))


def test_full_fine_tuning_shares_the_trunk_below_its_layers(model: Decoder) -> None:
    some = examples()
    trunk = Trunk.compute(model, some, [2, 3])
    copy = model.trainable_copy(2)
    role = role_on(copy)
    assert role.first_layer == 2
    with torch.no_grad():
        for tensor in role.parameters():
            tensor += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    cached, plain = trunk.collate(some, [1, 2]), collate([some[1], some[2]])
    with torch.no_grad():
        assert_same(real(cached, role.hidden(cached)), real(plain, role.hidden(plain)))
        assert not torch.allclose(role.hidden(plain), role_on(model).hidden(plain), atol=1e-2)
        everything = role_on(model.trainable_copy(0))
        assert everything.first_layer == 0
        for key in cached.trunk:
            cached.trunk[key] = cached.trunk[key] * 0
        assert_same(everything.hidden(cached), role_on(model).hidden(plain))


def test_frozen_adapters_are_part_of_the_trunk(model: Decoder) -> None:
    """A policy on an SFT adapter starts at its own lowest layer; roles without that SFT adapter never touch these states."""
    some = examples()
    below, mine = adapter(model, 1, name="sft"), adapter(model, 3).trainable()
    policy = role_on(model, below, mine, trained=("policy",))
    assert (policy.first_layer, policy.frozen_depth) == (1, 3)
    cached, plain = Trunk.compute(policy, some, [policy.frozen_depth], 4096).collate(some, [0, 3]), collate([some[0], some[3]])
    assert [depth for depth, _ in cached.trunk] == [3]
    for a, b in zip(gradients(policy, cached), gradients(policy, plain), strict=True):
        assert_same(a, b, 5e-6)
    with torch.no_grad():
        reference, other = role_on(model, below), role_on(model, adapter(model, 2))
        cached.trunk = {key: states + 1 for key, states in cached.trunk.items()}
        assert not torch.allclose(reference.hidden(cached), reference.hidden(plain))  # it shares them ...
        assert torch.equal(other.hidden(cached), other.hidden(plain))  # ... and it does not
        next(below.parameters()).mul_(2)  # the adapter is another one now
        assert torch.equal(reference.hidden(cached), reference.hidden(plain))
        known = below.fingerprint()
        site = next(iter(below.a))
        below.a[site] = below.a[site] + 1  # another tensor, as fresh as the one it takes the place of
        assert below.fingerprint() != known


def test_full_fine_tuning_holds_frozen_matrices_and_head_once(model: Decoder) -> None:
    copy = model.trainable_copy(2)
    sites = tuple(site for site, _ in model.projection(0, "attend"))
    assert copy.matrix(sites) is model.matrix(sites)
    tied = model.trainable_copy(0)
    assert copy.head is model.head and tied.head is not model.head


def test_first_layer_is_the_lowest_difference(model: Decoder) -> None:
    low, high = adapter(model, 1), adapter(model, 3)
    assert [role_on(model, *stack).first_layer for stack in ((), (high,), (low,), (high, low))] == [4, 3, 1, 1]
    assert role_on(model, depth=2).first_layer == role_on(model, depth=2).last_layer == 2
    assert role_on(model.trainable_copy(2), high).first_layer == 2


@torch.no_grad()
def test_a_trunk_of_the_whole_depth_serves_a_plain_reference(model: Decoder) -> None:
    some = examples()
    batch = Trunk.compute(model, some, [4]).collate(some, [2, 3])
    plain = collate([some[2], some[3]])
    reference = role_on(model)
    assert_same(real(batch, reference.hidden(batch)), real(plain, reference.hidden(plain)))


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_scores_do_not_depend_on_padding_or_neighbours(model: Decoder, pooling: str) -> None:
    some = examples()
    role = role_on(model, adapter(model), pooling=pooling, normalisation=(2.0, -1.0))
    assert role.head is not None
    together = role.scores_and_spread(collate(some, pad_id=7))[0]
    for row, example in enumerate(some):
        values = role.head(role.hidden(collate([example])))[0]
        by_hand = values[-1] if pooling == "last" else values[len(example.prompt) :].mean()
        torch.testing.assert_close(together[row], 2 * by_hand - 1, atol=1e-5, rtol=0)
    assert score_examples(role, some, max_tokens=20) == pytest.approx(together.tolist(), abs=1e-5)
    trunk = Trunk.compute(model, some, [2])
    assert score_examples(role, some, trunk, max_tokens=20) == pytest.approx(together.tolist(), abs=1e-5)


@torch.no_grad()
def test_values_are_those_of_the_states_before_each_token(model: Decoder) -> None:
    batch = collate([Example((5, 6, 7), (8, 9)), Example((5,), (6, 7, 8))])
    role = role_on(model)
    assert role.head is not None
    values, per_token = role.values(batch), role.head(role.hidden(batch))
    assert values[0, 2] == 0
    assert_same(values[0, :2], per_token[0, 2:4])
    assert_same(values[1], per_token[1, 0:3])


def test_named_parameters_are_what_is_trained(model: Decoder) -> None:
    sft, policy = adapter(model, 3, name="sft"), adapter(model, 2)
    role = role_on(model, sft, policy, trained=("policy",))
    names = [name for name, _ in role.named_parameters()]
    assert len(names) == 2 * len(policy.a) and all(name.startswith("policy:") for name in names)
    assert role.head is not None
    role.head.trainable()
    assert [name for name, _ in role.named_parameters()][-2:] == ["head.weight", "head.bias"]
    copy = Role(model.trainable_copy(3))
    assert {name.partition(":")[0] for name, _ in copy.named_parameters()} == {"base"}
    assert not list(Role(model, (sft,)).named_parameters())


def test_scalar_head() -> None:
    head = ScalarHead.create(4000, torch.Generator().manual_seed(0))
    assert head.weight.std() == pytest.approx(1 / math.sqrt(4001), rel=0.05) and head.bias == 0
    assert torch.equal(head.weight, ScalarHead.create(4000, torch.Generator().manual_seed(0)).weight)
    x = torch.randn(2, 3, 4000, generator=torch.Generator().manual_seed(1), dtype=torch.float32).bfloat16()
    assert head(x).dtype == torch.float32 and head(x).shape == (2, 3)
    torch.testing.assert_close(head.scaled(3.0, 0.5)(x), 3 * head(x) + 0.5)


# ---- on disk --------------------------------------------------------------------------------------------------
def test_saved_role_comes_back(model: Decoder, folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(folder), "Q: {prompt}\n")
    role = role_on(model, adapter(model, 3, 1, "sft"), adapter(model), depth=0, pooling="mean", normalisation=(1.5, 0.25))
    save_role(tmp_path / "role", role, tokenizer, {"kind": "reward"})
    loaded, its_tokenizer = load_role(tmp_path / "role")
    batch = collate(examples())
    with torch.no_grad():
        torch.testing.assert_close(loaded.scores_and_spread(batch)[0], role.scores_and_spread(batch)[0], atol=1e-6, rtol=0)
    assert its_tokenizer.prompt_format == "Q: {prompt}\n"
    assert [a.name for a in loaded.adapters] == ["sft", "policy"] and not loaded.parameters()
    shared, same = load_role(tmp_path / "role", base=model, tokenizer=its_tokenizer)
    assert shared.model is model and same is its_tokenizer


@pytest.mark.parametrize("first", [0, 2])
def test_saved_full_fine_tuning_comes_back(model: Decoder, folder: Path, tmp_path: Path, first: int) -> None:
    copy = model.trainable_copy(first)
    with torch.no_grad():
        for tensor in copy.weights.values():
            if tensor.requires_grad:
                tensor += 0.01
    tokenizer = Tokenizer.load(str(folder))
    (tmp_path / "two").mkdir()
    save_role(tmp_path / "two", Role(copy, others=(Role(copy),)), tokenizer)
    assert load_role(tmp_path / "two")[0].others[0].model.trained_from == first  # its base is the plain one, too
    save_role(tmp_path, Role(copy), tokenizer)
    loaded, _ = load_role(tmp_path, base=model)
    assert loaded.model.trained_from == first and loaded.first_layer == first
    assert all(torch.equal(tensor, loaded.model.weights[key]) for key, tensor in copy.weights.items())
    if first:  # and still shares the plain base's trunk
        assert loaded.model.trunk_key(first) == model.trunk_key(first)


def test_damaged_and_foreign_roles(model: Decoder, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"role\.json cannot be read as JSON"):
        load_role(tmp_path)
    save_role(tmp_path, role_on(model), Tokenizer.load(str(folder)))
    text = (tmp_path / "role.json").read_text()
    (tmp_path / "role.json").write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(UserError, match="another version of punster"):
        load_role(tmp_path)
    for damaged, words in ((text[:40], "cannot be read as JSON"), ("[1]", "expected a JSON object")):
        (tmp_path / "role.json").write_text(damaged)
        with pytest.raises(UserError, match=rf"role\.json:? {words}"):
            load_role(tmp_path)


def test_a_role_is_refused_on_other_weights_of_the_same_name(
    model: Decoder, folder: Path, tmp_path: Path, make_model: object
) -> None:
    save_role(tmp_path, role_on(model, adapter(model)), Tokenizer.load(str(folder)))
    other = load_model(str(make_model(model.config.family, seed=99)))
    other.name = model.name  # the folder was filled with another model since
    with pytest.raises(UserError, match="base"):
        load_role(tmp_path, base=other)


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_other_weights_are_refused_across_types(
    types: tuple[torch.dtype, torch.dtype], tiny_llama: Path, tmp_path: Path, make_model: object
) -> None:
    """Trained in bf16 and exported in fp32, as it is done by default; and the other way round."""
    then, now = types
    trained = load_model(str(tiny_llama), then)
    save_role(tmp_path, role_on(trained, adapter(trained)), Tokenizer.load(str(tiny_llama)))
    assert load_role(tmp_path, dtype=now)[0].model.dtype == now
    other = load_model(str(make_model("llama", seed=99)), now)
    other.name = trained.name
    with pytest.raises(UserError, match="other base weights"):
        load_role(tmp_path, base=other)
