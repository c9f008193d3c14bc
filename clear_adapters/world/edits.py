"""Edits of scenes: an instruction, and the scene before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from clear_adapters.errors import ClearError
from clear_adapters.world.drafts import VALUES, some
from clear_adapters.world.pairs import altered, changed, free_cells, is_sound, with_things
from clear_adapters.world.scene import (
    BACKGROUNDS,
    CELLS,
    Scene,
    Thing,
    check_seed,
    generator,
    pick,
    place,
    sample_text,
)
from clear_adapters.world.wording import at, full, refer

EDITS: Final = (
    "recolor",
    "reshape",
    "refill",
    "resize",
    "remove",
    "add",
    "move",
    "swap",
    "text",
    "background",
)

_STREAM: Final = 5
_TRIES: Final = 30
"""How often one kind is tried before another is drawn; in the held-out split most changes of looks leave the split."""


@dataclass(frozen=True)
class Edit:
    """One edit: its kind (of `EDITS`), the instruction, and the scene before and after."""

    kind: str
    instruction: str
    before: Scene
    after: Scene


Maker = Callable[[Scene, np.random.Generator], tuple[str, Scene] | None]


def sample_edit(scene: Scene, seed: int) -> Edit:
    """Draw an edit of a scene.

    Args:
        scene: The scene before.
        seed: Which edit; the same seed gives the same edit of the same scene.

    Returns:
        The edit. What comes out belongs to the scene's own split, in its things and in its text.

    Raises:
        ClearValueError: The seed is negative.
    """
    rng = generator(_STREAM, scene.grain, check_seed(seed))
    for _ in range(100):
        kind = pick(rng, EDITS)
        for _ in range(_TRIES):
            made = _MAKERS[kind](scene, rng)
            if made is not None and made[1] != scene and is_sound(made[1]):
                return Edit(kind, made[0], scene, made[1])
    raise ClearError(f"No edit was found for seed {seed}; this is a defect of the library.")


def _any(scene: Scene, rng: np.random.Generator) -> Thing:
    """Return one of a scene's things."""
    return scene.things[int(rng.integers(len(scene.things)))]


def _attribute(name: str, *wordings: str) -> Maker:
    """Return the maker of edits that give one thing another value of one attribute."""

    def make(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
        thing = _any(scene, rng)
        words = refer(rng, scene, thing)
        value = some(rng, VALUES[name], 1, getattr(thing, name))[0]
        if words is None:
            return None
        return pick(rng, wordings).format(words, value), changed(
            scene, thing, altered(rng, thing, name, value)
        )

    return make


def _remove(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
    thing = _any(scene, rng)
    words = refer(rng, scene, thing)
    if words is None:
        return None
    left = [other for other in scene.things if other != thing]
    return pick(rng, ("Remove the {0}.", "Take away the {0}.")).format(words), with_things(scene, left)


def _add(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
    free = free_cells(scene)
    if not free:
        return None
    size, color, fill, shape = (pick(rng, VALUES[name]) for name in ("size", "color", "fill", "shape"))
    thing = place(rng, (size, color, fill, shape), free[int(rng.integers(len(free)))])
    return f"Add a {full(thing)} {at(thing.cell)}.", with_things(scene, [*scene.things, thing])


def _move(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
    thing = _any(scene, rng)
    words, free = refer(rng, scene, thing), free_cells(scene)
    if words is None or not free:
        return None
    cell = free[int(rng.integers(len(free)))]
    return f"Move the {words} to the {CELLS[cell]}.", changed(scene, thing, replace(thing, cell=cell))


def _swap(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
    first, second = (scene.things[int(index)] for index in rng.permutation(len(scene.things))[:2])
    words, other = refer(rng, scene, first), refer(rng, scene, second)
    if words is None or other is None:
        return None
    rest = [thing for thing in scene.things if thing not in (first, second)]
    things = [*rest, replace(first, cell=second.cell), replace(second, cell=first.cell)]
    return f"Swap the {words} and the {other}.", with_things(scene, things)


def _text(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
    """Change the sign's text to another of the same length, so that the plate stays as it is."""
    if scene.sign is None:
        return None
    text = sample_text(rng, scene.split, len(scene.sign.text))
    words = pick(rng, ("Change the sign to {0}.", "Let the sign say {0}.")).format(text)
    return words, replace(scene, sign=replace(scene.sign, text=text))


def _background(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
    new = some(rng, BACKGROUNDS, 1, scene.background)[0]
    return pick(rng, ("Change the background to {0}.", "Make the background {0}.")).format(new), replace(
        scene, background=new
    )


_MAKERS: Final[dict[str, Maker]] = {
    "recolor": _attribute("color", "Paint the {0} {1}.", "Make the {0} {1}."),
    "reshape": _attribute("shape", "Turn the {0} into a {1}.", "Replace the {0} by a {1}."),
    "refill": _attribute("fill", "Make the {0} {1}."),
    "resize": _attribute("size", "Make the {0} {1}."),
    "remove": _remove,
    "add": _add,
    "move": _move,
    "swap": _swap,
    "text": _text,
    "background": _background,
}
