"""The six backgrounds: large textures made once a process from fixed seeds, of which every scene shows a cutting."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np

from clear_adapters.world.scene import BACKGROUNDS, CANVAS, generator

_STREAM = 6
_SIDE = 512


def _noise(rng: np.random.Generator, cell: tuple[float, float]) -> np.ndarray:
    """Return smooth noise of mean 0 and deviation 1, with features of about the given height and width in pixels."""
    height, width = (max(2, int(_SIDE / size)) for size in cell)
    rough = rng.standard_normal((height, width)).astype(np.float32)
    smooth = cv2.resize(rough, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC)
    return (smooth - smooth.mean()) / (smooth.std() + 1e-6)


def _tinted(color: tuple[int, int, int], shade: np.ndarray) -> np.ndarray:
    """Return a colour made lighter and darker by a shade around 0."""
    return np.array(color, np.float32) * (1 + shade)[..., None]


def _brick(rng: np.random.Generator) -> np.ndarray:
    """Return courses of bricks, each of its own shade, in light mortar."""
    picture = _tinted((172, 160, 148), 0.04 * _noise(rng, (3, 3)))
    height, width = 20, 44
    rough = 0.05 * _noise(rng, (2, 4)) + 0.03 * _noise(rng, (20, 20))
    for row in range(-1, _SIDE // height + 1):
        for column in range(-1, _SIDE // width + 2):
            top, left = row * height, column * width + (row % 2) * width // 2
            where = np.s_[
                max(top + 2, 0) : max(top + height - 1, 0), max(left + 2, 0) : max(left + width - 1, 0)
            ]
            if picture[where].size:
                shade = rough[where] + rng.uniform(-0.12, 0.12)
                picture[where] = _tinted((146, 88, 70), shade)
    return picture


def _grass(rng: np.random.Generator) -> np.ndarray:
    """Return upright blades in several greens."""
    blades = 0.16 * _noise(rng, (11, 2.2)) + 0.1 * _noise(rng, (6, 1.5)) + 0.08 * _noise(rng, (70, 70))
    picture = _tinted((92, 140, 66), blades)
    picture[..., 0] += 14 * _noise(rng, (30, 12))
    return picture


def _sand(rng: np.random.Generator) -> np.ndarray:
    """Return ripples and grains."""
    y = np.arange(_SIDE, dtype=np.float32)[:, None]
    ripple = np.sin(y / 5.5 + 2.2 * _noise(rng, (40, 90)))
    return _tinted(
        (208, 182, 138), 0.045 * ripple + 0.05 * _noise(rng, (1.3, 1.3)) + 0.03 * _noise(rng, (60, 60))
    )


def _sky(rng: np.random.Generator) -> np.ndarray:
    """Return a blue that lightens downwards, with clouds."""
    down = np.linspace(0, 1, _SIDE, dtype=np.float32)[:, None, None]
    blue = np.array((108, 166, 220), np.float32) * (1 - down) + np.array((158, 200, 232), np.float32) * down
    cloud = _noise(rng, (52, 90)) + 0.5 * _noise(rng, (24, 40)) + 0.25 * _noise(rng, (10, 16))
    cover = np.clip((cloud - 0.3) * 0.6, 0, 0.85)[..., None]
    return blue * (1 - cover) + np.array((236, 240, 244), np.float32) * cover


def _wood(rng: np.random.Generator) -> np.ndarray:
    """Return planks with their grain."""
    y, x = np.mgrid[:_SIDE, :_SIDE].astype(np.float32)
    plank = (y // 43).astype(int)
    shift = rng.uniform(0, 60, plank.max() + 1).astype(np.float32)[plank]
    grain = np.sin((y + shift) / 2.3 + 2.6 * _noise(rng, (14, 150)) + x / 90)
    shade = (
        0.06 * grain
        + 0.035 * _noise(rng, (1.5, 30))
        + rng.uniform(-0.1, 0.1, plank.max() + 1).astype(np.float32)[plank]
    )
    shade[(y % 43) < 2] -= 0.35
    return _tinted((160, 116, 74), shade)


def _night(rng: np.random.Generator) -> np.ndarray:
    """Return a dark blue sky with faint haze and small stars."""
    picture = _tinted((28, 34, 66), 0.3 * _noise(rng, (70, 110)))
    picture += 4 * _noise(rng, (30, 40))[..., None]
    dots = np.zeros((_SIDE, _SIDE), np.float32)
    count = 420
    dots[rng.integers(_SIDE, size=count), rng.integers(_SIDE, size=count)] = rng.uniform(0.3, 1, count)
    return np.clip(picture, 6, 255) + 520 * cv2.GaussianBlur(dots, (0, 0), 0.8)[..., None]


@cache
def _texture(background: str) -> np.ndarray:
    """Return the large texture of a background, float32 RGB around 0 to 255."""
    makers = dict(zip(BACKGROUNDS, (_brick, _grass, _sand, _sky, _wood, _night), strict=True))
    picture = makers[background](generator(_STREAM, BACKGROUNDS.index(background)))
    return np.ascontiguousarray(np.clip(picture, 0, 255), np.float32)


def cutting(background: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a random part of a background's texture, (size, size, 3) float32, mirrored half of the time."""
    top, left = (int(at) for at in rng.integers(_SIDE - CANVAS + 1, size=2))
    if background == "sky":
        top //= 2
    part = _texture(background)[top : top + CANVAS, left : left + CANVAS]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    if size == CANVAS:
        return part.copy()
    way = cv2.INTER_AREA if size < CANVAS else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(part), (size, size), interpolation=way)
