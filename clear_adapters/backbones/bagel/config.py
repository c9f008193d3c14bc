"""Sizes and constants of a BAGEL model, read from a checkpoint folder in the official layout."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clear_adapters.errors import CheckpointError


@dataclass(frozen=True)
class Resize:
    """How a picture is brought to a size: the long side at most `max_size`, the short at least `min_size`.

    Attributes:
        max_size: pixels.
        min_size: pixels; wins over nothing but the pixel limit and `max_size`.
        stride: both sides become multiples of it.
        max_pixels: area limit.
    """

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024


@dataclass(frozen=True)
class AutoencoderConfig:
    """The FLUX autoencoder's constants; defaults are what the official code hard-codes."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    norm_groups: int = 32
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def downsample(self) -> int:
        """Pixels per latent cell."""
        return int(2 ** (len(self.ch_mult) - 1))


@dataclass(frozen=True)
class BagelConfig:
    """Everything that shapes a BAGEL model.

    Attributes:
        llm: the contents of `llm_config.json` (a Qwen2 configuration).
        vit: the contents of `vit_config.json` (a SigLIP configuration). The official file counts one layer more
            than the weights hold; `vit_layers` is what is used.
        vit_layers: encoder layers of the understanding encoder.
        vit_side: patches per side of the understanding position tables.
        latent_side: cells per side of the latent position table.
        latent_patch: latent cells per side of a latent token.
        ae: the autoencoder.
        vae_resize: how the generator's pictures are sized.
        vit_resize: how the understanding encoder's pictures are sized.
    """

    llm: dict[str, Any]
    vit: dict[str, Any]
    vit_layers: int
    vit_side: int = 70
    latent_side: int = 64
    latent_patch: int = 2
    ae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    vae_resize: Resize = field(default_factory=lambda: Resize(1024, 512, 16))
    vit_resize: Resize = field(default_factory=lambda: Resize(980, 224, 14))

    @property
    def width(self) -> int:
        """D of the language model."""
        return int(self.llm["hidden_size"])

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.width // int(self.llm["num_attention_heads"])

    @property
    def latent_width(self) -> int:
        """C, the width of a latent token."""
        return self.latent_patch**2 * self.ae.z_channels

    @property
    def patch(self) -> int:
        """Side of an understanding patch in pixels."""
        return int(self.vit["patch_size"])

    @classmethod
    def from_folder(cls, folder: Path, shapes: dict[str, tuple[int, ...]]) -> BagelConfig:
        """Reads the JSON files; sizes that the weights tell are taken from their shapes.

        Args:
            folder: checkpoint folder with `llm_config.json` and `vit_config.json`, and optionally
                `ae_config.json` (else the official constants) and `preprocessor_config.json` (else the official
                picture sizes).
            shapes: shape of every stored tensor.

        Raises:
            CheckpointError: a file or a key is missing or malformed.
        """
        llm = _read(folder / "llm_config.json", ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        vit = _read(folder / "vit_config.json", ("hidden_size", "patch_size", "num_attention_heads"))
        ae = AutoencoderConfig()
        if (folder / "ae_config.json").is_file():
            found = _read(folder / "ae_config.json", ("ch", "ch_mult", "num_res_blocks", "z_channels"))
            ae = AutoencoderConfig(
                ch=found["ch"],
                ch_mult=tuple(found["ch_mult"]),
                num_res_blocks=found["num_res_blocks"],
                z_channels=found["z_channels"],
                norm_groups=found.get("norm_groups", ae.norm_groups),
                scale_factor=found.get("scale_factor", ae.scale_factor),
                shift_factor=found.get("shift_factor", ae.shift_factor),
            )
        sizes: dict[str, Any] = {}
        if (folder / "preprocessor_config.json").is_file():
            found = _read(folder / "preprocessor_config.json", ())
            # A file of that name may come from another library: without these keys it is not ours to read.
            if isinstance(found.get("vae"), dict) and isinstance(found.get("vit"), dict):
                sizes = {"vae_resize": Resize(**found["vae"]), "vit_resize": Resize(**found["vit"])}
        prefix = "vit_model.vision_model.encoder.layers."
        layers = {int(k[len(prefix) :].split(".")[0]) for k in shapes if k.startswith(prefix)}
        if (
            not layers
            or "vit_pos_embed.pos_embed" not in shapes
            or "latent_pos_embed.pos_embed" not in shapes
        ):
            raise CheckpointError(
                f"{folder} has no BAGEL weights: tensors named {prefix}*, vit_pos_embed.pos_embed and "
                "latent_pos_embed.pos_embed are expected in its safetensors files"
            )
        c = vit.get("num_channels", 3)
        vit["num_channels"] = c
        return cls(
            llm=llm,
            vit=vit,
            vit_layers=max(layers) + 1,
            vit_side=round(shapes["vit_pos_embed.pos_embed"][0] ** 0.5),
            latent_side=round(shapes["latent_pos_embed.pos_embed"][0] ** 0.5),
            ae=ae,
            **sizes,
        )


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.name} is missing in {path.parent}: not a BAGEL checkpoint folder"
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    missing = [k for k in keys if not isinstance(found, dict) or k not in found]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    return dict(found)
