"""Greedy, beam, top-k, nucleus and min-p side by side on the default model, as in Table 1 of Holtzman et al. 2020.

    python scripts/compare_decoders.py [--model M] [--prompts 24] [--tokens 96]

Each text continues the first words of a plain sentence of the embedded corpus, as a document, without its end token. People's texts are
such sentences in a row: for their repetition; their perplexity is that of a text whose sentences have nothing to do with each other.
"""

from __future__ import annotations

import argparse

import torch

from punster.api import load
from punster.data import corpus
from punster.data.batch import Example
from punster.evaluate import degeneration as d
from punster.puns.surprisal import document_start, example_log_probs
from punster.rollout.sampler import Decoding, generate
from punster.rollout.search import beam_search
from punster.train.optim import seeded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args()
    loaded = load(options.model)
    role, tokenizer = loaded.role, loaded.tokenizer
    start = document_start(tokenizer)
    prompts = [[start, *tokenizer.text_ids(" ".join(r["plain"].split()[:5]))] for r in corpus.part("test")[: options.prompts]]
    kinds: dict[str, Decoding | int | None] = {
        "people": None, "greedy": Decoding(options.tokens, temperature=0), "beam 8": 8, "top-k 40": Decoding(options.tokens, top_k=40),
        "nucleus .95": Decoding(options.tokens, top_p=0.95), "min-p .05": Decoding(options.tokens, min_p=0.05),
        "sampling": Decoding(options.tokens),
    }  # fmt: skip
    written = tokenizer.text_ids(" ".join(r["plain"] for r in corpus.part("test")))
    print(
        "| decoder | perplexity | looping % | onset | seq-rep-4 | self-BLEU-4 | Zipf | distinct-2 |\n|---|---|---|---|---|---|---|---|"
    )
    for name, kind in kinds.items():
        before = prompts if kind else [[start]] * min(len(prompts), len(written) // options.tokens)
        if kind is None:
            ids = [tuple(written[i * options.tokens :][: options.tokens]) for i in range(len(before))]
        elif isinstance(kind, int):
            ids = [tuple(beam_search(role, p, -1, kind, options.tokens)[0]) for p in prompts]
        else:
            ids = [e.response for e in generate(role, prompts, kind, -1, seeded(1, name), 1).examples]
        logs = example_log_probs(role, [Example(tuple(p), r) for p, r in zip(before, ids, strict=True)])
        texts = [tokenizer.decode(r) for r in ids]
        onsets = [o for r in ids if (o := d.loop_onset(r)) is not None]
        onset = f"{torch.tensor(onsets).double().mean():.0f}" if onsets else "–"
        repeated = sum(d.seq_rep(r) for r in ids) / len(ids)
        distinct = len({g for r in ids for g in d.ngrams(r, 2)}) / sum(len(r) - 1 for r in ids)
        print(f"| {name} | {d.perplexity(logs):.2f} | {100 * len(onsets) / len(ids):.0f} | {onset} | {repeated:.3f} | {d.self_bleu(texts):.2f} | "
              f"{d.zipf_slope(texts):.2f} | {distinct:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
