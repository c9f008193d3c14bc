"""The page's models: loaded once, shared by everyone, used by one question at a time."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clear_adapters import store
from clear_adapters.adapter import attach
from clear_adapters.backbones import find_for_folder
from clear_adapters.errors import BackboneMismatchError, CheckpointError, ClearValueError
from clear_adapters.store import builtin_names
from clear_adapters.ui.inputs import read_name

if TYPE_CHECKING:
    from clear_adapters.attached import AttachedModel
    from clear_adapters.config import ClearConfig

_PATIENCE = 0.1
"""Seconds between two looks whether somebody who waits has given up."""
_REMEMBERED = 64
"""Pairs of names that are known to fit."""
_PLACE = re.compile(r"(?:^|[\s'\"(=])(?:/|~|\.{1,2}/|[A-Za-z]:\\)[^\s]")
"""A path in a message."""

_log = logging.getLogger(__name__)


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
        allow_others: take any folder and Hub id; else built-in names and the default's alone, a folder of which is shown
            by its last part, since strangers need not know where it stands.
        device: as `attach` takes it.
        capacity: models that are kept; the one that was not used for longest is dropped before another is loaded, but
            never one in use: who needs another waits.
    """

    def __init__(self, default: Names, *, allow_others: bool, device: str | None, capacity: int) -> None:
        self.default = default
        self.allow_others = allow_others
        self.device = device
        self._capacity = capacity
        self._held: OrderedDict[Names, AttachedModel] = OrderedDict()
        self._users: Counter[Names] = Counter()
        self._checked: dict[Names, Names] = {}
        self._lock = threading.Lock()

    # -- names

    def label(self, name: str | None) -> str:
        """How a name is shown."""
        if name is None:
            return ""
        own = name in (self.default.model, self.default.adapter)
        if self.allow_others or not own or not Path(name).expanduser().is_dir():
            return name
        return Path(name).expanduser().resolve().name

    def choices(self, kind: Literal["model", "adapter"]) -> list[str]:
        """Names that are offered, as they are shown: adapters, or models for which one of them was made."""
        own = self.default.model if kind == "model" else self.default.adapter
        offered = builtin_names(kind)
        if kind == "model":
            bases = {_config_of(name).base_model for name in builtin_names("adapter")}
            offered = [name for name in offered if name in bases]
        return [*([self.label(own)] if own and own not in offered else []), *offered]

    def names(self, model: Any, adapter: Any) -> Names:
        """Two names as a visitor gave them, checked.

        Raises:
            ClearValueError: one is no name, or the page does not take other models, and one is none of those offered.
        """
        model, adapter = read_name(model, "model"), read_name(adapter, "adapter")
        if self.allow_others:
            return self._whole(model or None, adapter)
        for kind, name in (("model", model), ("adapter", adapter)):
            offered = self.choices("model" if kind == "model" else "adapter")
            if name and name not in offered:
                raise ClearValueError(
                    f"this page answers with its own models alone; of kind {kind} it has {', '.join(offered)}"
                )
        own = self.default
        found = self._whole(
            own.model if model == self.label(own.model) else model or None,
            own.adapter if adapter == self.label(own.adapter) else adapter,
        )
        if found != own and found.model is not None and found.model != _config_of(found.adapter).base_model:
            raise ClearValueError(
                f"{self.label(found.adapter)} was not made for {self.label(found.model)}; leave the model empty for the "
                "one it was made for"
            )
        return found

    def _whole(self, model: str | None, adapter: str) -> Names:
        own = self.default
        if model is None and adapter in ("", own.adapter):
            # The page's own adapter may not say what it was made for.
            return own if not adapter or _config_of(adapter).base_model is None else Names(None, adapter)
        return Names(model, adapter or own.adapter)

    def explain(self, error: Exception) -> str:
        """An error in words for visitors; where they are strangers, without places on this machine."""
        if not self.allow_others and (isinstance(error, OSError) or _PLACE.search(str(error))):
            _log.error("not shown to visitors: %s", error)
            return "This model cannot answer here; the server's log says why."
        return str(error)

    # -- models

    def holds(self, names: Names) -> bool:
        """Whether a model is loaded."""
        return self._checked.get(names) in self._held

    @contextmanager
    def use(self, names: Names, stop: threading.Event | None = None) -> Iterator[AttachedModel]:
        """The model, to be used by nobody else inside the `with`; loaded if it is not there.

        Args:
            names: which.
            stop: where it is set while the model is waited for, the wait ends.

        Raises:
            Stopped: the wait was given up.
            ClearError: the model or adapter cannot be loaded. What was loaded before stays, if that can be told from
                their names and configurations.
        """
        key = self._check(names)
        while not self._acquire(key):
            if stop is not None and stop.is_set():
                raise Stopped
        try:
            if key not in self._held:
                while len(self._held) >= self._capacity:
                    del self._held[next(n for n in self._held if not self._users[n])]
                self._held[key] = attach(key.model, key.adapter, device=self.device)
            self._held.move_to_end(key)
            self._users[key] += 1
            try:
                yield self._held[key]
            finally:
                self._users[key] -= 1
        finally:
            self._lock.release()

    def _acquire(self, key: Names) -> bool:
        """Takes the lock, if that works soon and there is or can be room for a model."""
        if not self._lock.acquire(timeout=_PATIENCE):
            return False
        idle = sum(not self._users[n] for n in self._held)
        if key in self._held or len(self._held) - idle < self._capacity:
            return True
        self._lock.release()
        time.sleep(_PATIENCE)
        return False

    def _check(self, names: Names) -> Names:
        """The same model under the one name that it is held by, once it is known that the adapter is for it."""
        if names not in self._checked:
            config = _config_of(names.adapter)
            key = names if names.model != config.base_model else Names(None, names.adapter)
            if key.model is not None:
                spec = find_for_folder(store.resolve(key.model, "model"))
                if spec is None:
                    raise CheckpointError(f"{self.label(key.model)} is no model of a known kind")
                if spec.name != config.backbone:
                    raise BackboneMismatchError(
                        f"{self.label(names.adapter)} was made for models of kind {config.backbone!r}, and "
                        f"{self.label(names.model)} is one of {spec.name!r}"
                    )
            self._checked[names] = key
            while len(self._checked) > _REMEMBERED:
                del self._checked[next(iter(self._checked))]
        return self._checked[names]

    def give_way(self) -> None:
        """Lets somebody who waits in `use` go first; to be called inside `use` between two pieces of work."""
        self._lock.release()
        try:
            time.sleep(_PATIENCE)
        finally:
            self._lock.acquire()


def _config_of(adapter: str) -> ClearConfig:
    return store.read_config(store.resolve(adapter, "adapter"))
