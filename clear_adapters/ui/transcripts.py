"""What was asked and how it went, as plain data."""

from __future__ import annotations

from typing import Any

from clear_adapters._version import __version__
from clear_adapters.ui.asking import Progress, Query
from clear_adapters.ui.models import Names
from clear_adapters.ui.pictures import Subject
from clear_adapters.ui.samples import Suggestion


def transcript_of(
    progress: Progress, subject: Subject, truth: Suggestion | None, query: Query, names: Names
) -> dict[str, Any]:
    """Everything that is needed to read it, and with a sample to do it again; no pixels.

    Args:
        progress: whole.
        subject: the picture.
        truth: None where it is not known.
        query: what was asked.
        names: who answered.
    """
    assert progress.base is not None
    assert progress.clear is not None
    about = (
        None
        if subject.degradation is None
        else {"name": subject.degradation, "intensity": subject.intensity, "seed": subject.seed}
    )
    right = (
        None
        if truth is None
        else {
            "as_it_is": truth.is_right(progress.base_text),
            "clear": truth.is_right(progress.clear.text.strip()),
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
        "question": query.question,
        "truth": None if truth is None else truth.truth,
        "right": right,
        "restore": query.restore,
        "seed": query.seed,
        "steps": query.steps,
        "temperature": query.temperature,
        "as_it_is": {**progress.base.to_json(), "seconds": round(progress.base_seconds, 3)},
        "clear": {**progress.clear.to_json(), "seconds": round(progress.clear_seconds, 3)},
    }
