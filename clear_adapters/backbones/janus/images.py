"""Pictures as Janus takes them: a square with the picture in its middle, for the tokenizer and the understanding encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from clear_adapters.backbones.packed import PreparedImage


@dataclass
class JanusImages:
    """Resizing as the checkpoint's processor does, on the CPU; normalising on the device.

    Attributes:
        processor: transformers' own, the one that needs no torchvision.
        patch: pixels a side of one token.
    """

    processor: JanusImageProcessorPil
    patch: int

    @property
    def side(self) -> int:
        """Pixels a side of the square."""
        return int(self.processor.size["height"])

    def prepare(self, image: Image.Image) -> PreparedImage:
        """(3, side, side) uint8, read by both encoders: pictures travel in a quarter of the bytes."""
        made = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        pixels = made["pixel_values"][0].to(torch.uint8)
        width, height = image.size
        scale, least = self.side / max(width, height), self.processor.min_size
        content = (max(round(height * scale), least), max(round(width * scale), least))
        cells = self.side // self.patch
        return PreparedImage(pixels, pixels, (cells, cells), content)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) float32 of uint8, as the processor gives it to the understanding encoder, to the last bit."""
        levels = (np.arange(256, dtype=np.uint8) * np.float64(self.processor.rescale_factor)).astype(
            np.float32
        )
        mean, std = (
            torch.tensor(getattr(self.processor, name), device=pixels.device).view(3, 1, 1)
            for name in ("image_mean", "image_std")
        )
        return (torch.from_numpy(levels).to(pixels.device)[pixels.long()] - mean) / std


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1], as the picture tokenizer takes it."""
    return pixels.float() / 127.5 - 1


def to_pil(pixels: Tensor, size: tuple[int, int]) -> list[Image.Image]:
    """The middle (height, width) of pixels (n, 3, H, W) in [-1, 1] as PIL images."""
    height, width = size
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    own = pixels[..., top : top + height, left : left + width].clamp(-1, 1)
    array = ((own + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]
