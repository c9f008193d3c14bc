"""What a teacher will cost, told before the first call. Estimates in round numbers: services count as they please."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from clear_adapters.datasets.builder.teachers import SIDE

BYTES_A_TOKEN = 4
"""English text, roughly."""
FEWEST_BYTES = 2
"""The same for the most that a request can cost, whatever the language."""
PIXELS_A_TOKEN = 750
"""Of a picture. Services differ by a factor of two, which the most that a request can cost allows for."""
REPLY = 250
"""Tokens of a trace. The paper gives mean lengths of 606 and 1,080 for the two paths, most likely in letters."""
SYSTEM = 350
"""Tokens of the system prompt."""
MOST_SYSTEM = 700
"""The same for the most that a request can cost, with the words around question and pictures."""
COMPLAINT = 300
"""Tokens that say what was wrong with a reply, at most."""


@dataclass(frozen=True)
class Prices:
    """What a service asks for, in its currency per million tokens."""

    prompt: float
    completion: float


@dataclass(frozen=True)
class Estimate:
    """Requests and tokens.

    Attributes:
        requests: where every first try is taken.
        most: where every row takes all its tries.
        prompt: tokens of the requests where every first try is taken.
        completion: tokens of the replies.
        most_prompt: tokens of the requests where every row takes all its tries, each with the longest reply before it.
        most_completion: tokens of the replies where each is as long as it may be.
    """

    requests: int
    most: int
    prompt: int
    completion: int
    most_prompt: int = 0
    most_completion: int = 0

    def __add__(self, other: Estimate) -> Estimate:
        """Both."""
        return Estimate(
            self.requests + other.requests,
            self.most + other.most,
            self.prompt + other.prompt,
            self.completion + other.completion,
            self.most_prompt + other.most_prompt,
            self.most_completion + other.most_completion,
        )

    def price(self, prices: Prices) -> tuple[float, float]:
        """What it costs where every first try is taken, and the most that it can cost."""
        least = self.prompt * prices.prompt + self.completion * prices.completion
        most = self.most_prompt * prices.prompt + self.most_completion * prices.completion
        return least / 1e6, most / 1e6

    def told(self, prices: Prices | None) -> str:
        """One sentence."""
        text = (
            f"about {self.requests:,} requests ({self.most:,} at most), {self.prompt:,} tokens in and "
            f"{self.completion:,} out"
        )
        if prices is None:
            return f"{text}; give --price IN,OUT (per million tokens) for the cost"
        least, most = self.price(prices)
        return f"{text}: about {least:,.2f}, {most:,.2f} at most"


def picture_tokens(size: tuple[int, int]) -> int:
    """Tokens of one picture (width, height) as a teacher is shown it."""
    scale = min(1.0, SIDE / max(size))
    return max(1, round(size[0] * scale * size[1] * scale / PIXELS_A_TOKEN))


@dataclass(frozen=True)
class Asked:
    """A row that a teacher may be asked about.

    Attributes:
        text: bytes of question and answer.
        size: of the picture (width, height).
        turns: tries that are left for the first turn, which decides.
        traces: tries that are left for the trace.
        decided: whether the first turn is there; without, half of the rows are expected to restore.
    """

    text: int
    size: tuple[int, int]
    turns: int = 0
    traces: int = 0
    decided: bool = True


def estimate(rows: Sequence[Asked], turns: bool, max_tokens: int) -> Estimate:
    """Estimates what is left to ask.

    Args:
        rows: with the tries that are left.
        turns: whether a first turn decides, which stands in the requests after it.
        max_tokens: longest reply.
    """
    said, most_said = (REPLY, max_tokens) if turns else (0, 0)
    total = Estimate(0, 0, 0, 0)
    undecided = 0
    for row in rows:
        if row.turns:
            total += _tries(row, 1, 0, 0, row.turns, max_tokens)
        if row.traces:
            made = _tries(row, 2, said, most_said, row.traces, max_tokens)
            undecided += not row.decided
            if not row.decided and undecided % 2:  # may restore, and is not expected to
                made = replace(made, requests=0, prompt=0, completion=0)
            total += made
    return total


def _tries(row: Asked, pictures: int, said: int, most_said: int, tries: int, max_tokens: int) -> Estimate:
    shown = pictures * picture_tokens(row.size)
    again = (
        max_tokens + COMPLAINT
    )  # a failed reply stands in the request after it; the first of these may be one
    most = MOST_SYSTEM + 2 * row.text // FEWEST_BYTES + 2 * shown + most_said + again
    prompt = SYSTEM + row.text // BYTES_A_TOKEN + shown + said
    return Estimate(1, tries, prompt, REPLY, tries * most, tries * max_tokens)
