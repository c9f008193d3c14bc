"""Scenes in words: a dense description, and shorter facts about parts and relations."""

from __future__ import annotations

from typing import Final

import numpy as np

from clear_adapters.errors import ClearValueError
from clear_adapters.world.drafts import VALUES, plural
from clear_adapters.world.scene import CELLS, Scene, check_seed, generator
from clear_adapters.world.wording import FACT_BYTES, at, full, phrase, placed, refer

_STREAM: Final = 4


def describe(scene: Scene) -> str:
    """Return the dense description: background, every thing by cell, the sign.

    For example `Brick wall. Top left: large red striped star. Center: small blue circle. Sign at bottom right: K7Q.`
    """
    parts = [scene.background.capitalize()]
    parts += [f"{CELLS[thing.cell].capitalize()}: {full(thing)}" for thing in scene.things]
    if scene.sign:
        parts.append(f"Sign at {scene.sign.place}: {scene.sign.text}")
    return ". ".join(parts) + "."


def facts(scene: Scene, seed: int, n: int) -> list[str]:
    """Return some true sentences about a scene, half of them on how two things stand to each other.

    Args:
        scene: The scene.
        seed: Which sentences.
        n: How many at most.

    Returns:
        Different sentences of at most 60 bytes.

    Raises:
        ClearValueError: The seed or `n` is negative.
    """
    if n < 0:
        raise ClearValueError(f"n is how many facts are made, at least 0, not {n}.")
    rng = generator(_STREAM, scene.grain, check_seed(seed))
    found: dict[str, None] = {}
    for _ in range(8 * n):
        if len(found) == n:
            break
        sentence = _relation(scene, rng) if rng.random() < 0.5 else _single(scene, rng)
        if sentence and len(sentence) <= FACT_BYTES:
            found[sentence] = None
    return list(found)


def _relation(scene: Scene, rng: np.random.Generator) -> str | None:
    """Return on which side of another thing a thing stands, or that they share a row or column."""
    first, second = (scene.things[int(index)] for index in rng.permutation(len(scene.things))[:2])
    words, other = refer(rng, scene, first), refer(rng, scene, second)
    if words is None or other is None:
        return None
    if rng.random() < 0.5:
        if first.column == second.column:
            return None
        return f"The {words} is {'left' if first.column < second.column else 'right'} of the {other}."
    if first.row == second.row:
        return None
    return f"The {words} is {'above' if first.row < second.row else 'below'} the {other}."


def _single(scene: Scene, rng: np.random.Generator) -> str | None:
    """Return a sentence on one thing, one group, the sign or the background."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    topic = int(rng.integers(6))
    if topic == 0:
        return f"{CELLS[thing.cell].capitalize()}: {full(thing)}."
    if topic == 1:
        words = refer(rng, scene, thing)
        return f"The {words} is {at(thing.cell)}." if words else None
    if topic == 2:
        name = ("size", "color", "fill", "shape")[int(rng.integers(4))]
        words = refer(rng, scene, thing, avoid=(name,))
        article = "a " if name == "shape" else ""
        return f"The {words} is {article}{getattr(thing, name)}." if words else None
    if topic == 3:
        name = ("size", "color", "fill", "shape")[int(rng.integers(4))]
        value = VALUES[name][int(rng.integers(len(VALUES[name])))]
        cells = [other.cell for other in scene.things if getattr(other, name) == value]
        return placed(cells, plural(name, value))
    if topic == 4 and scene.sign:
        sign = scene.sign
        return (
            f"The sign reads {sign.text}.",
            f"The sign is at {sign.place}.",
            f"The sign starts with {sign.text[0]}.",
            f"The sign ends with {sign.text[-1]}.",
        )[int(rng.integers(4))]
    if topic == 5:
        return f"The background is {scene.background}."
    return f"A {phrase(thing, ('color', 'shape'))} is {at(thing.cell)}."
