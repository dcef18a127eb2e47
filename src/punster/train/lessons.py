"""What a reward model learns from: which rows, what a step draws of them, and the held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from punster.config import RewardConfig
from punster.data import corpus
from punster.data.batch import Example, epoch_order
from punster.data.schema import Row
from punster.errors import UserError, near_matches, speaker
from punster.model.role import Role
from punster.model.tokenizer import Tokenizer
from punster.model.transformer import Decoder
from punster.rollout.sampler import Decoding, generate
from punster.train.halves import halves_of
from punster.train.judged import Item, balanced, encode_items, families, neutral, shuffled, source_of, weighed
from punster.train.optim import Cursor, rows_used, seeded, total_steps
from punster.train.rows import fits, load_rows, within_length, without_long_contrasts

SAMPLED = 40  # tokens of a sample of the SFT model


@dataclass(frozen=True)
class Lessons:
    """Texts, what people said of them, and what the steps draw: rows about one text or group (--families), or single rows."""

    examples: list[Example]
    items: list[Item]
    first: list[list[int]]  # rows of each unit of --pretrain, which is passed whole, before the rest
    units: list[list[int]]  # the same of --data
    shares: list[float]  # with which a pass has each of these
    bags: list[Sequence[int]]  # of these, what each member learns from
    in_families: bool

    @classmethod
    def of(
        cls, config: RewardConfig, first: Sequence[Row], given: Sequence[Row], tokenizer: Tokenizer, model: Decoder
    ) -> Lessons:
        examples, items = encode_items([*first, *given], tokenizer, model)
        parts = [families(part) if config.families else [[place] for place in range(len(part))] for part in (first, given)]
        units = [[len(first) + place for place in unit] for unit in parts[1]]
        # The largest of its rows'; a row without one is in every pass.
        shares = [max(float(given[place].get("pass_share") or 1.0) for place in unit) for unit in parts[1]]
        for unit, share in zip(units, shares, strict=True):
            for row in unit:  # what is drawn less often counts more when it is
                items[row] = replace(items[row], weight=items[row].weight / share)
        bags = [bag(len(units), config, number) for number in range(config.members)]
        return cls(examples, items, parts[0], units, shares, bags, config.families)

    @property
    def uneven(self) -> bool:
        """Whether passes leave something out."""
        return min(self.shares) < 1

    def bag_shares(self, member: int) -> list[float]:
        """As a cursor over the member's bag takes them."""
        return [self.shares[place] for place in self.bags[member]] if self.uneven else []

    def steps(self, config: RewardConfig) -> tuple[int, int]:
        """Steps of --pretrain, and of the whole."""
        first = math.ceil(len(self.first) / config.batch_size)
        drawn = sum(self.shares) * len(self.bags[0]) / len(self.shares)
        return first, config.steps or first + total_steps(config, drawn, config.epochs)

    @cached_property
    def whole(self) -> tuple[list[Example], float, float]:
        """Texts; how many passes over all of their tokens one pass makes; and how many units that draws."""
        # In families each text runs once a step, and about half of its tokens are a prefix of another (as in `stage_work`).
        texts, once = (list(dict.fromkeys(self.examples)), 0.5) if self.in_families else (self.examples, 1.0)
        lengths = [sum(e.length for e in {self.examples[text] for row in unit for text in self.items[row].texts})
                   for unit in chain(self.first, self.units)]  # fmt: skip
        shares = [1.0] * len(self.first) + self.shares
        once *= sum(length * share for length, share in zip(lengths, shares, strict=True)) / sum(lengths)
        return texts, once, sum(shares)

    def work(self, config: RewardConfig) -> tuple[list[Example], float]:
        """Texts, and how many passes over all of their tokens the steps make."""
        texts, once, drawn = self.whole
        return texts, once * self.steps(config)[1] * config.batch_size * config.members / drawn

    def cursors(self, member: int, seed: int) -> dict[str, Cursor]:
        """A member's places in --pretrain ("first"), if there is any, and in its bag ("data")."""
        seed = member_seed(seed, member)
        first = {"first": Cursor(len(self.first), seeded(seed, "data"))} if self.first else {}
        return first | {"data": Cursor(len(self.bags[member]), seeded(seed, "data"), self.bag_shares(member))}

    def draw(self, member: int, cursors: dict[str, Cursor], pretrain: bool, count: int) -> tuple[list[Item], float]:
        """One step's items, and the rows that its units stand for on average: bags are alike in that."""
        if pretrain:
            units = [self.first[place] for place in cursors["first"].next(count)]
            rows_a_unit = sum(map(len, self.first)) / len(self.first)
        else:
            units = [self.units[self.bags[member][place]] for place in cursors["data"].next(count)]
            rows_a_unit = sum(map(len, self.units)) / sum(self.shares)
        return [self.items[row] for unit in units for row in unit], len(units) * rows_a_unit

    def texts_used(self, config: RewardConfig) -> set[int]:
        """Places of the texts that any step of any member sees."""
        first, steps = self.steps(config)
        rows = {row for unit in self.first for row in unit}
        for member, places in enumerate(self.bags):
            count = (steps - first) * config.batch_size
            for place in rows_used(len(places), member_seed(config.seed, member), count, self.bag_shares(member)):
                rows.update(self.units[places[place]])
        return {text for row in rows for text in self.items[row].texts}


# ---- rows ---------------------------------------------------------------------------------------------------------
def lesson_rows(
    config: RewardConfig, rows: Sequence[Row] | None, sampled_from: Role, tokenizer: Tokenizer
) -> tuple[list[Row], list[Row]]:
    """Rows of --pretrain and of --data (or these), as the settings have them halved, balanced, shuffled, neutral and weighed."""
    first = named_rows(config, config.pretrain, sampled_from, tokenizer) if config.pretrain else []
    given = named_rows(config, config.data if rows is None else rows, sampled_from, tokenizer)
    check_without(config, first + given)  # a source may be in one of the two alone
    prepared = []
    for found in (first, given):
        found = of_half(config, found) if found else []
        found = balanced(found, tokenizer) if config.balance else found
        found = neutral(shuffled(found, config), config.neutral, config.seed)
        prepared.append(weighed(within_length(config.max_length, found, tokenizer, sampled_from.model, config.quiet)))
    if not prepared[1]:
        raise UserError("there is no data to train on")
    return prepared[0], prepared[1]


def named_rows(
    config: RewardConfig, sources: Sequence[str] | Sequence[Row], sampled_from: Role, tokenizer: Tokenizer
) -> list[Row]:
    """All rows that are named, negatives included that are sampled from the SFT model."""
    rows = load_rows(sources, "judged", lambda: embedded_pairs(config, sampled_from, tokenizer), config.columns, config.quiet)
    return rows if config.max_length else without_long_contrasts(rows, tokenizer, sampled_from.model, config.quiet)


def check_without(config: RewardConfig, rows: Sequence[Row]) -> None:
    """Refuse a source in --without that no row is of."""
    sources = {source_of(row) for row in rows} - {""}
    for name in config.without:
        if name not in sources:
            raise UserError(
                f"--without {name}: no row is of this source.{near_matches(name, sources)} Found: {', '.join(sorted(sources))}"
            )


def of_half(config: RewardConfig, rows: Sequence[Row]) -> list[Row]:
    """The rows of --half, less those of the sources in --without."""
    kept = list(rows)
    if config.half:
        halves = halves_of(rows)
        kept = [row for row, half in zip(rows, halves, strict=True) if half == config.half]
        nowhere = halves.count(0)
        told = f", {nowhere} are in neither half (pairs of two texts that fell apart)" if nowhere else ""
        speaker(config.quiet)(f"  half {config.half}: {len(kept)} of {len(rows)} rows{told}")
    kept = [row for row in kept if source_of(row) not in config.without]
    if not kept:
        half, without = config.half and f" in half {config.half}", config.without and f" without {', '.join(config.without)}"
        raise UserError(f"no row is left{half or ''}{without or ''}")
    return kept


def bag(rows: int, config: RewardConfig, number: int) -> Sequence[int]:
    """The rows that a member learns from: all of them, or of an ensemble's a drawn four fifths."""
    if config.members == 1:
        return range(rows)
    return epoch_order(rows, seeded(member_seed(config.seed, number), "bag"))[: math.ceil(0.8 * rows)]


def member_seed(seed: int, number: int) -> int:
    """Of an ensemble's member: the run's own for the first, and far apart, so that runs of seeds 1 and 2 share no member."""
    return seed + 1_000_003 * number


def judged_pairs(config: RewardConfig, own: Sequence[Row], tokenizer: Tokenizer, model: Decoder) -> list[Row]:
    """Held-out pairs of which both texts fit into the context: those of --eval-data (`own`), else of the embedded corpus."""
    pairs = [row for row in own or corpus.pairs("val") if "chosen" in row]
    if own and config.max_length:
        return within_length(config.max_length, pairs, tokenizer, model, config.quiet, "row of --eval-data")
    kept = [row for row in pairs if fits(row, tokenizer, model)]
    if own and len(kept) < len(pairs):
        speaker(config.quiet)(
            f"  {len(pairs) - len(kept)} of {len(pairs)} pairs of --eval-data left out: longer than the model's context"
        )
    if own and not kept:
        raise UserError("--eval-data: none of its pairs fits into the model's context")
    return kept


def embedded_pairs(config: RewardConfig, policy: Role, tokenizer: Tokenizer) -> list[Row]:
    """Pairs of the embedded corpus; the kind "sampled" puts human puns against samples of the SFT model."""
    rows = corpus.preference_rows([kind for kind in config.negatives if kind in corpus.NEGATIVES], config.split, config.seed)
    if config.rows_per_kind:
        order = epoch_order(len(rows), seeded(config.seed, "rows"))
        by_kind = {kind: [rows[i] for i in order if rows[i]["kind"] == kind][: config.rows_per_kind] for kind in config.negatives}
        rows = [row for kind in config.negatives for row in by_kind[kind]]
    rows += corpus.template_rows() if "template" in config.negatives and config.split == "train" else ()
    if "sampled" in config.negatives and config.sampled_rows:
        room = policy.model.config.max_positions - SAMPLED
        people = [record for record in corpus.part(config.split) if len(tokenizer.prompt_ids(record["prompt"])) <= room]
        if not people:
            raise UserError(f"--negatives sampled: no prompt leaves room for a sample of {SAMPLED} tokens")
        people = [people[i] for i in epoch_order(len(people), seeded(config.seed, "negatives"))][: config.sampled_rows]
        ids = [tokenizer.prompt_ids(record["prompt"]) for record in people]
        examples = sft_samples(policy, tokenizer, ids, config.seed, "negatives")
        written: list[Row] = [
            {"prompt": record["prompt"], "chosen": record["pun"], "rejected": text, "kind": "sampled", "id": record["id"],
             "_rejected_ids": list(example.response)}  # kept, so that the rejected text is what the policy emitted
            for record, example in zip(people, examples, strict=True) if (text := tokenizer.decode(example.response))
        ]  # fmt: skip
        kept = balanced(written, tokenizer)
        if len(kept) < len(written):
            told = "the longer text is the person's as often as the model's"
            speaker(config.quiet)(f"  sampled: {len(kept)} of {len(written)} pairs are kept, in which {told}")
        rows += kept
    if not rows and not config.sampled_rows:
        raise UserError("--sampled-rows 0 leaves no pair of the embedded corpus; give more of them, or other --negatives")
    return rows


def drawn_prompts(policy: Role, tokenizer: Tokenizer, rows: Sequence[Row], count: int, seed: int) -> list[list[int]]:
    """So many of the rows' prompts, as ids, that leave room for a sample, in a drawn order, over and over; UserError if none does."""
    if not count:
        return []
    room = policy.model.config.max_positions - SAMPLED
    distinct = dict.fromkeys(tuple(row.get("_prompt_ids") or tokenizer.prompt_ids(row["prompt"])) for row in rows)
    fitting = [list(ids) for ids in distinct if len(ids) <= room]
    if not fitting:
        raise UserError(
            f"no prompt leaves room for a sample of {SAMPLED} tokens, which the score is normalised on; use --normalise-samples 0"
        )
    order = epoch_order(len(fitting), seeded(seed, "normalise prompts"))  # not the first file's alone
    return [fitting[order[i % len(fitting)]] for i in range(count)]


def sft_samples(policy: Role, tokenizer: Tokenizer, ids: Sequence[Sequence[int]], seed: int, stream: str) -> list[Example]:
    """One sample of the SFT model to each tokenised prompt."""
    return generate(policy, ids, Decoding(SAMPLED), tokenizer.eos_id, seeded(seed, stream)).closed
