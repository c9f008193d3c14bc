"""Emu3 at small sizes: the real classes with random weights, for tests."""

from __future__ import annotations

from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3Processor
from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

from clear_adapters.backbones.byte_tokenizer import byte_tokenizer
from clear_adapters.backbones.emu3.backbone import Emu3Backbone
from clear_adapters.backbones.random_weights import drawn

CODES = 40
_SPECIAL = {
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}
_BOS, _EOS, _PAD = "<|extra_203|>", "<|extra_204|>", "<|endoftext|>"
MARKS = (
    *(_BOS, _EOS, _PAD, *_SPECIAL.values(), "<|extra_200|>"),
    *(f"<|visual token {i:06d}|>" for i in range(CODES)),
)


def small_processor(least: int, most: int) -> Emu3Processor:
    """A processor for pictures of so many pixels, with a code for 8 x 8 of them."""
    tokenizer = byte_tokenizer(
        MARKS, bos_token=_BOS, eos_token=_EOS, pad_token=_PAD, extra_special_tokens=_SPECIAL
    )
    return Emu3Processor(Emu3ImageProcessor(min_pixels=least, max_pixels=most, spatial_factor=8), tokenizer)


def small_config(*, width: int, layers: int, heads: int, kv_heads: int, mlp: int) -> Emu3Config:
    """An Emu3 of chosen sizes."""
    ids = {m: 256 + i for i, m in enumerate(MARKS)}
    vocabulary = {
        m: i for m, i in ids.items() if m.startswith("<|visual") or m in ("<|extra_200|>", "<image>")
    }
    return Emu3Config(
        text_config=Emu3TextConfig(
            vocab_size=256 + len(MARKS),
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=4096,
            attention_dropout=0.0,
            bos_token_id=ids[_BOS],
            eos_token_id=ids[_EOS],
            pad_token_id=ids[_PAD],
        ),
        vq_config=Emu3VQVAEConfig(
            codebook_size=CODES,
            embed_dim=4,
            latent_channels=4,
            base_channels=32,
            channel_multiplier=[1, 1, 1, 1],
            num_res_blocks=1,
            attn_resolutions=[3],
            hidden_size=32,
            temporal_downsample_factor=1,
        ),
        vocabulary_map=vocabulary,
    )


def build(seed: int = 0, layers: int = 2) -> Emu3Backbone:
    """The real classes at toy size with random weights, for the contract tests."""
    config = small_config(width=32, layers=layers, heads=4, kv_heads=2, mlp=48)
    model = drawn(lambda: Emu3ForConditionalGeneration(config), seed)
    return Emu3Backbone.wrap(model, small_processor(24 * 24, 32 * 32))
