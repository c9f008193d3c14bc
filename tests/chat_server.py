"""A chat-completions service on the loopback device, whose replies a test writes in advance."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """One response: `text` as a proper completion, or a `body` sent as it is."""

    text: str | None = None
    status: int = 200
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    delay: float = 0.0
    pause: float = 0.0
    """Seconds before every tenth of it."""

    def payload(self) -> bytes:
        if self.body is not None:
            return self.body.encode()
        if self.status != 200:
            return json.dumps({"error": {"message": self.text or "no", "type": "test"}}).encode()
        message = {"role": "assistant", "content": self.text}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        return json.dumps(
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        ).encode()


NOW = {"retry-after-ms": "1"}
"""Keeps a retry from waiting."""


class Service:
    """What was asked, and what will be answered.

    Attributes:
        url: address for a client.
        requests: bodies in the order of arrival.
        headers: headers of each, names in lower case.
        busiest: most requests under way at once.
    """

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply]) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busiest = 0
        self.url = ""
        self._now = 0
        self._lock = threading.Lock()

    def take(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Reply:
        assert path == "/v1/chat/completions", path
        with self._lock:
            self.requests.append(body)
            self.headers.append(headers)
            self._now += 1
            self.busiest = max(self.busiest, self._now)
            number = len(self.requests)
        reply = self.answer(body, number)
        time.sleep(reply.delay)
        with self._lock:
            self._now -= 1
        return reply


@contextmanager
def serve(*replies: Reply | Callable[[dict[str, Any], int], Reply]) -> Iterator[Service]:
    """Runs a service with replies in order, the last one for ever, or with a function of body and number."""
    first = replies[0]
    service = Service(
        first if callable(first) else lambda _, number: replies[min(number, len(replies)) - 1]  # type: ignore
    )

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            reply = service.take(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
            payload = reply.payload()
            self.send_response(reply.status)
            sent = {"content-type": "application/json", "content-length": str(len(payload)), **reply.headers}
            for name, value in sent.items():
                self.send_header(name, value)
            self.end_headers()
            step = len(payload) // 10 + 1
            for start in range(0, len(payload), step):
                time.sleep(reply.pause)
                self.wfile.write(payload[start : start + step])

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that gave up is what some tests want."""

    with Quiet(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        service.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield service
        finally:
            server.shutdown()
            thread.join()
