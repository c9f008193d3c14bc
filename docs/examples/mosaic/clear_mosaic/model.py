"""The network: any module will do, as long as its parts have names."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel


class MosaicModel(nn.Module):
    """A decoder with a head for text, and a way in and a head for tiles."""

    def __init__(self, config: LlamaConfig, colours: int, tile: int, side: int) -> None:
        super().__init__()
        self.config, self.tile, self.side = config, tile, side
        self.decoder = LlamaModel(config)
        self.text_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.palette = nn.Embedding(colours, 3)
        self.tile_in = nn.Linear(3, config.hidden_size)
        self.tile_head = nn.Linear(config.hidden_size, colours)

    def nearest(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, h w) colours of the tiles of pictures (n, 3, H, W) in [-1, 1]."""
        means = nn.functional.avg_pool2d(pixels, self.tile).flatten(2).transpose(1, 2)
        return torch.cdist(means, self.palette.weight.float()[None]).argmin(-1)
