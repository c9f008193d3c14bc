"""A reply as training data must have it: the four parts of the paper's traces, and nothing between them.

    A  <think>what the picture is like, and whether it serves</think>
    B  <image_restore>
    C  <think>what the restored picture shows</think>
    D  <answer>the answer</answer>

The direct path leaves B and C out (arXiv 2604.04780; METHOD of the paper, "trace writer"). `transcript.parse` reads what a
model wrote as well as it can; this reads what a model is to be taught, and forgives nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clear_adapters.errors import ClearValueError
from clear_adapters.scoring import Kind, exact_match, score
from clear_adapters.transcript import ANSWER_CLOSE, ANSWER_OPEN, RESTORE, THINK_CLOSE, THINK_OPEN

_HALF = re.compile("[\ud800-\udfff]")
_TAGS = (THINK_OPEN, THINK_CLOSE, RESTORE, ANSWER_OPEN, ANSWER_CLOSE)
_TAG = re.compile("|".join(map(re.escape, _TAGS)))
_DIRECT = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
_RESTORE = (THINK_OPEN, THINK_CLOSE, RESTORE, *_DIRECT)


@dataclass(frozen=True)
class Parts:
    """The parts of a trace.

    Attributes:
        diagnosis: part A.
        answer: part D.
        reading: part C; None where nothing is restored.
    """

    diagnosis: str
    answer: str
    reading: str | None = None

    @property
    def text(self) -> str:
        """The trace with its tags, a line break between parts (a protocol puts its own joint there when it is trained)."""
        parts = [f"{THINK_OPEN}{self.diagnosis}{THINK_CLOSE}"]
        if self.reading is not None:
            parts += [RESTORE, f"{THINK_OPEN}{self.reading}{THINK_CLOSE}"]
        return "\n".join([*parts, f"{ANSWER_OPEN}{self.answer}{ANSWER_CLOSE}"])


def is_text(text: str) -> bool:
    """Whether a text can be written: it holds no half of a character (a lone surrogate), which JSON can smuggle in."""
    return _HALF.search(text) is None


def read_parts(text: str) -> Parts:
    """Reads a trace.

    Args:
        text: with its tags, on either path.

    Raises:
        ClearValueError: a tag is missing, stands twice or elsewhere, a part is empty, text stands outside the parts, or it
            holds half a character.
    """
    if not is_text(text):
        raise ClearValueError("half a character (a lone surrogate) stands in it, which is no text")
    tags = tuple(_TAG.findall(text))
    if tags not in (_DIRECT, _RESTORE):
        told = " ".join(tags[:12]) if tags else "no tag at all"
        raise ClearValueError(
            f"the tags do not parse: found {told}, where {''.join(_DIRECT)} or {''.join(_RESTORE)} is a trace"
        )
    between = [part.strip() for part in _TAG.split(text)]
    inside = {1: "the first thought", len(tags) - 1: "the answer"}
    if tags == _RESTORE:
        inside[4] = "the thought after the restoration"
    for place, part in enumerate(between):
        if place in inside and not part:
            raise ClearValueError(f"the tags do not parse: {inside[place]} is empty")
        if place not in inside and part:
            raise ClearValueError(f"the tags do not parse: {part[:60]!r} stands outside the tags")
    return Parts(between[1], between[len(tags) - 1], between[4] if tags == _RESTORE else None)


def matches(answer: str, truth: str, options: Sequence[str] = (), kind: Kind = "auto") -> bool:
    """Whether an answer says what the truth says, told without asking anybody.

    Args:
        answer: without tags.
        truth: the truth; of a question with options the letter, or the text of one of them.
        options: the options' texts in the order of their letters.
        kind: how to compare, as `scoring.score` does. With options a letter or a text that names the true one counts.
    """
    if options:
        letters = letters_of(options)
        letter = letter_of(truth, letters)
        if letter is not None:
            return score(answer, letter, "option", options=letters) is True
    if kind == "option":
        kind = "auto"
    return score(answer, truth, kind) is True


def says(answer: str, truth: str, options: Sequence[str] = ()) -> bool:
    """Whether an answer is the truth and nothing more: its words, or of options its letter, its text or both.

    Args:
        answer: without tags.
        truth: the truth; of a question with options the letter, or the text of one of them.
        options: the options' texts in the order of their letters.
    """
    letters = letters_of(options)
    letter = letter_of(truth, letters)
    if letter is None:
        return answer == truth or exact_match(answer, truth)
    lone = letter_of(answer, letters)
    if lone is not None:
        return lone == letter
    return exact_match(answer, (letters[letter], f"{letter}. {letters[letter]}"))


def letters_of(options: Sequence[str]) -> dict[str, str]:
    """Texts by letter."""
    return {chr(ord("A") + place): text for place, text in enumerate(options)}


def letter_of(truth: str, letters: Mapping[str, str]) -> str | None:
    """The letter of the true option; None where the truth names none. A lone letter is never the text of another option."""
    told = truth.strip()
    lone = told.strip("() .").upper()
    if lone in letters:
        return lone
    same = [letter for letter, text in letters.items() if text.strip() == told]
    return same[0] if len(same) == 1 else None
