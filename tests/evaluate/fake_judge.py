"""A small server of the chat-completions protocol whose answers, faults and pace the test decides."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: str | None, **message: Any) -> dict[str, Any]:
    return {
        "id": "x", "object": "chat.completion", "created": 1, "model": "fake",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102},
    }  # fmt: skip


def shown(body: dict[str, Any], first: str = "Text A", last: str = "Text B") -> tuple[str, str] | str:
    """The two texts of a pair, or the one text, as a reader of the JSON strings finds them."""
    question = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user" and "Text" in m["content"])
    found = dict(re.findall(r'^(Request|Text A|Text B|Text): (".*")$', question, re.MULTILINE))
    return json.loads(found["Text"]) if "Text" in found else (json.loads(found[first]), json.loads(found[last]))


Answer = Callable[[dict[str, Any]], str]


def by(score: Callable[[str], float]) -> Answer:
    """An honest judge of this taste."""

    def answer(body: dict[str, Any]) -> str:
        texts = shown(body)
        if isinstance(texts, str):
            return json.dumps({"pun": score(texts) > 0, "funniness": 3 if score(texts) > 0 else 1, "coherence": 5})
        a, b = map(score, texts)
        return "A" if a > b else "B" if b > a else "tie"

    return answer


class FakeJudge:
    """`fault(number, body)` may return a raw (status, headers, bytes) instead of the answer; requests are recorded."""

    def __init__(
        self, answer: Answer, fault: Callable[[int, dict[str, Any]], Any] = lambda number, body: None, delay: float = 0.0
    ):
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.flying = self.most_flying = 0
        self.hook: Callable[[int], None] = lambda number: None
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or every reply waits 40 ms for an acknowledgement

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(raw)
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.paths.append(self.path)
                    outer.keys.append(hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest())
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer.times.append(time.monotonic())
                    outer.flying += 1
                    outer.most_flying = max(outer.flying, outer.most_flying)
                outer.hook(number)
                time.sleep(delay)
                status, headers, data = fault(number, body) or (200, {}, json.dumps(completion(answer(body))).encode())
                with lock:
                    outer.flying -= 1
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the caller was killed

            def log_message(self, *parts: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *parts: Any) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> FakeJudge:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *reason: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
