"""The first update from what sampling recorded, against the same update with a forward pass of its own: bf16, on the C kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from punster.config import GrpoConfig, PpoConfig, SftConfig
from punster.model import kernels
from punster.model.recording import Recording
from punster.model.role import Role
from punster.train import grpo, ppo
from punster.train.experience import Experience, collect, open_policy
from punster.train.optim import seeded
from punster.train.sft import sft
from tests.conftest import MakeModel

pytestmark = pytest.mark.skipif(
    kernels.compiled() is None,
    reason="no AVX2 (or AMX), or no C compiler: nothing is recorded by plain PyTorch",
)
PROMPTS = ["pun: sea 1", "pun: sea 2", "pun: bread", "pun: sea 1"]


@pytest.fixture(scope="module")
def bf16(
    make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory, options: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    model = make_model("llama", hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    return {**options(model=str(model), out=str(tmp_path_factory.mktemp("runs"))), "dtype": "bf16"}


@pytest.fixture(scope="module")
def start(bf16: dict[str, Any]) -> Path:
    run = sft(SftConfig(name="sft", **bf16, top_layers="2", steps=3, batch_size=8, lr=0.05))
    assert run is not None
    return run


def gradients(*roles: Role) -> torch.Tensor:
    found = []
    for role in roles:
        for parameter in role.parameters():
            assert parameter.grad is not None
            found.append(parameter.grad.flatten())
            parameter.grad = None
    return torch.cat(found)


def louder(*roles: Role) -> None:
    """B is zero at the start, which leaves half of the gradients zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for role in roles:
            for parameter in role.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def compare(step: Callable[[], dict[str, float]], exp: Experience, *roles: Role) -> None:
    assert exp.kept is not None and exp.kept.known is not None
    recorded, own = step(), gradients(*roles)
    fresh, again = step(), gradients(*roles)  # what was kept serves only once
    assert recorded["ratio_gap"] == fresh["ratio_gap"] == 0.0
    assert float(again.norm()) > 1e-3
    assert float(torch.cosine_similarity(own, again, 0)) > 0.9999
    torch.testing.assert_close(own, again, rtol=0.03, atol=3e-3 * float(again.abs().max()))


@pytest.fixture
def trees(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a recording is used."""
    used: list[int] = []
    tree = Recording.tree
    monkeypatch.setattr(Recording, "tree", lambda self, order: (used.append(len(order)), tree(self, order))[1])
    return used


@pytest.mark.parametrize("new_tokens", [1, 7])
@pytest.mark.parametrize("layers", ["1", "2", "all"])  # above, with and below the layers of the SFT run
def test_grpo(layers: str, new_tokens: int, bf16: dict[str, Any], start: Path, trees: list[int]) -> None:
    config = GrpoConfig(
        name="x", **bf16, actor=str(start), top_layers=layers, batch_size=12, samples=3, max_new_tokens=new_tokens
    )
    setup = open_policy(config, PROMPTS, lambda prompts, completions: [float(len(text)) for text in completions])
    louder(setup.policy)
    exp = collect(setup, [0, 1, 2, 3], seeded(1, "sampling"), seeded(1, "minibatches"), samples=3, with_graph=True)
    assert trees == [12] and torch.equal(exp.sampler_log_prob, exp.log_prob)
    advantages = torch.randn(exp.mask.shape, generator=torch.Generator().manual_seed(2)) * exp.mask
    compare(lambda: grpo.train_step(config, exp, exp.groups[0], setup.policy, advantages), exp, setup.policy)


@pytest.mark.parametrize("critic", ["separate", "joined"])
def test_ppo(critic: Any, bf16: dict[str, Any], start: Path, trees: list[int]) -> None:
    config = PpoConfig(name="x", **bf16, actor=str(start), top_layers="all", batch_size=4, max_new_tokens=7, critic=critic)
    setup = open_policy(config, PROMPTS, lambda prompts, completions: [float(len(text)) for text in completions])
    role = ppo.make_critic(config, setup)
    roles = (setup.policy, role)
    louder(*roles)
    exp = collect(setup, [0, 1, 2, 3], seeded(1, "sampling"), seeded(1, "minibatches"), critic=role, with_graph=True)
    assert trees == [4]
    advantages, returns = torch.randn(2, *exp.mask.shape, generator=torch.Generator().manual_seed(2)) * exp.mask
    compare(lambda: ppo.train_step(config, exp, exp.groups[0], *roles, advantages, returns, True), exp, *roles)


def test_a_rollout_that_might_not_fit_into_one_micro_batch_is_not_recorded(
    bf16: dict[str, Any], start: Path, trees: list[int]
) -> None:
    config = GrpoConfig(
        name="x", **bf16, actor=str(start), top_layers="all", batch_size=4, samples=2, max_new_tokens=7, max_tokens=64
    )
    setup = open_policy(config, PROMPTS, lambda prompts, completions: [1.0] * len(completions))
    exp = collect(setup, [0, 1, 2, 3], seeded(1, "sampling"), seeded(1, "minibatches"), samples=2, with_graph=True)
    assert not trees and len(exp.groups[0]) > 1 and exp.kept is None


def test_misplaced_records_stop_the_run(bf16: dict[str, Any], start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GrpoConfig(name="x", **bf16, actor=str(start), top_layers="all", batch_size=8, samples=2, max_new_tokens=7)
    setup = open_policy(config, PROMPTS, lambda prompts, completions: [1.0] * len(completions))
    tree = Recording.tree
    monkeypatch.setattr(Recording, "tree", lambda self, order: tree(self, list(order)[::-1]))
    with pytest.raises(RuntimeError, match="what was sampled and what is trained on"):
        collect(setup, [0, 1, 2, 3], seeded(1, "sampling"), seeded(1, "minibatches"), samples=2, with_graph=True)
