"""The pure parts of a group-relative policy loss: advantages, clipped ratios, and the k3 estimate of a KL."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def advantages(totals: Tensor, scale: Literal["group", "none"]) -> Tensor:
    """`(R - mean) / std` in each group, or `R - mean`.

    Args:
        totals: (P, G) rewards; NaN is a rollout without one, which takes no part.
        scale: whether to divide by the standard deviation. A group of equal rewards has advantage 0 either way.

    Returns:
        (P, G) float32, 0 where there is no reward.
    """
    known = ~totals.isnan()
    count = known.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(known, totals - totals.nansum(1, keepdim=True) / count, 0.0)
    # A mean of equal numbers need not be that number, and the deviation would make much of the difference.
    lowest, highest = totals.nan_to_num(float("inf")).amin(1), totals.nan_to_num(-float("inf")).amax(1)
    centred = torch.where((lowest < highest)[:, None], centred, 0.0)
    if scale == "none":
        return centred
    deviation = (centred.pow(2).sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centred / (deviation + 1e-4)


def clipped(logprob: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """`-min(r A, clip(r, 1 - e, 1 + e) A)` with the ratio `r = exp(logprob - old)`.

    Args:
        logprob: (N,) of the policy that is trained.
        old: (N,) of the policy that sampled.
        advantage: (N,)
        clip: e.

    Returns:
        (N,) loss, (N,) ratio without gradient, and (N,) 1 where the clipped form was the one that counted.
    """
    ratio = (logprob - old).exp()
    plain, bounded = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    return -torch.minimum(plain, bounded), ratio.detach(), (bounded < plain).float()


def k3(logprob: Tensor, reference: Tensor) -> Tensor:
    """`exp(d) - d - 1` with `d = reference - logprob`: an estimate of the KL to the reference that is never negative."""
    difference = reference - logprob
    return difference.exp() - difference - 1
