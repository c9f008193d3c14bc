"""Rows of pieces laid out as one `PackedBatch`, for families that read left to right and restore codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clear_adapters.backbones.layout import SLOT, Frames, Row, place_tokens
from clear_adapters.backbones.packed import (
    ImagePiece,
    LatentPiece,
    PackedBatch,
    Piece,
    PreparedImage,
    TextPiece,
)
from clear_adapters.errors import ClearValueError

Grid = tuple[int, int]


class CodesPacker:
    """Collects rows and turns them into tensors once; use it for one batch.

    Every block is causal. A scored restoration is a copy as the generator reads it; each of its codes is asked for at the
    token before it.
    """

    def __init__(self, frames: Frames, grid_of: Callable[[Grid], Grid]) -> None:
        """Gets ready.

        Args:
            frames: what stands around blocks.
            grid_of: the grid of codes of a picture of (height, width).
        """
        self._frames = frames
        self._grid_of = grid_of
        self._rows: list[Row] = []
        self._text: list[tuple[int, int, int, float]] = []  # row, place, target, weight
        self._features: list[Tensor] = []
        self._feature_of: dict[int, int] = {}
        self._feature_uses: list[tuple[int, int]] = []  # picture, tokens
        self._pictures: list[PreparedImage] = []
        self._picture_of: dict[int, int] = {}
        self._codes: list[tuple[Tensor | int, int, LatentPiece]] = []  # given or a picture's, count, piece
        self._scored: list[tuple[int, int, int]] = []  # row, first code, count
        self._watched: list[tuple[int, list[int], int]] = []  # row, places, number
        self._tokens = 0

    def pack(self, rows: Sequence[Sequence[Piece]], hidden_layers: tuple[int, ...]) -> PackedBatch:
        """Lays out rows; see `PackedBatch`.

        Raises:
            ClearValueError: a piece that holds nothing, or codes that do not fill their grid.
        """
        for number, pieces in enumerate(rows):
            row = Row()
            self._rows.append(row)
            if self._frames.start:
                self._block(row, self._frames.start, 0)
            for piece in pieces:
                if isinstance(piece, TextPiece):
                    self._add_text(row, number, piece)
                elif isinstance(piece, ImagePiece):
                    self._add_image(row, number, piece)
                else:
                    grid = self._grid(piece)
                    self._add_codes(row, number, piece, grid, self._frames.restoration(grid))
        return self._finish(hidden_layers)

    def _block(self, row: Row, frame: Sequence[int], branch: int) -> list[int]:
        """Adds a frame; returns the places of its slots."""
        start = row.open(branch)
        positions = list(range(start, start + len(frame)))
        first = row.add([max(i, 0) for i in frame], positions, False, branch)
        row.next_position[branch] = start + len(frame)
        return [first + i for i, token in enumerate(frame) if token == SLOT]

    def _add_text(self, row: Row, number: int, piece: TextPiece) -> None:
        ids, own = piece.ids.tolist(), piece.own or piece.scored
        before, behind = self._frames.text(own)
        closed = own and bool(ids) and ids[-1] == self._frames.end
        first = len(row.ids) + len(before)
        self._block(row, [*before, *ids, *([] if closed else behind)], piece.branch)
        if piece.scored:
            self._text += [(number, first + i - 1, token, piece.weight) for i, token in enumerate(ids)]

    def _add_image(self, row: Row, number: int, piece: ImagePiece) -> None:
        height, width = piece.image.patch_grid
        frame = self._frames.picture(height * width) if piece.understanding else []
        if piece.as_condition or (piece.understanding and not frame):
            codes = LatentPiece(
                image=piece.image, branch=piece.branch, watched=-1 if frame else piece.watched
            )
            grid = self._grid(codes)
            self._add_codes(row, number, codes, grid, self._frames.condition(grid))
        if not frame:
            return
        places = self._block(row, frame, piece.branch)
        row.patches += places
        if piece.watched >= 0:
            self._watched.append((number, places, piece.watched))
        # A picture that stands in several rows, as in a group of rollouts, is embedded once.
        at = self._feature_of.setdefault(id(piece.image.patches), len(self._features))
        if at == len(self._features):
            self._features.append(piece.image.patches)
        self._feature_uses.append((at, len(places)))

    def _grid(self, piece: LatentPiece) -> Grid:
        if piece.latent is not None:
            grid = piece.grid or (0, 0)
            if grid[0] * grid[1] != piece.latent.numel() or piece.latent.is_floating_point():
                raise ClearValueError(
                    f"a restoration of shape {tuple(piece.latent.shape)} and type {piece.latent.dtype} does not fill a grid "
                    f"of {grid} with codes: pass {grid[0] * grid[1]} integers"
                )
            return grid
        if piece.image is None:
            raise ClearValueError("a LatentPiece needs codes or a picture to encode")
        return self._grid_of(piece.image.size)

    def _add_codes(self, row: Row, number: int, piece: LatentPiece, grid: Grid, frame: list[int]) -> None:
        source: Tensor | int
        if piece.latent is None:
            assert piece.image is not None
            # A picture that stands several times in a batch is encoded once.
            source = self._picture_of.setdefault(id(piece.image), len(self._pictures))
            if source == len(self._pictures):
                self._pictures.append(piece.image)
        else:
            source = piece.latent.flatten()
        places = self._block(row, frame, piece.branch)
        row.gen += places
        if piece.watched >= 0:
            self._watched.append((number, places, piece.watched))
        if piece.scored:
            self._scored.append((number, self._tokens, len(places)))
        self._codes.append((source, len(places), piece))
        self._tokens += len(places)

    # -- tensors

    def _finish(self, hidden_layers: tuple[int, ...]) -> PackedBatch:
        rows = self._rows
        length = max(len(r.ids) for r in rows)

        def table(name: str, fill: int, dtype: torch.dtype) -> Tensor:
            values = [getattr(r, name) + [fill] * (length - len(r.ids)) for r in rows]
            return torch.tensor(values, dtype=dtype)

        def flat(name: str) -> Tensor:
            return torch.tensor(
                [i * length + p for i, r in enumerate(rows) for p in getattr(r, name)], dtype=torch.int64
            )

        block, gen_index = table("block", -1, torch.int64), flat("gen")
        is_und = block.flatten() >= 0
        is_und[gen_index] = False
        codes, source, pictures = self._code_tokens()
        counts = torch.tensor([n for _, n, _ in self._codes], dtype=torch.int64)
        bridged = torch.tensor([p.bridged for _, _, p in self._codes], dtype=torch.bool)
        places = [torch.arange(n) for _, n, _ in self._codes]
        scored = [torch.arange(f, f + n) for _, f, n in self._scored]
        text = list(zip(*self._text, strict=True)) if self._text else [(), (), (), ()]
        features, feature_source = self._feature_tokens()
        nothing = torch.zeros(0, dtype=torch.int64)
        return PackedBatch(
            ids=table("ids", 0, torch.int64),
            positions=table("positions", 0, torch.int64),
            block=block,
            full=table("full", 0, torch.bool),
            branch=table("branch", 0, torch.int64),
            und_index=is_und.nonzero()[:, 0],
            gen_index=gen_index,
            patches=features,
            patch_positions=None,
            patch_valid=None,
            patch_source=feature_source,
            patch_index=None if features is None else flat("patches"),
            pictures=pictures,
            latents=torch.zeros(self._tokens, 0),  # embedded by `encode`
            latent_source=source,
            latent_positions=torch.cat(places) if places else nothing,
            latent_time=torch.zeros(self._tokens),
            latent_noised=torch.zeros(self._tokens, dtype=torch.bool),
            latent_bridged=bridged.repeat_interleave(counts),
            scored_at=torch.cat(scored) if scored else nothing,
            scored_row=torch.tensor([r for r, _, n in self._scored for _ in range(n)], dtype=torch.int64),
            text_at=torch.tensor(
                [r * length + p for r, p in zip(text[0], text[1], strict=True)], dtype=torch.int64
            ),
            text_targets=torch.tensor(text[2], dtype=torch.int64),
            text_row=torch.tensor(text[0], dtype=torch.int64),
            text_weight=torch.tensor(text[3], dtype=torch.float32),
            hidden_layers=hidden_layers,
            watch_index=torch.tensor([r * length + p for r, own, _ in self._watched for p in own])
            if self._watched
            else None,
            watch_piece=torch.tensor([n for _, own, n in self._watched for _ in own])
            if self._watched
            else None,
            codes=codes,
        )

    def _code_tokens(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Codes, where those of pictures come from, and the pictures grouped by the size of their pixels."""
        return place_tokens(
            torch.zeros(self._tokens, dtype=torch.int64),
            [(origin, count) for origin, count, _ in self._codes],
            [p.pixels for p in self._pictures],
            [math.prod(self._grid_of(p.size)) for p in self._pictures],
        )

    def _feature_tokens(self) -> tuple[Tensor | None, Tensor | None]:
        """Pictures for the understanding encoder, and which of its tokens stand at the places of them."""
        if not self._features:
            return None, None
        source = [torch.arange(at * count, (at + 1) * count) for at, count in self._feature_uses]
        return torch.stack(self._features), torch.cat(source)
