"""Models of transformers: their folders, loading them whole or not at all, and using their frozen parts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clear_adapters.backbones.quantized import check_quantization, transformers_settings
from clear_adapters.errors import CheckpointError, ClearValueError


def folder_config(folder: Path) -> dict[str, Any]:
    """What `config.json` says; nothing where it cannot be read."""
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_transformers(
    folder: str,
    model_class: Any,
    processors: Sequence[Any],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    whole: str,
    quantization: str | None = None,
    skipped: Sequence[str] = (),
) -> tuple[Any, list[Any]]:
    """A model for inference, frozen, and what else its folder holds. Reads safetensors only and runs no remote code.

    Args:
        folder: as `save_pretrained` of model and processor writes it.
        model_class: of transformers.
        processors: classes of tokenizer and the like.
        dtype: of the weights; None is the stored one.
        device: None is the CPU.
        whole: what to load instead of a part, for the message.
        quantization: `int8` or `nf4`, of the linear layers.
        skipped: modules that are not quantized.

    Raises:
        ClearValueError: the quantization is unknown or cannot be had.
        CheckpointError: a file is missing or damaged, or weights are.
    """
    check_quantization(quantization)
    where = torch.device("cpu") if device is None else torch.device(device)
    given: dict[str, Any] = {}
    if quantization is not None:
        # Quantized where they are placed, layer by layer.
        given["quantization_config"] = transformers_settings(quantization, list(skipped), dtype)
        given["device_map"] = {"": str(where)}
    try:
        others = [p.from_pretrained(folder, local_files_only=True) for p in processors]
        model, report = model_class.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **given,
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} is no complete {model_class.__name__}: {error}. It needs config.json and model.safetensors, and what "
            "the processor saves (tokenizer.json, processor_config.json or preprocessor_config.json); download it again if "
            "files are missing"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of a {model_class.__name__}, such as {missing[0]}: it is a part of the "
            f"model, or another one; {whole}"
        )
    model = model if quantization is not None else model.to(where)
    return model.eval().requires_grad_(False), others


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """A frozen part of a model as it is used, whatever mode the whole is in.

    In training mode a picture tokenizer's batch normalisation would read other codes in another batch, and overwrite its
    statistics for good.
    """
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def check_attention(config: Any) -> None:
    """Refuses kernels that take no explicit masks.

    Args:
        config: of the language model.

    Raises:
        ClearValueError: it runs with such kernels.
    """
    used = config._attn_implementation
    if used not in ("sdpa", "eager"):
        raise ClearValueError(
            f"attn_implementation={used!r}: rows of different lengths and branches need explicit masks; load the model with "
            "attn_implementation='sdpa'"
        )
