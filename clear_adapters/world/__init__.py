"""The miniature world: seeded scenes with pictures, questions, descriptions, edits and their truth.

    scene = sample_scene(7, "train")
    picture = render(scene)
    for question in ask(scene, seed=0): ...

See `scene` for how randomness is derived and what keeps the two splits apart.
"""

from clear_adapters.world.captions import describe, facts
from clear_adapters.world.edits import EDITS, Edit, sample_edit
from clear_adapters.world.questions import KINDS, Question, ask, pair_scenes
from clear_adapters.world.render import render
from clear_adapters.world.scene import (
    BACKGROUNDS,
    CELLS,
    COLORS,
    FILLS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Sign,
    Thing,
    sample_scene,
    split_of,
)

__all__ = [
    "BACKGROUNDS",
    "CELLS",
    "COLORS",
    "EDITS",
    "FILLS",
    "KINDS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "Edit",
    "Question",
    "Scene",
    "Sign",
    "Thing",
    "ask",
    "describe",
    "facts",
    "pair_scenes",
    "render",
    "sample_edit",
    "sample_scene",
    "split_of",
]
