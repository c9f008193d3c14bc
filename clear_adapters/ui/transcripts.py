"""What was asked and how it went, as plain data."""

from __future__ import annotations

from typing import Any

from clear_adapters._version import __version__
from clear_adapters.ui.asking import Course, Wish
from clear_adapters.ui.models import Names
from clear_adapters.ui.pictures import Subject
from clear_adapters.ui.samples import Suggestion


def transcript_of(
    course: Course, subject: Subject, truth: Suggestion | None, wish: Wish, names: Names
) -> dict[str, Any]:
    """Everything that is needed to read it, and with a sample to do it again; no pixels.

    Args:
        course: whole.
        subject: the picture.
        truth: None where it is not known.
        wish: what was asked.
        names: who answered.
    """
    assert course.base is not None
    assert course.clear is not None
    about = (
        None
        if subject.degradation is None
        else {"name": subject.degradation, "intensity": subject.intensity, "seed": subject.seed}
    )
    right = (
        None
        if truth is None
        else {
            "as_it_is": truth.is_right(course.base_text),
            "clear": truth.is_right(course.clear.text.strip()),
        }
    )
    return {
        "clear_adapters": __version__,
        "model": names.model,
        "adapter": names.adapter,
        "picture": {
            "sample": None if subject.sample is None else subject.sample.index,
            "size": list(subject.seen.size),
            "degradation": about,
        },
        "question": wish.question,
        "truth": None if truth is None else truth.truth,
        "right": right,
        "restore": wish.restore,
        "seed": wish.seed,
        "steps": wish.steps,
        "temperature": wish.temperature,
        "as_it_is": {**course.base.to_json(), "seconds": round(course.base_seconds, 3)},
        "clear": {**course.clear.to_json(), "seconds": round(course.clear_seconds, 3)},
    }
