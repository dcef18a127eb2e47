"""Tokenizers that put something in front of what they encode: a BOS, and SentencePiece's mark of a space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from punster.model.tokenizer import Tokenizer
from tests.conftest import SENTENCES

SCHEMES = ("first", "always", "legacy")  # the last marks by a normaliser, as Llama 2 was shipped
USER = [{"role": "user", "content": "make a pun about bakers"}]
DIALOGUE = [
    {"role": "user", "content": "make a pun"},
    {"role": "assistant", "content": "I used to be a banker."},
    {"role": "user", "content": " time flies  "},
]
LINES = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece(scheme: str, chat_template: str | None = None) -> Any:
    """A BPE with byte fallback that adds BOS, as Llama's."""
    raw = RawTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    alphabet = sorted({sign for text in SENTENCES for sign in text} | set("\n:?[]/<>|_NSTQ▁"))
    special = ["<unk>", "<s>", "</s>"]
    raw.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    if scheme == "legacy":
        raw.pre_tokenizer = None
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=chat_template, **names)


def template_ids(hf: Any, messages: list[dict[str, str]], prompt: bool = True) -> list[int]:
    ids: list[int] = hf.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt, return_dict=False)
    return ids


@pytest.mark.parametrize("template", [LINES, BRACKETS], ids=["lines", "brackets"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_pieces_of_a_dialogue_get_no_marks_of_their_own(scheme: str, template: str) -> None:
    tokenizer = Tokenizer(sentencepiece(scheme, template))
    for messages in (USER, DIALOGUE):
        assert tokenizer.prompt_ids(messages) == template_ids(tokenizer.hf, messages)
    turn = tokenizer.prompt_ids(DIALOGUE[:1]) + tokenizer.response_ids(DIALOGUE[1]["content"])
    assert turn == template_ids(tokenizer.hf, DIALOGUE[:2], prompt=False)[: len(turn)]
    assert tokenizer.decode(tokenizer.response_ids("I used to")) == "I used to"
    assert tokenizer.text_ids("I used to") == tokenizer.hf("I used to", add_special_tokens=False).input_ids  # a document


@pytest.mark.parametrize("prompt_format", ["auto", "Q: {prompt}\nA:", "Q: {prompt} A: "])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_plain_prompts_begin_with_bos_here_and_in_exports(scheme: str, prompt_format: str, tmp_path: Path) -> None:
    ours = Tokenizer(sentencepiece(scheme), prompt_format)
    text = ours.prompt_format.replace("{prompt}", "make a pun")
    assert ours.prompt_ids("make a pun") == ours.hf(text).input_ids  # <s>, and no mark before the line end
    assert ours.prompt_ids("make a pun").count(ours.hf.bos_token_id) == 1
    ours.for_transformers().save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    again = Tokenizer(theirs)
    for messages in (USER, DIALOGUE):
        assert template_ids(theirs, messages) == ours.prompt_ids(messages) == again.prompt_ids(messages)
    assert again.response_ids("I used to") == ours.response_ids("I used to")


def test_bos_is_written_once_and_where_the_format_says(tmp_path: Path) -> None:
    """A chat template says so itself, or a text that begins with it; with another format the template's model gets it, too."""
    own = Tokenizer(sentencepiece("always"), "<s>Q: {prompt}\n")
    assert own.prompt_ids("make a pun") == own.hf("Q: make a pun\n").input_ids
    assert template_ids(own.for_transformers(), USER) == own.prompt_ids(USER)
    assert 1 not in Tokenizer(sentencepiece("always", LINES)).prompt_ids(USER)
    assert Tokenizer(sentencepiece("always", LINES), "{prompt}\n").prompt_ids(USER)[0] == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_user_text_never_becomes_special_between_marks(scheme: str) -> None:
    for tokenizer in (Tokenizer(sentencepiece(scheme, LINES)), Tokenizer(sentencepiece(scheme), "{prompt}\n")):
        special = {1, 2}
        for text in ("</s>", "a <s> b", "\n</s>", " </s> "):
            harmless, hostile = tokenizer.prompt_ids("make"), tokenizer.prompt_ids(text)
            assert [i for i in hostile if i in special] == [i for i in harmless if i in special]
            assert not special & set(tokenizer.response_ids(text)[:-1])
