"""The first tab: a picture, its damage, a question, and both answers side by side."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from clear_adapters.degradations import SEVERITIES
from clear_adapters.errors import ClearError, ClearValueError
from clear_adapters.results import ResultFile
from clear_adapters.ui import render
from clear_adapters.ui.asking import SECONDS, Asking, Progress, Query
from clear_adapters.ui.controls import KNOWN, SHOW_ANSWERS, Controls
from clear_adapters.ui.inputs import (
    HOTTEST,
    find_upload,
    read_name,
    read_number,
    read_seed,
    read_severity,
    read_steps,
    read_text,
    read_whole,
)
from clear_adapters.ui.models import ModelPool, Names
from clear_adapters.ui.pictures import Subject, degraded, read_upload
from clear_adapters.ui.samples import SEVERITY, Suggestion, draw_sample, gallery, recorded
from clear_adapters.ui.transcripts import transcript_of

KEPT = 32
"""Answers about examples that are kept."""
OWN_QUESTIONS = [["What is in this picture?"], ["What does the sign say?"]]

Shown = dict[Any, Any]
"""New values by component; components that are not in it stay as they are."""


class Playground:
    """The tab and what its controls do; to be made inside a `gr.Blocks`.

    Args:
        pool: the models.
        max_side: longest side of a visitor's picture, in pixels.
        uploads: paths of what was uploaded to this page.
        max_seconds: that a question may take.
    """

    def __init__(
        self, pool: ModelPool, max_side: int, uploads: Container[str], max_seconds: float = SECONDS
    ) -> None:
        self.pool = pool
        self.uploads = uploads
        self.max_seconds = max_seconds
        self.max_side = max_side
        self.chosen_from: ResultFile = recorded()
        self.examples = [(e, _example(e.index)) for e in gallery()]
        self._places = {_place(subject) for _, subject in self.examples}
        self._kept: OrderedDict[Any, Progress] = OrderedDict()
        self._running: dict[str, _Running] = {}
        self.on = Controls(pool, self.examples[0][1], self._gallery(self.examples[0][1]))
        self._connect()

    def _connect(self) -> None:
        on = self.on
        answers = [*self._nothing()]
        asked: dict[str, Any] = {
            "fn": self.ask,
            "preprocess": False,  # here and below: what is sent is checked by `inputs`
            "inputs": [
                on.subject,
                on.question,
                on.restore,
                on.model,
                on.adapter,
                on.seed,
                on.steps,
                on.temperature,
                on.version,
            ],
            "outputs": answers,
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "show_progress": "minimal",  # the place in the queue
            "show_progress_on": on.status,
        }
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        # Nothing is cancelled through Gradio, which ends an answer without a word and may take the next click back. Whatever
        # ends an answer sets its flag (`end`), and makes a new version, so that a question that still waits is dropped.
        on.go.click(**asked, api_name="ask", trigger_mode="always_last", js=SHOW_ANSWERS)
        chosen = [on.subject, on.question, on.suggested, on.gallery, on.preview, on.trouble]
        damage = [on.kind, on.level, on.intensity, on.damage_seed]
        (
            on.gallery.select(_picked, None, on.index, trigger_mode="multiple", **quiet)
            .then(
                self.choose,
                on.index,
                [*chosen, *damage, *answers, on.version],
                api_name="choose",
                preprocess=False,
                trigger_mode="always_last",
                show_progress="hidden",
            )
            .then(**asked, api_visibility="private", trigger_mode="always_last")
        )
        on.stop.click(
            self.stop,
            [on.subject, on.version],
            [on.subject, on.version, on.status],
            preprocess=False,
            **quiet,
        )
        degrading: dict[str, Any] = {
            "preprocess": False,
            "outputs": [on.subject, on.preview, on.trouble, on.level, on.intensity, *answers, on.version],
            "trigger_mode": "always_last",
            "concurrency_limit": 2,
            "concurrency_id": "pictures",
            "show_progress": "hidden",
        }
        choice = [on.subject, *damage, on.model, on.adapter, on.version]
        on.kind.input(self.degrade, choice, **degrading, api_name="degrade")
        for changed in (on.level.input, on.damage_seed.submit, on.damage_seed.blur):
            changed(self.degrade, choice, **degrading, api_visibility="private")
        on.intensity.input(self.degrade, choice, **degrading, api_visibility="private", js=_NO_LEVEL)
        on.upload.input(
            self.upload,
            [on.upload, *damage, on.model, on.adapter],
            [on.upload, *chosen, *answers, on.version],
            trigger_mode="always_last",
            preprocess=False,  # so that the file comes unopened, too
            api_name="upload",
            concurrency_limit=2,
            concurrency_id="pictures",
            show_progress="hidden",
        )
        on.suggested.click(lambda row: row[0], on.suggested, on.question, **quiet)

    # ------------------------------------------------------------------------------------------------ what controls do

    def _gallery(self, subject: Subject) -> str:
        chosen = None if subject.sample is None else subject.sample.index
        return render.gallery(self.examples, chosen, self.chosen_from.payload["counts"])

    def _nothing(self, stopped: bool = False) -> Shown:
        """The answers' half with nothing answered yet, or with an answer that was ended."""
        return {
            self.on.strip: render.strip(),
            self.on.status: render.status(_STOPPED if stopped else None),
            self.on.base: render.base_card(None, None, None),
            self.on.before: render.clear_before(None),
            self.on.restoration: "",
            self.on.after: "",
            self.on.verdict: "",
            self.on.transcript: None,
            self.on.save: render.download(None),
        }

    def choose(self, index: Any, request: gr.Request) -> Shown:
        """Shows a sample: its picture as degraded at first, its questions, and nothing answered yet."""
        try:
            subject = _example(read_whole(index, "number of the sample", 0, 10**6))
        except ClearError as error:
            return {self.on.trouble: render.problem(str(error))}
        stopped = self.end(request)
        assert subject.sample is not None
        questions = [[s.text] for s in subject.sample.suggestions]
        return {
            **self._hold(subject),
            self.on.kind: subject.degradation,
            self.on.level: SEVERITY,
            self.on.intensity: SEVERITIES[SEVERITY],
            self.on.damage_seed: subject.seed,
            self.on.question: questions[0][0],
            self.on.suggested: gr.Dataset(samples=questions, label=KNOWN),
            self.on.gallery: self._gallery(subject),
            self.on.preview: render.preview(subject),
            self.on.trouble: "",
            **self._nothing(stopped),
        }

    def _hold(self, subject: Subject) -> Shown:
        """Another picture, or the same after a stop: what was asked before is not answered any more."""
        version = time.time_ns() // 10**6
        return {self.on.subject: replace(subject, version=version), self.on.version: version}

    def _held(self, subject: Subject | None, version: Any) -> Subject:
        """What the visitor has before him.

        Raises:
            ClearValueError: it was forgotten. (A visitor who never chose anything has the first example.)
        """
        if subject is None and version != 0:
            raise ClearValueError(_EXPIRED)
        return subject or self.examples[0][1]

    def begin(self) -> Shown:
        """The first example, for a page that was just opened."""
        return self._hold(self.examples[0][1])

    def upload(
        self,
        payload: Any,
        kind: Any,
        level: Any,
        intensity: Any,
        seed: Any,
        model: Any,
        adapter: Any,
        request: gr.Request,
    ) -> Shown:
        """Takes a visitor's picture, or says why it cannot be taken."""
        if payload is None:
            return {self.on.trouble: ""}
        try:
            picture = read_upload(find_upload(payload, self.uploads), self.max_side)
            name = read_name(kind, "corruption")
            subject = degraded(picture, None, name, read_severity(level, intensity), read_seed(seed))
        except (ClearError, OSError) as error:
            return {self.on.upload: None, self.on.trouble: render.problem(str(error))}
        stopped = self.end(request)
        return {
            self.on.upload: None,
            **self._hold(subject),
            self.on.question: OWN_QUESTIONS[0][0],
            self.on.suggested: gr.Dataset(samples=OWN_QUESTIONS, label="Questions"),
            self.on.gallery: self._gallery(subject),
            self.on.preview: render.preview(subject, self._is_builtin(model, adapter)),
            self.on.trouble: "",
            **self._nothing(stopped),
        }

    def degrade(
        self,
        subject: Subject | None,
        kind: Any,
        level: Any,
        intensity: Any,
        seed: Any,
        model: Any,
        adapter: Any,
        version: Any,
        request: gr.Request,
    ) -> Shown:
        """Degrades the picture anew, where anything about it was changed."""
        try:
            subject = self._held(subject, version)
            severity = read_severity(level, intensity)
            name = read_name(kind, "corruption")
            changed = degraded(subject.picture, subject.sample, name, severity, read_seed(seed))
        except (ClearError, OSError) as error:
            return {self.on.trouble: render.problem(str(error))}
        if replace(changed, seen=subject.seen, version=subject.version) == subject:
            return {self.on.trouble: ""}
        stopped = self.end(request)
        foreign = changed.sample is None and self._is_builtin(model, adapter)
        shown = {
            self.on.level: level,
            **self._hold(changed),
            self.on.preview: render.preview(changed, foreign),
            self.on.trouble: "",
            **self._nothing(stopped),
        }
        # Without a level the slider says how much, and may have moved on.
        return shown if level is None else shown | {self.on.intensity: severity}

    def ask(
        self,
        subject: Subject | None,
        question: Any,
        restore: Any,
        model: Any,
        adapter: Any,
        seed: Any,
        steps: Any,
        temperature: Any,
        version: Any,
        request: gr.Request,
    ) -> Iterator[Shown]:
        """Asks both models, and shows the progress of it."""
        if subject is not None and version not in (0, subject.version):
            yield {self.on.status: render.status(_STOPPED)}
            return
        try:
            subject = self._held(subject, version)
            names = self.pool.names(model, adapter)
            query = Query(
                subject.seen,
                read_text(question),
                "always" if restore == "always" else "never" if restore == "never" else "auto",
                read_seed(seed),
                read_steps(steps),
                read_number(temperature, "temperature", 0, HOTTEST),
            )
        except ClearError as error:
            yield {**self._nothing(), self.on.status: render.status(None, str(error))}
            return
        truth = subject.sample.find(query.question) if subject.sample is not None else None
        key = self._key(names, subject, truth, query)
        if key in self._kept:
            yield self._shown(replace(self._kept[key], cached=True), subject, truth, query, names)
            return
        asking = Asking(self.pool, names, query, self.max_seconds)
        running = self._running[_session(request)] = _Running(asking.stop)
        before: Shown = {}
        progress = Progress()
        try:
            for progress in asking.follow():
                if running.replaced:
                    yield {
                        self.on.status: render.status(_STOPPED)
                    }  # the rest is about another picture already
                    return
                now = self._shown(progress, subject, truth, query, names)
                changed = {c: v for c, v in now.items() if c not in before or before[c] != v}
                before = now
                if changed:
                    yield changed
        finally:
            asking.stop.set()
            if self._running.get(_session(request)) is running:
                del self._running[_session(request)]
        if key is not None and progress.phase == "done":
            assert progress.base is not None
            assert progress.clear is not None
            # Without what would keep a model in memory that the pool has dropped.
            base, clear = (replace(r, _decode=None) for r in (progress.base, progress.clear))
            self._kept[key] = replace(progress, base=base, clear=clear)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)

    def _key(self, names: Names, subject: Subject, truth: Suggestion | None, query: Query) -> Any:
        """Under which an example's progress is kept; None for anything that is none."""
        place = _place(subject)
        if truth is None or place not in self._places:
            return None
        return names, place, truth.text, query.restore, query.seed, query.steps, query.temperature

    def _shown(
        self, progress: Progress, subject: Subject, truth: Suggestion | None, query: Query, names: Names
    ) -> Shown:
        shown = Names(self.pool.label(names.model) or None, self.pool.label(names.adapter))
        transcript = transcript_of(progress, subject, truth, query, shown) if progress.is_whole else None
        return {
            self.on.strip: render.strip(progress),
            self.on.status: render.status(progress),
            self.on.base: render.base_card(progress, subject, truth),
            self.on.before: render.clear_before(progress),
            self.on.restoration: render.clear_picture(progress),
            self.on.after: render.clear_after(progress, truth),
            self.on.verdict: render.verdict(progress, subject, truth) if transcript is not None else "",
            self.on.transcript: transcript,
            self.on.save: render.download(transcript),
        }

    def stop(self, subject: Subject | None, version: Any, request: gr.Request) -> Shown:
        """Ends what this visitor has asked."""
        running = self._running.pop(_session(request), None)
        if running is not None:
            running.stop.set()
        status = {self.on.status: render.status(_STOPPED)}
        if subject is None and version != 0:
            return status
        return {**self._hold(self._held(subject, version)), **status}

    def end(self, request: gr.Request) -> bool:
        """Ends an answer since another picture takes its place; whether there was one."""
        running = self._running.pop(_session(request), None)
        if running is not None:
            running.replaced = True
            running.stop.set()
        return running is not None

    def _is_builtin(self, model: Any, adapter: Any) -> bool:
        try:
            return self.pool.names(model, adapter).is_builtin
        except ClearError:
            return self.pool.default.is_builtin


@dataclass
class _Running:
    """An answer on its way: the flag that ends it, and whether it was ended by another picture."""

    stop: threading.Event
    replaced: bool = False


_NO_LEVEL = "(subject, kind, level, ...rest) => [subject, kind, null, ...rest]"
"""Of what the slider sends: whatever level was chosen before."""
_STOPPED = Progress(phase="stopped")
_EXPIRED = "There is no picture: it was forgotten after an hour. Choose an example or bring one."


def _place(subject: Subject) -> Any:
    """Which sample it is, and what was done to it."""
    index = None if subject.sample is None else subject.sample.index
    return index, subject.degradation, subject.intensity, subject.seed


def _example(index: int) -> Subject:
    sample = draw_sample(index)
    return degraded(sample.clean, sample, sample.degradation, SEVERITY, sample.seed)


def _picked(event: gr.EventData) -> int:
    return int(event.index)


def _session(request: gr.Request) -> str:
    return str(request.session_hash or f"nobody-{id(request)}")
