"""Plain data, as a YAML file holds it, read into frozen dataclasses value by value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from clear_adapters.config import LoraSettings
from clear_adapters.errors import ClearError, ClearValueError, unknown_name


def parse(text: str, source: str) -> Any:
    """Reads YAML.

    Raises:
        ClearValueError: it is none; `source` is what the message calls it.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # the last for a number without end
        raise ClearValueError(f"{source} is not valid YAML: {error}") from error


def keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass and of those within it."""
    found: list[str] = []
    hints = get_type_hints(cls)
    for f in fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            found += keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            found.append(prefix + f.name)
    return found


def build(cls: type, data: Any, source: str) -> Any:
    """Makes a dataclass of plain data.

    Args:
        cls: the dataclass; its fields may be dataclasses, tuples, literals, optional values and open mappings.
        data: what was read.
        source: what messages call it.

    Raises:
        UnknownNameError: an unknown key; close matches are in the message.
        ClearValueError: a value of another type, or one that the dataclass refuses.
    """
    if not isinstance(data, Mapping):
        raise ClearValueError(f"{source} must be a mapping, not {data!r}")
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in names:
            raise unknown_name(f"key in {source}", str(key), names)
        wanted = hints[key]
        place = f"{source}: {key}"
        if dataclasses.is_dataclass(wanted):
            values[key] = build(wanted, value, place)  # type: ignore[arg-type]  # a class here
        elif cls is LoraSettings:
            values[key] = tuple(value) if key == "whole" and isinstance(value, list) else value
        else:
            values[key] = _value(wanted, value, place)
    try:
        return cls(**values)
    except ClearError as error:
        if isinstance(error, KeyError):
            raise
        raise ClearValueError(f"{source}: {error}") from error


def _value(wanted: Any, value: Any, source: str) -> Any:
    """A value of the type asked for; YAML reads `2e-3` as a word, which is taken as the number it is."""
    origin = get_origin(wanted)
    if origin is Literal:
        if value not in get_args(wanted):
            raise ClearValueError(f"{source}={value!r}: one of {', '.join(map(repr, get_args(wanted)))}")
        return value
    if origin is Union or str(type(wanted)).endswith("UnionType'>"):
        if value is None:
            return None
        return _value(next(a for a in get_args(wanted) if a is not type(None)), value, source)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ClearValueError(f"{source}={value!r}: must be a mapping of names to values")
        return dict(value)
    if origin is tuple and get_args(wanted)[-1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise ClearValueError(f"{source}={value!r}: must be a list")
        return tuple(_value(get_args(wanted)[0], v, source) for v in value)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(get_args(wanted)):
            raise ClearValueError(f"{source}={value!r}: must be a list of {len(get_args(wanted))}")
        return tuple(_value(a, v, source) for a, v in zip(get_args(wanted), value, strict=True))
    if wanted is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ClearValueError(f"{source}={value!r}: must be a finite number")
        return number
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ClearValueError(f"{source}={value!r}: must be of type {wanted.__name__}")
    return value
