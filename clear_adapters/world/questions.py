"""Questions about scenes, of six kinds that mirror the six sources of MMD-Bench, each with its answer, evidence and chance level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from clear_adapters.errors import ClearError, ClearValueError, unknown_name
from clear_adapters.world.drafts import Draft, Template
from clear_adapters.world.options import OPTIONS
from clear_adapters.world.pairs import PAIR_TEMPLATES, is_sound
from clear_adapters.world.scene import Scene, Split, check_seed, check_split, generator, sample_scene
from clear_adapters.world.spatial import SPATIAL
from clear_adapters.world.templates import CHOICE, OPEN, READING

KINDS: Final = ("choice", "open", "pair", "spatial", "options", "reading")
"""Mirroring MMBench, MM-Vet, MMVP, CV-Bench, MMStar and RealWorldQA."""

_STREAM: Final = 2
_PAIR_STREAM: Final = 3
_TRIES: Final = 8
_TEMPLATES: Final[dict[str, tuple[Template, ...]]] = {
    "choice": CHOICE,
    "open": OPEN,
    "spatial": SPATIAL,
    "options": OPTIONS,
    "reading": READING,
}


@dataclass(frozen=True)
class Question:
    """One question about one scene.

    `options` are the possible answers where there is a closed list, in the order of their letters where the text gives letters;
    `answer` is the letter or the words. `chance` is what an answer without the picture can reach on questions of this template.
    `fact` says in one sentence what in the picture gives the answer, `cells` where that is. `pair` is shared by the two
    questions of a pair, and None elsewhere.
    """

    kind: str
    template: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    chance: float = 0.0
    fact: str = ""
    cells: tuple[int, ...] = ()
    pair: int | None = None

    @property
    def is_lettered(self) -> bool:
        """Whether the answer is the letter of an option."""
        return "\nA. " in self.text


def ask(scene: Scene, seed: int, kinds: Sequence[str] = KINDS, n: int = 2) -> list[Question]:
    """Make questions about a scene.

    Args:
        scene: The scene.
        seed: Which questions; the same seed gives the same questions about the same scene.
        kinds: The kinds wanted, of `KINDS`.
        n: How many of each kind.

    Returns:
        The questions in the order of `kinds`, no two texts the same within a kind. There are fewer than `n` of a kind where the
        scene allows no more: none of `"reading"` without a sign, for instance.

    Raises:
        ClearValueError: The seed or `n` is negative.
        UnknownNameError: There is no such kind.
    """
    if n < 0:
        raise ClearValueError(f"n is how many questions of each kind are made, at least 0, not {n}.")
    asked: list[Question] = []
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of question", kind, KINDS)
        rng = generator(_STREAM, scene.grain, check_seed(seed), KINDS.index(kind))
        made: dict[str, Question] = {}
        for _ in range(_TRIES * n):
            if len(made) == n:
                break
            draft = _draw(scene, kind, rng)
            if draft is not None and draft.text not in made:
                made[draft.text] = _finished(kind, draft)
        asked.extend(made.values())
    return asked


def pair_scenes(seed: int, split: Split) -> tuple[Scene, Question, Scene, Question]:
    """Draw two scenes that differ in one detail, and the same question to both, whose answers differ.

    Args:
        seed: A whole number of at least 0. The scenes are none of those that `sample_scene` gives for small seeds.
        split: `"train"` or `"heldout"`; both scenes belong to it.

    Returns:
        The first scene and its question, the second scene and its question. Both questions carry the seed in `pair`.

    Raises:
        ClearValueError: The seed is negative.
        UnknownNameError: There is no such split.
    """
    rng = generator(_PAIR_STREAM, int(check_split(split) == "heldout"), check_seed(seed))
    make = PAIR_TEMPLATES[int(rng.integers(len(PAIR_TEMPLATES)))]
    for _ in range(2000):
        scene = sample_scene(2**40 + int(rng.integers(2**40)), split)
        twin = make(scene, rng)
        if twin is not None and is_sound(twin.scene):
            first, second = (replace(_finished("pair", draft), pair=int(seed)) for draft in twin.drafts)
            return scene, first, twin.scene, second
    raise ClearError(f"No pair of scenes was found for seed {seed}; this is a defect of the library.")


def _finished(kind: str, draft: Draft) -> Question:
    """Return a draft as a question of a kind."""
    return Question(
        kind, draft.template, draft.text, draft.answer, draft.options, draft.chance, draft.fact, draft.cells
    )


def _draw(scene: Scene, kind: str, rng: np.random.Generator) -> Draft | None:
    """Draw one question, or None where the template drawn does not suit the scene."""
    if kind == "pair":
        twin = PAIR_TEMPLATES[int(rng.integers(len(PAIR_TEMPLATES)))](scene, rng)
        return twin.drafts[0] if twin else None
    templates = _TEMPLATES[kind]
    return templates[int(rng.integers(len(templates)))](scene, rng)
