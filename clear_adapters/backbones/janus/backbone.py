"""Janus's verbs: what its own modules add to the families of codes, and the loading of its checkpoints."""
# ruff: noqa: D102  (the verbs are documented in backbones/base.py and backbones/codes.py)

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from transformers import AutoTokenizer, JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.janus.modeling_janus import JanusModel, JanusVisionModel, JanusVQVAE

from clear_adapters.backbones.checkpoints import (
    check_attention,
    folder_config,
    inference,
    load_transformers,
)
from clear_adapters.backbones.codes import CodesBackbone
from clear_adapters.backbones.janus.frames import JanusFrames
from clear_adapters.backbones.janus.images import JanusImages
from clear_adapters.backbones.janus.spec import SPEC
from clear_adapters.backbones.packed import PreparedImage
from clear_adapters.backbones.pixels import standardise
from clear_adapters.errors import ClearValueError

_UNQUANTIZED = (
    *("lm_head", "model.vision_model", "model.aligner", "model.vqmodel"),
    *("model.generation_embeddings", "model.generation_aligner", "model.generation_head"),
)
_WHOLE = (
    "load the whole model: JanusForConditionalGeneration.from_pretrained('deepseek-community/Janus-Pro-1B')"
)


class JanusBackbone(CodesBackbone):
    """A loaded Janus: model, tokenizer, picture processor."""

    spec = SPEC
    model: JanusForConditionalGeneration
    frames: JanusFrames

    def __init__(
        self, model: JanusForConditionalGeneration, tokenizer: Any, images: JanusImageProcessorPil
    ) -> None:
        """Makes the verbs.

        Args:
            model: the network; it is put to use as it is.
            tokenizer: of its checkpoint.
            images: of its checkpoint.

        Raises:
            CheckpointError: the tokenizer lacks a mark of Janus.
            ClearValueError: the model's attention cannot take masks, or the processor's pictures do not fit the model.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.frames = JanusFrames.of(tokenizer)
        config = model.config
        check_attention(model.model.language_model.config)
        self._images = JanusImages(images, int(config.vision_config.patch_size))
        if self._images.side != config.vision_config.image_size:
            raise ClearValueError(
                f"the processor makes pictures of {self._images.side} px, but the model takes "
                f"{config.vision_config.image_size} px: pass the processor of the same checkpoint"
            )
        self._latent_width = int(config.vq_config.embed_dim)
        self._cells = int(config.vq_config.num_patches)

    # -- facts

    @property
    def decoder(self) -> Any:
        return self.model.model.language_model

    @property
    def latent_width(self) -> int:
        return self._latent_width

    @classmethod
    def accepts(cls, model: Any) -> bool:
        return isinstance(model, JanusForConditionalGeneration)

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return folder_config(folder).get("model_type") == "janus"

    @classmethod
    def near_miss(cls, what: Any) -> str | None:
        if isinstance(what, Path):
            kind = folder_config(what).get("model_type")
            if kind == "multi_modality":
                return (
                    f"{what} is a Janus in the layout of the deepseek-ai repositories, which needs remote code: load the "
                    "converted one, such as deepseek-community/Janus-Pro-1B"
                )
            if kind in ("janus_vision_model", "janus_vqgan"):
                return f"{what} holds a part of a Janus ({kind}) alone: {_WHOLE}"
            return None
        if isinstance(what, JanusModel | JanusVisionModel | JanusVQVAE):
            return f"{type(what).__name__} is a part of a Janus that cannot answer: {_WHOLE}"
        if type(what).__name__ in ("LlamaModel", "LlamaForCausalLM"):
            return f"{type(what).__name__} reads text only; if it is the language model of a Janus, {_WHOLE}"
        return None

    @classmethod
    def load(
        cls,
        folder: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        quantization: str | None = None,
    ) -> JanusBackbone:
        """Loads a folder as `save_pretrained` of model and processor writes it.

        Raises:
            ClearValueError: the quantization is unknown, or bitsandbytes is missing.
            CheckpointError: the folder does not hold a whole Janus.
        """
        model, (tokenizer, images) = load_transformers(
            folder,
            JanusForConditionalGeneration,
            (AutoTokenizer, JanusImageProcessorPil),
            dtype,
            device,
            _WHOLE,
            quantization,
            _UNQUANTIZED,
        )
        return cls(model, tokenizer, images)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        JanusProcessor(
            self._images.processor, self.tokenizer, num_image_tokens=self._cells**2
        ).save_pretrained(folder)

    @classmethod
    def wrap(cls, model: Any, processor: Any) -> JanusBackbone:
        """The verbs over a `JanusForConditionalGeneration`.

        Args:
            model: the model.
            processor: its `JanusProcessor`.

        Raises:
            ClearValueError: it is none, or does not fit the model.
        """
        if not isinstance(processor, JanusProcessor):
            raise ClearValueError(
                f"a Janus needs its processor, not {type(processor).__name__}: pass processor=JanusProcessor.from_pretrained("
                "...), or pass a name or a folder"
            )
        kept = processor.image_processor.to_dict()
        names = ("size", "image_mean", "image_std", "min_size", "resample", "rescale_factor")
        return cls(model, processor.tokenizer, JanusImageProcessorPil(**{n: kept[n] for n in names}))

    # -- text

    def encode_text(self, text: str) -> Tensor:
        # A mark that stands in somebody's text is text: read as a token it would end the block.
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return torch.tensor(ids, dtype=torch.int64)

    def decode_text(self, ids: Tensor | Sequence[int]) -> str:
        values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        marks = {self.frames.bos, self.frames.end, self.frames.image_start, self.frames.image_end}
        return str(self.tokenizer.decode([i for i in values if i not in marks]))

    def text_logits(self, states: Tensor) -> Tensor:
        return self.model.lm_head(states)

    # -- pictures

    def prepare(self, image: Image) -> PreparedImage:
        return self._images.prepare(image)

    def latent_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The same for every picture: it stands in a square."""
        return self._cells, self._cells

    def picture_grids(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.latent_grid(size), self._images.grid

    def see(self, patches: Tensor) -> Tensor:
        pixels = standardise(patches, self._images.processor).to(self.dtype)
        with inference(self.model.model.vision_model):
            return self.model.model.get_image_features(pixels).pooler_output

    def tokenise(self, pixels: Tensor) -> Tensor:
        """The nearest codes by angle, as the tokenizer was trained and as `decode` reads them.

        transformers' own `encode` compares raw lengths, which picks other codes (the original normalises both sides).
        """
        vq = self.model.model.vqmodel
        weight = vq.quantize.embedding.weight
        with inference(vq):
            z = vq.quant_conv(vq.encoder((pixels.float() / 127.5 - 1).to(weight.dtype)))
        z = F.normalize(z.permute(0, 2, 3, 1).flatten(1, 2).float(), dim=-1)
        return (z @ F.normalize(weight.float(), dim=-1).T).argmax(-1)

    def code_pixels(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        with inference(self.model.model.vqmodel):
            return self.model.model.vqmodel.decode(codes).float()

    # -- codes

    def embed_codes(self, codes: Tensor) -> Tensor:
        return self.model.model.generation_embeddings(codes)

    def embed_latents(self, latents: Tensor) -> Tensor:
        aligner = self.model.model.generation_aligner
        return aligner(latents.to(self.dtype))

    def code_logits(self, states: Tensor) -> Tensor:
        return self.model.model.generation_head(states)

    def mix_codes(self, weights: Tensor) -> Tensor:
        return weights @ self.model.model.generation_embeddings.weight.float()
