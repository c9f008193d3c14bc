"""Outlines of the ten shapes, as polygons in a box from -1 to 1 (y down), and their coverage masks."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np

_FINE = 4
"""Masks are drawn this many times larger and averaged down."""
_SHIFT = 4
"""Bits behind the point in the coordinates that OpenCV gets."""


def _arc(
    start: float, stop: float, radius: float = 1.0, x: float = 0.0, y: float = 0.0, points: int = 64
) -> np.ndarray:
    """Return points on a circle between two angles in degrees."""
    angle = np.radians(np.linspace(start, stop, points))
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


def _heart() -> np.ndarray:
    """Return the classic parametric heart, fitted to its box."""
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 14.5
    return np.stack([x, y - (y.max() + y.min()) / 2], 1)


@cache
def outline(shape: str) -> tuple[np.ndarray, ...]:
    """Return the closed contours of a shape; a second contour is a hole."""
    circle = _arc(0, 360)
    if shape == "circle":
        return (circle,)
    if shape == "ring":
        return circle, circle * 0.45
    if shape == "square":
        return (np.array([(-0.94, -0.94), (0.94, -0.94), (0.94, 0.94), (-0.94, 0.94)]),)
    if shape == "triangle":
        return (np.array([(0, -0.95), (1, 0.85), (-1, 0.85)]),)
    if shape == "diamond":
        return (np.array([(0, -1), (0.8, 0), (0, 1), (-0.8, 0)]),)
    if shape == "cross":
        corners = [(-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36)]
        return (np.array([*corners, *((-x, -y) for x, y in corners)]),)
    if shape == "star":
        angle = np.radians(np.arange(10) * 36 - 90)
        radius = np.where(np.arange(10) % 2 == 0, 1.05, 0.47)
        return (np.stack([radius * np.cos(angle), radius * np.sin(angle) + 0.08], 1),)
    if shape == "heart":
        return (_heart(),)
    if shape == "moon":
        outer, inner = _arc(52.7, 307.3), _arc(276.2, 83.8, 0.8, 0.52, 0.0)
        return (np.concatenate([outer, inner]) + np.array((0.15, 0.0)),)
    roof = [
        (-1, -0.05),
        (0, -1),
        (1, -0.05),
        (0.78, -0.05),
        (0.78, 0.95),
        (0.2, 0.95),
        (0.2, 0.45),
        (-0.2, 0.45),
    ]
    return (np.array([*roof, (-0.2, 0.95), (-0.78, 0.95), (-0.78, -0.05)]),)


def masks(
    shape: str, width: float, angle: float, edge: float, offset: tuple[float, float], side: int
) -> np.ndarray:
    """Draw a shape and its border, antialiased.

    Args:
        shape: Name of the shape.
        width: Side of its box in pixels.
        angle: Tilt in degrees.
        edge: Width of the border in pixels; half of it lies outside the shape.
        offset: Where its centre is, from the centre of the mask, in pixels.
        side: Side of the square mask in pixels.

    Returns:
        Coverage from 0 to 1, (side, side, 2): of the shape with its border, and of the border alone.
    """
    turn = np.radians(angle)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) * (width / 2)
    centre = np.array(offset) + side / 2
    scale = _FINE * 2**_SHIFT
    contours = [
        np.round((line @ rotation + centre) * scale - 2 ** (_SHIFT - 1)).astype(np.int32)
        for line in outline(shape)
    ]
    whole = np.zeros((side * _FINE, side * _FINE), np.uint8)
    cv2.fillPoly(whole, contours, 255, shift=_SHIFT)
    border = np.zeros_like(whole)
    cv2.polylines(border, contours, True, 255, max(1, round(edge * _FINE)), shift=_SHIFT)
    both = cv2.merge([cv2.max(whole, border), border])
    return cv2.resize(both, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
