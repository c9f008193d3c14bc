"""Which fast ways are taken where. Each gives what the plain way gives, but for the order of its roundings.

The plain ways stay what a CPU takes, so that its numbers do not move; a test takes every fast way on a CPU and compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

WAYS = {
    "lora": "LoRA added into the output of its layer by the product itself",
    "rows": "flow steps that attend row by row, without mask, holes and repeated heads",
    "products": "one token's attention as two products, spread over the context, in 16-bit types",
    "last": "the last token of a turn read by the captured step",
    "spans": "long rows of training that attend block by block instead of with a mask",
    "place": "rotary embedding written in place",
}
"""What they are."""

PROVEN = frozenset({"lora", "rows", "products", "last", "spans", "place"})
"""Those whose tests have passed on a GPU (`pytest -m gpu`); the others are taken inside `switched` only."""

_DEVICES: dict[str, frozenset[str]] = {way: frozenset({"cuda"} if way in PROVEN else ()) for way in WAYS}


def takes(way: str, device: torch.device) -> bool:
    """Whether a way is taken on a device."""
    return device.type in _DEVICES[way]


@contextmanager
def switched(*ways: str, on: bool) -> Iterator[None]:
    """Takes some ways on every device, or on none, in the body: for tests, and to measure what each is worth."""
    before = {way: _DEVICES[way] for way in ways}
    for way in ways:
        _DEVICES[way] = frozenset({"cuda", "cpu", "mps"}) if on else frozenset()
    try:
        yield
    finally:
        _DEVICES.update(before)
