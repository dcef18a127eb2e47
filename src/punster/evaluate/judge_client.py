"""Answers of a judge model, each bought once: any OpenAI-compatible endpoint behind a cache in SQLite.

An answer is stored the moment it has arrived, so a killed run goes on where it was and a second run costs nothing. The client
of the `openai` package does what it does well: connections, time limits, retries with growing pauses that heed Retry-After.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote_plus, urlsplit

from punster.config import EvaluateConfig
from punster.disk import cache_folder
from punster.errors import UserError
from punster.evaluate.table import shown_progress
from punster.safe import scrub

T = TypeVar("T")
Messages = list[dict[str, str]]
OFFICIAL = "https://api.openai.com/v1"
RETRIES = 6  # after 429, 5xx, time-outs and broken connections
PAUSE = 0.5  # seconds before a reply that was cut off is asked for again; doubled every time
LONGEST = 4000  # characters of an answer that are kept
THOUGHTS = re.compile(r"\A.*?</think>\s*", re.DOTALL)  # some servers leave them before the answer
REMINDER = "This was not in the form asked for. Answer again, with nothing but the answer in exactly that form."


class Cache:
    """Answers by the hash of their request, and calibrations by judge. Holds texts and answers, never a key."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._run(
            "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, judge TEXT, model TEXT, request TEXT, answer TEXT,"
            " prompt_tokens INTEGER, completion_tokens INTEGER, time REAL)"
        )
        self._run("CREATE TABLE IF NOT EXISTS calibrations (judge TEXT PRIMARY KEY, result TEXT)")

    @cached_property
    def db(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60, check_same_thread=False)

    def _run(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            with self.lock, self.db:
                return self.db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: the cache of judge answers cannot be used ({error}); see --judge-cache") from None

    def answers(self, keys: Sequence[str]) -> dict[str, tuple[str, int, int]]:
        """{key: (answer, tokens in, tokens out)} of those that are there."""
        query = "SELECT answer, prompt_tokens, completion_tokens FROM answers WHERE key = ?"
        return {key: rows[0] for key in keys if (rows := self._run(query, [key]))}

    def keep(self, *row: Any) -> None:
        self._run("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, time.time()))

    def calibration(self, judge: str) -> dict[str, Any] | None:
        rows = self._run("SELECT result FROM calibrations WHERE judge = ?", [judge])
        with suppress(ValueError):  # damaged: the judge is calibrated again
            return json.loads(rows[0][0]) if rows else None
        return None

    def keep_calibration(self, judge: str, result: dict[str, Any]) -> None:
        self._run("INSERT OR REPLACE INTO calibrations VALUES (?, ?)", [judge, json.dumps(result)])


class Client:
    """Asks one model at one endpoint; raises UserError where going on makes no sense (key, model, budget, a dead server)."""

    def __init__(self, config: EvaluateConfig):
        import openai

        assert config.judge is not None
        self.config, self.model, self.errors = config, config.judge_model, openai
        official = config.judge == "openai"
        # A key for OpenAI is not sent to whoever else runs an endpoint.
        name = "OPENAI_API_KEY" if official else "PUNSTER_JUDGE_KEY"
        key = os.environ.get(name, "").strip()
        if official and not key:
            raise UserError("--judge openai needs a key in the environment variable OPENAI_API_KEY")
        address = urlsplit(OFFICIAL if official else config.judge)
        query = dict(parse_qsl(address.query, keep_blank_values=True))
        values = [form for value in query.values() if len(value) >= 8 for form in (value, quote_plus(value))]
        self.secrets = [s for s in (key, address.password, address.query, *values) if s]
        self.judge = f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path.rstrip('/')}"
        self.openai = openai.OpenAI(
            base_url=address._replace(query="").geturl(), default_query=query, api_key=key or "none",
            timeout=config.judge_timeout, max_retries=RETRIES,
        )  # fmt: skip
        self.options: dict[str, Any] = {"temperature": 0, "max_tokens": config.judge_tokens}
        self.cache = Cache(Path(config.judge_cache) if config.judge_cache else cache_folder() / "judge.sqlite")
        self.lock, self.next_turn, self.calls = threading.Lock(), 0.0, 0
        self.used: dict[str, tuple[str, int, int]] = {}  # every answer that this run has rested on

    def safe(self, text: str) -> str:
        """Text from the server without our secrets and without control characters."""
        for secret in self.secrets:
            text = text.replace(secret, "[secret]")
        return str(scrub(text))[:LONGEST]

    def key(self, request: Messages) -> str:
        told = json.dumps([self.judge, self.model, self.config.judge_tokens, request])
        return hashlib.sha256(told.encode()).hexdigest()

    def announce(self, requests: Sequence[Messages]) -> None:
        """Say what is about to be bought; UserError if it exceeds the budget."""
        missing = self._missing(requests)
        tokens = sum(len(m["content"]) for r in missing.values() for m in r) // 4
        wanted = len({self.key(request) for request in requests})
        text = (
            f"{len(missing)} calls of {self.model} ({wanted - len(missing)} more answers are cached), about {tokens:,} tokens in"
        )
        self._within_budget(len(missing), text)
        if not self.config.quiet:
            print(f"judge: {text}, at most {len(missing) * self.config.judge_tokens:,} out", file=sys.stderr)

    def _missing(self, requests: Sequence[Messages]) -> dict[str, Messages]:
        by_key = {self.key(request): request for request in requests}
        known = self.cache.answers(list(by_key))
        self.used |= known
        return {key: request for key, request in by_key.items() if key not in known}

    def _within_budget(self, more: int, text: str) -> None:
        if self.calls + more > self.config.judge_budget:
            raise UserError(
                f"the judge would need {text}; --judge-budget allows {self.config.judge_budget} calls, {self.calls} are made. "
                "Raise it, or evaluate fewer prompts (--limit). Answers so far are kept: nothing is paid for twice"
            )

    def ask(self, requests: Sequence[Messages], parse: Callable[[str], T | None]) -> list[T | None]:
        """Parsed answers, in order; None where neither the answer nor the one to a reminder could be parsed."""
        answers = self._buy(requests)
        values = [parse(answer) for answer in answers]
        again = [i for i, value in enumerate(values) if value is None]
        reminded = [
            [*requests[i], {"role": "assistant", "content": answers[i] or "-"}, {"role": "user", "content": REMINDER}]
            for i in again
        ]
        for i, answer in zip(again, self._buy(reminded), strict=True):
            values[i] = parse(answer)
        return values

    def _buy(self, requests: Sequence[Messages]) -> list[str]:
        missing = self._missing(requests)
        self._within_budget(len(missing), f"{len(missing)} more calls")
        with ThreadPoolExecutor(self.config.judge_workers) as pool:
            waiting = [pool.submit(self._fetch, key, request) for key, request in missing.items()]
            try:
                for future in shown_progress(as_completed(waiting), f"judge {self.model}", self.config.quiet, len(waiting)):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what is in flight is waited for, and kept
                raise
        return [self.used[self.key(request)][0] for request in requests]

    def _fetch(self, key: str, request: Messages) -> None:
        broken = 0
        while broken < RETRIES + 3:
            self._wait_for_turn()
            options = self.options
            try:
                reply = self.openai.chat.completions.create(model=self.model, messages=request, **options)
                message, usage = reply.choices[0].message, reply.usage
                text = self.safe(THOUGHTS.sub("", message.content or message.refusal or ""))
                counts = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
            except self.errors.BadRequestError as error:
                if not self._adapt(str(error), options):
                    raise self._failure(error) from None
                with self.lock:
                    self.calls -= 1  # nothing was paid for
                continue
            except self.errors.OpenAIError as error:
                raise self._failure(error) from None
            except (ValueError, TypeError, LookupError, AttributeError):  # the body was cut off, or is no completion
                time.sleep(PAUSE * 2 ** min(broken, RETRIES))
                broken += 1
                continue
            self.cache.keep(key, self.judge, self.model, json.dumps(request, ensure_ascii=False), text, *counts)
            with self.lock:
                self.used[key] = (text, *counts)
            return
        raise UserError(
            f"judge {self.judge}: its replies are no chat completions, {RETRIES + 3} times in a row; is the URL right?"
        )

    def _wait_for_turn(self) -> None:
        with self.lock:
            self._within_budget(1, "one more call")  # a reply that was broken is asked for again, and paid for again
            self.calls += 1
            now = time.monotonic()
            self.next_turn = max(self.next_turn, now)
            pause = self.next_turn - now
            if self.config.judge_rate:
                self.next_turn += 60 / self.config.judge_rate
        time.sleep(pause)

    def _adapt(self, complaint: str, sent: dict[str, Any]) -> bool:
        """Some models know no temperature, and call the limit max_completion_tokens: leave out what they complain about, if it was sent."""
        options = dict(self.options)
        if "max_completion_tokens" in complaint:
            options["max_completion_tokens"] = options.pop("max_tokens", self.config.judge_tokens)
        elif "temperature" in complaint:
            options.pop("temperature", None)
        self.options = options
        return options != sent

    def _failure(self, error: Exception) -> UserError:
        hints = {
            401: "the key was not accepted",
            403: "the key may not do this",
            404: "no such model or URL (does it end in /v1?)",
        }
        status = getattr(error, "status_code", None)
        what = hints.get(status, "no usable reply") if status else "no connection"
        detail = self.safe(" ".join(str(error).split()))[:300]
        return UserError(
            f"judge {self.judge}, model {self.model}: {what} ({detail}). Answers so far are kept in {self.cache.path}: "
            "the same command goes on from there"
        )
