"""`attach`: the CLEAR skill put into a model, whole or not at all, and taken out again without a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from clear_adapters import store
from clear_adapters.attached import ATTACHED, AdapterSize, AttachedModel, ClearModule, Origin
from clear_adapters.backbones import (
    backbone_class,
    explain_unknown,
    find_for_folder,
    find_for_model,
    get_backbone,
    list_backbones,
)
from clear_adapters.backbones.base import Backbone
from clear_adapters.bridge import BridgeConfig, LatentBridge, new_bridge
from clear_adapters.config import ClearConfig, LoraSettings, is_builtin_name, is_hub_id
from clear_adapters.download import commit_of
from clear_adapters.errors import (
    AdapterError,
    AttachError,
    BackboneMismatchError,
    CheckpointError,
    ClearTypeError,
    ClearValueError,
)
from clear_adapters.lora import Lora, target_names, undo_on_failure, whole_parameters

__all__ = ["AdapterSize", "AttachedModel", "ClearModule", "Origin", "attach", "choose_device"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TAKEN = ("protocol", "text", "latent", "max_restores")
"""What a fresh adapter takes of another one's config."""


def attach(
    model: Any = None,
    adapter: str | Path | None = None,
    *,
    processor: Any = None,
    lora: LoraSettings | Literal[False] | None = None,
    bridge: BridgeConfig | LatentBridge | Literal[False] | None = None,
    config: ClearConfig | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantization: str | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    token: str | None = None,
) -> AttachedModel:
    """Gives a model the CLEAR skill.

    Everything is checked before the model is touched, and a failure after that leaves it as it was.

    Args:
        model: a loaded model (a `Backbone`, or a module of a supported family), `builtin:NAME`, a folder, or a Hub id.
            None takes the model that the adapter was trained on.
        adapter: `builtin:NAME`, a folder, or a Hub id. None puts in a fresh adapter that changes nothing yet.
        processor: what a module of a family does not hold itself; the message of an error says what a family needs.
        lora: what a fresh adapter adapts; None is both groups at rank 16, False is nothing.
        bridge: sizes of a fresh bridge, or a trained bridge to go on with; None is the adapter's own or a fresh one,
            False is none.
        config: whose protocol and sampling a fresh adapter takes, such as `attached.config` of one that was merged: without
            its protocol a trained model is asked in other words than it learnt.
        dtype: type of the weights of a model that is loaded here: float32, bfloat16 or float16. None keeps the stored
            one on a GPU and takes float32 on a CPU, where bfloat16 is slow.
        device: where such a model is loaded to; None is the CUDA GPU if there is one, else the CPU. `mps` is taken only
            where it is asked for.
        quantization: `int8` or `nf4`: the decoder's weights in fewer bits, by bitsandbytes (extra `quant`), for answers and
            for training. Such a base cannot be merged or folded.
        revision: of the model on the Hub.
        adapter_revision: of the adapter on the Hub.
        token: for the Hub.

    Returns:
        The attached model; LoRA and bridge are trainable, everything else is frozen.

    Raises:
        ClearValueError: neither model nor adapter, arguments that exclude each other, or a bridge on another device.
        ClearTypeError: an object that no family knows.
        UnknownNameError: a built-in name that does not exist; close ones are suggested.
        CheckpointError: the model's folder cannot be used.
        AdapterError: the adapter's folder cannot be used.
        BackboneMismatchError: the adapter was made for another family or for other sizes.
        AttachError: the model has an adapter already.
    """
    if model is None and adapter is None:
        raise ClearValueError(
            "attach() needs a model, an adapter, or both: attach('builtin:bagel-tiny'), or attach(adapter='...') "
            "for an adapter that names its own base"
        )
    if adapter is not None and lora not in (None, False):
        raise ClearValueError("lora= is for a fresh adapter: the one that is loaded brings its own settings")
    if adapter is not None and config is not None:
        raise ClearValueError("config= is for a fresh adapter: the one that is loaded brings its own")
    _check_types(adapter, lora, bridge)
    stored = None
    if adapter is not None:
        stored = store.read_adapter(store.resolve(adapter, "adapter", revision=adapter_revision, token=token))
        if stored.config.backbone not in list_backbones():
            get_backbone(stored.config.backbone)  # raises, with close matches
        if stored.config.lora is not None and lora is False:
            raise ClearValueError(
                "lora=False: this adapter has LoRA weights, and without them it is another one"
            )
        if stored.config.bridge is not None and bridge is not None:
            raise ClearValueError(
                "bridge=: this adapter has its own bridge; attach a fresh adapter to set another"
            )
    name = model if isinstance(model, str | Path) else None
    if model is None and stored is not None:
        name, revision = stored.config.base_model, revision or stored.config.base_revision
        if name is None:
            raise AdapterError(
                f"{stored.folder} does not say which model it was trained on (it was none with a public name): "
                "pass that model as `model`"
            )
    base, commit = model, None
    if name is not None:
        base, commit = _load(name, stored, dtype, device, quantization, revision, token, processor)
    elif dtype is not None or device is not None or quantization is not None:
        raise ClearValueError(
            "dtype, device and quantization are for models that attach() loads; this one is loaded already: "
            "move it before, or pass its name"
        )
    backbone = _as_backbone(base, processor)
    if stored is not None:
        stored.check(backbone)
    network = backbone.model
    if network in ATTACHED:
        raise AttachError(
            "this model has an adapter already: call detach() on the attached model first; two at once would "
            "read and undo each other's changes"
        )
    settings = (
        stored.config.lora if stored is not None else (LoraSettings() if lora is None else lora) or None
    )
    if settings is not None:
        target_names(backbone, settings)
        whole_parameters(backbone, settings)
    with undo_on_failure(network) as snapshot:
        inside = None if settings is None else Lora(backbone, settings)
        if inside is None:
            network.requires_grad_(False)
        elif stored is not None:
            inside.load_state_dict(stored.lora, stored.extra)
        built = _build_bridge(backbone, bridge, stored)
        sizes = None if built is None else built.config.to_dict()
        if stored is not None:
            described = replace(stored.config, bridge=sizes)
        else:
            public = (
                isinstance(name, str)
                and (is_builtin_name(name) or is_hub_id(name))
                and not Path(name).exists()
            )
            like = {n: getattr(config, n) for n in _TAKEN} if config is not None else {}
            described = ClearConfig(
                backbone=backbone.spec.name,
                base_model=str(name) if public else None,
                base_revision=(commit or revision) if public else None,
                bridge=sizes,
                lora=settings,
                **like,
            )
        attached = AttachedModel(
            backbone, described, inside, built, snapshot, backbone if name is not None else base
        )
        if stored is not None:
            public = is_builtin_name(str(adapter)) or (stored.commit is not None and is_hub_id(str(adapter)))
            shown = str(adapter) if public else stored.folder.resolve().name
            attached.origin = Origin(shown, stored.commit, stored.hashes)
    ATTACHED.add(network)
    return attached


def _check_types(adapter: Any, lora: Any, bridge: Any) -> None:
    if not isinstance(adapter, str | Path | None):
        raise ClearTypeError(
            f"adapter must be 'builtin:NAME', a folder or a Hub id, not {type(adapter).__name__}"
        )
    if lora is not None and lora is not False and not isinstance(lora, LoraSettings):
        raise ClearTypeError(f"lora must be LoraSettings, False or None, not {type(lora).__name__}")
    if bridge is not None and bridge is not False and not isinstance(bridge, BridgeConfig | LatentBridge):
        raise ClearTypeError(
            f"bridge must be BridgeConfig, LatentBridge, False or None, not {type(bridge).__name__}"
        )


def _load(
    name: str | Path,
    stored: store.StoredAdapter | None,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    quantization: str | None,
    revision: str | None,
    token: str | None,
    processor: Any,
) -> tuple[Backbone, str | None]:
    """The model, and its commit on the Hub."""
    if processor is not None:
        raise ClearValueError("processor= is for a model that is loaded already; a named one brings its own")
    where, dtype = choose_device(device), _choose_dtype(dtype)
    folder = store.resolve(name, "model", revision=revision, token=token)
    spec = find_for_folder(folder)
    if spec is None:
        raise CheckpointError(f"{folder} is no model of a known backbone: {explain_unknown(folder)}")
    if stored is not None and spec.name != stored.config.backbone:
        raise BackboneMismatchError(
            f"the adapter in {stored.folder} was made for backbone {stored.config.backbone!r}, but {name} is a model of "
            f"{spec.name!r}"
        )
    if dtype is None and where.type == "cpu":
        dtype = torch.float32
    loaded = backbone_class(spec).load(str(folder), dtype=dtype, device=where, quantization=quantization)
    return loaded, commit_of(folder)


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device of a name, one that works; None is the CUDA GPU if there is one, else the CPU.

    Raises:
        ClearValueError: PyTorch knows no such device, or cannot use it here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shown = f"device={str(device)!r}"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ClearValueError(f"{shown} is no device of PyTorch: 'cpu', 'cuda', 'cuda:1' or 'mps'") from error
    if where.type == "meta":
        raise ClearValueError(f"{shown} holds no weights: 'cpu', 'cuda', 'cuda:1' or 'mps'")
    try:
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, ImportError) as error:  # each kind of device has its own
        raise ClearValueError(
            f"{shown} cannot be used on this machine with this PyTorch ({str(error).partition(chr(10))[0]}); 'cpu' always can"
        ) from error
    return where


def _choose_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(dtype, torch.dtype | str | None):
        raise ClearTypeError(f"dtype={dtype!r}: must be a torch.dtype or its name")
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES:
        shown = repr(dtype) if isinstance(dtype, str) else dtype
        raise ClearValueError(
            f"dtype={shown}: a model's weights are loaded as 'float32', 'bfloat16' or 'float16'"
        )
    return found


def _as_backbone(model: Any, processor: Any) -> Backbone:
    if isinstance(model, AttachedModel):
        raise AttachError("this is an attached model already: call its detach() first, or train it as it is")
    if isinstance(model, Backbone):
        if processor is not None:
            raise ClearValueError("processor= given with a Backbone, which brings its own: leave it out")
        return model
    spec = find_for_model(model)
    if spec is None:
        raise ClearTypeError(
            f"an object of type {type(model).__name__} is no model of a known backbone: {explain_unknown(model)}; or pass a "
            "Backbone of your own"
        )
    return backbone_class(spec).wrap(model, processor)


def _build_bridge(
    backbone: Backbone,
    bridge: BridgeConfig | LatentBridge | Literal[False] | None,
    stored: store.StoredAdapter | None,
) -> LatentBridge | None:
    if stored is not None and stored.config.bridge is not None:
        built = new_bridge(BridgeConfig(**stored.config.bridge), device=backbone.device)
        built.load_state_dict({n: t.float() for n, t in stored.bridge.items()})
        return built
    if bridge is False or (bridge is None and stored is not None):
        return None
    config = BridgeConfig(backbone.latent_width, backbone.width) if bridge is None else bridge
    if isinstance(config, LatentBridge):
        config = config.config
    wanted = (backbone.latent_width, backbone.width)
    if (config.latent_width, config.width) != wanted:
        raise BackboneMismatchError(
            f"a bridge of latent_width={config.latent_width}, width={config.width} does not fit this model, whose "
            f"are {wanted[0]} and {wanted[1]}"
        )
    if not isinstance(bridge, LatentBridge):
        return new_bridge(config, device=backbone.device)
    held = next(bridge.parameters()).device
    if held != backbone.device:
        raise ClearValueError(
            f"the bridge is on {held}, but the model on {backbone.device}: move it there before, as in "
            f"bridge.to({str(backbone.device)!r})"
        )
    return bridge
