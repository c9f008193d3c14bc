"""What a teacher will cost, told before the first call. Estimates in round numbers: services count as they please."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clear_adapters.datasets.builder.teachers import SIDE

LETTERS_A_TOKEN = 4
"""English text, roughly."""
PIXELS_A_TOKEN = 750
"""Of a picture. Services differ by a factor of two."""
REPLY = 250
"""Tokens of a trace. The paper gives mean lengths of 606 and 1,080 for the two paths, most likely in letters."""
SYSTEM = 350
"""Tokens of the system prompt."""


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
    """

    requests: int
    most: int
    prompt: int
    completion: int

    def __add__(self, other: Estimate) -> Estimate:
        """Both."""
        return Estimate(
            self.requests + other.requests,
            self.most + other.most,
            self.prompt + other.prompt,
            self.completion + other.completion,
        )

    def price(self, prices: Prices) -> tuple[float, float]:
        """What it costs where every first try is taken, and where every row takes all its tries."""
        least = (self.prompt * prices.prompt + self.completion * prices.completion) / 1e6
        return least, least * (self.most / self.requests if self.requests else 1)

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


def estimate(rows: Sequence[tuple[int, tuple[int, int]]], pictures: int, tries: int) -> Estimate:
    """Estimates one request a row.

    Args:
        rows: letters of question and answer, and the size of the picture (width, height).
        pictures: pictures in a request.
        tries: how often a row may be asked for.
    """
    prompt = sum(
        SYSTEM + letters // LETTERS_A_TOKEN + pictures * picture_tokens(size) for letters, size in rows
    )
    return Estimate(len(rows), len(rows) * tries, prompt, REPLY * len(rows))
