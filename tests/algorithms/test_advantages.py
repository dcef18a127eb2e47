"""Advantages against brute force and hand values, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from punster.algorithms.advantages import (
    RunningScale,
    gae,
    group_advantages,
    masked_mean,
    masked_whiten,
    reinforce_pp_advantages,
    shaped_rewards,
)


def ragged(rows: int = 6, width: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random rewards and values with rubbish behind each row's end, and the mask (lengths 1 to width)."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([1, width, *torch.randint(2, width, (rows - 2,), generator=generator).tolist()])
    return rewards, values, torch.arange(width)[None] < lengths[:, None]


def brute_force_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The double sum of eq. 16, one row and one token at a time; V is 0 after the last token."""
    out = torch.zeros_like(rewards)
    for row in range(rewards.shape[0]):
        length = int(mask[row].sum())
        v = [*values[row, :length].tolist(), 0.0]
        r = rewards[row, :length].tolist()
        for t in range(length):
            out[row, t] = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, length))
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0), (1.0, 0.0), (0.5, 0.3)])
def test_gae_equals_the_double_sum(gamma: float, lam: float) -> None:
    rewards, values, mask = ragged()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = brute_force_gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, (expected + values) * mask, rtol=0, atol=1e-12)


def test_gae_of_lambda_one_is_return_minus_value() -> None:
    rewards, values, mask = ragged(seed=1)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(advantages, (to_go - values) * mask, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, to_go, rtol=0, atol=1e-12)


def test_gae_of_lambda_zero_is_the_temporal_difference() -> None:
    rewards, values, mask = ragged(seed=2)
    advantages, _ = gae(rewards, values, mask, gamma=0.7, lam=0.0)
    following = torch.cat((values[:, 1:] * mask[:, 1:], torch.zeros(len(values), 1, dtype=values.dtype)), 1)
    torch.testing.assert_close(advantages, (rewards + 0.7 * following - values) * mask, rtol=0, atol=1e-12)


def test_gae_ignores_what_lies_behind_the_end() -> None:
    rewards, values, mask = ragged(seed=3)
    first = gae(rewards, values, mask)
    second = gae(rewards + 100.0 * ~mask, values - 1e3 * ~mask, mask)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert (a[~mask] == 0).all()


def test_masked_mean_counts_true_entries_only() -> None:
    x = torch.tensor([[1.0, 2.0, 100.0], [6.0, -50.0, -50.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(x, mask).item() == 3.0
    with pytest.raises(ValueError, match="empty"):
        masked_mean(x, torch.zeros_like(mask))


def test_masked_whiten_is_masked_unbiased_and_centred() -> None:
    x, rubbish, mask = ragged(seed=4)
    x = 3 * x + 7
    white = masked_whiten(x * mask + 1e6 * rubbish * ~mask, mask)
    kept = white[mask]
    assert abs(kept.mean().item()) < 1e-12
    assert abs(kept.var(unbiased=True).item() - 1) < 1e-6
    assert (white[~mask] == 0).all()
    # By hand: 1, 2, 6 have mean 3 and unbiased variance 7.
    line = masked_whiten(torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(line, torch.tensor([[-2.0, -1.0, 3.0]], dtype=torch.float64) / 7**0.5, rtol=0, atol=1e-8)


def test_masked_whiten_shifts_by_default_and_keeps_the_mean_on_request() -> None:
    """An inverted `shift_mean` would exchange the two results."""
    x, _, mask = ragged(seed=5)
    x = 2 * x + 7
    mean = x[mask].mean()
    assert abs(masked_whiten(x, mask)[mask].mean().item()) < 1e-12
    assert abs(masked_whiten(x, mask, shift_mean=True)[mask].mean().item()) < 1e-12
    kept = masked_whiten(x, mask, shift_mean=False)
    assert abs((kept[mask].mean() - mean).item()) < 1e-12
    assert abs(kept[mask].std().item() - 1) < 1e-6
    assert (kept[~mask] == 0).all()


def test_whitening_one_token_or_equal_values_stays_finite() -> None:
    one = masked_whiten(torch.tensor([[5.0, 9.0]]), torch.tensor([[True, False]]))
    same = masked_whiten(torch.full((2, 3), 4.0), torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(one, torch.zeros(1, 2))
    assert torch.equal(same, torch.zeros(2, 3))


def test_the_score_lands_on_the_last_token_only() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    kl = torch.tensor([[0.5, -1.0, 2.0], [1.0, 9.0, 9.0]])
    rewards = shaped_rewards(torch.tensor([10.0, -4.0]), kl, mask, beta=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 9.8], [-4.1, 0.0, 0.0]]))
    without = shaped_rewards(torch.tensor([10.0, -4.0]), kl, mask, beta=0.0)
    assert torch.equal(without, torch.tensor([[0.0, 0.0, 10.0], [-4.0, 0.0, 0.0]]))


def test_group_advantages_by_hand() -> None:
    """Group 1, 2, 6: mean 3, unbiased std sqrt 7; the means of the others are 4, 3.5 and 1.5."""
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    centred = torch.tensor([-2.0, -1.0, 3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    expected = {
        "dr_grpo": centred,
        "grpo": centred / (7**0.5 + 1e-4),
        "dapo": centred / (7**0.5 + 1e-4),
        "rloo": torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0], dtype=torch.float64),
    }
    for variant, hand in expected.items():
        torch.testing.assert_close(group_advantages(rewards, 3, variant), hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "rloo"])
def test_order_of_groups_and_of_rows_in_a_group_does_not_matter(variant: str) -> None:
    generator = torch.Generator().manual_seed(6)
    rewards = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    advantages = group_advantages(rewards.reshape(-1), 4, variant).view(5, 4)
    groups, rows = torch.randperm(5, generator=generator), torch.randperm(4, generator=generator)
    moved = group_advantages(rewards[groups][:, rows].reshape(-1), 4, variant).view(5, 4)
    torch.testing.assert_close(moved, advantages[groups][:, rows], rtol=0, atol=1e-12)
    # A change in one group leaves every other group alone.
    rewards[0, 0] += 10
    changed = group_advantages(rewards.reshape(-1), 4, variant).view(5, 4)
    assert torch.equal(changed[1:], advantages[1:])
    assert not torch.equal(changed[0], advantages[0])


def test_group_advantages_refuse_what_has_no_baseline() -> None:
    with pytest.raises(ValueError, match="at least two"):
        group_advantages(torch.ones(4), 1)
    with pytest.raises(ValueError, match="unknown variant"):
        group_advantages(torch.ones(4), 2, "gspo")


def test_reinforce_pp_is_the_whitened_return_to_go() -> None:
    generator = torch.Generator().manual_seed(7)
    _, kl, mask = ragged(seed=8)
    kl = kl * mask
    scores = torch.randn(mask.shape[0], generator=generator, dtype=torch.float64)
    beta, raw = 0.3, torch.zeros_like(kl)
    for row in range(mask.shape[0]):
        length = int(mask[row].sum())
        for t in range(length):
            raw[row, t] = scores[row] - beta * kl[row, t:length].sum()
    kept = raw[mask]
    expected = torch.zeros_like(raw)
    expected[mask] = (kept - kept.mean()) / (kept.var(unbiased=True) + 1e-8).sqrt()
    torch.testing.assert_close(reinforce_pp_advantages(scores, kl, mask, beta), expected, rtol=0, atol=1e-10)


def test_running_scale_is_the_deviation_of_everything_so_far() -> None:
    generator = torch.Generator().manual_seed(9)
    scale, seen = RunningScale(), torch.zeros(0)
    for size in (5, 1, 8, 3):
        scores = 40 + 3 * torch.randn(size, generator=generator)
        seen = torch.cat([seen, scores])
        assert scale.update(scores) == pytest.approx(float(seen.double().std()), rel=1e-9)
    again = RunningScale(scale.count, scale.mean, scale.squares)  # as a checkpoint stores it
    more = torch.tensor([1.0, 2.0])
    assert again.update(more) == scale.update(more)


def test_running_scale_of_a_constant_is_one() -> None:
    scale = RunningScale()
    assert scale.update(torch.tensor([2.0])) == 1.0
    assert scale.update(torch.tensor([2.0, 2.0])) == 1.0
