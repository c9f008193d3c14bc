"""Words for things, places and groups: the one vocabulary of questions, captions and edits."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations
from typing import Final

import numpy as np

from clear_adapters.world.scene import CELLS, Scene, Thing

ATTRIBUTES: Final = ("size", "color", "fill", "shape")
"""What things differ in, in the order in which words stand in a phrase."""
LETTERED: Final = "ABCD"
FACT_BYTES: Final = 60
"""The most bytes that one fact may have."""
ANSWER_BYTES: Final = 20
"""The most bytes that one answer may have."""


def at(cell: int) -> str:
    """Return a cell as a place: `at the top left`."""
    return f"{'in' if CELLS[cell] == 'center' else 'at'} the {CELLS[cell]}"


def phrase(thing: Thing, attributes: Collection[str] = ATTRIBUTES) -> str:
    """Return a thing named by some of its attributes: `striped star`, `large red shape`."""
    words = [getattr(thing, name) for name in ATTRIBUTES if name in attributes]
    return " ".join(words if "shape" in attributes else [*words, "shape"])


def full(thing: Thing) -> str:
    """Return everything about a thing's looks; that it is plain is left out: `large red star`."""
    return phrase(thing, [name for name in ATTRIBUTES if name != "fill" or thing.fill != "plain"])


def identifying(
    scene: Scene, thing: Thing, avoid: Collection[str] = (), must: Collection[str] = ()
) -> list[tuple[str, ...]]:
    """Return the sets of attributes that single a thing out, none of which could do with fewer.

    Args:
        scene: The scene around the thing.
        thing: One of its things.
        avoid: Attributes that may not be used.
        must: Attributes that each set has to have, needed or not.

    Returns:
        Sets in order of their length; empty where the thing cannot be singled out.
    """
    others = [other for other in scene.things if other != thing]
    found: list[tuple[str, ...]] = []
    usable = [name for name in ATTRIBUTES if name not in avoid]
    for length in range(1, len(usable) + 1):
        for names in combinations(usable, length):
            if not set(must) <= set(names) or any(set(shorter) <= set(names) for shorter in found):
                continue
            alike = (all(getattr(other, name) == getattr(thing, name) for name in names) for other in others)
            if not any(alike):
                found.append(names)
    return found


def refer(
    rng: np.random.Generator, scene: Scene, thing: Thing, avoid: Collection[str] = (), named: bool = False
) -> str | None:
    """Return words that single a thing out; they name its shape where they may, four times in five.

    Args:
        rng: Where randomness comes from.
        scene: The scene around the thing.
        thing: One of its things.
        avoid: Attributes that may not be used.
        named: Whether only words with the shape will do.

    Returns:
        Words without article, or None where the thing cannot be singled out so.
    """
    by_shape = "shape" not in avoid and (named or rng.random() < 0.8)
    sets = identifying(scene, thing, avoid, ("shape",) if by_shape else ())
    if not sets:
        return None
    short = [names for names in sets if len(names) == len(sets[0])]
    return phrase(thing, short[int(rng.integers(len(short)))])


def placed(cells: Collection[int], label: str) -> str:
    """Return where the things of a group are, as one fact such as `Red shapes: top left, center.`.

    Args:
        cells: Cells of the group.
        label: What the group is called, plural.

    Returns:
        The cells listed, or counted by row where the list is too long for a fact.
    """
    if not cells:
        return f"There are no {label}."
    listed = f"{label.capitalize()}: {', '.join(CELLS[cell] for cell in sorted(cells))}."
    if len(listed) <= FACT_BYTES:
        return listed
    rows = [sum(cell // 3 == row for cell in cells) for row in range(3)]
    return f"{label.capitalize()}: top {rows[0]}, middle {rows[1]}, bottom {rows[2]}."
