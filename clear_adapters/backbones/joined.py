"""Linear layers that read the same input, as one product.

A step of text is bound by reading weights, and each small product leaves a GPU idle before the next begins. The weights are laid
one behind the other in memory, so that the joined tensor is no copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear_adapters.lora_linear import LeanLinear, adapted_linear


class Joined(NamedTuple):
    """The layers as they were when they were joined, for as long as neither they nor their updates change.

    Base weights are shared; of updates the first factors are copied, and what is of another type.

    Attributes:
        weight: (outputs of all layers, inputs).
        bias: (outputs,), or None.
        first: (ranks of all layers, inputs), the first factors of their updates; None without LoRA.
        seconds: (outputs, rank) of each layer.
        scales: of each update.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    first: nn.Parameter | None = None
    seconds: tuple[nn.Parameter, ...] = ()
    scales: tuple[float, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """What the layers give of x (N, inputs), side by side. For passes without gradients."""
        if self.first is None:
            return F.linear(x, self.weight, self.bias)
        return adapted_linear(x, self.weight, self.bias, self.first, list(self.seconds), list(self.scales))


@torch.inference_mode(False)  # the weights outlive the caller's mode, and may be trained
@torch.no_grad()
def join(layers: Sequence[nn.Module]) -> Joined | None:
    """Layers as one product; None where they cannot be: quantized or sharded, or some adapted and others not.

    Base weights that do not yet lie one behind the other are moved there; they keep their values and stay the same parameters.
    """
    adapted = [layer for layer in layers if isinstance(layer, LeanLinear) and not layer.disable_adapters]
    plain: list[Any] = [layer.base_layer if isinstance(layer, LeanLinear) else layer for layer in layers]
    if not _can_join(layers, plain, adapted):
        return None
    weights, biases = [layer.weight for layer in plain], [layer.bias for layer in plain]
    bias = None if biases[0] is None else _fixed(_side_by_side(biases))
    joined = Joined(_fixed(_side_by_side(weights)), bias)
    if not adapted:
        return joined
    dtype = weights[0].dtype
    pairs = [(layer, layer.active_adapters[0]) for layer in adapted]
    return joined._replace(
        first=_fixed(torch.cat([a.lora_A[n].weight.to(dtype) for a, n in pairs])),
        seconds=tuple(_fixed(a.lora_B[n].weight.to(dtype)) for a, n in pairs),
        scales=tuple(float(a.scaling[n]) for a, n in pairs),
    )


def _can_join(layers: Sequence[nn.Module], plain: Sequence[Any], adapted: Sequence[LeanLinear]) -> bool:
    if len(adapted) not in (0, len(layers)) or not all(layer.is_plain() for layer in adapted):
        return False
    if any(isinstance(layer, LeanLinear) and layer.merged for layer in layers):
        return False  # PEFT takes such an update out before it computes
    if any(type(layer) is not nn.Linear for layer in plain):
        return False
    first, alike = plain[0], {(layer.weight.dtype, layer.weight.device) for layer in plain}
    if len(alike) > 1 or any((layer.bias is None) != (first.bias is None) for layer in plain):
        return False
    # Shards are of another type.
    return all(type(layer.weight) is nn.Parameter and type(layer.weight.data) is Tensor for layer in plain)


def _fixed(x: Tensor) -> nn.Parameter:
    """As a parameter: the compiler takes the shapes of those as given."""
    return nn.Parameter(x.detach(), requires_grad=False)


def _side_by_side(parts: Sequence[nn.Parameter]) -> Tensor:
    """One tensor, of which the parts are views."""
    first = parts[0]
    shape = (sum(len(p) for p in parts), *first.shape[1:])
    follow = all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.storage_offset() + a.numel() == b.storage_offset()
        for a, b in pairwise(parts)
    )
    if follow and all(p.is_contiguous() for p in parts):
        return first.data.as_strided(shape, first.stride(), first.storage_offset())
    whole = torch.cat([p.data for p in parts])
    for part, place in zip(parts, whole.split([len(p) for p in parts]), strict=True):
        part.data = place
    return whole
