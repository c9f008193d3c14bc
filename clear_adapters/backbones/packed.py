"""Rows laid out for one uncached forward: pieces, the batch that they are packed into, and what comes out.

Training and replay describe a row as pieces; a family packs them. Nothing here needs a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_adapters.backbones.spans import Span
from clear_adapters.errors import ClearValueError


@dataclass
class TextPiece:
    """A block of text in a row.

    Attributes:
        ids: (T,) int64, without start token; the end token is appended when it is missing.
        scored: whether its log-probabilities are asked for (an appended end token never is).
        own: whether the model is the speaker, for families whose chat format tells speakers apart; scored text is its own.
        weight: weight of each of its tokens in a loss.
        branch: 0 is seen by all that follows; another number only by pieces of the same branch.
    """

    ids: Tensor
    scored: bool = False
    own: bool = False
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
        latent: (N, C) float32, or (N,) int64 codes, or None when it is to be encoded from `image`.
        image: the picture whose encoding is the latent.
        grid: (h, w); taken from the image when None.
        time: 0 is the final latent, which the text reads through the bridge; above 0 a noised copy, whose
            velocity is asked for and which nothing later may see: give it a branch of its own. Codes have no time.
        noised: whether `latent` is already x_t (replay) and not to be mixed with noise (training).
        bridged: whether the bridge's residual is added.
        scored: whether the velocity is asked for, or of codes the logits that each was chosen from: a copy as the
            generator reads it, on a branch of its own too.
        branch: as in `TextPiece`.
        watched: as in `ImagePiece`.
    """

    latent: Tensor | None = None
    image: PreparedImage | None = None
    grid: tuple[int, int] | None = None
    time: float = 0.0
    noised: bool = False
    bridged: bool = False
    scored: bool = False
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
        content: (height, width) of the picture in the middle of `pixels`, of a family that pads; None is all of them.
    """

    pixels: Tensor
    patches: Tensor
    patch_grid: tuple[int, int]
    content: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, without what was padded."""
        return self.content or (int(self.pixels.shape[-2]), int(self.pixels.shape[-1]))

    @property
    def picture(self) -> Tensor:
        """(3, height, width) of `size`, a view: `pixels` without what was padded."""
        height, width = self.size
        top, left = (self.pixels.shape[-2] - height) // 2, (self.pixels.shape[-1] - width) // 2
        return self.pixels[:, top : top + height, left : left + width]


def prepare_once(prepare: Callable[[Any], PreparedImage]) -> Callable[[Any], PreparedImage]:
    """A `Backbone.prepare` that gives one object for one picture, so that rows that share it encode it once too."""
    made: dict[int, tuple[Any, PreparedImage]] = {}

    def prepared(image: Any) -> PreparedImage:
        # The picture is held as well: another one would get the number of one that is gone.
        if id(image) not in made:
            made[id(image)] = image, prepare(image)
        return made[id(image)][1]

    return prepared


def distinct(images: Sequence[PreparedImage]) -> tuple[list[PreparedImage], list[int]]:
    """Pictures without those that are the same object, and which of them each one is."""
    own = {id(image): image for image in images}
    number = {key: place for place, key in enumerate(own)}
    return list(own.values()), [number[id(image)] for image in images]


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
        latents: (G, C) float32, latent tokens at `gen_index`, or the codes' embeddings; what comes from pictures, and every
            embedding, is filled in by `Backbone.encode`.
        latent_source: (G,) int64, row of the pictures' flattened latents that stands there; -1 given in `latents`.
        latent_positions: (G,) int64, place in the latent grid.
        latent_time: (G,) float32.
        latent_noised: (G,) bool, to be mixed with noise as `(1 - t) x + t e`.
        latent_bridged: (G,) bool.
        scored_at: (M,) int64, places in `latents` whose velocity, or whose code's logits, are asked for.
        scored_row: (M,) int64, their row.
        text_at: (T,) int64, flat places whose next-token logits are asked for.
        text_targets: (T,) int64, the tokens that followed.
        text_row: (T,) int64.
        text_weight: (T,) float32.
        hidden_layers: layers whose output is asked for.
        watch_index: (W,) int64, flat places in B x L of the watched pieces' tokens, in order; None without any.
        watch_piece: (W,) int64, the number that each is watched under.
        target: velocity targets (G, C) float32, or the codes (G,) int64; filled in by `Backbone.encode`.
        codes: (G,) int64, of a family that restores codes; those of pictures are filled in by `Backbone.encode`.
        spans: the blocks of each row on the host, of a family that attends block by block.
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
    scored_at: Tensor
    scored_row: Tensor
    text_at: Tensor
    text_targets: Tensor
    text_row: Tensor
    text_weight: Tensor
    hidden_layers: tuple[int, ...] = ()
    watch_index: Tensor | None = None
    watch_piece: Tensor | None = None
    target: Tensor | None = None
    codes: Tensor | None = None
    spans: tuple[tuple[Span, ...], ...] | None = None

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
        scored: (M, C) float32 velocities at `scored_at`, or (M, K) logits of the codes there.
        hidden: layer -> (B, L, D) output of the layer before the final norm.
    """

    text_logits: Tensor
    scored: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)


def restoration_loss(outputs: ModelOutputs, batch: PackedBatch) -> Tensor:
    """(M,) float32: how far each scored latent token is from its target.

    For velocities the mean squared error over their numbers, for codes the cross-entropy. Without any it is empty and still
    hangs on the graph.

    Args:
        outputs: of the forward.
        batch: the same that the forward got, encoded.

    Raises:
        ClearValueError: the batch was not encoded, so that it has no targets.
    """
    if batch.target is None:
        raise ClearValueError("this batch has no targets yet: call encode(batch) first")
    target = batch.target.index_select(0, batch.scored_at)
    if target.is_floating_point():
        return (outputs.scored.float() - target).pow(2).mean(-1)
    return F.cross_entropy(outputs.scored.float(), target, reduction="none")
