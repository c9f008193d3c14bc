"""Recipes: everything that decides a training run, as a file that is checked value by value."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from clear_adapters.config import LoraSettings, is_hub_id, is_revision
from clear_adapters.errors import ClearValueError, UnknownNameError, unknown_name
from clear_adapters.prompts import get_protocol
from clear_adapters.sampling import LatentSampling, TextSampling
from clear_adapters.training.bridge import BridgeSettings
from clear_adapters.training.grpo import GrpoSettings
from clear_adapters.training.plain import build, keys, parse
from clear_adapters.training.sft import SftSettings

STAGES = ("sft", "bridge", "grpo")
"""In the order in which they follow each other."""

PARTS = ("understanding", "generation", "bridge", "extra")
"""What of an adapter can be trained or stand still: the two LoRA groups, the bridge, and modules trained whole."""

DEFAULT_PARTS = {
    "sft": ("understanding", "generation", "extra"),
    "bridge": ("understanding", "bridge"),
    "grpo": ("understanding", "generation", "bridge"),
}
"""What each stage trains where a recipe does not say, of what its adapter has."""

_ONLY = {"protocol": "sft", "lora": "sft", "sft": "sft", "bridge": "bridge", "grpo": "grpo"}
"""Keys of one stage alone. The first stage makes the adapter: later ones take its layout and protocol from it."""

_OPEN = ("lora.groups", "lora.alpha", "grpo.rewards")
"""Keys whose values are mappings with names of their own."""

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
        quantization: of the base: `int8` or `nf4`, by bitsandbytes; None keeps its type.
        checkpointing: recompute activations, which saves memory.
        shard: spread the frozen base over the processes (FSDP2); the adapter stays whole on each.
        save_every: steps between checkpoints; 0 writes none.
        log_every: steps between log lines, at which alone the device is waited for.
        timeout: seconds without a sign of one of several processes, or without a move of any of them, after which the run is
            ended with a message. It bounds one call of a library, not a step: processes may wait for a slow one.
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
    quantization: Literal["int8", "nf4"] | None = None
    checkpointing: bool = False
    shard: bool = False
    save_every: int = 200
    log_every: int = 10
    timeout: float = 600.0
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
            ("timeout", 1, 10**6),
            ("workers", 0, 1024),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ClearValueError(f"{name}={value}: must be from {low} to {high}")
        if self.shard and self.quantization is not None:
            raise ClearValueError(
                "shard=True spreads weights over processes, which quantized ones cannot be: leave one of them out"
            )


@dataclass(frozen=True)
class HubSettings:
    """Where the adapter is published, its folder alone: never a checkpoint. The token is that of `hf auth login` or `HF_TOKEN`.

    Attributes:
        repo_id: model repository, `owner/name`; None publishes nothing.
        private: whether a repository that is made is; None is the account's default.
        revision: branch; None is the main one.
        every: steps between two pushes while it trains; 0 pushes the finished adapter only.
        overwrite: replace an adapter that neither this run nor the one before it made.
        license: of the adapter, as the Hub writes it.

    Raises:
        ClearValueError: no Hub id, or a number out of its range.
    """

    repo_id: str | None = None
    private: bool | None = None
    revision: str | None = None
    every: int = 0
    overwrite: bool = False
    license: str | None = None

    def __post_init__(self) -> None:
        if self.repo_id is not None and not is_hub_id(self.repo_id):
            raise ClearValueError(f"repo_id={self.repo_id!r}: a repository of the Hub is named 'owner/name'")
        if self.revision is not None and not is_revision(self.revision):
            raise ClearValueError(
                f"revision={self.revision!r}: must be a branch, which has no '..' and no spaces"
            )
        if not 0 <= self.every <= 10**8:
            raise ClearValueError(f"every={self.every}: must be from 0 to {10**8}")


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        stage: which objective.
        trains: which of `PARTS` are trained; None is `DEFAULT_PARTS` of the stage.
        protocol: stage 1: name of a protocol, or a file with a system prompt. Later stages keep their adapter's.
        lora: stage 1: what is adapted. Later stages keep their adapter's.
        optim: how weights are moved.
        loop: how long, and in which portions.
        sft: settings of stage 1.
        bridge: settings of stage 2.
        grpo: settings of stage 3.
        text: how the adapter's text is sampled where a call does not say.
        latent: how its restorations are.
        max_restores: the most restorations in one of its replies.
        hub: where it is published.

    Raises:
        ClearValueError: settings that do not go together.
        UnknownNameError: a stage, a part or a protocol that does not exist.
    """

    stage: str = "sft"
    trains: tuple[str, ...] | None = None
    protocol: str = "default"
    lora: LoraSettings = field(default_factory=LoraSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    sft: SftSettings = field(default_factory=SftSettings)
    bridge: BridgeSettings = field(default_factory=BridgeSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    text: TextSampling = field(default_factory=TextSampling)
    latent: LatentSampling = field(default_factory=LatentSampling)
    max_restores: int = 2
    hub: HubSettings = field(default_factory=HubSettings)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise unknown_name("training stage", self.stage, STAGES)
        if self.trains is not None:
            if not self.trains:
                raise ClearValueError(f"trains is empty: name at least one of {', '.join(PARTS)}")
            for part in self.trains:
                if part not in PARTS:
                    raise unknown_name("part of an adapter in trains", part, PARTS)
        get_protocol(self.protocol)
        if self.max_restores < 0:
            raise ClearValueError(f"max_restores={self.max_restores}: must be 0 or more; 0 grants no request")
        if self.loop.save_every % self.repeat:
            raise ClearValueError(
                f"save_every={self.loop.save_every} with iterations={self.repeat}: rollouts serve {self.repeat} steps and "
                "are not part of a checkpoint, so one between these steps would lose them. Make save_every a multiple "
                "of iterations"
            )

    @property
    def repeat(self) -> int:
        """Steps of the optimizer on the same examples, one after the other."""
        return self.grpo.iterations if self.stage == "grpo" else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the file: without what other stages set, and without `hub`, which decides nothing of the adapter."""
        data = {**asdict(self), "lora": self.lora.to_dict()}
        del data["hub"]
        return {k: v for k, v in data.items() if _ONLY.get(k, self.stage) == self.stage}


# ------------------------------------------------------------------------------------------------------ reading


def _folder() -> Any:
    return resources.files("clear_adapters.training") / "recipes"


def list_recipes() -> list[str]:
    """Names of the recipes that come with the library; each has a file for every stage."""
    return sorted(p.name for p in _folder().iterdir() if (p / "sft.yaml").is_file())


def load_recipe(name: str | Path, overrides: Sequence[str] = (), stage: str = "sft") -> Recipe:
    """Reads the recipe of a stage.

    Args:
        name: one of `list_recipes()`, a folder with `<stage>.yaml`, or a YAML file of that stage.
        overrides: `key=value`; a key is dotted (`optim.lr`), or its last part alone where that is unique. A key may
            name its stage before a colon (`grpo:steps`).
        stage: one of `STAGES`.

    Raises:
        UnknownNameError: no such recipe, stage or key; close matches are in the message.
        ClearValueError: the file or a value cannot be used, or is for another stage.
    """
    if stage not in STAGES:
        raise unknown_name("training stage", stage, STAGES)
    source = f"recipe {name}"
    data = parse(_text(name, stage), source)
    if not isinstance(data, dict):
        raise ClearValueError(f"{source} must hold a mapping, not {type(data).__name__}")
    own = data.setdefault("stage", stage)
    if own in STAGES and own != stage:
        raise ClearValueError(
            f"{source} has stage: {own}, but stage {stage} is to be trained: give a file of that stage, or a folder that "
            f"holds {stage}.yaml"
        )
    for override in divide_overrides(overrides, (stage,))[stage]:
        _override(data, override, stage)
    return recipe_from_dict(data, source)


def _text(name: str | Path, stage: str) -> str:
    if str(name) in list_recipes():
        return str((_folder() / str(name) / f"{stage}.yaml").read_text("utf-8"))
    path = Path(name)
    if path.is_dir():
        path = path / f"{stage}.yaml"
        if not path.is_file():
            raise ClearValueError(
                f"the recipe folder {name} has no {stage}.yaml, so that it does not say how to train that stage"
            )
    elif not path.is_file():
        hint = "Or give the path of a YAML file, or of a folder with one for each stage."
        raise unknown_name("recipe", str(name), list_recipes(), hint=hint)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ClearValueError(f"recipe {name} is not UTF-8 text: {error}") from error


def recipe_from_dict(data: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Checks plain data and makes a recipe of it.

    Raises:
        UnknownNameError: an unknown key; close matches are in the message.
        ClearValueError: a value of another type or out of its range, or settings of another stage.
    """
    if isinstance(data, Mapping):
        stage = data.get("stage", Recipe.stage)
        strange = [k for k in data if _ONLY.get(k, stage) != stage]
        if stage in STAGES and strange:
            raise ClearValueError(f"{source} of stage {stage}: {_misplaced(strange[0], stage)}: remove it")
    made = build(Recipe, data, source)
    assert isinstance(made, Recipe)
    return made


def _misplaced(key: str, stage: str) -> str:
    owner = _ONLY[key.partition(".")[0]]
    inherited = " (later stages take it from their adapter)" if key.startswith(("lora", "protocol")) else ""
    return f"{key} is a setting of stage {owner} and has no effect on stage {stage}{inherited}"


# ---------------------------------------------------------------------------------------------------- overrides


def divide_overrides(overrides: Sequence[str], stages: Sequence[str]) -> dict[str, list[str]]:
    """Which overrides are for which stage.

    Args:
        overrides: `key=value` for each stage that has the key, or `stage:key=value` for that one.
        stages: that are to be trained.

    Returns:
        By stage, without prefixes.

    Raises:
        UnknownNameError: a key that none of the stages has; close matches are in the message.
        ClearValueError: no `key=value`, a key that may be several, or one for a stage that is not trained.
    """
    found: dict[str, list[str]] = {stage: [] for stage in stages}
    for override in overrides:
        head, equals, value = override.partition("=")
        if not equals:
            raise ClearValueError(f"override {override!r}: write key=value")
        only, colon, key = (part.strip() for part in head.rpartition(":"))
        if colon and only not in STAGES:
            raise unknown_name("training stage", only, STAGES, hint=f"It stands in {override!r}.")
        if colon and only not in stages:
            raise ClearValueError(
                f"override {override!r} is for stage {only}, but {' and '.join(stages)} is trained"
            )
        asked = [only] if colon else list(stages)
        takers = [stage for stage in asked if _full_key(key, stage, override)]
        if not takers:
            raise _unknown_key(key, asked)
        for stage in takers:
            found[stage].append(f"{key}={value}")
    return found


def _keys(stage: str) -> list[str]:
    """Every dotted key of a stage's recipe."""
    return [k for k in keys(Recipe) if k != "stage" and _ONLY.get(k.partition(".")[0], stage) == stage]


def _full_key(key: str, stage: str, override: str) -> str | None:
    """The dotted key that is meant, or None."""
    known = _keys(stage)
    if key in known or any(key.startswith(f"{k}.") for k in _OPEN if k in known):
        return key
    full = [k for k in known if k.rpartition(".")[2] == key]
    if len(full) > 1:
        # `steps` means those of the training: sampling settings are written with their section.
        full = [k for k in full if not k.startswith(("text.", "latent."))] or full
    if len(full) > 1:
        raise ClearValueError(f"override {override!r}: {key} may be {' or '.join(full)}; write one of them")
    return full[0] if full else None


def _unknown_key(key: str, stages: Sequence[str]) -> UnknownNameError | ClearValueError:
    for other in STAGES:
        full = _full_key(key, other, key)
        if full is not None:
            return ClearValueError(_misplaced(full, " and ".join(stages)))
    known = list(dict.fromkeys(k for stage in stages for k in _keys(stage)))
    short = {k.rpartition(".")[2]: k for k in reversed(known)}  # the first section wins
    close = difflib.get_close_matches(key, [*known, *short], n=3)
    if close:
        meant = " or ".join(dict.fromkeys(short.get(c, c) for c in close))
        return UnknownNameError(f"Unknown recipe key {key!r}. Did you mean {meant}?")
    return unknown_name("recipe key", key, known)


def _override(data: dict[str, Any], override: str, stage: str) -> None:
    key, _, text = override.partition("=")
    full = _full_key(key, stage, override)
    assert full is not None
    *folders, leaf = full.split(".")
    place = data
    for folder in folders:
        place = place.setdefault(folder, {})
        if not isinstance(place, dict):
            raise ClearValueError(f"override {override!r}: {folder} is no mapping")
    place[leaf] = parse(text, f"override {override!r}")
