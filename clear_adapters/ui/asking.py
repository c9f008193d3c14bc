"""One question put to both models: a worker that has the model, and the progress of the answers as the page follows it.

The worker is a thread of its own which takes the model, works and gives it back whatever becomes of the page: a visitor
who leaves in the middle never leaves the model behind in another state.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from clear_adapters.errors import ClearError, ClearValueError
from clear_adapters.reply import Answer, Decision, DenoisingStep, Reply, Restored, TextDelta, Timing
from clear_adapters.transcript import ANSWER_CLOSE, ANSWER_OPEN, RESTORE, THINK_CLOSE, parse
from clear_adapters.ui.models import ModelPool, Names, Stopped

if TYPE_CHECKING:
    from PIL import Image

    from clear_adapters.attached import AttachedModel
    from clear_adapters.reply import Event
    from clear_adapters.rollout import Restore

MAX_QUESTION = 2000
"""Characters of a question."""
MAX_BYTES = 4000
"""Of a question as UTF-8: some models read bytes, of which a sign may have four."""
SECONDS = 120.0
"""That a question may take, by default."""

_PREVIEWS = 8
"""Steps of a restoration that are decoded to be looked at, at most."""

_PACE = 0.1
"""Seconds between two looks at the progress, at least: more often nobody sees, and showing takes time from the model."""

_NOTHING = ("nothing", None, None)

_log = logging.getLogger(__name__)

Phase = Literal[
    "wait", "load", "base", "look", "decide", "restore", "read", "answer", "done", "stopped", "failed"
]


@dataclass(frozen=True)
class Query:
    """What a visitor wants to know, and how.

    Attributes:
        picture: what the models see.
        question: what is asked.
        restore: when to restore.
        seed: of everything random in the models.
        steps: points of a restoration's schedule; None is the adapter's own.
        temperature: of text; 0 takes the most likely token.

    Raises:
        ClearValueError: the question is empty or too long, or a number is out of its range.
    """

    picture: Image.Image
    question: str
    restore: Restore = "auto"
    seed: int = 0
    steps: int | None = None
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ClearValueError("Write a question first, or take one of those suggested.")
        if len(self.question) > MAX_QUESTION:
            raise ClearValueError(
                f"This question has {len(self.question):,} characters, and at most {MAX_QUESTION:,} are taken. Shorten it."
            )
        size = len(self.question.encode())
        if size > MAX_BYTES:
            raise ClearValueError(
                f"This question has {size:,} bytes (letters have one or two, most other signs three or four), and at most "
                f"{MAX_BYTES:,} are taken. Shorten it."
            )
        if self.seed < 0:
            raise ClearValueError(f"The seed is {self.seed}, and must be 0 or more.")


@dataclass
class Turn:
    """One turn of the model with the adapter.

    Attributes:
        text: as it was written so far, tags and all.
        decision: how it ended; None while it runs.
        picture: the restoration as it looks by now; None without one, and for a family without pixels.
        step: of the restoration, from 1.
        steps: how many there will be; 0 for a family that does not denoise.
        restored: whether the restoration is done.
    """

    text: str = ""
    decision: Decision | None = None
    picture: Image.Image | None = None
    step: int = 0
    steps: int = 0
    restored: bool = False


@dataclass
class Progress:
    """What is known by now.

    Attributes:
        phase: where it stands.
        base_text: what the plain model has written.
        base: its whole reply.
        base_seconds: that it took.
        turns: of the model with the adapter.
        clear: its whole reply.
        clear_seconds: that it took, without what was decoded for the page.
        shown_seconds: that decoding for the page took.
        message: what went wrong.
        cached: whether this was computed before.
    """

    phase: Phase = "wait"
    base_text: str = ""
    base: Reply | None = None
    base_seconds: float = 0.0
    turns: list[Turn] = field(default_factory=list)
    clear: Reply | None = None
    clear_seconds: float = 0.0
    shown_seconds: float = 0.0
    message: str = ""
    cached: bool = False

    @property
    def restored_image(self) -> Image.Image | None:
        """The last restoration, as it looks by now."""
        return next((t.picture for t in reversed(self.turns) if t.picture is not None), None)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.phase in ("done", "stopped", "failed")

    @property
    def is_whole(self) -> bool:
        """Whether both have answered, and both times are known."""
        return self.phase == "done" and self.clear_seconds > 0

    def update(self, kind: str, event: Any, picture: Image.Image | None) -> None:
        """Goes on by one event of the worker."""
        if kind == "phase":
            self.phase = event
        elif kind == "failed":
            self.phase, self.message = "failed", event
        elif kind == "shown":
            self.shown_seconds += event
        elif kind == "base":
            self._update_base(event)
        else:
            self._update_clear(event, picture)

    def _update_base(self, event: Event | float) -> None:
        if isinstance(event, TextDelta):
            self.base_text += event.text
        elif isinstance(event, Answer):
            self.base, self.base_text = event.reply, event.text
        elif isinstance(event, float):
            self.base_seconds = event

    def _update_clear(self, event: Event | float, picture: Image.Image | None) -> None:
        if isinstance(event, float):
            self.clear_seconds = event
            return
        if isinstance(event, Answer):
            self.clear, self.phase = event.reply, "done"
            return
        if isinstance(event, Timing):
            return
        if not self.turns:
            self.turns.append(Turn())
        turn = self.turns[-1]
        if isinstance(event, TextDelta):
            if turn.decision is not None:
                turn = Turn()
                self.turns.append(turn)
            turn.text += event.text
            answering = ANSWER_OPEN in turn.text
            self.phase = "answer" if answering else "look" if len(self.turns) == 1 else "read"
        elif isinstance(event, Decision):
            turn.decision = event
            self.phase = "restore" if event.action == "restore" else "decide"
        elif isinstance(event, DenoisingStep):
            turn.step, turn.steps, turn.picture = event.step, event.steps, picture or turn.picture
        elif isinstance(event, Restored):
            turn.restored, turn.picture = True, picture or turn.picture
            self.phase = "read"


def thought_of(text: str) -> str:
    """The thoughts of a turn that may still be written, without what may become a tag."""
    return " ".join(parse(_without_half_tag(text)).thoughts).strip()


def answer_of(text: str) -> str:
    """The same for its answer; empty where none has begun."""
    return _without_half_tag(text).partition(ANSWER_OPEN)[2].partition(ANSWER_CLOSE)[0].strip()


def _without_half_tag(text: str) -> str:
    at = text.rfind("<")
    tags = (THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE, RESTORE)
    half = at >= 0 and any(t != text[at:] and t.startswith(text[at:]) for t in tags)
    return text[:at] if half else text


class Asking:
    """A question on its way.

    Args:
        pool: where the model is.
        names: which.
        query: what is asked.
        seconds: that it may take once the model is there, so that one question does not keep everybody waiting.
    """

    def __init__(self, pool: ModelPool, names: Names, query: Query, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._pool, self._names, self._query = pool, names, query
        self._events: queue.SimpleQueue[tuple[str, Any, Image.Image | None] | None] = queue.SimpleQueue()
        self.stop = threading.Event()

    def follow(self) -> Iterator[Progress]:
        """Asks, and gives the progress whenever it went on; the same object every time.

        Closing the iterator, or setting `stop`, ends the work within one step of the model.
        """
        progress = Progress()
        threading.Thread(target=self._work, name="clear-demo-ask", daemon=True).start()
        shown, end, is_news = 0.0, math.inf, False
        try:
            while True:
                until = min(end, shown + _PACE) if is_news else end
                wait = None if math.isinf(until) else max(until - time.monotonic(), 0.001)
                item: tuple[str, Any, Image.Image | None] | None = _NOTHING
                with suppress(queue.Empty):
                    item = self._events.get(timeout=wait)
                if item is None:
                    if not progress.is_over:
                        progress.phase = "stopped"
                    yield progress
                    return
                if item is not _NOTHING:
                    if item[0] == "phase" and item[1] == "base":
                        end = time.monotonic() + self._seconds
                    progress.update(*item)
                    is_news = True
                    if progress.is_over:
                        end = math.inf
                if time.monotonic() >= end:
                    progress.update("failed", _too_long(self._seconds), None)
                    yield progress
                    return
                if item is _NOTHING and is_news:
                    yield progress
                    shown, is_news = time.monotonic(), False
        finally:
            self.stop.set()

    # -- the worker

    def _tell(self, kind: str, event: Any, picture: Image.Image | None = None) -> None:
        if self.stop.is_set():
            raise Stopped
        self._events.put((kind, event, picture))

    def _work(self) -> None:
        try:
            if not self._pool.holds(self._names):
                self._tell("phase", "load")
            with self._pool.use(self._names, self.stop) as model:
                self._ask(model)
        except Stopped:
            pass
        except (ClearError, OSError) as error:
            self._events.put(("failed", self._pool.explain(error), None))
        except Exception:
            _log.exception("a question failed")
            message = "Something failed in the model; the server's log says what. Other questions can go on."
            self._events.put(("failed", message, None))
        finally:
            self._events.put(None)

    def _ask(self, model: AttachedModel) -> None:
        q = self._query
        text = replace(model.config.text, temperature=q.temperature)
        latent = model.config.latent if q.steps is None else replace(model.config.latent, steps=q.steps)
        self._tell("phase", "base")
        began = time.perf_counter()
        with model.disabled():
            for event in model.stream(q.picture, q.question, text=text, seed=q.seed):
                self._tell("base", event)
        self._tell("base", time.perf_counter() - began)
        self._tell("phase", "look")
        began, shown = time.perf_counter(), 0.0
        events = model.stream(q.picture, q.question, restore=q.restore, text=text, latent=latent, seed=q.seed)
        for event in events:
            picture = None
            if _is_worth_a_look(event):
                looked = time.perf_counter()
                picture = _pixels(model, event)
                shown += time.perf_counter() - looked
            self._tell("clear", event, picture)
        self._tell("shown", shown)
        self._tell("clear", time.perf_counter() - began - shown)


def _too_long(seconds: float) -> str:
    return (
        f"This question took longer than {seconds:g} seconds and was ended, since others wait for the model. Ask a shorter one, or "
        "take fewer points of the denoising schedule."
    )


def _is_worth_a_look(event: Event) -> bool:
    if isinstance(event, DenoisingStep):
        every = -(-event.steps // _PREVIEWS)
        return event.step % every == 0 and event.step < event.steps  # the last is the restoration itself
    return isinstance(event, Restored)


def _pixels(model: AttachedModel, event: Event) -> Image.Image | None:
    latent = event.estimate if isinstance(event, DenoisingStep) else event.restoration  # type: ignore[union-attr]
    images = model.backbone.decode(latent)
    return images[0] if images else None
