"""Bugs of the student project this one descends from, and of its own ancestor: number -> the tests that hold them down.

The tests live where the code is that they are about; the few that had no better place are at the end of this file.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from punster.config import PpoConfig, SftConfig
from punster.model.architecture import ModelConfig
from punster.model.load import expected_shapes, load_model
from punster.model.role import Role
from punster.train.optim import make_optimizer
from punster.train.setup import extend
from punster.train.sft import sft

ROOT = Path(__file__).resolve().parents[1]

HELD: dict[int, tuple[str, list[str]]] = {
    # model and sampling
    1: ("tanh-GELU of GPT-2", ["parity/test_parity_transformers.py::test_logits_and_greedy_tokens_equal_transformers"]),
    2: ("head tied to the embedding", ["test_ancestor_bugs.py::test_parameter_counts_and_the_tied_head"]),
    3: ("norms keep their weights, keys are Hugging Face's", ["model/test_load.py::test_missing_tensor", "model/test_export.py::test_hf_has_the_same_logits"]),
    4: ("no mask buffers in checkpoints", ["test_ancestor_bugs.py::test_a_checkpoint_holds_its_parameters_and_nothing_else"]),
    5: ("positions of padded rows", ["model/test_transformer.py::test_padded_rows_equal_unpadded_rows"]),
    6: ("a fully masked row stays finite", ["model/test_transformer.py::test_padded_rows_equal_unpadded_rows", "model/test_transformer.py::test_mask_by_hand"]),
    7: ("key-value cache", ["model/test_transformer.py::test_cache_on_equals_cache_off_with_left_padding", "rollout/test_sampler.py::test_greedy_is_the_argmax_of_the_full_forward"]),
    8: ("nothing after EOS", ["rollout/test_sampler.py::test_nothing_follows_eos_and_eos_is_included"]),
    9: ("temperature 0 is greedy", ["rollout/test_sampler.py::test_greedy_does_not_depend_on_the_seed"]),
    10: ("one distribution for sampling and scoring", ["rollout/test_sampler.py::test_sampler_log_probs_equal_training_log_probs", "rollout/test_sampler.py::test_only_kept_tokens_are_drawn_with_the_renormalised_log_prob"]),
    11: ("EOS gets gradient with pad == eos", ["train/test_sft.py::test_prompt_tokens_have_no_weight_and_eos_has", "train/test_sft.py::test_the_pad_id_does_not_matter"]),
    12: ("per-row response spans", ["data/test_batch.py::test_masks_by_hand", "train/test_sft.py::test_micro_batches_give_the_gradient_of_one_batch"]),
    13: ("no room for a response", ["rollout/test_sampler.py::test_a_prompt_that_leaves_no_room_is_refused", "test_cli.py::test_a_prompt_longer_than_the_context_is_refused"]),
    14: ("reward at the last real token", ["train/test_reward_model.py::test_the_last_token_is_eos_and_mean_covers_the_response_only"]),
    15: ("rewards do not depend on padding", ["train/test_reward_model.py::test_padding_does_not_move_scores"]),
    16: ("a value per token", ["model/test_role.py::test_values_are_those_of_the_states_before_each_token", "algorithms/test_advantages.py::test_gae_equals_the_double_sum"]),
    17: ("the score head trains under LoRA", ["train/test_reward_model.py::test_head_and_adapter_change_under_lora"]),
    18: ("adapters are merged on export only", ["model/test_lora.py::test_merging_is_fp32_and_leaves_the_base_alone", "model/test_role.py::test_saved_role_comes_back"]),
    19: ("plain keys in checkpoints", ["test_ancestor_bugs.py::test_a_checkpoint_holds_its_parameters_and_nothing_else"]),
    20: ("loading is strict", ["model/test_load.py::test_unknown_tensor", "model/test_load.py::test_missing_tensor"]),
    21: ("no pickle", ["train/test_run.py::test_what_a_finished_run_leaves", "test_ancestor_bugs.py::test_what_the_source_never_contains"]),
    22: ("unknown choices are errors", ["test_cli.py::test_bad_input", "train/test_ppo.py::test_bad_settings_are_user_errors"]),
    23: ("the model needs no tokenizer and no network", ["model/test_load.py::test_random_model_is_seeded_and_complete"]),
    # configuration
    24: ("names of models resolve or say so", ["model/test_load.py::test_unknown_name_suggests_near_matches", "model/test_load.py::test_missing_path_is_not_taken_for_a_hub_id"]),
    25: ("the rank is a setting", ["test_ancestor_bugs.py::test_default_rank_and_adam_betas"]),
    26: ("settings keep their types", ["train/test_run.py::test_the_saved_configuration_is_complete_and_can_be_run_again", "test_cli.py::test_yaml_config_is_a_round_trip"]),
    # training loop
    27: ("clip after backward", ["train/test_run.py::test_optimizer_step_clips_after_accumulation_and_uses_adam_eps"]),
    28: ("Adam's two betas", ["test_ancestor_bugs.py::test_default_rank_and_adam_betas"]),
    29: ("no gradient scaler", ["test_ancestor_bugs.py::test_what_the_source_never_contains"]),
    30: ("several passes over a rollout, so that clips bind", ["train/test_ppo.py::test_clipping_happens_at_a_large_learning_rate"]),
    31: ("masked mean", ["algorithms/test_advantages.py::test_masked_mean_counts_true_entries_only"]),
    32: ("direction of k3", ["algorithms/test_kl.py::test_k3_with_policy_and_reference_exchanged_is_wrong", "algorithms/test_kl.py::test_k1_and_k3_are_unbiased"]),
    33: ("per-token rewards, GAE, whitening", ["algorithms/test_advantages.py::test_the_score_lands_on_the_last_token_only", "algorithms/test_advantages.py::test_masked_whiten_is_masked_unbiased_and_centred"]),
    34: ("ratio 1 before the first update", ["train/test_ppo.py::test_ratio_is_exactly_one_before_the_first_update_only"]),
    36: ("device and type are settings", ["train/test_run.py::test_the_saved_configuration_is_complete_and_can_be_run_again"]),
    37: ("held-out loss is computed", ["train/test_sft.py::test_summary_holds_the_held_out_loss_of_the_saved_run"]),
    38: ("means over tokens, not over batches", ["train/test_sft.py::test_loss_falls_and_the_saved_run_has_that_loss", "train/test_sft.py::test_micro_batches_give_the_gradient_of_one_batch"]),
    39: ("a taken name is an error", ["train/test_run.py::test_a_taken_name_is_an_error_that_changes_nothing"]),
    40: ("named, seeded generators", ["train/test_resume.py::test_the_same_seed_repeats_a_run_and_another_does_not", "train/test_ppo.py::test_rollout_draws_are_seeded_streams"]),
    41: ("resume", ["train/test_resume.py::test_resumed_equals_uninterrupted"]),
    42: ("prompts are shuffled each pass", ["train/test_run.py::test_the_cursor_visits_every_row_once_a_pass", "data/test_batch.py::test_epoch_order_is_a_seeded_permutation"]),
    43: ("ids and masks are cut together", ["train/test_dpo.py::test_long_rows_lose_the_beginning_of_their_prompt_and_never_eos", "data/test_batch.py::test_predictors_are_the_states_one_before"]),
    44: ("log-sigmoid far out", ["algorithms/test_losses.py::test_pairs_are_finite_far_out"]),
    46: ("losses are masked and normalised by tokens", ["algorithms/test_losses.py::test_clipped_policy_loss_by_hand", "algorithms/test_losses.py::test_clipped_value_loss_by_hand", "train/test_ppo.py::test_micro_batches_do_not_change_a_step"]),
    47: ("one metrics file with every documented key", ["docs/test_method_pages.py::test_every_logged_metric_is_explained"]),
    # tokenizer and data
    48: ("user text cannot inject special tokens", ["model/test_tokenizer.py::test_user_text_never_becomes_special"]),
    49: ("truncation never takes EOS", ["train/test_dpo.py::test_long_rows_lose_the_beginning_of_their_prompt_and_never_eos", "train/test_sft.py::test_first_loss_is_transformers_loss_on_completion_and_eos"]),
    50: ("every source has a test", ["data/test_malformed.py::test_sources"]),
    51: ("data sets have lengths", ["train/test_run.py::test_total_steps_rounds_up"]),
    52: ("one example a row, loss on the completion", ["train/test_sft.py::test_prompt_tokens_have_no_weight_and_eos_has"]),
    53: ("dynamic padding", ["data/test_batch.py::test_token_batches_fill_up_to_the_limit"]),
    # scripts and claims
    55: ("the chain sft, reward, ppo", ["learning/test_toy.py::test_ppo_against_a_learned_reward_model"]),
    57: ("the README's commands run", ["test_readme.py::test_readme_commands_run"]),
}  # fmt: skip
NOT_HELD = {
    35: "nothing is compiled here",
    45: "rewards are learned from pairs; a group's pairs are rows, each counted once",
    54: "the ancestor's data set is one of the public sources and in no default recipe",
    56: "the demonstration trains on puns end to end (make demo)",
    58: "the judge is part of the evaluation, which has its own tests",
    59: "nothing was taken from the draft branch",
    60: "a rule for people: documents list what is tested",
}


def test_every_number_is_held_or_explained() -> None:
    assert sorted([*HELD, *NOT_HELD]) == list(range(1, 61))


def test_the_tests_of_the_index_are_collected() -> None:
    wanted = {test for _, tests in HELD.values() for test in tests}
    files = sorted({str(ROOT / "tests" / test.split("::")[0]) for test in wanted})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *files],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    collected = {re.sub(r"\[.*", "", line).removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line}
    assert wanted <= collected, sorted(wanted - collected)


# ---- tests that have no better place ------------------------------------------------------------------------------
GPT2 = {"model_type": "gpt2", "vocab_size": 50_257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
SMOL = {
    "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "hidden_act": "silu",
}  # fmt: skip


@pytest.mark.parametrize(("config", "count"), [(GPT2, 124_439_808), (SMOL, 134_515_008)])
def test_parameter_counts_and_the_tied_head(config: dict[str, Any], count: int, tiny_gpt2: Path, tiny_llama_tied: Path) -> None:
    """The published counts, which an untied head would exceed by tens of millions."""
    assert sum(math.prod(shape) for shape in expected_shapes(ModelConfig.from_hf(config)).values()) == count
    model = load_model(str(tiny_gpt2 if config is GPT2 else tiny_llama_tied))
    assert model.head.weight.data_ptr() == model.embedding.data_ptr()


def test_a_checkpoint_holds_its_parameters_and_nothing_else(tiny_llama: Path, tmp_path: Path) -> None:
    """Adapter files hold A and B of each site under PEFT's names: no buffers, no prefixes of wrappers."""
    rows = [{"prompt": "a", "completion": "b"}] * 4
    config = SftConfig(name="run", out=str(tmp_path), model=str(tiny_llama), steps=1, batch_size=2, lora_r=4, top_layers="2", dtype="fp32", device="cpu", quiet=True)  # fmt: skip
    run = sft(config, rows)
    assert run is not None
    stored = load_file(run / "checkpoints" / "step-1" / "adapters" / "sft" / "adapter_model.safetensors")
    sizes = [into + out for site, (out, into) in load_model(str(tiny_llama)).config.sites(3).items()]
    assert sum(tensor.numel() for tensor in stored.values()) == 2 * 4 * sum(sizes)
    assert all(re.fullmatch(r"base_model\.model\.[\w.]+\.lora_[AB]\.weight", key) for key in stored)
    assert not any("_orig_mod" in key for key in load_file(run / "checkpoints" / "step-1" / "state.safetensors"))


def test_default_rank_and_adam_betas(tiny_llama: Path) -> None:
    config = PpoConfig(name="x", top_layers="all")
    assert config.lora_r >= 8
    optimizer = make_optimizer(extend(Role(load_model(str(tiny_llama))), config, "policy"), 1e-4)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("word", ["GradScaler", "autocast", "torch.load(", "import pickle", "load_state_dict"])
def test_what_the_source_never_contains(word: str) -> None:
    """Scalers, whole-loop autocast, pickles, and loading that can skip what does not fit."""
    assert [path.name for path in (ROOT / "src").rglob("*.py") if word in path.read_text()] == []
