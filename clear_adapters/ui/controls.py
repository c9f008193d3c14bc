"""The controls of the first tab and where they stand; what they do is the playground's."""

from __future__ import annotations

import gradio as gr

from clear_adapters.degradations import SEVERITIES, list_degradations
from clear_adapters.ui import render
from clear_adapters.ui.inputs import HOTTEST, POINTS
from clear_adapters.ui.models import ModelPool
from clear_adapters.ui.pictures import AS_IT_IS, RANDOM, Subject
from clear_adapters.ui.samples import SEVERITY
from clear_adapters.ui.sessions import UNUSED

KNOWN = "Questions whose answer is known"
_PRIVACY = (
    "JPEG, PNG, WebP and the like, at most 20 MB and 32 megapixels. The file is deleted as soon as it is read. The picture "
    "stays in the memory of the machine that runs the page until you close the page or leave it unused for an hour, and goes nowhere else."
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
SHOW_ANSWERS = f"(...all) => {{ {_TO_ANSWERS} return all; }}"


class Controls:
    """Every component of the tab by name; to be made inside a `gr.Blocks`.

    Args:
        pool: the models.
        first: what is shown at first, a sample.
        gallery: the examples, as HTML.
    """

    def __init__(self, pool: ModelPool, first: Subject, gallery: str) -> None:
        self._pool = pool
        assert first.sample is not None
        questions = [[s.text] for s in first.sample.suggestions]
        self.strip = gr.HTML(render.strip(), elem_id="strip")
        self.gallery = gr.HTML(gallery, elem_id="gallery", js_on_load=_PICK, label="Examples")
        self.index = gr.Number(first.sample.index, visible=False, elem_id="index")
        self.subject = gr.State(None, time_to_live=UNUSED)
        self.version = gr.Number(0, visible=False, elem_id="version")
        with gr.Row(elem_id="bench"):
            with gr.Column(scale=10, min_width=320, elem_id="inputs"):
                self._build_inputs(first, questions)
            with gr.Column(scale=21, min_width=320, elem_id="outcome"):
                with gr.Row(elem_id="columns"):
                    with gr.Column(scale=1, min_width=280, elem_id="plain"):
                        self.base = gr.HTML(render.base_card(None, None, None), elem_id="base")
                    with gr.Column(scale=1, min_width=280, elem_id="clear"):
                        self.before = gr.HTML(render.clear_before(None), elem_id="before")
                        self.restoration = gr.HTML("", elem_id="restoration")
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
            label=KNOWN,
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
            self.stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
        self.status = gr.HTML(render.status(), elem_id="status")

    def _build_advanced(self, first: Subject) -> None:
        others = self._pool.allow_others
        hint = "built-in, a folder, or a Hub id (owner/name)" if others else "what this page offers"
        with gr.Accordion("Advanced: models, seeds, sampling", open=False, elem_id="advanced"):
            with gr.Row():
                self.model = gr.Dropdown(
                    ["", *self._pool.choices("model")],
                    value=self._pool.label(self._pool.default.model),
                    allow_custom_value=True,
                    label="Model",
                    info=f"{hint}; empty for the adapter's own base",
                    elem_id="model",
                )
                self.adapter = gr.Dropdown(
                    self._pool.choices("adapter"),
                    value=self._pool.label(self._pool.default.adapter),
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
                    POINTS[1],
                    0,
                    step=2,  # a schedule of one point takes no step
                    label="Points of the denoising schedule",
                    info="0 is the adapter's own",
                    elem_id="steps",
                )
                self.temperature = gr.Slider(
                    0,
                    HOTTEST,
                    0,
                    step=0.1,
                    label="Temperature of text",
                    info="0 is greedy",
                    elem_id="temperature",
                )


def _kinds() -> list[tuple[str, str]]:
    named = [(f"{d.name.replace('_', ' ')}: {d.description}", d.name) for d in list_degradations()]
    return [
        ("random: one of the sixteen, by the seed of the damage", RANDOM),
        *named,
        ("nothing: already degraded, or fine as it is", AS_IT_IS),
    ]
