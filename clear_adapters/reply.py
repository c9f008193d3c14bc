"""What a caller gets: a reply, or the events of a reply in the making."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from clear_adapters.backbones.base import Restoration
from clear_adapters.transcript import RESTORE, Origin, TextSegment, Transcript, parse, strip_tags

if TYPE_CHECKING:
    from PIL.Image import Image

Decoder = Callable[[Restoration], "list[Image] | None"]
Action = Literal["restore", "answer", "decline", "limit", "stop"]


@dataclass(frozen=True, eq=False, repr=False)
class Reply:
    """The answer to one question.

    Attributes:
        transcript: everything that the context holds, in order.
        timings: seconds by phase (`prefill`, `text`, `restore`, `read`) of the batch the row was in.
        plain: whether the plain model was asked, without the skill.
    """

    transcript: Transcript
    timings: dict[str, float] = field(default_factory=dict)
    plain: bool = False
    _decode: Decoder | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"Reply({self.text!r}, restored={self.restored}, thoughts={len(self.thoughts)})"

    @cached_property
    def text(self) -> str:
        """The answer; where no answer tag was written, the last text without thoughts and tags.

        Of the plain model, the text as it was written. All that was written is `transcript.reply`.
        """
        if self.plain:
            return self.transcript.reply
        turns = self._turns
        return strip_tags(turns[-1]) if turns else ""

    @cached_property
    def answered(self) -> bool:
        """Whether an answer stands between its tags."""
        turns = self._turns
        return bool(turns) and parse(turns[-1]).answer is not None

    @cached_property
    def thoughts(self) -> tuple[str, ...]:
        """The insides of `<think>`, in order."""
        return () if self.plain else tuple(t for text in self._turns for t in parse(text).thoughts)

    @property
    def restored(self) -> bool:
        """Whether a restoration was read, the model's own or a control's."""
        return bool(self.transcript.restorations)

    @cached_property
    def restored_image(self) -> Image | None:
        """The last restoration in pixels, those that were read where it was re-encoded; else decoded when first asked for.

        None where nothing was restored, and for a family that cannot decode.
        """
        if not self.restored:
            return None
        restoration: Restoration = self.transcript.restorations[-1].restoration
        if restoration.image is not None or self._decode is None:
            return restoration.image
        images = self._decode(restoration)
        return images[0] if images else None

    @property
    def _turns(self) -> list[str]:
        return [
            s.text for s in self.transcript if isinstance(s, TextSegment) and s.origin is not Origin.PROMPT
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data; no pixels and no latents."""
        return {
            "text": self.text,
            "thoughts": list(self.thoughts),
            "restored": self.restored,
            "answered": self.answered,
            "plain": self.plain,
            "transcript": self.transcript.to_json(),
            "timings": {k: round(v, 4) for k, v in self.timings.items()},
        }


# ----------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True)
class TextDelta:
    """Some more text. All deltas joined are the reply's `transcript.reply`.

    Attributes:
        text: what is new.
        origin: SAMPLED, or FORCED where the caller's choice wrote it.
    """

    text: str
    origin: Origin = Origin.SAMPLED


@dataclass(frozen=True)
class Decision:
    """How a turn ended.

    Attributes:
        action: `restore`; `answer`; `decline` when the request was forbidden; `limit` when there were enough
            restorations; `stop` when the turn holds neither an answer nor a request that can be granted.
        forced: whether the caller's choice decided, and not the model.
    """

    action: Action
    forced: bool = False


@dataclass(frozen=True)
class DenoisingStep:
    """A step of the restoration.

    Attributes:
        estimate: the clean latent as it is estimated after this step; decode it to look at it.
        step: counts from 1.
        steps: how many there will be.
    """

    estimate: Restoration
    step: int
    steps: int


@dataclass(frozen=True)
class Restored:
    """The restoration that the model now reads.

    Attributes:
        restoration: of one row.
        origin: SAMPLED, or INJECTED for a control's latent.
    """

    restoration: Restoration
    origin: Origin


@dataclass(frozen=True)
class Answer:
    """The end of a reply.

    Attributes:
        text: `reply.text`.
        reply: the whole reply.
    """

    text: str
    reply: Reply


@dataclass(frozen=True)
class Timing:
    """Seconds by phase."""

    seconds: dict[str, float]


Event = TextDelta | Decision | DenoisingStep | Restored | Answer | Timing


class BlockText:
    """The text of one block as its ids arrive.

    Characters whose bytes are spread over tokens are held back until they are whole. With `hold_request` a request
    for a restoration and what follows it is held back too, because the block may yet be replaced from there on.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], hold_request: bool = False) -> None:
        self._decode = decode
        self._hold = hold_request
        self._ids: list[int] = []
        self._settled = 0  # ids before it are in `_whole`
        self._context = (
            0  # first id that is decoded again, since a token's text may depend on the one before it
        )
        self._whole = ""
        self._shown = 0

    def feed(self, token: int) -> str:
        """What can be shown after one more token."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._settled])
        after = self._decode(self._ids[self._context :])
        if len(after) > len(before) and not after.endswith("�"):
            self._whole += after[len(before) :]
            self._context, self._settled = self._settled, len(self._ids)
        return self._show(self._whole[: self._limit()])

    def close(self, text: str) -> str:
        """What is still to be shown of the block's final text."""
        return self._show(text)

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        self._shown += len(new)
        return new

    def _limit(self) -> int:
        """Where the part that may be shown ends: before a request, or what may become one."""
        if not self._hold:
            return len(self._whole)
        found = self._whole.find(RESTORE)
        if found >= 0:
            return found
        longest = min(len(RESTORE) - 1, len(self._whole))
        part = next((n for n in range(longest, 0, -1) if RESTORE.startswith(self._whole[-n:])), 0)
        return len(self._whole) - part
