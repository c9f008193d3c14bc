"""How near a restoration is to the clean picture, as the released code measures it; the paper has no such reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor

from clear_adapters.errors import ClearValueError, unknown_name

MODES: Final[Mapping[str, Mapping[str, float]]] = {
    "vae": {"mse": 0.3, "whole": 0.3, "tokens": 0.4},
    "vit": {"features": 1.0},
    "both": {"mse": 0.2, "whole": 0.2, "tokens": 0.3, "features": 0.3},
}
"""Weights of the measures by mode."""


def latent_quality(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    restored_latent: Sequence[Tensor | None] | None = None,
    clean_latent: Sequence[Tensor | None] | None = None,
    restored_features: Sequence[Tensor | None] | None = None,
    clean_features: Sequence[Tensor | None] | None = None,
    *,
    mode: str = "vae",
    mse_scale: float = 0.5,
    **columns: Any,
) -> list[float | None]:
    """Likeness of the restoration to the clean picture, from 0 to 1.

    With z and z' the two latents and cos⁺ = max(cos, 0): `mse = exp(-scale · mean((z - z')²))`,
    `whole = cos⁺(z, z')` over all numbers at once, `tokens` the mean of cos⁺ token by token, and `features` the cos⁺ of
    the understanding encoder's features, averaged over their tokens. `vae` is 0.3 mse + 0.3 whole + 0.4 tokens, `vit`
    features alone, `both` 0.2 mse + 0.2 whole + 0.3 tokens + 0.3 features.

    Args:
        prompts: what was asked; not read.
        completions: what the model wrote; not read.
        restored_latent: (N, C), or (1, N, C), of the restoration; None where there is none. For `vae` and `both`.
        clean_latent: the same of the clean picture on the same grid; None where it is not known.
        restored_features: (P, D) of the decoded restoration. For `vit` and `both`.
        clean_features: (P', D) of the clean picture.
        mode: one of `MODES`.
        mse_scale: the scale above.
        **columns: not read.

    Returns:
        A number for each rollout, None where something that the mode compares is missing.

    Raises:
        UnknownNameError: no such mode.
        ClearValueError: a column that the mode needs was not given, latents of different shapes, or a scale that is
            not positive.
    """
    if mode not in MODES:
        raise unknown_name("mode of latent quality", mode, MODES)
    if not mse_scale > 0:
        raise ClearValueError(f"mse_scale={mse_scale}: must be positive")
    weights, rows = MODES[mode], len(completions)
    latents: list[_Pair | None] = [None] * rows
    features: list[_Pair | None] = [None] * rows
    if "mse" in weights:
        latents = _pairs("latent", restored_latent, clean_latent)
    if "features" in weights:
        features = _pairs("features", restored_features, clean_features)
    rewards: list[float | None] = []
    for latent, feature in zip(latents, features, strict=True):
        measures: dict[str, float] = {}
        if latent is not None:
            measures |= _latent_measures(*latent, mse_scale)
        if feature is not None:
            measures["features"] = _likeness(feature[0].mean(0), feature[1].mean(0))
        known = measures.keys() == weights.keys()
        rewards.append(sum(weight * measures[name] for name, weight in weights.items()) if known else None)
    return rewards


_Pair = tuple[Tensor, Tensor]


def _pairs(
    what: str, restored: Sequence[Tensor | None] | None, clean: Sequence[Tensor | None] | None
) -> list[_Pair | None]:
    """The tensors to compare, (tokens, width) float32 on one device; None where one of them is missing."""
    if restored is None or clean is None:
        raise ClearValueError(
            f"this mode of latent quality needs the columns restored_{what} and clean_{what}"
        )
    pairs: list[_Pair | None] = []
    for ours, theirs in zip(restored, clean, strict=True):
        if ours is None or theirs is None:
            pairs.append(None)
        else:
            theirs = theirs.to(ours.device)
            pairs.append((ours.flatten(end_dim=-2).float(), theirs.flatten(end_dim=-2).float()))
    return pairs


def _latent_measures(restored: Tensor, clean: Tensor, scale: float) -> dict[str, float]:
    if restored.shape != clean.shape:
        # The released code cuts the longer one, which compares tokens of different places.
        raise ClearValueError(
            f"a restoration of shape {tuple(restored.shape)} cannot be compared with a clean latent of shape "
            f"{tuple(clean.shape)}: encode the clean picture at the restoration's size"
        )
    return {
        "mse": math.exp(-scale * float(F.mse_loss(restored, clean))),
        "whole": _likeness(restored.flatten(), clean.flatten()),
        "tokens": float(F.cosine_similarity(restored, clean, dim=-1).clamp(min=0).mean()),
    }


def _likeness(a: Tensor, b: Tensor) -> float:
    return max(0.0, float(F.cosine_similarity(a, b, dim=0)))
