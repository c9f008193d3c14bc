"""What happened in a row: segments with their origins, and the reading of the protocol's tags.

Loss masks are derived from origins and from nothing else: only SAMPLED segments are ever scored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
RESTORE = "<image_restore>"

_THINK = re.compile(r"<think>(.*?)(?:</think>|(?=<image_restore>)|(?=<answer>)|$)", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class Origin(Enum):
    """Who put a segment into the context."""

    PROMPT = "prompt"
    SAMPLED = "sampled"
    FORCED = "forced"
    INJECTED = "injected"


@dataclass(frozen=True, eq=False)
class TextSegment:
    """One block of text: a system prompt, a question, or a turn of the model.

    Attributes:
        ids: (T,) int64 on the CPU, without the family's start token. A SAMPLED segment holds the end token when
            the model wrote it; one cut off at the limit does not, and is closed for it without being scored.
        origin: who wrote it.
        text: the ids decoded, without the end token.
        logprobs: (T,) float32 on the CPU, of a SAMPLED segment of a rollout.
    """

    ids: Tensor
    origin: Origin
    text: str
    logprobs: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ImageSegment:
    """A picture given to the model.

    Attributes:
        image: PIL image, RGB, at its own resolution.
        as_condition: whether the generator reads it too, and not only the understanding encoder.
        understanding: whether the understanding encoder's tokens are present (training may drop them).
        origin: who put it there.
    """

    image: Any
    as_condition: bool = True
    understanding: bool = True
    origin: Origin = Origin.PROMPT


@dataclass(frozen=True, eq=False)
class RestorationSegment:
    """A restoration, and the way in which the text after it reads it.

    Attributes:
        restoration: a `backbones.base.Restoration` of one row; for a recorded transcript None, with `target`.
        origin: SAMPLED when the model made it, INJECTED when a control put another latent in its place.
        target: PIL image of the clean picture, in recorded transcripts.
        reencoded: whether decode and re-encode stood in the bridge's place.
    """

    restoration: Any = None
    origin: Origin = Origin.SAMPLED
    target: Any = None
    reencoded: bool = False


Segment = TextSegment | ImageSegment | RestorationSegment


@dataclass
class Transcript:
    """One row's segments in order."""

    segments: list[Segment] = field(default_factory=list)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def append(self, segment: Segment) -> None:
        """Adds a segment at the end."""
        self.segments.append(segment)

    @property
    def reply(self) -> str:
        """All text after the prompt, a line break between blocks."""
        return "\n".join(
            s.text for s in self.segments if isinstance(s, TextSegment) and s.origin is not Origin.PROMPT
        )

    @property
    def restorations(self) -> list[RestorationSegment]:
        """The restorations in order."""
        return [s for s in self.segments if isinstance(s, RestorationSegment)]

    def to_json(self) -> list[dict[str, Any]]:
        """Segments as plain data: kind, origin, text, sizes; no pixels and no latents."""
        rows: list[dict[str, Any]] = []
        for s in self.segments:
            row: dict[str, Any]
            if isinstance(s, TextSegment):
                row = {"kind": "text", "origin": s.origin.value, "text": s.text, "tokens": len(s.ids)}
                if s.logprobs is not None:
                    row["logprob"] = round(float(s.logprobs.sum()), 6)
            elif isinstance(s, ImageSegment):
                row = {"kind": "image", "origin": s.origin.value, "size": list(s.image.size)}
            else:
                row = {"kind": "restoration", "origin": s.origin.value}
                if s.restoration is not None:
                    row["grid"] = list(s.restoration.grid)
            rows.append(row)
        return rows


@dataclass(frozen=True)
class Parsed:
    """A turn's text, read by its tags.

    Attributes:
        thoughts: the insides of `<think>`, an unclosed one included.
        answer: the inside of the last `<answer>`, None when there is none.
        wants_restore: `<image_restore>` stands in it and no answer does (an answer wins, as in the released code).
    """

    thoughts: tuple[str, ...]
    answer: str | None
    wants_restore: bool


def parse(text: str) -> Parsed:
    """Reads the tags of a turn or of a whole reply; text outside tags is ignored."""
    answers = _ANSWER.findall(text)
    answer = answers[-1].strip() if answers else None
    thoughts = tuple(t.strip() for t in _THINK.findall(text) if t.strip())
    return Parsed(thoughts, answer, answer is None and RESTORE in text)


def strip_tags(text: str) -> str:
    """The answer where there is one, else the text without thoughts and without tags."""
    parsed = parse(text)
    if parsed.answer is not None:
        return parsed.answer
    return re.sub(r"</?(?:think|answer)>|<image_restore>", "", _THINK.sub("", text)).strip()
