"""A scripted teacher behind the real protocol on the loopback device, with every fault that a service can have.

It reads the request as the paper's rule writes it and answers as asked, but for a share of requests that it spoils. What is
spoiled follows from the request and from how often that very request came, so a run is the same for any order of requests.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.chat_server import NOW, Reply, Service, serve

FAULTS = {
    "malformed": 0.03,
    "wrong": 0.03,
    "empty": 0.02,
    "cut off": 0.02,
    "rate limited": 0.02,
    "never": 0.002,
}
"""Share of requests by fault."""

HOPELESS = 0.01
"""Share of questions that are answered wrongly every time."""

LATE = 1.5
"""Seconds after which a reply comes that comes too late."""


class Script:
    """Answers requests.

    Attributes:
        served: requests by what became of them.
        paid: times that each request was answered with a text, by its digest.
    """

    def __init__(self) -> None:
        self.served: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self._came: Counter[str] = Counter()
        self._lock = Lock()

    def answer(self, body: dict[str, Any], _: int) -> Reply:
        """The reply to one request."""
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self._lock:
            self._came[digest] += 1
            draw = random.Random(f"{digest}/{self._came[digest]}")
            fault = draw.choices([*FAULTS, "none"], [*FAULTS.values(), 1 - sum(FAULTS.values())])[0]
            asked = json.dumps(body["messages"][1], sort_keys=True)
            if random.Random(asked).random() < HOPELESS:
                fault = "wrong"
            self.served[fault] += 1
            if fault not in ("rate limited", "never"):
                self.paid[digest] += 1
        text = self._text(body["messages"][1]["content"][-1]["text"], fault)
        if fault == "rate limited":
            return Reply("slow down", status=429, headers=NOW)
        return Reply(
            text, finish="length" if fault == "cut off" else "stop", delay=LATE if fault == "never" else 0
        )

    @staticmethod
    def _text(asked: str, fault: str) -> str:
        truth = asked.split("True answer: ")[1].split("\n")[0]
        given = "something else" if fault == "wrong" else truth
        if fault == "empty":
            return " "
        told = f"<think>It can be made out.</think>\n<answer>{given}</answer>"
        if asked.endswith("The model restores."):
            told = f"<think>The picture is too poor.</think>\n<image_restore>\n{told}"
        if fault == "malformed":
            return told.replace("</think>", "", 1)
        return told[: len(told) // 2] if fault == "cut off" else told


@contextmanager
def scripted() -> Iterator[tuple[Service, Script]]:
    """Runs the service."""
    script = Script()
    with serve(script.answer) as service:
        yield service, script
