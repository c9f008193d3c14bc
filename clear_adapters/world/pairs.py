"""Pairs of scenes that differ in one detail: a colour, shape, pattern, size, place, number, or character of the sign."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from clear_adapters.world.drafts import VALUES, Draft, some
from clear_adapters.world.scene import (
    CELLS,
    DIGITS,
    FEWEST_THINGS,
    LETTERS,
    MOST_THINGS,
    SHAPES,
    Scene,
    Thing,
    belongs,
    pick,
    place,
    split_of,
)
from clear_adapters.world.wording import at, placed, refer


@dataclass(frozen=True)
class Twin:
    """The second scene of a pair, and the questions to the first and to the second."""

    scene: Scene
    drafts: tuple[Draft, Draft]


Maker = Callable[[Scene, np.random.Generator], Twin | None]


def with_things(scene: Scene, things: list[Thing]) -> Scene:
    """Return a scene with other things, in the order of their cells."""
    return replace(scene, things=tuple(sorted(things, key=lambda thing: thing.cell)))


def changed(scene: Scene, old: Thing, new: Thing) -> Scene:
    """Return a scene in which one thing is replaced by another."""
    return with_things(scene, [new if thing == old else thing for thing in scene.things])


def free_cells(scene: Scene) -> list[int]:
    """Return the cells without thing or sign."""
    taken = {thing.cell for thing in scene.things} | set(scene.sign.cells if scene.sign else ())
    return [cell for cell in range(len(CELLS)) if cell not in taken]


def is_possible(scene: Scene) -> bool:
    """Return whether a changed scene might have been drawn in some split: as many things as there may be, no two alike."""
    looks = [thing.looks for thing in scene.things]
    return len(set(looks)) == len(looks) and FEWEST_THINGS <= len(looks) <= MOST_THINGS


def is_sound(scene: Scene) -> bool:
    """Return whether a changed scene might have been drawn in its own split."""
    return is_possible(scene) and belongs(scene, scene.split)


def _twin(
    scene: Scene,
    other: Scene,
    rng: np.random.Generator,
    template: str,
    stem: str,
    answers: tuple[str, str],
    facts: tuple[str, str],
    cells: tuple[tuple[int, ...], tuple[int, ...]],
) -> Twin | None:
    """Return the pair, its two options in random order, or None where no such scene might have been drawn."""
    if not is_possible(other):
        return None
    options = answers if rng.random() < 0.5 else (answers[1], answers[0])
    text = stem.format(*options)
    drafts = [
        Draft(template, text, answer, fact, spot, options, 0.5)
        for answer, fact, spot in zip(answers, facts, cells, strict=True)
    ]
    return Twin(other, (drafts[0], drafts[1]))


def _attribute(name: str, stem: str, fact: str) -> Maker:
    """Return the maker of pairs in which one attribute of one thing differs."""

    def make(scene: Scene, rng: np.random.Generator) -> Twin | None:
        thing = scene.things[int(rng.integers(len(scene.things)))]
        words = refer(rng, scene, thing, avoid=(name,))
        if words is None:
            return None
        old, new = getattr(thing, name), some(rng, VALUES[name], 1, getattr(thing, name))[0]
        other = changed(scene, thing, altered(rng, thing, name, new))
        facts = (fact.format(words, old), fact.format(words, new))
        spot = (thing.cell,)
        return _twin(scene, other, rng, name, stem.replace("{words}", words), (old, new), facts, (spot, spot))

    return make


def altered(rng: np.random.Generator, thing: Thing, name: str, value: str) -> Thing:
    """Return a thing with another value of one attribute; everything else stays, but for its width where its size changes."""
    looks = {"size": thing.size, "color": thing.color, "fill": thing.fill, "shape": thing.shape, name: value}
    fresh = place(rng, (looks["size"], looks["color"], looks["fill"], looks["shape"]), thing.cell)
    if name != "size":
        return replace(thing, color=fresh.color, fill=fresh.fill, shape=fresh.shape)
    slack = max(3.0, 40.0 - 0.55 * fresh.width)
    return replace(
        thing,
        size=value,
        width=fresh.width,
        dx=float(np.clip(thing.dx, -slack, slack)),
        dy=float(np.clip(thing.dy, -slack, slack)),
    )


def _moved(scene: Scene, rng: np.random.Generator) -> Twin | None:
    thing = scene.things[int(rng.integers(len(scene.things)))]
    words, free = refer(rng, scene, thing), free_cells(scene)
    if words is None or not free:
        return None
    cell = free[int(rng.integers(len(free)))]
    other = changed(scene, thing, replace(thing, cell=cell))
    facts = (f"The {words} is {at(thing.cell)}.", f"The {words} is {at(cell)}.")
    stem = f"Is the {words} at the {{0}} or the {{1}}?"
    return _twin(
        scene, other, rng, "place", stem, (CELLS[thing.cell], CELLS[cell]), facts, ((thing.cell,), (cell,))
    )


def _number(scene: Scene, rng: np.random.Generator) -> Twin | None:
    """One thing more or one less, each half of the time, so that neither number is likelier."""
    things = list(scene.things)
    if rng.random() < 0.5:
        del things[int(rng.integers(len(things)))]
    else:
        free = free_cells(scene)
        if not free:
            return None
        looks = (
            pick(rng, VALUES["size"]),
            pick(rng, VALUES["color"]),
            pick(rng, VALUES["fill"]),
            pick(rng, SHAPES),
        )
        things.append(place(rng, looks, free[int(rng.integers(len(free)))]))
    other = with_things(scene, things)
    cells = tuple(tuple(thing.cell for thing in each.things) for each in (scene, other))
    facts = (placed(cells[0], "shapes"), placed(cells[1], "shapes"))
    answers = (str(len(scene.things)), str(len(things)))
    return _twin(
        scene, other, rng, "count", "Are there {0} or {1} shapes?", answers, facts, (cells[0], cells[1])
    )


def _character(scene: Scene, rng: np.random.Generator) -> Twin | None:
    """One character of the sign becomes another of its kind, digit or letter."""
    if scene.sign is None:
        return None
    old = scene.sign.text
    texts = [
        old[:index] + character + old[index + 1 :]
        for index, own in enumerate(old)
        for character in (DIGITS if own.isdigit() else LETTERS)
        if character != own
    ]
    texts = [text for text in texts if split_of(text) == scene.split]
    if not texts:
        return None
    new = texts[int(rng.integers(len(texts)))]
    other = replace(scene, sign=replace(scene.sign, text=new))
    facts = (f"The sign reads {old}.", f"The sign reads {new}.")
    spot = scene.sign.cells
    return _twin(scene, other, rng, "text", "Does the sign say {0} or {1}?", (old, new), facts, (spot, spot))


PAIR_TEMPLATES: Final[tuple[Maker, ...]] = (
    _attribute("color", "Is the {words} {0} or {1}?", "The {0} is {1}."),
    _attribute("shape", "Is the {words} a {0} or a {1}?", "The {0} is a {1}."),
    _attribute("fill", "Is the {words} {0} or {1}?", "The {0} is {1}."),
    _attribute("size", "Is the {words} {0} or {1}?", "The {0} is {1}."),
    _moved,
    _number,
    _character,
)
