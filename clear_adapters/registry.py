"""One generic registry: names to objects, imported only when asked for.

An entry is an object, a lazy `"module:NAME"` string, or an entry point that another installed distribution declares.
Listing the names imports none of them. Lookup of the distributions happens on demand, never at import, so that a
broken plug-in can break only itself.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Generic, TypeVar, cast

from clear_adapters.errors import BrokenEntryError, ClearTypeError, ClearValueError, unknown_name

T = TypeVar("T")

_LAZY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass
class _Entry:
    value: Any
    origin: str
    resolved: bool


class Registry(Generic[T]):
    """Names to objects of one kind.

        BACKBONES: Registry[BackboneSpec] = Registry(
            "backbone",
            instance_of="clear_adapters.backbones.base:BackboneSpec",
            group="clear_adapters.backbones",
        )
        BACKBONES.register("bagel", "clear_adapters.backbones.bagel:SPEC")
        BACKBONES.get("bagel")

    What is registered in code always wins over an entry point of the same name: installing a package can neither
    replace a built-in entry nor make it unusable.
    """

    def __init__(
        self,
        kind: str,
        *,
        instance_of: type | str | None = None,
        subclass_of: type | str | None = None,
        group: str | None = None,
    ) -> None:
        """Make an empty registry.

        Args:
            kind: What an entry is, singular, for messages: `"backbone"`.
            instance_of: Class that every entry must be an instance of, or its `"module:NAME"`, imported when the first
                entry is checked.
            subclass_of: The same for entries that are classes themselves.
            group: Entry-point group in which other distributions may declare entries.
        """
        self.kind = kind
        self.group = group
        self._instance_of = instance_of
        self._subclass_of = subclass_of
        self._entries: dict[str, _Entry] = {}

    def register(self, name: str, entry: T | str, *, stacklevel: int = 1) -> None:
        """Add an entry.

        Args:
            name: The name it is found by.
            entry: The object, or `"module:NAME"` for one that is imported by the first `get`.
            stacklevel: Whose line is the entry's origin: 1 for the caller, 2 for the caller's caller.

        Raises:
            ClearValueError: The name is taken (the message names both origins), it is empty or padded with spaces, or
                a string is not of the form `"module:NAME"`.
            ClearTypeError: The object is not of the registry's base class.
        """
        if not isinstance(name, str) or not name or name != name.strip():
            raise ClearValueError(f"A {self.kind} needs a name without spaces around it, not {name!r}.")
        lazy = isinstance(entry, str)
        if isinstance(entry, str):
            if not _LAZY.fullmatch(entry):
                raise ClearValueError(
                    f"Cannot register {self.kind} {name!r} as {entry!r}: a string must read 'package.module:NAME'."
                )
            origin = entry
        else:
            frame = sys._getframe(stacklevel)
            origin = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if name in self._entries:
            raise ClearValueError(
                f"The {self.kind} {name!r} is already registered by {self._entries[name].origin}, so {origin} cannot "
                "take the name. Choose another one."
            )
        if not lazy:
            self._check(name, entry, origin)
        self._entries[name] = _Entry(entry, origin, resolved=not lazy)

    def unregister(self, name: str) -> None:
        """Remove an entry that was registered in code: for tests and interactive work.

        Args:
            name: Its name.

        Raises:
            UnknownNameError: Nothing was registered in code under this name.
        """
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        del self._entries[name]

    def get(self, name: str) -> T:
        """Return an entry, importing it if that has not happened yet.

        Args:
            name: Its name.

        Returns:
            The object; the same one every time.

        Raises:
            UnknownNameError: There is no such name; the message suggests close ones.
            BrokenEntryError: The entry cannot be imported; the message names it and its origin.
            ClearTypeError: The entry is not of the registry's base class.
            ClearValueError: Two installed distributions declare this name.
        """
        entry = self._entries.get(name)
        if entry is None:
            return self._get_plugin(name)
        shadowed = self._plugins(name)
        if shadowed:
            warnings.warn(
                f"The {self.kind} {name!r} of {' and '.join(map(_describe, shadowed))} is ignored: "
                f"{entry.origin} already has that name.",
                stacklevel=2,
            )
        if not entry.resolved:
            value = self._import(name, entry.value, entry.origin)
            self._check(name, value, entry.origin)
            entry.value, entry.resolved = value, True
        return cast(T, entry.value)

    def names(self) -> list[str]:
        """Return every name, sorted, those of entry points included. Imports no entry."""
        return sorted({*self._entries, *(plugin.name for plugin in self._plugins())})

    def origin(self, name: str) -> str:
        """Say where an entry comes from, without importing it.

        Args:
            name: Its name.

        Returns:
            `file:line` for an object registered in code, `module:NAME` for a lazy entry, the distribution's name and
            version for an entry point.

        Raises:
            UnknownNameError: There is no such name.
        """
        if name in self._entries:
            return self._entries[name].origin
        plugins = self._plugins(name)
        if not plugins:
            raise unknown_name(self.kind, name, self.names())
        return " and ".join(map(_describe, plugins))

    def __contains__(self, name: object) -> bool:
        """Tell whether `get` would find the name. Imports no entry."""
        return name in self._entries or any(plugin.name == name for plugin in self._plugins())

    def _plugins(self, name: str | None = None) -> list[metadata.EntryPoint]:
        if self.group is None:
            return []
        declared = metadata.entry_points(group=self.group)
        return list(declared if name is None else declared.select(name=name))

    def _get_plugin(self, name: str) -> T:
        plugins = self._plugins(name)
        if not plugins:
            raise unknown_name(self.kind, name, self.names())
        if len(plugins) > 1:
            raise ClearValueError(
                f"The {self.kind} {name!r} is declared by {' and by '.join(map(_describe, plugins))}. "
                "Uninstall all but one."
            )
        origin = _describe(plugins[0])
        try:
            value = plugins[0].load()
        except Exception as error:
            raise self._broken(name, origin, error) from error
        self._check(name, value, origin)
        return cast(T, value)

    def _import(self, name: str, target: str, origin: str) -> Any:
        try:
            return load_target(target)
        except Exception as error:
            raise self._broken(name, origin, error) from error

    def _broken(self, name: str, origin: str, error: Exception) -> BrokenEntryError:
        return BrokenEntryError(
            f"The {self.kind} {name!r} of {origin} cannot be loaded: {type(error).__name__}: {error}. The other "
            f"{self.kind}s are not affected; install what it needs, or tell its authors."
        )

    def _check(self, name: str, value: Any, origin: str) -> None:
        if self._instance_of is not None:
            self._instance_of = _class(self._instance_of)
            if not isinstance(value, self._instance_of):
                raise ClearTypeError(
                    f"The {self.kind} {name!r} of {origin} must be a {self._instance_of.__name__}, not {value!r}."
                )
        if self._subclass_of is not None:
            self._subclass_of = _class(self._subclass_of)
            if not (isinstance(value, type) and issubclass(value, self._subclass_of)):
                raise ClearTypeError(
                    f"The {self.kind} {name!r} of {origin} must be a subclass of "
                    f"{self._subclass_of.__name__}, not {value!r}."
                )


def load_target(target: str) -> Any:
    """What a `module:NAME` stands for."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _class(given: type | str) -> type:
    return cast(type, load_target(given)) if isinstance(given, str) else given


def _describe(plugin: metadata.EntryPoint) -> str:
    dist = plugin.dist
    return f"{dist.name} {dist.version} ({plugin.value})" if dist is not None else plugin.value
