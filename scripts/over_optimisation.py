"""Proxy and gold reward against exact KL over the checkpoints of a PPO or GRPO run: is its proxy over-optimised, and where to stop?

    python scripts/over_optimisation.py runs/demo/ppo [--prompts 64] [--samples 2]

The run must have kept its checkpoints (--save-every 1 --keep 100). SFT, reward and gold runs are taken from beside it. The result goes into
the run's summary.json as over_optimisation, and punster report RUN draws it. With a reward model of the other half of the data as --gold this
is the train-RM / test-RM split of Bai et al. 2022.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

from punster.algorithms.bestofn import selection_weights
from punster.data import corpus
from punster.evaluate.compare import by_prompt, exact_kl, shared_depths
from punster.evaluate.overoptimisation import split_at, summary_of
from punster.model.role import score_examples
from punster.model.saved import load_role
from punster.rollout.sampler import Decoding, generate
from punster.train.checkpoint import write_json
from punster.train.optim import seeded
from punster.train.setup import check_prompts, open_policy_role, open_reward_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--proxy", type=Path)
    parser.add_argument("--gold", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--best-of", type=int, default=8, help="samples a prompt of the reference for the best-of-n curve")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args()
    where = SimpleNamespace(device="auto", dtype="auto")
    beside = options.run.parent
    reference, tokenizer = open_policy_role(str(options.reference or beside / "sft"), where)
    proxy, gold = (
        open_reward_model(str(given or beside / name), where, reference, tokenizer)
        for given, name in ((options.proxy, "reward"), (options.gold, "gold"))
    )
    ids = check_prompts(tokenizer, reference.model, corpus.prompts("test")[: options.prompts], options.max_new_tokens)
    decoding = Decoding(options.max_new_tokens)
    rows = []
    folders = sorted((options.run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    for folder in [None, *folders]:
        role = reference
        if folder is not None:
            role = load_role(
                folder, device=reference.model.device, dtype=reference.model.dtype, base=reference.model, tokenizer=tokenizer
            )[0]
        count = options.samples if folder else max(options.samples, options.best_of)
        keep = shared_depths(role, reference) | {proxy.first_layer, gold.first_layer}
        rollout = generate(role, ids, decoding, tokenizer.eos_id, seeded(1, "over-optimisation"), count, keep=keep)
        scores = [score_examples(model, rollout.closed, rollout.trunk) for model in (proxy, gold)]
        means = [sum(values) / len(values) for values in scores]
        kl = exact_kl(role, reference, rollout, 1.0) if folder else 0.0
        length = sum(len(example.response) for example in rollout.examples) / len(rollout.examples)
        step = int(folder.name.removeprefix("step-")) if folder else 0
        rows.append({"step": step, "kl": kl, "proxy": means[0], "gold": means[1], "length": length})
        print(json.dumps(rows[-1]), flush=True)
        if folder is None:
            pairs = list(zip(*(by_prompt(values, count) for values in scores), strict=True))
            sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= count]
            best = {
                "n": sizes,
                "gold": [
                    sum(w * g for p, q in pairs for w, g in zip(selection_weights(p, n), q, strict=True)) / len(pairs)
                    for n in sizes
                ],
            }
    found = summary_of(rows, best)
    found["split_at"] = split_at([k**0.5 for k in found["kl"]], found["proxy"], found["gold"], 0.5)
    summary = json.loads((options.run / "summary.json").read_text()) if (options.run / "summary.json").is_file() else {}
    write_json(options.run / "summary.json", summary | {"over_optimisation": found})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
