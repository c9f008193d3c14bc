"""Pixels in and out: 8-bit pictures as the processors of transformers normalise them, and decoded pixels as PIL images."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@lru_cache(maxsize=32)
def _statistics(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Of each channel, (3, 1, 1); kept, so that no forward waits for a copy from the host."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


@lru_cache(maxsize=32)
def _levels(factor: float, device: torch.device) -> Tensor:
    """(256,) float32: each level times the factor, rounded as the processors of transformers do."""
    return torch.from_numpy((np.arange(256, dtype=np.uint8) * np.float64(factor)).astype(np.float32)).to(
        device
    )


def standardise(pixels: Tensor, processor: Any) -> Tensor:
    """(n, 3, H, W) float32 of uint8, as the processor would have given it, to the last bit.

    Args:
        pixels: uint8; they travel to the device in a quarter of the bytes.
        processor: with `rescale_factor`, `image_mean` and `image_std`.
    """
    mean, std = (
        _statistics(tuple(getattr(processor, n)), pixels.device) for n in ("image_mean", "image_std")
    )
    return (_levels(processor.rescale_factor, pixels.device)[pixels.long()] - mean) / std


def from_standard(pixels: Tensor, processor: Any) -> Tensor:
    """(n, 3, H, W) float32 in [-1, 1] of decoded pixels as `standardise` gives them."""
    mean, std = (
        _statistics(tuple(getattr(processor, n)), pixels.device) for n in ("image_mean", "image_std")
    )
    return (pixels.float() * std + mean) / (127.5 * processor.rescale_factor) - 1


def to_pil(pixels: Tensor, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """The middle (height, width) of pixels (n, 3, H, W) in [-1, 1] as PIL images; all of them when None."""
    height, width = size or tuple(pixels.shape[-2:])
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    own = pixels[..., top : top + height, left : left + width].clamp(-1, 1)
    array = ((own + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]
