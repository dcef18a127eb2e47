"""Texts of the field's baselines to the embedded test prompts, as files that punster evaluate takes beside runs.

    python scripts/baselines.py --out DIR [--model M] [--limit 40]
    punster evaluate base runs/demo/sft runs/demo/ppo DIR/surgen.jsonl DIR/joint.jsonl --limit 40 --samples 1

surgen: He et al. 2019, on the corpus's plain sentences. joint: Yu et al. 2018, under the prompt's topic and the alternative word.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from punster.api import load
from punster.data import corpus
from punster.puns.baselines import joint, surgen
from punster.train.optim import seeded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--limit", type=int, default=40)
    options = parser.parse_args()
    loaded = load(options.model)
    role, tokenizer = loaded.role, loaded.tokenizer
    sentences = [record["plain"] for record in corpus.records()]
    texts: dict[str, list[str]] = {"surgen": [], "joint": []}
    for record in corpus.part("test")[: options.limit]:
        word, other, stream = record["pun_word"], record["alternative_word"], seeded(1, record["id"])
        texts["surgen"].append(surgen(role, tokenizer, sentences, word, other, stream) or record["plain"])
        texts["joint"].append(joint(role, tokenizer, word, (record["topic"], other), stream))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, found in texts.items():
        lines = [json.dumps({"prompt": p, "completion": t}) for p, t in zip(corpus.prompts("test"), found, strict=False)]
        (options.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
