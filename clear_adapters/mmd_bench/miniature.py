"""The built-in benchmark: questions about held-out scenes of the miniature world, as a TSV file like any other.

Question i depends on the seed and on i alone, so a smaller set is the beginning of a larger one.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from clear_adapters.datasets.tsv import format_row
from clear_adapters.degradations import draw
from clear_adapters.errors import ClearError, ClearValueError
from clear_adapters.mmd_bench.pictures import encode
from clear_adapters.mmd_bench.tasks import CLEAN, get_task
from clear_adapters.scoring import score
from clear_adapters.world import KINDS, Question, Scene, ask, pair_scenes, render, sample_scene

NAME = "builtin:miniature"
"""How the set is named where a folder or a repository is expected."""

SIDE = 256
"""Pictures are drawn and degraded at this size; a model then reduces them itself."""

_FIRST = 1_000_000
"""Where scene seeds begin: those below belong to training scripts, which look at held-out scenes as they go."""
_TRIES = 16
_COLUMNS = ("index", "image", "question", "answer", "category", "A", "B", "C", "D")


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        index: its place in the set.
        kind: one of the six kinds.
        text: as it is asked.
        truth: the letter, number or words of the answer.
        options: what the letters stand for; empty where there are none.
        sign: what the scene's sign says; empty without one.
        degradation: the corruption of its picture, where the set draws one itself.
        seed: of that corruption.
    """

    index: int
    kind: str
    text: str
    truth: str
    options: tuple[str, ...]
    sign: str
    degradation: str
    seed: int

    def score(self, answer: str) -> bool | None:
        """As `compare`."""
        return compare(answer, self.truth, self.kind, self.options)


def compare(answer: str, truth: str, kind: str, options: Sequence[str] = ()) -> bool | None:
    """Right, wrong, or None where a letter or number is asked for and none can be read.

    Args:
        answer: of a model.
        truth: the letter, number or words of the answer.
        kind: of the question.
        options: what the letters stand for; empty where there are none.
    """
    if options:
        return score(answer, truth, "option", options=options)
    return score(answer, truth, comparison(kind, truth))


def comparison(kind: str, truth: str) -> Literal["number", "exact"]:
    """How an answer without options is compared; a sign's digits are a text: "07" is not 7."""
    return "number" if kind == "spatial" and truth.isdigit() else "exact"


def spelled(truth: str, options: Sequence[str] = ()) -> str:
    """A truth with the words behind its letter."""
    return f"{truth} ({options['ABCDEFGH'.index(truth)]})" if options else truth


def draw_item(seed: int, index: int) -> tuple[Item, Scene]:
    """Question `index` and the scene it is about; kinds take turns."""
    kind = KINDS[index % len(KINDS)]
    base = _FIRST * (seed + 1)
    if kind == "pair":  # neighbours of this kind are the two halves of a pair
        number = index // len(KINDS)
        first, question, second, other = pair_scenes(base + number // 2, "heldout")
        scene, question = (second, other) if number % 2 else (first, question)
    else:
        scene, question = _ask_one(kind, base + index * _TRIES)
    lettered = question.options if question.is_lettered else ()
    item = Item(
        index=index,
        kind=kind,
        text=question.text,
        truth=question.answer,
        options=tuple(lettered),
        sign=scene.sign.text if scene.sign else "",
        degradation=draw(base + index),
        seed=base + index,
    )
    return item, scene


def _ask_one(kind: str, start: int) -> tuple[Scene, Question]:
    for number in range(start, start + _TRIES):
        scene = sample_scene(number, "heldout")
        questions = ask(scene, number, (kind,), 1)
        if questions:
            return scene, questions[0]
    raise ClearError(
        f"No scene of seeds {start} to {start + _TRIES - 1} allows a question of kind {kind!r}; this is a defect of the library."
    )


def write_clean(folder: str | Path, n: int, seed: int = 0) -> Path:
    """Writes the clean set as a TSV file.

    Args:
        folder: where it goes.
        n: how many questions.
        seed: the same seed gives the same file.

    Raises:
        ClearValueError: n is below 1.
    """
    if n < 1:
        raise ClearValueError(f"n={n}: a set has at least one question")
    path = Path(folder) / get_task("miniature").file_name(CLEAN)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="") as opened:
        opened.write(format_row(list(_COLUMNS)))
        for index in range(n):
            item, scene = draw_item(seed, index)
            picture = base64.b64encode(encode(np.asarray(render(scene, SIDE)))).decode("ascii")
            options = [*item.options, *[""] * (4 - len(item.options))]
            opened.write(format_row([str(index), picture, item.text, item.truth, item.kind, *options]))
    part.replace(path)
    return path
