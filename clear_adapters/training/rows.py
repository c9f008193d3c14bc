"""What stages 1 and 2 share: an example as a recorded transcript, flow times, and noise that belongs to its row."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clear_adapters.backbones.base import Backbone
from clear_adapters.backbones.packed import PackedBatch, PreparedImage
from clear_adapters.datasets.example import decibels
from clear_adapters.datasets.traces import TraceSettings, build_transcript, choose_path
from clear_adapters.errors import ClearValueError
from clear_adapters.prompts import Protocol
from clear_adapters.sampling import RowRandom, shift_time
from clear_adapters.training.objective import Draw
from clear_adapters.transcript import Transcript


def draw_transcript(
    backbone: Backbone,
    protocol: Protocol,
    draw: Draw,
    rng: random.Random,
    traces: TraceSettings,
    vit_drop: float,
) -> Transcript:
    """An example as the trace that a model is trained on, with prepared pictures in it; a function of the draw alone.

    Args:
        backbone: prepares pictures.
        protocol: its system prompt.
        draw: the example.
        rng: where chance comes from; the same number of draws for every example.
        traces: how the path is chosen.
        vit_drop: probability with which the degraded picture's understanding tokens are left out.

    Raises:
        ImageError: a picture cannot be read.
    """
    example = draw.example
    image = backbone.prepare(example.load())
    clean, psnr = None, example.psnr
    if example.extra.get("psnr_side") != max(image.size):
        clean = _clean(backbone, draw)
        psnr = None if clean is None else prepared_psnr(image, clean)
    path = choose_path(example, traces, rng, psnr)
    seen = rng.random() >= vit_drop
    if path in ("restore", "always", "recorded") and clean is None:
        clean = _clean(backbone, draw)
    return build_transcript(example, protocol, path, image=image, clean=clean, understanding=seen)


def _clean(backbone: Backbone, draw: Draw) -> PreparedImage | None:
    clean = draw.example.load_clean()
    return None if clean is None else backbone.prepare(clean)


def draw_time(rng: random.Random, shift: float) -> float:
    """A flow time of training: `sigmoid(N(0, 1))`, moved by the shift (as released)."""
    return shift_time(1 / (1 + math.exp(-rng.gauss(0, 1))), shift)


def prepared(image: Any) -> PreparedImage:
    """What a transcript from `draw_transcript` holds as a picture: one that is prepared already."""
    if not isinstance(image, PreparedImage):
        raise ClearValueError(f"expected a prepared picture, not {type(image).__name__}")
    return image


def prepared_psnr(image: PreparedImage, clean: PreparedImage) -> float | None:
    """PSNR in dB of two prepared pictures at the model's resolution; None where their sizes differ."""
    if image.size != clean.size:
        return None
    a, b = (p.float() if p.dtype == torch.uint8 else (p + 1) * 127.5 for p in (image.picture, clean.picture))
    return decibels(float((a - b).pow(2).mean()))


@dataclass(frozen=True)
class NoisePlan:
    """Noise for a batch's noised copies that comes from each row's seed and does not depend on its batch.

    Attributes:
        seeds: (B,) int64.
        places: (M,) int64, the place of each noised token in its own row.
        lanes: noised tokens of the longest row.
    """

    seeds: Tensor
    places: Tensor
    lanes: int

    @classmethod
    def of(cls, batch: PackedBatch, seeds: Sequence[int]) -> NoisePlan:
        """The plan of a packed batch on the CPU."""
        rows = batch.scored_row
        places = torch.arange(len(rows))
        if len(rows):
            places = places - torch.searchsorted(rows, rows, right=False)
        lanes = int(places.max()) + 1 if len(rows) else 0
        return cls(torch.tensor(list(seeds), dtype=torch.int64), places, lanes)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> NoisePlan:
        """The plan on a device."""
        return NoisePlan(
            self.seeds.to(device, non_blocking=non_blocking),
            self.places.to(device, non_blocking=non_blocking),
            self.lanes,
        )

    def pin_memory(self) -> NoisePlan:
        """The plan in page-locked memory (called by a DataLoader)."""
        return NoisePlan(self.seeds.pin_memory(), self.places.pin_memory(), self.lanes)

    def draw(self, batch: PackedBatch) -> Tensor:
        """(G, C) float32 like `batch.latents`: noise at the noised copies, zero elsewhere."""
        noise = torch.zeros_like(batch.latents)
        width = noise.shape[-1]  # 0 for codes, which take none
        if self.lanes and width:
            drawn = RowRandom(self.seeds).normal(self.lanes * width).view(len(self.seeds), -1, width)
            noise[batch.scored_at] = drawn[batch.scored_row, self.places]
        return noise


def without_weights(backbone: Backbone) -> Backbone:
    """A copy of the verbs that prepares and packs and holds no weights, for spawned data workers."""
    light = copy.copy(backbone)
    for name, value in list(vars(light).items()):
        if isinstance(value, nn.Module):
            setattr(light, name, None)
    return light
