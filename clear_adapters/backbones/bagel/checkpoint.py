"""BAGEL checkpoint folders: reading the official layout straight onto a device, and writing it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clear_adapters.backbones.bagel.autoencoder import (
    build_autoencoder,
    fit_shape,
    is_autoencoder_key,
    official_keys,
)
from clear_adapters.backbones.bagel.config import BagelConfig
from clear_adapters.backbones.bagel.model import BagelModel
from clear_adapters.backbones.quantized import quantize_layers
from clear_adapters.errors import CheckpointError

LAYERS = "language_model.model.layers."
"""What the names of the decoder's layers begin with."""


def load_checkpoint(
    folder: Path, dtype: torch.dtype | None, device: torch.device, quantization: str | None = None
) -> tuple[BagelModel, AutoencoderKL]:
    """Builds the network without memory, then places each tensor once, on its device and in its type.

    Args:
        folder: `llm_config.json`, `vit_config.json`, and safetensors files that together hold the model's and the
            autoencoder's tensors under the official names (officially `ema.safetensors` and `ae.safetensors`).
        dtype: type of the weights; None keeps the stored one. The autoencoder takes it too.
        device: where they go.
        quantization: `int8` or `nf4`, of the decoder's layers, each of which is quantized when it is placed.

    Raises:
        CheckpointError: no weights, names missing or left over, or shapes that do not fit.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no .safetensors file: a BAGEL checkpoint has ema.safetensors and ae.safetensors"
        )
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        _check_whole(file)
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name in where:
                    raise CheckpointError(
                        f"{name} stands both in {where[name].name} and in {file.name} of {folder}"
                    )
                where[name] = file
                shapes[name] = tuple(opened.get_slice(name).get_shape())
    config = BagelConfig.from_folder(folder, shapes)
    with torch.device("meta"):
        model = BagelModel(config)
        autoencoder = build_autoencoder(config.ae)
    targets: dict[str, tuple[nn.Module, str]] = {n: (model, n) for n in model.state_dict()}
    targets |= {official: (autoencoder, n) for official, n in official_keys(autoencoder).items()}
    _check(folder, targets, shapes)
    makers: dict[str, Any] = {}
    if quantization is not None:
        makers = quantize_layers(model, LAYERS, quantization, dtype or torch.bfloat16)
    for file in files:
        with safe_open(file, "pt", device=str(device)) as opened:
            for name in opened.keys():  # noqa: SIM118
                root, path = targets[name]
                tensor = fit_shape(name, opened.get_tensor(name))
                tensor = tensor if dtype is None else tensor.to(dtype)
                if root is model and path in makers:
                    parent, _, leaf = path.rpartition(".")
                    setattr(root.get_submodule(parent), leaf, makers[path](tensor, device))
                else:
                    _place(root, path, tensor)
    return model.eval(), autoencoder.eval().requires_grad_(False)


def _check_whole(file: Path) -> None:
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}): the download was cut off, or it is another kind of "
            "file; get it again"
        ) from error


def _check(
    folder: Path, targets: dict[str, tuple[nn.Module, str]], shapes: dict[str, tuple[int, ...]]
) -> None:
    missing = sorted(set(targets) - set(shapes))
    extra = sorted(set(shapes) - set(targets))
    if missing or extra:
        parts = [
            f"{len(names)} {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
            for what, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
        raise CheckpointError(
            f"the weights in {folder} do not fit a BAGEL model of its own configuration ({'; '.join(parts)}); "
            "the files belong to another model or are incomplete"
        )
    for name, shape in shapes.items():
        root, path = targets[name]
        wanted = tuple(root.get_parameter(path).shape)
        squeezed = (
            shape[:2] if is_autoencoder_key(name) and "mid.attn_1" in name and len(shape) == 4 else shape
        )
        if tuple(squeezed) != wanted:
            raise CheckpointError(
                f"{name} in {folder} has shape {shape}, but the configuration asks for {wanted}: weights and "
                "llm_config.json / vit_config.json / ae_config.json do not belong together"
            )


def _place(root: nn.Module, path: str, tensor: Tensor) -> None:
    parent, _, leaf = path.rpartition(".")
    module = root.get_submodule(parent)
    module._parameters[leaf] = nn.Parameter(tensor, requires_grad=module.get_parameter(leaf).requires_grad)


def save_checkpoint(
    folder: Path,
    model: BagelModel,
    autoencoder: AutoencoderKL,
    tokenizer: Any,
    dtype: torch.dtype = torch.bfloat16,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a folder that `load_checkpoint` reads, all tensors in one `ema.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach().to("cpu", dtype).contiguous() for n, t in model.state_dict().items()}
    stored = autoencoder.state_dict()
    for official, name in official_keys(autoencoder).items():
        tensors[official] = stored[name].detach().to("cpu", dtype).contiguous()
    save_file(tensors, folder / "ema.safetensors", metadata={"format": "pt", **(metadata or {})})
    c = model.config
    ae = c.ae
    files: dict[str, dict[str, Any]] = {
        "llm_config.json": c.llm,
        "vit_config.json": c.vit,
        "ae_config.json": {
            "ch": ae.ch,
            "ch_mult": list(ae.ch_mult),
            "num_res_blocks": ae.num_res_blocks,
            "z_channels": ae.z_channels,
            "norm_groups": ae.norm_groups,
            "scale_factor": float(autoencoder.config.scaling_factor),
            "shift_factor": float(autoencoder.config.shift_factor),
        },
        "preprocessor_config.json": {"vae": vars(c.vae_resize), "vit": vars(c.vit_resize)},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
