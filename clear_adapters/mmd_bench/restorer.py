"""A restorer that knows nothing of the task: OpenCV's classical filters, with one setting for all corruptions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def classical(pixels: Pixels) -> Pixels:
    """Non-local means against noise, CLAHE on lightness against poor contrast, then an unsharp mask.

    Args:
        pixels: (H, W, 3), uint8, RGB; not written to.

    Returns:
        A new array of the same shape.
    """
    import cv2

    quiet = cv2.fastNlMeansDenoisingColored(np.ascontiguousarray(pixels), None, 6, 6, 5, 15)
    lab = cv2.cvtColor(quiet, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(4, 4)).apply(lab[..., 0])
    even = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)
    return np.asarray(cv2.addWeighted(even, 1.5, cv2.GaussianBlur(even, (0, 0), 1.5), -0.5, 0), np.uint8)


def classical_image(image: Image.Image) -> Image.Image:
    """The same of a picture, RGB."""
    return Image.fromarray(classical(np.asarray(image.convert("RGB"))))
