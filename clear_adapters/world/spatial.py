"""Templates of the kind spatial: counting, and how two things stand to each other."""

from __future__ import annotations

from typing import Final

import numpy as np

from clear_adapters.world.drafts import VALUES, Draft, Template, plural
from clear_adapters.world.scene import CELLS, Scene, Thing, pick
from clear_adapters.world.wording import ANSWER_BYTES, FACT_BYTES, placed, refer

SIDES: Final = {"left": "right", "right": "left", "above": "below", "below": "above"}
COUNT_CHANCE: Final = 0.35
"""Share of the most frequent number among the answers to counting questions, at most; a test measures it."""

_COUNT_WEIGHTS: Final = (0.7, 0.8, 1.4, 2.5, 3.5, 3.5)
"""How readily each number is asked for where a scene offers several: large ones are offered seldom."""


def _count(scene: Scene, rng: np.random.Generator) -> Draft:
    """Ask for a number of things; the number is drawn first among those that the scene offers, so that none is the usual one."""
    name = pick(rng, ("color", "shape", "fill", "size", "all"))
    groups: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    values: tuple[str, ...] = ("",) if name == "all" else VALUES[name]
    for value in values:
        cells = tuple(thing.cell for thing in scene.things if name == "all" or getattr(thing, name) == value)
        groups.setdefault(len(cells), []).append((value, cells))
    numbers = sorted(groups)
    weights = np.cumsum([_COUNT_WEIGHTS[number] for number in numbers])
    number = numbers[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
    value, cells = groups[number][int(rng.integers(len(groups[number])))]
    label = plural(name, value)
    stem = pick(rng, ("How many {0} are there?", "Count the {0}.", "How many {0} do you see?")).format(label)
    return Draft("count", stem, str(number), placed(cells, label), cells, chance=COUNT_CHANCE)


def _two(
    scene: Scene, rng: np.random.Generator, named: bool = False
) -> tuple[Thing, Thing, str, str, str, str, str] | None:
    """Return two things, their words, the side of the second on which the first is, its word, and the fact."""
    first, second = (scene.things[int(index)] for index in rng.permutation(len(scene.things))[:2])
    across = bool(rng.random() < 0.5)
    one_at, other_at = (first.column, second.column) if across else (first.row, second.row)
    words, other = refer(rng, scene, first, named=named), refer(rng, scene, second, named=named)
    if one_at == other_at or words is None or other is None:
        return None
    side = (
        ("left" if one_at < other_at else "right") if across else ("above" if one_at < other_at else "below")
    )
    fact = f"{words}: {CELLS[first.cell]}; {other}: {CELLS[second.cell]}."
    fact = fact[0].upper() + fact[1:]
    if len(fact) > FACT_BYTES:
        return None
    return first, second, words, other, side, f"{side} of" if across else side, fact


def _side(scene: Scene, rng: np.random.Generator) -> Draft | None:
    found = _two(scene, rng)
    if found is None:
        return None
    first, second, words, other, side, _, fact = found
    sides = ("left", "right") if side in ("left", "right") else ("above", "below")
    of = " of" if sides[0] == "left" else ""
    if rng.random() < 0.5:
        sides = (sides[1], sides[0])
    stem = f"Is the {words} {sides[0]} or {sides[1]}{of} the {other}?"
    return Draft("side", stem, side, fact, (first.cell, second.cell), sides, 0.5)


def _yes_no(scene: Scene, rng: np.random.Generator) -> Draft | None:
    found = _two(scene, rng)
    if found is None:
        return None
    first, second, words, other, side, relation, fact = found
    true = bool(rng.random() < 0.5)
    asked = relation if true else relation.replace(side, SIDES[side])
    answer = "yes" if true else "no"
    return Draft(
        "yes_no",
        f"Is the {words} {asked} the {other}?",
        answer,
        fact,
        (first.cell, second.cell),
        ("yes", "no"),
        0.5,
    )


def _which(scene: Scene, rng: np.random.Generator) -> Draft | None:
    found = _two(scene, rng, named=True)
    if found is None:
        return None
    first, second, words, other, side, _, fact = found
    true = bool(rng.random() < 0.5)
    asked = {"left": "further left", "right": "further right", "above": "higher", "below": "lower"}[
        side if true else SIDES[side]
    ]
    answer = words if true else other
    if len(answer) > ANSWER_BYTES:
        return None
    options = (words, other) if rng.random() < 0.5 else (other, words)
    stem = f"Which is {asked}, the {options[0]} or the {options[1]}?"
    return Draft("which", stem, answer, fact, (first.cell, second.cell), options, 0.5)


SPATIAL: Final[tuple[Template, ...]] = (_count, _count, _count, _side, _side, _yes_no, _which)
"""A template that stands twice is drawn twice as often."""
