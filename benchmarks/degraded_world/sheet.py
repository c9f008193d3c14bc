"""The sheet of restorations: clean, degraded, restored, one scene a corruption."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clear_adapters.degradations import list_degradations

if TYPE_CHECKING:
    from heldout import HeldOut

TILE = 144
NAME = 30
GAP = 14


def draw_sheet(
    data: HeldOut, restored: list[np.ndarray], ways: dict[str, dict[str, list[float]]], path: Path
) -> None:
    """Draws the first picture of every corruption that occurs, in two halves side by side."""
    places: dict[str, int] = {}
    for item in data.items:
        places.setdefault(item.degradation, item.index)
    rows = [(d.name, places[d.name]) for d in list_degradations() if d.name in places]
    half = (len(rows) + 1) // 2
    wide = 3 * TILE + GAP
    sheet = Image.new("RGB", (2 * wide + GAP, half * (TILE + NAME) + NAME), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for side in range(2):
        for column, title in enumerate(("clean", "degraded (high)", "restored")):
            pen.text((GAP + side * wide + column * TILE + 4, 7), title, fill="black", font=font)
    for number, (name, index) in enumerate(rows):
        left, top = GAP + (number // half) * wide, NAME + (number % half) * (TILE + NAME)
        pictures = (data.pictures["clean"][index], data.pictures["high"][index], restored[index])
        for column, pixels in enumerate(pictures):
            tile = Image.fromarray(np.asarray(pixels)).resize((TILE, TILE), Image.Resampling.BICUBIC)
            sheet.paste(tile, (left + column * TILE, top))
        before, after = ways["input"]["psnr"][index], ways["restored"]["psnr"][index]
        pen.text(
            (left + 4, top + TILE + 5), f"{name}: {before:.1f} to {after:.1f} dB", fill="black", font=font
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True, quality=88)
