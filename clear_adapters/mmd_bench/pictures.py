"""One row's pictures for every set that is built: which corruption, with which seed, encoded as the authors do."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clear_adapters.datasets.tsv import TsvError, TsvFile, format_row
from clear_adapters.degradations import SEVERITIES, degrade, draw
from clear_adapters.degradations.corruption import Formulas
from clear_adapters.errors import ClearError
from clear_adapters.mmd_bench.questions import read_picture

QUALITY = 95
"""JPEG quality of every corrupted picture, OpenCV's default, which the authors' generators use."""

Place = tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """What decides the contents of the sets.

    Attributes:
        seed: of everything random.
        conditions: the sets: severities (mixed corruptions) and names of corruptions (at high).
        formulas: of the corruptions.
    """

    seed: int
    conditions: tuple[str, ...]
    formulas: Formulas = "legacy"


@dataclass(frozen=True)
class Item:
    """One row to be written.

    Attributes:
        index: of the row.
        place: of the row.
        picture: of the row that holds its picture; another one where the row points at it.
        shared: pictures that must be sound for the row to count, its own included.
    """

    index: str
    place: Place
    picture: Place
    shared: tuple[Place, ...]


@dataclass(frozen=True)
class Made:
    """A part of the sets.

    Attributes:
        rows: by condition, lines of the table, encoded.
        pictures: facts about each picture, one JSON-able dict each.
        written: rows in it.
        bad: rows that were left out, with the reason.
        left: good rows that were left out with them.
    """

    rows: dict[str, bytes]
    pictures: list[dict[str, Any]]
    written: int
    bad: list[TsvError]
    left: int

    @property
    def size(self) -> int:
        """Bytes of all lines."""
        return sum(map(len, self.rows.values()))


def picture_seed(seed: int, file: str, index: str, purpose: str) -> int:
    """A whole number below 2^32 that follows from its arguments alone.

    Args:
        seed: of the sets.
        file: stem of the task's files.
        index: of the row.
        purpose: `draw` for the choice of a mixed corruption; `mixed/SEVERITY`, or the corruption's name, for its
            parameters (the authors draw them anew for every level).
    """
    text = f"{seed}/{file}/{index}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


def plan_picture(recipe: Recipe, file: str, index: str, condition: str) -> tuple[str, float, int]:
    """Corruption, intensity and seed of one picture of one set."""
    if condition in SEVERITIES:
        name = draw(picture_seed(recipe.seed, file, index, "draw"), "benchmark")
        return name, SEVERITIES[condition], picture_seed(recipe.seed, file, index, f"mixed/{condition}")
    return condition, SEVERITIES["high"], picture_seed(recipe.seed, file, index, condition)


def make(job: tuple[Path, str, Recipe, list[Item], bool]) -> Made:
    """Some rows, in every set.

    Args:
        job: the table, the stem of the task's files, the recipe, the rows, and whether bad rows are left out.

    Raises:
        TsvError: a picture cannot be decoded or corrupted, and bad rows are not left out.
    """
    path, stem, recipe, items, skip_bad = job
    file = TsvFile(path)
    made = Made(dict.fromkeys(recipe.conditions, b""), [], 0, [], 0)
    rows: dict[str, list[bytes]] = {c: [] for c in recipe.conditions}
    written = left = 0
    for item in items:
        try:
            lines, facts = _make_row(file, stem, recipe, item)
        except TsvError as error:
            if not skip_bad:
                raise
            if error.line == item.place[0]:
                made.bad.append(error)
            else:
                left += 1
            continue
        written += 1
        made.pictures.extend(facts)
        for condition, line in lines.items():
            rows[condition].append(line)
    return Made({c: b"".join(r) for c, r in rows.items()}, made.pictures, written, made.bad, left)


def _make_row(
    file: TsvFile, stem: str, recipe: Recipe, item: Item
) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    for place in item.shared:
        if place != item.picture:
            read_picture(file, place)
    clean = read_picture(file, item.picture)
    values = file.read(item.place).values
    at = file.columns.index("image")
    fields = [values.get(c, "") for c in file.columns]
    if item.picture != item.place:
        return dict.fromkeys(recipe.conditions, format_row(fields).encode()), []
    lines, facts = {}, []
    for condition in recipe.conditions:
        name, intensity, seed = plan_picture(recipe, stem, item.index, condition)
        try:
            poor = degrade(clean, name, severity=intensity, seed=seed, formulas=recipe.formulas)
        except ClearError as error:
            raise TsvError(file.path, item.place[0], f"{name} cannot be applied: {error}") from error
        encoded = encode(np.asarray(poor))
        facts.append(
            {
                "condition": condition,
                "index": item.index,
                "corruption": name,
                "intensity": intensity,
                "seed": seed,
                "sha256": hashlib.sha256(encoded).hexdigest(),
            }
        )
        fields[at] = base64.b64encode(encoded).decode("ascii")
        lines[condition] = format_row(fields).encode()
    return lines, facts


def encode(pixels: np.ndarray[Any, Any]) -> bytes:
    """JPEG bytes of an array (H, W, 3), uint8, RGB."""
    import cv2

    done, encoded = cv2.imencode(
        ".jpg", np.ascontiguousarray(pixels[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    )
    assert done
    return encoded.tobytes()
