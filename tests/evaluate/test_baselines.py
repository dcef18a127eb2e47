"""Beam search against enumeration, joint decoding against the sampler, and the baselines built on them."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from punster.model.load import load_model
from punster.model.role import Role
from punster.model.tokenizer import Tokenizer
from punster.puns import baselines
from punster.rollout.sampler import Decoding, generate
from punster.rollout.search import beam_search, joint_decode

PROMPT = [5, 9, 20]


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> tuple[Role, Tokenizer]:
    return Role(load_model(str(tiny_llama))), Tokenizer.load(str(tiny_llama))


def sequence_log_prob(role: Role, prompt: list[int], ids: list[int]) -> float:
    logs = role.model.forward(torch.tensor([prompt + ids])).log_softmax(-1)[0]
    return sum(float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(ids))


def test_one_beam_is_greedy(tiny: tuple[Role, Tokenizer]) -> None:
    role, tokenizer = tiny
    greedy = generate(role, [PROMPT], Decoding(12, temperature=0), tokenizer.eos_id, torch.Generator().manual_seed(1), 1)
    ids, score = beam_search(role, PROMPT, tokenizer.eos_id, beams=1, max_new_tokens=12)
    assert tuple(ids) == greedy.examples[0].response
    assert score == pytest.approx(sequence_log_prob(role, PROMPT, ids), abs=1e-3)


def test_all_beams_find_the_mode(tiny: tuple[Role, Tokenizer]) -> None:
    role = tiny[0]
    size = role.model.config.vocab_size
    ids, score = beam_search(role, PROMPT, -1, beams=size, max_new_tokens=2)
    first = role.model.forward(torch.tensor([PROMPT])).log_softmax(-1)[0, -1]
    second = role.model.forward(torch.tensor([[*PROMPT, t] for t in range(size)])).log_softmax(-1)[:, -1]
    joint = {(a, b): float(first[a] + second[a, b]) for a, b in product(range(size), range(size))}
    best = max(joint, key=lambda k: joint[k])
    assert tuple(ids) == best
    assert score == pytest.approx(joint[best], abs=1e-3)
    scores = [beam_search(role, PROMPT, -1, beams=b, max_new_tokens=6)[1] for b in (1, 64)]
    assert scores[1] >= scores[0] - 1e-5


def test_joint_decoding_of_one_prompt_twice_is_plain_decoding(tiny: tuple[Role, Tokenizer]) -> None:
    role, tokenizer = tiny
    greedy = Decoding(10, temperature=0)
    alone = generate(role, [PROMPT], greedy, tokenizer.eos_id, torch.Generator().manual_seed(1), 1).examples[0].response
    assert joint_decode(role, [PROMPT, PROMPT], greedy, tokenizer.eos_id, torch.Generator()) == list(alone)


def test_joint_decoding_takes_the_mean_of_log_probs(tiny: tuple[Role, Tokenizer]) -> None:
    role = tiny[0]
    other = [7, 30, 11, 2, 40]
    found = joint_decode(role, [PROMPT, other], Decoding(3, temperature=0), -1, torch.Generator())
    ids: list[int] = []
    for _ in range(3):
        logs = [role.model.forward(torch.tensor([p + ids])).log_softmax(-1)[0, -1] for p in (PROMPT, other)]
        ids.append(int((logs[0] + logs[1]).argmax()))
    assert found == ids


def test_surgen(tiny: tuple[Role, Tokenizer]) -> None:
    role, tokenizer = tiny
    sentences = ["The need is great here.", "Some people in the town feel a real need.", "Nothing of the kind."]
    assert baselines.retrieve(sentences, "need") == [sentences[1], sentences[0]]
    assert baselines.swap(sentences[1], "knead", "need") == "Some people in the town feel a real knead."
    text = baselines.surgen(role, tokenizer, sentences, "knead", "need", torch.Generator().manual_seed(3))
    assert text is not None
    assert "knead" in text
    assert "need" not in text.replace("knead", "")
    assert text == baselines.surgen(role, tokenizer, sentences, "knead", "need", torch.Generator().manual_seed(3))
    assert baselines.surgen(role, tokenizer, sentences, "x", "absent", torch.Generator()) is None
    joined = baselines.joint(role, tokenizer, "bank", ("money", "a river"), torch.Generator().manual_seed(1), 8)
    assert joined == baselines.joint(role, tokenizer, "bank", ("money", "a river"), torch.Generator().manual_seed(1), 8)
