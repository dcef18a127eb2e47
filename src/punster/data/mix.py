"""Mixtures: the rows that a recipe (recipe.py) asks for, and the statement of what went in."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from punster.data import corpus
from punster.data.files import Say, not_written, read_rows
from punster.data.leakage import Index, without_repeats
from punster.data.offence import offensive
from punster.data.pairs import from_group, labelled, length_matched, ranked
from punster.data.pool import Pool, data_folder, embedded_evaluation, pool_of
from punster.data.prompts import prompted, pun_word_share, retopic, topic_key, with_prompts
from punster.data.recipe import DEFAULTS, REPLACED, Ingredient, Recipe, built_in, load_mixture
from punster.data.replace import chosen_pairs, foreign_pairs
from punster.data.schema import FIELDS, NAMES, Row, is_number, kind_of, texts_of
from punster.data.sources import SOURCES
from punster.errors import UserError, near_matches

KINDS = {"groups": "group", "ranked": "group", "pairs": "preference", "ratings": "text", "labels": "text"}  # of rows, by use
SINGLE = ("unpaired", "sft")  # labelled texts; of pairs' data, what has no label has a rating
# Columns of a file of one's own; in what was not prepared by us another, such as "topic", may mean anything.
KEPT = {*chain(*FIELDS.values()), *NAMES, "margin", "weight", "pass_share", "rating"}


# ---- building -----------------------------------------------------------------------------------------------------
def build(recipe: Recipe, folder: str | Path | None = None, say: Say | None = None) -> tuple[list[Row], Row]:
    """The rows of a mixture, and the statement of what went in and what was left out.

    folder: local copies of the public sources (default: PUNSTER_DATA); recipes of files alone need them for a wider guard only.
    """
    public = any(part.source not in ("", *corpus.OWN) for part in recipe.parts)
    pool = pool_of(data_folder(folder)) if public else None
    guard = _guard(recipe, pool, folder, say)
    rows: list[Row] = []
    statements = []
    for number, part in enumerate(recipe.parts):
        draw = random.Random(f"{recipe.seed}/{number}/{part.source}{part.file}")
        taken, said = _part(part, recipe, pool, guard, draw, say)
        rows += taken
        statements.append(said)
    statement: Row = {"kind": recipe.kind, "split": recipe.split, "seed": recipe.seed, "parts": statements}
    if recipe.kind == "sft":
        unique = list({id(row): row for row in rows}.values())  # a weight repeats the very rows, which are no repeats
        texts = [row["completion"] if "completion" in row else row["text"] for row in unique]
        kept = without_repeats(texts, recipe.repeats) if recipe.repeats else range(len(unique))
        stays = {id(unique[place]) for place in kept}
        statement["repeats_dropped"] = len(unique) - len(stays)
        rows = [row for row in rows if id(row) in stays]
    held_out = pool.held_out_prompts if pool and recipe.split == "train" else ()
    avoid = frozenset(topic_key(row["topic"]) for row in held_out)
    if recipe.kind != "preference" and any(part.source == "contrasts" for part in recipe.parts):
        avoid |= corpus.held_out_topics()
    if recipe.kind in ("sft", "prompt"):
        written = [row for row in rows if "completion" in row or "text" in row]
        asked = [row for row in rows if "completion" not in row and "text" not in row]  # prompts of one's own
        rows = [*with_prompts(written, avoid), *asked]
    else:
        # A group's new topic would be its best text's: the prompt would tell which one that is.
        grouped = lambda row: "group" in row or "completions" in row
        rows = [retopic(row, "" if grouped(row) else texts_of(row)[0], avoid) for row in rows]
    if recipe.kind == "prompt":
        rows = (
            pool.held_out_prompts if pool and recipe.split == "val" else list({str(row["prompt"]): row for row in rows}.values())
        )
        rows = [{k: v for k, v in row.items() if k != "completion"} for row in rows]
    random.Random(recipe.seed).shuffle(rows)
    statement |= {"pun_word_in_prompt": round(pun_word_share(rows), 4), "evaluation_texts": len(guard.sets) if guard else 0,
                  "rows": len(rows), "by_source": dict(Counter(row.get("source", "own") for row in rows).most_common()),
                  "not_open": sorted({p["licence"] for p in statements if not p["open"] and p["taken"]})}  # fmt: skip
    if not rows:
        why = lambda part: "".join(f", {count} {reason}" for reason, count in part["dropped"].items())
        raise UserError("the mixture is empty: " + "; ".join(f"{p['part']}: {p['read']} rows read{why(p)}" for p in statements))
    if say:
        for line in told(statement):
            say(line)
    return rows, statement


def _guard(recipe: Recipe, pool: Pool | None, folder: str | Path | None, say: Say | None) -> Index | None:
    """The evaluation texts that training rows are compared with: of all copies, for people's own files too where there are any.

    Own puns are near to no public text, as joke templates may be: alone they give the same rows with and without copies.
    """
    if recipe.split != "train" or not recipe.guard:
        return None
    if pool is None and any(part.file or part.use == "templates" for part in recipe.parts):
        try:
            pool = pool_of(data_folder(folder))
            return pool.evaluation
        except UserError as error:
            if folder:
                raise
            if say and pool:
                say(f"  compared with the embedded evaluation texts alone: {error}")
            return embedded_evaluation()
    return pool.evaluation if pool else embedded_evaluation()


def _part(
    part: Ingredient, recipe: Recipe, pool: Pool | None, guard: Index | None, draw: random.Random, say: Say | None
) -> tuple[list[Row], Row]:
    """The rows of one part, and its line in the statement."""
    rows, licence, is_open, rude = _source_rows(part, recipe, pool, say)
    statement: Row = {"part": part.source or part.file, "use": part.use, "licence": licence, "open": is_open, "read": len(rows)}
    rude = rude if part.filter is None else part.filter
    dropped: Counter[str] = Counter()
    kept = []
    for row in rows:
        reason = offensive(row, rude)
        if part.max_words and any(len(text.split()) > part.max_words for text in texts_of(row)):
            reason = "too long"
        if pool and row.get("semeval_id") in pool.flagged:
            reason = "called offensive by annotators"
        if part.file and recipe.kind == "sft" and part.use != "texts" and (unwanted := not_written(row)):
            reason = unwanted
        if not reason and guard and kind_of(row) != "group" and any(map(guard.has_near, texts_of(row))):
            reason = "near to an evaluation text"
        if reason:
            dropped[reason] += 1
        else:
            kept.append(row)
    if part.file and recipe.kind == "sft":
        kept = [row if row.get("source") in SOURCES else {k: v for k, v in row.items() if k != "is_pun"} for row in kept]
        kept, _ = prompted(kept, corpus.held_out_topics())
    made = _made(kept, part, recipe, draw)
    if guard and (part.use in REPLACED or any(kind_of(row) == "group" for row in kept)):
        clean = [row for row in made if not any(map(guard.has_near, texts_of(row)))]
        dropped["near to an evaluation text"] += len(made) - len(clean)
        made = clean
    if part.generic:
        made = [{**row, "prompt": part.prompt, "topic": None} for row in made]
    statement["available"] = len(made)
    if part.limit and len(made) > part.limit:
        made = draw.sample(made, part.limit)
    made = [dict(row) for row in made]  # rows of this part alone: another part may have them too
    made = made * int(part.weight) + draw.sample(made, round(part.weight % 1 * len(made)))
    if part.total:
        made = [{**row, "weight": part.total / len(made)} for row in made]
    if part.pass_share < 1:
        made = [{**row, "pass_share": part.pass_share} for row in made]
    if part.margin:
        made = [{**row, "margin": round(part.margin * row["gap"], 4)} if "gap" in row else row for row in made]
    drawn = {"pass_share": part.pass_share} if part.pass_share < 1 else {}
    return made, {**statement, "dropped": dict(dropped), "weight": part.weight, **drawn, "taken": len(made)}


def _source_rows(part: Ingredient, recipe: Recipe, pool: Pool | None, say: Say | None) -> tuple[list[Row], str, bool, bool]:
    """(rows, licence, open, rude) of a part before anything is left out."""
    if part.file:
        kind = {"preference": "judged", "sft": "written"}.get(recipe.kind, recipe.kind)
        rows = read_rows(part.file, kind, part.columns, recipe.split == "train", say)
        fitting = SINGLE if part.use == "labels" else [KINDS[part.use]] if part.use in KINDS else (*FIELDS,)
        rows = [row for row in rows if kind_of(row) in fitting or recipe.kind != "preference"]
        ours = lambda row, name: name in KEPT or (recipe.kind == "sft" and name == "is_pun") or row.get("source") in SOURCES
        rows = [{name: value for name, value in row.items() if ours(row, name) and value is not None} for row in rows]
        return [{"source": part.file, "id": f"{part.file}/{n}", **row} for n, row in enumerate(rows, 1)], "your own", True, False
    if part.source == "contrasts":
        made = corpus.contrast_rows(part.use, part.half) if recipe.kind == "preference" else corpus.contrast_puns(part.half)
        return list(made), "MIT", True, False
    if part.source == "embedded":
        if part.use == "templates":  # here rather than by --negatives: short templates are near to held-out puns on the same ones
            rows = list(corpus.template_rows("train" if recipe.split == "train" else "test"))
        elif part.use in corpus.NEGATIVES:
            rows = corpus.preference_rows((part.use,), recipe.split, recipe.seed)
        elif recipe.kind == "preference" and part.use not in REPLACED:
            rows = corpus.groups(recipe.split)
        else:
            rows = [{**row, "is_pun": True} for row in corpus.sft_rows(recipe.split)]
        return rows, "MIT", True, False
    assert pool is not None
    source = SOURCES[part.source]
    whole = pool.rows(part.source, recipe.split)
    rows = there = [row for row in whole if row["id"].startswith(part.ids)]
    if whole and not there:
        raise UserError(f"{part.source}: no id of {len(whole)} {recipe.split} rows begins {part.ids!r}")
    if part.use == "chosen":
        rows = [row for row in rows if f"{part.source}/{row['id']}" in corpus.replacements()]
    elif recipe.kind == "preference" and part.use not in REPLACED:
        wanted = KINDS.get(part.use)
        rows = [row for row in rows if kind_of(row) == wanted or (not wanted and kind_of(row) in ("group", "preference"))]
        rows = _rated(rows, part) if wanted == "text" else rows
    else:
        rows = [row for row in rows if kind_of(row) in ("sft", "text") and (part.use == "texts" or row.get("is_pun"))]
        rows = [row for row in rows if row.get("system", "human") == "human"]
    if there and not rows:
        asked = f"use: {part.use}" if part.use else "the default use"
        texts = recipe.kind != "preference" and part.use != "texts" and any(kind_of(row) == "text" for row in there)
        more = "; use: texts takes what is no pun, or not known to be one" if texts else ""
        raise UserError(f"{part.source}: {asked} finds nothing among {len(there)} {recipe.split} rows{more}")
    return rows, source.licence, source.open, source.rude


def _rated(rows: Sequence[Row], part: Ingredient) -> list[Row]:
    """The texts that have a number, or yes or no, under the name of `by`; UserError if none has, or all have the same yes or no."""
    is_rating = lambda value: isinstance(value, bool) or is_number(value)
    found = [row for row in rows if is_rating(row.get(part.by))]
    known = sorted({name for row in rows for name, value in row.items() if is_rating(value)})
    told = f"Its ratings: {', '.join(known) or 'none'}"
    if rows and not found:
        raise UserError(f"{part.source}: by: {part.by} is no rating of its texts.{near_matches(part.by, known)} {told}")
    if found and part.use == "ratings" and {str(row[part.by]) for row in found} in ({"True"}, {"False"}):
        raise UserError(f"{part.source}: by: {part.by} is {str(found[0][part.by]).lower()} of all texts that have it. {told}")
    both = part.by == "is_pun" or part.use == "labels"  # these need the texts that are no puns, too
    return [row for row in found if both or row.get("is_pun") is not False]


def _made(rows: Sequence[Row], part: Ingredient, recipe: Recipe, draw: random.Random) -> list[Row]:
    """What the recipe asks for, made of rows that may be used."""
    if recipe.kind != "preference":
        return list(rows)
    if part.use == "chosen":
        return chosen_pairs(rows, part.cap, part.prompt, draw, corpus.replacements())
    if part.use == "foreign":
        return foreign_pairs(rows, part.cap, part.prompt, draw)
    single = [row for row in rows if kind_of(row) in SINGLE]  # of a file: as they are
    if part.use == "labels":
        return single or labelled(rows, part.by, part.prompt)
    if part.use == "ranked":
        return [group for group in map(ranked, rows) if len(group["scores"]) > 1]
    pairs = [row for row in rows if kind_of(row) == "preference"]
    for group in (row for row in rows if kind_of(row) == "group"):
        pairs += from_group(group, part.gap, part.cap, draw)
    rated = [row for row in rows if kind_of(row) == "text"]
    return pairs + single + length_matched(rated, part.gap, part.cap, part.limit, part.prompt, draw, part.by)


def told(statement: Row) -> list[str]:
    """The statement in lines for people."""
    found = [f"{statement['rows']} rows ({statement['kind']}, {statement['split']}), of which:"]
    for part in statement["parts"]:
        dropped = ", ".join(f"{count} {reason}" for reason, count in part["dropped"].items() if count)
        origin = f"{part['taken']} taken of {part['available']} made of {part['read']} read, weight {part['weight']:g}"
        dropped = f"; dropped: {dropped}" if dropped else ""
        origin += f", a pass draws {part['pass_share']:.0%} of their families" if "pass_share" in part else ""
        found.append(f"  {' '.join(filter(None, (part['part'], part['use'])))}: {origin}{dropped} [{part['licence']}]")
    if statement.get("repeats_dropped"):
        found.append(f"  repeats dropped: {statement['repeats_dropped']}")
    share = f"prompts with the pun word in them: {statement['pun_word_in_prompt']:.1%}"
    found.append(f"  compared with {statement['evaluation_texts']} evaluation texts; {share}")
    if statement["not_open"]:
        found.append(f"  NOT cleared for commercial use: {'; '.join(statement['not_open'])}")
    return found


def is_mixture(name: str) -> bool:
    """A YAML file, or the name of a mixture that comes with the package (unless a file is called so)."""
    return name.endswith((".yaml", ".yml")) or (not Path(name).exists() and name in built_in())


def mixture(name: str, kind: str, folder: str | Path | None = None, say: Say | None = None) -> list[Row]:
    """Rows of a mixture for training; "puns" is the default mixture of the kind."""
    recipe = load_mixture(DEFAULTS[kind] if name == "puns" and kind in DEFAULTS else name)
    if recipe.kind != kind:
        raise UserError(f"{name}: this mixture has rows of the kind {recipe.kind}; {kind} is needed here")
    return build(recipe, folder, say)[0]
