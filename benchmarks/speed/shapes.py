"""BAGEL with random weights, made where it runs: speed depends on shapes, not on what the weights say.

`7b` has the sizes of BAGEL-7B-MoT, filled on the device in its type in seconds; `small` is a tenth of it; `tiny` is the
test suite's toy, for a CPU. Tokens are bytes in all of them, in a vocabulary of the size's own.

Texts have exactly the length that is asked for: the end of a turn is all but never drawn, and what a turn says is told by
`Turns`, which stands in for the decoding of text: a thought that asks for a restoration, then an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from clear_adapters.backbones.bagel.autoencoder import build_autoencoder
from clear_adapters.backbones.bagel.backbone import BagelBackbone
from clear_adapters.backbones.bagel.checkpoint import LAYERS
from clear_adapters.backbones.bagel.config import BagelConfig
from clear_adapters.backbones.bagel.model import BagelModel, sincos_table
from clear_adapters.backbones.bagel.tiny import tokenizer, toy_config
from clear_adapters.backbones.quantized import check_quantization, quantize_layers
from clear_adapters.prompts import Protocol

REQUEST = "<think>Too dark to read.</think>\n<image_restore>"
ANSWER = "<think>Now it can be read.</think>\n<answer>seven</answer>"

_HEAD = 4.0
"""Spread of the logits: the end mark's own, 0, is then drawn once in hundreds of millions of tokens."""


class Turns(BagelBackbone):
    """BAGEL whose turns read as if they asked for a restoration, then answered.

    Attributes:
        rows: rows that write side by side.
        scripted: whether turns are told so; otherwise they read as what was written.
    """

    rows = 1
    scripted = False
    _decoded = 0

    def script(self, rows: int) -> None:
        """From now on: `rows` requests, `rows` answers, and so on."""
        self.rows, self.scripted, self._decoded = rows, True, 0

    def decode_text(self, ids: Tensor | Sequence[int]) -> str:
        """What the turn is to say."""
        if not self.scripted:
            return super().decode_text(ids)
        turn = self._decoded // self.rows
        self._decoded += 1
        return ANSWER if turn % 2 else REQUEST


def config_of(size: str, layers: int | None = None) -> BagelConfig:
    """The configuration of a size, `7b`, `small` or `tiny`; with so many layers of the language model instead of its own."""
    if layers is not None:
        own = config_of(size)
        return replace(own, llm={**own.llm, "num_hidden_layers": layers})
    if size == "tiny":
        return toy_config()
    llm: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    }
    vit: dict[str, Any] = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_channels": 3,
        "patch_size": 14,
        "image_size": 980,
    }
    whole = BagelConfig(llm=llm, vit=vit, vit_layers=26)
    if size == "7b":
        return whole
    return replace(
        whole,
        llm={**llm, "hidden_size": 1792, "intermediate_size": 6144, "num_attention_heads": 14}
        | {"num_key_value_heads": 2, "num_hidden_layers": 12},
        vit_layers=8,
    )


@torch.no_grad()
def build(
    size: str,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None = None,
    seed: int = 0,
    layers: int | None = None,
) -> Turns:
    """A backbone with random weights, without a copy of them anywhere else; quantized ones as they are made."""
    check_quantization(quantization)
    config = config_of(size, layers)
    with torch.device("meta"):
        model, autoencoder = BagelModel(config), build_autoencoder(config.ae)
    generator = torch.Generator(device).manual_seed(seed)
    makers = {} if quantization is None else quantize_layers(model, LAYERS, quantization, dtype)
    for part in (model, autoencoder):
        for name, parameter in list(part.named_parameters()):
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim > 1:
                spread = 1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5
                spread *= _HEAD if "lm_head" in name else 1.0
                values.normal_(0, spread, generator=generator)
            else:
                values.fill_(float("norm" in name and name.endswith("weight")))
            parent, _, leaf = name.rpartition(".")
            make = makers.get(name) if part is model else None
            made = nn.Parameter(values, parameter.requires_grad) if make is None else make(values, device)
            setattr(part.get_submodule(parent), leaf, made)
    model.vit_pos_embed.pos_embed.copy_(sincos_table(config.vit_side, config.width))
    model.latent_pos_embed.pos_embed.copy_(sincos_table(config.latent_side, config.width))
    autoencoder.requires_grad_(False)
    backbone = Turns(model.eval(), autoencoder.eval(), tokenizer())
    model.language_model.lm_head.weight[backbone.marks.end] = 0
    return backbone


def picture(side: int, seed: int = 0) -> Image.Image:
    """Noise of side x side pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def protocol(tokens: int) -> Protocol:
    """A system prompt of so many tokens, marks included."""
    return Protocol("speed", "1", text(tokens - 2))


def text(tokens: int) -> str:
    """A text of so many tokens."""
    words = "Look at the picture, say what can be made out in it, and answer. "
    return (words * (tokens // len(words) + 1))[:tokens]


def parameters(model: torch.nn.Module) -> int:
    """Numbers in a module."""
    return sum(p.numel() for p in model.parameters())
