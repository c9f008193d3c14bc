"""Pictures as Janus takes them: a square with the picture in its middle, for the tokenizer and the understanding encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from clear_adapters.backbones.packed import PreparedImage


@dataclass
class JanusImages:
    """Resizing as the checkpoint's processor does, on the CPU.

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

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the patches, the same for every picture."""
        return self.side // self.patch, self.side // self.patch

    def prepare(self, image: Image.Image) -> PreparedImage:
        """(3, side, side) uint8, read by both encoders: pictures travel in a quarter of the bytes."""
        made = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        pixels = made["pixel_values"][0].to(torch.uint8)
        width, height = image.size
        scale, least = self.side / max(width, height), self.processor.min_size
        content = (max(round(height * scale), least), max(round(width * scale), least))
        return PreparedImage(pixels, pixels, self.grid, content)
