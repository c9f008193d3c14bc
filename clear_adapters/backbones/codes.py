"""What families share whose language model reads left to right, and which restore codes one after another.

A family adds its frames (`Frames`), the embedding of codes and the head that chooses them, and its picture encoders. The
language model is one of transformers, used layer by layer.
"""
# ruff: noqa: D102  (the verbs are documented in backbones/base.py)

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from PIL.Image import new as new_image
from torch import Tensor

from clear_adapters.backbones.attention import any_shape
from clear_adapters.backbones.base import Backbone, Context, Restoration, named_rows
from clear_adapters.backbones.cache import Cache, Slots, stack
from clear_adapters.backbones.code_writer import CodeWriter
from clear_adapters.backbones.codes_packing import CodesPacker
from clear_adapters.backbones.decoder import run_layers
from clear_adapters.backbones.graphs import can_capture
from clear_adapters.backbones.layout import SLOT, Frames
from clear_adapters.backbones.packed import ModelOutputs, PackedBatch, Piece, PreparedImage, distinct
from clear_adapters.backbones.pixels import to_pil
from clear_adapters.backbones.writer import Writer, write_turn
from clear_adapters.errors import ClearValueError
from clear_adapters.sampling import LatentSampling, RowRandom, TextSampling, guide
from clear_adapters.transcript import TextSegment

if TYPE_CHECKING:
    from clear_adapters.bridge import LatentBridge


class CodesBackbone(Backbone):
    """The verbs of a family of codes.

    Attributes:
        frames: what stands around blocks.
    """

    frames: Frames

    # -- what a family adds

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The language model: `embed_tokens`, `layers`, `norm`, `rotary_emb` and `config`, as LlamaModel has them."""

    @abstractmethod
    def text_logits(self, states: Tensor) -> Tensor:
        """(..., V) next-token logits of the last states (..., D); what text must not hold has no probability."""

    @abstractmethod
    def embed_codes(self, codes: Tensor) -> Tensor:
        """(..., C) embeddings of codes (...) int64, which the bridge reads."""

    @abstractmethod
    def embed_latents(self, latents: Tensor) -> Tensor:
        """(..., D) of code embeddings (..., C): the family's own way back into the language model."""

    @abstractmethod
    def code_logits(self, states: Tensor) -> Tensor:
        """(..., K) logits of the next code, of the last states (..., D)."""

    @abstractmethod
    def mix_codes(self, weights: Tensor) -> Tensor:
        """(..., C) of weights (..., K) over all codes, with gradient."""

    @abstractmethod
    def tokenise(self, pixels: Tensor) -> Tensor:
        """(n, N) int64 codes of pictures (n, 3, H, W) of one size."""

    def see(self, patches: Tensor) -> Tensor:
        """(n, P, D) tokens of the understanding encoder; only asked for where `frames.picture` gives a frame."""
        raise ClearValueError(f"backbone {self.spec.name!r} has no understanding encoder: it reads codes")

    @abstractmethod
    def code_pixels(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """(n, 3, H, W) float32 in [-1, 1] of codes (n, N)."""

    # -- facts

    @property
    def device(self) -> torch.device:
        weight: Tensor = self.decoder.embed_tokens.weight
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        weight: Tensor = self.decoder.embed_tokens.weight
        return weight.dtype

    @property
    def layers(self) -> int:
        return len(self.decoder.layers)

    @property
    def width(self) -> int:
        return int(self.decoder.config.hidden_size)

    @property
    def max_positions(self) -> int | None:
        return int(self.decoder.config.max_position_embeddings)

    def picture_grids(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """The grids of codes and of patches of a picture of (height, width) in pixels as it is given.

        A family that can tell them without a picture overrides this: a blank one is prepared here.
        """
        blank = self.prepare(new_image("RGB", (size[1], size[0])))
        return self.latent_grid(blank.size), blank.patch_grid

    def picture_positions(
        self, size: tuple[int, int], as_condition: bool = True, understanding: bool = True
    ) -> int:
        codes, patches = self.picture_grids(size)
        seen = self.frames.picture(patches[0] * patches[1]) if understanding else []
        read = as_condition or (understanding and not seen)
        return len(seen) + (len(self.frames.condition(codes)) if read else 0)

    @property
    def end_id(self) -> int:
        return self.frames.end

    def set_checkpointing(self, enabled: bool) -> None:
        switch = "enable" if enabled else "disable"
        getattr(self.decoder, f"activation_checkpointing_{switch}")()

    # -- pictures

    @torch.no_grad()
    @any_shape()
    def encode_images(self, images: Sequence[PreparedImage]) -> list[Restoration]:
        images, places = distinct(images)
        sizes = [tuple(i.pixels.shape[-2:]) for i in images]
        found: dict[int, Restoration] = {}
        for size in dict.fromkeys(sizes):
            members = [n for n, s in enumerate(sizes) if s == size]
            codes = self.tokenise(torch.stack([images[n].pixels for n in members]).to(self.device))
            for n, own in zip(members, codes.split(1), strict=True):
                whole = images[n].size
                found[n] = Restoration("codes", self.latent_grid(whole), whole, codes=own)
        return [replace(found[n]) for n in places]

    @torch.no_grad()
    def understand(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        if not images:
            return []
        if self.frames.picture(1):
            return list(self._features(images))
        return [self.embed_latents(self.embed_codes(r.tokens[0])) for r in self.encode_images(images)]

    def _features(self, images: Sequence[PreparedImage]) -> Tensor:
        images, places = distinct(images)
        with any_shape():
            return self.see(torch.stack([i.patches for i in images]).to(self.device))[places]

    @torch.no_grad()
    @any_shape()
    def decode(self, restoration: Restoration) -> list[Image]:
        pixels = self.code_pixels(restoration.tokens.to(self.device), restoration.grid)
        # Without what the family padded.
        return to_pil(pixels, restoration.size)

    # -- the cached path

    @torch.no_grad()
    def start(self, rows: int, seeds: Sequence[int]) -> Context:
        config = self.decoder.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = config.num_key_value_heads or config.num_attention_heads
        cache = Cache.empty(self.layers, rows, heads, head, self.dtype, self.device)
        empty = Context.empty(cache, rows, seeds, self.device)
        return self._read(empty, [self.frames.start] * rows, range(rows)) if self.frames.start else empty

    @torch.no_grad()
    def read_text(
        self,
        context: Context,
        ids: Sequence[Tensor],
        rows: Sequence[int] | None = None,
        own: bool = False,
    ) -> Context:
        names = named_rows(context, rows, len(ids))
        if not names:
            return context
        before, behind = self.frames.text(own)
        blocks = []
        for given in ids:
            tokens = given.tolist()
            closed = own and bool(tokens) and tokens[-1] == self.frames.end
            blocks.append([*before, *tokens, *([] if closed else behind)])
        return self._read(context, blocks, names)

    @torch.no_grad()
    def read_image(
        self,
        context: Context,
        images: Sequence[PreparedImage],
        as_condition: bool = True,
        understanding: bool = True,
        rows: Sequence[int] | None = None,
    ) -> Context:
        names = named_rows(context, rows, len(images))
        if not names:
            return context
        counts = [i.patch_grid[0] * i.patch_grid[1] for i in images]
        frames = [self.frames.picture(n) if understanding else [] for n in counts]
        if as_condition or (understanding and not frames[0]):
            found = self.encode_images(images)
            context = self._read_codes(context, found, [self.frames.condition(r.grid) for r in found], names)
        if frames[0]:
            context = self._read(context, frames, names, self._features(images).flatten(0, 1))
        sizes = list(context.sizes)
        for row, image in zip(names, images, strict=True):
            sizes[row] = image.size
        return replace(context, sizes=tuple(sizes))

    @torch.no_grad()
    def read_restoration(
        self,
        context: Context,
        restorations: Sequence[Restoration],
        bridge: LatentBridge | None,
        rows: Sequence[int] | None = None,
    ) -> Context:
        names = named_rows(context, rows, len(restorations))
        if not names:
            return context
        frames = [self.frames.restoration(r.grid) for r in restorations]
        return self._read_codes(context, restorations, frames, names, bridge)

    def write_text_steps(
        self, context: Context, sampling: TextSampling, rows: Sequence[int] | None = None
    ) -> Generator[Tensor, None, tuple[Context, list[TextSegment]]]:
        names = named_rows(context, rows)
        before, _ = self.frames.text(own=True)
        if before[:-1]:
            with torch.no_grad():
                context = self._read(context, [before[:-1]] * len(names), names)
        marks = (before[-1], self.frames.end)
        captures = can_capture(self.model, self.device)
        writer = Writer(
            *(self._text_step, context, sampling, names, marks),
            captures=captures,
            positions=self.max_positions,
        )
        return write_turn(writer, names, self._feed, self.frames.end, self.decode_text)

    def _feed(self, context: Context, token: Tensor, active: Tensor) -> Context:
        embeds = self.decoder.embed_tokens(token)[:, None]
        return self._pass(context, embeds, active[:, None])

    def _text_step(self, token: Tensor, positions: Tensor, mask: Tensor, slots: Slots) -> Tensor:
        """A step of `Writer`."""
        embeds = self.decoder.embed_tokens(token)[:, None]
        states, _ = run_layers(self.decoder, embeds, positions, mask, slots)
        return self.text_logits(states[:, 0])

    @torch.no_grad()  # as a decorator it holds inside each step only, not in the caller between steps
    def restore_steps(
        self,
        context: Context,
        sampling: LatentSampling,
        guidance: Sequence[Context | None] = (),
        rows: Sequence[int] | None = None,
    ) -> Generator[list[Restoration], None, tuple[Context, list[Restoration]]]:
        """As in `Backbone`; guidance mixes logits, `u = l_T + a (l - l_T)`, `w = l_I + b (u - l_I)`, at every code."""
        names = named_rows(context, rows)
        own = context if len(names) == context.rows else context.select(names)
        sizes = [s for s in own.sizes if s is not None]
        if len(sizes) != own.rows:
            raise ClearValueError("restore: a row has read no picture, so there is nothing to restore")
        grids = [self.latent_grid(s) for s in sizes]
        scales = (sampling.guidance_text, sampling.guidance_image)
        given = [
            None if g is None or scale <= 1 else g if len(names) == g.rows else g.select(names)
            for g, scale in zip((*guidance, None, None)[:2], scales, strict=True)
        ]
        branches = [g for g in given if g is not None]
        joint = stack([own, *branches]) if branches else own
        frames = [self.frames.restoration(g) for g in grids]
        # What is restored is to be written about.
        turn = sum(len(f) for f in self.frames.text(own=True)) + 1
        self._check_room(own, [len(f) + turn for f in frames], range(own.rows))
        leads = [f[: f.index(SLOT)] for f in frames]
        scripts = [f[len(lead) : len(f) - f[::-1].index(SLOT)] for f, lead in zip(frames, leads, strict=True)]
        heads = [lead[:-1] for lead in leads]
        if any(heads):
            joint = self._read(joint, heads * (1 + len(branches)), range(joint.rows))

        def step(feed: Tensor, positions: Tensor, mask: Tensor, slots: Slots) -> Tensor:
            states, _ = run_layers(self.decoder, self._embed_feed(feed)[:, None], positions, mask, slots)
            logits = self.code_logits(states[:, 0]).float()
            if not branches:
                return logits
            parts = list(logits[:, None].chunk(1 + len(branches)))
            first = parts.pop(0)
            text = parts.pop(0) if given[0] is not None else None
            image = parts.pop(0) if given[1] is not None else None
            return guide(first, text, image, replace(sampling, renorm="none"))[:, 0]

        writer = CodeWriter(
            step,
            replace(joint, random=own.random),
            TextSampling(temperature=sampling.temperature),
            torch.tensor([lead[-1] for lead in leads]),
            scripts,
            captures=can_capture(self.model, self.device),
        )
        places = list(zip(grids, sizes, strict=True))
        for chooses in writer.chooses:
            writer.advance()
            if chooses:
                yield [
                    Restoration("codes", grid, size, codes=codes)
                    for codes, (grid, size) in zip(writer.codes, places, strict=True)
                ]
        writer.release(own.length)
        # A guided choice is not one of the policy that a replay scores.
        logprobs = [None] * own.rows if branches else writer.code_logprobs
        done = [
            Restoration("codes", grid, size, codes=codes, code_logprobs=score)
            for codes, score, (grid, size) in zip(writer.codes, logprobs, places, strict=True)
        ]
        counts = context.random.counts.clone()
        counts[names] = writer.counts
        return replace(context, random=RowRandom(context.random.seeds, counts)), done

    def _embed_feed(self, feed: Tensor) -> Tensor:
        """(B, D) of token ids, or of codes as `-1 - code`."""
        codes = self.embed_latents(self.embed_codes((-1 - feed).clamp(min=0)))
        return torch.where((feed >= 0)[:, None], self.decoder.embed_tokens(feed.clamp(min=0)), codes)

    def _read_codes(
        self,
        context: Context,
        restorations: Sequence[Restoration],
        frames: Sequence[Sequence[int]],
        names: Sequence[int],
        bridge: LatentBridge | None = None,
    ) -> Context:
        codes = torch.cat([r.tokens.to(self.device)[0] for r in restorations])
        latents = self.embed_codes(codes).float()
        tokens = self.embed_latents(latents)
        return self._read(context, frames, names, tokens if bridge is None else bridge(latents, tokens))

    def _read(
        self,
        context: Context,
        frames: Sequence[Sequence[int]],
        names: Sequence[int],
        tokens: Tensor | None = None,
    ) -> Context:
        """Reads frames into the named rows, with tokens (n, D) at their slots in order."""
        self._check_room(context, [len(f) for f in frames], names)
        length = max(len(f) for f in frames)
        table = torch.zeros(context.rows, length, dtype=torch.int64)
        valid = torch.zeros(context.rows, length, dtype=torch.bool)
        slots: list[int] = []
        for row, frame in zip(names, frames, strict=True):
            table[row, : len(frame)] = torch.tensor(frame, dtype=torch.int64)
            valid[row, : len(frame)] = True
            slots += [row * length + i for i, token in enumerate(frame) if token == SLOT]
        embeds = self.decoder.embed_tokens(table.clamp(min=0).flatten().to(self.device))
        if tokens is not None:
            embeds = embeds.index_copy(0, torch.tensor(slots).to(self.device), tokens.to(embeds.dtype))
        return self._pass(context, embeds.view(context.rows, length, -1), valid.to(self.device))

    def _check_room(self, context: Context, lengths: Sequence[int], names: Sequence[int]) -> None:
        """Refuses blocks behind the last position that the model was made for: what it made of them would be noise."""
        limit = self.max_positions
        # No row is longer than the cache, so that the device is asked only where it is close.
        if limit is None or context.length + max(lengths) <= limit:
            return
        positions = context.position.tolist()
        for row, length in zip(names, lengths, strict=True):
            if positions[row] + length > limit:
                raise ClearValueError(
                    f"a row has {positions[row]} positions and needs {length} more, and backbone {self.spec.name!r} has "
                    f"{limit}: allow fewer restorations (max_restores), or give smaller pictures or shorter text"
                )

    def _pass(self, context: Context, embeds: Tensor, valid: Tensor) -> Context:
        """Reads embeddings (B, L, D) where they are valid (B, L)."""
        b, length = valid.shape
        new = valid[:, None, :] & torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
        new = new | torch.eye(length, dtype=torch.bool, device=valid.device)
        mask = torch.cat((context.valid[:, None, :].expand(b, length, context.length), new), -1)[:, None]
        positions = context.position[:, None] + torch.arange(length, device=valid.device)
        room = context.cache.reserve(context.length, length)
        run_layers(self.decoder, embeds, positions, mask, room)
        return replace(
            context,
            cache=room.commit(),
            length=room.stop,
            valid=torch.cat((context.valid, valid), 1),
            position=context.position + valid.sum(1),
        )

    # -- the uncached path

    def pack(self, rows: Sequence[Sequence[Piece]], hidden_layers: tuple[int, ...] = ()) -> PackedBatch:
        return CodesPacker(self.frames, self.latent_grid).pack(rows, hidden_layers)

    @torch.no_grad()
    @any_shape()
    def encode(self, batch: PackedBatch, noise: Tensor | None = None) -> PackedBatch:
        """As in `Backbone`; codes take no noise."""
        codes = batch.codes
        assert codes is not None
        if batch.pictures:
            stored = torch.cat([self.tokenise(p.to(self.device)).flatten() for p in batch.pictures])
            codes = torch.where(batch.latent_source >= 0, stored[batch.latent_source.clamp(min=0)], codes)
        return replace(batch, codes=codes, latents=self.embed_codes(codes).float(), pictures=[], target=codes)

    def forward(self, batch: PackedBatch, bridge: LatentBridge | None = None) -> ModelOutputs:
        if batch.pictures or batch.target is None:
            raise ClearValueError("this batch was not encoded: call encode(batch) first")
        places = self.decoder.embed_tokens(batch.ids.flatten())
        if batch.patches is not None:
            assert batch.patch_index is not None
            assert batch.patch_source is not None
            seen = self.see(batch.patches).flatten(0, 1).index_select(0, batch.patch_source)
            places = places.index_copy(0, batch.patch_index, seen.to(places.dtype))
        tokens = self.embed_latents(batch.latents)
        if bridge is not None:
            tokens = torch.where(batch.latent_bridged[:, None], bridge(batch.latents, tokens), tokens)
        places = places.index_copy(0, batch.gen_index, tokens.to(places.dtype))
        states, hidden = run_layers(
            self.decoder,
            places.view(*batch.ids.shape, -1),
            batch.positions,
            batch.visibility(),
            hidden_layers=batch.hidden_layers,
        )
        states = states.flatten(0, 1)
        # What chooses a code is the state of the token before it.
        before = batch.gen_index.index_select(0, batch.scored_at) - 1
        return ModelOutputs(
            text_logits=self.text_logits(states.index_select(0, batch.text_at)),
            scored=self.code_logits(states.index_select(0, before)),
            hidden=hidden,
        )

    @torch.no_grad()
    def latents(self, restoration: Restoration) -> Tensor:
        return self.embed_codes(restoration.tokens.to(self.device)).float()

    def estimate(self, batch: PackedBatch, outputs: ModelOutputs) -> Tensor:
        """The most likely codes' embeddings; their gradient is that of the mean embedding (straight-through)."""
        logits = outputs.scored.float()
        mean = self.mix_codes(logits.softmax(-1))
        return self.embed_codes(logits.argmax(-1)).float() + mean - mean.detach()
