"""Recipes: everything that decides a training run, as a file that is checked value by value."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from clear_adapters.config import LoraSettings
from clear_adapters.errors import ClearError, ClearValueError, unknown_name
from clear_adapters.prompts import get_protocol
from clear_adapters.sampling import LatentSampling, TextSampling
from clear_adapters.training.sft import SftSettings

STAGES = ("sft",)

SCHEDULES = (
    *("constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "inverse_sqrt", "linear"),
    "polynomial",
)
"""Trainer's schedules that need no settings of their own and no evaluation."""


@dataclass(frozen=True)
class OptimSettings:
    """How weights are moved.

    Attributes:
        lr: learning rate of LoRA.
        bridge_lr: of the bridge, where a stage trains it; None is `lr`.
        extra_lr: of modules trained whole; None is `lr`.
        schedule: of the learning rates, by Trainer's name: one of `SCHEDULES`.
        min_lr: where a cosine schedule ends, as a share of the rate.
        warmup: steps.
        weight_decay: of AdamW.
        betas: of AdamW.
        eps: of AdamW.
        max_grad_norm: gradients are clipped to it; 0 does not clip.

    Raises:
        ClearValueError: a number out of its range.
        UnknownNameError: a schedule that does not exist.
    """

    lr: float = 2e-3
    bridge_lr: float | None = None
    extra_lr: float | None = None
    schedule: str = "cosine"
    min_lr: float = 0.0
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "bridge_lr", "extra_lr", "eps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ClearValueError(f"{name}={value}: must be positive")
        for name in ("warmup", "weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ClearValueError(f"{name}={getattr(self, name)}: must not be negative")
        if not 0 <= self.min_lr <= 1:
            raise ClearValueError(f"min_lr={self.min_lr}: a share in [0, 1]")
        if not all(0 <= b < 1 for b in self.betas):
            raise ClearValueError(f"betas={self.betas}: each in [0, 1)")
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule of the learning rate", self.schedule, SCHEDULES)

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate by group."""
        return {
            "lora": self.lr,
            "bridge": self.bridge_lr if self.bridge_lr is not None else self.lr,
            "extra": self.extra_lr if self.extra_lr is not None else self.lr,
        }


@dataclass(frozen=True)
class LoopSettings:
    """How long, and in which portions.

    Attributes:
        steps: of the optimizer.
        batch: examples a step, of all processes together.
        micro_batch: examples a forward pass; None is what a process has of a step.
        bf16: compute in bfloat16 where there is a GPU; otherwise everything is float32, and the base is loaded in it. The
            adapter's own weights are float32 in training either way.
        compile: compile the decoder's layers.
        checkpointing: recompute activations, which saves memory.
        save_every: steps between checkpoints; 0 writes none.
        log_every: steps between log lines, at which alone the device is waited for.
        workers: data workers; None is one a core, at most 12.
        seed: of everything random.
        save_dtype: type of the weights in the finished adapter.

    Raises:
        ClearValueError: a number out of its range.
    """

    steps: int = 800
    batch: int = 256
    micro_batch: int | None = None
    bf16: bool = True
    compile: bool = False
    checkpointing: bool = False
    save_every: int = 200
    log_every: int = 10
    workers: int | None = None
    seed: int = 0
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, 10**8),
            ("batch", 1, 10**6),
            ("micro_batch", 1, 10**6),
            ("log_every", 1, 10**8),
            ("save_every", 0, 10**8),
            ("workers", 0, 1024),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ClearValueError(f"{name}={value}: must be from {low} to {high}")


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        stage: which objective.
        protocol: name of a protocol, or a file with a system prompt.
        lora: what is adapted.
        optim: how weights are moved.
        loop: how long, and in which portions.
        sft: settings of stage 1.
        text: how the adapter's text is sampled where a call does not say.
        latent: how its restorations are.

    Raises:
        ClearValueError: a stage that does not exist.
        UnknownNameError: a protocol that does not exist.
    """

    stage: str = "sft"
    protocol: str = "default"
    lora: LoraSettings = field(default_factory=LoraSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    sft: SftSettings = field(default_factory=SftSettings)
    text: TextSampling = field(default_factory=TextSampling)
    latent: LatentSampling = field(default_factory=LatentSampling)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise unknown_name("training stage", self.stage, STAGES)
        get_protocol(self.protocol)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the file."""
        return {**asdict(self), "lora": self.lora.to_dict()}


# ------------------------------------------------------------------------------------------------------ reading


def list_recipes() -> list[str]:
    """Names of the recipes that come with the library."""
    folder = resources.files("clear_adapters.training") / "recipes"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        name: one of `list_recipes()`, or a YAML file.
        overrides: `key=value`; a key is dotted (`optim.lr`), or its last part alone where that is unique.

    Raises:
        UnknownNameError: no such recipe, or an unknown key; close matches are in the message.
        ClearValueError: the file or a value cannot be used.
    """
    if str(name) in list_recipes():
        text = (resources.files("clear_adapters.training") / "recipes" / f"{name}.yaml").read_text("utf-8")
    elif Path(name).is_file():
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ClearValueError(f"recipe {name} is not UTF-8 text: {error}") from error
    else:
        raise unknown_name("recipe", str(name), list_recipes(), hint="Or give the path of a YAML file.")
    data = _parse(text, f"recipe {name}")
    if not isinstance(data, dict):
        raise ClearValueError(f"recipe {name} must hold a mapping, not {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    return recipe_from_dict(data, f"recipe {name}")


def recipe_from_dict(data: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Checks plain data and makes a recipe of it.

    Raises:
        UnknownNameError: an unknown key; close matches are in the message.
        ClearValueError: a value of another type or out of its range.
    """
    made = _build(Recipe, data, source)
    assert isinstance(made, Recipe)
    return made


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # the last for a number without end
        raise ClearValueError(f"{source} is not valid YAML: {error}") from error


def _paths(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a recipe, and its type."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for f in fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            found |= _paths(hints[f.name], f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = hints[f.name]
    return found


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        raise ClearValueError(f"override {override!r}: write key=value")
    known = _paths(Recipe)
    inside = [k for k in ("lora.groups", "lora.alpha") if key.startswith(k + ".")]
    full = [key] if key in known or inside else [k for k in known if k.rpartition(".")[2] == key]
    if len(full) > 1:
        # `steps` means those of the training: sampling settings are written with their section.
        full = [k for k in full if not k.startswith(("text.", "latent."))] or full
    if len(full) > 1:
        raise ClearValueError(f"override {override!r}: {key} may be {' or '.join(full)}; write one of them")
    if not full:
        short = {k.rpartition(".")[2]: k for k in reversed(known)}  # the first section wins
        close = difflib.get_close_matches(key, [*known, *short], n=3)
        raise unknown_name(
            "recipe key",
            key,
            known,
            hint=f"Close: {', '.join(dict.fromkeys(short.get(c, c) for c in close))}." if close else "",
        )
    *folders, leaf = full[0].split(".")
    place = data
    for folder in folders:
        place = place.setdefault(folder, {})
        if not isinstance(place, dict):
            raise ClearValueError(f"override {override!r}: {folder} is no mapping")
    place[leaf] = _parse(text, f"override {override!r}")


def _build(cls: type, data: Any, source: str) -> Any:
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
            values[key] = _build(wanted, value, place)  # type: ignore[arg-type]  # a class here
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
