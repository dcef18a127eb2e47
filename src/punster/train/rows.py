"""Rows that a verb is given, by name or from Python, and their texts as ids, within the context or --max-length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from punster.config import DpoConfig, PolicyConfig, RewardConfig, TrainConfig
from punster.data import corpus
from punster.data.batch import Example
from punster.data.files import not_written, read_rows
from punster.data.mix import is_mixture, mixture
from punster.data.prompts import prompted
from punster.data.schema import Row, check_row, texts_of
from punster.errors import UserError, speaker
from punster.model.tokenizer import Tokenizer
from punster.model.transformer import Decoder


def kind_of_rows(config: TrainConfig) -> str:
    """The schema of what a verb learns from: "sft", "preference", "unpaired" (KTO), "judged", or "prompt" alone."""
    if isinstance(config, RewardConfig):
        return "judged"
    if isinstance(config, PolicyConfig) or (isinstance(config, DpoConfig) and config.makes_pairs):
        return "prompt"
    if isinstance(config, DpoConfig):
        return "unpaired" if config.loss_type == "kto" else "preference"
    return "sft"


def embedded_rows(kind: str, split: str = "train") -> list[Row]:
    """What "embedded" stands for (but for reward models, which have --negatives to train on)."""
    if kind == "sft":
        return corpus.sft_rows(split)
    if kind == "prompt":
        return [{"prompt": prompt} for prompt in corpus.prompts(split)]
    return corpus.unpaired(corpus.pairs(split)) if kind == "unpaired" else corpus.pairs(split)


def load_rows(
    sources: Sequence[str] | Sequence[Row],
    kind: str,
    embedded: Callable[[], Sequence[Row]] | None = None,
    columns: Sequence[str] = (),
    quiet: bool = False,
    training: bool = True,
) -> list[Row]:
    """Rows of files, mixtures and the embedded corpus (as `embedded_rows` has it, unless `embedded` makes it), in the order given.

    quiet: without what mixtures tell of themselves, and folders of what is left out. training: of a folder as `located_rows` has it.
    """
    rows: list[Row] = []
    schema = "written" if kind == "sft" else kind
    for source in sources:
        if isinstance(source, dict):
            where = f"row {'' if training else 'of --eval-data '}{len(rows) + 1}"
            rows.append({"_place": where, **check_row(source, schema, where)})
        elif source == "embedded":
            rows += embedded() if embedded else embedded_rows(kind, "train" if training else "val")
        elif not is_mixture(source):
            rows += read_rows(source, schema, columns, training, speaker(quiet), placed=True)
        elif kind == "unpaired":
            raise UserError(
                f"{source}: --loss-type kto learns from embedded or files with prompt, completion and label; this is a mixture"
            )
        else:
            found = mixture(source, "preference" if kind == "judged" else kind, say=speaker(quiet))
            if kind == "preference" and not all("chosen" in row for row in found):
                raise UserError(
                    f"{source}: some of its rows are no pairs (ranked groups, labels), from which only reward models learn"
                )
            rows += found
    if not rows:
        raise UserError("no rows of data were given")
    return asked(rows, quiet) if kind == "sft" else rows


def asked(rows: Sequence[Row], quiet: bool) -> list[Row]:
    """Texts as completions, as in a mixture: with a prompt, on no topic of the embedded held-out part, and without what is no pun."""
    why = list(map(not_written, rows))
    reasons = Counter(filter(None, why))
    for reason, count in reasons.items():
        speaker(quiet)(f"  {count} of {len(rows)} rows left out: their text is {reason}")
    kept = [row for row, reason in zip(rows, why, strict=True) if reason is None]
    if not kept:
        raise UserError(f"no row is left: their text is {' or '.join(reasons)}")
    if all(row.get("completion") is not None for row in kept):
        return kept
    found, bare = prompted(kept, corpus.held_out_topics())
    if bare:
        speaker(quiet)(f"  {len(bare)} of {len(rows)} rows have no prompt and get one (the first: {bare[0]['prompt']!r})")
    return found


def load_prompts(source: str | Sequence[Any], split: str = "train", quiet: bool = False) -> list[Any]:
    if not isinstance(source, str):
        if not source:
            raise UserError("no prompts were given")
        rows = [prompt if isinstance(prompt, dict) else {"prompt": prompt} for prompt in source]
        return [check_row(row, "prompt", f"prompt {number}")["prompt"] for number, row in enumerate(rows, 1)]
    if source == "embedded":
        return corpus.prompts(split)
    if is_mixture(source):
        name = "eval-prompts" if source == "puns" and split != "train" else source
        return [row["prompt"] for row in mixture(name, "prompt", say=speaker(quiet))]
    return [row["prompt"] for row in read_rows(source, "prompt", (), split == "train", speaker(quiet))]


# ---- as ids -------------------------------------------------------------------------------------------------------
def encode(tokenizer: Tokenizer, model: Decoder, row: Row, side: str = "completion", where: str = "") -> Example:
    """Prompt and one answer of a row as ids; UserError, naming the row's file and line or else `where`, if the context has no room.

    "_prompt_ids" and "_completion_ids" (or "_chosen_ids", ...) are what was cut or sampled, and is never tokenised again.
    """
    prompt = row.get("_prompt_ids") or tokenizer.prompt_ids(row["prompt"])
    example = Example(tuple(prompt), tuple(row.get(f"_{side}_ids") or tokenizer.response_ids(row[side])))
    limit, where = model.config.max_positions, row.get("_place") or where or "a row"
    if example.length > limit:
        raise UserError(
            f"{where}: {example.length} tokens, but the model's context is {limit}; shorten the prompt or the text (--max-length of "
            "sft, reward and dpo does)"
        )
    if not example.prompt:
        raise UserError(f"{where}: the prompt has no tokens in this prompt format")
    return example


def longest_answer(row: Row, tokenizer: Tokenizer) -> int:
    """Tokens of the longest text of a row; of a sampled one as it was sampled."""
    sides = [side for side in ("completion", "chosen", "rejected") if row.get(side) is not None]
    texts = [row.get(f"_{side}_ids") or tokenizer.response_ids(row[side]) for side in sides]
    return max(map(len, texts or map(tokenizer.response_ids, texts_of(row))))


def fits(row: Row, tokenizer: Tokenizer, model: Decoder) -> bool:
    """Whether all texts of a row fit into the context behind its prompt."""
    room = model.config.max_positions - len(row.get("_prompt_ids") or tokenizer.prompt_ids(row["prompt"]))
    return longest_answer(row, tokenizer) <= room


def without_long_contrasts(rows: Sequence[Row], tokenizer: Tokenizer, model: Decoder, quiet: bool) -> list[Row]:
    """Contrasts that a short context has no room for are left out and counted; any other such row is refused when it is encoded."""
    kept = [row for row in rows if row.get("source") != "contrasts" or fits(row, tokenizer, model)]
    if len(kept) < len(rows):
        speaker(quiet)(f"  {len(rows) - len(kept)} of {len(rows)} rows left out: contrasts longer than the model's context")
    if not kept:
        raise UserError("no row is left: all are longer than the model's context")
    return kept


def within_length(
    limit: int, rows: Sequence[Row], tokenizer: Tokenizer, model: Decoder, quiet: bool, what: str = "row"
) -> list[Row]:
    """Rows of at most `limit` tokens (--max-length; 0: all, as they are), what was cut and left out being said.

    A longer row loses the beginning of its prompt, on all sides alike, never EOS; where an answer alone is longer it is left out.
    """
    if not limit:
        return list(rows)
    if limit > model.config.max_positions:
        raise UserError(f"--max-length {limit}: the model's context is {model.config.max_positions} tokens")
    kept, cut, what = [], 0, what.replace("row", "rows", 1)
    for row in rows:
        prompt = tokenizer.prompt_ids(row["prompt"])
        if (room := limit - longest_answer(row, tokenizer)) >= 1:
            kept.append({**row, "_prompt_ids": prompt[-room:]} if len(prompt) > room else row)
            cut += len(prompt) > room
    if rows and not kept:
        raise UserError(f"--max-length {limit}: each of {len(rows)} {what} has an answer that alone is longer")
    if cut or len(kept) < len(rows):
        speaker(quiet)(
            f"  --max-length {limit}: {cut} prompts cut at their beginning, {len(rows) - len(kept)} of {len(rows)} {what} left out"
        )
    return kept


def encode_rows(
    tokenizer: Tokenizer, model: Decoder, rows: Sequence[Row], quiet: bool, limit: int = 0, what: str = "row"
) -> tuple[list[Row], list[Example]]:
    """Rows to learn to write that are not too long, and their examples; an error names a row by its place as given."""
    placed = [{"_place": f"{what} {number}", **row} for number, row in enumerate(rows, 1)]
    kept = (
        within_length(limit, placed, tokenizer, model, quiet, what)
        if limit
        else without_long_contrasts(placed, tokenizer, model, quiet)
    )
    return kept, [encode(tokenizer, model, row) for row in kept]


def held_out_name(data: Sequence[str]) -> str:
    """Whose held-out prompts show what a model learns from these data: "embedded" for our own puns, "puns", or "" for neither."""
    ours = {"embedded", "own-puns", "demo-puns"}
    return "embedded" if ours & set(data) else "puns" if "puns" in data else ""


def check_prompts(
    tokenizer: Tokenizer, model: Decoder, prompts: Sequence[Any], new_tokens: int, what: str = "prompt"
) -> list[list[int]]:
    """All prompts as ids; UserError naming the first that leaves no room for new tokens."""
    limit = model.config.max_positions
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        ids = tokenizer.prompt_ids(prompt)
        if not ids:
            raise UserError(f"{what} {number} has no tokens in this prompt format")
        if len(ids) + new_tokens > limit:
            raise UserError(
                f"{what} {number} has {len(ids)} tokens; with {new_tokens} new ones it exceeds the context of {limit} tokens. Shorten it."
            )
        encoded.append(ids)
    return encoded
