"""The FLUX autoencoder: diffusers' `AutoencoderKL` behind the official checkpoint's names, and latent tokens."""

from __future__ import annotations

import re

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor

from clear_adapters.backbones.attention import any_shape
from clear_adapters.backbones.bagel.config import AutoencoderConfig
from clear_adapters.backbones.bagel.images import normalise

_SIDES = ("encoder.", "decoder.")

_PIXELS = 8 * 1024**2
"""Pixels that go through the autoencoder at once: its activations take some hundred times their size."""


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """The class of diffusers at the sizes of a FLUX-type autoencoder (no quantisation convolutions)."""
    channels = tuple(config.ch * m for m in config.ch_mult)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.scale_factor,
        shift_factor=config.shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def is_autoencoder_key(name: str) -> bool:
    """Whether an official tensor name belongs to the autoencoder."""
    return name.startswith(_SIDES)


def official_keys(autoencoder: AutoencoderKL) -> dict[str, str]:
    """Official name to diffusers' name, for every parameter of an autoencoder."""
    levels = len(autoencoder.config.block_out_channels)
    mapping: dict[str, str] = {}
    for key in autoencoder.state_dict():
        name = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.(resnets|upsamplers)", lambda m: f"up.{levels - 1 - int(m[1])}.{m[2]}", name
        )
        name = name.replace("upsamplers.0", "upsample").replace(".resnets.", ".block.")
        name = re.sub(r"mid_block\.block\.([01])", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        if "mid.attn_1" in name:
            name = name.replace(".group_norm.", ".norm.").replace(".to_out.0.", ".proj_out.")
            name = re.sub(r"\.to_([qkv])\.", r".\1.", name)
        mapping[name] = key
    return mapping


def fit_shape(name: str, tensor: Tensor) -> Tensor:
    """The official attention weights are 1 x 1 convolutions; diffusers has them as linear layers."""
    if "mid.attn_1" in name and tensor.ndim == 4:
        return tensor[:, :, 0, 0]
    return tensor


def _rows(pixels: int) -> int:
    """Pictures of so many pixels that go through the autoencoder at once."""
    return max(1, _PIXELS // pixels)


@any_shape()
def encode_pixels(autoencoder: AutoencoderKL, pixels: Tensor, patch: int) -> Tensor:
    """Latent tokens of pictures: posterior mean, scaled, cut in patches (row, column, then channel last).

    Args:
        autoencoder: the frozen autoencoder.
        pixels: (n, 3, H, W) uint8, or floating in [-1, 1].
        patch: latent cells per side of a token.

    Returns:
        (n, N, patch * patch * channels) float32.
    """
    weight = autoencoder.encoder.conv_in.weight
    parts = pixels.split(_rows(pixels.shape[-2] * pixels.shape[-1]))
    with torch.no_grad():
        means = [
            autoencoder.encode(normalise(p.to(weight.device)).to(weight.dtype)).latent_dist.mean.float()
            for p in parts
        ]
    z = (torch.cat(means) - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
    return rearrange(z, "n c (h p) (w q) -> n (h w) (p q c)", p=patch, q=patch)


@any_shape()
def decode_tokens(autoencoder: AutoencoderKL, tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Pixels (n, 3, H, W) in [-1, 1] float32 of latent tokens (n, N, C) on a grid."""
    z = rearrange(
        tokens.float(), "n (h w) (p q c) -> n c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch
    )
    z = z / autoencoder.config.scaling_factor + autoencoder.config.shift_factor
    z = z.to(autoencoder.decoder.conv_in.weight.dtype)
    scale = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    with torch.no_grad():
        parts = z.split(_rows(z.shape[-2] * z.shape[-1] * scale**2))
        return torch.cat([autoencoder.decode(part).sample.float() for part in parts]).clamp(-1, 1)
