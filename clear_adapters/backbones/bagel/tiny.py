"""BAGEL at small sizes: a byte-level tokenizer, a random toy for tests, and the sizes of the built-in model."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast

from clear_adapters.backbones.bagel.autoencoder import build_autoencoder
from clear_adapters.backbones.bagel.backbone import BagelBackbone
from clear_adapters.backbones.bagel.config import AutoencoderConfig, BagelConfig, Resize
from clear_adapters.backbones.bagel.model import BagelModel, sincos_table
from clear_adapters.backbones.byte_tokenizer import byte_tokenizer

_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and BAGEL's four marks."""
    return byte_tokenizer(_MARKS, eos_token="<|im_end|>")


def small_config(
    *,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    vision_width: int,
    vision_layers: int,
    vision_heads: int,
    patch: int,
    side: int,
    ae: AutoencoderConfig,
) -> BagelConfig:
    """A BAGEL of chosen sizes whose pictures have a long side of at most `side` pixels."""
    stride = ae.downsample * 2
    return BagelConfig(
        llm={
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": 256 + len(_MARKS),
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        },
        vit={
            "model_type": "siglip_vision_model",
            "hidden_size": vision_width,
            "intermediate_size": vision_width * 4,
            "num_hidden_layers": vision_layers + 1,
            "num_attention_heads": vision_heads,
            "num_channels": 3,
            "patch_size": patch,
            "image_size": side,
        },
        vit_layers=vision_layers,
        vit_side=side // patch,
        latent_side=side // stride,
        ae=ae,
        vae_resize=Resize(side, min(side, 4 * stride), stride, side * side),
        vit_resize=Resize(side, min(side, 4 * patch), patch, side * side),
    )


def builtin_config() -> BagelConfig:
    """The sizes of `builtin:bagel-tiny`: pictures of 128 px, 64 latent tokens of 64 numbers, 256 patches."""
    return small_config(
        width=192,
        layers=6,
        heads=6,
        kv_heads=2,
        mlp=384,
        vision_width=128,
        vision_layers=4,
        vision_heads=4,
        patch=8,
        side=128,
        ae=AutoencoderConfig(ch=16, ch_mult=(1, 2, 3, 4), num_res_blocks=1, z_channels=16, norm_groups=8),
    )


def initialise(config: BagelConfig, seed: int) -> tuple[BagelModel, torch.nn.Module]:
    """A model with random weights from a seed, position tables in place; leaves the global seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, autoencoder = BagelModel(config), build_autoencoder(config.ae)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)
    with torch.no_grad():
        model.vit_pos_embed.pos_embed.copy_(sincos_table(config.vit_side, config.width))
        model.latent_pos_embed.pos_embed.copy_(sincos_table(config.latent_side, config.width))
    return model.eval(), autoencoder.eval().requires_grad_(False)


def toy_config(layers: int = 2) -> BagelConfig:
    """The sizes of the toy: pictures of 64 px."""
    return small_config(
        width=32,
        layers=layers,
        heads=4,
        kv_heads=2,
        mlp=48,
        vision_width=24,
        vision_layers=1,
        vision_heads=2,
        patch=8,
        side=64,
        ae=AutoencoderConfig(ch=8, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=4, norm_groups=4),
    )


def build(seed: int = 0, layers: int = 2) -> BagelBackbone:
    """The real classes at toy size with random weights, for the contract tests."""
    model, autoencoder = initialise(toy_config(layers), seed)
    return BagelBackbone(model, autoencoder, tokenizer())
