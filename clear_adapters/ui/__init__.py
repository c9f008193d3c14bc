"""The Gradio page (extra `demo`): `launch(build_demo())`.

A folder where the design has one file: a page is many concepts.

page          the whole, and how it is served
controls      the controls of the first tab
playground    what they do: picture, damage, question, both answers
benchmark     second tab: official results, and a small run
asking        one question to both models, in a thread that has the model
models        the models, shared, one question at a time
inputs        what visitors send, checked
sessions      what is held of a visitor, and for how long
pictures      uploads within bounds; pictures as text
samples       scenes, questions, truths; how the gallery is chosen
render        what is shown, as HTML
transcripts   what happened, as data
"""

from __future__ import annotations

from clear_adapters.ui.page import build_demo, launch

__all__ = ["build_demo", "launch"]
