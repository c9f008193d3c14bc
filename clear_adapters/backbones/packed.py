"""Rows laid out for one uncached forward: pieces, the batch that they are packed into, and what comes out.

Training and replay describe a row as pieces; a family packs them. Nothing here needs a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class TextPiece:
    """A block of text in a row.

    Attributes:
        ids: (T,) int64, without start token; the end token is appended when it is missing.
        scored: whether its log-probabilities are asked for (an appended end token never is).
        weight: weight of each of its tokens in a loss.
        branch: 0 is seen by all that follows; another number only by pieces of the same branch.
    """

    ids: Tensor
    scored: bool = False
    weight: float = 1.0
    branch: int = 0


@dataclass
class ImagePiece:
    """A picture in a row: its latent at t = 0 for the generator (`as_condition`), then its understanding tokens.

    Places of the latter are found under the number `watched` in `PackedBatch.watch_index`, where it is not negative.
    """

    image: PreparedImage
    as_condition: bool = True
    understanding: bool = True
    branch: int = 0
    watched: int = -1


@dataclass
class LatentPiece:
    """A restoration in a row, in one of its three ways of standing (paper, section 3.2).

    Attributes:
        latent: (N, C) float32, or None when it is to be encoded from `image`.
        image: the picture whose encoding is the latent.
        grid: (h, w); taken from the image when None.
        time: 0 is the final latent, which the text reads through the bridge; above 0 a noised copy, whose
            velocity is asked for and which nothing later may see: give it a branch of its own.
        noised: whether `latent` is already x_t (replay) and not to be mixed with noise (training).
        bridged: whether the bridge's residual is added.
        velocity: whether the velocity is asked for.
        branch: as in `TextPiece`.
        watched: as in `ImagePiece`.
    """

    latent: Tensor | None = None
    image: PreparedImage | None = None
    grid: tuple[int, int] | None = None
    time: float = 0.0
    noised: bool = False
    bridged: bool = False
    velocity: bool = False
    branch: int = 0
    watched: int = -1


Piece = TextPiece | ImagePiece | LatentPiece


@dataclass
class PreparedImage:
    """A picture resized and normalised as a family wants it; made on the CPU, in data workers.

    Attributes:
        pixels: (3, H, W) uint8, or floating in [-1, 1], for the autoencoder.
        patches: (P, patch_dim) of the same type for the understanding encoder, or the family's own form.
        patch_grid: (h, w) of the patches.
    """

    pixels: Tensor
    patches: Tensor
    patch_grid: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return int(self.pixels.shape[-2]), int(self.pixels.shape[-1])


@dataclass
class PackedBatch:
    """Rows laid out for one parallel forward: token kinds, positions, visibility. Flat indices run over B x L.

    A token sees an earlier one when that one stands in branch 0 or in its own branch, and a later one only
    inside its own block when that block is `full`. Made by `Backbone.pack`, or directly where every row has
    the same layout.

    Attributes:
        ids: (B, L) int64, text tokens; 0 elsewhere.
        positions: (B, L) int64.
        block: (B, L) int64, number of the block in its row; -1 at padding.
        full: (B, L) bool, whether the block is bidirectional.
        branch: (B, L) int64.
        und_index: (U,) int64, flat places that the understanding expert processes.
        gen_index: (G,) int64, flat places that the generation expert processes; latent tokens, in order.
        patches: (I, P, patch_dim) uint8 or floating in [-1, 1], padded; None without any.
        patch_positions: (I, P) int64.
        patch_valid: (I, P) bool, or None where there is no padding.
        patch_source: (K,) int64, flat places in I x P of the patches that stand at `patch_index`; rows may share a picture.
        patch_index: (K,) int64, flat places in B x L where they stand.
        pictures: pixel groups (n, 3, H, W), uint8 or floating, to encode; equal sizes together.
        latents: (G, C) float32, latent tokens at `gen_index`; rows from pictures are filled by `Backbone.encode`.
        latent_source: (G,) int64, row of the pictures' flattened latents that stands there; -1 given in `latents`.
        latent_positions: (G,) int64, place in the latent grid.
        latent_time: (G,) float32.
        latent_noised: (G,) bool, to be mixed with noise as `(1 - t) x + t e`.
        latent_bridged: (G,) bool.
        velocity_at: (M,) int64, places in `latents` whose velocity is asked for.
        velocity_row: (M,) int64, their row.
        text_at: (T,) int64, flat places whose next-token logits are asked for.
        text_targets: (T,) int64, the tokens that followed.
        text_row: (T,) int64.
        text_weight: (T,) float32.
        hidden_layers: layers whose output is asked for.
        watch_index: (W,) int64, flat places in B x L of the watched pieces' tokens, in order; None without any.
        watch_piece: (W,) int64, the number that each is watched under.
        target: (G, C) float32 or None, velocity targets, filled by `Backbone.encode`.
    """

    ids: Tensor
    positions: Tensor
    block: Tensor
    full: Tensor
    branch: Tensor
    und_index: Tensor
    gen_index: Tensor
    patches: Tensor | None
    patch_positions: Tensor | None
    patch_valid: Tensor | None
    patch_source: Tensor | None
    patch_index: Tensor | None
    pictures: list[Tensor]
    latents: Tensor
    latent_source: Tensor
    latent_positions: Tensor
    latent_time: Tensor
    latent_noised: Tensor
    latent_bridged: Tensor
    velocity_at: Tensor
    velocity_row: Tensor
    text_at: Tensor
    text_targets: Tensor
    text_row: Tensor
    text_weight: Tensor
    hidden_layers: tuple[int, ...] = ()
    watch_index: Tensor | None = None
    watch_piece: Tensor | None = None
    target: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """The batch on a device."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=non_blocking)
            elif name == "pictures":
                moved[name] = [p.to(device, non_blocking=non_blocking) for p in value]
            else:
                moved[name] = value
        return PackedBatch(**moved)

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory (called by a DataLoader)."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.pin_memory()
            elif name == "pictures":
                moved[name] = [p.pin_memory() for p in value]
            else:
                moved[name] = value
        return PackedBatch(**moved)

    def visibility(self) -> Tensor:
        """(B, 1, L, L) bool, True where a query (third axis) sees a key. Padding sees itself, against NaN."""
        length = self.ids.shape[1]
        order = torch.arange(length, device=self.ids.device)
        earlier = order[:, None] >= order[None, :]
        same_block = (self.block[:, :, None] == self.block[:, None, :]) & self.full[:, :, None]
        branch = (self.branch[:, None, :] == 0) | (self.branch[:, None, :] == self.branch[:, :, None])
        seen = (earlier | same_block) & branch & (self.block >= 0)[:, None, :]
        return (seen | torch.eye(length, dtype=torch.bool, device=seen.device))[:, None]


@dataclass
class ModelOutputs:
    """What one forward gives.

    Attributes:
        text_logits: (T, V) at `text_at`.
        velocity: (M, C) float32 at `velocity_at`.
        hidden: layer -> (B, L, D) output of the layer before the final norm.
        code_logits: (S, K) of the scored codes, in order; None for a family that restores flow latents.
    """

    text_logits: Tensor
    velocity: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    code_logits: Tensor | None = None
