"""Adapters that let unified multimodal models restore a degraded image as a latent before they answer.

    from clear_adapters import attach
    model = attach("builtin:bagel-tiny", adapter="builtin:clear-bagel-tiny")
    reply = model.answer("street.jpg", "What does the sign say?")

Every public name is loaded on first use: importing the package loads neither torch nor numpy nor Pillow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clear_adapters._version import __version__

if TYPE_CHECKING:
    from clear_adapters.adapter import AttachedModel, attach
    from clear_adapters.backbones import list_backbones, register_backbone
    from clear_adapters.backbones.base import Backbone, BackboneSpec
    from clear_adapters.bridge import BridgeConfig
    from clear_adapters.config import LoraSettings
    from clear_adapters.degradations import degrade, list_degradations
    from clear_adapters.engine import Reply
    from clear_adapters.errors import ClearError
    from clear_adapters.sampling import LatentSampling, TextSampling

__all__ = [
    "AttachedModel",
    "Backbone",
    "BackboneSpec",
    "BridgeConfig",
    "ClearError",
    "LatentSampling",
    "LoraSettings",
    "Reply",
    "TextSampling",
    "__version__",
    "attach",
    "degrade",
    "list_backbones",
    "list_degradations",
    "register_backbone",
]

_HOMES = {
    "AttachedModel": "clear_adapters.adapter",
    "Backbone": "clear_adapters.backbones.base",
    "BackboneSpec": "clear_adapters.backbones.base",
    "BridgeConfig": "clear_adapters.bridge",
    "ClearError": "clear_adapters.errors",
    "LatentSampling": "clear_adapters.sampling",
    "LoraSettings": "clear_adapters.config",
    "Reply": "clear_adapters.engine",
    "TextSampling": "clear_adapters.sampling",
    "attach": "clear_adapters.adapter",
    "degrade": "clear_adapters.degradations",
    "list_backbones": "clear_adapters.backbones",
    "list_degradations": "clear_adapters.degradations",
    "register_backbone": "clear_adapters.backbones",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
