"""Drawing a scene: textured ground, shaded things with border and shadow, a plate with text, light and grain."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.resources import files
from io import BytesIO

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clear_adapters.errors import ClearValueError
from clear_adapters.world.scene import CANVAS, PITCH, Scene, Sign, Thing, generator
from clear_adapters.world.shapes import masks
from clear_adapters.world.textures import cutting

SMALLEST, LARGEST = 64, 1024
"""Sides of pictures that `render` draws."""
_STREAM = 7
_FONT_FILES = {"sans": "sans.ttf", "slab": "slab.otf", "type": "type.otf", "hand": "hand.otf"}
_RGB = tuple[int, int, int]
_INKS: dict[str, tuple[_RGB, _RGB, _RGB]] = {
    "red": ((214, 34, 40), (255, 226, 222), (255, 255, 255)),
    "orange": ((246, 138, 20), (255, 240, 214), (70, 36, 8)),
    "yellow": ((252, 222, 44), (150, 112, 6), (66, 52, 6)),
    "green": ((24, 140, 58), (216, 246, 214), (255, 255, 255)),
    "blue": ((30, 70, 208), (208, 224, 255), (255, 255, 255)),
    "purple": ((132, 44, 168), (238, 212, 250), (255, 255, 255)),
    "white": ((246, 246, 244), (150, 156, 166), (40, 42, 48)),
    "black": ((22, 22, 26), (132, 132, 138), (255, 255, 255)),
}
"""Of every colour: the colour itself, that of its stripes and dots, and that of its border."""
_PLATES: dict[str, tuple[_RGB, _RGB, _RGB]] = {
    "white": ((244, 244, 240), (18, 18, 22), (40, 40, 46)),
    "yellow": ((250, 208, 46), (20, 18, 12), (40, 34, 10)),
    "blue": ((24, 60, 140), (250, 250, 250), (235, 240, 250)),
    "green": ((14, 96, 62), (250, 250, 250), (232, 246, 238)),
    "black": ((34, 34, 38), (248, 244, 228), (190, 150, 96)),
    "red": ((168, 24, 32), (255, 252, 246), (255, 236, 230)),
}
"""Of every plate: its ground, its text and its border."""


def render(scene: Scene, size: int = CANVAS) -> Image.Image:
    """Draw a scene.

    Args:
        scene: What to draw.
        size: Side of the square picture in pixels, from `SMALLEST` to `LARGEST`.

    Returns:
        An RGB picture. The same scene gives the same picture.

    Raises:
        ClearValueError: The size is out of bounds.
    """
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not SMALLEST <= size <= LARGEST:
        raise ClearValueError(
            f"Pictures of the miniature world are {SMALLEST} to {LARGEST} pixels wide, not {size!r}."
        )
    rng = generator(_STREAM, scene.grain)
    canvas = cutting(scene.background, rng, int(size))
    for thing in scene.things:
        _draw_thing(canvas, thing, size / CANVAS)
    if scene.sign:
        _draw_sign(canvas, scene.sign, size / CANVAS)
    return Image.fromarray(_lit(canvas, scene, rng))


def _lit(canvas: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Apply the scene's light and a camera's grain; return bytes."""
    size = canvas.shape[0]
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    turn = np.radians(scene.light_angle)
    light = scene.gain + 0.09 * (
        np.float32(np.cos(turn)) * ramp[None, :] + np.float32(np.sin(turn)) * ramp[:, None]
    )
    grain = np.frombuffer(rng.bytes(size * size), np.int8).reshape(size, size).astype(np.float32) * 0.035
    tint = np.array((1 + scene.warmth, 1, 1 - scene.warmth), np.float32)
    canvas *= light[..., None] * tint
    canvas += grain[..., None]
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


def _blend(canvas: np.ndarray, color: np.ndarray, cover: np.ndarray, left: int, top: int) -> None:
    """Lay colour over a part of the canvas, as far as `cover` says; what lies outside the canvas is cut off."""
    size = canvas.shape[0]
    x, y = max(left, 0), max(top, 0)
    right, bottom = min(left + cover.shape[1], size), min(top + cover.shape[0], size)
    if x >= right or y >= bottom:
        return
    inner = np.s_[y - top : bottom - top, x - left : right - left]
    part = canvas[y:bottom, x:right]
    part += (color[inner] - part) * cover[inner][..., None]


def _shadow(canvas: np.ndarray, cover: np.ndarray, left: int, top: int, scale: float) -> None:
    """Darken the canvas softly below and to the right of a mask."""
    soft = cv2.GaussianBlur(cover, (0, 0), 2.2 * scale) * 0.42
    _blend(
        canvas,
        np.zeros((*cover.shape, 3), np.float32),
        soft,
        left + round(2.5 * scale),
        top + round(3 * scale),
    )


@lru_cache(maxsize=64)
def _weave(fill: str, side: int, scale: float, angle: float) -> np.ndarray:
    """Return how much of the second colour shows through at every pixel, (side, side) from 0 to 1."""
    turn = np.radians(angle)
    at = (np.arange(side, dtype=np.float32) - side / 2) / np.float32(scale)
    along = np.float32(np.cos(turn)) * at[None, :] + np.float32(np.sin(turn)) * at[:, None]
    if fill == "striped":
        wave = np.abs(((along / 13.0) % 1) - 0.5) * 13.0
        return np.clip((2.8 - wave) * np.float32(scale) + 0.5, 0, 1)
    across = np.float32(-np.sin(turn)) * at[None, :] + np.float32(np.cos(turn)) * at[:, None]
    x, y = (((value / 13.0) % 1) - 0.5 for value in (along, across))
    radius = np.sqrt(x * x + y * y) * 13.0
    return np.clip((3.7 - radius) * np.float32(scale) + 0.5, 0, 1)


def _draw_thing(canvas: np.ndarray, thing: Thing, scale: float) -> None:
    """Draw one thing with its shadow, pattern, shading and border."""
    x, y = centre(thing)
    left, top = x * scale, y * scale
    side = 2 * int(np.ceil(0.62 * thing.width * scale + 4))
    corner = (int(np.floor(left)) - side // 2, int(np.floor(top)) - side // 2)
    offset = (left - np.floor(left), top - np.floor(top))
    mask = masks(thing.shape, thing.width * scale, thing.angle, 2.6 * scale, offset, side)
    ink, second, edge = (np.array(color, np.float32) for color in _INKS[thing.color])
    paint = np.empty((side, side, 3), np.float32)
    paint[:] = ink
    if thing.fill != "plain":
        paint += (second - ink) * _weave(thing.fill, side, scale, thing.weave)[..., None]
    shade = np.linspace(1.07, 0.9, side, dtype=np.float32)
    paint *= shade[:, None, None]
    paint += (edge - paint) * mask[..., 1:]
    cover = np.ascontiguousarray(mask[..., 0])
    _shadow(canvas, cover, *corner, scale)
    _blend(canvas, paint, cover, *corner)


def centre(thing: Thing) -> tuple[float, float]:
    """Return where a thing's centre is, in canvas units."""
    return (thing.column + 0.5) * PITCH + thing.dx, (thing.row + 0.5) * PITCH + thing.dy


def sign_box(sign: Sign) -> tuple[float, float, float, float]:
    """Return the left, top, width and height of a sign's plate before its tilt, in canvas units."""
    columns = [cell % 3 for cell in sign.cells]
    x = (sum(columns) / len(columns) + 0.5) * PITCH + sign.dx
    y = (sign.cells[0] // 3 + 0.5) * PITCH + sign.dy
    width = 76.0 if len(sign.cells) == 1 else {2: 100.0, 3: 124.0, 4: 148.0}.get(len(sign.text), 148.0)
    height = sign.height + 20
    return x - width / 2, y - height / 2, width, height


@cache
def _font_bytes(name: str) -> bytes:
    """Return the file of a typeface."""
    return (files("clear_adapters.world") / "fonts" / _FONT_FILES[name]).read_bytes()


@lru_cache(maxsize=512)
def _font(name: str, capital: int) -> ImageFont.FreeTypeFont:
    """Return a typeface at the size at which a capital is so many pixels high."""
    probe = ImageFont.truetype(BytesIO(_font_bytes(name)), 200, layout_engine=ImageFont.Layout.BASIC)
    _, top, _, bottom = probe.getbbox("H")
    return probe.font_variant(size=max(1, round(200 * capital / (bottom - top))))


def _draw_sign(canvas: np.ndarray, sign: Sign, scale: float) -> None:
    """Draw the plate with its text, tilted, with its shadow."""
    left, top, width, height = (value * scale for value in sign_box(sign))
    wide, high = round(width * 2), round(height * 2)
    ground, ink, edge = _PLATES[sign.plate]
    margin = round(8 * scale)
    plate = Image.new("RGB", (wide, high), ground)
    pen = ImageDraw.Draw(plate)
    inset, line = 3 * scale, max(1, round(4 * scale))
    pen.rounded_rectangle((inset, inset, wide - 1 - inset, high - 1 - inset), 10 * scale, None, edge, line)
    plate.paste(ink, _text_box(sign, wide, high, scale), _text_mask(sign, wide, scale))
    cover = Image.new("L", (wide, high), 0)
    ImageDraw.Draw(cover).rounded_rectangle((0, 0, wide - 1, high - 1), 14 * scale, 255)
    box = (round(width) + 2 * margin, round(height) + 2 * margin)
    x, y = int(np.floor(left)), int(np.floor(top))
    turn = np.radians(sign.angle)
    cos, sin = np.cos(turn) / 2, np.sin(turn) / 2
    middle = (width / 2 + margin + left - x, height / 2 + margin + top - y)
    matrix = np.array([[cos, -sin, 0], [sin, cos, 0]])
    matrix[:, 2] = np.array(middle) - matrix[:, :2] @ np.array([wide / 2, high / 2])
    matrix[:, 2] -= 0.5 - matrix[:, :2] @ np.array([0.5, 0.5])
    paint = cv2.warpAffine(
        np.asarray(plate), matrix, box, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    alpha = cv2.warpAffine(np.asarray(cover), matrix, box, flags=cv2.INTER_LINEAR).astype(np.float32) / 255
    _shadow(canvas, alpha, x - margin, y - margin, scale)
    _blend(canvas, paint.astype(np.float32), alpha, x - margin, y - margin)


def _text_mask(sign: Sign, wide: int, scale: float) -> Image.Image:
    """Return the sign's text as a mask at twice the size, squeezed sideways where it is too wide for its plate."""
    font = _font(sign.font, round(2 * sign.height * scale))
    left, top, _, bottom = font.getbbox(sign.text)
    gap = round(3 * scale)
    widths = [font.getlength(character) for character in sign.text]
    mask = Image.new("L", (int(sum(widths)) + gap * (len(widths) - 1) + 8, int(bottom - top) + 4), 0)
    pen, x = ImageDraw.Draw(mask), 2 - left
    for character, step in zip(sign.text, widths, strict=True):
        pen.text((x, 2 - top), character, 255, font)
        x += step + gap
    mask = mask.crop(mask.getbbox())
    room = wide - round(22 * scale)
    return mask.resize((room, mask.height), Image.Resampling.BILINEAR) if mask.width > room else mask


def _text_box(sign: Sign, wide: int, high: int, scale: float) -> tuple[int, int]:
    """Return where the text's mask goes on the plate, so that it stands in the middle."""
    mask = _text_mask(sign, wide, scale)
    return (wide - mask.width) // 2, (high - mask.height) // 2
