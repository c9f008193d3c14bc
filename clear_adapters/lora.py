"""LoRA on exactly the modules that a backbone names, put in and taken out without a trace.

PEFT matches the entries of `target_modules` by suffix and leaves a half-adapted model behind when it fails. So every
name is a full path, what was hit is compared with what was asked for, and the original modules are put back by this
file itself, after a failure and after a detach alike.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from clear_adapters.backbones.base import Backbone
from clear_adapters.config import LoraSettings
from clear_adapters.errors import AttachError, BackboneMismatchError, ClearValueError
from clear_adapters.lora_linear import lean

ADAPTER_NAME = "clear_adapter"
"""PEFT's name of the adapter. Not a word that `nn.ModuleDict` has as a method: PEFT fails on those."""

PREFIX = "base_model.model."
"""What stands before a module's name in a stock PEFT file."""


def target_names(backbone: Backbone, settings: LoraSettings) -> dict[str, str]:
    """Every module name that is adapted, to the name of its group, in the backbone's order.

    Raises:
        BackboneMismatchError: an unknown group, a name that the model lacks, or a module in two groups.
    """
    found: dict[str, str] = {}
    for group in settings.ranks:
        for name in backbone.lora_names([group]):
            if name in found:
                raise BackboneMismatchError(
                    f"module {name!r} stands in the LoRA groups {found[name]!r} and {group!r} of "
                    f"{backbone.spec.name!r}: a module can have one rank only"
                )
            found[name] = group
    return found


def build_config(backbone: Backbone, settings: LoraSettings) -> LoraConfig:
    """The one stock PEFT configuration of the settings; the first group's rank is the default of the others.

    Raises:
        BackboneMismatchError: as for `target_names`.
    """
    targets = target_names(backbone, settings)
    first = next(iter(settings.ranks))
    rank, alpha = settings.ranks[first], settings.alphas[first]
    return LoraConfig(
        r=rank,
        lora_alpha=_whole(alpha),
        lora_dropout=settings.dropout,
        target_modules=sorted(targets),
        rank_pattern={n: settings.ranks[g] for n, g in sorted(targets.items()) if settings.ranks[g] != rank},
        alpha_pattern={
            n: _whole(settings.alphas[g]) for n, g in sorted(targets.items()) if settings.alphas[g] != alpha
        },
        bias="none",
    )


def config_dict(backbone: Backbone, settings: LoraSettings, base_model: str | None) -> dict[str, Any]:
    """The contents of `adapter_config.json`, names in a fixed order."""
    data = build_config(backbone, settings).to_dict()
    data = {k: v.value if hasattr(v, "value") else v for k, v in data.items()}
    data["target_modules"] = sorted(data["target_modules"])
    data["base_model_name_or_path"] = base_model
    data["inference_mode"] = True
    return data


def expected_shapes(backbone: Backbone, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of `adapter_model.safetensors`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, group in target_names(backbone, settings).items():
        module = backbone.model.get_submodule(name)
        linear: Any = getattr(module, "base_layer", module)
        rank = settings.ranks[group]
        shapes[f"{PREFIX}{name}.lora_A.weight"] = (rank, linear.in_features)
        shapes[f"{PREFIX}{name}.lora_B.weight"] = (linear.out_features, rank)
    return shapes


def whole_parameters(backbone: Backbone, settings: LoraSettings) -> list[str]:
    """Parameter names of the modules that are trained whole, in order.

    Raises:
        BackboneMismatchError: a module that the spec does not offer for it, or that the model lacks.
    """
    names: list[str] = []
    for path in settings.whole:
        if path not in backbone.spec.extras:
            raise BackboneMismatchError(
                f"module {path!r} cannot be trained whole: backbone {backbone.spec.name!r} offers "
                f"{', '.join(backbone.spec.extras) or 'none'}"
            )
        try:
            module = backbone.model.get_submodule(path)
        except AttributeError:
            raise BackboneMismatchError(
                f"the model has no module {path!r} that could be trained whole"
            ) from None
        names += [f"{path}.{n}" for n, _ in module.named_parameters()]
    return names


class Snapshot:
    """What a model was: modules in their places, modes, attributes, trainability. Weights are not copied."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (vars(m), dict(vars(m)), dict(m._modules), dict(m._parameters)) for m in model.modules()
        ]
        self._flags = [(p, p.requires_grad) for p in model.parameters()]

    def adopt(self, but: Set[nn.Parameter]) -> None:
        """Takes the parameters that the modules have now, but some, for those of the same names from before."""
        now: dict[nn.Parameter, nn.Parameter] = {}
        for held, _, _, parameters in self._modules:
            for name, before in parameters.items():
                found = held["_parameters"].get(name)
                if before is not None and found is not None and found not in but:
                    now[before] = parameters[name] = found
        self._flags = [(now.get(p, p), flag) for p, flag in self._flags]

    def restore(self) -> None:
        """Puts back the very same objects."""
        for held, attributes, children, parameters in self._modules:
            for place, found in (
                # The attributes first: among them are the dictionaries of children and parameters.
                (held, attributes),
                (attributes["_modules"], children),
                (attributes["_parameters"], parameters),
            ):
                place.clear()
                place.update(found)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)


@dataclass(frozen=True)
class _Whole:
    """A parameter that is trained whole, and the one whose place it takes."""

    name: str
    module: nn.Module
    leaf: str
    original: nn.Parameter
    own: nn.Parameter


class Lora:
    """The adapter's weights inside a model.

    Attributes:
        settings: what is adapted.
        names: module names, in the backbone's order.
    """

    def __init__(self, backbone: Backbone, settings: LoraSettings, *, seed: int = 0) -> None:
        """Puts zero updates in place; base parameters are frozen. The caller undoes it by a `Snapshot`.

        Args:
            backbone: whose model is adapted.
            settings: what is adapted.
            seed: of the first factor of each update; global random numbers stay as they are.

        Raises:
            BackboneMismatchError: the model lacks a module, or other modules were hit than those asked for.
            AttachError: the model already has layers of some PEFT adapter.
        """
        model = backbone.model
        self.settings = settings
        targets = target_names(backbone, settings)
        whole = whole_parameters(backbone, settings)
        self.names = list(targets)
        self.enabled = True
        # While folded: layers, base weights, and those with the update.
        self._folded: list[tuple[Any, nn.Parameter, nn.Parameter]] = []
        if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
            raise AttachError("the model already holds layers of a PEFT adapter: unload that one first")
        model.requires_grad_(False)
        self.layers: dict[str, LoraLayer] = {}
        if targets:
            with warnings.catch_warnings():
                # Asked of the factors on the meta device; they are filled right below.
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
                LoraModel(model, build_config(backbone, settings), ADAPTER_NAME, low_cpu_mem_usage=True)
            self.layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
            for layer in self.layers.values():
                lean(layer)
            if set(self.layers) != set(targets):
                wrong = sorted(set(self.layers) ^ set(targets))
                raise BackboneMismatchError(
                    f"LoRA hit other modules than backbone {backbone.spec.name!r} names: {', '.join(wrong[:4])}"
                )
        self._groups = targets
        self.whole = [self._take_over(model, name) for name in whole]
        self.initialise(seed)

    def initialise(self, seed: int) -> None:
        """Zero updates again: the first factors are drawn from a seed, the second are zero, whole modules the model's own."""
        generator = torch.Generator().manual_seed(seed)
        for name in self.names:
            self._initialise(name, self._groups[name], generator)
        for w in self.whole:
            w.own.data.copy_(w.original.data)

    def _initialise(self, name: str, group: str, generator: torch.Generator) -> None:
        layer, rank = self.layers[name], self.settings.ranks[group]
        scale = self.settings.alphas[group] / rank
        if layer.r[ADAPTER_NAME] != rank or not math.isclose(layer.scaling[ADAPTER_NAME], scale):
            raise BackboneMismatchError(f"LoRA gave {name!r} another rank or scale than group {group!r} has")
        base = layer.get_base_layer()
        bound = base.in_features**-0.5  # what PEFT's kaiming_uniform(a=sqrt(5)) comes to
        first = (torch.rand(rank, base.in_features, generator=generator) * 2 - 1) * bound
        device = base.weight.device
        second = torch.zeros(base.out_features, rank)
        for factor, values in (("lora_A", first), ("lora_B", second)):
            linear = getattr(layer, factor)[ADAPTER_NAME]
            if linear.weight.is_meta:
                linear.weight = nn.Parameter(values.to(device))
            else:
                linear.weight.data.copy_(values)
        layer.train(base.training)

    def _take_over(self, model: nn.Module, name: str) -> _Whole:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        original = module.get_parameter(leaf)
        own = nn.Parameter(original.detach().clone())
        module._parameters[leaf] = own
        return _Whole(name, module, leaf, original, own)

    # -- weights

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name, as in the files, and parameter of everything that the adapter adds to the model."""
        for name in self.names:
            for factor in ("lora_A", "lora_B"):
                held = getattr(self.layers[name], factor)[ADAPTER_NAME].weight
                yield f"{PREFIX}{name}.{factor}.weight", held
        for w in self.whole:
            yield w.name, w.own

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors of the stock PEFT file, and those of the modules trained whole; detached, not copied."""
        own = {n: p.detach() for n, p in self.parameters()}
        whole = {w.name for w in self.whole}
        return {n: t for n, t in own.items() if n not in whole}, {n: own[n] for n in sorted(whole)}

    @torch.no_grad()
    def load_state_dict(self, lora: Mapping[str, Tensor], whole: Mapping[str, Tensor] | None = None) -> None:
        """Takes weights over; factors keep the wider of the stored type and the model's, so nothing is lost.

        Raises:
            BackboneMismatchError: names or shapes are not exactly those of this adapter; nothing is changed then.
        """
        given = {**lora, **(whole or {})}
        own = dict(self.parameters())
        check_tensors(given, {n: tuple(p.shape) for n, p in own.items()}, "the adapter's weights")
        extras = {w.name for w in self.whole}
        for name, parameter in own.items():
            tensor = given[name]
            dtype = parameter.dtype
            if name not in extras:
                base = self.layers[name[len(PREFIX) : name.index(".lora_")]].get_base_layer().weight.dtype
                dtype = torch.promote_types(tensor.dtype, base) if base.is_floating_point else tensor.dtype
            parameter.data = tensor.detach().to(parameter.device, dtype, copy=True)

    # -- on, off, for good

    def set_enabled(self, enabled: bool) -> None:
        """Lets the model be its plain self or not; which parameters are trained stays as it was."""
        self.enabled = enabled
        if self.is_folded:
            self._place_weights()
        else:
            flags = [(p, p.requires_grad) for _, p in self.parameters()]
            for layer in self.layers.values():
                layer.enable_adapters(enabled)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        for w in self.whole:
            w.module._parameters[w.leaf] = w.own if enabled else w.original

    @property
    def is_folded(self) -> bool:
        """Whether the updates stand in the base weights."""
        return bool(self._folded)

    def _place_weights(self) -> None:
        """Of folded layers the weights with their update in place, or without it where the adapter is off."""
        for layer, weight, folded in self._folded:
            layer.get_base_layer()._parameters["weight"] = folded if self.enabled else weight

    @contextmanager
    def folded(self) -> Iterator[None]:
        """The updates in the base weights inside the body; the very same parameters stand there again afterwards.

        Inside itself it does nothing.

        Raises:
            ClearValueError: as for `merge`.
        """
        if self.is_folded:
            yield
            return
        self._check_foldable()
        try:
            # They outlast the caller's mode: compiled passes lay them anew in memory, which tensors of inference mode forbid.
            with torch.inference_mode(False), torch.no_grad():
                for layer in self.layers.values():
                    weight = layer.get_base_layer().weight
                    delta = layer.get_delta_weight(ADAPTER_NAME).to(weight.dtype)
                    folded = nn.Parameter(delta.add_(weight), requires_grad=False)
                    self._folded.append((layer, weight, folded))
                    layer._disable_adapters = True
            self._place_weights()
            yield
        finally:
            for layer, weight, _ in self._folded:
                layer.get_base_layer()._parameters["weight"] = weight
                layer._disable_adapters = not self.enabled
            self._folded.clear()

    def _check_foldable(self) -> None:
        for name, layer in self.layers.items():
            if not layer.get_base_layer().weight.is_floating_point():
                raise ClearValueError(
                    f"{name} is quantized: an update cannot be added to its weights without rounding it away. Load the base "
                    "without quantization to merge, or keep the adapter apart"
                )
        for name, parameter in self.parameters():
            if not bool(parameter.isfinite().all()):
                raise ClearValueError(
                    f"{name} holds values that are not finite: merging would ruin the model"
                )

    @torch.no_grad()
    def merge(self) -> None:
        """Folds the updates into the base weights; the adapted layers are still in place afterwards.

        Raises:
            ClearValueError: a weight is quantized or not finite; nothing is changed then.
        """
        self._check_foldable()
        for layer in self.layers.values():
            weight = layer.get_base_layer().weight
            weight += layer.get_delta_weight(ADAPTER_NAME).to(weight.dtype)
        for w in self.whole:
            w.original.copy_(w.own)


@contextmanager
def undo_on_failure(model: nn.Module) -> Iterator[Snapshot]:
    """Restores a model when the body fails; gives the snapshot that a later detach restores from."""
    snapshot = Snapshot(model)
    try:
        yield snapshot
    except BaseException:
        snapshot.restore()
        raise


def check_tensors(given: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Compares names and shapes.

    Args:
        given: tensors, or anything with a `shape`.
        expected: shape by name.
        what: what messages call the tensors.

    Raises:
        BackboneMismatchError: a name is missing or left over, or a shape differs.
    """
    parts = [
        f"{len(names)} {word}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for names, word in (
            (sorted(set(expected) - set(given)), "missing"),
            (sorted(set(given) - set(expected)), "unexpected"),
        )
        if names
    ]
    if parts:
        raise BackboneMismatchError(
            f"{what} do not fit the model ({'; '.join(parts)}): they were made for another model or for other settings"
        )
    for name, shape in expected.items():
        found = tuple(given[name].shape)
        if found != tuple(shape):
            raise BackboneMismatchError(
                f"{what} do not fit the model: {name} has shape {found}, but the model asks for {tuple(shape)}; "
                "they were made for a model of other widths"
            )


def _whole(number: float) -> float:
    """Whole numbers as such: stock PEFT calls alpha an integer."""
    return int(number) if number == int(number) else number
