"""Pixels in and out: 8-bit pictures as the processors of transformers normalise them, and decoded pixels as PIL images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def _statistics(processor: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(getattr(processor, n), device=device) for n in ("image_mean", "image_std"))
    return mean.view(-1, 1, 1), std.view(-1, 1, 1)


def standardise(pixels: Tensor, processor: Any) -> Tensor:
    """(n, 3, H, W) float32 of uint8, as the processor would have given it, to the last bit.

    Args:
        pixels: uint8; they travel to the device in a quarter of the bytes.
        processor: with `rescale_factor`, `image_mean` and `image_std`.
    """
    levels = (np.arange(256, dtype=np.uint8) * np.float64(processor.rescale_factor)).astype(np.float32)
    mean, std = _statistics(processor, pixels.device)
    return (torch.from_numpy(levels).to(pixels.device)[pixels.long()] - mean) / std


def from_standard(pixels: Tensor, processor: Any) -> Tensor:
    """(n, 3, H, W) float32 in [-1, 1] of decoded pixels as `standardise` gives them."""
    mean, std = _statistics(processor, pixels.device)
    return (pixels.float() * std + mean) / (127.5 * processor.rescale_factor) - 1


def to_pil(pixels: Tensor, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """The middle (height, width) of pixels (n, 3, H, W) in [-1, 1] as PIL images; all of them when None."""
    height, width = size or tuple(pixels.shape[-2:])
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    own = pixels[..., top : top + height, left : left + width].clamp(-1, 1)
    array = ((own + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]
