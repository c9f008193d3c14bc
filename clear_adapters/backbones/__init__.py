"""The registry of backbones: families by name, imported only when asked for.

A third party adds one with `register_backbone`, or by an entry point of the group `clear_adapters.backbones` that
names its `BackboneSpec`. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_adapters.errors import BrokenEntryError, ClearTypeError
from clear_adapters.registry import Registry

if TYPE_CHECKING:
    from clear_adapters.backbones.base import Backbone, BackboneSpec

GROUP = "clear_adapters.backbones"

BACKBONES: Registry[BackboneSpec] = Registry(
    "backbone", instance_of="clear_adapters.backbones.base:BackboneSpec", group=GROUP
)
BACKBONES.register("bagel", "clear_adapters.backbones.bagel.spec:SPEC")
BACKBONES.register("emu3", "clear_adapters.backbones.emu3.spec:SPEC")
BACKBONES.register("janus", "clear_adapters.backbones.janus.spec:SPEC")


def list_backbones() -> list[str]:
    """The names of all known backbones, sorted; imports none of them."""
    return BACKBONES.names()


def register_backbone(spec: BackboneSpec) -> None:
    """Adds a backbone under its own name.

    Raises:
        ClearValueError: the name is taken; the message names both origins.
        ClearTypeError: it is no `BackboneSpec`.
    """
    name = getattr(spec, "name", None)
    if not isinstance(name, str):
        raise ClearTypeError(
            f"a backbone is registered by its BackboneSpec, not by {type(spec).__name__} {spec!r}"
        )
    BACKBONES.register(name, spec, stacklevel=2)


def get_backbone(name: str) -> BackboneSpec:
    """The facts of a backbone.

    Raises:
        UnknownNameError: there is no such backbone; close names are suggested.
        BrokenEntryError: it cannot be imported.
    """
    return BACKBONES.get(name)


def resolve(target: str, spec: BackboneSpec) -> Any:
    """What a `module:NAME` of a spec stands for.

    Raises:
        BrokenEntryError: it cannot be imported.
    """
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise BrokenEntryError(
            f"backbone {spec.name!r} names {target!r}, which cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def backbone_class(spec: BackboneSpec) -> type[Backbone]:
    """The class of verbs of a family.

    Raises:
        BrokenEntryError: it cannot be imported.
        ClearTypeError: it is not a subclass of `Backbone`.
    """
    from clear_adapters.backbones.base import Backbone

    found = resolve(spec.backbone, spec)
    if not (isinstance(found, type) and issubclass(found, Backbone)):
        raise ClearTypeError(
            f"backbone {spec.name!r} names {spec.backbone!r}, which is no subclass of Backbone"
        )
    return found


def find_for_model(model: Any) -> BackboneSpec | None:
    """The family whose class accepts an object; None when no family does.

    A family that cannot be imported is passed over with a warning, so that a broken plug-in stays its own trouble.
    """
    return _find(lambda family: family.accepts(model), "the model")


def find_for_folder(folder: Path) -> BackboneSpec | None:
    """The family that recognises a checkpoint folder as its own; None when no family does.

    A family that cannot be imported is passed over with a warning.
    """
    return _find(lambda family: family.recognises(folder), str(folder))


def explain_unknown(what: Any) -> str:
    """What to do about a model (an object, or a folder as a `Path`) that no family takes.

    A part or another form of a supported family is named with what to load instead; otherwise the families are listed, and
    how to add one.
    """
    hints = [
        hint
        for _, family in _families("a model that no family takes")
        if (hint := family.near_miss(what)) is not None
    ]
    return "; ".join(
        [
            *hints,
            f"attach works on unified models of the families {', '.join(list_backbones())}",
            "another family is added by register_backbone or an entry point (docs/backbones.md)",
        ]
    )


def _find(accepts: Callable[[type[Backbone]], bool], what: str) -> BackboneSpec | None:
    return next((spec for spec, family in _families(what) if accepts(family)), None)


def _families(what: str) -> Iterator[tuple[BackboneSpec, type[Backbone]]]:
    for name in list_backbones():
        try:
            spec = get_backbone(name)
            family = backbone_class(spec)
        except (BrokenEntryError, ClearTypeError) as error:
            warnings.warn(f"backbone {name!r} was not asked about {what}: {error}", stacklevel=4)
            continue
        yield spec, family
