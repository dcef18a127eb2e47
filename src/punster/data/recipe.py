"""A mixture's recipe in YAML: sources and files, what is made of them and how much. Read and checked here, built in mix.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from punster.data import corpus
from punster.data.prompts import GENERIC_PROMPT
from punster.data.schema import Row
from punster.data.sources import find_source
from punster.data.sources.reading import read_text
from punster.errors import UserError, near_matches


@dataclass
class Ingredient:
    """One entry of a recipe: rows of a source, or of a file of one's own."""

    source: str = ""  # of the catalogue, or "embedded" or "contrasts", which come with the package
    file: str = ""
    columns: list[str] = field(default_factory=list)
    # Default: what the source has. ranked: groups as they are; labels: single texts with is_pun and their rating;
    # foreign, chosen: puns against themselves with a word in the pun word's place that is another pun's, or was chosen for the text.
    use: str = ""  # see USES
    ids: str = ""  # only rows whose id begins so
    half: int = 0  # contrasts: 1 or 2, for two models that must share no pun word (0: all)
    weight: float = 1.0  # below 1: a drawn share of the rows; above: rows repeated
    total: float = 0.0  # preference: what the rows together count in the loss (0: each counts 1)
    pass_share: float = 1.0  # preference: the share of the families (or rows) that a pass draws, each counting more for it
    limit: int = 0  # at most so many rows, drawn (0: all)
    cap: int = 10  # groups: pairs of one group; ratings, foreign, chosen: pairs of one text
    gap: float = 0.0  # smallest difference in score or rating that makes a pair
    by: str = "rating"  # the rating that is compared
    margin: float = 0.0  # margin of a pair = this x its gap (0: none)
    max_words: int = 0
    prompt: str = GENERIC_PROMPT  # of pairs made of ratings
    generic: bool = False  # preference: every row has the part's `prompt`, whatever its own is
    filter: bool | None = None  # offensive words: default as the catalogue has it


@dataclass
class Recipe:
    kind: Literal["sft", "preference", "prompt"] = "preference"
    split: Literal["train", "val"] = "train"
    seed: int = 1
    repeats: float = 0.7  # sft: of texts this near to each other only the first stays (0: all stay)
    guard: bool = True  # train: texts near to an evaluation text (Jaccard >= .5) are dropped
    parts: list[Ingredient] = field(default_factory=list)


REPLACED = ("foreign", "chosen")
# What can be made of a part in a recipe of pairs: of a file, of each of our own corpora, of any other source. Else: puns or texts.
USES = {"file": ("", "groups", "ranked", "pairs", "labels"), "contrasts": corpus.CONTRASTS,
        "embedded": ("", "groups", "ranked", "templates", *corpus.NEGATIVES, "foreign"),
        "public": ("", "groups", "ranked", "pairs", "ratings", "labels", *REPLACED)}  # fmt: skip
DEFAULTS = {"sft": "puns", "preference": "preferences", "prompt": "prompts"}


# ---- the recipe ---------------------------------------------------------------------------------------------------
def recipe_folder() -> Path:
    """Recipes ship inside the package; in a checkout they lie at its root."""
    packaged = Path(str(files("punster"))) / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[3] / "recipes"


def built_in() -> dict[str, Path]:
    """The mixtures that come with the package."""
    return {file.stem: file for file in sorted((recipe_folder() / "data").glob("*.yaml"))}


def recipe_path(name: str) -> Path:
    if not name.endswith((".yaml", ".yml")):
        if name in (known := built_in()):
            return known[name]
        raise UserError(f"unknown mixture {name!r}.{near_matches(name, known)} Known: {', '.join(known)}; or a .yaml file")
    if not Path(name).is_file():
        raise UserError(f"{name}: no such file")
    return Path(name)


def load_mixture(name: str) -> Recipe:
    path = recipe_path(name)
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML ({getattr(error, 'problem', None) or error})") from None
    recipe = Recipe(**_checked(content, Recipe, str(path)))
    if not isinstance(recipe.parts, list) or not recipe.parts:
        raise UserError(f"{path}: 'parts' must be a list of sources or files")
    if not 0 <= recipe.repeats <= 1:
        raise UserError(f"{path}: repeats must lie in [0, 1], found {recipe.repeats}")
    for number, given in enumerate(recipe.parts):
        where = f"{path}, part {number + 1}"
        part = recipe.parts[number] = Ingredient(**_checked(given, Ingredient, where))
        if fault := next((told for wrong, told in _faults(part, recipe) if wrong), None):
            raise UserError(f"{where}: {fault}")
        if part.file and not Path(part.file).exists() and (path.parent / part.file).exists():
            part.file = str(path.parent / part.file)
    return recipe


def _faults(part: Ingredient, recipe: Recipe) -> Iterator[tuple[Any, str]]:
    """What may be wrong with a part: whether it is, and what to say then."""
    ours, pairs, training = part.source in corpus.OWN, recipe.kind == "preference", recipe.split == "train"
    yield bool(part.source) == bool(part.file), "give either a source or a file"
    barred = part.source and not ours and find_source(part.source).tie == "none" and training
    yield barred, f"{part.source} is for the validation of metrics only; nothing trains on it"
    yield part.weight > 1 and recipe.kind == "prompt", "prompts are taken once each, so weight must be at most 1"
    yield part.ids and (part.file or ours), "ids is for public sources"
    yield part.columns and not part.file, "columns is for files"
    yield (part.total or part.margin) and not pairs, "total and margin are for kind: preference"
    yield part.margin and part.use not in ("", "groups", "ratings"), "margin is for pairs made of groups or ratings"
    yield (
        not 0.01 <= part.pass_share <= 1 or (part.pass_share < 1 and not pairs),
        "pass_share must lie in [.01, 1], and is for kind: preference",
    )
    least = min(part.limit, part.cap, part.gap, part.total)
    yield part.weight <= 0 or least < 0, "weight must be above 0; limit, cap, gap and total at least 0"
    yield part.source == "contrasts" and not training, "contrasts are for training alone: split: train"
    allowed = USES["file" if part.file else part.source if ours else "public"] if pairs else ("", "puns", "texts")
    named = f"use of {part.source or 'a file'} must be one of {', '.join(filter(None, allowed))} (kind: {recipe.kind})"
    yield part.use not in allowed, f"{named}, found {part.use!r}"
    unread = part.file and recipe.kind == "prompt" and not training
    yield unread, "the prompts of split: val are those of the public sources, not of a file"
    chosen = part.ids or part.limit or part.max_words or part.weight != 1 or part.filter is not None
    fixed = chosen and part.source and not ours and recipe.kind == "prompt" and not training
    yield (
        fixed,
        "the prompts of split: val are all on held-out topics; ids, limit, max_words, weight and filter choose none of them",
    )
    yield part.half not in range(3 if part.source == "contrasts" else 1), "half must be 1 or 2, and contrasts alone have halves"
    yield part.generic and not pairs, "generic is for kind: preference"
    if part.use == "chosen":
        known = sorted({key.split("/")[0] for key in corpus.replacements()})
        yield part.source not in known, f"words were chosen for {', '.join(known)} alone"
        yield not training, "words were chosen for puns of the training part: use: chosen is for split: train"
    yield part.use in ("ratings", *REPLACED) and not part.cap, f"cap must be at least 1 for pairs made of {part.use}"


def _checked(content: Any, kind: type, where: str) -> Row:
    """The keys of a mapping, known and of the type that the dataclass says."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a mapping with keys such as {', '.join(f.name for f in fields(kind)[:4])}")
    hints = get_type_hints(kind)
    for key, value in content.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key {key!r}.{near_matches(str(key), hints)}")
        choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
        if choices and value not in choices:
            raise UserError(f"{where}: {key} must be one of {', '.join(filter(None, choices))}, found {value!r}")
        expected, fits = _KINDS.get(hints[key], ("", None))
        if fits and not fits(value):
            raise UserError(f"{where}: {key} must be {expected}, found {value!r}")
    return content


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("text", lambda value: isinstance(value, str)),
    float: ("a number", lambda value: type(value) in (int, float) and abs(value) < 1e9),  # nor infinite, nor "not a number"
    int: ("a whole number", lambda value: type(value) is int),
    **dict.fromkeys((bool, bool | None), ("true or false", lambda value: isinstance(value, bool))),
    list[str]: ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value)),
}
