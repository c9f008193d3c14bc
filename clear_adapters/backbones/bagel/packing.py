"""Rows of pieces laid out as one `PackedBatch`: blocks, positions, visibility."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clear_adapters.backbones.bagel.config import BagelConfig
from clear_adapters.backbones.layout import Row, place_tokens
from clear_adapters.backbones.packed import (
    ImagePiece,
    LatentPiece,
    PackedBatch,
    Piece,
    PreparedImage,
    TextPiece,
)
from clear_adapters.backbones.spans import spans_of
from clear_adapters.errors import ClearValueError


@dataclass(frozen=True)
class Marks:
    """Token ids that wrap blocks: text in `start` .. `end`, pictures in `image_start` .. `image_end`."""

    start: int
    end: int
    image_start: int
    image_end: int


def grid_places(grid: tuple[int, int], side: int) -> Tensor:
    """(h w,) int64, the places of a grid in a square table of that side."""
    return (torch.arange(grid[0])[:, None] * side + torch.arange(grid[1])[None]).flatten()


class Packer:
    """Collects rows and turns them into tensors once."""

    def __init__(self, config: BagelConfig, marks: Marks) -> None:
        self._config = config
        self._marks = marks

    def pack(self, rows: Sequence[Sequence[Piece]], hidden_layers: tuple[int, ...]) -> PackedBatch:
        """Lays out rows; see `PackedBatch`.

        Raises:
            ClearValueError: a piece that holds nothing, or a latent that does not fill its grid.
        """
        built: list[Row] = []
        self._text: list[tuple[int, int, int, float]] = []  # row, place, target, weight
        self._velocity: list[tuple[int, int, int]] = []  # row, first latent token, count
        self._patches: list[tuple[Tensor, tuple[int, int]]] = []
        self._patches_of: dict[int, int] = {}
        self._patch_uses: list[int] = []
        self._pictures: list[PreparedImage] = []
        self._picture_of: dict[int, int] = {}
        self._latents: list[tuple[Tensor | int, tuple[int, int], LatentPiece]] = []
        self._watched: list[tuple[int, int, int, int]] = []  # row, place, count, number
        self._tokens = 0
        for number, pieces in enumerate(rows):
            row = Row()
            for piece in pieces:
                if isinstance(piece, TextPiece):
                    self._add_text(row, number, piece)
                elif isinstance(piece, ImagePiece):
                    if piece.as_condition:
                        self._add_latent(row, number, LatentPiece(image=piece.image, branch=piece.branch))
                    if piece.understanding:
                        self._add_patches(row, number, piece)
                else:
                    self._add_latent(row, number, piece)
            built.append(row)
        return self._finish(built, hidden_layers)

    def _add_text(self, row: Row, number: int, piece: TextPiece) -> None:
        ids = piece.ids.tolist()
        closed = bool(ids) and ids[-1] == self._marks.end
        tokens = [self._marks.start, *ids] + ([] if closed else [self._marks.end])
        start = row.open(piece.branch)
        first = row.add(tokens, list(range(start, start + len(tokens))), False, piece.branch)
        row.next_position[piece.branch] = start + len(tokens)
        if piece.scored:
            self._text += [(number, first + i, token, piece.weight) for i, token in enumerate(ids)]

    def _add_image_block(self, row: Row, count: int, branch: int) -> int:
        start = row.open(branch)
        tokens = [self._marks.image_start] + [0] * count + [self._marks.image_end]
        first = row.add(tokens, [start] * len(tokens), True, branch)
        row.next_position[branch] = start + 1
        return first + 1

    def _add_patches(self, row: Row, number: int, piece: ImagePiece) -> None:
        patches, grid = piece.image.patches, piece.image.patch_grid
        first = self._add_image_block(row, len(patches), piece.branch)
        if piece.watched >= 0:
            self._watched.append((number, first, len(patches), piece.watched))
        row.patches += range(first, first + len(patches))
        # A picture that stands in several rows, as in a group of rollouts, is embedded once.
        place = self._patches_of.setdefault(id(patches), len(self._patches))
        if place == len(self._patches):
            self._patches.append((patches, grid))
        self._patch_uses.append(place)

    def _add_latent(self, row: Row, number: int, piece: LatentPiece) -> None:
        source: Tensor | int
        if piece.latent is None:
            if piece.image is None:
                raise ClearValueError("a LatentPiece needs a latent or a picture to encode")
            stride = self._config.ae.downsample * self._config.latent_patch
            grid = (piece.image.size[0] // stride, piece.image.size[1] // stride)
            # A picture that stands several times in a batch (noised and final) is encoded once.
            source = self._picture_of.setdefault(id(piece.image), len(self._pictures))
            if source == len(self._pictures):
                self._pictures.append(piece.image)
        else:
            source, grid = piece.latent.reshape(-1, self._config.latent_width), piece.grid or (0, 0)
            if grid[0] * grid[1] != len(source):
                raise ClearValueError(
                    f"a latent of shape {tuple(piece.latent.shape)} does not fill a grid of {grid}: pass "
                    f"{grid[0] * grid[1]} tokens, or the grid that it was sampled on"
                )
        count = grid[0] * grid[1]
        first = self._add_image_block(row, count, piece.branch)
        row.gen += range(first, first + count)
        if piece.watched >= 0:
            self._watched.append((number, first, count, piece.watched))
        if piece.scored:
            self._velocity.append((number, self._tokens, count))
        self._latents.append((source, grid, piece))
        self._tokens += count

    def _finish(self, rows: list[Row], hidden_layers: tuple[int, ...]) -> PackedBatch:
        length = -(-max(len(r.ids) for r in rows) // 8) * 8

        def table(name: str, fill: int, dtype: torch.dtype) -> Tensor:
            values = [getattr(r, name) + [fill] * (length - len(r.ids)) for r in rows]
            return torch.tensor(values, dtype=dtype)

        def flat(name: str) -> Tensor:
            return torch.tensor(
                [i * length + p for i, r in enumerate(rows) for p in getattr(r, name)], dtype=torch.int64
            )

        block = table("block", -1, torch.int64)
        gen_index = flat("gen")
        is_und = block.flatten() >= 0
        is_und[gen_index] = False
        latents, source, pictures = self._latent_tokens()
        pieces = [(g, p) for _, g, p in self._latents]

        def per_token(values: list[float], dtype: torch.dtype) -> Tensor:
            counts = torch.tensor([g[0] * g[1] for g, _ in pieces], dtype=torch.int64)
            return torch.tensor(values, dtype=dtype).repeat_interleave(counts)

        places = [grid_places(g, self._config.latent_side) for g, _ in pieces]
        velocity = [(n, torch.arange(f, f + c)) for n, f, c in self._velocity]
        text = list(zip(*self._text, strict=True)) if self._text else [(), (), (), ()]
        patches, watched = self._patch_tensors(), self._watched
        return PackedBatch(
            ids=table("ids", 0, torch.int64),
            positions=table("positions", 0, torch.int64),
            block=block,
            full=table("full", 0, torch.bool),
            branch=table("branch", 0, torch.int64),
            und_index=is_und.nonzero()[:, 0],
            gen_index=gen_index,
            patches=patches[0],
            patch_positions=patches[1],
            patch_valid=patches[2],
            patch_source=patches[3],
            patch_index=flat("patches") if patches[0] is not None else None,
            pictures=pictures,
            latents=latents,
            latent_source=source,
            latent_positions=torch.cat(places) if places else torch.zeros(0, dtype=torch.int64),
            latent_time=per_token([p.time for _, p in pieces], torch.float32),
            latent_noised=per_token([p.time > 0 and not p.noised for _, p in pieces], torch.bool),
            latent_bridged=per_token([p.bridged for _, p in pieces], torch.bool),
            scored_at=torch.cat([v for _, v in velocity]) if velocity else torch.zeros(0, dtype=torch.int64),
            scored_row=torch.tensor([n for n, v in velocity for _ in range(len(v))], dtype=torch.int64),
            text_at=torch.tensor(
                [r * length + p for r, p in zip(text[0], text[1], strict=True)], dtype=torch.int64
            ),
            text_targets=torch.tensor(text[2], dtype=torch.int64),
            text_row=torch.tensor(text[0], dtype=torch.int64),
            text_weight=torch.tensor(text[3], dtype=torch.float32),
            hidden_layers=hidden_layers,
            watch_index=torch.cat(
                [torch.arange(r * length + f, r * length + f + c) for r, f, c, _ in watched]
            )
            if watched
            else None,
            watch_piece=torch.cat([torch.full((c,), n) for _, _, c, n in watched]) if watched else None,
            spans=tuple(spans_of(r.block, r.full, r.branch) for r in rows),
        )

    def _latent_tokens(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Latent tokens, where those of pictures come from, and the pictures grouped by size."""
        stride = self._config.ae.downsample * self._config.latent_patch
        return place_tokens(
            torch.zeros(self._tokens, self._config.latent_width),
            [(origin, h * w) for origin, (h, w), _ in self._latents],
            [p.pixels for p in self._pictures],
            [(p.size[0] // stride) * (p.size[1] // stride) for p in self._pictures],
        )

    def _patch_tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        if not self._patches:
            return None, None, None, None
        patches, positions, valid = pad_patches(self._patches, self._config.vit_side)
        longest = patches.shape[1]
        source = torch.cat(
            [torch.arange(i * longest, i * longest + len(self._patches[i][0])) for i in self._patch_uses]
        )
        return patches, positions, None if bool(valid.all()) else valid, source


def pad_patches(images: Sequence[tuple[Tensor, tuple[int, int]]], side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (I, P, patch_dim), their table places (I, P) and validity (I, P) of pictures of any grid."""
    longest = max(len(p) for p, _ in images)
    patches = torch.zeros(len(images), longest, images[0][0].shape[-1], dtype=images[0][0].dtype)
    positions = torch.zeros(len(images), longest, dtype=torch.int64)
    valid = torch.zeros(len(images), longest, dtype=torch.bool)
    for i, (own, grid) in enumerate(images):
        patches[i, : len(own)] = own
        positions[i, : len(own)] = grid_places(grid, side)
        valid[i, : len(own)] = True
    return patches, positions, valid
