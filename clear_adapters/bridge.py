"""The latent bridge: a restoration's latent as embeddings that the language model reads as context.

It starts as the backbone's own way back in (BAGEL: `vae2llm` at t = 0) and adds a residual that is zero at first,
so an untrained bridge changes nothing. The released code has no bridge weights
at all; a residual lets stage 2 train the reading without moving what the generator shares with it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear_adapters.errors import ClearValueError


@dataclass(frozen=True)
class BridgeConfig:
    """Sizes of a bridge.

    Attributes:
        latent_width: C, of a latent token or code embedding.
        width: D, of the language model.
        hidden: width of the residual's inner layer.

    Raises:
        ClearValueError: a size below 1.
    """

    latent_width: int
    width: int
    hidden: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ClearValueError(f"bridge {name}={value!r}: a size must be a whole number of at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `clear_config.json`."""
        return asdict(self)


class LatentBridge(nn.Module):
    """`native + up(silu(down([latent; norm(native)])))`, with `up` zero at first."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self.config = config
        self.down = nn.Linear(config.latent_width + config.width, config.hidden)
        self.up = nn.Linear(config.hidden, config.width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """An untrained bridge again, its inner weights drawn from a seed; global random numbers stay as they are."""
        generator = torch.Generator().manual_seed(seed)
        bound = self.down.in_features**-0.5
        for parameter in self.down.parameters():
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
        for parameter in self.up.parameters():
            parameter.zero_()

    def forward(self, latent: Tensor, native: Tensor) -> Tensor:
        """Embeddings that the language model reads.

        Args:
            latent: (..., C), any floating type.
            native: (..., D), the backbone's own embedding of it, position and time included.

        Returns:
            (..., D) in native's type.
        """
        weight = self.down.weight
        seen = torch.cat(
            (latent.to(weight.dtype), F.layer_norm(native.to(weight.dtype), native.shape[-1:])), dim=-1
        )
        return native + self.up(F.silu(self.down(seen))).to(native.dtype)


def new_bridge(config: BridgeConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> LatentBridge:
    """An untrained bridge in float32 with random inner weights from a seed; global random numbers stay as they are."""
    with torch.device("meta"):
        bridge = LatentBridge(config)
    bridge.to_empty(device=device)
    bridge.initialise(seed)
    return bridge
