"""The page's models: loaded once, shared by everyone, used by one question at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clear_adapters.adapter import attach
from clear_adapters.errors import ClearValueError
from clear_adapters.store import builtin_names
from clear_adapters.ui.inputs import read_name

if TYPE_CHECKING:
    from clear_adapters.attached import AttachedModel

_PATIENCE = 0.1
"""Seconds between two looks whether somebody who waits has given up."""


class Stopped(Exception):  # noqa: N818  # no error: the visitor's own wish
    """The visitor pressed stop, or left."""


@dataclass(frozen=True)
class Names:
    """Which model answers.

    Attributes:
        model: as `attach` takes it; None is the adapter's own base.
        adapter: the same.
    """

    model: str | None
    adapter: str

    @property
    def is_builtin(self) -> bool:
        """Whether the model is one that ships."""
        return (self.model or self.adapter).startswith("builtin:")


class ModelPool:
    """Attached models by their names, a bounded number of them.

    One lock stands before all: whoever is inside `use` has the machine to himself, so that the adapter which is switched
    off for one visitor's question never is for another's.

    Args:
        default: what the page begins with.
        allow_others: take any folder and Hub id; else built-in names and the default's alone.
        device: as `attach` takes it.
        capacity: models that are kept; the one that was not used for longest is dropped before another is loaded.
    """

    def __init__(self, default: Names, *, allow_others: bool, device: str | None, capacity: int) -> None:
        self.default = default
        self.allow_others = allow_others
        self.device = device
        self._capacity = capacity
        self._held: OrderedDict[Names, AttachedModel] = OrderedDict()
        self._lock = threading.Lock()

    def choices(self, kind: str) -> list[str]:
        """Names that are offered: of kind `model` or `adapter`."""
        own = self.default.model if kind == "model" else self.default.adapter
        offered = builtin_names("model" if kind == "model" else "adapter")
        return [*([own] if own and own not in offered else []), *offered]

    def names(self, model: Any, adapter: Any) -> Names:
        """Two names as a visitor gave them, checked.

        Raises:
            ClearValueError: one is no name, or the page does not take other models, and one is none of those offered.
        """
        model, adapter = read_name(model, "model"), read_name(adapter, "adapter")
        found = Names(model or (self.default.model if not adapter else None), adapter or self.default.adapter)
        if not self.allow_others:
            for kind, name in (("model", found.model), ("adapter", found.adapter)):
                if name is not None and name not in self.choices(kind):
                    raise ClearValueError(
                        f"this page answers with its own models alone; of kind {kind} it has {', '.join(self.choices(kind))}"
                    )
        return found

    def holds(self, names: Names) -> bool:
        """Whether a model is loaded."""
        return names in self._held

    @contextmanager
    def use(self, names: Names, stop: threading.Event | None = None) -> Iterator[AttachedModel]:
        """The model, to be used by nobody else inside the `with`; loaded if it is not there.

        Args:
            names: which.
            stop: where it is set while the model is waited for, the wait ends.

        Raises:
            Stopped: the wait was given up.
            ClearError: the model or adapter cannot be loaded.
        """
        while not self._lock.acquire(timeout=_PATIENCE):
            if stop is not None and stop.is_set():
                raise Stopped
        try:
            if names not in self._held:
                while len(self._held) >= self._capacity:
                    self._held.popitem(last=False)
                self._held[names] = attach(names.model, names.adapter, device=self.device)
            self._held.move_to_end(names)
            yield self._held[names]
        finally:
            self._lock.release()

    def give_way(self) -> None:
        """Lets somebody who waits in `use` go first; to be called inside `use` between two pieces of work."""
        self._lock.release()
        try:
            threading.Event().wait(_PATIENCE)
        finally:
            self._lock.acquire()
