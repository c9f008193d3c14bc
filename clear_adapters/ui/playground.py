"""The first tab: a picture, its damage, a question, and both answers side by side."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from clear_adapters.degradations import SEVERITIES, list_degradations
from clear_adapters.errors import ClearError, ClearValueError
from clear_adapters.results import ResultFile
from clear_adapters.ui import render
from clear_adapters.ui.asking import Asking, Course, Wish
from clear_adapters.ui.models import Names, Shelf
from clear_adapters.ui.pictures import AS_IT_IS, RANDOM, Subject, degraded, read_upload
from clear_adapters.ui.samples import SEVERITY, Suggestion, draw_sample, gallery, recorded
from clear_adapters.ui.transcripts import transcript_of

KEPT = 32
"""Courses of examples that are kept."""
SESSION = 3600
"""Seconds for which a visitor's picture is held in memory after he last changed it."""

OWN_QUESTIONS = [["What is in this picture?"], ["What does the sign say?"]]

Shown = dict[Any, Any]
"""New values by component; components that are not in it stay as they are."""


class Playground:
    """The tab and what its controls do; to be made inside a `gr.Blocks`.

    Args:
        shelf: the models.
        max_side: longest side of a visitor's picture, in pixels.
    """

    def __init__(self, shelf: Shelf, max_side: int) -> None:
        self.shelf = shelf
        self.max_side = max_side
        self.chosen_from: ResultFile = recorded()
        self.examples = [(e, _example(e.index), draw_sample(e.index).suggestions[0].text) for e in gallery()]
        self._kept: OrderedDict[Any, Course] = OrderedDict()
        self._running: dict[str, threading.Event] = {}
        self._build()
        self._connect()

    # ------------------------------------------------------------------------------------------------ what stands where

    def _build(self) -> None:
        first = self.examples[0][1]
        assert first.sample is not None
        questions = [[s.text] for s in first.sample.suggestions]
        self.strip = gr.HTML(render.strip(), elem_id="strip")
        self.gallery = gr.HTML(self._gallery(first), elem_id="gallery", js_on_load=_PICK, label="Examples")
        self.index = gr.Number(first.sample.index, visible=False, elem_id="index")
        self.subject = gr.State(first, time_to_live=SESSION)
        with gr.Row(elem_id="bench"):
            with gr.Column(scale=10, min_width=320, elem_id="inputs"):
                self._build_inputs(first, questions)
            with gr.Column(scale=21, min_width=320, elem_id="outcome"):
                with gr.Row(elem_id="columns"):
                    with gr.Column(scale=1, min_width=280, elem_id="plain"):
                        self.base = gr.HTML(render.base_card(None, None, None), elem_id="base")
                    with gr.Column(scale=1, min_width=280, elem_id="clear"):
                        self.before = gr.HTML(render.clear_before(None), elem_id="before")
                        self.picture = gr.HTML("", elem_id="restoration")
                        self.after = gr.HTML("", elem_id="after")
                self.verdict = gr.HTML("", elem_id="verdict")
        self._build_advanced(first)
        with gr.Accordion("Transcript", open=False, elem_id="transcript"):
            self.save = gr.HTML(render.download(None), elem_id="save")
            self.transcript = gr.JSON(
                None, label="Transcript", show_label=False, elem_id="transcript-json", max_height=420
            )

    def _build_inputs(self, first: Subject, questions: list[list[str]]) -> None:
        self.preview = gr.HTML(render.preview(first), elem_id="preview")
        self.trouble = gr.HTML("", elem_id="trouble")
        with gr.Accordion("Use a picture of your own", open=False, elem_id="own"):
            self.upload = gr.Image(
                type="filepath",
                sources=["upload", "clipboard", "webcam"],
                label="Upload, paste or photograph",
                height=190,
                elem_id="upload",
                buttons=[],
            )
            # Handed over unopened: `read_upload` is the one that opens the file, within bounds, and deletes it. (Gradio
            # writes a file beside a module that subclasses its components, so the instance is changed.)
            self.upload.preprocess = _place_of
            gr.Markdown(_PRIVACY, elem_classes="small")
        self.kind = gr.Dropdown(
            _kinds(), value=first.degradation, label="What spoils the picture", elem_id="kind"
        )
        with gr.Group(elem_id="severity"):
            self.level = gr.Radio([*SEVERITIES], value=SEVERITY, label="How much", elem_id="level")
            self.intensity = gr.Slider(
                0, 1, SEVERITIES[SEVERITY], step=0.01, label="Or exactly", elem_id="intensity", buttons=[]
            )
        self.question = gr.Textbox(
            questions[0][0], label="Question", lines=2, max_lines=6, elem_id="question"
        )
        self.suggested = gr.Dataset(
            components=[self.question],
            samples=questions,
            label=_KNOWN,
            type="values",
            layout="gallery",
            samples_per_page=6,
            elem_id="suggested",
        )
        self.restore = gr.Radio(
            [("model decides", "auto"), ("always", "always"), ("never", "never")],
            value="auto",
            label="Restore",
            elem_id="restore",
        )
        with gr.Row():
            self.go = gr.Button("Ask both", variant="primary", elem_id="ask", scale=3, min_width=120)
            self.end = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
        self.status = gr.HTML(render.status(), elem_id="status")

    def _build_advanced(self, first: Subject) -> None:
        others = self.shelf.allow_others
        hint = "built-in, a folder, or a Hub id (owner/name)" if others else "what this page offers"
        with gr.Accordion("Advanced: models, seeds, sampling", open=False, elem_id="advanced"):
            with gr.Row():
                self.model = gr.Dropdown(
                    ["", *self.shelf.choices("model")],
                    value=self.shelf.default.model or "",
                    allow_custom_value=True,
                    label="Model",
                    info=f"{hint}; empty for the adapter's own base",
                    elem_id="model",
                )
                self.adapter = gr.Dropdown(
                    self.shelf.choices("adapter"),
                    value=self.shelf.default.adapter,
                    allow_custom_value=True,
                    label="Adapter",
                    info=hint,
                    elem_id="adapter",
                )
            with gr.Row():
                self.damage_seed = gr.Number(
                    first.seed, precision=0, minimum=0, label="Seed of the damage", elem_id="damage-seed"
                )
                self.seed = gr.Number(0, precision=0, minimum=0, label="Seed of the models", elem_id="seed")
                self.steps = gr.Slider(
                    0,
                    50,
                    0,
                    step=1,
                    label="Points of the denoising schedule",
                    info="0 is the adapter's own",
                    elem_id="steps",
                )
                self.temperature = gr.Slider(
                    0,
                    1.5,
                    0,
                    step=0.1,
                    label="Temperature of text",
                    info="0 is greedy",
                    elem_id="temperature",
                )

    def _connect(self) -> None:
        answers = [self.strip, self.status, self.base, self.before, self.picture, self.after, self.verdict]
        answers += [self.transcript, self.save]
        asked: dict[str, Any] = {
            "fn": self.ask,
            "inputs": [
                *(self.subject, self.question, self.restore, self.model, self.adapter, self.seed),
                *(self.steps, self.temperature),
            ],
            "outputs": answers,
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "show_progress": "hidden",
        }
        by_button = self.go.click(**asked, api_name="ask", trigger_mode="once", js=_SHOW_ANSWERS)
        shown = [
            *(self.subject, self.kind, self.level, self.intensity, self.damage_seed, self.question),
            *(self.suggested, self.gallery, self.preview, self.trouble, *answers),
        ]
        by_example = (
            self.gallery.select(
                _picked, None, self.index, queue=False, show_progress="hidden", api_visibility="private"
            )
            .then(self.choose, self.index, shown, api_name="choose", show_progress="hidden")
            .then(**asked, api_visibility="private")
        )
        running = [by_button, by_example]
        self.end.click(
            self.stop,
            None,
            self.status,
            queue=False,
            cancels=running,
            show_progress="hidden",
            api_visibility="private",
        )
        damage = [self.kind, self.level, self.intensity, self.damage_seed]
        spoiled: dict[str, Any] = {
            "fn": self.spoil,
            "inputs": [self.subject, *damage, self.model, self.adapter],
            "outputs": [self.subject, self.preview, self.trouble, *answers],
            "cancels": running,
            "trigger_mode": "always_last",
            "concurrency_limit": 2,
            "concurrency_id": "pictures",
            "show_progress": "hidden",
        }
        self.kind.input(**spoiled, api_name="degrade")
        self.level.input(
            _intensity,
            self.level,
            self.intensity,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        ).then(**spoiled, api_visibility="private")
        self.intensity.release(
            lambda: None, None, self.level, queue=False, show_progress="hidden", api_visibility="private"
        ).then(**spoiled, api_visibility="private")
        self.damage_seed.submit(**spoiled, api_visibility="private")
        self.damage_seed.blur(**spoiled, api_visibility="private")
        self.upload.input(
            self.take,
            [self.upload, *damage, self.model, self.adapter],
            [
                *(self.upload, self.subject, self.question, self.suggested, self.gallery, self.preview),
                *(self.trouble, *answers),
            ],
            cancels=running,
            api_name="upload",
            concurrency_limit=2,
            concurrency_id="pictures",
            show_progress="hidden",
        )
        self.suggested.click(
            lambda row: row[0],
            self.suggested,
            self.question,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )

    # ------------------------------------------------------------------------------------------------ what controls do

    def _gallery(self, subject: Subject) -> str:
        chosen = None if subject.sample is None else subject.sample.index
        return render.gallery(self.examples, chosen, self.chosen_from.payload["counts"])

    def _nothing(self) -> Shown:
        """The answers' half with nothing answered yet."""
        return {
            self.strip: render.strip(),
            self.status: render.status(),
            self.base: render.base_card(None, None, None),
            self.before: render.clear_before(None),
            self.picture: "",
            self.after: "",
            self.verdict: "",
            self.transcript: None,
            self.save: render.download(None),
        }

    def choose(self, index: float, request: gr.Request) -> Shown:
        """Shows a sample: its picture as degraded at first, its questions, and nothing answered yet."""
        self._end(request)
        subject = _example(int(index) if 0 <= index < 10**6 else 0)
        assert subject.sample is not None
        questions = [[s.text] for s in subject.sample.suggestions]
        return {
            self.subject: subject,
            self.kind: subject.degradation,
            self.level: SEVERITY,
            self.intensity: SEVERITIES[SEVERITY],
            self.damage_seed: subject.seed,
            self.question: questions[0][0],
            self.suggested: gr.Dataset(samples=questions, label=_KNOWN),
            self.gallery: self._gallery(subject),
            self.preview: render.preview(subject),
            self.trouble: "",
            **self._nothing(),
        }

    def take(
        self,
        path: str | None,
        kind: str,
        level: str,
        intensity: float,
        seed: float,
        model: str,
        adapter: str,
        request: gr.Request,
    ) -> Shown:
        """Takes a visitor's picture, or says why it cannot be taken."""
        if path is None:
            return {self.trouble: ""}
        self._end(request)
        try:
            picture = read_upload(path, self.max_side)
            subject = degraded(picture, None, kind, _severity(level, intensity), _whole(seed))
        except (ClearError, OSError) as error:
            return {self.upload: None, self.trouble: render.problem(str(error))}
        return {
            self.upload: None,
            self.subject: subject,
            self.question: OWN_QUESTIONS[0][0],
            self.suggested: gr.Dataset(samples=OWN_QUESTIONS, label="Questions"),
            self.gallery: self._gallery(subject),
            self.preview: render.preview(subject, self._is_builtin(model, adapter)),
            self.trouble: "",
            **self._nothing(),
        }

    def spoil(
        self,
        subject: Subject | None,
        kind: str,
        level: str,
        intensity: float,
        seed: float,
        model: str,
        adapter: str,
        request: gr.Request,
    ) -> Shown:
        """Degrades the picture anew, where anything about it was changed."""
        if subject is None:
            return {self.trouble: render.problem(_EXPIRED)}
        try:
            changed = degraded(
                subject.picture, subject.sample, kind, _severity(level, intensity), _whole(seed)
            )
        except (ClearError, OSError) as error:
            return {self.trouble: render.problem(str(error))}
        if replace(changed, seen=subject.seen) == subject:
            return {self.trouble: ""}
        self._end(request)
        foreign = changed.sample is None and self._is_builtin(model, adapter)
        return {
            self.subject: changed,
            self.preview: render.preview(changed, foreign),
            self.trouble: "",
            **self._nothing(),
        }

    def ask(
        self,
        subject: Subject | None,
        question: str,
        restore: str,
        model: str,
        adapter: str,
        seed: float,
        steps: float,
        temperature: float,
        request: gr.Request,
    ) -> Iterator[Shown]:
        """Asks both models, and shows the course of it."""
        try:
            if subject is None:
                raise ClearValueError(_EXPIRED)
            names = self.shelf.names(model, adapter)
            wish = Wish(
                subject.seen,
                question or "",
                "always" if restore == "always" else "never" if restore == "never" else "auto",
                _whole(seed),
                int(steps) or None,
                float(temperature),
            )
        except ClearError as error:
            yield {**self._nothing(), self.status: render.status(None, str(error))}
            return
        truth = subject.sample.find(wish.question) if subject.sample is not None else None
        key = self._key(names, subject, wish)
        if key in self._kept:
            yield self._shown(replace(self._kept[key], cached=True), subject, truth, wish, names)
            return
        asking = Asking(self.shelf, names, wish)
        self._running[_session(request)] = asking.stop
        before: Shown = {}
        course = Course()
        try:
            for course in asking.follow():
                now = self._shown(course, subject, truth, wish, names)
                changed = {c: v for c, v in now.items() if c not in before or before[c] != v}
                before = now
                if changed:
                    yield changed
        finally:
            asking.stop.set()
            if self._running.get(_session(request)) is asking.stop:
                del self._running[_session(request)]
        if key is not None and course.phase == "done":
            self._kept[key] = course
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)

    def _key(self, names: Names, subject: Subject, wish: Wish) -> Any:
        """Under which an example's course is kept; None for anything that is none."""
        if subject.sample is None or subject.sample.index not in [e.index for e, _, _ in self.examples]:
            return None
        about = (subject.sample.index, subject.degradation, subject.intensity, subject.seed)
        if about not in [
            (s.sample.index, s.degradation, s.intensity, s.seed) for _, s, _ in self.examples if s.sample
        ]:
            return None
        if subject.sample.find(wish.question) is None:
            return None
        return (
            names,
            about,
            " ".join(wish.question.split()),
            wish.restore,
            wish.seed,
            wish.steps,
            wish.temperature,
        )

    def _shown(
        self, course: Course, subject: Subject, truth: Suggestion | None, wish: Wish, names: Names
    ) -> Shown:
        told = transcript_of(course, subject, truth, wish, names) if course.is_whole else None
        return {
            self.strip: render.strip(course),
            self.status: render.status(course),
            self.base: render.base_card(course, subject, truth),
            self.before: render.clear_before(course),
            self.picture: render.clear_picture(course),
            self.after: render.clear_after(course, truth),
            self.verdict: render.verdict(course, subject, truth) if told is not None else "",
            self.transcript: told,
            self.save: render.download(told),
        }

    def stop(self, request: gr.Request) -> str:
        """Ends what this visitor has asked."""
        self._end(request)
        return render.status(Course(phase="stopped"))

    def _end(self, request: gr.Request) -> None:
        running = self._running.pop(_session(request), None)
        if running is not None:
            running.set()

    def _is_builtin(self, model: str, adapter: str) -> bool:
        try:
            return self.shelf.names(model, adapter).is_builtin
        except ClearError:
            return self.shelf.default.is_builtin


_KNOWN = "Questions whose answer is known"
_EXPIRED = "There is no picture: it was forgotten after an hour. Choose an example or bring one."
_PRIVACY = (
    "JPEG, PNG, WebP and the like, at most 20 MB and 32 megapixels. The file is deleted as soon as it is read; the picture "
    "stays in memory while this page is open, and nothing leaves the machine that runs the page."
)
_TO_ANSWERS = """
  const cards = document.getElementById('plain');
  if (cards.getBoundingClientRect().top > innerHeight * 0.8) cards.scrollIntoView({behavior: 'smooth', block: 'start'});
"""
"""On a phone the answers are below the controls: show where something happens."""
_PICK = f"""
element.addEventListener('click', event => {{
  const button = event.target.closest('button[data-index]');
  if (!button) return;
  trigger('select', {{index: Number(button.dataset.index)}});
  {_TO_ANSWERS}
}});
"""
_SHOW_ANSWERS = f"(...all) => {{ {_TO_ANSWERS} return all; }}"


def _place_of(payload: Any) -> str | None:
    return None if payload is None else payload.path


def _example(index: int) -> Subject:
    sample = draw_sample(index)
    return degraded(sample.clean, sample, sample.degradation, SEVERITY, sample.seed)


def _picked(event: gr.EventData) -> int:
    return int(event.index)


def _kinds() -> list[tuple[str, str]]:
    named = [(f"{d.name.replace('_', ' ')}: {d.description}", d.name) for d in list_degradations()]
    return [
        ("random: one of the sixteen, by the seed of the damage", RANDOM),
        *named,
        ("nothing: already degraded, or fine as it is", AS_IT_IS),
    ]


def _severity(level: str | None, intensity: float) -> float:
    return float(SEVERITIES.get(level or "", intensity))


def _intensity(level: str) -> Any:
    return SEVERITIES.get(level, gr.skip())


def _whole(number: float | None) -> int:
    if number is None or not 0 <= number < 2**53:
        raise ClearValueError(f"The seed is {number}, and must be a whole number from 0 on.")
    return int(number)


def _session(request: gr.Request) -> str:
    return str(request.session_hash)
