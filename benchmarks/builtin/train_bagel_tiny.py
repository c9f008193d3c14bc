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
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import loop
from loop import Captured, Data, Resident, adamw, decibels, disturb, edges, mask_parts, to_pixels
from pool import CAPTION, COMPLETE, INSTRUCTION, SIDE, TEXT, Chat, Pool

from clear_adapters.backbones.bagel.autoencoder import encode_pixels
from clear_adapters.backbones.bagel.backbone import BagelBackbone
from clear_adapters.backbones.bagel.checkpoint import save_checkpoint
from clear_adapters.backbones.bagel.packing import grid_places
from clear_adapters.backbones.bagel.tiny import builtin_config, initialise, tokenizer
from clear_adapters.backbones.packed import PackedBatch

START, END = 256, 257
CHAT = Chat(((START,), (END,)), ((START,), (END,)))
N, P = 64, 256  # latent tokens and patches of a picture
IMAGE_START, IMAGE_END = 258, 259


def to_patches(pixels: Tensor, patch: int) -> Tensor:
    """(n, 3, H, W) to (n, P, patch_dim), channel last inside a patch."""
    n = pixels.shape[0]
    side = SIDE // patch
    return pixels.view(n, 3, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1).reshape(n, side * side, -1)


# ----------------------------------------------------------------------------------------------- autoencoder


def train_autoencoder(
    autoencoder: nn.Module, pool: Pool, args: argparse.Namespace, device: torch.device
) -> float:
    """L1 + L2 with a light KL; then scale and shift of the latents. Returns the PSNR on held-back scenes."""
    autoencoder.requires_grad_(True).train()
    rate = torch.tensor(0.0, device=device)
    optimizer = adamw([{"params": list(autoencoder.parameters())}], rate, 0.99, device)
    autoencoder.to(memory_format=torch.channels_last)
    started = time.time()
    resident = torch.from_numpy(pool.arrays["picture"][: min(pool.ready, 16_000)]).to(device)
    held = min(256, len(resident) // 2)

    def one_step() -> tuple[Tensor, ...]:
        index = torch.randint(held, len(resident), (args.vae_batch,), device=device)
        pixels = disturb(to_pixels(resident[index])).contiguous(memory_format=torch.channels_last)
        with loop.mixed(device):
            posterior = autoencoder.encode(pixels).latent_dist
            out = autoencoder.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        error = out.float() - pixels
        kl = (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        square = (error**2).mean()
        optimizer.zero_grad(set_to_none=True)
        (error.abs().mean() + square + 0.5 * edges(error) + 1e-4 * kl).backward()
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
    pixels = to_pixels(resident[:held])
    with torch.no_grad():
        mean = autoencoder.encode(pixels).latent_dist.mean.float()
        error = autoencoder.decode(mean).sample.float().clamp(-1, 1) - pixels
    autoencoder.register_to_config(scaling_factor=float(1 / mean.std()), shift_factor=float(mean.mean()))
    return decibels(error)


# -------------------------------------------------------------------------------------------------- layouts


class Layouts:
    """Batches of rows that all have one layout, built on the device."""

    def __init__(self, backbone: BagelBackbone, device: torch.device) -> None:
        config = backbone.config
        self.patch = config.patch
        self.device = device
        self.latent_places = grid_places((8, 8), config.latent_side).to(device)
        self.patch_places = grid_places((16, 16), config.vit_side).to(device)
        self.complete = torch.from_numpy(CHAT.block(COMPLETE, INSTRUCTION)).to(device).long()
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
        ids[half:] = self.complete
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


def main() -> None:
    """Runs everything."""
    parser = loop.parser(__doc__)
    parser.add_argument(
        "--rows", type=int, nargs=3, default=(160, 24, 48), help="understanding, drawing, editing"
    )
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument(
        "--autoencoder", type=Path, help="folder of an earlier run whose autoencoder is taken"
    )
    args = parser.parse_args()
    started = time.time()
    device = loop.begin(args)
    data = Data(CHAT, args)
    model, autoencoder = initialise(builtin_config(), args.seed)
    model, autoencoder = model.to(device), autoencoder.to(device)
    backbone = BagelBackbone(model, autoencoder, tokenizer())
    notes: dict[str, object] = {}
    data.wait()
    if args.resume:
        model.load_state_dict(loop.load_state(args.resume))
    if args.resume or args.autoencoder:
        load_autoencoder(args.resume or args.autoencoder, autoencoder)
    else:
        notes["vae_psnr"] = train_autoencoder(autoencoder, data.scenes, args, device)
        print(f"autoencoder: {notes['vae_psnr']:.2f} dB", flush=True)
    save_autoencoder(args.out, autoencoder)

    def encode(pictures: Tensor) -> Tensor:
        return encode_pixels(autoencoder, pictures, 2).half()

    scenes, edits, heldout = (
        Resident(pool, device, encode) for pool in (data.scenes, data.edits, data.heldout)
    )
    print(f"first data resident after {time.time() - started:.0f}s", flush=True)
    layouts = Layouts(backbone, device)
    if args.compile:
        torch._dynamo.config.cache_size_limit = 64
        for layer in (*model.language_model.model.layers, *model.vit_model.vision_model.encoder.layers):
            layer.compile(dynamic=False)
    u_rows, d_rows, e_rows = args.rows

    def forward(batch: PackedBatch):
        with loop.mixed(device):
            return backbone.forward(batch)

    def losses(described: Tensor) -> dict[str, Tensor]:
        text = loop.text_loss(forward, layouts.understanding, scenes, u_rows, described)
        text.backward()
        batch = layouts.drawing(scenes.table, scenes.pick(d_rows), args.copies)
        draw = F.mse_loss(forward(batch).scored, batch.target)
        (draw * (d_rows / (d_rows + e_rows))).backward()
        half = e_rows // 2
        batch = layouts.editing(
            edits.table,
            scenes.table,
            edits.pick(half),
            scenes.pick(e_rows - half),
            args.copies,
            lambda x: encode_pixels(autoencoder, x, 2),
        )
        edit = F.mse_loss(forward(batch).scored, batch.target)
        (edit * (e_rows / (d_rows + e_rows))).backward()
        return {"text": text, "draw": draw, "edit": edit}

    def measure(mode: int, rows: int) -> dict[str, float]:
        return loop.accuracy(backbone.forward, layouts.understanding, heldout.table, mode, rows)

    notes |= loop.train(model, losses, measure, (scenes, edits), args, started)
    loop.finish(notes, args)
    save_checkpoint(args.out / "model", model, autoencoder, backbone.tokenizer)
    print(f"saved after {time.time() - started:.0f}s", flush=True)


def save_autoencoder(folder: Path, autoencoder: nn.Module) -> None:
    """Its weights, and scale and shift of its latents."""
    torch.save({n: t.cpu() for n, t in autoencoder.state_dict().items()}, folder / "autoencoder.pt")
    config = {k: autoencoder.config[k] for k in ("scaling_factor", "shift_factor")}
    (folder / "autoencoder.json").write_text(json.dumps(config))


def load_autoencoder(folder: Path, autoencoder: nn.Module) -> None:
    """Reads what `save_autoencoder` wrote."""
    autoencoder.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True))
    autoencoder.register_to_config(**json.loads((folder / "autoencoder.json").read_text()))


if __name__ == "__main__":
    main()
