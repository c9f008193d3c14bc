"""Stage 1: supervised tuning on traces (paper, section 3.2).

Cross-entropy on SAMPLED text, and flow matching on noised copies of the clean picture that nothing later sees; what
follows a restoration reads the clean latent. Supervised text is never dropped, unlike in the released code. Both
losses are averaged over the tokens of the whole step, whatever the accumulation and the number of processes.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear_adapters.backbones.base import Backbone, LatentPiece, Piece, PreparedImage, TextPiece
from clear_adapters.datasets.example import decibels
from clear_adapters.datasets.traces import TraceSettings, build_transcript, choose_path
from clear_adapters.errors import ClearValueError
from clear_adapters.prompts import Protocol
from clear_adapters.replay import pieces
from clear_adapters.sampling import RowRandom, shift_time
from clear_adapters.training.objective import Draw, Objective
from clear_adapters.transcript import ANSWER_CLOSE, ANSWER_OPEN, Origin, TextSegment, Transcript


@dataclass(frozen=True)
class SftSettings:
    """What stage 1 does.

    Attributes:
        mode: `clear` trains the whole protocol; `direct` is the plain rival: understanding tokens of the degraded
            picture, the question, the answer, in the family's own chat, with no protocol and no latent.
        vit_drop: probability with which a row's understanding tokens of the degraded picture are left out.
        noised_copies: noised copies of each restoration, each at its own time.
        timestep_shift: s of `t = s u / (1 + (s - 1) u)` with `u = sigmoid(N(0, 1))`.
        answer_weight: of the answer's tokens among the others in the cross-entropy: an answer is a few tokens of a long
            trace. The plain rival's text is all answer, so that it stays as it is.
        ce_weight: of the cross-entropy.
        mse_weight: of the flow loss.
        traces: how paths are chosen.

    Raises:
        ClearValueError: a value out of its range.
    """

    mode: Literal["clear", "direct"] = "clear"
    vit_drop: float = 0.4
    noised_copies: int = 2
    timestep_shift: float = 1.0
    answer_weight: float = 1.0
    ce_weight: float = 1.0
    mse_weight: float = 0.5
    traces: TraceSettings = field(default_factory=TraceSettings)

    def __post_init__(self) -> None:
        if self.mode not in ("clear", "direct"):
            raise ClearValueError(f"mode={self.mode!r}: 'clear' or 'direct'")
        if not 0 <= self.vit_drop <= 1:
            raise ClearValueError(f"vit_drop={self.vit_drop}: a probability in [0, 1]")
        if not 1 <= self.noised_copies <= 64:
            raise ClearValueError(f"noised_copies={self.noised_copies}: from 1 to 64")
        for name in ("answer_weight", "ce_weight", "mse_weight"):
            if not getattr(self, name) >= 0:
                raise ClearValueError(f"{name}={getattr(self, name)}: must not be negative")
        if not self.timestep_shift > 0:
            raise ClearValueError(f"timestep_shift={self.timestep_shift}: must be positive")


class SftObjective(Objective):
    """Stage 1's batches and loss."""

    parts = ("ce", "mse")
    counts = ("text_tokens", "latent_tokens")

    def __init__(self, backbone: Backbone, protocol: Protocol, settings: SftSettings) -> None:
        self.backbone = backbone
        self.protocol = protocol
        self.settings = settings

    def __getstate__(self) -> dict[str, Any]:
        """What a data worker gets where it is spawned and not forked: preparing and packing need no weights."""
        backbone = copy.copy(self.backbone)
        for name, value in list(vars(backbone).items()):
            if isinstance(value, nn.Module):
                setattr(backbone, name, None)
        return {**vars(self), "backbone": backbone}

    # -- batches

    def row(self, draw: Draw) -> list[Piece]:
        """One example as a row of pieces; a function of the draw alone.

        Raises:
            ImageError: a picture cannot be read.
        """
        example, settings, backbone = draw.example, self.settings, self.backbone
        rng = random.Random(draw.seed)
        image = backbone.prepare(example.load())
        clean = None
        if settings.mode == "direct":
            transcript = build_transcript(example, self.protocol, "plain", image=image)
        else:
            psnr = example.psnr
            if example.extra.get("psnr_side") != max(image.size):
                clean = self._clean(draw)
                psnr = None if clean is None else prepared_psnr(image, clean)
            path = choose_path(example, settings.traces, rng, psnr)
            seen = rng.random() >= settings.vit_drop
            if path in ("restore", "always", "recorded") and clean is None:
                clean = self._clean(draw)
            transcript = build_transcript(
                example, self.protocol, path, image=image, clean=clean, understanding=seen
            )
        copies = settings.noised_copies
        times = [[self._time(rng) for _ in range(copies)] for _ in transcript.restorations]
        built = pieces(
            transcript,
            prepare=_prepared,
            encode_text=backbone.encode_text,
            end_id=backbone.end_id,
            times=[own[0] for own in times],
        )
        if settings.answer_weight != 1:
            self._weigh_answers(transcript, built)
        return _with_copies(built, [own[1:] for own in times])

    def _clean(self, draw: Draw) -> PreparedImage | None:
        clean = draw.example.load_clean()
        return None if clean is None else self.backbone.prepare(clean)

    def _weigh_answers(self, transcript: Transcript, built: Sequence[Piece]) -> None:
        """Gives the tokens between the answer's tags their weight."""
        texts = [s.text for s in transcript if isinstance(s, TextSegment) and s.origin is Origin.SAMPLED]
        scored = [p for p in built if isinstance(p, TextPiece) and p.scored]
        for text, piece in zip(texts, scored, strict=True):
            start = text.rfind(ANSWER_OPEN) + len(ANSWER_OPEN)
            end = text.find(ANSWER_CLOSE, start)
            if start < len(ANSWER_OPEN) or end < 0:
                continue
            first, last = (len(self.backbone.encode_text(text[:place])) for place in (start, end))
            piece.weights = torch.ones(len(piece.ids))
            piece.weights[first:last] = self.settings.answer_weight

    def _time(self, rng: random.Random) -> float:
        return shift_time(1 / (1 + math.exp(-rng.gauss(0, 1))), self.settings.timestep_shift)

    def collate(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Packs draws; see `Objective.collate`."""
        batch = self.backbone.pack([self.row(draw) for draw in draws])
        rows = batch.velocity_row
        places = torch.arange(len(rows))
        if len(rows):
            # The place of each noised token in its own row, so that its noise does not depend on the batch.
            starts = torch.searchsorted(rows, rows, right=False)
            places = places - starts
        return {
            "batch": batch,
            "seeds": torch.tensor([draw.seed for draw in draws], dtype=torch.int64),
            "noise_places": places,
            "noise_lanes": int(places.max()) + 1 if len(rows) else 0,
            "counts": torch.tensor([float(batch.text_weight.sum()), float(len(rows))]),
        }

    # -- loss

    def loss(self, module: nn.Module, batch: dict[str, Any], counts: Tensor) -> dict[str, Tensor]:
        """Cross-entropy and flow loss; see `Objective.loss`."""
        packed = batch["batch"]
        noise = torch.zeros_like(packed.latents)
        if batch["noise_lanes"]:
            width = packed.latents.shape[-1]
            drawn = RowRandom(batch["seeds"]).normal(batch["noise_lanes"] * width)
            drawn = drawn.view(len(batch["seeds"]), -1, width)
            noise[packed.velocity_at] = drawn[packed.velocity_row, batch["noise_places"]]
        packed = self.backbone.encode(packed, noise)
        outputs = module(packed)
        ce = F.cross_entropy(outputs.text_logits.float(), packed.text_targets, reduction="none")
        ce = (ce * packed.text_weight).sum() / counts[0].clamp(min=1)
        # Without a restoration these are empty: a zero that still hangs on the graph, so that every process takes part.
        assert packed.target is not None
        target = packed.target.index_select(0, packed.velocity_at)
        mse = (outputs.velocity.float() - target).pow(2).mean(-1).sum() / counts[1].clamp(min=1)
        settings = self.settings
        return {"loss": settings.ce_weight * ce + settings.mse_weight * mse, "ce": ce, "mse": mse}


def _prepared(image: Any) -> PreparedImage:
    """What a transcript built here holds as a picture: one that is prepared already."""
    if not isinstance(image, PreparedImage):
        raise ClearValueError(f"expected a prepared picture, not {type(image).__name__}")
    return image


def _with_copies(built: list[Piece], times: list[list[float]]) -> list[Piece]:
    """Puts further noised copies behind the first one of each restoration, each on a branch of its own."""
    noised = [p for p in built if isinstance(p, LatentPiece) and p.velocity]
    branch = max((p.branch for p in noised), default=0)
    own = iter(times)
    done: list[Piece] = []
    for piece in built:
        done.append(piece)
        if isinstance(piece, LatentPiece) and piece.velocity:
            for time in next(own):
                branch += 1
                done.append(replace(piece, time=time, branch=branch))
    return done


def prepared_psnr(image: PreparedImage, clean: PreparedImage) -> float | None:
    """PSNR in dB of two prepared pictures at the model's resolution; None where their sizes differ."""
    if image.size != clean.size:
        return None
    a, b = (
        p.pixels.float() if p.pixels.dtype == torch.uint8 else (p.pixels + 1) * 127.5 for p in (image, clean)
    )
    return decibels(float((a - b).pow(2).mean()))
