"""Scenes of the miniature world: what is where, drawn at random from a seed, in two splits that share nothing.

Randomness. Every generator of this package is `generator(stream, *numbers)`: a numpy PCG64 seeded with the list
`[stream, *numbers]`, where the stream is a small constant of the module's own. A scene is made of the numbers (split, seed) alone.

Splits. Whether a text string or a combination of things belongs to the held-out split is decided by a hash of it, not by the seed,
so the two splits are disjoint however many scenes are drawn: one text and one combination in `HELDOUT_EVERY` is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

from clear_adapters.errors import ClearValueError, unknown_name

Split = Literal["train", "heldout"]

SPLITS: Final[tuple[Split, ...]] = get_args(Split)
COLORS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring", "moon", "house")
SIZES: Final = ("small", "large")
FILLS: Final = ("plain", "striped", "dotted")
BACKGROUNDS: Final = ("brick wall", "grass", "sand", "sky", "wood", "night")
CELLS: Final = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
"""Names of the cells of the 3 x 3 grid, row by row."""
PLATES: Final = ("white", "yellow", "blue", "green", "black", "red")
FONTS: Final = ("sans", "slab", "type", "hand")
LETTERS: Final = "ACEFHJKLMNPRTUWXY"
DIGITS: Final = "23456789"
"""Characters of signs: none that can be taken for another (no I 1, O 0 Q D, S 5 as letter, B, Z, G, V)."""
HELDOUT_EVERY: Final = 8
FEWEST_THINGS: Final = 2
MOST_THINGS: Final = 5
CANVAS: Final = 256
"""Side of the square that positions and widths are measured in."""
PITCH: Final = CANVAS / 3

_STREAM: Final = 1


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    `cell` is an index into `CELLS`; `dx` and `dy` move it off the cell's centre and `width` is the side of its box, in units of
    a canvas of `CANVAS`; `angle` tilts it and `weave` turns its stripes, in degrees.
    """

    color: str
    shape: str
    size: str
    fill: str
    cell: int
    dx: float = 0.0
    dy: float = 0.0
    width: float = 50.0
    angle: float = 0.0
    weave: float = 45.0

    @property
    def row(self) -> int:
        """Row of the grid, 0 at the top."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """Column of the grid, 0 at the left."""
        return self.cell % 3

    @property
    def looks(self) -> tuple[str, str, str, str]:
        """Size, colour, fill and shape: what tells it from other things wherever it is."""
        return self.size, self.color, self.fill, self.shape


@dataclass(frozen=True)
class Sign:
    """A plate with text that takes one cell or two cells side by side (`cells`: indices into `CELLS`)."""

    text: str
    cells: tuple[int, ...]
    plate: str = "white"
    font: str = "sans"
    height: float = 34.0
    dx: float = 0.0
    dy: float = 0.0
    angle: float = 0.0

    @property
    def place(self) -> str:
        """Name of where it is: that of its cell, or of the two cells' outer one."""
        return CELLS[self.cells[0] if self.cells[0] % 3 == 0 else self.cells[-1]]

    @property
    def is_number(self) -> bool:
        """Whether every character is a digit."""
        return self.text.isdigit()


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows, and from which questions and captions are made.

    `things` are ordered by cell. `gain`, `warmth` and `light_angle` (degrees) are the light; `grain` seeds the texture, is even in
    training scenes and odd in held-out ones.
    """

    things: tuple[Thing, ...]
    background: str
    sign: Sign | None = None
    gain: float = 1.0
    warmth: float = 0.0
    light_angle: float = 0.0
    grain: int = 0
    split: Split = "train"

    @property
    def signature(self) -> str:
        """The sorted combination of things: what the split is decided by, beside the sign's text."""
        return combination(self.things)

    def at(self, cell: int) -> Thing | None:
        """Return the thing in a cell, or None where there is none."""
        return next((thing for thing in self.things if thing.cell == cell), None)


def generator(stream: int, *numbers: int) -> np.random.Generator:
    """Return the random generator of one stream of this package for the given numbers, all of them non-negative."""
    return np.random.Generator(np.random.PCG64([stream, *(int(number) for number in numbers)]))


def pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    """Return one of the values, each equally likely."""
    return values[int(rng.integers(len(values)))]


def combination(things: tuple[Thing, ...]) -> str:
    """Return the sorted looks of things as one string, wherever the things are."""
    return "; ".join(sorted(" ".join(thing.looks) for thing in things))


def split_of(key: str) -> Split:
    """Return the split that a sign's text or a combination of things belongs to, by a stable hash of it.

    A cryptographic hash: with a checksum, which is linear, the last character of a held-out text would follow from the others
    by a rule that can be learnt.
    """
    return (
        "heldout"
        if hashlib.blake2b(key.encode(), digest_size=4).digest()[0] % HELDOUT_EVERY == 0
        else "train"
    )


def belongs(scene: Scene, split: Split) -> bool:
    """Return whether both the things and the sign's text of a scene are of a split."""
    return split_of(scene.signature) == split and (scene.sign is None or split_of(scene.sign.text) == split)


def check_split(split: str) -> Split:
    """Return the split, or raise `UnknownNameError`."""
    for known in SPLITS:
        if split == known:
            return known
    raise unknown_name("split of the miniature world", split, SPLITS)


def check_seed(seed: int) -> int:
    """Return the seed, or raise `ClearValueError` where it is negative or no whole number."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ClearValueError(f"A seed of the miniature world is a whole number of at least 0, not {seed!r}.")
    return int(seed)


def sample_text(rng: np.random.Generator, split: Split, length: int | None = None) -> str:
    """Draw a sign's text of a split: a number (40 %; 15 % of two characters, as there are few) or a code.

    Args:
        rng: Where randomness comes from.
        split: The split that the text must belong to.
        length: Number of characters; drawn from 2 to 4 if None.

    Returns:
        The text. A code holds at least one letter.
    """
    wanted = length or 2 + int(rng.choice(3, p=(0.3, 0.4, 0.3)))
    number = bool(rng.random() < (0.4 if wanted > 2 else 0.15))
    while True:
        alphabet = DIGITS if number else LETTERS + DIGITS
        text = "".join(pick(rng, alphabet) for _ in range(wanted))
        if split_of(text) == split and (number or not text.isdigit()):
            return text


def place(rng: np.random.Generator, looks: tuple[str, str, str, str], cell: int) -> Thing:
    """Put a thing of the given size, colour, fill and shape into a cell, with its jitter, width and tilt drawn at random."""
    size, color, fill, shape = looks
    width = float(rng.uniform(69, 72) if size == "large" else rng.uniform(46, 48))
    slack = max(3.0, 40.0 - 0.55 * width)
    dx, dy, tilt = rng.uniform(-1, 1, 3)
    weave = float((0, 45, 90, 135)[int(rng.integers(4))])
    return Thing(
        color, shape, size, fill, cell, float(dx * slack), float(dy * slack), width, float(tilt * 6), weave
    )


def _sample_looks(rng: np.random.Generator, count: int) -> list[tuple[str, str, str, str]]:
    """Draw the looks of some things, no two the same; half of the scenes repeat colours, half repeat shapes."""
    colors = tuple(rng.permutation(COLORS)[: 2 if rng.random() < 0.5 else len(COLORS)].tolist())
    shapes = tuple(rng.permutation(SHAPES)[: 2 if rng.random() < 0.4 else len(SHAPES)].tolist())
    looks: list[tuple[str, str, str, str]] = []
    while len(looks) < count:
        new = (pick(rng, SIZES), pick(rng, colors), pick(rng, FILLS), pick(rng, shapes))
        if new not in looks:
            looks.append(new)
    return looks


def sample_sign(rng: np.random.Generator, text: str, free: list[int]) -> Sign | None:
    """Put a sign with some text into free cells: one cell for two characters, or two cells side by side.

    Args:
        rng: Where randomness comes from.
        text: What the sign says.
        free: Indices of the cells without a thing.

    Returns:
        The sign, or None where the free cells do not allow it.
    """
    pairs = [(cell, cell + 1) for cell in free if cell % 3 < 2 and cell + 1 in free]
    spots: list[tuple[int, ...]] = [*pairs]
    if len(text) == 2 and (not pairs or rng.random() < 0.6):
        spots = [(cell,) for cell in free]
    if not spots:
        return None
    cells = spots[int(rng.integers(len(spots)))]
    dx, dy, tilt = rng.uniform(-1, 1, 3)
    roomy = len(cells) == 2
    return Sign(
        text,
        cells,
        plate=pick(rng, PLATES),
        font=pick(rng, FONTS),
        height=float(rng.uniform(32, 40) if roomy else rng.uniform(30, 36)),
        dx=float(dx * (8 if roomy else 2)),
        dy=float(dy * 7),
        angle=float(tilt * 3),
    )


def sample_scene(seed: int, split: Split) -> Scene:
    """Draw a scene.

    Args:
        seed: A whole number of at least 0; the same seed and split give the same scene on any machine.
        split: `"train"` or `"heldout"`.

    Returns:
        A scene of two to five things, in about 70 % with a sign.

    Raises:
        ClearValueError: The seed is negative.
        UnknownNameError: There is no such split.
    """
    split = check_split(split)
    rng = generator(_STREAM, SPLITS.index(split), check_seed(seed))
    text = sample_text(rng, split) if rng.random() < 0.7 else None
    count = int(rng.integers(FEWEST_THINGS, MOST_THINGS + 1))
    sign = sample_sign(rng, text, list(range(len(CELLS)))) if text else None
    taken = sign.cells if sign else ()
    cells = [int(cell) for cell in rng.permutation(len(CELLS)) if cell not in taken][:count]
    while True:
        things = tuple(
            place(rng, look, cell)
            for look, cell in zip(_sample_looks(rng, count), sorted(cells), strict=True)
        )
        if split_of(combination(things)) == split:
            break
    return Scene(
        things,
        pick(rng, BACKGROUNDS),
        sign,
        gain=float(rng.uniform(0.85, 1.08)),
        warmth=float(rng.uniform(-0.05, 0.05)),
        light_angle=float(rng.uniform(0, 360)),
        grain=2 * int(rng.integers(2**30)) + SPLITS.index(split),
        split=split,
    )
