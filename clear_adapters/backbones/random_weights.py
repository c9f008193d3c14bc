"""Random weights for small models, of a size at which attention and heads tell tokens apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def drawn(make: Callable[[], Any], seed: int) -> Any:
    """A model of transformers for inference, with random weights from a seed; leaves the global seed alone.

    Args:
        make: gives the model.
        seed: of its weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else parameter.shape[1] ** -0.5)
    return model.eval()
