"""The page's samples: held-out scenes of the miniature world, their questions and truths, and which of them the gallery shows.

Sample i depends on i alone. The gallery's are chosen by a rule from a run that is recorded in `examples.json`
(`benchmarks/demo/choose.py`), so that what helps, what changes nothing and what does harm all have their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clear_adapters.mmd_bench.miniature import SIDE, compare, draw_item, spelled
from clear_adapters.results import ResultFile, read_result
from clear_adapters.world import ask, render

if TYPE_CHECKING:
    from PIL import Image

    from clear_adapters.world import Question, Scene

SET = 7
"""Seed of the set that samples are drawn from: not that of any official result."""

SEVERITY: Literal["high"] = "high"
"""At which the gallery's samples are degraded."""

PAGE_DATA = Path(__file__).parents[1] / "builtin" / "page"
"""Package data: the chosen examples, tables and figure of the official result."""

SUGGESTED = 5
OUTCOMES = ("helps", "helps", "helps", "untouched", "unneeded", "fails", "harms")
"""What the gallery shows, in order; `outcome` says what each word means."""

TITLES = {
    "helps": "CLEAR helps",
    "untouched": "No need to restore",
    "unneeded": "Both right",
    "fails": "Both wrong",
    "harms": "CLEAR does harm",
}


@dataclass(frozen=True)
class Suggestion:
    """A question about a sample, with its truth.

    Attributes:
        text: as it is asked.
        truth: the letter, number or words of the answer.
        options: what the letters stand for; empty where there are none.
        kind: of question.
    """

    text: str
    truth: str
    options: tuple[str, ...] = ()
    kind: str = ""

    @property
    def shown_truth(self) -> str:
        """With the words behind a letter."""
        return spelled(self.truth, self.options)

    def is_right(self, answer: str) -> bool:
        """Whether an answer is the truth; one that cannot be read is not."""
        return compare(answer, self.truth, self.kind, self.options) is True


@dataclass(frozen=True)
class Sample:
    """One scene that can be asked about.

    Attributes:
        index: of the sample.
        degradation: the corruption that its picture is shown with at first.
        seed: of that corruption.
        suggestions: questions with their truths; the first is the sample's own.
    """

    index: int
    degradation: str
    seed: int
    suggestions: tuple[Suggestion, ...]
    _scene: Scene

    @cached_property
    def clean(self) -> Image.Image:
        """The scene, 256 x 256 pixels."""
        return render(self._scene, SIDE)

    def find(self, question: str) -> Suggestion | None:
        """The suggestion that a question is, however its spaces and line breaks stand; None where the truth is not known."""
        wanted = " ".join(question.split())
        return next((s for s in self.suggestions if " ".join(s.text.split()) == wanted), None)


@lru_cache(maxsize=32)
def draw_sample(index: int) -> Sample:
    """The sample of a number from 0 on."""
    item, scene = draw_item(SET, index)
    own = Suggestion(item.text, item.truth, item.options, item.kind)
    found = {own.text: own}
    for question in ask(scene, item.seed, ("reading", "spatial", "open", "choice", "options"), 1):
        found.setdefault(question.text, _suggestion(question))
    return Sample(index, item.degradation, item.seed, tuple(found.values())[:SUGGESTED], scene)


def _suggestion(question: Question) -> Suggestion:
    options = question.options if question.is_lettered else ()
    return Suggestion(question.text, question.answer, tuple(options), question.kind)


# ----------------------------------------------------------------------------------------------------- the gallery


@dataclass(frozen=True)
class Example:
    """One picture of the gallery.

    Attributes:
        index: of the sample.
        outcome: what happened when it was chosen; a key of `TITLES`.
    """

    index: int
    outcome: str

    @property
    def title(self) -> str:
        """Of its outcome."""
        return TITLES[self.outcome]


def outcome(base: bool, clear: bool, restored: bool) -> str:
    """What CLEAR did to one answer.

    Args:
        base: whether the model as it is was right.
        clear: whether the model with the adapter was.
        restored: whether it restored the picture.

    Returns:
        `helps` (only CLEAR right), `harms` (only the base right), `fails` (both wrong), and where both are right
        `unneeded` with a restoration, `untouched` without one.
    """
    if base != clear:
        return "helps" if clear else "harms"
    if not clear:
        return "fails"
    return "unneeded" if restored else "untouched"


def choose(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The gallery from the rows of a run: for each of `OUTCOMES` the first row that fits.

    A row fits when it has that outcome, was restored (but for `untouched`), and brings a corruption that none before
    it has; the first `helps` is about a sign, and the others are of other kinds of question.
    """
    chosen: list[dict[str, Any]] = []
    for wanted in OUTCOMES:
        helped = [c["kind"] for c in chosen if c["outcome"] == "helps"]
        for row in rows:
            fits = row["outcome"] == wanted and (row["restored"] or wanted == "untouched")
            if wanted == "helps":
                fits = fits and (row["kind"] == "reading" if not helped else row["kind"] not in helped)
            if fits and row["degradation"] not in [c["degradation"] for c in chosen]:
                chosen.append(row)
                break
    return chosen


@lru_cache(maxsize=1)
def recorded() -> ResultFile:
    """The run that the gallery was chosen from."""
    return read_result(PAGE_DATA / "examples.json")


def gallery() -> list[Example]:
    """The pictures of the gallery, in order."""
    return [Example(row["index"], row["outcome"]) for row in choose(recorded().payload["rows"])]
