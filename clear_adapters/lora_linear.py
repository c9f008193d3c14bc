"""PEFT's LoRA layer with a shorter way to its output.

Stock PEFT casts the input to the factors' type, makes the update in full width, scales it, adds it and casts back: five
passes over outputs that are the widest tensors of a network. Here the product with the second factor adds into the output
of the base layer, which is what the update costs then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from clear_adapters.backbones import fast


def add_low_rank(out: Tensor, low: Tensor, seconds: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Adds updates into the outputs of layers that stand side by side; for passes without gradients.

    Args:
        out: (N, outputs of all layers), changed in place.
        low: (N, ranks of all layers), the products with the first factors.
        seconds: (outputs, rank) of each layer.
        scales: of each update.
    """
    parts = out.split([len(s) for s in seconds], -1)
    lows = low.split([s.shape[1] for s in seconds], -1)
    for part, own, second, scale in zip(parts, lows, seconds, scales, strict=True):
        part.addmm_(own, second.t(), alpha=scale)


def _adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: Tensor,
    seconds: Sequence[Tensor],
    scales: Sequence[float],
) -> Tensor:
    out = F.linear(x, weight, bias)
    add_low_rank(out, F.linear(x, first), seconds, scales)
    return out


adapted_linear = torch.library.custom_op(
    "clear_adapters::adapted_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor first, Tensor[] seconds, float[] scales) -> Tensor",
)(_adapted_linear)
"""Layers of one input with their updates, (N, inputs) to (N, outputs of all layers); for passes without gradients.

The compiler does not look into it: it would take the sums out of place, and copy the widest tensors of a network for each.
"""


@adapted_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *update: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class LeanLinear(Linear):
    """A `peft.tuners.lora.Linear` of one adapter; what is not plain LoRA goes PEFT's own way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the update."""
        if args or kwargs or not fast.takes("lora", x.device) or not self.is_plain():
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        result: Tensor = self.base_layer(x)
        first, second = self.lora_A[name].weight, self.lora_B[name].weight
        # Autocast keeps its cast of a weight for the whole pass.
        if not torch.is_autocast_enabled(x.device.type):
            first = first.to(x.dtype)
        low = F.linear(x, first).to(result.dtype).reshape(-1, first.shape[0])
        second, scale = second.to(result.dtype), self.scaling[name]
        flat = result.view(-1, result.shape[-1])
        if not torch.is_grad_enabled():
            add_low_rank(flat, low, [second], [scale])
            return result
        if result.ndim == 2:
            return result.addmm_(low, second.t(), alpha=scale)
        return torch.addmm(flat, low, second.t(), alpha=scale).view(result.shape)

    def is_plain(self) -> bool:
        """Whether there is nothing but one LoRA update, of all inputs, beside a plain layer."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return False
        dropout = self.lora_dropout[active[0]] if active[0] in self.lora_A else None
        idle = isinstance(dropout, nn.Identity) or (isinstance(dropout, nn.Dropout) and not self.training)
        return idle and type(self.base_layer) is nn.Linear


def lean(layer: nn.Module) -> None:
    """Lets a layer of stock PEFT take the shorter way; other kinds (quantized ones) stay as they are."""
    if type(layer) is Linear:
        layer.__class__ = LeanLinear
