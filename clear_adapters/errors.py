"""The family of exceptions that the library raises on purpose.

Each is also a builtin (`ValueError`, `KeyError`, ...), so callers may catch either. A message says what is wrong, which
value it was, why that cannot work and what to do instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_FULL_LIST_UP_TO = 24
"""A list of names no longer than this is printed whole in the message of a miss."""


class ClearError(Exception):
    """Base of every error that this library raises on purpose."""


class ClearValueError(ClearError, ValueError):
    """A value that has the right type but cannot work."""


class ClearTypeError(ClearError, TypeError):
    """A value of a type that is not accepted."""


class UnknownNameError(ClearError, KeyError):
    """A name that nothing is registered under."""

    def __str__(self) -> str:
        """Return the message itself: `KeyError` would print its `repr`."""
        return str(self.args[0]) if self.args else ""


class ImageError(ClearValueError):
    """A picture that cannot be read, or that is not one."""


class CheckpointError(ClearValueError):
    """A model folder or checkpoint that is missing, damaged or of another layout."""


class AdapterError(ClearValueError):
    """An adapter folder or its settings that cannot be used."""


class BackboneMismatchError(ClearValueError):
    """An adapter, a specification or a model that belong to different backbones."""


class AttachError(ClearError, RuntimeError):
    """Attaching or detaching that is impossible in the model's present state."""


class BrokenEntryError(ClearError, ImportError):
    """A registered entry, ours or a plug-in's, that cannot be loaded."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, hint: str = "") -> UnknownNameError:
    """Build the error for a name that is not known, with the nearest known ones.

    Args:
        kind: What the name was looked up as, singular: `"backbone"`, `"degradation"`.
        name: The name as the caller gave it.
        known: Every name that would have been accepted, in any order.
        hint: One more sentence on what to do, appended to the message.

    Returns:
        The error, to be raised by the caller. Its message lists close matches (typing errors and other capitals) and,
        where the list is short, every known name.
    """
    names = sorted(set(known))
    by_folded = {candidate.casefold(): candidate for candidate in names}
    folded = difflib.get_close_matches(str(name).casefold(), list(by_folded), n=3, cutoff=0.6)
    close = [repr(by_folded[candidate]) for candidate in folded]
    parts = [f"Unknown {kind} {name!r}."]
    if close:
        parts.append(f"Did you mean {' or '.join(close)}?")
    if not names:
        parts.append(f"No {kind} is registered.")
    elif len(names) <= _FULL_LIST_UP_TO:
        parts.append(f"Known: {', '.join(names)}.")
    elif not close:
        parts.append(f"There are {len(names)} known names, none of them close.")
    if hint:
        parts.append(hint)
    return UnknownNameError(" ".join(parts))
