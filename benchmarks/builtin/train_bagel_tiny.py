"""Trains `builtin:bagel-tiny` from scratch on clean scenes of the miniature world, on one GPU in about ten minutes.

    python benchmarks/builtin/train_bagel_tiny.py --out runs/bagel-tiny

First the autoencoder, then the network on three kinds of rows, side by side in every step: questions and
descriptions of a picture (understanding), a picture from its description (drawing), and editing or completing a
picture (the picture as latent and as patches, then noised copies of the result). Behind the choices:
questions alone do not start to learn, so half of the rows begin with a description, later a quarter; a base that
cannot draw cannot restore, so every step draws as well, several noised copies to a row.

A quarter of the understanding rows show the picture as its latent only, and some show both. BAGEL itself learns to
read latents for understanding only in stages 1 and 2; half a million adapter weights cannot teach that to a model
of five million, so the small base gets it from the start.

The autoencoder also sees noise, masks and other photometric changes, as any picture tokenizer does; the network
sees clean pictures only.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from pool import (
    CAPTION,
    COMPLETE,
    END,
    INSTRUCTION,
    SIDE,
    START,
    TEXT,
    VERSIONS,
    Pool,
    edit_item,
    heldout_item,
    to_ids,
    train_item,
)

from clear_adapters.backbones.bagel.autoencoder import encode_pixels
from clear_adapters.backbones.bagel.backbone import BagelBackbone
from clear_adapters.backbones.bagel.checkpoint import save_checkpoint
from clear_adapters.backbones.bagel.packing import grid_places
from clear_adapters.backbones.bagel.tiny import builtin_config, initialise, tokenizer
from clear_adapters.backbones.packed import PackedBatch
from clear_adapters.world.questions import KINDS

N, P = 64, 256  # latent tokens and patches of a picture
IMAGE_START, IMAGE_END = 258, 259


def to_pixels(pictures: Tensor) -> Tensor:
    """(n, SIDE, SIDE, 3) uint8 to (n, 3, SIDE, SIDE) float32 in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_patches(pixels: Tensor, patch: int) -> Tensor:
    """(n, 3, H, W) to (n, P, patch_dim), channel last inside a patch."""
    n = pixels.shape[0]
    side = SIDE // patch
    return pixels.view(n, 3, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1).reshape(n, side * side, -1)


# ----------------------------------------------------------------------------------------------- autoencoder


def disturb(pixels: Tensor) -> Tensor:
    """Photometric changes for the autoencoder, which must be able to hold any picture."""
    n = pixels.shape[0]
    one = (n, 1, 1, 1)
    device = pixels.device
    gain = torch.where(
        torch.rand(one, device=device) < 0.3, torch.rand(one, device=device), torch.ones(one, device=device)
    )
    noise = torch.where(torch.rand(one, device=device) < 0.3, 0.6 * torch.rand(one, device=device), 0.0)
    out = ((pixels + 1) * gain - 1 + noise * torch.randn_like(pixels)).clamp(-1, 1)
    flip = torch.rand(one, device=device) < 0.5
    return mask_parts(torch.where(flip, out.flip(3), out), torch.rand(n, device=device) < 0.3)


def mask_parts(pixels: Tensor, chosen: Tensor, rectangles: int = 3) -> Tensor:
    """Grey, black or white rectangles over the chosen pictures."""
    n, _, h, w = pixels.shape
    rows = torch.arange(h, device=pixels.device)
    covered = torch.zeros(n, h, w, dtype=torch.bool, device=pixels.device)
    for _ in range(rectangles):
        size = torch.rand(n, 2, device=pixels.device) * 0.55 + 0.12
        at = torch.rand(n, 2, device=pixels.device) * (1.1 - size) - 0.05
        top, left = (at * h).long().unbind(1)
        height, width = (size * h).long().unbind(1)
        inside_y = (rows >= top[:, None]) & (rows < (top + height)[:, None])
        inside_x = (rows >= left[:, None]) & (rows < (left + width)[:, None])
        covered |= inside_y[:, :, None] & inside_x[:, None, :]
    value = torch.randint(-2, 2, (n, 1, 1, 1), device=pixels.device).clamp(min=-1).float()
    value = torch.where(value == 0, 1.0, torch.where(torch.rand_like(value) < 0.5, 0.0, value))
    return torch.where((covered & chosen[:, None, None])[:, None], value, pixels)


def train_autoencoder(
    autoencoder: nn.Module, pool: Pool, args: argparse.Namespace, device: torch.device
) -> float:
    """L1 + L2 with a light KL; then scale and shift of the latents. Returns the PSNR on held-back scenes."""
    autoencoder.requires_grad_(True).train()
    rate = torch.tensor(0.0, device=device)
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        autoencoder.parameters(), lr=rate, betas=(0.9, 0.99), fused=cuda, capturable=cuda
    )
    autoencoder.to(memory_format=torch.channels_last)
    started = time.time()
    resident = torch.from_numpy(pool.arrays["picture"][: min(pool.ready, 16_000)]).to(device)

    def one_step() -> tuple[Tensor, ...]:
        index = torch.randint(256, len(resident), (args.vae_batch,), device=device)
        pixels = disturb(to_pixels(resident[index])).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
            posterior = autoencoder.encode(pixels).latent_dist
            out = autoencoder.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        error = out.float() - pixels
        dx = (error[..., 1:] - error[..., :-1]).abs().mean() + (
            error[..., 1:, :] - error[..., :-1, :]
        ).abs().mean()
        kl = (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        square = (error**2).mean()
        optimizer.zero_grad(set_to_none=True)
        (error.abs().mean() + square + 0.5 * dx + 1e-4 * kl).backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        return square.detach(), kl.detach()

    captured = Captured(one_step, device)
    for step in range(args.vae_steps):
        share = step / args.vae_steps
        rate.fill_(args.vae_lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * share)))
        square, kl = captured()
        if step % 500 == 0 or step == args.vae_steps - 1:
            psnr = -10 * math.log10(float(square) / 4)
            print(f"vae {step} psnr {psnr:.2f} kl {float(kl):.2f} {time.time() - started:.0f}s", flush=True)
    optimizer.zero_grad(set_to_none=True)
    autoencoder.eval().requires_grad_(False)
    pixels = to_pixels(resident[:256])
    with torch.no_grad():
        mean = autoencoder.encode(pixels).latent_dist.mean.float()
        error = autoencoder.decode(mean).sample.float().clamp(-1, 1) - pixels
    autoencoder.register_to_config(scaling_factor=float(1 / mean.std()), shift_factor=float(mean.mean()))
    return float((-10 * ((error**2).mean((1, 2, 3)) / 4).log10()).mean())


class Captured:
    """A training step recorded as one CUDA graph: these steps are bound by launches, not by arithmetic."""

    def __init__(self, step: Callable[[], tuple[Tensor, ...]], device: torch.device) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self.device = device
        self.calls = 0
        self.failed = False

    def __call__(self) -> tuple[Tensor, ...]:
        """Runs the step; the fourth call records it."""
        self.calls += 1
        if self.device.type != "cuda":
            return self.step()
        if self.graph is not None:
            self.graph.replay()
            return self.result
        if self.calls <= 3 or self.failed:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = self.step()
            torch.cuda.current_stream().wait_stream(stream)
            return result
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.result = self.step()
        except RuntimeError as error:
            print(f"this step cannot be captured, running it plainly: {error}", flush=True)
            self.failed = True
            return self.step()
        self.graph = graph
        graph.replay()
        return self.result


# -------------------------------------------------------------------------------------------------- layouts


class Layouts:
    """Batches of rows that all have one layout, built on the device."""

    def __init__(self, backbone: BagelBackbone, device: torch.device) -> None:
        config = backbone.config
        self.patch = config.patch
        self.device = device
        self.latent_places = grid_places((8, 8), config.latent_side).to(device)
        self.patch_places = grid_places((16, 16), config.vit_side).to(device)
        self.complete = torch.tensor([START, *to_ids(COMPLETE), END], device=device)
        self._constants: dict[object, Tensor] = {}

    def constant(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that is made once: a captured step may not copy from the host."""
        if key not in self._constants:
            self._constants[key] = make().to(self.device)
        return self._constants[key]

    def picture_blocks(self, rows: int, latent: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Columns of a latent block then a patch block; `latent` and `patches` (rows,) bool say which are there."""
        marks = [IMAGE_START] + [0] * N + [IMAGE_END] + [IMAGE_START] + [0] * P + [IMAGE_END]
        ids = self.constant("picture", lambda: torch.tensor(marks))
        which = self.constant("which", lambda: torch.tensor([0] * (N + 2) + [1] * (P + 2)))
        there = torch.where(which == 0, latent[:, None], patches[:, None])
        position = torch.where(which == 1, latent[:, None].long(), 0)
        return {
            "ids": ids.expand(rows, -1),
            "positions": position,
            "block": torch.where(there, which, -1),
            "full": torch.ones(rows, len(ids), dtype=torch.bool, device=self.device),
            "branch": torch.zeros(rows, len(ids), dtype=torch.int64, device=self.device),
        }

    def noised_blocks(self, rows: int, copies: int, position: Tensor) -> dict[str, Tensor]:
        """Columns of hidden noised copies at positions (rows,)."""
        ids = self.constant(copies, lambda: torch.tensor(([IMAGE_START] + [0] * N + [IMAGE_END]) * copies))
        number = torch.arange(copies, device=self.device).repeat_interleave(N + 2)
        return {
            "ids": ids.expand(rows, -1),
            "positions": position[:, None].expand(rows, len(ids)),
            "block": (100 + number).expand(rows, -1),
            "full": torch.ones(rows, len(ids), dtype=torch.bool, device=self.device),
            "branch": (100 + number).expand(rows, -1),
        }

    def batch(
        self,
        columns: list[dict[str, Tensor]],
        gen: list[tuple[int, Tensor, Tensor, bool]],
        patches: tuple[int, Tensor] | None,
        text_at: Tensor,
        targets: Tensor,
        target: Tensor | None = None,
    ) -> PackedBatch:
        """Joins columns; `gen` lists (first column, latents (B, N, C), time (B,), velocity asked)."""
        table = {k: torch.cat([c[k] for c in columns], 1) for k in columns[0]}
        b, length = table["ids"].shape
        every = torch.arange(length, device=self.device)
        inside = {first + i for first, *_ in gen for i in range(N)}
        key = (length, *(g[0] for g in gen))
        rows = torch.arange(b, device=self.device)[:, None] * length
        und_columns = self.constant(
            (key, "und"), lambda: torch.tensor([i for i in range(length) if i not in inside])
        )
        gen_columns = self.constant((key, "gen"), lambda: torch.tensor(sorted(inside), dtype=torch.int64))
        latents = torch.cat([g[1] for g in gen], 1) if gen else torch.zeros(b, 0, 64, device=self.device)
        time_ = (
            torch.cat([g[2][:, None].expand(b, N) for g in gen], 1)
            if gen
            else torch.zeros(b, 0, device=self.device)
        )
        asked = [k for k, g in enumerate(gen) if g[3]]
        per_row = len(gen) * N
        scored_at = self.constant(
            (key, "velocity"),
            lambda: torch.tensor([k * N + i for k in asked for i in range(N)], dtype=torch.int64),
        )
        scored_at = (torch.arange(b, device=self.device)[:, None] * per_row + scored_at).flatten()
        flat = torch.zeros(0, device=self.device)
        pixels = patches[1] if patches is not None else None
        return PackedBatch(
            **table,
            und_index=(rows + und_columns).flatten(),
            gen_index=(rows + gen_columns).flatten(),
            patches=pixels,
            patch_positions=None if pixels is None else self.patch_places.expand(b, -1),
            patch_valid=None,
            patch_source=None if pixels is None else torch.arange(b * P, device=self.device),
            patch_index=None if patches is None else (rows + patches[0] + every[:P]).flatten(),
            pictures=[],
            latents=latents.flatten(0, 1),
            latent_source=flat.long(),
            latent_positions=self.latent_places.repeat(b * len(gen)),
            latent_time=time_.flatten(),
            latent_noised=flat.bool(),
            latent_bridged=torch.zeros(b * per_row, dtype=torch.bool, device=self.device),
            scored_at=scored_at,
            scored_row=flat.long(),
            text_at=text_at,
            text_targets=targets,
            text_row=flat.long(),
            text_weight=flat,
            target=target,
        )

    def understanding(
        self, pool: dict[str, Tensor], index: Tensor, version: Tensor, modes: Tensor
    ) -> tuple[PackedBatch, Tensor, Tensor]:
        """Pictures with question branches. Modes: 0 patches, 1 latent, 2 both.

        All text places are asked for; the target is -1 where nothing is scored. Also gives each place's row and branch.
        """
        b = len(index)
        pixels = to_pixels(pool["picture"][index])
        head = self.picture_blocks(b, modes != 0, modes != 1)
        text = {k: pool[k][index, version] for k in ("ids", "offset", "block", "branch", "target", "weight")}
        shift = (modes != 0).long() + (modes != 1).long()
        body = {
            "ids": text["ids"].long(),
            "positions": text["offset"].long() + shift[:, None],
            "block": text["block"].long(),
            "full": torch.zeros_like(text["ids"], dtype=torch.bool),
            "branch": text["branch"].long(),
        }
        first = head["ids"].shape[1]
        length = first + body["ids"].shape[1]
        rows = torch.arange(b, device=self.device)[:, None].expand(b, TEXT)
        places = torch.arange(first, length, device=self.device)
        batch = self.batch(
            [head, body],
            [(1, pool["latent"][index].float(), torch.zeros(b, device=self.device), False)],
            (N + 3, to_patches(pixels, self.patch)),
            (rows * length + places).flatten(),
            text["target"].long().flatten(),
        )
        batch.text_weight = text["weight"].float().flatten()
        return batch, rows.flatten(), text["branch"].long().flatten()

    def text_block(self, ids: Tensor, position: int | Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Columns of one text block, padded with -1; and the position after it."""
        there = ids >= 0
        return {
            "ids": ids.clamp(min=0).long(),
            "positions": torch.arange(ids.shape[1], device=self.device).expand(ids.shape) + position,
            "block": torch.where(there, 2, -1),
            "full": torch.zeros_like(there),
            "branch": torch.zeros_like(ids, dtype=torch.int64),
        }, there.sum(1) + position

    def noise(self, clean: Tensor, copies: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Noised copies (latents, time) and velocity targets (B copies N, C)."""
        found, targets = [], []
        for _ in range(copies):
            b = len(clean)
            u = torch.rand(b, device=self.device)
            t = torch.where(
                torch.rand(b, device=self.device) < 0.3,
                u,
                torch.sigmoid(torch.randn(b, device=self.device) + 0.3),
            )
            e = torch.randn_like(clean)
            found.append(((1 - t[:, None, None]) * clean + t[:, None, None] * e, t))
            targets.append(e - clean)
        return found, torch.stack(targets, 1).flatten(0, 2)

    def drawing(self, pool: dict[str, Tensor], index: Tensor, copies: int) -> PackedBatch:
        """A description, then hidden noised copies of its picture; one row in ten has no description."""
        b = len(index)
        ids = pool["caption"][index].clone()
        ids[torch.rand(b, device=self.device) < 0.1] = -1
        text, after = self.text_block(ids, 0)
        noised, target = self.noise(pool["latent"][index].float(), copies)
        gen = [(CAPTION + k * (N + 2) + 1, x, t, True) for k, (x, t) in enumerate(noised)]
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        return self.batch([text, self.noised_blocks(b, copies, after)], gen, None, none, none, target)

    def editing(
        self,
        edits: dict[str, Tensor],
        scenes: dict[str, Tensor],
        index: Tensor,
        other: Tensor,
        copies: int,
        encode,
    ) -> PackedBatch:
        """Half edits, half pictures with parts missing; patches are dropped in three rows of ten."""
        half = len(index)
        before = to_pixels(torch.cat((edits["picture"][index], scenes["picture"][other])))
        b = len(before)
        before = torch.cat(
            (
                before[:half],
                mask_parts(before[half:], torch.ones(b - half, dtype=torch.bool, device=self.device)),
            )
        )
        condition = torch.cat((edits["latent"][index].float(), encode(before[half:])))
        clean = torch.cat((edits["after_latent"][index], scenes["latent"][other])).float()
        ids = torch.full((b, INSTRUCTION), -1, dtype=torch.int64, device=self.device)
        ids[:half] = edits["caption"][index].long()
        ids[half:, : len(self.complete)] = self.complete
        keep = torch.rand(b, device=self.device) >= 0.3
        head = self.picture_blocks(b, torch.ones_like(keep), keep)
        text, after = self.text_block(ids, 1 + keep.long()[:, None])
        noised, target = self.noise(clean, copies)
        first = N + 2 + P + 2 + INSTRUCTION
        gen = [(1, condition, torch.zeros(b, device=self.device), False)]
        gen += [(first + k * (N + 2) + 1, x, t, True) for k, (x, t) in enumerate(noised)]
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        after = after[:, 0] if after.ndim == 2 else after
        return self.batch(
            [head, text, self.noised_blocks(b, copies, after)],
            gen,
            (N + 3, to_patches(before, self.patch)),
            none,
            none,
            target,
        )


# -------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def accuracy(
    backbone: BagelBackbone, layouts: Layouts, pool: dict[str, Tensor], mode: int, rows: int
) -> dict[str, float]:
    """Share of held-out answers whose every token is the likeliest, by kind: greedy decoding would write them."""
    right = torch.zeros(len(KINDS) + 1, device=layouts.device)
    seen = torch.zeros_like(right)
    for index in torch.arange(min(rows, len(pool["picture"])), device=layouts.device).split(128):
        modes = torch.full_like(index, mode)
        batch, row, branch = layouts.understanding(pool, index, torch.zeros_like(index), modes)
        with torch.autocast(layouts.device.type, torch.bfloat16, enabled=layouts.device.type == "cuda"):
            out = backbone.forward(batch)
        scored = batch.text_targets >= 0
        row, branch = row[scored], branch[scored]
        hit = (out.text_logits.argmax(-1) == batch.text_targets)[scored].float()
        every = torch.ones(len(index) * 32, device=layouts.device)
        every = every.scatter_reduce(0, row * 32 + branch, hit, "amin")
        asked = torch.zeros_like(every).index_fill(0, row * 32 + branch, 1.0)
        kind = pool["kind"][index, 0].long().flatten()
        right.index_add_(0, kind, every * asked)
        seen.index_add_(0, kind, asked)
    share = {k: float(right[i] / seen[i].clamp(min=1)) for i, k in enumerate(KINDS)}
    share["all"] = float(right[:-1].sum() / seen[:-1].sum())
    return {k: round(v, 4) for k, v in share.items()}


class Resident:
    """A pool on the device, with the latents of its pictures; it grows while training runs.

    Attributes:
        table: arrays of the whole size; rows from `ready` on are not there yet.
        ready: () float32 on the device.
    """

    def __init__(self, pool: Pool, device: torch.device, autoencoder: nn.Module) -> None:
        self.pool = pool
        self.device = device
        self.autoencoder = autoencoder
        self.have = 0
        self.ready = torch.zeros((), device=device)
        self.table: dict[str, Tensor] = {}
        self.grow()

    def grow(self) -> None:
        """Brings over what has been made since."""
        ready = self.pool.ready
        if ready == self.have:
            return
        for name, values in self.pool.arrays.items():
            if name not in self.table:
                like = torch.from_numpy(values[:1])
                self.table[name] = torch.zeros(values.shape, dtype=like.dtype, device=self.device)
            self.table[name][self.have : ready] = torch.from_numpy(values[self.have : ready]).to(self.device)
        for source, name in (("picture", "latent"), ("after", "after_latent")):
            if source in self.table:
                if name not in self.table:
                    self.table[name] = torch.zeros(
                        self.pool.size, N, 64, dtype=torch.float16, device=self.device
                    )
                for first in range(self.have, ready, 512):
                    part = self.table[source][first : min(first + 512, ready)]
                    self.table[name][first : first + len(part)] = encode_pixels(
                        self.autoencoder, part.permute(0, 3, 1, 2), 2
                    )
        self.have = ready
        self.ready.fill_(ready)

    def pick(self, n: int) -> Tensor:
        """(n,) random rows of those that are there."""
        return (torch.rand(n, device=self.device) * self.ready).long()


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=mp.cpu_count() - 1)
    parser.add_argument("--scenes", type=int, default=64_000)
    parser.add_argument("--edits", type=int, default=32_000)
    parser.add_argument("--heldout", type=int, default=1_024)
    parser.add_argument("--vae-steps", type=int, default=3_000)
    parser.add_argument("--vae-batch", type=int, default=96)
    parser.add_argument("--vae-lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument(
        "--rows", type=int, nargs=3, default=(160, 24, 48), help="understanding, drawing, editing"
    )
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop (and save) after this long")
    parser.add_argument("--resume", type=Path, help="folder of an earlier run's state files")
    parser.add_argument(
        "--autoencoder", type=Path, help="folder of an earlier run whose autoencoder is taken over"
    )
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    started = time.time()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    args.out.mkdir(parents=True, exist_ok=True)

    # One group of workers for each kind: a shared queue would make all scenes before the first edit.
    for_edits = max(1, args.workers // 3)
    workers = [mp.get_context("fork").Pool(n) for n in (max(1, args.workers - for_edits), for_edits)]
    scenes = Pool(train_item, args.scenes, 10_000_000 * args.seed)
    edits = Pool(edit_item, args.edits, 10_000_000 * args.seed)
    heldout = Pool(heldout_item, args.heldout)

    def fill() -> None:
        heldout.fill(workers[0])
        threads = [
            threading.Thread(target=pool.fill, args=(group,), daemon=True)
            for pool, group in zip((scenes, edits), workers, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(f"all data ready after {time.time() - started:.0f}s", flush=True)

    threading.Thread(target=fill, daemon=True).start()

    model, autoencoder = initialise(builtin_config(), args.seed)
    model, autoencoder = model.to(device), autoencoder.to(device)
    backbone = BagelBackbone(model, autoencoder, tokenizer())
    notes: dict[str, object] = {}
    while min(scenes.ready / args.scenes, edits.ready / args.edits) < 0.05:
        time.sleep(0.2)
    source = args.resume or args.autoencoder
    if source:
        load_state(source, model if args.resume else None, autoencoder)
    else:
        notes["vae_psnr"] = train_autoencoder(autoencoder, scenes, args, device)
        print(
            f"autoencoder: {notes['vae_psnr']:.2f} dB, scale {autoencoder.config.scaling_factor:.4f}",
            flush=True,
        )
    tables = [Resident(p, device, autoencoder) for p in (scenes, edits, heldout)]
    print(f"first data resident after {time.time() - started:.0f}s", flush=True)
    layouts = Layouts(backbone, device)
    if args.compile:
        torch._dynamo.config.cache_size_limit = 64
        for layer in model.language_model.model.layers:
            layer.compile(dynamic=False)
        for layer in model.vit_model.vision_model.encoder.layers:
            layer.compile(dynamic=False)
    train(backbone, layouts, tables, args, started, notes)


def train(
    backbone: BagelBackbone,
    layouts: Layouts,
    tables: list[Resident],
    args: argparse.Namespace,
    started: float,
    notes: dict,
) -> None:
    """The network's training."""
    scenes, edits, heldout = tables
    model, device = backbone.model, layouts.device
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in weights if p.ndim == 2]
    cuda = device.type == "cuda"
    rate = torch.tensor(0.0, device=device)
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": 0.05},
            {"params": [p for p in weights if p.ndim != 2], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.98),
        fused=cuda,
        capturable=cuda,
    )
    average = [p.detach().clone() for p in weights]
    u_rows, d_rows, e_rows = args.rows
    begin = json.loads((args.resume / "state.json").read_text())["step"] if args.resume else 0
    keep = torch.tensor(0.0, device=device)
    described = torch.tensor(0.5, device=device)  # share of rows with a description

    def one_step() -> tuple[Tensor, ...]:
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=cuda, cache_enabled=False)
        optimizer.zero_grad(set_to_none=True)
        chance = torch.rand(u_rows, device=device)
        modes = (chance > 0.6).long() + (chance > 0.85).long()
        version = torch.randint(1, VERSIONS, (u_rows,), device=device)
        version = torch.where(torch.rand(u_rows, device=device) < described, 0, version)
        batch, _, _ = layouts.understanding(scenes.table, scenes.pick(u_rows), version, modes)
        with autocast:
            out = backbone.forward(batch)
        each = F.cross_entropy(out.text_logits.float(), batch.text_targets, ignore_index=-1, reduction="none")
        text = (each * batch.text_weight).sum() / batch.text_weight.sum()
        text.backward()
        batch = layouts.drawing(scenes.table, scenes.pick(d_rows), args.copies)
        with autocast:
            out = backbone.forward(batch)
        draw = F.mse_loss(out.scored, batch.target)
        (draw * (d_rows / (d_rows + e_rows))).backward()
        half = e_rows // 2
        with autocast:
            batch = layouts.editing(
                edits.table,
                scenes.table,
                edits.pick(half),
                scenes.pick(e_rows - half),
                args.copies,
                lambda x: encode_pixels(backbone.autoencoder, x, 2),
            )
            out = backbone.forward(batch)
        edit = F.mse_loss(out.scored, batch.target)
        (edit * (e_rows / (d_rows + e_rows))).backward()
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        torch._foreach_mul_(average, keep)
        torch._foreach_add_(average, torch._foreach_mul([w.detach() for w in weights], 1 - keep))
        return text.detach(), draw.detach(), edit.detach(), norm

    captured = Captured(one_step, device)
    log: list[dict] = []
    step = begin
    train_started = time.time()
    # The schedule runs over the seconds that are there, or over the steps, whichever ends first.
    seconds = args.seconds - (train_started - started)
    while True:
        share = max((step - begin) / (args.steps - begin), (time.time() - train_started) / seconds)
        rate.fill_(args.lr * min(1, (step - begin + 1) / 300) * min(1.0, max(0.0, 2.0 * (1 - share))))
        # Descriptions start the learning; once it runs, questions use the row better.
        described.fill_(0.5 if step < 3_000 else 0.25)
        keep.fill_(min(0.999, (step - begin + 1) / (step - begin + 10)))
        losses = captured()
        step += 1
        last = share >= 1 or step >= args.steps
        if step % 50 == 0:
            for resident in (scenes, edits):
                resident.grow()
        if step % 500 == 0 or last or step in (begin + 1, begin + 20):
            values = [round(float(x), 4) for x in losses]
            row = dict(zip(("text", "draw", "edit", "norm"), values, strict=True))
            row |= {"step": step, "seconds": round(time.time() - train_started, 1)}
            if not all(math.isfinite(v) for v in values):
                raise SystemExit(f"training diverged: {row}")
            if step % 1000 == 0 or last:
                row["heldout"] = accuracy(backbone, layouts, heldout.table, 0, 512)
            log.append(row)
            print(row, flush=True)
        if last:
            break
    (args.out / "log.json").write_text(json.dumps(log, indent=1))
    raw = {n: p.detach().clone() for n, p in model.state_dict().items()}
    save_state(args.out, raw, backbone.autoencoder, step)
    for p, a in zip(weights, average, strict=True):
        p.data.copy_(a)
    model.eval()
    notes["heldout"] = {
        m: accuracy(backbone, layouts, heldout.table, i, 1024)
        for i, m in enumerate(("patches", "latent", "both"))
    }
    notes |= {
        "steps": step,
        "train_seconds": time.time() - train_started,
        "args": {k: str(v) for k, v in vars(args).items()},
    }
    if device.type == "cuda":
        notes["device"] = torch.cuda.get_device_name()
        notes["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(notes, indent=1), flush=True)
    (args.out / "notes.json").write_text(json.dumps(notes, indent=1))
    save_checkpoint(args.out / "model", model, backbone.autoencoder, backbone.tokenizer)
    print(f"saved after {time.time() - started:.0f}s", flush=True)


def save_state(folder: Path, tensors: dict[str, Tensor], autoencoder: nn.Module, step: int) -> None:
    """Float32 weights in two files, so that a later run can go on."""
    names = sorted(tensors)
    for part in range(2):
        torch.save({n: tensors[n].cpu() for n in names[part::2]}, folder / f"state{part}.pt")
    config = {k: autoencoder.config[k] for k in ("scaling_factor", "shift_factor")}
    torch.save({n: t.cpu() for n, t in autoencoder.state_dict().items()}, folder / "autoencoder.pt")
    (folder / "state.json").write_text(json.dumps({"step": step, **config}))


def load_state(folder: Path, model: nn.Module | None, autoencoder: nn.Module) -> None:
    """Reads what `save_state` wrote; without a model, the autoencoder only."""
    if model is not None:
        tensors: dict[str, Tensor] = {}
        for part in range(2):
            tensors |= torch.load(folder / f"state{part}.pt", weights_only=True)
        model.load_state_dict(tensors)
    autoencoder.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True))
    state = json.loads((folder / "state.json").read_text())
    autoencoder.register_to_config(scaling_factor=state["scaling_factor"], shift_factor=state["shift_factor"])


if __name__ == "__main__":
    main()
