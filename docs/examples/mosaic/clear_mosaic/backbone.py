"""The verbs: what the family adds to those that all families of codes share."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clear_adapters.backbones.codes import CodesBackbone
from clear_adapters.backbones.layout import SLOT
from clear_adapters.backbones.packed import PreparedImage
from clear_adapters.errors import ClearValueError
from clear_mosaic.model import MosaicModel
from clear_mosaic.spec import SPEC


@dataclass(frozen=True)
class MosaicFrames:
    """What stands around blocks: `<s>`, text and a line break, `>` text `</s>`, `[` tiles `]`."""

    bos: int
    end: int
    line: int
    speaker: int
    open: int
    close: int

    @property
    def start(self) -> list[int]:
        return [self.bos]

    def text(self, own: bool) -> tuple[list[int], list[int]]:
        return ([self.speaker], [self.end]) if own else ([], [self.line])

    def restoration(self, grid: tuple[int, int]) -> list[int]:
        return [self.open, *[SLOT] * (grid[0] * grid[1]), self.close]

    condition = restoration

    def picture(self, count: int) -> list[int]:
        return []  # no encoder of its own: a picture is understood by its tiles


class MosaicBackbone(CodesBackbone):
    """A Mosaic with its tokenizer."""

    spec = SPEC
    model: MosaicModel

    def __init__(self, model: MosaicModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.frames = MosaicFrames(
            *tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<n>", "<p>", "<t>", "</t>"])
        )
        self._tile, self._side = model.tile, model.side

    @classmethod
    def accepts(cls, model: Any) -> bool:
        return isinstance(model, MosaicModel)

    @classmethod
    def load(cls, folder: str, **how: Any) -> "MosaicBackbone":
        raise ClearValueError("Mosaic has no checkpoints: attach clear_mosaic.tiny.build()")

    @classmethod
    def wrap(cls, model: MosaicModel, processor: Any) -> "MosaicBackbone":
        return cls(model, processor)

    @property
    def decoder(self) -> Any:
        return self.model.decoder

    @property
    def latent_width(self) -> int:
        return 3

    # -- text

    def encode_text(self, text: str) -> Tensor:
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return torch.tensor(ids, dtype=torch.int64)

    def decode_text(self, ids: Any) -> str:
        return self.tokenizer.decode([int(i) for i in ids if i not in (self.frames.bos, self.frames.end)])

    def text_logits(self, states: Tensor) -> Tensor:
        return self.model.text_head(states)

    # -- pictures

    def prepare(self, image: Image.Image) -> PreparedImage:
        scale = self._side / max(image.size)
        width, height = (max(1, round(s * scale / self._tile)) * self._tile for s in image.size)
        pixels = torch.frombuffer(bytearray(image.resize((width, height)).tobytes()), dtype=torch.uint8)
        pixels = pixels.view(height, width, 3).permute(2, 0, 1).contiguous()
        return PreparedImage(pixels, pixels, self.latent_grid((height, width)))

    def latent_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self._tile, size[1] // self._tile

    def tokenise(self, pixels: Tensor) -> Tensor:
        return self.model.nearest(pixels.float() / 127.5 - 1)

    def code_pixels(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        tiles = self.model.palette(codes).transpose(1, 2).unflatten(2, grid).float()
        return torch.nn.functional.interpolate(tiles, scale_factor=self._tile)

    # -- tiles

    def embed_codes(self, codes: Tensor) -> Tensor:
        return self.model.palette(codes)

    def embed_latents(self, latents: Tensor) -> Tensor:
        return self.model.tile_in(latents.to(self.dtype))

    def code_logits(self, states: Tensor) -> Tensor:
        return self.model.tile_head(states)

    def mix_codes(self, weights: Tensor) -> Tensor:
        return weights @ self.model.palette.weight.float()
