"""A reply as training data must have it: the four parts of the paper's traces, and nothing between them.

    A  <think>what the picture is like, and whether it serves</think>
    B  <image_restore>
    C  <think>what the restored picture shows</think>
    D  <answer>the answer</answer>

The direct path leaves B and C out (arXiv 2604.04780; METHOD of the paper, "trace writer"). `transcript.parse` reads what a
model wrote as well as it can; this reads what a model is to be taught, and forgives nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from clear_adapters.errors import ClearValueError
from clear_adapters.transcript import ANSWER_CLOSE, ANSWER_OPEN, RESTORE, THINK_CLOSE, THINK_OPEN

Way = Literal["direct", "restore"]

TAG = re.compile("|".join(map(re.escape, (THINK_OPEN, THINK_CLOSE, RESTORE, ANSWER_OPEN, ANSWER_CLOSE))))
"""A tag of the protocol."""

_HALF = re.compile("[\ud800-\udfff]")
_DIRECT = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
_RESTORE = (THINK_OPEN, THINK_CLOSE, RESTORE, *_DIRECT)


@dataclass(frozen=True)
class Parts:
    """The parts of a trace.

    Attributes:
        diagnosis: part A.
        answer: part D.
        reading: part C; None where nothing is restored.
    """

    diagnosis: str
    answer: str
    reading: str | None = None

    @property
    def way(self) -> Way:
        """The path that it takes."""
        return "direct" if self.reading is None else "restore"

    @property
    def text(self) -> str:
        """The trace with its tags, a line break between parts (a protocol puts its own joint there when it is trained)."""
        parts = [f"{THINK_OPEN}{self.diagnosis}{THINK_CLOSE}"]
        if self.reading is not None:
            parts += [RESTORE, f"{THINK_OPEN}{self.reading}{THINK_CLOSE}"]
        return "\n".join([*parts, f"{ANSWER_OPEN}{self.answer}{ANSWER_CLOSE}"])


def is_text(text: str) -> bool:
    """Whether a text can be written: it holds no half of a character (a lone surrogate), which JSON can smuggle in."""
    return _HALF.search(text) is None


def read_parts(text: str) -> Parts:
    """Reads a trace.

    Args:
        text: with its tags, on either path.

    Raises:
        ClearValueError: a tag is missing, stands twice or elsewhere, a part is empty, text stands outside the parts, or it
            holds half a character.
    """
    if not is_text(text):
        raise ClearValueError("half a character (a lone surrogate) stands in it, which is no text")
    tags = tuple(TAG.findall(text))
    if tags not in (_DIRECT, _RESTORE):
        told = " ".join(tags[:12]) if tags else "no tag at all"
        raise ClearValueError(
            f"the tags do not parse: found {told}, where {''.join(_DIRECT)} or {''.join(_RESTORE)} is a trace"
        )
    between = [part.strip() for part in TAG.split(text)]
    inside = {1: "the first thought", len(tags) - 1: "the answer"}
    if tags == _RESTORE:
        inside[4] = "the thought after the restoration"
    for place, part in enumerate(between):
        if place in inside and not part:
            raise ClearValueError(f"the tags do not parse: {inside[place]} is empty")
        if place not in inside and part:
            raise ClearValueError(f"the tags do not parse: {part[:60]!r} stands outside the tags")
    return Parts(between[1], between[len(tags) - 1], between[4] if tags == _RESTORE else None)
