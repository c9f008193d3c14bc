"""Templates of the kind options: wrong answers mix what is in the scene, so that none can be ruled out unseen."""

from __future__ import annotations

from typing import Final

import numpy as np

from clear_adapters.world.drafts import VALUES, Draft, Template, any_thing, attribute, lettered, some, where
from clear_adapters.world.scene import CELLS, DIGITS, LETTERS, Scene, Thing, pick, split_of
from clear_adapters.world.wording import at, full, phrase


def _crossed(
    scene: Scene, rng: np.random.Generator, thing: Thing, names: tuple[str, str]
) -> tuple[str, list[str]]:
    """Return a thing by two attributes, and the three wrong answers that mix them with two other values."""
    others: list[str] = []
    for name in names:
        own = getattr(thing, name)
        near = [getattr(other, name) for other in scene.things if getattr(other, name) != own]
        others.append(pick(rng, near) if near and rng.random() < 0.5 else some(rng, VALUES[name], 1, own)[0])
    right, both = (getattr(thing, names[0]), getattr(thing, names[1])), (others[0], others[1])
    wrong = [(both[0], right[1]), (right[0], both[1]), both]
    return " ".join(right), [" ".join(pair) for pair in wrong]


def _present(scene: Scene, rng: np.random.Generator) -> Draft | None:
    """Ask which of four mixtures of two by two attributes is in the picture."""
    thing = any_thing(rng, scene)
    names = (("color", "shape"), ("color", "shape"), ("fill", "shape"))[int(rng.integers(3))]
    right, wrong = _crossed(scene, rng, thing, names)
    if any(phrase(other, names) in wrong for other in scene.things):
        return None
    stem = pick(rng, ("Which is in the picture?", "Which of these is shown?", "What is there?"))
    fact = f"{CELLS[thing.cell].capitalize()}: {full(thing)}."
    return lettered(rng, "present", stem, right, wrong, fact, (thing.cell,))


def _at_options(scene: Scene, rng: np.random.Generator) -> Draft:
    thing = any_thing(rng, scene)
    names = (("color", "shape"), ("color", "shape"), ("fill", "shape"), ("size", "color"))[
        int(rng.integers(4))
    ]
    right, wrong = _crossed(scene, rng, thing, names)
    fact = f"{CELLS[thing.cell].capitalize()}: {full(thing)}."
    return lettered(rng, "at", f"What is {at(thing.cell)}?", right, wrong, fact, (thing.cell,))


def _where_options(scene: Scene, rng: np.random.Generator) -> Draft | None:
    """Ask for a thing's place among the places of the other things."""
    found = where(scene, rng)
    if found is None or len(scene.things) < 3:
        return None
    thing, stem, fact = found
    wrong = some(rng, [CELLS[other.cell] for other in scene.things], 3, CELLS[thing.cell])
    return lettered(
        rng, "place", stem, CELLS[thing.cell], wrong, fact, tuple(other.cell for other in scene.things)
    )


def _color_options(scene: Scene, rng: np.random.Generator) -> Draft | None:
    """Ask for a thing's colour among the colours of the other things."""
    found = attribute(scene, rng, "color")
    colors = sorted({thing.color for thing in scene.things})
    if found is None or len(colors) < 3:
        return None
    thing, stem, value, fact = found
    return lettered(rng, "color", stem, value, some(rng, colors, 3, value), fact, (thing.cell,))


def _text_options(scene: Scene, rng: np.random.Generator) -> Draft | None:
    """Ask for the sign's text among four that mix two by two characters."""
    if scene.sign is None:
        return None
    text = scene.sign.text
    places = [int(index) for index in rng.permutation(len(text))[:2]]
    new = {at: some(rng, DIGITS if text[at].isdigit() else LETTERS, 1, text[at])[0] for at in places}
    wrong = []
    for swapped in (places[:1], places[1:], places):
        wrong.append("".join(new[index] if index in swapped else own for index, own in enumerate(text)))
    if scene.split == "train" and any(split_of(other) != "train" for other in wrong):
        return None
    stem = pick(rng, ("What does the sign say?", "Which text is on the sign?"))
    return lettered(rng, "text", stem, text, wrong, f"The sign reads {text}.", scene.sign.cells)


OPTIONS: Final[tuple[Template, ...]] = (
    _present,
    _present,
    _at_options,
    _where_options,
    _color_options,
    _text_options,
)
"""A template that stands twice is drawn twice as often."""
