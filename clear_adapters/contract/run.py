"""Running the checks over a family, one after another, whatever the others find."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from clear_adapters.backbones import BACKBONES, backbone_class, get_backbone, list_backbones, resolve
from clear_adapters.backbones.base import Backbone, BackboneSpec
from clear_adapters.contract.checks import CHECKS, ContractError
from clear_adapters.errors import BrokenEntryError, ClearTypeError, ClearValueError, unknown_name
from clear_adapters.registry import load_target


@dataclass(frozen=True)
class Result:
    """What a check found.

    Attributes:
        name: of the check.
        what: what it asks for.
        problem: what is wrong; None when nothing is.
        seconds: how long it took.
    """

    name: str
    what: str
    problem: str | None
    seconds: float


def find_spec(name: str) -> BackboneSpec:
    """The spec of a registered name, or of `module:NAME`, which need not be registered.

    Raises:
        UnknownNameError: there is no such name; close ones are suggested.
        BrokenEntryError: the module cannot be imported.
        ClearTypeError: it is no `BackboneSpec`.
    """
    if ":" not in name:
        if name not in list_backbones():
            raise unknown_name(
                "backbone", name, list_backbones(), hint="Or give module:NAME of a BackboneSpec."
            )
        return get_backbone(name)
    try:
        found = load_target(name)
    except Exception as error:
        raise BrokenEntryError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(found, BackboneSpec):
        raise ClearTypeError(f"{name} is a {type(found).__name__}, not a BackboneSpec")
    return found


def validate(spec: BackboneSpec, names: Sequence[str] | None = None) -> Iterator[Result]:
    """Checks a family on its tiny model, which is built anew for each check.

    Args:
        spec: of the family.
        names: of the checks; None is all of `CHECKS`.

    Raises:
        UnknownNameError: no such check.
        ClearTypeError: the spec's class is no `Backbone`, or `tiny` does not build one.
        BrokenEntryError: class or builder cannot be imported.
        ClearValueError: another spec has the name; as the others, at the first result.
    """
    chosen = list(CHECKS) if names is None else list(names)
    for name in chosen:
        if name not in CHECKS:
            raise unknown_name("check", name, CHECKS)
    return _results(spec, chosen)


@contextmanager
def _registered(spec: BackboneSpec) -> Iterator[None]:
    """The spec under its name, for as long as it is checked, where nothing has that name yet."""
    known = spec.name in BACKBONES
    if not known:
        BACKBONES.register(spec.name, spec)
    elif BACKBONES.get(spec.name) is not spec:
        raise ClearValueError(
            f"the name {spec.name!r} is taken by {BACKBONES.origin(spec.name)}: give the spec another one"
        )
    try:
        yield
    finally:
        if not known:
            BACKBONES.unregister(spec.name)


def _results(spec: BackboneSpec, names: Sequence[str]) -> Iterator[Result]:
    with _registered(spec):
        yield from _checked(spec, names)


def _checked(spec: BackboneSpec, names: Sequence[str]) -> Iterator[Result]:
    for name in names:
        check, begin = CHECKS[name], time.perf_counter()
        what = str(check.__doc__).strip().splitlines()[0]
        problem = None
        try:
            check(_tiny(spec))
        except ContractError as error:
            problem = str(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno}, in {place.name})"
        yield Result(name, what, problem, time.perf_counter() - begin)


def _tiny(spec: BackboneSpec) -> Backbone:
    family = backbone_class(spec)
    built = resolve(spec.tiny, spec)(0)
    if not isinstance(built, family):
        raise ClearTypeError(
            f"spec.tiny={spec.tiny!r} builds a {type(built).__name__}, not a {family.__name__}: it takes a seed and gives the "
            "backbone over a small random model"
        )
    if built.spec is not spec:
        raise ClearValueError(
            f"{family.__name__}.spec is not the spec that names the class: set `spec = SPEC` in it"
        )
    return built
