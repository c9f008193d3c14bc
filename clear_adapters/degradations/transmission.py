"""Corruptions of sending a picture: compression, lost blocks, flattening, dropped lines.

Legacy formulas: MMD-Bench (arXiv 2604.04780; the corruptions come from Robust-R1). `i` is the intensity.
"""

from __future__ import annotations

import cv2
import numpy as np

from clear_adapters.degradations.primitives import (
    REFERENCE_SIDE,
    Formula,
    Pixels,
    lookup,
    scale_of,
    scaled,
    whole_numbers,
)


def jpeg_compression(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Compress as JPEG of quality clip(int(100 - 95 i), 5, 100), and decode."""
    quality = max(5, min(100, int(100 - intensity * 95)))
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", bgr, [int(cv2.IMWRITE_JPEG_QUALITY), quality])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None  # it was encoded one line above
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB).astype(np.uint8)


def block_exchange(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Swap blocks of the grid.

    int(35 i) swaps, one after the other, of two uniformly drawn blocks of B x B, B = min(32, int(5 + 30 i)). Where a
    picture holds fewer than two such blocks (the benchmark's code fails, or swaps a block with itself) B shrinks
    until it holds two.
    """
    height, width = image.shape[:2]
    block = _fitting_block(height, width, min(32, int(5 + intensity * 30)))
    rows, columns = height // block, width // block
    result = image.copy()
    ranges = ((0, rows - 1), (0, columns - 1), (0, rows - 1), (0, columns - 1))
    for swap in whole_numbers(rng, int(intensity * 35), *ranges):
        _swap(result, block, *swap)
    return result


def block_exchange_fixed(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Swap blocks of the grid, each at most once, in proportion to a small picture.

    Blocks of legacy's B times scale; int(35 i) disjoint pairs, fewer below 64 px where the scale stops shrinking and
    as many would shuffle everything. Legacy may draw a block against itself or swap a pair back.
    """
    height, width = image.shape[:2]
    scale = scale_of(image)
    block = _fitting_block(height, width, scaled(min(32, int(5 + intensity * 30)), scale))
    rows, columns = height // block, width // block
    room = min(1.0, height * width / (REFERENCE_SIDE * scale) ** 2)
    pairs = min(max(1, round(int(35 * intensity) * room)), rows * columns // 2)
    result = image.copy()
    for first, second in rng.permutation(rows * columns)[: 2 * pairs].reshape(-1, 2).tolist():
        _swap(result, block, *divmod(first, columns), *divmod(second, columns))
    return result


def _fitting_block(height: int, width: int, block: int) -> int:
    """Return the block's side, smaller where the picture would not hold two blocks."""
    if (height // block) * (width // block) >= 2:
        return block
    return max(1, min(height, width, max(height, width) // 2))


def _swap(image: Pixels, block: int, row_1: int, column_1: int, row_2: int, column_2: int) -> None:
    one = np.s_[row_1 * block : (row_1 + 1) * block, column_1 * block : (column_1 + 1) * block]
    two = np.s_[row_2 * block : (row_2 + 1) * block, column_2 * block : (column_2 + 1) * block]
    kept = image[one].copy()
    image[one] = image[two]
    image[two] = kept


def mean_shift(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Flatten detail: pyramid mean-shift filtering with spatial and colour radius int(40 i).

    By far the slowest corruption: its cost grows with the picture's area times the radius squared, and OpenCV runs it
    on one thread.
    """
    radius = int(intensity * 40)
    return cv2.pyrMeanShiftFiltering(image, radius, radius).astype(np.uint8)


def mean_shift_fixed(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Flatten detail with the colour radius 40 i and a spatial radius in proportion to a small picture.

    Legacy's windows of up to 72 px take in half of a small picture (and cost four times what half the radius costs);
    it also rounds both radii down, to nothing below i = 0.025.
    """
    radius = max(1.0, 40 * intensity * scale_of(image))
    return cv2.pyrMeanShiftFiltering(image, radius, 40 * intensity).astype(np.uint8)


def scan_lines(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Black out bars: of every max(3, int(20 / (i + 0.1))) rows the first max(5, int(7 i)) times 0.01, rounded down."""
    interval, thickness = max(3, int(20 / (intensity + 0.1))), max(5, int(7 * intensity))
    barred = np.arange(image.shape[0]) % interval < thickness
    result = image.copy()
    result[barred] = lookup(np.arange(256) * 0.01)[image[barred]]
    return result


def scan_lines_fixed(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Black out bars in proportion to a small picture.

    Of every 20 / (i + 0.1) scale rows the first max(5, 7 i) scale rows lose 99 %; a row that a bar covers in part loses
    that part. Legacy's bars of 5 rows at every level and its intervals of 60 rows make all levels alike on a small
    picture.
    """
    scale = scale_of(image)
    interval, thickness = 20 / (intensity + 0.1) * scale, max(5.0, 7 * intensity) * scale
    edges = np.arange(image.shape[0] + 1, dtype=np.float64)
    covered_above = np.floor(edges / interval) * thickness + np.minimum(edges % interval, thickness)
    keep = 1 - 0.99 * np.diff(covered_above)
    return np.rint(image * keep[:, None, None]).clip(0, 255).astype(np.uint8)


LEGACY: dict[str, Formula] = {
    "jpeg_compression": jpeg_compression,
    "block_exchange": block_exchange,
    "mean_shift": mean_shift,
    "scan_lines": scan_lines,
}
FIXED: dict[str, Formula] = {
    "block_exchange": block_exchange_fixed,
    "mean_shift": mean_shift_fixed,
    "scan_lines": scan_lines_fixed,
}
