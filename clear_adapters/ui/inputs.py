"""What visitors send, checked: Gradio hands it over raw, since what it refuses itself is told to nobody."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from clear_adapters.degradations import SEVERITIES
from clear_adapters.errors import ClearValueError, ImageError

LARGEST_SEED = 2**53 - 1
"""Above it a browser's numbers are no longer whole."""
POINTS = (2, 50)
"""Points of a restoration's schedule that may be asked for."""
HOTTEST = 1.5
"""Temperature of text, at most."""


def read_number(value: Any, name: str, low: float, high: float) -> float:
    """A number within bounds.

    Raises:
        ClearValueError: it is none, or out of them.
    """
    if not _is_number(value) or not low <= value <= high:
        raise ClearValueError(
            f"The {name} is {_shown(value)}, and must be a number from {low:g} to {high:g}."
        )
    return float(value)


def read_whole(value: Any, name: str, low: int, high: int) -> int:
    """A whole number within bounds.

    Raises:
        ClearValueError: it is none, or out of them.
    """
    if not _is_number(value) or not low <= value <= high or value != int(value):
        above = f"from {low} to {high}" if high < LARGEST_SEED else f"from {low} on"
        raise ClearValueError(f"The {name} is {_shown(value)}, and must be a whole number {above}.")
    return int(value)


def read_seed(value: Any) -> int:
    """A seed.

    Raises:
        ClearValueError: it is none.
    """
    return read_whole(value, "seed", 0, LARGEST_SEED)


def read_steps(value: Any) -> int | None:
    """Points of a schedule; None for 0, which is the adapter's own.

    Raises:
        ClearValueError: it is no number, or out of its bounds.
    """
    if _is_number(value) and value == 0:
        return None
    return read_whole(value, "number of points", *POINTS)


def read_severity(level: Any, intensity: Any) -> float:
    """The number of a level; where none is chosen, the exact number.

    Raises:
        ClearValueError: neither can be read.
    """
    if isinstance(level, str) and level in SEVERITIES:
        return SEVERITIES[level]
    return read_number(intensity, "severity", 0, 1)


def read_text(value: Any) -> str:
    """A text; empty for nothing.

    Raises:
        ClearValueError: it is another thing, or holds half a sign, which cannot be written as UTF-8.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ClearValueError(f"The question is {_shown(value)}, which is no text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        place = error.start + 1
        raise ClearValueError(
            f"Sign {place} of the question is half of one and cannot be written as text. Delete it."
        ) from error
    return value


def read_name(value: Any, kind: str) -> str:
    """A name of a model, an adapter or a corruption; empty for nothing.

    Raises:
        ClearValueError: it is no text.
    """
    if value is not None and not isinstance(value, str):
        raise ClearValueError(f"The {kind} is {_shown(value)}, which is no name.")
    return (value or "").strip().encode("utf-8", "replace").decode()


def find_upload(payload: Any, uploads: Container[str]) -> Path:
    """The file of an upload.

    Gradio looks at a path only where the payload says of itself that it is a file, so that any path of this machine may
    stand here. Only those that the server itself gave out for an upload are taken, as they were given out.

    Args:
        payload: what the browser says about it.
        uploads: paths of everything that was uploaded to this page.

    Raises:
        ImageError: it is none of them; nothing was opened or deleted.
    """
    path = payload.get("path") if isinstance(payload, dict) else None
    if not isinstance(path, str) or path not in uploads:
        raise ImageError("This is no picture that was uploaded here. Upload it again.")
    return Path(path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
