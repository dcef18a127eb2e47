"""Losses and advantages against TRL's own: tensors of real steps of its trainers, captured once by scripts/capture_trl.py.

The settings below are those of that script. Differences that are by design are held here too: where PPOTrainer puts the
score, which tokens its value loss counts, and the sequence ratio of its RLOO.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from punster.algorithms.advantages import gae, group_advantages, masked_mean, masked_whiten, shaped_rewards
from punster.algorithms.kl import kl_estimate, kl_loss
from punster.algorithms.losses import clipped_policy_loss, clipped_value_loss, kto_loss, plackett_luce, preference_loss
from punster.config import GrpoConfig
from punster.config.train import Variant
from punster.train.grpo import token_weights

FOLDER = Path(__file__).parent / "fixtures"


def captured(release: str, prefix: str) -> dict[str, Tensor]:
    found = load_file(FOLDER / f"trl-{release}.safetensors")
    return {name.removeprefix(f"{prefix}/"): tensor for name, tensor in found.items() if name.startswith(f"{prefix}/")}


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_fixtures_name_their_versions_and_are_small() -> None:
    files = sorted(FOLDER.glob("*.safetensors"))
    assert [file.name for file in files] == ["trl-1.12.0.safetensors", "trl-1.16.0.safetensors"]
    assert sum(file.stat().st_size for file in files) < 200_000
    for file in files:
        with safe_open(file, "pt") as opened:
            versions = json.loads(opened.metadata()["versions"])
        assert versions["trl"] == file.stem.removeprefix("trl-") and {"torch", "transformers"} <= set(versions)


# ---- DPO and its family -------------------------------------------------------------------------------------------
PAIR = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_length", "rejected_length")


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "ipo", "hinge"])
def test_dpo_losses(kind: str) -> None:
    theirs = captured("1.16.0", f"dpo/{kind}")
    losses = preference_loss(
        *(theirs[name] for name in PAIR), kind=kind, beta=0.3, label_smoothing=0.1 if kind == "robust" else 0.0
    )
    close(losses, theirs["losses"])
    close(losses.mean(), theirs["loss"])
    rewards = [0.3 * (theirs[side] - theirs[f"ref_{side}"]) for side in ("chosen", "rejected")]
    close((rewards[0] > rewards[1]).float().mean(), theirs["accuracy"])
    close((rewards[0] - rewards[1]).mean(), theirs["margin"])
    assert losses.std() > 0.1  # the pairs differ, so that a permutation or a constant would show


def test_sft_term_of_dpo_is_the_mean_over_chosen_tokens() -> None:
    """As pair_step adds it: chosen.sum() / number of chosen tokens of the step."""
    theirs = captured("1.16.0", "dpo/sft")
    close(-theirs["chosen"].sum() / theirs["chosen_length"].sum(), theirs["loss"])


@pytest.mark.parametrize(("kind", "sign"), [("simpo", 1), ("orpo", -1)])
def test_losses_without_a_reference(kind: str, sign: int) -> None:
    """TRL's ORPO returns the odds-ratio term with the other sign and subtracts it from the NLL."""
    theirs = captured("1.16.0", f"dpo/{kind}")
    nothing = torch.zeros(4)
    sides = (theirs["chosen"], theirs["rejected"], nothing, nothing, theirs["chosen_length"], theirs["rejected_length"])
    close(preference_loss(*sides, kind=kind, beta=0.3, gamma=0.5), sign * theirs["losses"])


def test_kto() -> None:
    theirs = captured("1.16.0", "kto")
    z = (theirs["KL_logps"] - theirs["ref_KL_logps"]).mean().clamp(min=0)
    close(z, theirs["kl"])
    ratios = torch.cat([theirs["chosen_logratios"], theirs["rejected_logratios"]])
    desirable = torch.arange(8) < 4
    losses = torch.where(desirable, 1.5, 0.7) * kto_loss(ratios, desirable, z, 0.3)
    close(losses, theirs["losses"])
    close(losses.mean(), theirs["loss"])


def test_reward_model_loss_with_margin_and_centring() -> None:
    theirs = captured("1.16.0", "reward")
    chosen, rejected = theirs["chosen"], theirs["rejected"]
    scores = torch.stack((chosen - theirs["margin"], rejected), 1)
    ranked = plackett_luce(scores, torch.tensor([[2.0, 1.0]]).expand_as(scores))
    loss = (ranked + 0.01 * (chosen + rejected).square()).mean()
    close(loss, theirs["loss"])


# ---- GRPO and RLOO ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("variant", "corrected"), [("grpo", False), ("grpo", True), ("dr_grpo", False), ("dapo", False)])
def test_grpo_advantages_and_loss(variant: Variant, corrected: bool) -> None:
    """As published, and with TRL's default: k3 times the ratio."""
    theirs = captured("1.16.0", variant + "_corrected" * corrected)
    close(group_advantages(theirs["rewards"], 4, variant), theirs["all_advantages"])
    assert (theirs["all_advantages"].view(4, 4) == 0).all(1).sum() == 1  # one group without spread
    config = GrpoConfig(name="x", batch_size=16, samples=4, max_new_tokens=7, variant=variant)
    mask = theirs["mask"]
    weights = token_weights(config, mask)
    advantages = theirs["advantages"].expand_as(weights) * weights
    loss, stats = clipped_policy_loss(
        theirs["log_prob"], theirs["old"], advantages, mask, 0.2, 0.28 if variant == "dapo" else None
    )
    k3 = kl_loss(theirs["log_prob"], theirs["old"], theirs["ref"], corrected)
    close(loss + 0.04 * (k3 * weights).sum(), theirs["loss"])
    assert stats["clipfrac"] > 3 and stats["ratio_gap"] > 0.3


def test_rloo_advantages() -> None:
    """The KL of a whole response is taken off its reward, then the mean of the others."""
    theirs = captured("1.16.0", "rloo")
    k1 = (kl_estimate(theirs["rollout_old"], theirs["rollout_ref"]) * theirs["rollout_mask"]).sum(1)
    assert k1.abs().max() > 1
    close(group_advantages(theirs["rewards"] - 0.04 * k1, 4, "rloo"), theirs["all_advantages"])


def test_rloo_loss() -> None:
    """TRL clips the ratio of whole responses: our loss on their summed log-probs. The loop clips token by token instead.

    At ratio 1 the two have the same gradient in every token's log-prob: A of the response, over the number of responses.
    """
    theirs = captured("1.16.0", "rloo")
    close((theirs["log_prob"] * theirs["mask"]).sum(1), theirs["logps"])
    whole = torch.ones(16, 1, dtype=torch.bool)
    loss, _ = clipped_policy_loss(theirs["logps"][:, None], theirs["old"][:, None], theirs["advantages"][:, None], whole, 0.2)
    close(loss / 16, theirs["loss"])
    config = GrpoConfig(name="x", batch_size=16, samples=4, max_new_tokens=7, variant="rloo")
    log_prob, mask = theirs["log_prob"].clone().requires_grad_(True), theirs["mask"]
    advantages = theirs["advantages"][:, None] * token_weights(config, mask)
    clipped_policy_loss(log_prob, log_prob.detach(), advantages, mask)[0].backward()
    summed = log_prob.detach().clone().requires_grad_(True)
    ratio = ((summed * mask).sum(1) - (summed.detach() * mask).sum(1)).exp()
    (-(ratio * theirs["advantages"]).mean()).backward()
    assert log_prob.grad is not None and summed.grad is not None
    close(log_prob.grad, summed.grad)


# ---- PPO: one real rollout of TRL 1.12.0's PPOTrainer and two passes over it ------------------------------------------
GAMMA, LAM, BETA = 0.99, 0.95, 0.05


@pytest.fixture
def rollout() -> dict[str, Tensor]:
    found = captured("1.12.0", "ppo")
    mask, longer = ~found["padding"], ~found["padding_p1"]
    assert 0 < int((mask.sum(1) < 9).sum()) < 8  # some responses ended and some were cut off
    assert torch.equal(longer.sum(1), (mask.sum(1) + 1).clamp(max=9))
    return found | {"mask": mask, "longer": longer}


def test_ppo_rewards_one_slot_later(rollout: dict[str, Tensor]) -> None:
    """Ours puts the score on the last token of the mask it is given; TRL's mask for it is one slot longer where that fits."""
    close(kl_estimate(rollout["log_prob"], rollout["ref_log_prob"]), rollout["kl"])
    close(shaped_rewards(rollout["scores"], rollout["kl"], rollout["longer"], BETA), rollout["rewards"])
    ours = shaped_rewards(rollout["scores"], rollout["kl"], rollout["mask"], BETA)
    ended = rollout["mask"].sum(1) < 9
    last = rollout["mask"].sum(1) - 1
    rows = torch.arange(8)
    close(ours[rows, last] - rollout["rewards"][rows, last], rollout["scores"] * ended)


def test_ppo_gae_and_whitening(rollout: dict[str, Tensor]) -> None:
    advantages, returns = gae(rollout["rewards"], rollout["values"], rollout["longer"], GAMMA, LAM)
    close(returns, rollout["returns"] * rollout["longer"])
    close(masked_whiten(advantages, rollout["mask"]), rollout["advantages"])
    assert rollout["advantages"][rollout["mask"]].std() == pytest.approx(1, abs=1e-5)


def test_ppo_score_on_the_last_token_is_the_same_without_discounting(rollout: dict[str, Tensor]) -> None:
    """With gamma = lambda = 1 the extra slot changes no real token's advantage, whatever value it has; otherwise it discounts
    the score by gamma lambda once more and lets the value after EOS in, which we hold to be 0."""
    ours, _ = gae(
        shaped_rewards(rollout["scores"], rollout["kl"], rollout["mask"], BETA),
        rollout["values"] * rollout["mask"],
        rollout["mask"],
        1,
        1,
    )
    theirs, _ = gae(rollout["rewards"], rollout["values"], rollout["longer"], 1.0, 1.0)
    close(ours, theirs * rollout["mask"])
    discounted, _ = gae(
        shaped_rewards(rollout["scores"], rollout["kl"], rollout["mask"], BETA), rollout["values"] * rollout["mask"], rollout["mask"],
        GAMMA, LAM,
    )  # fmt: skip
    other, _ = gae(rollout["rewards"], rollout["values"], rollout["longer"], GAMMA, LAM)
    assert (discounted - other * rollout["mask"]).abs().max() > 0.01
    cut_off = rollout["mask"].sum(1) == 9
    close(discounted[cut_off], other[cut_off])


@pytest.mark.parametrize("number", [0, 1])
def test_ppo_losses(number: int, rollout: dict[str, Tensor]) -> None:
    """Before the first update (ratio 1) and after it. TRL's value loss counts the slot after EOS; ours on its mask is the same."""
    step = captured("1.12.0", f"ppo/{number}")
    rows = step["rows"]
    mask, longer = rollout["mask"][rows], rollout["longer"][rows]
    loss, stats = clipped_policy_loss(step["new_log_prob"], rollout["log_prob"][rows], rollout["advantages"][rows], mask, 0.2)
    value_loss, clipped = clipped_value_loss(step["new_values"], rollout["values"][rows], rollout["returns"][rows], longer, 0.2)
    close(loss / mask.sum(), step["policy_loss"])
    close(value_loss / longer.sum(), step["value_loss"])
    close(loss / mask.sum() + 0.1 * value_loss / longer.sum(), step["loss"])
    close(stats["clipfrac"] / mask.sum(), step["clipfrac"])
    close(clipped / longer.sum(), step["value_clipfrac"])
    if number == 0:
        # TRL takes old log-probs from generate(), ours from the training path; here the two agree within rounding.
        assert stats["ratio_gap"] < 1e-5 and stats["clipfrac"] == 0
    else:
        assert stats["clipfrac"] > 0.3 * mask.sum() and clipped > 0.3 * longer.sum()


def test_ppo_values_of_masked_tokens_do_not_count(rollout: dict[str, Tensor]) -> None:
    """TRL fills masked log-probs with 1; with anything else there our loss is the same."""
    step = captured("1.12.0", "ppo/1")
    rows = step["rows"]
    mask = rollout["mask"][rows]
    filled = torch.where(mask, step["new_log_prob"], -7.0)
    loss, _ = clipped_policy_loss(filled, rollout["log_prob"][rows], rollout["advantages"][rows], mask, 0.2)
    close(loss / mask.sum(), step["policy_loss"])
    assert masked_mean(rollout["advantages"], rollout["mask"]).abs() < 1e-6
