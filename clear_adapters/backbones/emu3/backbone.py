"""Emu3's verbs: one vocabulary for text and pictures, and the loading of its checkpoints."""
# ruff: noqa: D102  (the verbs are documented in backbones/base.py and backbones/codes.py)

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from transformers import AutoTokenizer, Emu3ForConditionalGeneration, Emu3Processor
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor, smart_resize
from transformers.models.emu3.modeling_emu3 import Emu3ForCausalLM, Emu3Model, Emu3TextModel, Emu3VQVAE

from clear_adapters.backbones.checkpoints import (
    check_attention,
    folder_config,
    inference,
    load_transformers,
)
from clear_adapters.backbones.codes import CodesBackbone
from clear_adapters.backbones.emu3.frames import Emu3Frames
from clear_adapters.backbones.emu3.spec import SPEC
from clear_adapters.backbones.packed import PreparedImage
from clear_adapters.backbones.pixels import from_standard, standardise
from clear_adapters.errors import CheckpointError, ClearValueError

_WHOLE = "load the whole model: Emu3ForConditionalGeneration.from_pretrained('BAAI/Emu3-Chat-hf')"
_UNQUANTIZED = ("lm_head", "model.vqmodel")
_PARTS = ("emu3_text_model", "emu3_vqgan")


class _Index:
    """Token ids where they are used, copied there once: a copy for each token would stall the device."""

    def __init__(self, values: Sequence[int]) -> None:
        self.host = torch.tensor(values)
        self._placed = self.host

    def on(self, device: torch.device) -> Tensor:
        """(n,) int64 on a device."""
        if self._placed.device != device:
            self._placed = self.host.to(device)
        return self._placed

    def __reduce__(self) -> tuple[type[_Index], tuple[list[int]]]:
        """For data workers: without what lies on a device."""
        return _Index, (self.host.tolist(),)


class Emu3Backbone(CodesBackbone):
    """A loaded Emu3: model, tokenizer, picture processor."""

    spec = SPEC
    model: Emu3ForConditionalGeneration
    frames: Emu3Frames

    def __init__(
        self, model: Emu3ForConditionalGeneration, tokenizer: Any, images: Emu3ImageProcessor
    ) -> None:
        """Makes the verbs.

        Args:
            model: the network; it is put to use as it is.
            tokenizer: of its checkpoint.
            images: of its checkpoint.

        Raises:
            CheckpointError: tokenizer or vocabulary map lack marks or codes of Emu3.
            ClearValueError: the model's attention cannot take masks, or the processor's grid is not the model's.
        """
        self.model = model
        self.tokenizer = tokenizer
        config = model.config
        check_attention(config.text_config)
        self.frames = Emu3Frames.of(tokenizer, config.vocabulary_map)
        self._images = images
        self._cell = 2 ** (len(config.vq_config.channel_multiplier) - 1)
        if images.spatial_factor != self._cell:
            raise ClearValueError(
                f"the processor's spatial_factor is {images.spatial_factor}, but the model has a code for {self._cell} pixels: "
                "pass the processor of the same checkpoint"
            )
        found = {n: i for n, i in config.vocabulary_map.items() if n.startswith("<|visual token")}
        own = [i for _, i in sorted(found.items(), key=lambda item: int(item[0][-8:-2]))]
        if len(own) != config.vq_config.codebook_size:
            raise CheckpointError(
                f"config.vocabulary_map names {len(own)} visual tokens for a codebook of {config.vq_config.codebook_size}: it "
                "is damaged, or of another checkpoint"
            )
        self._ids = _Index(own)
        # In the released vocabulary they stand in a row: their weights are then a view.
        self._range = slice(own[0], own[-1] + 1) if own == list(range(own[0], own[-1] + 1)) else None
        self._banned = _Index(sorted({*own, *self.frames.grammar}))
        self._latent_width = int(config.text_config.hidden_size)

    # -- facts

    @property
    def decoder(self) -> Any:
        return self.model.model.text_model

    @property
    def latent_width(self) -> int:
        """D: a code is embedded as a token of the vocabulary."""
        return self._latent_width

    @classmethod
    def accepts(cls, model: Any) -> bool:
        return isinstance(model, Emu3ForConditionalGeneration)

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return folder_config(folder).get("model_type") == "emu3"

    @classmethod
    def near_miss(cls, what: Any) -> str | None:
        if isinstance(what, Path):
            kind = folder_config(what).get("model_type")
            if kind == "Emu3":
                return (
                    f"{what} is an Emu3 in its first layout, which needs remote code: load the converted one, such as "
                    "BAAI/Emu3-Chat-hf"
                )
            return f"{what} holds a part of an Emu3 ({kind}) alone: {_WHOLE}" if kind in _PARTS else None
        if isinstance(what, Emu3ForCausalLM | Emu3Model | Emu3TextModel | Emu3VQVAE):
            return f"{type(what).__name__} is a part of an Emu3, without its picture tokens or its head: {_WHOLE}"
        return None

    @classmethod
    def load(
        cls,
        folder: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        quantization: str | None = None,
    ) -> Emu3Backbone:
        """Loads a folder as `save_pretrained` of model and processor writes it.

        Raises:
            ClearValueError: the quantization is unknown, or bitsandbytes is missing.
            CheckpointError: the folder does not hold a whole Emu3.
        """
        model, (tokenizer, images) = load_transformers(
            folder,
            Emu3ForConditionalGeneration,
            (AutoTokenizer, Emu3ImageProcessor),
            dtype,
            device,
            _WHOLE,
            quantization,
            _UNQUANTIZED,
        )
        return cls(model, tokenizer, images)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        Emu3Processor(self._images, self.tokenizer).save_pretrained(folder)

    @classmethod
    def wrap(cls, model: Any, processor: Any) -> Emu3Backbone:
        """The verbs over an `Emu3ForConditionalGeneration`.

        Args:
            model: the model.
            processor: its `Emu3Processor`.

        Raises:
            ClearValueError: it is none, or does not fit the model.
        """
        if not isinstance(processor, Emu3Processor):
            raise ClearValueError(
                f"an Emu3 needs its processor, not {type(processor).__name__}: pass processor=Emu3Processor.from_pretrained("
                "...), or pass a name or a folder"
            )
        return cls(model, processor.tokenizer, processor.image_processor)

    # -- text

    def encode_text(self, text: str) -> Tensor:
        # A mark that stands in somebody's text is text: read as a token it would end the block.
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return torch.tensor(ids, dtype=torch.int64)

    def decode_text(self, ids: Tensor | Sequence[int]) -> str:
        values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        marks = {self.frames.bos, self.frames.end}
        return str(self.tokenizer.decode([i for i in values if i not in marks]))

    def text_logits(self, states: Tensor) -> Tensor:
        """Codes and the tokens between them are no text."""
        logits: Tensor = self.model.lm_head(states)
        return logits.index_fill(-1, self._banned.on(self.device), float("-inf"))

    # -- pictures

    def prepare(self, image: Image) -> PreparedImage:
        made = self._images(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        pixels = made["pixel_values"].flatten(0, -4)[0].to(torch.uint8)
        return PreparedImage(pixels, pixels, self.latent_grid(tuple(pixels.shape[-2:])))

    def latent_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self._cell, size[1] // self._cell

    def picture_grids(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        made = self._images
        if made.do_resize:
            size = smart_resize(*size, made.spatial_factor, made.min_pixels, made.max_pixels)
        grid = self.latent_grid(size)
        return grid, grid

    def tokenise(self, pixels: Tensor) -> Tensor:
        values = standardise(pixels, self._images).to(self.dtype)
        sizes = [tuple(pixels.shape[-2:])] * len(pixels)
        with inference(self.model.model.vqmodel):
            codes = self.model.model.vqmodel.encode(values, sizes, return_dict=True).image_tokens
        return torch.stack(list(codes)).flatten(1)

    def code_pixels(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        with inference(self.model.model.vqmodel):
            pixels = self.model.model.vqmodel.decode(codes.view(-1, *grid))
        return from_standard(pixels, self._images)

    # -- codes

    def embed_codes(self, codes: Tensor) -> Tensor:
        return self.decoder.embed_tokens(self._ids.on(self.device)[codes])

    def embed_latents(self, latents: Tensor) -> Tensor:
        return latents.to(self.dtype)

    def _of_codes(self, weight: Tensor) -> Tensor:
        """The rows of a table over the vocabulary that belong to codes."""
        return (
            weight[self._range]
            if self._range is not None
            else weight.index_select(0, self._ids.on(self.device))
        )

    def code_logits(self, states: Tensor) -> Tensor:
        """Of the codes alone: over the whole vocabulary a picture's logits would be several times as large."""
        head: Any = self.model.lm_head
        base = getattr(head, "base_layer", head)
        logits = F.linear(states, self._of_codes(base.weight))
        if head is not base and not head.disable_adapters and not head.merged:
            for name in head.active_adapters:
                low = head.lora_A[name](head.lora_dropout[name](states.to(head.lora_A[name].weight.dtype)))
                up = self._of_codes(head.lora_B[name].weight)
                logits = logits + (F.linear(low, up) * head.scaling[name]).to(logits.dtype)
        return logits

    def mix_codes(self, weights: Tensor) -> Tensor:
        return weights @ self._of_codes(self.decoder.embed_tokens.weight).float()
