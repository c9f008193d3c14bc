"""The paths that checks take through a backbone, and what came out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clear_adapters.attached import AttachedModel
from clear_adapters.backbones.base import Backbone, Context, Restoration
from clear_adapters.backbones.packed import ImagePiece, LatentPiece, Piece, PreparedImage, TextPiece
from clear_adapters.bridge import LatentBridge
from clear_adapters.config import LoraSettings
from clear_adapters.sampling import LatentSampling, TextSampling

TOLERANCE = 1e-4
"""Float32 on a CPU: batches and masks change the order of summation (seen: 3e-6)."""

GREEDY = TextSampling(max_new_tokens=6)
WARM = TextSampling(max_new_tokens=6, temperature=1.0)
ODE = LatentSampling(steps=4, guidance_text=1, guidance_image=1)
SDE = replace(ODE, sde_sigma=0.3)
GUIDED = LatentSampling(steps=4)
SIZES = [(64, 48), (40, 64), (64, 64)]
QUESTIONS = ["What is it?", "Which colour, and why so?", "é?"]
SMALL = LoraSettings({"understanding": 3, "generation": 2})


@dataclass(frozen=True)
class Outcome:
    """What one row of `run` wrote and restored.

    Attributes:
        ids: of the texts before and after the restoration.
        logprobs: of both.
        restoration: between them.
    """

    ids: tuple[list[int], list[int]]
    logprobs: tuple[Tensor, Tensor]
    restoration: Restoration


def images() -> list[Image.Image]:
    """Three pictures of noise, of different shapes."""
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))
        for seed, (width, height) in enumerate(SIZES)
    ]


def pictures(backbone: Backbone) -> list[PreparedImage]:
    """The three pictures, prepared."""
    return [backbone.prepare(image) for image in images()]


def randomise(attached: AttachedModel, seed: int = 0) -> AttachedModel:
    """Random weights in LoRA and bridge, since an update of zero would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in attached.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return attached


def ask(
    backbone: Backbone, rows: Sequence[int], seeds: Sequence[int] | None = None
) -> tuple[Context, Context]:
    """Contexts of some of the three rows, before the first turn, and without the picture."""
    own = [pictures(backbone)[r] for r in rows]
    questions = [backbone.encode_text(QUESTIONS[r]) for r in rows]
    context = backbone.start(len(rows), [10 + r for r in rows] if seeds is None else seeds)
    context = backbone.read_text(context, [backbone.encode_text("Look.")] * len(rows))
    blind = backbone.read_text(context.fork(), questions)
    return backbone.read_text(backbone.read_image(context, own), questions), blind


def run(
    backbone: Backbone,
    bridge: LatentBridge | None,
    rows: Sequence[int],
    latent: LatentSampling = SDE,
    text: TextSampling = WARM,
) -> list[Outcome]:
    """A whole path: write, restore, read back, write."""
    context, blind = ask(backbone, rows)
    unthought = context.fork()
    context, first = backbone.write_text(context, text)
    context, restorations = backbone.restore(context, latent, [unthought, blind])
    context = backbone.read_restoration(context, restorations, bridge)
    _, second = backbone.write_text(context, text)
    outcomes = []
    for f, s, r in zip(first, second, restorations, strict=True):
        assert f.logprobs is not None
        assert s.logprobs is not None
        outcomes.append(Outcome((f.ids.tolist(), s.ids.tolist()), (f.logprobs, s.logprobs), r))
    return outcomes


def difference(a: Sequence[Outcome], b: Sequence[Outcome], tolerance: float = 0.0) -> str | None:
    """The first thing in which outcomes differ by more than a tolerance, in words; None where nothing does."""
    for row, (x, y) in enumerate(zip(a, b, strict=True)):
        for when, i, j in zip(("before", "after"), x.ids, y.ids, strict=True):
            if i != j:
                return f"row {row} wrote {i} and {j} {when} the restoration"
        left, right = x.restoration, y.restoration
        if (left.grid, left.size, left.kind) != (right.grid, right.size, right.kind):
            return f"row {row} restored on grid {left.grid} and {right.grid}"
        if left.kind == "codes":
            if not torch.equal(left.tokens, right.tokens):
                return f"row {row} restored other codes in {int((left.tokens != right.tokens).sum())} places"
        elif (largest := float((left.tokens - right.tokens).abs().max())) > tolerance:
            return f"row {row} restored latents that differ by {largest:.2g}"
        for when, p, q in zip(("before", "after"), x.logprobs, y.logprobs, strict=True):
            if (largest := float((p - q).abs().max())) > tolerance:
                return f"row {row}: log-probabilities {when} the restoration differ by {largest:.2g}"
    return None


def pieces(backbone: Backbone, row: int, outcome: Outcome, step: int | None = None) -> list[Piece]:
    """The path of a row as pieces; with `step` a copy of the restoration that is scored stands in a branch of its own."""
    restoration = outcome.restoration
    own: list[Piece] = [
        TextPiece(backbone.encode_text("Look.")),
        ImagePiece(pictures(backbone)[row]),
        TextPiece(backbone.encode_text(QUESTIONS[row])),
        TextPiece(torch.tensor(outcome.ids[0]), scored=True),
    ]
    if step is not None:
        trace = restoration.trace
        copy = LatentPiece(restoration.tokens[0], grid=restoration.grid, scored=True, branch=1)
        if trace is not None:
            copy = replace(copy, latent=trace.x[0, step], time=float(trace.t[step]), noised=True)
        own.append(copy)
    final = LatentPiece(restoration.tokens[0], grid=restoration.grid, bridged=True)
    return [*own, final, TextPiece(torch.tensor(outcome.ids[1]), scored=True)]


def describe(backbone: Backbone) -> dict[str, object]:
    """Everything about a model that attach could change, by identity."""
    model = backbone.model
    return {
        "modules": [(n, id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()],
        "order of modules": [list(m._modules) for m in model.modules()],
        "parameters": [
            (n, id(p), p.data_ptr(), p.requires_grad, p.dtype) for n, p in model.named_parameters()
        ],
        "weights": [float(p.detach().double().sum()) for p in model.parameters()],
    }
