"""The verbs of the command line; thin: parse, call, print."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import punster
from punster.config import EvaluateConfig, PipelineConfig
from punster.config.parsing import parse, parsed_values, parser_for, simple_parser
from punster.data.verbs import check_folder, check_target, data, input_files, keep_inputs
from punster.disk import write_text
from punster.errors import Aborted, UserError, near_matches
from punster.safe import json_line, plain

USAGE = """punster: RLHF for small language models, made for puns

  punster run [RECIPE|FILE.yaml]     sft -> reward -> ppo, grpo, dpo, best-of-n -> evaluate -> report (try: punster run demo)
  punster sft|reward|ppo|grpo|dpo|distill -n NAME ...     one stage
  punster generate RUN|MODEL PROMPT [-k 8]                write puns (--prompts FILE: to many prompts, as JSON lines)
  punster score REWARD-RUN FILE.jsonl                     score texts
  punster evaluate RUN [base] [RUN ...]                   compare on held-out prompts
  punster report RUN [RUN ...]                            report.html and model card; several: one page that compares them
  punster data list|prepare|check|mix                     public pun sources, your own files, mixtures of them
  punster export RUN --format hf|peft --out DIR           for transformers and peft
  punster doctor                                          versions, machine, cache, speed

'punster VERB --help' lists a verb's options.
"""


# The settings and the function of each training verb, by their names in the Python API.
TRAINING = {
    "sft": ("SftConfig", "sft"), "reward": ("RewardConfig", "train_reward"), "ppo": ("PpoConfig", "ppo"),
    "grpo": ("GrpoConfig", "grpo"), "dpo": ("DpoConfig", "dpo"), "distill": ("DistillConfig", "distill"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 usage or bad input, 1 failure, 130 or 143 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal without our characters shows their numbers
            stream.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"punster {punster.__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print(f"punster: unknown command {verb!r}.{near_matches(verb, VERBS)} See 'punster --help'.", file=sys.stderr)
        return 2
    try:
        code = dispatch(verb, rest)
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
        return code
    except (UserError, Aborted) as error:
        print(f"punster {verb}: {plain(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 128 + int(getattr(error, "number", signal.SIGINT))
    except BrokenPipeError:  # of a reader who has seen enough: what is left in the buffer must not fail once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"punster {verb}: {plain(place + (error.strerror or str(error)))}", file=sys.stderr)
        return 1 if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO) or not place else 2
    except Exception as error:
        return unexpected(verb, error)


def unexpected(verb: str, error: Exception) -> int:
    """A fault of punster itself: one line, and the traceback where a bug report can take it from."""
    from punster.train.optim import out_of_memory
    from punster.train.run import crash_report

    if out_of_memory(error):
        print(f"punster {verb}: out of memory ({plain(str(error))}); what was saved is whole", file=sys.stderr)
        return 1
    if not getattr(error, "__notes__", None):  # a run has written its own already
        crash_report(Path(tempfile.mkdtemp(prefix="punster-")), error, verb=verb)
    where = "; ".join(getattr(error, "__notes__", [])) or "this line"  # a report that could not be written
    print(
        f"punster {verb}: unexpected {plain(f'{type(error).__name__}: {error}')}; please report it with {where}", file=sys.stderr
    )
    return 1


def dispatch(verb: str, rest: list[str]) -> int:
    if verb in HANDLERS:
        return HANDLERS[verb](rest)
    kind, train = TRAINING[verb]
    config = parse(verb, getattr(punster, kind), rest)  # before torch is loaded: help and mistakes are answered at once
    folder = getattr(punster, train)(config)
    if folder is not None:
        print(folder)
    return 0


# ---- verbs --------------------------------------------------------------------------------------------------------
def run_verb(rest: list[str]) -> int:
    if set(rest) & {"-h", "--help"}:
        parser = parser_for("run", PipelineConfig, config_help=SUPPRESS)  # a recipe is given by itself
        parser.usage = "punster run RECIPE|FILE.yaml [options]"
        parser.print_help()
        return 0
    if any(word == "--config" or word.startswith("--config=") for word in rest):
        raise UserError("give the file itself: punster run FILE.yaml")
    if not rest or rest[0].startswith("-"):
        raise UserError("which recipe? For example: punster run demo" + " (options come after it)" * bool(rest))
    from punster.train.pipeline import load_recipe, run_pipeline

    run_pipeline(load_recipe(rest[0], rest[1:]))
    return 0


def generate_parser(with_prompt: bool) -> Any:
    """The options of `punster generate`, with a prompt on the command line or without."""
    parser = simple_parser("generate", "Write k texts in answer to a prompt, or to each of many (--prompts).")
    parser.add_argument("model", type=str, help="a run, or any --model value")
    if with_prompt:
        parser.add_argument("prompt", type=str, help='for example "make a pun about bakers"; left out with --prompts')
    parser.add_argument("--prompts", type=str | None, default=None, help="a file with prompts, or embedded (the test part)")
    parser.add_argument(
        "--out", type=str | None, default=None,
        help='write {"prompt", "completion"} a line into this file (with --prompts, by default: to the terminal)',
    )  # fmt: skip
    parser.add_argument("-k", "--count", type=int, default=1, help="how many texts, to each prompt")
    parser.add_argument("--best-of", type=int, default=0, help="each text is the best of so many samples (needs -c)")
    parser.add_argument("-c", "--reward-model", type=str | None, default=None, help="reward-model run that chooses")
    # Defaults for reading; at temperature 1 without truncation a model of this size mostly writes nonsense (docs/RESULTS.md).
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy, 1 with --min-p 0 what training samples")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens of this mass")
    parser.add_argument("--min-p", type=float, default=0.05, help="keep tokens of at least this share of the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: discourage repeated tokens")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest text")
    parser.add_argument("--prompt-format", type=str, default="auto", help="for plain models: auto, chat, or a text with {prompt}")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sampling")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--dtype", type=str, default="auto", help="auto, fp32, bf16")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def generate_verb(rest: list[str]) -> int:
    try:
        o = parsed_values(generate_parser(with_prompt=True), rest)
    except UserError:  # a positional that may be missing would not be found behind options
        if not any(word.partition("=")[0] == "--prompts" for word in rest):
            raise
        o = parsed_values(generate_parser(with_prompt=False), rest)
    source, out = o["prompts"], o["out"]
    if source is not None and "prompt" in o:
        raise UserError("give one prompt, or many by --prompts, not both")
    from punster.api import load
    from punster.train.rows import load_prompts

    if out:
        check_target(Path(out), input_files(source) if source else [])
    prompts = [o["prompt"]] if source is None else load_prompts(source, "test", o["quiet"])
    model = load(o["model"], device=o["device"], dtype=o["dtype"], prompt_format=o["prompt_format"])
    judge = load(o["reward_model"], device=o["device"], dtype=o["dtype"]) if o["reward_model"] else None
    texts = model.generate_many(
        prompts, o["count"], best_of=o["best_of"], judge=judge, seed=o["seed"], max_new_tokens=o["max_new_tokens"],
        temperature=o["temperature"], top_k=o["top_k"], top_p=o["top_p"], min_p=o["min_p"],
        repetition_penalty=o["repetition_penalty"], distinct=o["temperature"] > 0, quiet=o["quiet"] or source is None,
    )  # fmt: skip
    if source is None and not out:
        for text in texts[0]:
            print(plain(text))
        if len(texts[0]) < o["count"]:
            print(
                f"note: {len(texts[0])} different texts were all that came up; a higher --temperature gives more", file=sys.stderr
            )
        return 0
    texts = [[text for text in each if text] for each in texts]  # no verb reads rows without a text
    pairs = [(prompt, text) for prompt, each in zip(prompts, texts, strict=True) for text in each]
    lines = "".join(json_line({"prompt": prompt, "completion": text}) for prompt, text in pairs)
    if out:
        write_text(Path(out), lines)
    else:
        print(lines, end="")
    if short := sum(len(each) < o["count"] for each in texts):
        print(
            f"note: {short} of {len(texts)} prompts have fewer than {o['count']} texts: no others came up that were neither empty nor "
            "repeated; a higher --temperature gives more",
            file=sys.stderr,
        )
    return 0


def score_verb(rest: list[str]) -> int:
    parser = simple_parser("score", "Score texts with a reward model: one {score, spread} a line, order kept.")
    parser.add_argument("model", type=str, help="a reward-model run")
    parser.add_argument(
        "file",
        type=str,
        help='{"text"} or {"prompt", "completion"} a line (JSONL, JSON, CSV, Parquet), or a .txt with a text a line',
    )
    parser.add_argument("--out", type=str | None, default=None, help="write here instead of to the terminal")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument(
        "--dtype", type=str, default="fp32", help="fp32 (as the export scores); bf16 or auto: faster, off by up to .13"
    )
    o = parsed_values(parser, rest)
    from punster.api import load
    from punster.data.files import read_texts
    from punster.data.prompts import GENERIC_PROMPT

    if o["out"]:
        check_target(Path(o["out"]), [Path(o["file"])])
    rows = read_texts(o["file"])
    model = load(o["model"], device=o["device"], dtype=o["dtype"], merge=True)
    prompts, places = [row.get("prompt", GENERIC_PROMPT) for row in rows], [row["_place"] for row in rows]
    judged = model.judge(prompts, [row["completion"] for row in rows], places)
    lines = "".join(json.dumps({"score": round(s, 6), "spread": round(d, 6)}) + "\n" for s, d in zip(*judged, strict=True))
    if o["out"]:
        write_text(Path(o["out"]), lines)
    else:
        print(lines, end="")
    return 0


def evaluate_verb(rest: list[str]) -> int:
    config = parse("evaluate", EvaluateConfig, rest, positional=("models",))
    from punster.data.files import is_file_of_rows
    from punster.evaluate.compare import evaluate
    from punster.evaluate.folder import read_config
    from punster.evaluate.table import print_table

    if config.out:
        folder = Path(config.out)
        check_folder(folder)
        if read_config(folder / "config.yaml")[1] not in ("", "evaluate") or (folder / "run.log").exists():
            raise UserError(f"--out {folder}: its summary.json and samples.jsonl are those of a punster run; name another folder")
        read = [*input_files(config.prompts), *(Path(model) for model in config.models if is_file_of_rows(model))]
        for name in ("summary.json", "samples.jsonl"):
            keep_inputs(folder / name, read)
    print_table(evaluate(config))
    return 0


def report_verb(rest: list[str]) -> int:
    parser = simple_parser("report", "Write report.html and the model card of a run, or one page that compares several runs.")
    parser.add_argument("run", type=str, nargs="+", help="a run folder, or the folder of a pipeline; or several")
    parser.add_argument(
        "--out", type=str | None, default=None, help="several runs: the page (default: comparison.html beside the first)"
    )
    o = parsed_values(parser, rest)
    folders = [Path(name) for name in o["run"]]
    for folder in folders:
        if not (folder / "config.yaml").exists() and not (folder / "summary.json").exists():
            raise UserError(f"{folder}: no such run")
    from punster.evaluate.card import write_card
    from punster.evaluate.report import write_comparison, write_report

    if len(folders) == 1 and o["out"]:
        raise UserError("--out is for the page that compares several runs; one run's report.html is written beside it")
    if len(folders) > 1:
        page = Path(o["out"] or folders[0].resolve().parent / "comparison.html")
        check_target(page, [*folders, *(folder / "config.yaml" for folder in folders)])
        print(write_comparison(folders, page))
        return 0
    print(write_report(folders[0]))
    print(write_card(folders[0]))
    return 0


def export_verb(rest: list[str]) -> int:
    parser = simple_parser("export", "Write a run for transformers (hf: merged) or peft (adapter).")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--format", type=str, default="hf", help="hf or peft")
    parser.add_argument("--out", type=str, help="new folder")
    o = parsed_values(parser, rest)
    if not o["out"]:
        raise UserError("--out DIR is needed")
    if o["format"] not in ("hf", "peft"):
        raise UserError(f"--format {o['format']}: hf or peft")
    from punster.api import load
    from punster.model.export import export

    model = load(o["run"], dtype="fp32", device="cpu")
    print(export(model.role, model.tokenizer, o["format"], Path(o["out"])))
    return 0


def doctor_verb(rest: list[str]) -> int:
    parser = simple_parser("doctor", "Versions, machine, cache, and a short speed check.")
    parsed_values(parser, rest)
    from punster.doctor import doctor

    return doctor()


HANDLERS: dict[str, Callable[[list[str]], int]] = {
    "run": run_verb, "generate": generate_verb, "score": score_verb, "evaluate": evaluate_verb, "report": report_verb,
    "data": data, "export": export_verb, "doctor": doctor_verb,
}  # fmt: skip
VERBS = (*TRAINING, *HANDLERS)


if __name__ == "__main__":
    sys.exit(main())
