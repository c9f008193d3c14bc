"""The held-out set: questions over scenes that no training saw, each with one picture clean and at three severities.

Question i depends on the seed and on i alone, so a smaller set is the beginning of a larger one.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing as mp
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clear_adapters.degradations import degrade
from clear_adapters.mmd_bench.miniature import SIDE, Item, draw_item
from clear_adapters.world import render, sample_scene

VERSION = 1
"""Raised when the same seed no longer gives the same questions or pictures."""
CONDITIONS = ("clean", "low", "mid", "high")


@dataclass(frozen=True)
class HeldOut:
    """The set, with the pictures of some conditions.

    Attributes:
        items: the questions.
        pictures: by condition, (N, SIDE, SIDE, 3) uint8.
        seed: what it was drawn with.
    """

    items: list[Item]
    pictures: dict[str, np.ndarray]
    seed: int

    def images(self, condition: str) -> list[Image.Image]:
        """The pictures of one condition."""
        return [Image.fromarray(a) for a in self.pictures[condition]]

    def facts(self) -> dict[str, Any]:
        """What a result file records of it."""
        listed = json.dumps([asdict(i) for i in self.items], sort_keys=True).encode()
        return {
            "n": len(self.items),
            "seed": self.seed,
            "version": VERSION,
            "side": SIDE,
            "formulas": "legacy",
            "weights": "benchmark",
            "digest": hashlib.sha256(listed).hexdigest()[:16],
            "kinds": [i.kind for i in self.items],
            "degradations": [i.degradation for i in self.items],
        }


def build(
    n: int,
    *,
    seed: int = 0,
    conditions: Sequence[str] = CONDITIONS,
    cache: Path | None = None,
    workers: int = 0,
) -> HeldOut:
    """Makes the set, on all cores, or reads its pictures from an earlier run.

    Args:
        n: how many questions.
        seed: of the set.
        conditions: whose pictures are wanted.
        cache: folder for the pictures; None makes them anew.
        workers: processes; 0 is one a core.
    """
    items = [item for item, _ in map_parallel(partial(draw_item, seed), range(n), workers)]
    pictures: dict[str, np.ndarray] = {}
    missing = []
    for condition in conditions:
        path = _path(cache, seed, n, condition)
        if path is not None and path.is_file():
            pictures[condition] = np.load(path, mmap_mode="r")
        else:
            missing.append(condition)
    if missing:
        made = map_parallel(partial(draw_pictures, seed, tuple(missing)), range(n), workers)
        for place, condition in enumerate(missing):
            pictures[condition] = np.stack([m[place] for m in made])
            path = _path(cache, seed, n, condition)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                half = path.with_suffix(".half.npy")
                np.save(half, pictures[condition])
                half.replace(path)
    return HeldOut(items, pictures, seed)


def _path(cache: Path | None, seed: int, n: int, condition: str) -> Path | None:
    return None if cache is None else cache / f"heldout-v{VERSION}-s{seed}-n{n}-{condition}.npy"


def draw_pictures(seed: int, conditions: tuple[str, ...], index: int) -> list[np.ndarray]:
    """The pictures of question `index`: one scene, one corruption, several severities."""
    item, scene = draw_item(seed, index)
    clean = render(scene, SIDE)
    return [np.asarray(degraded(clean, item, c)) for c in conditions]


def degraded(clean: Image.Image, item: Item, condition: str) -> Image.Image:
    """The picture of one condition."""
    return (
        clean
        if condition == "clean"
        else degrade(clean, item.degradation, severity=condition, seed=item.seed)
    )  # type: ignore[arg-type]


def training_statistics(count: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, averaged over clean training scenes."""
    found = np.array([_moments(index) for index in range(count)])
    return found[:, 0].mean(0), found[:, 1].mean(0)


def _moments(index: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.asarray(render(sample_scene(index, "train"), SIDE), np.float64)
    return pixels.mean((0, 1)), pixels.std((0, 1))


def map_parallel(function: Callable[[Any], Any], values: Iterable[Any], workers: int = 0) -> list[Any]:
    """`map` over all cores; short lists stay in this process."""
    values = list(values)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, max(1, len(values) // 16))
    if workers == 1:
        return [function(v) for v in values]
    with mp.get_context("spawn").Pool(workers) as pool:  # forking would copy a GPU's state
        return pool.map(function, values, chunksize=max(1, len(values) // (workers * 4)))
