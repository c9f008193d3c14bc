"""Pictures that are one or nearly one: resized, encoded again, brightened a little. None of them may stand in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

SIDE = 32
KEPT = 8


def content_hash(image: Image.Image) -> str:
    """A hash of size and pixels.

    Args:
        image: RGB.
    """
    return hashlib.sha256(f"{image.width} x {image.height} ".encode() + image.tobytes()).hexdigest()


def perceptual_hash(image: Image.Image) -> int:
    """63 bits that hardly change when a picture is resized, encoded again or brightened.

    The signs, against their median, of the lowest 8 x 8 coefficients but the first of the cosine transform of the picture
    in grey at 32 x 32 pixels (the "pHash" of Zauner 2010, "Implementation and benchmarking of perceptual image hash
    functions").

    Args:
        image: RGB.
    """
    import cv2

    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    low = cv2.dct(grey)[:KEPT, :KEPT].ravel()[1:]
    bits = (low > np.median(low)).astype(np.uint8)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(hashes: Sequence[int], near: int) -> Iterable[tuple[int, int]]:
    """Pairs of places whose hashes differ in at most `near` bits; every pair is compared."""
    array = np.asarray(hashes, dtype=np.uint64)
    for place in range(len(array) - 1):
        distance = np.bitwise_count(array[place + 1 :] ^ array[place])
        for other in np.flatnonzero(distance <= near):
            yield place, place + 1 + int(other)


class Clusters:
    """Things that belong together, whether directly or through others."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, place: int) -> int:
        """The smallest place of the cluster."""
        while self._parent[place] != place:
            self._parent[place] = self._parent[self._parent[place]]
            place = self._parent[place]
        return place

    def join(self, a: int, b: int) -> None:
        """Makes one cluster of two."""
        a, b = sorted((self.root(a), self.root(b)))
        self._parent[b] = a
