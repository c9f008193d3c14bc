"""What question templates are made of: the draft of a question, attributes, places and lettered options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from clear_adapters.world.scene import COLORS, FILLS, SHAPES, SIZES, Scene, Thing, pick
from clear_adapters.world.wording import LETTERED, at, refer

VALUES: Final = {"size": SIZES, "color": COLORS, "fill": FILLS, "shape": SHAPES}


@dataclass(frozen=True)
class Draft:
    """A question before it has a kind: see `Question` for the fields."""

    template: str
    text: str
    answer: str
    fact: str
    cells: tuple[int, ...] = ()
    options: tuple[str, ...] = ()
    chance: float = 0.0


Template = Callable[[Scene, np.random.Generator], Draft | None]


def plural(name: str, value: str) -> str:
    """Return what things that share an attribute are called: `red shapes`, `crosses`; `shapes` for the attribute `all`."""
    if name == "shape":
        return f"{value}es" if value.endswith("s") else f"{value}s"
    return f"{value} shapes" if value else "shapes"


def some(rng: np.random.Generator, values: Sequence[str], count: int, without: str) -> list[str]:
    """Return so many different values, none of them the one named."""
    rest = [value for value in values if value != without]
    return [rest[int(index)] for index in rng.permutation(len(rest))[:count]]


def lettered(
    rng: np.random.Generator,
    template: str,
    stem: str,
    right: str,
    wrong: Sequence[str],
    fact: str,
    cells: tuple[int, ...],
) -> Draft:
    """Return a multiple-choice question whose options stand in random order."""
    options = [right, *wrong]
    options = [options[int(index)] for index in rng.permutation(len(options))]
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERED, options, strict=False)]
    letter = LETTERED[options.index(right)]
    return Draft(template, "\n".join([stem, *lines]), letter, fact, cells, tuple(options), 1 / len(options))


def any_thing(rng: np.random.Generator, scene: Scene) -> Thing:
    """Return one of a scene's things."""
    return scene.things[int(rng.integers(len(scene.things)))]


def attribute(scene: Scene, rng: np.random.Generator, name: str) -> tuple[Thing, str, str, str] | None:
    """Return a thing, a stem asking for one of its attributes, the value and the fact."""
    thing = any_thing(rng, scene)
    words = refer(rng, scene, thing, avoid=(name,))
    if words is None:
        return None
    value = getattr(thing, name)
    stems = {
        "color": ("What color is the {0}?", "Which color is the {0}?", "What is the color of the {0}?"),
        "shape": ("What is the {0}?", "Name the {0}.", "What kind of shape is the {0}?"),
        "fill": (
            "What pattern is on the {0}?",
            "Is the {0} plain, striped or dotted?",
            "How is the {0} filled?",
        ),
        "size": ("What size is the {0}?", "How big is the {0}?", "Is the {0} small or large?"),
    }
    fact = f"The {words} is a {value}." if name == "shape" else f"The {words} is {value}."
    return thing, pick(rng, stems[name]).format(words), value, fact


def where(scene: Scene, rng: np.random.Generator) -> tuple[Thing, str, str] | None:
    """Return a thing, a stem asking for its place, and the fact."""
    thing = any_thing(rng, scene)
    words = refer(rng, scene, thing)
    if words is None:
        return None
    stem = pick(rng, ("Where is the {0}?", "In which part is the {0}?", "Where do you see the {0}?")).format(
        words
    )
    return thing, stem, f"The {words} is {at(thing.cell)}."
