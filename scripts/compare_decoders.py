"""Greedy, beam, top-k, nucleus and min-p side by side on the default model, as in Table 1 of Holtzman et al. 2020.

    python scripts/compare_decoders.py [--model M] [--prompts 24] [--tokens 96]

Each text continues the first words of a plain sentence of the embedded corpus, as a document, without its end token. People's texts are
such sentences in a row: for their repetition; their perplexity is that of a text whose sentences have nothing to do with each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from punster.api import Model, load
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
    print(
        "| decoder | perplexity | looping % | onset | seq-rep-4 | self-BLEU-4 | Zipf | distinct-2 |\n|---|---|---|---|---|---|---|---|"
    )
    for name, row in measured(load(options.model), options.prompts, options.tokens):
        onset = f"{row['onset']:.0f}" if "onset" in row else "–"
        print(f"| {name} | {row['perplexity']:.2f} | {100 * row['loops']:.0f} | {onset} | {row['seq_rep_4']:.3f} | {row['self_bleu']:.2f} | "
              f"{row['zipf']:.2f} | {row['distinct_2']:.2f} |", flush=True)  # fmt: skip


def measured(loaded: Model, count: int, tokens: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Each decoder's name and figures, for `count` texts of so many tokens."""
    role, tokenizer = loaded.role, loaded.tokenizer
    start = document_start(tokenizer)
    prompts = [[start, *tokenizer.text_ids(" ".join(r["plain"].split()[:5]))] for r in corpus.part("test")[:count]]
    kinds: dict[str, Decoding | int | None] = {
        "people": None, "greedy": Decoding(tokens, temperature=0), "beam 8": 8, "top-k 40": Decoding(tokens, top_k=40),
        "nucleus .95": Decoding(tokens, top_p=0.95), "min-p .05": Decoding(tokens, min_p=0.05),
        "sampling": Decoding(tokens),
    }  # fmt: skip
    written = tokenizer.text_ids(" ".join(r["plain"] for r in corpus.part("test")))
    for name, kind in kinds.items():
        before = prompts if kind else [[start]] * min(len(prompts), len(written) // tokens)
        if kind is None:
            ids = [tuple(written[i * tokens :][:tokens]) for i in range(len(before))]
        elif isinstance(kind, int):
            ids = [tuple(beam_search(role, p, -1, kind, tokens)[0]) for p in prompts]
        else:
            ids = [e.response for e in generate(role, prompts, kind, -1, seeded(1, name), 1).examples]
        logs = example_log_probs(role, [Example(tuple(p), r) for p, r in zip(before, ids, strict=True)])
        texts = [tokenizer.decode(r) for r in ids]
        onsets = [o for r in ids if (o := d.loop_onset(r)) is not None]
        found = {
            "perplexity": d.perplexity(logs), "loops": len(onsets) / len(ids), "seq_rep_4": sum(d.seq_rep(r) for r in ids) / len(ids),
            "self_bleu": d.self_bleu(texts), "zipf": d.zipf_slope(texts),
            "distinct_2": len({g for r in ids for g in d.ngrams(r, 2)}) / sum(len(r) - 1 for r in ids),
        }  # fmt: skip
        yield name, found | ({"onset": sum(onsets) / len(onsets)} if onsets else {})


if __name__ == "__main__":
    main()
