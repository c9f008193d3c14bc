"""Running the decoder layers of a transformers language model over embeddings, with this library's cache or without.

The model's own `forward` numbers positions by what its cache holds, drops that cache where activations are recomputed, and
gives the last layer's states after the norm only. Its layers are used as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from clear_adapters.backbones.attention import any_shape


class KeyValues(Protocol):
    """What a pass needs of a cache."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts (B, H, L, d) behind what is read and gives all keys and values, (B, H, K, d)."""
        ...


class _Update:
    """A cache as the layers of transformers ask for it."""

    def __init__(self, held: KeyValues) -> None:
        self._held = held

    def update(self, keys: Tensor, values: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        return self._held.append(layer, keys, values)


def _forward_with(cache: KeyValues, kind: type[torch.nn.Module]) -> Callable[..., Any]:
    """The own forward of a kind of layer with our cache, past everything that transformers put around it.

    Around it are hooks, what `compile` made (each length is a shape of its own), and the recomputing of activations, which would
    drop the cache. Its name changed after transformers 5.23, and a name that is not known is ignored.
    """
    forward = inspect.unwrap(kind.forward)
    name = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
    return partial(forward, **{name: _Update(cache)})


@any_shape()
def run_layers(
    decoder: Any,
    embeds: Tensor,
    positions: Tensor,
    mask: Tensor,
    cache: KeyValues | None = None,
    hidden_layers: tuple[int, ...] = (),
) -> tuple[Tensor, dict[int, Tensor]]:
    """All layers and the final norm.

    Args:
        decoder: with `layers`, `norm` and `rotary_emb`, as LlamaModel has them.
        embeds: (B, L, D).
        positions: (B, L) int64.
        mask: (B, 1, L, K) bool, True where seen.
        cache: read and written; None without.
        hidden_layers: layers whose output is asked for.

    Returns:
        States (B, L, D) after the norm, and by layer the output before it.
    """
    if decoder.config._attn_implementation == "eager":
        mask = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, torch.finfo(embeds.dtype).min)
    kept: dict[int, Tensor] = {}
    rotary = decoder.rotary_emb(embeds, position_ids=positions)
    states = embeds
    own = None if cache is None else _forward_with(cache, type(decoder.layers[0]))
    for i, layer in enumerate(decoder.layers):
        given = {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary}
        states = layer(states, **given) if own is None else own(layer, states, **given)
        if i in hidden_layers:
            kept[i] = states
    return decoder.norm(states), kept
