"""Trains `builtin:janus-tiny` from scratch on clean scenes of the miniature world, on one GPU in about ten minutes.

    python benchmarks/builtin/train_janus_tiny.py --out runs/janus-tiny

First the picture tokenizer, then the network on the same three kinds of rows as `train_bagel_tiny.py`, whose reasons hold
here too: questions and descriptions of a picture, a picture from its description, and editing or completing a picture.
What differs is that a picture is drawn code by code. Codes have no places of their own, so that copying what stays as it is
means to count along two pictures with text of any length between them: rows of editing jump over a random number of
positions there, or the network would learn one distance by heart and lose it behind a longer prompt.
"""

from __future__ import annotations

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
from loop import Captured, Data, Resident, adamw, decibels, disturb, edges, mask_parts, to_bytes, to_pixels
from pool import COMPLETE, INSTRUCTION, TEXT, Chat, Pool

from clear_adapters.backbones.janus.backbone import JanusBackbone
from clear_adapters.backbones.janus.tiny import builtin_config, initialise, small_processor
from clear_adapters.backbones.layout import SLOT
from clear_adapters.backbones.packed import PackedBatch

GAP = 256  # positions that a row of editing may jump over


# ----------------------------------------------------------------------------------------- picture tokenizer


def train_tokenizer(vq: nn.Module, pool: Pool, args, device: torch.device) -> dict[str, float]:
    """Codes by angle, straight through, with codes that nothing uses put where pictures are.

    Returns:
        `psnr` in dB of held-back scenes, and `used`, the share of the codes that stand in them.
    """
    vq.requires_grad_(True).train()
    rate, quantised = torch.tensor(0.0, device=device), torch.tensor(0.0, device=device)
    optimizer = adamw([{"params": list(vq.parameters())}], rate, 0.99, device)
    vq.to(memory_format=torch.channels_last)
    encoder, decoder = vq.encoder, vq.decoder
    if args.compile:
        encoder, decoder = torch.compile(encoder), torch.compile(decoder)
    started = time.time()
    resident = torch.from_numpy(pool.arrays["picture"][: min(pool.ready, 16_000)]).to(device)
    held = min(256, len(resident) // 2)
    codebook = vq.quantize.embedding.weight
    used = torch.zeros(len(codebook), device=device)

    def latents(pixels: Tensor) -> Tensor:
        return F.normalize(vq.quant_conv(encoder(pixels)).float(), dim=1)

    def one_step() -> tuple[Tensor, ...]:
        index = torch.randint(held, len(resident), (args.vae_batch,), device=device)
        pixels = to_pixels(resident[index])
        changed = torch.rand(len(pixels), 1, 1, 1, device=device) < args.disturbed
        pixels = torch.where(changed, disturb(pixels), pixels).contiguous(memory_format=torch.channels_last)
        with loop.mixed(device):
            z = latents(pixels)
            flat = z.permute(0, 2, 3, 1).flatten(0, 2)
            unit = F.normalize(codebook, dim=-1)
            codes = (flat.detach() @ unit.detach().T).argmax(-1)
            chosen = unit[codes]
            pull = (flat.detach() - chosen).pow(2).sum(-1).mean()
            commit = (flat - chosen.detach()).pow(2).sum(-1).mean()
            through = flat + quantised * (chosen - flat).detach()
            out = decoder(vq.post_quant_conv(through.view(*z.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)))
        error = out.float() - pixels
        square = (error**2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss = error.abs().mean() + square + 0.5 * edges(error)
        (loss + quantised * (pull + args.commit * commit)).backward()
        nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        used.mul_(0.99).index_add_(0, codes, torch.ones_like(codes, dtype=used.dtype))
        return square.detach(), pull.detach(), flat.detach()

    captured = Captured(one_step, device)
    warm = args.vae_steps // 10
    for step in range(args.vae_steps):
        share = step / args.vae_steps
        rate.fill_(args.vae_lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * share)))
        # At first without codes; then, until the last fifth, codes that nothing uses go where pictures are.
        quantised.fill_(float(step >= warm))
        square, pull, flat = captured()
        if step == warm - 1 or (step >= warm and step % 100 == 0 and share < 0.8):
            spare = torch.rand(len(flat), device=device).argsort()[: len(codebook)]
            spare = spare.repeat(len(codebook) // len(spare) + 1)[: len(codebook)]
            dead = torch.ones_like(used, dtype=torch.bool) if step == warm - 1 else used < 1
            with torch.no_grad():
                codebook.copy_(torch.where(dead[:, None], flat[spare], codebook))
        if step % 500 == 0 or step == args.vae_steps - 1:
            psnr = -10 * math.log10(float(square) / 4)
            alive = float((used > 1).float().mean())
            print(
                f"tokenizer {step} psnr {psnr:.2f} distance {float(pull):.3f} used {alive:.0%} "
                f"{time.time() - started:.0f}s",
                flush=True,
            )
    optimizer.zero_grad(set_to_none=True)
    vq.eval().requires_grad_(False)
    with torch.no_grad():
        codebook.copy_(F.normalize(codebook, dim=-1))
        pixels = to_pixels(resident[:held])
        codes = (latents(pixels).permute(0, 2, 3, 1).flatten(1, 2) @ codebook.T).argmax(-1)
        error = vq.decode(codes).float().clamp(-1, 1) - pixels
    return {"psnr": decibels(error), "used": len(codes.unique()) / len(codebook)}


# -------------------------------------------------------------------------------------------------- layouts


class Layouts:
    """Batches of rows that all have one layout, built on the device."""

    def __init__(self, backbone: JanusBackbone, device: torch.device) -> None:
        frames = backbone.frames
        self.backbone = backbone
        self.device = device
        grid = backbone.latent_grid((1, 1))
        self.cells = grid[0] * grid[1]
        self.condition = torch.tensor(frames.condition(grid), device=device)
        self.picture = torch.tensor(frames.picture(self.cells), device=device)
        self.restoration = torch.tensor(frames.restoration(grid), device=device)
        self.begin = torch.tensor(frames.start, device=device)
        framed = (self.begin, self.condition, self.picture, self.restoration)
        self.slots = {len(f): (f == SLOT).nonzero()[:, 0] for f in framed}
        asked, own = frames.text(False), frames.text(True)
        self.chat = Chat((tuple(asked[0]), tuple(asked[1])), (tuple(own[0]), tuple(own[1])))
        self.complete = torch.from_numpy(self.chat.block(COMPLETE, INSTRUCTION)).to(device).long()

    def frame(self, ids: Tensor, rows: int, block: int, there: Tensor | None = None) -> dict[str, Tensor]:
        """Columns of a frame; `there` (rows,) bool leaves it out of some rows."""
        held = ids.expand(rows, -1) if there is None else torch.where(there[:, None], ids, SLOT - 1)
        return self.text(held, block) | {"slots": self.slots[len(ids)]}

    def text(self, ids: Tensor, block: int) -> dict[str, Tensor]:
        """Columns of ids (rows, n); SLOT marks a slot, anything below it padding."""
        return {"ids": ids, "block": torch.where(ids >= SLOT, block, -1), "branch": torch.zeros_like(ids)}

    def batch(
        self,
        columns: list[dict[str, Tensor]],
        codes: list[tuple[int, Tensor]],
        pictures: tuple[int, Tensor] | None,
        scored: bool,
        jump: tuple[int, Tensor] | None = None,
    ) -> PackedBatch:
        """Joins columns and numbers positions.

        Args:
            columns: as `text` makes them; a column that has `positions` of its own numbers on from the trunk before it.
            codes: number of the column and codes (rows, N); with `scored` those of the last are asked for.
            pictures: number of the column and pixels (rows, 3, H, W) uint8.
            scored: whether the last codes are asked for.
            jump: before which column how many positions (rows,) are left out.
        """
        starts = [0]
        for column in columns:
            starts.append(starts[-1] + column["ids"].shape[1])
        ids, block, branch = (torch.cat([c[k] for c in columns], 1) for k in ("ids", "block", "branch"))
        b, length = ids.shape
        there = block >= 0
        trunk = there & (branch == 0)
        positions = trunk.cumsum(1) - 1
        for number, column in enumerate(columns):
            if "offset" in column:
                before = trunk[:, : starts[number]].sum(1, keepdim=True)
                own = slice(starts[number], starts[number + 1])
                positions[:, own] = before + column["offset"]
        if jump is not None:
            positions[:, starts[jump[0]] :] += jump[1][:, None]
        every = torch.arange(b, device=self.device)[:, None] * length

        def slots(number: int) -> Tensor:
            return starts[number] + columns[number]["slots"]

        gen_index = (every + torch.cat([slots(n) for n, _ in codes])).flatten()
        joined = torch.cat([c for _, c in codes], 1).long()
        per_row = joined.shape[1]
        last = torch.arange(per_row - self.cells if scored else per_row, per_row, device=self.device)
        flat = torch.zeros(0, device=self.device)
        places = None if pictures is None else (every + slots(pictures[0])).flatten()
        return PackedBatch(
            ids=ids.clamp(min=0),
            positions=positions.clamp(min=0),
            block=block,
            full=torch.zeros_like(there),
            branch=branch,
            und_index=flat.long(),
            gen_index=gen_index,
            patches=None if pictures is None else pictures[1],
            patch_positions=None,
            patch_valid=None,
            patch_source=None if places is None else torch.arange(len(places), device=self.device),
            patch_index=places,
            pictures=[],
            # With gradient: the table of codes is trained here.
            latents=self.backbone.embed_codes(joined.flatten()).float(),
            latent_source=flat.long(),
            latent_positions=flat.long(),
            latent_time=flat,
            latent_noised=flat.bool(),
            latent_bridged=torch.zeros(b * per_row, dtype=torch.bool, device=self.device),
            scored_at=(torch.arange(b, device=self.device)[:, None] * per_row + last).flatten(),
            scored_row=flat.long(),
            text_at=flat.long(),
            text_targets=flat.long(),
            text_row=flat.long(),
            text_weight=flat,
            target=joined.flatten(),
        )

    def understanding(
        self, pool: dict[str, Tensor], index: Tensor, version: Tensor, modes: Tensor
    ) -> tuple[PackedBatch, Tensor, Tensor]:
        """Pictures with question branches. Modes: 0 as the encoder sees them, 1 as codes, 2 both.

        All text places are asked for; the target is -1 where nothing is scored. Also gives each place's row and branch.
        """
        b = len(index)
        text = {k: pool[k][index, version].long() for k in ("ids", "offset", "block", "branch", "target")}
        body = {
            "ids": torch.where(text["block"] >= 0, text["ids"], SLOT - 1),
            "offset": text["offset"],
            "block": torch.where(text["block"] >= 0, text["block"] + 3, -1),
            "branch": text["branch"],
        }
        columns = [
            self.frame(self.begin, b, 0),
            self.frame(self.condition, b, 1, modes != 0),
            self.frame(self.picture, b, 2, modes != 1),
            body,
        ]
        batch = self.batch(
            columns,
            [(1, pool["latent"][index])],
            (2, pool["picture"][index].permute(0, 3, 1, 2)),
            False,
        )
        first = batch.ids.shape[1] - TEXT
        rows = torch.arange(b, device=self.device)[:, None].expand(b, TEXT)
        places = torch.arange(first, first + TEXT, device=self.device)
        batch.text_at = (rows * batch.ids.shape[1] + places).flatten()
        batch.text_targets = text["target"].flatten()
        batch.text_weight = pool["weight"][index, version].float().flatten()
        return batch, rows.flatten(), text["branch"].flatten()

    def drawing(self, pool: dict[str, Tensor], index: Tensor) -> PackedBatch:
        """A description, then its picture; one row in ten has no description."""
        b = len(index)
        ids = pool["caption"][index].long()
        empty = torch.rand(b, device=self.device) < 0.1
        ids = torch.where((ids < 0) | empty[:, None], SLOT - 1, ids)
        columns = [self.frame(self.begin, b, 0), self.text(ids, 1), self.frame(self.restoration, b, 2)]
        return self.batch(columns, [(2, pool["latent"][index])], None, True)

    def editing(
        self,
        edits: dict[str, Tensor],
        scenes: dict[str, Tensor],
        index: Tensor,
        other: Tensor,
        tokenise: Callable[[Tensor], Tensor],
    ) -> PackedBatch:
        """Half edits, half pictures with parts missing; the encoder's tokens are dropped in three rows of ten."""
        half = len(index)
        masked = to_pixels(scenes["picture"][other])
        masked = mask_parts(masked, torch.ones(len(other), dtype=torch.bool, device=self.device))
        before = torch.cat((edits["picture"][index].permute(0, 3, 1, 2), to_bytes(masked)))
        b = len(before)
        condition = torch.cat((edits["latent"][index].long(), tokenise(before[half:])))
        clean = torch.cat((edits["after_latent"][index], scenes["latent"][other])).long()
        ids = torch.cat((edits["caption"][index].long(), self.complete.expand(len(other), -1)))
        ids = torch.where(ids < 0, SLOT - 1, ids)
        keep = torch.rand(b, device=self.device) >= 0.3
        columns = [
            self.frame(self.begin, b, 0),
            self.frame(self.condition, b, 1),
            self.frame(self.picture, b, 2, keep),
            self.text(ids, 3),
            self.frame(self.restoration, b, 4),
        ]
        gap = (torch.rand(b, device=self.device) * GAP).long()
        return self.batch(columns, [(1, condition), (4, clean)], (2, before), True, (3, gap))


# -------------------------------------------------------------------------------------------------- training


def prepare_weights(backbone: JanusBackbone) -> None:
    """Small embeddings to begin with; codes begin where the tokenizer has them."""
    model = backbone.model
    decoder = backbone.decoder
    nn.init.normal_(decoder.embed_tokens.weight, std=0.02)
    nn.init.normal_(model.model.vision_model.embeddings.position_embedding.weight, std=0.02)
    for layer in decoder.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data.mul_((2 * len(decoder.layers)) ** -0.5)
    table = model.model.vqmodel.quantize.embedding.weight
    model.model.generation_embeddings.weight.data.copy_(table * table.shape[1] ** 0.5)


def main() -> None:
    """Runs everything."""
    parser = loop.parser(__doc__)
    parser.add_argument(
        "--rows", type=int, nargs=3, default=(144, 32, 80), help="understanding, drawing, editing"
    )
    parser.add_argument(
        "--disturbed", type=float, default=0.2, help="share of pictures that the tokenizer sees changed"
    )
    parser.add_argument(
        "--commit", type=float, default=0.05, help="weight with which latents are drawn to their codes"
    )
    parser.add_argument("--code-weight", type=float, default=0.5, help="of codes against text in the loss")
    parser.add_argument(
        "--autoencoder", type=Path, help="folder of an earlier run whose picture tokenizer is taken"
    )
    args = parser.parse_args()
    started = time.time()
    device = loop.begin(args)
    config = builtin_config()
    side = config.vision_config.image_size
    backbone = JanusBackbone.wrap(
        initialise(config, args.seed).to(device), small_processor(side, config.vision_config.num_image_tokens)
    )
    model = backbone.model.requires_grad_(True)
    vq = model.model.vqmodel
    layouts = Layouts(backbone, device)
    data = Data(layouts.chat, args)
    notes: dict[str, object] = {}
    data.wait()
    if args.autoencoder:
        vq.load_state_dict(torch.load(args.autoencoder / "autoencoder.pt", weights_only=True))
    elif not args.resume:
        notes["tokenizer"] = train_tokenizer(vq, data.scenes, args, device)
        print(f"tokenizer: {notes['tokenizer']}", flush=True)
        torch.save({n: t.cpu() for n, t in vq.state_dict().items()}, args.out / "autoencoder.pt")
    prepare_weights(backbone)
    if args.resume:
        model.load_state_dict(loop.load_state(args.resume))
    vq.requires_grad_(False)

    @torch.no_grad()
    def tokenise(pictures: Tensor) -> Tensor:
        with loop.mixed(device):
            return backbone.tokenise(pictures)

    def encode(pictures: Tensor) -> Tensor:
        return tokenise(pictures).short()

    scenes, edits, heldout = (
        Resident(pool, device, encode) for pool in (data.scenes, data.edits, data.heldout)
    )
    print(f"first data resident after {time.time() - started:.0f}s", flush=True)
    if args.compile:
        torch._dynamo.config.cache_size_limit = 64
        for layer in (*backbone.decoder.layers, *model.model.vision_model.encoder.layers):
            layer.compile(dynamic=False)
    u_rows, d_rows, e_rows = args.rows

    def forward(batch: PackedBatch):
        with loop.mixed(device):
            return backbone.forward(batch)

    def code_loss(batch: PackedBatch) -> Tensor:
        target = batch.target[batch.scored_at]
        return F.cross_entropy(forward(batch).scored.float(), target)

    def losses(described: Tensor) -> dict[str, Tensor]:
        text = loop.text_loss(forward, layouts.understanding, scenes, u_rows, described)
        text.backward()
        draw = code_loss(layouts.drawing(scenes.table, scenes.pick(d_rows)))
        (args.code_weight * draw * (d_rows / (d_rows + e_rows))).backward()
        half = e_rows // 2
        edit = code_loss(
            layouts.editing(edits.table, scenes.table, edits.pick(half), scenes.pick(e_rows - half), tokenise)
        )
        (args.code_weight * edit * (e_rows / (d_rows + e_rows))).backward()
        return {"text": text, "draw": draw, "edit": edit}

    def measure(mode: int, rows: int) -> dict[str, float]:
        return loop.accuracy(backbone.forward, layouts.understanding, heldout.table, mode, rows)

    notes |= loop.train(model, losses, measure, (scenes, edits), args, started)
    loop.finish(notes, args)
    model.bfloat16()
    backbone.save(args.out / "model")
    print(f"saved after {time.time() - started:.0f}s", flush=True)


if __name__ == "__main__":
    main()
