"""How good restorations are, beside two ways that learn nothing from the task.

Measured are decibels and SSIM against the clean scene; how blurred a picture is, without looking at the scene
(Crete et al. 2007: 0 is sharp, 1 is blurred); and, in decibels, whether the picture, degraded once more in the same
way with the same seed, gives the model's input again, as a true restoration would.

- gain and offset: every channel is scaled and shifted so that its mean and deviation are those of an average
  training scene. It undoes darkness and fog and knows nothing of what the picture shows.
- classical: OpenCV's non-local means against noise, CLAHE on lightness against poor contrast, then an unsharp mask;
  one setting for all corruptions.

Both act on the picture at its own size; everything is measured at the model's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from heldout import SIDE, degraded, map_parallel
from PIL import Image

from clear_adapters.mmd_bench.restorer import classical

if TYPE_CHECKING:
    from heldout import HeldOut

WAYS = ("clean", "input", "gain_offset", "classical", "restored")
MEASURES = {"psnr": 3, "ssim": 4, "blur": 4, "again": 3}


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


def reduced(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """At (width, height), as the model's own reduction."""
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def blur(image: np.ndarray) -> float:
    """How blurred, of 0 to 1, without a reference."""
    from skimage.measure import blur_effect

    return float(blur_effect(image, channel_axis=2))


def measure(
    data: HeldOut,
    restored: list[np.ndarray],
    statistics: tuple[np.ndarray, np.ndarray],
    workers: int = 0,
    known: Mapping[str, dict[str, list[float]]] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Every measure of every picture.

    Args:
        data: with the clean and the highly degraded pictures.
        restored: N pictures at the model's size.
        statistics: mean and deviation of training scenes.
        workers: processes; 0 is one a core.
        known: what was measured with other restorations of the same pictures: only these are measured then.

    Returns:
        By way, then `psnr`, `ssim`, `blur` and `again`: one number a picture.
    """
    given = zip(data.items, data.pictures["clean"], data.pictures["high"], restored, strict=True)
    others = {way: known[way] for way in WAYS[:-1] if known and way in known}
    ways = [way for way in WAYS if way not in others]
    rows = map_parallel(partial(_measure_one, statistics, ways), list(given), workers)
    return others | {
        way: {name: [round(row[way][name], digits) for row in rows] for name, digits in MEASURES.items()}
        for way in ways
    }


def _measure_one(
    statistics: tuple[np.ndarray, np.ndarray], ways: list[str], row: tuple[Any, ...]
) -> dict[str, dict[str, float]]:
    cv2.setNumThreads(1)
    item, *pixels = row
    clean, poor, restored = (np.array(x) for x in pixels)
    size = (restored.shape[1], restored.shape[0])
    truth, given = reduced(clean, size), reduced(poor, size)
    pictures = {
        "clean": truth,
        "input": given,
        "gain_offset": reduced(gain_offset(poor, *statistics), size),
        "classical": reduced(classical(poor), size),
        "restored": restored,
    }
    found = {}
    for way in ways:
        picture = pictures[way]
        large = Image.fromarray(reduced(picture, (SIDE, SIDE)))
        again = reduced(np.asarray(degraded(large, item, "high")), size)
        found[way] = {
            "psnr": psnr(picture, truth),
            "ssim": ssim(picture, truth),
            "blur": blur(picture),
            "again": psnr(again, given),
        }
    return found
