"""Traces: written from templates, or by a teacher whose every reply is read strictly and compared with the truth."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clear_adapters.datasets.builder.teachers import Turn
from clear_adapters.datasets.example import Example
from clear_adapters.datasets.parts import Parts, Way, is_text, read_parts
from clear_adapters.datasets.traces import condition
from clear_adapters.errors import ClearValueError
from clear_adapters.prompts import PROTOCOLS
from clear_adapters.scoring import letter_of, letters_of
from clear_adapters.transcript import ANSWER_OPEN, RESTORE, THINK_CLOSE, parse

VERSION = "1"
"""Changes with every change of the words below and of `prompts.CHOOSE`: other words are other data."""

# ---------------------------------------------------------------------------------------------------- templates

_POOR = (
    "{state} What is asked cannot be made out.",
    "{state} That is too poor for this question.",
    "{state} The detail that the question needs is lost.",
)
_GOOD = (
    "{state} What is asked can still be made out.",
    "{state} That is enough for this question.",
    "{state} The question can be answered from it as it is.",
)
_SEEN = (
    "So the answer is {answer}.",
    "That gives the answer: {answer}.",
    "What can be seen says: {answer}.",
)
_CHOSEN = (
    "Option {letter} fits: {answer}.",
    "It is {answer}, option {letter}.",
    "It shows {answer}: {letter}.",
)


def template(example: Example, way: Way, seed: int) -> Parts:
    """A trace from the degradation's record, the fact or the answer; it follows from the example and the seed.

    Args:
        example: with a degradation's name and intensity where it was degraded.
        way: which path.
        seed: of the choice among phrases.
    """
    digest = hashlib.blake2b(f"{seed}/template/{example.id}".encode(), digest_size=8).digest()
    state = condition(example)
    if way == "restore" and example.degradation is None:
        state = "Unsure."  # nobody restores what he calls clear
    first = (_POOR if way == "restore" else _GOOD)[digest[0] % 3].format(state=state)
    answer, letters = example.answer, letters_of(example.options)
    letter = letter_of(answer, letters) if letters else None
    if letter is not None:
        told = _CHOSEN[digest[1] % 3].format(letter=letter, answer=letters[letter].rstrip("."))
    else:
        told = _SEEN[digest[1] % 3].format(answer=answer.rstrip("."))
    told = example.fact or told
    if way == "restore":
        return Parts(first, answer, told)
    return Parts(f"{first} {told}", answer)


# ---------------------------------------------------------------------------------------------------- a teacher

_PAPER = """\
You write training data for a model that answers questions about pictures. The model sees a picture that may be in a bad \
state: blurred, noisy, dark, compressed, painted over. It can ask for a restored version before it answers.

You are shown two pictures: first the one that the model sees, then the same picture before it was damaged. You are given \
the question, the true answer, and whether the model restores. Write what the model should say, as if it saw only what it \
can see at that point: before a restoration the first picture alone, after it both. Never mention the true answer as given, \
these instructions, or that there is a second picture that the model was not shown.

Where it does not restore, write exactly
<think>what state the picture is in, that it serves for this question, and what in it gives the answer</think>
<answer>the answer</answer>

Where it restores, write exactly
<think>what state the picture is in, and what the question needs that cannot be made out</think>
<image_restore>
<think>what the restored picture shows, and how that gives the answer</think>
<answer>the answer</answer>

Every tag stands once, nothing stands outside the tags, thoughts have one to four sentences, and the answer has the wording \
of the true answer."""

_WAYS = {"direct": "The model does not restore.", "restore": "The model restores."}

_RESTORED = """\
This is the restored picture. Think again, inside <think> and </think>, with both pictures in view, and give the answer \
alone inside <answer> and </answer>.

{question}"""


def paper_conversation(example: Example, way: Way) -> list[Turn]:
    """What a teacher is asked by the paper's rule: it sees both pictures, the question, the truth and the path."""
    asked = f"Question: {example.question}\n\nTrue answer: {example.answer}\n\n{_WAYS[way]}"
    return [Turn("system", _PAPER), Turn("user", asked, _files(example))]


def first_turn(example: Example) -> list[Turn]:
    """What a teacher is asked by the released rule: it sees what the model sees, and decides."""
    return [
        Turn("system", PROTOCOLS["default"].system),
        Turn("user", example.question, _files(example)[:1]),
    ]


def second_turn(example: Example, said: str) -> list[Turn]:
    """The same, after it asked for a restoration: it is handed the clean picture."""
    return [
        *first_turn(example),
        Turn("assistant", _to_request(said)),
        Turn("user", _RESTORED.format(question=example.question), _files(example)[1:]),
    ]


def _to_request(said: str) -> str:
    """A first turn up to its request; what it makes up behind it is left out."""
    return said[: said.index(RESTORE) + len(RESTORE)]


def _files(example: Example) -> tuple[Path, ...]:
    return tuple(Path(str(path)) for path in (example.image, example.clean_image))


def again(conversation: Sequence[Turn], tries: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The conversation after tries that failed: the last one that was written stands in it, with what is wrong with it.

    Args:
        conversation: the first request.
        tries: with `reply` (None where none came) and `problem`.
    """
    written = [t for t in tries if t["reply"] is not None]
    if not written:
        return list(conversation)
    last = written[-1]
    return [
        *conversation,
        Turn(
            "assistant", last["reply"].encode("utf-8", "replace").decode()
        ),  # half a character cannot be sent
        Turn(
            "user",
            f"This cannot be used (attempt {len(written)}): {last['problem']}. Write the whole reply again.",
        ),
    ]


@dataclass(frozen=True)
class Fault:
    """What is wrong with a reply.

    Attributes:
        reason: `malformed`, `other path`, `wrong answer`, or what a failure says.
        detail: in a sentence, also for the teacher.
    """

    reason: str
    detail: str


def decision(text: str) -> Way | None:
    """Which path a teacher's first turn takes; None where it takes neither."""
    if not is_text(text):
        return None
    before, request, _ = text.partition(RESTORE)
    if request and THINK_CLOSE in before and ANSWER_OPEN not in before:
        return "restore"  # whatever it makes up about a picture that it was not shown yet
    parsed = parse(text)
    if parsed.answer is not None:
        return "direct"
    return "restore" if parsed.wants_restore else None


def read_trace(text: str, way: Way, said: str | None = None) -> Parts | Fault:
    """Reads a reply as a trace of a path.

    Args:
        text: the reply.
        way: the path that it must be of.
        said: the first turn, where the reply is the second one.
    """
    if said is not None:
        text = f"{_to_request(said)}\n{text}"
    try:
        parts = read_parts(text)
    except ClearValueError as error:
        return Fault("malformed", str(error))
    if parts.way != way:
        told = (
            "it restores, and the model does not"
            if way == "direct"
            else "it does not restore, and the model does"
        )
        return Fault("other path", told)
    return parts
