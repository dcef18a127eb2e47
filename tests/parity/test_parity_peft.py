"""Our adapters are PEFT's: forward, gradients, merge, and files in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from punster.errors import UserError
from punster.model.load import load_model
from punster.model.lora import Adapter, join, merged_weights
from punster.model.transformer import Decoder

MODULES = {
    "tiny_llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "tiny_gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}
IDS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(1))


def base_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def peft_model(folder: Path, name: str, seed: int = 0, **options: Any) -> Any:
    """A PEFT model whose A and B are both random, on layers 1 to 3."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.0, "target_modules": MODULES[name], "task_type": "CAUSAL_LM"}
    config = LoraConfig(**{
        **settings, "fan_in_fan_out": name == "tiny_gpt2", "layers_to_transform": [1, 2, 3],
        "layers_pattern": "h" if name == "tiny_gpt2" else "layers", **options,
    })  # fmt: skip
    model = get_peft_model(base_of(folder), config).eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if "lora_B" in key:
                tensor.normal_(std=0.2)
    return model


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def random_adapter(
    model: Decoder, name: str, seed: int, rank: int = 3, alpha: float = 7.0, layers: range = range(2, 4)
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter.create(name, model.config, rank=rank, alpha=alpha, layers=layers, generator=generator)
    for site in adapter.b:
        adapter.b[site] = torch.randn(adapter.b[site].shape, generator=generator) * 0.2
    return adapter


@pytest.fixture(params=sorted(MODULES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(name: str, request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(name))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_forward_gradients_and_merge_equal_peft(name: str, folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = peft_model(folder, name, **options)
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(folder))
    adapter = Adapter.load(tmp_path, "policy", ours.config).trainable()
    assert adapter.first_layer == 1 and len(adapter.a) == 3 * len(MODULES[name])

    expected, found = theirs(IDS).logits, ours.forward(IDS, [adapter])
    assert (expected - base_of(folder)(IDS).logits).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    loss_of(expected).backward()
    loss_of(found).backward()
    gradients = {key: tensor.grad for key, tensor in theirs.named_parameters() if tensor.requires_grad}
    assert len(gradients) == len(list(adapter.parameters()))
    for key, tensor in adapter.named_parameters():
        reference = gradients[f"base_model.model.{key}.default.weight"]
        assert reference.abs().max() > 1e-4
        torch.testing.assert_close(tensor.grad, reference, atol=1e-5, rtol=0)

    merged = merged_weights(ours.weights, [adapter])
    with torch.no_grad():
        torch.testing.assert_close(Decoder(ours.config, merged).forward(IDS), expected, atol=1e-5, rtol=0)
    reference = theirs.merge_and_unload().state_dict()
    for site in adapter.a:
        weight = reference[f"{site}.weight"]
        torch.testing.assert_close(merged[f"{site}.weight"], weight.t() if name == "tiny_gpt2" else weight, atol=1e-5, rtol=0)


def test_our_adapter_is_opened_by_peft(folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    ours = load_model(str(folder))
    adapter = random_adapter(ours, "policy", 4)
    adapter.save(tmp_path, str(folder), ours.config)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base_of(folder), tmp_path).eval()
        assert theirs.active_peft_config.base_model_name_or_path == str(folder)
        torch.testing.assert_close(theirs(IDS).logits, ours.forward(IDS, [adapter]), atol=1e-5, rtol=0)
    assert not [warning for warning in recwarn if "missing adapter keys" in str(warning.message).lower()]
    again = Adapter.load(tmp_path, "again", ours.config)
    assert (again.rank, again.alpha, again.first_layer) == (3, 7.0, 2)
    assert all(torch.equal(tensor, dict(again.named_parameters())[key]) for key, tensor in adapter.named_parameters())


def test_joined_stack_is_opened_by_peft(folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Export of a policy: an RL adapter stacked on an SFT adapter, of other rank, scale and layers."""
    ours = load_model(str(folder))
    stack = [random_adapter(ours, "sft", 1), random_adapter(ours, "rl", 2, rank=5, alpha=2.0, layers=range(1, 4))]
    join(stack).save(tmp_path, str(folder), ours.config)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base_of(folder), tmp_path).eval()
        torch.testing.assert_close(theirs(IDS).logits, ours.forward(IDS, stack), atol=1e-5, rtol=0)
    assert not [warning for warning in recwarn if "missing adapter keys" in str(warning.message).lower()]


def refused_or_right(name: str, folder: Path, tmp_path: Path, **options: Any) -> None:
    """An adapter with settings that we do not implement is refused; silently wrong logits are not allowed."""
    theirs = peft_model(folder, name, **options)
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(folder))
    try:
        adapter = Adapter.load(tmp_path, "policy", ours.config)
    except UserError:
        return
    with torch.no_grad():
        torch.testing.assert_close(ours.forward(IDS, [adapter]), theirs(IDS).logits, atol=1e-5, rtol=0)


def test_dora_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    peft_model(folder, name, use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="only plain LoRA"):
        Adapter.load(tmp_path, "policy", load_model(str(folder)).config)


def test_rank_pattern_is_refused_or_right(name: str, folder: Path, tmp_path: Path) -> None:
    refused_or_right(name, folder, tmp_path, rank_pattern={MODULES[name][0]: 2})


def test_trained_biases_are_refused_or_right(tiny_gpt2: Path, tmp_path: Path) -> None:
    refused_or_right("tiny_gpt2", tiny_gpt2, tmp_path, lora_bias=True)


def test_alpha_pattern_is_refused_or_right(name: str, folder: Path, tmp_path: Path) -> None:
    refused_or_right(name, folder, tmp_path, alpha_pattern={MODULES[name][0]: 100})
