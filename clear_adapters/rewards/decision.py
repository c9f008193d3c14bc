"""Whether restoring, or not, was the right decision, judged by the answer that came of it.

The paper's values are those of its interleaved GRPO; the released code has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from clear_adapters.errors import unknown_name

CORRECT_ABOVE: Final = 0.5
"""An answer counts as correct with an accuracy above this."""

TABLES: Final[Mapping[str, Mapping[tuple[bool, bool], float]]] = {
    "paper": {(True, True): 1.0, (False, True): 0.0, (True, False): 0.0, (False, False): -1.0},
    "release": {(True, True): 1.0, (False, True): 0.6, (True, False): 0.4, (False, False): -0.2},
    "release_smooth": {(True, True): 1.0, (False, True): 0.5, (True, False): 0.5, (False, False): -0.2},
}
"""Reward by (restored, correct). The released code has two tables, chosen by a switch; its script turns both off."""


def decision(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    restored: Sequence[bool | None],
    accuracy: Sequence[float | None],
    *,
    table: str = "paper",
    **columns: Any,
) -> list[float | None]:
    """The value of the table for what was decided and what came of it.

        >>> decision(["?"] * 2, ["", ""], restored=[True, False], accuracy=[0.9, 0.1])
        [1.0, -1.0]

    Args:
        prompts: what was asked; not read.
        completions: what the model wrote; not read.
        restored: whether a restoration was read; None where the model did not decide.
        accuracy: from 0 to 1; None where it is not known.
        table: one of `TABLES`.
        **columns: not read.

    Returns:
        A number for each rollout, None where one of the two is.

    Raises:
        UnknownNameError: no such table.
    """
    if table not in TABLES:
        raise unknown_name("table of decisions", table, TABLES)
    return [
        None if did is None or right is None else TABLES[table][bool(did), right > CORRECT_ABOVE]
        for did, right in zip(restored, accuracy, strict=True)
    ]
