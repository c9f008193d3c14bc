"""Whether a reply keeps to the protocol's tags (binary in the paper, graded in the released code)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from clear_adapters.transcript import RESTORE, Transcript

_TAG = r"</?think>|</?answer>|<image_restore>"
_THOUGHT = rf"\s*<think>(?:(?!{_TAG}).)*</think>\s*"
_WHOLE = re.compile(
    rf"(?:{_THOUGHT}<image_restore>)*{_THOUGHT}<answer>\s*(?:(?!{_TAG}|\s).)(?:(?!{_TAG}).)*</answer>\s*",
    re.DOTALL,
)
_ANY_THOUGHT = re.compile(r"<think>.+?</think>", re.DOTALL)
_ANY_ANSWER = re.compile(r"<answer>.+?</answer>", re.DOTALL)


def format_binary(
    prompts: Sequence[Any],
    completions: Sequence[str],
    transcripts: Sequence[Transcript] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 for a reply that is nothing but thoughts, each followed by a request or, at the end, by one answer, else 0.

    A thought may be empty, since `restore="always"` begins with an empty one; an answer may not.

        >>> format_binary(["?"], ["<think>dark</think><image_restore><think>clear</think><answer>7</answer>"])
        [1.0]

    Args:
        prompts: what was asked; not read.
        completions: what the model wrote, with its tags.
        transcripts: where given, a reply with another number of requests than of restorations earns 0: one that writes
            request and answer in the same turn was never given anything.
        **columns: not read.

    Returns:
        A number for each rollout.
    """
    rewards: list[float | None] = []
    for row, text in enumerate(completions):
        right = _WHOLE.fullmatch(text) is not None
        if right and transcripts is not None:
            right = text.count(RESTORE) == len(transcripts[row].restorations)
        rewards.append(float(right))
    return rewards


def format_graded(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float | None]:
    """0.35 for a thought, 0.35 for an answer, 0.3 for the first thought's end before the first answer (released code).

    Requests are not looked at, nor text outside of the tags.

    Args:
        prompts: what was asked; not read.
        completions: what the model wrote, with its tags.
        **columns: not read.

    Returns:
        A number for each rollout.
    """
    rewards: list[float | None] = []
    for text in completions:
        end, begin = text.find("</think>"), text.find("<answer>")
        thought, answer = _ANY_THOUGHT.search(text) is not None, _ANY_ANSWER.search(text) is not None
        rewards.append(0.35 * thought + 0.35 * answer + 0.3 * (0 < end < begin))
    return rewards
