"""Protocols: the system prompts that describe the tags to a model, and the texts that a caller's choice writes.

A protocol is versioned, because an adapter is trained with one: other words at answering time are another task.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

from clear_adapters.errors import ClearValueError, unknown_name
from clear_adapters.transcript import RESTORE, THINK_CLOSE, THINK_OPEN

FORCED_DECLINE = "I will answer from what I see."
"""What stands in place of a request that is not granted, because the caller forbade it or the limit is reached."""

CHOOSE = "Choose one option and answer with its letter."
"""What follows a list of options, in training data and in MMD-Bench, so that a model is asked as it was trained. Other words
need another `PROMPT_VERSION` in `mmd_bench/tasks.py` and another `VERSION` in `datasets/builder/writers.py`."""

_PLACE = "{question}"

_DEFAULT = """\
You answer a question about a picture that may be in a bad state: blurred, noisy, dark, compressed or weathered.
Look at the picture first. Inside <think> and </think>, say what the question depends on and whether that can be made \
out in the picture as it is.
If it can, do not restore anything: give the answer.
If the picture is too poor for this question, write <image_restore> directly after the thought and end your turn. You \
will be given a restored version. Then think again, inside <think> and </think>, with both versions in view, and do \
not trust details that only the restoration shows where they contradict the original.
Write the final answer, and nothing else, inside <answer> and </answer>."""


@dataclass(frozen=True)
class Protocol:
    """How a model is told what to do.

    Attributes:
        name: how it is asked for, or the stem of the file it came from.
        version: changes with every change of the words.
        system: the text of the system block; empty leaves the block out.
        plain: how the model is asked without the skill; `{question}` is replaced.
        joint: what stands between a thought and what follows it in the same turn.

    Raises:
        ClearValueError: `plain` has no place for the question.
    """

    name: str
    version: str
    system: str
    plain: str = _PLACE
    joint: str = "\n"

    def __post_init__(self) -> None:
        if _PLACE not in self.plain:
            raise ClearValueError(f"protocol {self.name!r}: plain={self.plain!r} has no {_PLACE} in it")

    def ask_plainly(self, question: str) -> str:
        """The question as the plain model is asked it."""
        return self.plain.replace(_PLACE, question)

    @property
    def forced_restore(self) -> str:
        """The model's first turn when the caller always wants a restoration: an empty thought and the tag."""
        return f"{THINK_OPEN}{THINK_CLOSE}{self.joint}{RESTORE}"

    def declined(self, text: str) -> str:
        """A turn that asks for a restoration, with the request and what followed replaced by `FORCED_DECLINE`.

        Args:
            text: a turn with `<image_restore>` in it; all before the tag stays as it is, an open thought is closed.
        """
        head = text[: text.index(RESTORE)]
        if head.rfind(THINK_OPEN) > head.rfind(THINK_CLOSE):
            head += THINK_CLOSE
        if head and not head[-1].isspace():
            head += self.joint
        return head + FORCED_DECLINE

    def to_dict(self) -> dict[str, str]:
        """Plain data for `clear_config.json`; the words are in it, so that an adapter carries its prompt."""
        return asdict(self)


PROTOCOLS = {
    "default": Protocol("default", "1", _DEFAULT),
    # The built-in models read bytes, so every letter costs a token. No line break: their base was never taught to write
    # one, and an adapter that leaves its head alone cannot teach it (probability 0.23 after all of stage 1).
    "tiny": Protocol("tiny", "2", "Look. Restore if needed. Answer.", joint=""),
}


def get_protocol(name: str | Path) -> Protocol:
    """A protocol by its name, or one read from a prompt file.

    Args:
        name: `default`, `tiny`, or the path of a UTF-8 text file with the system prompt.

    Raises:
        UnknownNameError: neither a name nor an existing file.
        ClearValueError: the file is empty or is no text.
    """
    if isinstance(name, str) and name in PROTOCOLS:
        return PROTOCOLS[name]
    path = Path(name)
    if not path.is_file():
        raise unknown_name(
            "protocol", str(name), PROTOCOLS, hint="Or give the path of a text file with a system prompt."
        )
    try:
        system = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ClearValueError(f"prompt file {str(path)!r} is not UTF-8 text: {error}") from error
    if not system:
        raise ClearValueError(f"prompt file {str(path)!r} is empty: write the system prompt into it")
    return Protocol(path.stem, hashlib.sha256(system.encode()).hexdigest()[:12], system)
