"""The interleaved state machine: read the prompt, write, restore when asked, read the restoration, write again.

One generator serves every use: a rollout drains it, a stream translates what it yields. After each turn the rows that
are done leave the batch, so all rows that go on do the same thing next; restoring therefore runs on exactly the rows
that asked, and finished rows cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clear_adapters.backbones.base import Context, Restoration
from clear_adapters.backbones.packed import PreparedImage, prepare_once
from clear_adapters.prompts import FORCED_DECLINE, Protocol
from clear_adapters.reply import Action
from clear_adapters.sampling import LatentSampling, RowRandom, TextSampling
from clear_adapters.transcript import (
    ImageSegment,
    Origin,
    RestorationSegment,
    Segment,
    TextSegment,
    Transcript,
    parse,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from clear_adapters.backbones.base import Backbone
    from clear_adapters.bridge import LatentBridge

Restore = Literal["auto", "always", "never"]
LatentFrom = Literal["own", "degraded", "clean", "reencode"]


@dataclass(frozen=True)
class Task:
    """What a rollout is asked to do; checked by the engine.

    Attributes:
        images: N pictures.
        questions: N questions as the model reads them.
        clean: N clean pictures, for `latent_from="clean"`.
        seeds: one for each of the N x group rows.
        protocol: the system prompt and the engine's own words; the plain model gets no system prompt.
        restore, latent_from, text, latent, max_restores, group: as in `Engine.rollout`.
        plain: one turn of the plain model, without the protocol.
    """

    images: list[Image]
    questions: list[str]
    clean: list[Image] | None
    seeds: list[int]
    protocol: Protocol
    restore: Restore
    latent_from: LatentFrom
    text: TextSampling
    latent: LatentSampling
    max_restores: int
    group: int = 1
    plain: bool = False

    @property
    def system(self) -> str:
        """The system prompt, empty where there is none."""
        return "" if self.plain else self.protocol.system


# ------------------------------------------------------------------------------- what the generator yields


@dataclass(frozen=True)
class Wrote:
    """One token in each row that is still in the batch: (R,) ids on the device, -1 in finished rows."""

    ids: Tensor


@dataclass(frozen=True)
class Closed:
    """A block of text is in the contexts of the named rows."""

    rows: list[int]
    segments: list[TextSegment]


@dataclass(frozen=True)
class Decided:
    """How a turn ended in the named rows."""

    rows: list[int]
    actions: list[Action]
    forced: bool


@dataclass(frozen=True)
class Estimated:
    """The estimates after a step of the restoration in the named rows."""

    rows: list[int]
    estimates: list[Restoration]
    step: int
    steps: int


@dataclass(frozen=True)
class Read:
    """The restorations that the named rows have read."""

    rows: list[int]
    segments: list[RestorationSegment]


Moment = Wrote | Closed | Decided | Estimated | Read


class _Clock:
    """Seconds by phase. The time that a consumer spends between two steps is not counted."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(("prefill", "text", "restore", "read"), 0.0)
        self._device = device

    def _stop(self, phase: str, begin: float) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        self.seconds[phase] += time.perf_counter() - begin

    def run(self, phase: str, steps: Generator[Any, None, Any]) -> Generator[Any, None, Any]:
        """Passes a generator on; waits for the device only at its end."""
        while True:
            begin = time.perf_counter()
            try:
                item = next(steps)
            except StopIteration as end:
                self._stop(phase, begin)
                return end.value
            self.seconds[phase] += time.perf_counter() - begin
            yield item

    def __call__(self, phase: str) -> _Lap:
        return _Lap(self, phase)


class _Lap:
    def __init__(self, clock: _Clock, phase: str) -> None:
        self._clock, self._phase = clock, phase

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._clock._stop(self._phase, self._begin)


# ----------------------------------------------------------------------------------------------- the machine


@dataclass
class _Batch:
    """The rows that go on.

    Attributes:
        rows: their numbers in the whole rollout.
        context: what they have read.
        before: the context before the present turn: the guidance branch without the thought.
    """

    rows: list[int]
    context: Context
    before: Context = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.context

    def keep(self, places: list[int], before: bool) -> None:
        """Drops all rows but those at the places; `before` is dropped too when it is not needed."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in places]
        self.context = self.context.select(places)
        if before:
            self.before = self.before.select(places)


class Rollout:
    """One batch on its way.

    Attributes:
        transcripts: one for each row, complete when `steps` has ended.
        clock: seconds by phase.
    """

    def __init__(self, backbone: Backbone, bridge: LatentBridge | None, task: Task) -> None:
        self._backbone = backbone
        self._bridge = bridge
        self._task = task
        self._prepare = prepare_once(backbone.prepare)
        self._prepared: list[PreparedImage] = []
        self._opening: Context  # one row that has read the system prompt, if there is one
        self.clock = _Clock(backbone.device)
        self.transcripts: list[Transcript] = []

    def steps(self) -> Generator[Moment, None, None]:
        """Runs the batch to its end."""
        task = self._task
        with self.clock("prefill"):
            batch = self._prefill()
        used = 0
        if task.restore == "always" and not task.plain:
            with self.clock("read"):
                forced = self._read_forced(batch, [task.protocol.forced_restore] * len(batch.rows))
            yield Closed(list(batch.rows), forced)
            yield Decided(list(batch.rows), ["restore"] * len(batch.rows), forced=True)
            yield from self._restore(batch)
            used = 1
        # A caller that forbids restoring still gets answers from a model that asks again and again.
        limit = max(1, task.max_restores) if task.restore == "never" else task.max_restores
        asked = False
        while True:
            batch.before = batch.context
            batch.context, segments = yield from self._write(batch)
            if task.plain:
                self._append(batch.rows, segments)
                yield Closed(list(batch.rows), segments)
                return
            requested: Action = "restore" if used < limit else "stop" if asked else "limit"
            if task.restore == "never":
                requested = "decline" if used < limit else "stop"
            actions = [_action(s.text, requested) for s in segments]
            on = [i for i, a in enumerate(actions) if a == requested and a != "stop"]
            stay = [i for i in range(len(segments)) if requested != "decline" or i not in on]
            rows, segments_on = list(batch.rows), [segments[i] for i in on]
            self._append([rows[i] for i in stay], [segments[i] for i in stay])
            yield Closed([rows[i] for i in stay], [segments[i] for i in stay])
            yield Decided(rows, actions, forced=requested in ("decline", "limit"))
            if not on:
                return
            start, position = batch.before.length, batch.before.position[on]
            batch.keep(on, before=task.latent.guidance_text > 1 and requested == "restore")
            if requested == "restore":
                yield from self._restore(batch)
                used += 1
                continue
            with self.clock("read"):
                if requested == "decline":
                    hidden = batch.context.hide(range(len(on)), start)
                    batch.context = replace(hidden, position=position)
                    texts = [task.protocol.declined(s.text) for s in segments_on]
                    used += 1
                else:
                    texts, asked = [FORCED_DECLINE] * len(on), True
                forced = self._read_forced(batch, texts)
            yield Closed(list(batch.rows), forced)

    # -- reading and writing

    def _prefill(self) -> _Batch:
        task, backbone = self._task, self._backbone
        count, device = len(task.images), backbone.device
        prompt: list[list[Segment]] = [[] for _ in range(count)]
        # The system prompt is the same for all rows: it is read once and repeated.
        context = backbone.start(1, [0])
        if task.system:
            system = self._text(task.system, Origin.PROMPT)
            context = backbone.read_text(context, [system.ids])
            for own in prompt:
                own.append(system)
        self._opening = context
        context = context.expand(count) if count > 1 else context
        self._prepared = [self._prepare(image) for image in task.images]
        context = backbone.read_image(context, self._prepared, as_condition=not task.plain)
        questions = [self._text(q, Origin.PROMPT) for q in task.questions]
        context = backbone.read_text(context, [q.ids for q in questions])
        for own, image, question in zip(prompt, task.images, questions, strict=True):
            own += [ImageSegment(image, as_condition=not task.plain), question]
        context = context.expand(task.group) if task.group > 1 else context
        self.transcripts = [Transcript(list(own)) for own in prompt for _ in range(task.group)]
        context = replace(context, random=RowRandom.from_seeds(task.seeds, device))
        return _Batch(list(range(count * task.group)), context)

    def _text(self, text: str, origin: Origin) -> TextSegment:
        return TextSegment(self._backbone.encode_text(text), origin, text)

    def _append(self, rows: Sequence[int], segments: Sequence[Segment]) -> None:
        for row, segment in zip(rows, segments, strict=True):
            self.transcripts[row].append(segment)

    def _read_forced(self, batch: _Batch, texts: list[str]) -> list[TextSegment]:
        segments = [self._text(text, Origin.FORCED) for text in texts]
        batch.context = self._backbone.read_text(batch.context, [s.ids for s in segments], own=True)
        self._append(batch.rows, segments)
        return segments

    def _write(self, batch: _Batch) -> Generator[Moment, None, tuple[Context, list[TextSegment]]]:
        steps = self._backbone.write_text_steps(batch.context, self._task.text)
        running = self.clock.run("text", steps)
        while True:
            try:
                ids = next(running)
            except StopIteration as end:
                return end.value
            yield Wrote(ids)

    # -- restoring

    def _restore(self, batch: _Batch) -> Generator[Moment, None, None]:
        task, backbone = self._task, self._backbone
        if task.latent_from in ("degraded", "clean"):
            with self.clock("restore"):
                found = backbone.encode_images(self._given(batch.rows))
            origin = Origin.INJECTED
        else:
            found = yield from self._sample(batch)
            origin = Origin.SAMPLED
        again = task.latent_from == "reencode"
        with self.clock("read"):
            if again:
                batch.context = backbone.reencode(batch.context, found)
            else:
                batch.context = backbone.read_restoration(batch.context, found, self._bridge)
        segments = [RestorationSegment(r, origin, reencoded=again) for r in found]
        self._append(batch.rows, segments)
        yield Read(list(batch.rows), segments)

    def _given(self, rows: list[int]) -> list[PreparedImage]:
        prompts = [row // self._task.group for row in rows]
        if self._task.latent_from == "degraded":
            return [self._prepared[i] for i in prompts]
        assert self._task.clean is not None
        return [self._prepare(self._task.clean[i]) for i in prompts]

    def _sample(self, batch: _Batch) -> Generator[Moment, None, list[Restoration]]:
        task = self._task
        with self.clock("restore"):
            guidance = self._guidance(batch)
        running = self.clock.run(
            "restore", self._backbone.restore_steps(batch.context, task.latent, guidance)
        )
        step = 0
        while True:
            try:
                estimates = next(running)
            except StopIteration as end:
                batch.context, found = end.value
                return found
            step += 1
            first = estimates[0]
            total = task.latent.steps - 1 if first.kind == "flow" else first.grid[0] * first.grid[1]
            yield Estimated(list(batch.rows), estimates, step, total)

    def _guidance(self, batch: _Batch) -> tuple[Context | None, Context | None]:
        """The contexts without this thought, and without any picture or restoration; the released code keeps them in the latter."""
        latent, backbone = self._task.latent, self._backbone
        text = batch.before if latent.guidance_text > 1 else None
        if latent.guidance_image <= 1:
            return text, None
        # Only built for rows that restore, so it costs nothing where none does. All rows have the same blocks.
        blocks = [[s for s in self.transcripts[row] if isinstance(s, TextSegment)] for row in batch.rows]
        image = self._opening if len(batch.rows) == 1 else self._opening.expand(len(batch.rows))
        # The opening has read the system prompt.
        for block in list(zip(*blocks, strict=True))[1 if self._task.system else 0 :]:
            own = block[0].origin is not Origin.PROMPT
            image = backbone.read_text(image, [s.ids for s in block], own=own)
        return text, image


def _action(text: str, requested: Action) -> Action:
    parsed = parse(text)
    if parsed.answer is not None:
        return "answer"
    return requested if parsed.wants_restore else "stop"
