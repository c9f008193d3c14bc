"""What training the built-in bases shares: data that fill up while training runs, steps as one CUDA graph, the loop."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch
import torch.nn.functional as F
from pool import VERSIONS, Chat, Pool, edit_item, heldout_item, train_item
from safetensors.torch import load_file
from torch import Tensor, nn

from clear_adapters.backbones.packed import PackedBatch
from clear_adapters.world.questions import KINDS

# -------------------------------------------------------------------------------------------------- pictures


def to_pixels(pictures: Tensor) -> Tensor:
    """(n, SIDE, SIDE, 3) uint8 to (n, 3, SIDE, SIDE) float32 in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(pixels: Tensor) -> Tensor:
    """(n, 3, H, W) float32 in [-1, 1] to uint8."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8)


def disturb(pixels: Tensor) -> Tensor:
    """Photometric changes for a picture tokenizer, which must be able to hold any picture."""
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


def edges(error: Tensor) -> Tensor:
    """Mean difference of neighbouring errors (n, 3, H, W): what keeps outlines sharp."""
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    return across + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()


def decibels(error: Tensor) -> float:
    """Mean PSNR of errors (n, 3, H, W) in [-2, 2]."""
    return float((-10 * ((error**2).mean((1, 2, 3)) / 4).log10()).mean())


# ------------------------------------------------------------------------------------------------------ data


class Data:
    """Training scenes, edits and held-out scenes, made by background processes.

    Attributes:
        scenes, edits, heldout: the pools.
    """

    def __init__(self, chat: Chat, args: argparse.Namespace) -> None:
        """Starts the processes; each kind has its own, or all scenes would be made before the first edit."""
        started = time.time()
        for_edits = max(1, args.workers // 3)
        # One thread to a process: OpenCV would start one a core in each.
        groups = [
            mp.get_context("fork").Pool(n, cv2.setNumThreads, (1,))
            for n in (max(1, args.workers - for_edits), for_edits)
        ]
        self.scenes = Pool(partial(train_item, chat), args.scenes, 10_000_000 * args.seed)
        self.edits = Pool(partial(edit_item, chat), args.edits, 10_000_000 * args.seed)
        self.heldout = Pool(partial(heldout_item, chat), args.heldout)

        def fill() -> None:
            self.heldout.fill(groups[0])
            threads = [
                threading.Thread(target=pool.fill, args=(group,), daemon=True)
                for pool, group in zip((self.scenes, self.edits), groups, strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            print(f"all data ready after {time.time() - started:.0f}s", flush=True)

        threading.Thread(target=fill, daemon=True).start()

    def wait(self, share: float = 0.05) -> None:
        """Until so much of each pool is there."""
        while min(p.ready / p.size for p in (self.scenes, self.edits)) < share:
            time.sleep(0.2)


class Resident:
    """A pool on the device, with what its pictures are encoded to; it grows while training runs.

    Attributes:
        table: arrays of the whole size, with `latent` and `after_latent`; rows from `ready` on are not there yet.
        ready: () float32 on the device.
    """

    def __init__(self, pool: Pool, device: torch.device, encode: Callable[[Tensor], Tensor]) -> None:
        """Brings over what is there; `encode` takes (n, 3, H, W) uint8."""
        self.pool = pool
        self.device = device
        self.encode = encode
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
            self._put(name, torch.from_numpy(values[self.have : ready]), self.have)
        for source, name in (("picture", "latent"), ("after", "after_latent")):
            for first in range(self.have, ready, 512) if source in self.table else ():
                part = self.table[source][first : min(first + 512, ready)]
                self._put(name, self.encode(part.permute(0, 3, 1, 2)), first)
        self.have = ready
        self.ready.fill_(ready)

    def _put(self, name: str, values: Tensor, first: int) -> None:
        if name not in self.table:
            shape = (self.pool.size, *values.shape[1:])
            self.table[name] = torch.zeros(shape, dtype=values.dtype, device=self.device)
        self.table[name][first : first + len(values)] = values.to(self.device)

    def pick(self, n: int) -> Tensor:
        """(n,) random rows of those that are there."""
        return (torch.rand(n, device=self.device) * self.ready).long()


# -------------------------------------------------------------------------------------------------- training


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


def mixed(device: torch.device) -> torch.autocast:
    """bfloat16 products on a GPU; casts are not kept, for a captured step."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def adamw(groups: Sequence[dict[str, Any]], rate: Tensor, beta: float, device: torch.device) -> Any:
    """AdamW whose rate is a tensor, so that a captured step sees it change."""
    cuda = device.type == "cuda"
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, beta), fused=cuda, capturable=cuda)


Understanding = Callable[[dict[str, Tensor], Tensor, Tensor, Tensor], tuple[PackedBatch, Tensor, Tensor]]
"""Rows of pictures with question branches: table, rows, version and mode to a batch and each text place's row and branch."""


def text_loss(
    forward: Callable[[PackedBatch], Any],
    understanding: Understanding,
    scenes: Resident,
    rows: int,
    described: Tensor,
) -> Tensor:
    """Of questions about training scenes: six rows in ten as the encoder sees them, a quarter as latents, the others both.

    Args:
        forward: of the model.
        understanding: lays the rows out.
        scenes: what is asked about.
        rows: how many.
        described: () share of rows that begin with a description.
    """
    chance = torch.rand(rows, device=scenes.device)
    modes = (chance > 0.6).long() + (chance > 0.85).long()
    version = torch.randint(1, VERSIONS, (rows,), device=scenes.device)
    version = torch.where(torch.rand(rows, device=scenes.device) < described, 0, version)
    batch, _, _ = understanding(scenes.table, scenes.pick(rows), version, modes)
    logits = forward(batch).text_logits.float()
    each = F.cross_entropy(logits, batch.text_targets, ignore_index=-1, reduction="none")
    return (each * batch.text_weight).sum() / batch.text_weight.sum()


@torch.no_grad()
def accuracy(
    forward: Callable[[PackedBatch], Any],
    understanding: Understanding,
    pool: dict[str, Tensor],
    mode: int,
    rows: int,
) -> dict[str, float]:
    """Share of held-out answers whose every token is the likeliest, by kind: greedy decoding would write them."""
    device = pool["picture"].device
    right = torch.zeros(len(KINDS) + 1, device=device)
    seen = torch.zeros_like(right)
    for index in torch.arange(min(rows, len(pool["picture"])), device=device).split(128):
        modes = torch.full_like(index, mode)
        batch, row, branch = understanding(pool, index, torch.zeros_like(index), modes)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = forward(batch)
        scored = batch.text_targets >= 0
        row, branch = row[scored], branch[scored]
        hit = (out.text_logits.argmax(-1) == batch.text_targets)[scored].float()
        every = torch.ones(len(index) * 32, device=device)
        every = every.scatter_reduce(0, row * 32 + branch, hit, "amin")
        asked = torch.zeros_like(every).index_fill(0, row * 32 + branch, 1.0)
        kind = pool["kind"][index, 0].long().flatten()
        right.index_add_(0, kind, every * asked)
        seen.index_add_(0, kind, asked)
    share = {k: float(right[i] / seen[i].clamp(min=1)) for i, k in enumerate(KINDS)}
    share["all"] = float(right[:-1].sum() / seen[:-1].sum())
    return {k: round(v, 4) for k, v in share.items()}


def train(
    model: nn.Module,
    losses: Callable[[Tensor], dict[str, Tensor]],
    measure: Callable[[int, int], dict[str, float]],
    tables: Sequence[Resident],
    args: argparse.Namespace,
    started: float,
) -> dict[str, Any]:
    """The network's training; leaves the exponential average of its weights in it.

    Args:
        model: its weights that require gradients are trained.
        losses: given the share of rows that begin with a description, accumulates gradients and gives the losses.
        measure: given a way of showing pictures (0, 1 or 2) and a number of scenes, the held-out accuracy by kind.
        tables: training data, which are let grow.
        args: `steps`, `lr`, `seconds`, `resume`, `out`, `device`.
        started: when the run began.

    Returns:
        What the notes of a run say.
    """
    device = torch.device(args.device)
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim == 2], "weight_decay": 0.05},
        {"params": [p for p in weights if p.ndim != 2], "weight_decay": 0.0},
    ]
    rate = torch.tensor(0.0, device=device)
    optimizer = adamw(groups, rate, 0.98, device)
    average = [p.detach().clone() for p in weights]
    begin = steps_of(args.resume) if args.resume else 0
    keep = torch.tensor(0.0, device=device)
    described = torch.tensor(0.5, device=device)
    names: list[str] = []

    def one_step() -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        found = losses(described)
        names[:] = [*found, "norm"]
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        torch._foreach_mul_(average, keep)
        torch._foreach_add_(average, torch._foreach_mul([w.detach() for w in weights], 1 - keep))
        return (*(loss.detach() for loss in found.values()), norm)

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
        found = captured()
        step += 1
        last = share >= 1 or step >= args.steps
        if step % 50 == 0:
            for resident in tables:
                resident.grow()
        if step % 500 == 0 or last or step in (begin + 1, begin + 20):
            values = [round(float(x), 4) for x in found]
            row: dict[str, Any] = dict(zip(names, values, strict=True))
            row |= {"step": step, "seconds": round(time.time() - train_started, 1)}
            if not all(math.isfinite(v) for v in values):
                raise SystemExit(f"training diverged: {row}")
            if step % 1000 == 0 or last:
                row["heldout"] = measure(0, 512)
            log.append(row)
            print(row, flush=True)
        if last:
            break
    (args.out / "log.json").write_text(json.dumps(log, indent=1))
    save_state(args.out, model.state_dict(), step)
    for p, a in zip(weights, average, strict=True):
        p.data.copy_(a)
    model.eval()
    return {
        "heldout": {m: measure(i, 1024) for i, m in enumerate(("patches", "latent", "both"))},
        "steps": step,
        "train_seconds": time.time() - train_started,
    }


def finish(notes: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints and writes what a run was."""
    notes["args"] = {k: str(v) for k, v in vars(args).items()}
    if torch.device(args.device).type == "cuda":
        notes["device"] = torch.cuda.get_device_name()
        notes["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(notes, indent=1), flush=True)
    (args.out / "notes.json").write_text(json.dumps(notes, indent=1))


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that both scripts have."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=mp.cpu_count() - 1)
    p.add_argument("--scenes", type=int, default=64_000)
    p.add_argument("--edits", type=int, default=32_000)
    p.add_argument("--heldout", type=int, default=1_024)
    p.add_argument("--vae-steps", type=int, default=3_000, help="of the picture tokenizer")
    p.add_argument("--vae-batch", type=int, default=96)
    p.add_argument("--vae-lr", type=float, default=2e-3)
    p.add_argument("--steps", type=int, default=8_000)
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--seconds", type=float, default=1e9, help="stop (and save) after this long")
    p.add_argument("--resume", type=Path, help="folder of an earlier run's states, or of a finished model")
    p.add_argument("--compile", action="store_true")
    return p


def begin(args: argparse.Namespace) -> torch.device:
    """Seeds, settings and the output folder."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    args.out.mkdir(parents=True, exist_ok=True)
    return torch.device(args.device)


# ---------------------------------------------------------------------------------------------------- states


def save_state(folder: Path, tensors: dict[str, Tensor], step: int) -> None:
    """Float32 weights in two files, so that a later run can go on."""
    names = sorted(tensors)
    for part in range(2):
        torch.save({n: tensors[n].cpu() for n in names[part::2]}, folder / f"state{part}.pt")
    (folder / "state.json").write_text(json.dumps({"steps": step}))


def load_state(folder: Path) -> dict[str, Tensor]:
    """Reads what `save_state` wrote, or the rounded weights of a finished model."""
    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    return torch.load(folder / "state0.pt", weights_only=True) | torch.load(
        folder / "state1.pt", weights_only=True
    )


def steps_of(folder: Path) -> int:
    """How long the run of a state, or of a finished model, was."""
    name = "state.json" if (folder / "state.json").is_file() else "provenance.json"
    return int(json.loads((folder / name).read_text())["steps"])
