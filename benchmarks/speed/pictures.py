"""What both sides of the comparison share: a picture's name, and a rate measured by several processes at once.

Imports numpy alone, so that it runs in the environment of any other library.
"""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 2.0
"""How long each process repeats one corruption, in its own processor time: what a free core would give."""


def load(path: Path) -> np.ndarray:
    """The pictures of the benchmark: (N, H, W, 3), uint8, RGB."""
    return np.load(path)["pictures"]


def rate(work: Callable[[Any], Any], path: Path, processes: int) -> float:
    """Pictures a second of all processes together, each on a core of its own, going round the pictures.

    Args:
        work: takes one picture; can be pickled.
        path: of the pictures.
        processes: how many run at once.
    """
    with mp.get_context("spawn").Pool(processes) as pool:
        return sum(pool.map(partial(_repeat, work, path), range(processes), chunksize=1))


def _repeat(work: Callable[[Any], Any], path: Path, number: int) -> float:
    import cv2

    cv2.setNumThreads(1)
    pictures = load(path)
    work(pictures[number % len(pictures)])  # imports and tables are no part of the rate
    done, began = 0, time.process_time()
    while not done or time.process_time() - began < SECONDS:
        work(pictures[(number + done) % len(pictures)])
        done += 1
    return done / (time.process_time() - began)
