"""Base weights in 8 or 4 bits by bitsandbytes: for inference, and under LoRA in training.

Only the linear layers of the decoder are quantized: they are nine tenths of a model, and what stands around them (embeddings,
heads, vision tower, picture tokenizer) keeps its type.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clear_adapters.errors import ClearValueError

KINDS = {"int8": "LLM.int8(), with outliers apart", "nf4": "4-bit normal floats"}
"""By name."""

_OUTLIERS = 6.0
"""Inputs beyond it are multiplied unquantized, as in LLM.int8()."""


def check_quantization(kind: str | None) -> None:
    """Whether weights can be loaded so.

    Raises:
        ClearValueError: an unknown kind, or bitsandbytes is not installed.
    """
    if kind is None:
        return
    if kind not in KINDS:
        raise ClearValueError(f"quantization={kind!r}: one of {', '.join(map(repr, KINDS))}, or None")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ClearValueError(
            f"quantization={kind!r} needs bitsandbytes, which is not installed: pip install 'clear-adapters[quant]'"
        )


def quantize_layers(
    model: nn.Module, prefix: str, kind: str, dtype: torch.dtype
) -> dict[str, Callable[..., Any]]:
    """Puts quantized layers without weights in the places of a model's linear layers.

    Args:
        model: on the meta device; it is told as quantized, so that PEFT takes the layers for what they are.
        prefix: of the layers that are replaced.
        kind: one of `KINDS`.
        dtype: that is computed in.

    Returns:
        By the name of each of their weights, what makes a parameter of a tensor and a device.
    """
    import bitsandbytes as bnb

    # It tells of every product of 32-bit inputs.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    made: dict[str, Callable[..., Any]] = {}
    for name, layer in list(model.named_modules()):
        if not name.startswith(prefix) or type(layer) is not nn.Linear:
            continue
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        new: nn.Module
        if kind == "nf4":
            new = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device="meta")
        else:
            new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=_OUTLIERS, device="meta")
        new.requires_grad_(False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.train(layer.training))
        made[f"{name}.weight"] = _four_bits if kind == "nf4" else _eight_bits
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
    return made


def _four_bits(tensor: Tensor, device: torch.device) -> Any:
    import bitsandbytes as bnb

    return bnb.nn.Params4bit(tensor, requires_grad=False, quant_type="nf4").to(device)


def _eight_bits(tensor: Tensor, device: torch.device) -> Any:
    import bitsandbytes as bnb

    return bnb.nn.Int8Params(tensor.half(), requires_grad=False, has_fp16_weights=False).to(device)


def transformers_settings(kind: str, skipped: list[str], dtype: torch.dtype | None) -> Any:
    """The same for a model of transformers, as its `quantization_config`.

    Args:
        kind: one of `KINDS`.
        skipped: modules that keep their type.
        dtype: that is computed in; None is bfloat16.
    """
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype or torch.bfloat16,
            llm_int8_skip_modules=skipped,
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=_OUTLIERS, llm_int8_skip_modules=skipped)


def quantized_layers(model: nn.Module) -> Iterator[nn.Linear]:
    """The layers of a model whose weights are quantized."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            yield module


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has such layers."""
    return next(quantized_layers(model), None) is not None
