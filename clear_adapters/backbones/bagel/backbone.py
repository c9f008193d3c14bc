"""BAGEL's verbs: reading and writing with the cache, sampling latents, and the uncached forward."""
# ruff: noqa: D102  (the verbs are documented in backbones/base.py)

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from PIL.Image import Image
from torch import Tensor
from transformers import AutoTokenizer

from clear_adapters.backbones import fast
from clear_adapters.backbones.bagel.autoencoder import decode_tokens, encode_pixels
from clear_adapters.backbones.bagel.checkpoint import load_checkpoint, save_checkpoint
from clear_adapters.backbones.bagel.compiled import Compiled, CompiledTraining, Expert
from clear_adapters.backbones.bagel.flow import flow_passes
from clear_adapters.backbones.bagel.images import prepare_image
from clear_adapters.backbones.bagel.model import BagelModel, Frame
from clear_adapters.backbones.bagel.packing import Marks, Packer, grid_places, pad_patches
from clear_adapters.backbones.bagel.spec import SPEC
from clear_adapters.backbones.base import Backbone, Context, FlowTrace, Restoration, named_rows
from clear_adapters.backbones.cache import Cache, Slots
from clear_adapters.backbones.graphs import can_capture
from clear_adapters.backbones.packed import ModelOutputs, PackedBatch, Piece, PreparedImage, distinct
from clear_adapters.backbones.pixels import to_pil
from clear_adapters.backbones.quantized import check_quantization, is_quantized
from clear_adapters.backbones.spans import LONG
from clear_adapters.backbones.writer import Writer, write_turn
from clear_adapters.errors import CheckpointError, ClearValueError
from clear_adapters.sampling import (
    LatentSampling,
    RowRandom,
    TextSampling,
    flow_schedule,
    guide,
    ode_step,
    sde_logprob,
    sde_mean,
)
from clear_adapters.transcript import TextSegment

if TYPE_CHECKING:
    from clear_adapters.bridge import LatentBridge

_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


class BagelBackbone(Backbone):
    """A loaded BAGEL: network, autoencoder, tokenizer."""

    spec = SPEC
    compiles = True
    model: BagelModel

    def __init__(
        self, model: BagelModel, autoencoder: AutoencoderKL, tokenizer: Any, marks: Marks | None = None
    ) -> None:
        self.model = model
        self.autoencoder = autoencoder
        self.tokenizer = tokenizer
        self.config = model.config
        self.marks = marks or Marks(*(_mark_id(tokenizer, m) for m in _MARKS))
        self._packer = Packer(self.config, self.marks)
        self._warm: set[int] = set()

    # -- facts

    @property
    def device(self) -> torch.device:
        return self.model.vae2llm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.vae2llm.weight.dtype

    @property
    def layers(self) -> int:
        return len(self.model.language_model.model.layers)

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def latent_width(self) -> int:
        return self.config.latent_width

    @property
    def max_positions(self) -> int | None:
        limit = self.config.llm.get("max_position_embeddings")
        return None if limit is None else int(limit)

    @classmethod
    def accepts(cls, model: Any) -> bool:
        return isinstance(model, BagelModel)

    @classmethod
    def load(
        cls,
        folder: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        quantization: str | None = None,
    ) -> BagelBackbone:
        """Loads a folder in the official layout.

        Raises:
            ClearValueError: the quantization is unknown, or bitsandbytes is missing.
            CheckpointError: the folder does not hold a BAGEL model.
        """
        check_quantization(quantization)
        where = torch.device(device) if device is not None else torch.device("cpu")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{folder} has no tokenizer that can be read: {error}. A BAGEL folder holds tokenizer.json (or "
                "vocab.json and merges.txt); download it again if files are missing"
            ) from error
        model, autoencoder = load_checkpoint(Path(folder), dtype, where, quantization)
        return cls(model, autoencoder, tokenizer)

    def save(self, folder: Path) -> None:
        if is_quantized(self.model):
            raise ClearValueError(
                "the base is quantized: its first weights are gone. Save it from a model that is loaded without quantization"
            )
        save_checkpoint(folder, self.model, self.autoencoder, self.tokenizer)

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return all((folder / name).is_file() for name in ("llm_config.json", "vit_config.json"))

    @classmethod
    def wrap(cls, model: Any, processor: Any) -> BagelBackbone:
        """The verbs over a `BagelModel`.

        Args:
            model: the network.
            processor: `{"autoencoder": AutoencoderKL, "tokenizer": tokenizer}`.

        Raises:
            ClearValueError: one of the two is missing.
        """
        if not isinstance(processor, Mapping) or set(processor) != {"autoencoder", "tokenizer"}:
            raise ClearValueError(
                "a BagelModel holds neither autoencoder nor tokenizer: pass "
                "processor={'autoencoder': ..., 'tokenizer': ...}, or pass a BagelBackbone"
            )
        return cls(model, processor["autoencoder"], processor["tokenizer"])

    # -- text

    @property
    def end_id(self) -> int:
        return self.marks.end

    def encode_text(self, text: str) -> Tensor:
        # A mark that stands in somebody's text is text: read as a token it would end the block.
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return torch.tensor(ids, dtype=torch.int64)

    def decode_text(self, ids: Tensor | Sequence[int]) -> str:
        values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        marks = {self.marks.start, self.marks.end, self.marks.image_start, self.marks.image_end}
        return str(self.tokenizer.decode([i for i in values if i not in marks]))

    # -- pictures

    def prepare(self, image: Image) -> PreparedImage:
        return prepare_image(image, self.config)

    def latent_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tokens down and across of a picture of that (height, width)."""
        stride = self.config.ae.downsample * self.config.latent_patch
        return size[0] // stride, size[1] // stride

    def encode_images(self, images: Sequence[PreparedImage]) -> list[Restoration]:
        images, places = distinct(images)
        found: dict[int, Restoration] = {}
        for size in {i.size for i in images}:
            members = [n for n, i in enumerate(images) if i.size == size]
            pixels = torch.stack([images[n].pixels for n in members])
            tokens = encode_pixels(self.autoencoder, pixels, self.config.latent_patch)
            for n, latent in zip(members, tokens.split(1), strict=True):
                found[n] = Restoration("flow", self.latent_grid(size), size, latent=latent)
        return [replace(found[n]) for n in places]

    @torch.no_grad()
    def understand(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        if not images:
            return []
        tokens, _ = self._features(images)
        return [t[: len(i.patches)] for t, i in zip(tokens, images, strict=True)]

    def _features(self, images: Sequence[PreparedImage]) -> tuple[Tensor, Tensor]:
        """Understanding tokens (n, P, D), padded, and which of them there are, (n, P) bool."""
        images, places = distinct(images)
        padded = pad_patches([(i.patches, i.patch_grid) for i in images], self.config.vit_side)
        patches, positions, valid = (x.to(self.device) for x in padded)
        return self.model.embed_patches(patches, positions, valid)[places], valid[places]

    def decode(self, restoration: Restoration) -> list[Image]:
        if restoration.latent is None:
            raise ClearValueError(
                f"a restoration of kind {restoration.kind!r} holds no latent that BAGEL could decode"
            )
        latent = restoration.latent.to(self.device)
        return to_pil(decode_tokens(self.autoencoder, latent, restoration.grid, self.config.latent_patch))

    # -- the cached path

    def start(self, rows: int, seeds: Sequence[int]) -> Context:
        attention: Any = self.model.language_model.model.layers[0].self_attn
        heads, width = attention.kv_heads, attention.head_dim
        cache = Cache.empty(self.layers, rows, heads, width, self.dtype, self.device)
        return Context.empty(cache, rows, seeds, self.device)

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
        blocks = []
        for given in ids:
            tokens = given.tolist()
            closed = bool(tokens) and tokens[-1] == self.marks.end
            blocks.append([self.marks.start, *tokens] + ([] if closed else [self.marks.end]))
        length = max(len(b) for b in blocks)
        table = torch.zeros(context.rows, length, dtype=torch.int64)
        valid = torch.zeros(context.rows, length, dtype=torch.bool)
        for row, block in zip(names, blocks, strict=True):
            table[row, : len(block)] = torch.tensor(block)
            valid[row, : len(block)] = True
        table, valid = table.to(self.device), valid.to(self.device)
        und = self.model.language_model.model.embed_tokens(table.flatten())
        steps = torch.arange(length, device=self.device)
        step = self._pass(context, valid, context.position[:, None] + steps, und, None, full=False)
        return replace(step.context, position=context.position + valid.sum(1))

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
        if as_condition:
            context = self._read_latents(context, self.encode_images(images), None, names)
        if understanding:
            context = self._read_block(context, *self._features(images), names, generation=False)
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
        return self._read_latents(context, restorations, bridge, names) if names else context

    def write_text_steps(
        self, context: Context, sampling: TextSampling, rows: Sequence[int] | None = None
    ) -> Generator[Tensor, None, tuple[Context, list[TextSegment]]]:
        names = named_rows(context, rows)
        marks = (self.marks.start, self.marks.end)
        experts = self.model.language_model.model.experts(both=False)
        writer = Writer(
            partial(self._token_step, experts=experts),
            *(context, sampling, names, marks),
            captures=can_capture(self.model, self.device),
            warm=self._warm,
            positions=self.max_positions,
        )
        return write_turn(writer, names, self._feed, self.marks.end, self.decode_text)

    def _token_step(
        self,
        token: Tensor,
        positions: Tensor,
        mask: Tensor,
        slots: Slots,
        experts: list[list[Expert]] | None = None,
    ) -> Tensor:
        """A step of `Writer`."""
        decoder = self.model.language_model.model
        und = decoder.embed_tokens(token)
        cos, sin = decoder.rotary(positions)
        every = torch.arange(len(token), device=token.device)
        frame = Frame((len(token), 1), every, token[:0], cos, sin, mask, experts=experts)
        und, _, _ = decoder(und, und.new_zeros(0, und.shape[-1]), frame, slots)
        return self.model.logits(und)

    def _feed(self, context: Context, token: Tensor, active: Tensor) -> Context:
        und = self.model.language_model.model.embed_tokens(token)
        step = self._pass(context, active[:, None], context.position[:, None], und, None, full=False)
        return replace(step.context, position=context.position + active)

    @torch.no_grad()  # as a decorator it holds inside each step only, not in the caller between steps
    def restore_steps(
        self,
        context: Context,
        sampling: LatentSampling,
        guidance: Sequence[Context | None] = (),
        rows: Sequence[int] | None = None,
    ) -> Generator[list[Restoration], None, tuple[Context, list[Restoration]]]:
        names = named_rows(context, rows)
        own = context if len(names) == context.rows else context.select(names)
        sizes = [s for s in own.sizes if s is not None]
        if len(sizes) != own.rows:
            raise ClearValueError("restore: a row has read no picture, so there is nothing to restore")
        grids = [self.latent_grid(s) for s in sizes]
        counts = torch.tensor([h * w for h, w in grids])
        valid = (torch.arange(int(counts.max())) < counts[:, None]).to(self.device)
        places = torch.zeros(valid.shape, dtype=torch.int64)
        for i, grid in enumerate(grids):
            places[i, : counts[i]] = grid_places(grid, self.config.latent_side)
        places = places.to(self.device)
        scales = (sampling.guidance_text, sampling.guidance_image)
        branches = [
            g.select(names) if len(names) != g.rows else g
            for g, scale in zip(guidance, scales, strict=False)
            if g is not None and scale > 1
        ]
        present = [
            i < len(guidance) and guidance[i] is not None and scale > 1 for i, scale in enumerate(scales)
        ]
        flow = flow_passes(self, [own, *branches], places, valid, [int(c) + 2 for c in counts])
        random = own.random.clone()
        shape = (own.rows, int(counts.max()), self.latent_width)
        x = random.normal(shape[1] * shape[2]).view(shape) * valid[..., None]
        times = flow_schedule(sampling.steps, sampling.shift)
        records: list[tuple[Tensor, Tensor, Tensor]] = []
        for t, after in pairwise(times):
            low, high = sampling.guidance_interval
            if branches and low < t <= high:
                parts = flow.velocities(x, t, 1 + len(branches))
                velocity = parts.pop(0)
                text = parts.pop(0) if present[0] else None
                velocity = guide(velocity, text, parts.pop(0) if present[1] else None, sampling)
            else:
                (velocity,) = flow.velocities(x, t, 1)
            clean = x - t * velocity
            if sampling.sde_sigma:
                mean = sde_mean(x, velocity, t, t - after, sampling.sde_sigma)
                noise = random.normal(shape[1] * shape[2]).view(shape) * valid[..., None]
                new = mean + sampling.sde_sigma * (t - after) ** 0.5 * noise
                logprob = sde_logprob(new, mean, t - after, sampling.sde_sigma, "sum")
                if sampling.logprob == "mean":
                    logprob = logprob / (counts.to(logprob.device) * self.latent_width)
                records.append((x, new, logprob))
                x = new
            else:
                x = ode_step(x, velocity, t - after)
            yield _split(clean, grids, sizes)
        done = _split(x, grids, sizes)
        if records:
            _attach_traces(done, records, times, sampling.sde_sigma)
        counts_all = context.random.counts.clone()
        counts_all[names] = random.counts
        return replace(context, random=RowRandom(context.random.seeds, counts_all)), done

    def _read_latents(
        self,
        context: Context,
        restorations: Sequence[Restoration],
        bridge: LatentBridge | None,
        names: Sequence[int],
    ) -> Context:
        counts = [r.grid[0] * r.grid[1] for r in restorations]
        latents = torch.zeros(len(counts), max(counts), self.latent_width)
        places = torch.zeros(len(counts), max(counts), dtype=torch.int64)
        latents = latents.to(self.device)
        for i, r in enumerate(restorations):
            if r.latent is None:
                raise ClearValueError(
                    f"a restoration of kind {r.kind!r} holds no latent that BAGEL could read"
                )
            latents[i, : counts[i]] = r.latent[0].to(self.device)
            places[i, : counts[i]] = grid_places(r.grid, self.config.latent_side)
        valid = (torch.arange(max(counts)) < torch.tensor(counts)[:, None]).to(self.device)
        tokens = self.model.embed_latents(latents, places.to(self.device), torch.zeros(1, device=self.device))
        if bridge is not None:
            tokens = bridge(latents, tokens)
        return self._read_block(context, tokens, valid, names, generation=True)

    def _read_block(
        self, context: Context, tokens: Tensor, valid: Tensor, names: Sequence[int], generation: bool
    ) -> Context:
        """Reads picture tokens (R, N, D) into the named rows."""
        if len(names) != context.rows:
            wide = tokens.new_zeros(context.rows, *tokens.shape[1:])
            seen = valid.new_zeros(context.rows, valid.shape[1])
            wide[list(names)], seen[list(names)] = tokens, valid
            tokens, valid = wide, seen
        step = self.image_pass(context, tokens, valid, generation, names)
        moved = torch.zeros_like(context.position)
        moved[list(names)] = 1
        return replace(step.context, position=context.position + moved)

    def image_pass(
        self,
        context: Context,
        tokens: Tensor,
        valid: Tensor,
        generation: bool,
        names: Sequence[int] | None = None,
    ) -> _Step:
        """Tokens (B, N, D) with image marks, behind a context, all at one position a row.

        The marks stand first: all tokens of a block see each other and share a position, so their order is free.
        """
        b = len(tokens)
        marks = torch.tensor([self.marks.image_start, self.marks.image_end], device=self.device)
        edges = self.model.language_model.model.embed_tokens(marks).expand(b, 2, -1)
        known = torch.ones(b, 1, dtype=torch.bool, device=self.device)
        if names is not None and len(names) != b:
            known = torch.zeros_like(known)
            known[list(names)] = True
        valid, positions = torch.cat((known, known, valid), 1), context.position[:, None]
        if generation:
            return self._pass(
                context, valid, positions, edges.reshape(2 * b, -1), tokens.flatten(0, 1), full=True
            )
        und = torch.cat((edges, tokens), 1).flatten(0, 1)
        return self._pass(context, valid, positions, und, None, full=True)

    def _pass(
        self,
        context: Context,
        valid: Tensor,
        positions: Tensor,
        und: Tensor,
        gen: Tensor | None,
        full: bool,
    ) -> _Step:
        """One cached forward of a block of L tokens a row, at positions (B, L), or (B, 1) where they share one.

        Without `gen`, `und` holds all (B L, D) tokens; with it, each row's first two tokens.
        """
        b, length = valid.shape
        flat = torch.arange(b * length, device=self.device)
        gen_index = flat[:0]
        if gen is not None:
            table = flat.view(b, length)
            flat, gen_index = table[:, :2].flatten(), table[:, 2:].flatten()
        new = valid[:, None, :].expand(b, length, length)
        if not full:
            new = new & torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        new = new | torch.eye(length, dtype=torch.bool, device=self.device)
        mask = torch.cat((context.valid[:, None, :].expand(b, length, context.length), new), -1)[:, None]
        decoder = self.model.language_model.model
        cos, sin = decoder.rotary(positions)
        # Gathering them takes the host some milliseconds, and with LoRA twice as many: too many for one token, or for one pass.
        experts = decoder.experts(both=gen is not None, bare=True) if length > 1 else None
        frame = Frame((b, length), flat, gen_index, cos, sin, mask, experts=experts)
        room = context.cache.reserve(context.length, length)
        gen = und.new_zeros(0, und.shape[-1]) if gen is None else gen
        und, gen, _ = decoder(und, gen, frame, room)
        return _Step(context, room, valid, und, gen)

    def set_compiled(self, enabled: bool, backend: Any = "inductor", training: bool = False) -> None:
        decoder = self.model.language_model.model
        if training:
            decoder.compiled_training = CompiledTraining(backend) if enabled else None
        else:
            decoder.compiled = Compiled(backend) if enabled else None
            self._warm.clear()

    # -- the uncached path

    def pack(self, rows: Sequence[Sequence[Piece]], hidden_layers: tuple[int, ...] = ()) -> PackedBatch:
        return self._packer.pack(rows, hidden_layers)

    @torch.no_grad()
    def encode(self, batch: PackedBatch, noise: Tensor | None = None) -> PackedBatch:
        clean = batch.latents
        if batch.pictures:
            found = [
                encode_pixels(self.autoencoder, p, self.config.latent_patch).flatten(0, 1)
                for p in batch.pictures
            ]
            stored = torch.cat(found)[batch.latent_source.clamp(min=0)]
            clean = torch.where((batch.latent_source >= 0)[:, None], stored, clean)
        noise = torch.randn_like(clean) if noise is None else noise
        t = batch.latent_time[:, None]
        mixed = torch.where(batch.latent_noised[:, None], (1 - t) * clean + t * noise, clean)
        return replace(batch, latents=mixed, pictures=[], target=noise - clean)

    def forward(self, batch: PackedBatch, bridge: LatentBridge | None = None) -> ModelOutputs:
        if batch.pictures:
            raise ClearValueError("this batch still holds pictures: call encode(batch) first")
        model, decoder = self.model, self.model.language_model.model
        b, length = batch.ids.shape
        places = decoder.embed_tokens(batch.ids.flatten())
        if batch.patches is not None:
            assert batch.patch_positions is not None
            assert batch.patch_source is not None
            assert batch.patch_index is not None
            seen = model.embed_patches(batch.patches, batch.patch_positions, batch.patch_valid)
            places = places.index_copy(
                0, batch.patch_index, seen.flatten(0, 1).index_select(0, batch.patch_source).to(places.dtype)
            )
        und = places.index_select(0, batch.und_index)
        gen = und.new_zeros(0, und.shape[-1])
        if len(batch.latents):
            gen = model.embed_latents(batch.latents, batch.latent_positions, batch.latent_time)
            if bridge is not None:
                gen = torch.where(batch.latent_bridged[:, None], bridge(batch.latents, gen), gen)
        cos, sin = decoder.rotary(batch.positions)
        # Layers that are compiled whole would be compiled anew for every layout.
        whole = getattr(decoder.layers[0], "_compiled_call_impl", None) is not None
        spans = batch.spans if length >= LONG and not whole and fast.takes("spans", self.device) else None
        mask = batch.visibility() if spans is None else None
        frame = Frame((b, length), batch.und_index, batch.gen_index, cos, sin, mask, spans)
        und, gen, kept = decoder(und, gen, frame, None, batch.hidden_layers)

        def spread(u: Tensor, g: Tensor) -> Tensor:
            flat = u.new_zeros(b * length, u.shape[-1]).index_copy(0, batch.und_index, u)
            return flat.index_copy(0, batch.gen_index, g) if len(g) else flat

        states = spread(und, gen[:0])
        return ModelOutputs(
            text_logits=model.logits(states.index_select(0, batch.text_at)),
            scored=model.velocity(gen.index_select(0, batch.scored_at)),
            hidden={i: spread(*k).view(b, length, -1) for i, k in kept.items()},
        )


class _Step:
    """The result of a cached pass; reading `context` keeps it, reading `scratch` does not."""

    def __init__(self, before: Context, room: Any, valid: Tensor, und: Tensor, gen: Tensor) -> None:
        self._before = before
        self._room = room
        self._valid = valid
        self._after: Context | None = None
        self.und = und
        self.gen = gen

    @property
    def context(self) -> Context:
        """The context with the block read."""
        if self._after is None:
            self._after = replace(
                self._before,
                cache=self._room.commit(),
                length=self._room.stop,
                valid=torch.cat((self._before.valid, self._valid), 1),
            )
        return self._after

    @property
    def scratch(self) -> Cache:
        """The cache without the block, where the next pass finds room."""
        return self._room.again()


def _split(x: Tensor, grids: list[tuple[int, int]], sizes: list[tuple[int, int]]) -> list[Restoration]:
    return [
        Restoration("flow", grid, size, latent=x[i : i + 1, : grid[0] * grid[1]])
        for i, (grid, size) in enumerate(zip(grids, sizes, strict=True))
    ]


def _attach_traces(
    done: list[Restoration], records: list[tuple[Tensor, Tensor, Tensor]], times: list[float], sigma: float
) -> None:
    x, x_next, logprobs = (torch.stack(part, 1) for part in zip(*records, strict=True))
    t = torch.tensor(times)
    for i, r in enumerate(done):
        n = r.grid[0] * r.grid[1]
        r.trace = FlowTrace(
            x[i : i + 1, :, :n], x_next[i : i + 1, :, :n], t[:-1], t[:-1] - t[1:], sigma, logprobs[i : i + 1]
        )


def _mark_id(tokenizer: Any, mark: str) -> int:
    found = tokenizer.convert_tokens_to_ids(mark)
    if found is None or found == tokenizer.unk_token_id:
        raise CheckpointError(f"the tokenizer has no token {mark}: it is not a BAGEL tokenizer")
    return int(found)
