"""Pictures as BAGEL takes them: sizes, pixels for the autoencoder, patches for the understanding encoder."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from clear_adapters.backbones.bagel.config import BagelConfig, Resize
from clear_adapters.backbones.packed import PreparedImage


def target_size(width: int, height: int, resize: Resize) -> tuple[int, int]:
    """(width, height) after resizing: limits on both sides, then on the area, each side a multiple of the stride."""

    def scaled(scale: float) -> tuple[int, int]:
        return tuple(
            max(resize.stride, round(round(side * scale) / resize.stride) * resize.stride)
            for side in (width, height)
        )  # type: ignore[return-value]

    scale = min(resize.max_size / max(width, height), 1.0)
    scale = max(scale, resize.min_size / min(width, height))
    new = scaled(scale)
    if new[0] * new[1] > resize.max_pixels:
        scale = (resize.max_pixels / (width * height)) ** 0.5
        new = scaled(scale)
    if max(new) > resize.max_size:
        new = scaled(resize.max_size / max(width, height))
    return new


def resize_image(image: Image.Image, resize: Resize) -> Image.Image:
    """Bicubic, with antialiasing."""
    size = target_size(*image.size, resize)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def to_pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8: pictures travel between processes and to the device in a quarter of the bytes."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def normalise(values: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]; what is floating already is left as it is."""
    return values.float() / 127.5 - 1 if values.dtype == torch.uint8 else values


def to_patches(pixels: Tensor, patch: int) -> Tensor:
    """(P, patch * patch * 3): patches row by row, inside one row, column, then channel last."""
    return rearrange(pixels, "c (h p) (w q) -> (h w) (p q c)", p=patch, q=patch)


def prepare_image(image: Image.Image, config: BagelConfig) -> PreparedImage:
    """Resizes for the autoencoder first and from that for the understanding encoder, as the official code does."""
    for_vae = resize_image(image, config.vae_resize)
    for_vit = resize_image(for_vae, config.vit_resize)
    width, height = for_vit.size
    return PreparedImage(
        pixels=to_pixels(for_vae),
        patches=to_patches(to_pixels(for_vit), config.patch),
        patch_grid=(height // config.patch, width // config.patch),
    )
