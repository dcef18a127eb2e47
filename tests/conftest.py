"""Shared fixtures: tiny random models with tokenizers, the built-in model, the folder of public pun data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = (
    "make a pun about bakers",
    "Why did the baker quit? He could not make enough dough.",
    "The sailor had a whale of a time, and the tide turned.",
    "I used to be a banker but I lost interest.",
    "make a pun about the sea and the things that live in it",
    "A bicycle cannot stand on its own because it is two tired.",
    "Time flies like an arrow; fruit flies like a banana.",
    "user assistant system You are a helpful assistant.",
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY_LLAMA: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "initializer_range": 0.1, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
}  # fmt: skip
TINY_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "initializer_range": 0.1}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: needs the real default model, the public data, or minutes")
    torch.set_num_threads(1)  # tiny matrices are faster so, and sums are ordered alike everywhere


def tiny_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens: every text is encodable, and decoding gives it back."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if chat_template else ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(SENTENCES, trainer)
    # The chat variant ships pad == eos, as SmolLM2-Instruct does; the plain one has no pad token, as GPT-2.
    if chat_template:
        names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
        return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=chat_template, **names)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def save_tiny(folder: Path, family: str, *, seed: int = 0, chat_template: str | None = CHATML, **overrides: Any) -> Path:
    """A random Hugging Face model of the given family ("llama" or "gpt2") with its tokenizer, written to `folder`."""
    tokenizer = tiny_tokenizer(chat_template if family == "llama" else None)
    vocabulary = {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: LlamaForCausalLM | GPT2LMHeadModel
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**{"tie_word_embeddings": False, **TINY_LLAMA, **vocabulary, **overrides}))
        else:
            model = GPT2LMHeadModel(GPT2Config(**{**TINY_GPT2, **vocabulary, **overrides}))
        with torch.no_grad():  # norms of exactly 1 and biases of exactly 0 would hide mistakes
            for tensor in model.parameters():
                if tensor.dim() == 1:
                    tensor += 0.1 * torch.randn_like(tensor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """make_model("llama" | "gpt2", seed=, chat_template=, **config) -> a new Hugging Face folder."""

    def make(family: str, **options: Any) -> Path:
        return save_tiny(tmp_path_factory.mktemp(family), family, **options)

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_model: MakeModel) -> Path:
    """4 layers, d 32, 4 heads, 2 key-value heads, untied head; ChatML tokenizer with pad == eos == <|im_end|>."""
    return make_model("llama")


@pytest.fixture(scope="session")
def tiny_llama_tied(make_model: MakeModel) -> Path:
    return make_model("llama", seed=1, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_gpt2(make_model: MakeModel) -> Path:
    """4 layers, d 32, tied head; a tokenizer without chat template and pad token, eos <|endoftext|>."""
    return make_model("gpt2", seed=2)


@pytest.fixture(scope="session")
def default_model() -> Any:
    """The built-in model in fp32; fetched on first use."""
    from punster.model.load import load_model

    return load_model()


@pytest.fixture(scope="session")
def punster_data() -> Path:
    """The folder of local copies of public pun data."""
    folder = Path(os.environ.get("PUNSTER_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        # These texts must not be in the repository, so a checkout alone cannot run the tests that need them.
        pytest.skip(f"no public pun data at {folder}; set PUNSTER_DATA")
    return folder
