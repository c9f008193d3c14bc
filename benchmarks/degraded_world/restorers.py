"""How good restorations are: decibels and SSIM beside two ways that learn nothing from the task.

- gain and offset: every channel is scaled and shifted so that its mean and deviation are those of an average
  training scene. It undoes darkness and fog and knows nothing of what the picture shows.
- classical: OpenCV's non-local means against noise, CLAHE on lightness against poor contrast, then an unsharp mask;
  one setting for all corruptions.

Both act on the picture at its own size; everything is measured at the model's size, against the clean scene.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import cv2
import numpy as np
from heldout import map_parallel
from PIL import Image

WAYS = ("input", "gain_offset", "classical", "restored")


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; at most 60, so that a perfect copy stays a number."""
    error = np.mean((image.astype(np.float64) - truth.astype(np.float64)) ** 2)
    return float(min(60.0, 10 * np.log10(255**2 / max(error, 1e-9))))


def ssim(image: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity as in Wang et al. 2004: Gaussian window of 1.5 pixels, all channels."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            image,
            truth,
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def gain_offset(image: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Brings the channels to a given mean and standard deviation."""
    pixels = image.astype(np.float64)
    scale = deviation / np.maximum(pixels.std((0, 1)), 1.0)
    return np.clip(np.rint((pixels - pixels.mean((0, 1))) * scale + mean), 0, 255).astype(np.uint8)


def classical(image: np.ndarray) -> np.ndarray:
    """Non-local means, CLAHE, unsharp mask."""
    quiet = cv2.fastNlMeansDenoisingColored(np.ascontiguousarray(image), None, 6, 6, 5, 15)
    lab = cv2.cvtColor(quiet, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(4, 4)).apply(lab[..., 0])
    even = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)
    return np.asarray(cv2.addWeighted(even, 1.5, cv2.GaussianBlur(even, (0, 0), 1.5), -0.5, 0))


def reduced(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """At (width, height), as the model's own reduction."""
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def measure(
    clean: np.ndarray,
    poor: np.ndarray,
    restored: list[np.ndarray],
    statistics: tuple[np.ndarray, np.ndarray],
    workers: int = 0,
) -> dict[str, dict[str, list[float]]]:
    """Decibels and SSIM of every picture.

    Args:
        clean: (N, H, W, 3), at the pictures' own size.
        poor: likewise, degraded.
        restored: N pictures at the model's size.
        statistics: mean and deviation of training scenes.
        workers: processes; 0 is one a core.

    Returns:
        By way, then `psnr` and `ssim`: one number a picture.
    """
    rows = map_parallel(
        partial(_measure_one, statistics), list(zip(clean, poor, restored, strict=True)), workers
    )
    return {
        way: {
            "psnr": [round(row[way][0], 3) for row in rows],
            "ssim": [round(row[way][1], 4) for row in rows],
        }
        for way in WAYS
    }


def _measure_one(
    statistics: tuple[np.ndarray, np.ndarray], row: tuple[Any, ...]
) -> dict[str, tuple[float, float]]:
    cv2.setNumThreads(1)
    clean, poor, restored = (np.array(x) for x in row)
    size = (restored.shape[1], restored.shape[0])
    truth = reduced(clean, size)
    pictures = {
        "input": reduced(poor, size),
        "gain_offset": reduced(gain_offset(poor, *statistics), size),
        "classical": reduced(classical(poor), size),
        "restored": restored,
    }
    return {way: (psnr(p, truth), ssim(p, truth)) for way, p in pictures.items()}
