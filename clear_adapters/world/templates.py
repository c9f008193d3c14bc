"""Templates of the kinds choice, open and reading; a template may find that a scene does not allow it."""

from __future__ import annotations

from typing import Final

import numpy as np

from clear_adapters.world.drafts import VALUES, Draft, Template, any_thing, attribute, lettered, some, where
from clear_adapters.world.scene import BACKGROUNDS, CELLS, Scene, pick
from clear_adapters.world.wording import FACT_BYTES, at, full, phrase, refer


def _attribute_choice(name: str) -> Template:
    """Return the template asking for one attribute with letters."""

    def build(scene: Scene, rng: np.random.Generator) -> Draft | None:
        found = attribute(scene, rng, name)
        if found is None:
            return None
        thing, stem, value, fact = found
        return lettered(rng, name, stem, value, some(rng, VALUES[name], 3, value), fact, (thing.cell,))

    return build


def _attribute_open(name: str) -> Template:
    """Return the template asking for one attribute in the reader's own words."""

    def build(scene: Scene, rng: np.random.Generator) -> Draft | None:
        found = attribute(scene, rng, name)
        if found is None:
            return None
        thing, stem, value, fact = found
        return Draft(name, stem, value, fact, (thing.cell,), chance=1 / len(VALUES[name]))

    return build


def _place_choice(scene: Scene, rng: np.random.Generator) -> Draft | None:
    found = where(scene, rng)
    if found is None:
        return None
    thing, stem, fact = found
    name = CELLS[thing.cell]
    return lettered(rng, "place", stem, name, some(rng, CELLS, 3, name), fact, (thing.cell,))


def _place_open(scene: Scene, rng: np.random.Generator) -> Draft | None:
    found = where(scene, rng)
    if found is None:
        return None
    thing, stem, fact = found
    return Draft("place", stem, CELLS[thing.cell], fact, (thing.cell,), chance=0.15)


_GROUND: Final = ("What is the background?", "What is behind the shapes?", "Which background is it?")


def _background_choice(scene: Scene, rng: np.random.Generator) -> Draft:
    wrong = some(rng, BACKGROUNDS, 3, scene.background)
    return lettered(
        rng,
        "background",
        pick(rng, _GROUND),
        scene.background,
        wrong,
        f"The background is {scene.background}.",
        (),
    )


def _background_open(scene: Scene, rng: np.random.Generator) -> Draft:
    fact = f"The background is {scene.background}."
    return Draft("background", pick(rng, _GROUND), scene.background, fact, chance=1 / len(BACKGROUNDS))


def _extreme(scene: Scene, rng: np.random.Generator) -> Draft | None:
    """Ask which thing stands furthest to one side, where one alone does."""
    axis, sign, stems = (
        ("column", 1, ("Which is furthest left?", "Which is leftmost?")),
        ("column", -1, ("Which is furthest right?", "Which is rightmost?")),
        ("row", 1, ("Which is highest?", "Which is uppermost?")),
        ("row", -1, ("Which is lowest?", "Which is lowermost?")),
    )[int(rng.integers(4))]
    order = sorted(scene.things, key=lambda thing: sign * getattr(thing, axis))
    if getattr(order[0], axis) == getattr(order[1], axis):
        return None
    names = {thing.cell: refer(rng, scene, thing, named=True) for thing in order}
    right = names[order[0].cell]
    wrong = [order[1 + int(index)] for index in rng.permutation(len(order) - 1)[:3]]
    if right is None or len({names[thing.cell] for thing in wrong} - {None}) < len(wrong):
        return None
    shown = sorted((order[0], *wrong), key=lambda thing: thing.cell)
    fact = "; ".join(f"{names[thing.cell]}: {CELLS[thing.cell]}" for thing in shown) + "."
    fact = fact[0].upper() + fact[1:]
    if len(fact) > FACT_BYTES:
        fact = f"The {right} is {at(order[0].cell)}."
    cells = tuple(thing.cell for thing in shown)
    return lettered(
        rng, "extreme", pick(rng, stems), right, [str(names[thing.cell]) for thing in wrong], fact, cells
    )


def _at_open(scene: Scene, rng: np.random.Generator) -> Draft:
    thing = any_thing(rng, scene)
    stem = pick(rng, ("What is {0}?", "What do you see {0}?", "What stands {0}?")).format(at(thing.cell))
    fact = f"{CELLS[thing.cell].capitalize()}: {full(thing)}."
    return Draft("at", stem, phrase(thing, ("color", "shape")), fact, (thing.cell,), chance=0.02)


def _describe(scene: Scene, rng: np.random.Generator) -> Draft | None:
    thing = any_thing(rng, scene)
    words = refer(rng, scene, thing, avoid=("color", "shape"))
    if words is None:
        return None
    stem = pick(rng, ("Describe the {0}.", "What is the {0} like?", "Color and kind of the {0}?")).format(
        words
    )
    fact = f"{CELLS[thing.cell].capitalize()}: {full(thing)}."
    return Draft("describe", stem, phrase(thing, ("color", "shape")), fact, (thing.cell,), chance=0.02)


def _look(scene: Scene, rng: np.random.Generator) -> Draft | None:
    """Ask for a thing's size and colour together."""
    thing = any_thing(rng, scene)
    words = refer(rng, scene, thing, avoid=("color", "size"))
    if words is None:
        return None
    stem = pick(rng, ("What size and color is the {0}?", "Size and color of the {0}?")).format(words)
    fact = f"The {words} is {thing.size} and {thing.color}."
    return Draft("look", stem, f"{thing.size} {thing.color}", fact, (thing.cell,), chance=1 / 16)


def _next(scene: Scene, rng: np.random.Generator) -> Draft | None:
    """Ask what stands in the cell beside a thing."""
    steps = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
    near = [
        (thing, other, side)
        for thing in scene.things
        for other in scene.things
        for side, step in steps.items()
        if (other.row - thing.row, other.column - thing.column) == step
    ]
    if not near:
        return None
    thing, other, side = near[int(rng.integers(len(near)))]
    words = refer(rng, scene, thing)
    if words is None:
        return None
    relation = side if side in ("above", "below") else f"{side} of"
    stem = pick(rng, ("What is just {0} the {1}?", "What stands just {0} the {1}?")).format(relation, words)
    fact = f"{words.capitalize()}: {CELLS[thing.cell]}; {CELLS[other.cell]}: {full(other)}."
    if len(fact) > FACT_BYTES:
        fact = f"{CELLS[other.cell].capitalize()}: {full(other)}."
    return Draft("next", stem, phrase(other, ("color", "shape")), fact, (thing.cell, other.cell), chance=0.02)


def _text(scene: Scene, rng: np.random.Generator) -> Draft | None:
    if scene.sign is None:
        return None
    stems = ["What does the sign say?", "Read the sign.", "What is written on the sign?"]
    if scene.sign.is_number:
        stems += ["What number is on the sign?", "Which number is on the sign?"]
    fact = f"The sign reads {scene.sign.text}."
    return Draft("text", pick(rng, stems), scene.sign.text, fact, scene.sign.cells, chance=0.02)


def _character(scene: Scene, rng: np.random.Generator) -> Draft | None:
    if scene.sign is None:
        return None
    which = pick(rng, ("first", "last"))
    stems = ("What is the {0} character on the sign?", "Which character is {0} on the sign?")
    answer = scene.sign.text[0 if which == "first" else -1]
    fact = f"The sign reads {scene.sign.text}."
    return Draft("character", pick(rng, stems).format(which), answer, fact, scene.sign.cells, chance=0.1)


CHOICE: Final[tuple[Template, ...]] = (
    *(_attribute_choice(name) for name in ("color", "shape", "fill", "size")),
    _place_choice,
    _background_choice,
    _extreme,
)
OPEN: Final[tuple[Template, ...]] = (
    *(_attribute_open(name) for name in ("color", "shape", "fill")),
    _place_open,
    _background_open,
    _at_open,
    _at_open,
    _describe,
    _look,
    _next,
)
READING: Final[tuple[Template, ...]] = (_text, _text, _character)
"""A template that stands twice is drawn twice as often."""
