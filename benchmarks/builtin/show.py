"""Draws a sheet of what a built-in base can draw on held-out scenes, and prints decibels.

    python benchmarks/builtin/show.py MODEL SHEET.png

Columns: the scene, its copy by the picture tokenizer, drawn from the description, parts missing, completed, edited, the edit's
truth.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from pool import COMPLETE, picture

from clear_adapters import attach
from clear_adapters.sampling import LatentSampling
from clear_adapters.world import describe, sample_edit, sample_scene


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = (np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2
    return float(10 * np.log10(255**2 / max(error.mean(), 1e-9)))


def main() -> None:
    """Draws."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = attach(sys.argv[1], lora=False, bridge=False, dtype=torch.float32, device=device).backbone
    scenes = [sample_scene(500_000 + i, "heldout") for i in range(10)]
    clean = [Image.fromarray(picture(s)) for s in scenes]
    sampling = LatentSampling(
        steps=30, guidance_text=1, guidance_image=1, shift=1.5, temperature=float((sys.argv[3:] or [0])[0])
    )
    columns = [
        clean,
        [backbone.decode(r)[0] for r in backbone.encode_images([backbone.prepare(c) for c in clean])],
    ]

    def draw(images: list[Image.Image] | None, texts: list[str]) -> list[Image.Image]:
        context = backbone.start(len(texts), list(range(len(texts))))
        if images is not None:
            context = backbone.read_image(context, [backbone.prepare(i) for i in images])
        context = backbone.read_text(context, [backbone.encode_text(t) for t in texts])
        context = replace(context, sizes=((128, 128),) * len(texts))
        return [backbone.decode(r)[0] for r in backbone.restore(context, sampling)[1]]

    columns.append(draw(None, [describe(s) for s in scenes]))
    masked = []
    for i, image in enumerate(clean):
        array = np.array(image)
        top, left = (17 * i) % 60, (29 * i) % 60
        array[top : top + 60, left : left + 60] = 128
        masked.append(Image.fromarray(array))
    columns += [masked, draw(masked, [COMPLETE] * len(masked))]
    edits = [sample_edit(s, 3 + i) for i, s in enumerate(scenes)]
    columns += [
        draw(clean, [e.instruction for e in edits]),
        [Image.fromarray(picture(e.after)) for e in edits],
    ]
    for name, column, truth in (
        ("copied", columns[1], clean),
        ("from description", columns[2], clean),
        ("masked input", masked, clean),
        ("completed", columns[4], clean),
        ("unedited input", clean, columns[6]),
        ("edited", columns[5], columns[6]),
    ):
        print(
            f"{name:18s} {np.median([psnr(a, b) for a, b in zip(column, truth, strict=True)]):.2f} dB median of {len(clean)}"
        )
    sheet = Image.new("RGB", (128 * len(columns), 128 * len(clean)))
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            sheet.paste(image, (128 * x, 128 * y))
    sheet.save(sys.argv[2])


if __name__ == "__main__":
    main()
