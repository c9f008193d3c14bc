"""Stage 1: supervised tuning on traces (paper, section 3.2).

Cross-entropy on SAMPLED text, and flow matching on noised copies of the clean picture that nothing later sees; what
follows a restoration reads the clean latent. Supervised text is never dropped, unlike in the released code. Both
losses are averaged over the tokens of the whole step, whatever the accumulation and the number of processes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear_adapters.backbones.base import Backbone
from clear_adapters.backbones.packed import LatentPiece, Piece, restoration_loss
from clear_adapters.datasets.traces import TraceSettings, build_transcript
from clear_adapters.errors import ClearValueError
from clear_adapters.prompts import Protocol
from clear_adapters.replay import pieces
from clear_adapters.training.objective import Draw, Objective
from clear_adapters.training.rows import NoisePlan, draw_time, draw_transcript, prepared, without_weights


@dataclass(frozen=True)
class SftSettings:
    """What stage 1 does.

    Attributes:
        mode: `clear` trains the whole protocol; `direct` is the plain rival: understanding tokens of the degraded
            picture, the question, the answer, in the family's own chat, with no protocol and no latent.
        vit_drop: probability with which a row's understanding tokens of the degraded picture are left out.
        noised_copies: noised copies of each restoration, each at its own time. Codes have no noise and one copy.
        timestep_shift: s of `t = s u / (1 + (s - 1) u)` with `u = sigmoid(N(0, 1))`.
        ce_weight: of the cross-entropy.
        mse_weight: of the restorations' loss: the flow loss, or the cross-entropy of codes.
        traces: how paths are chosen.

    Raises:
        ClearValueError: a value out of its range.
    """

    mode: Literal["clear", "direct"] = "clear"
    vit_drop: float = 0.4
    noised_copies: int = 2
    timestep_shift: float = 1.0
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
        for name in ("ce_weight", "mse_weight"):
            if not getattr(self, name) >= 0:
                raise ClearValueError(f"{name}={getattr(self, name)}: must not be negative")
        if not self.timestep_shift > 0:
            raise ClearValueError(f"timestep_shift={self.timestep_shift}: must be positive")


class SftObjective(Objective):
    """Stage 1's batches and loss."""

    counts = ("text_tokens", "latent_tokens")

    def __init__(self, backbone: Backbone, protocol: Protocol, settings: SftSettings) -> None:
        self.parts = ("ce", backbone.spec.loss)
        self.backbone = backbone
        self.protocol = protocol
        self.settings = settings

    def __getstate__(self) -> dict[str, Any]:
        """What a data worker gets where it is spawned and not forked: preparing and packing need no weights."""
        return {**vars(self), "backbone": without_weights(self.backbone)}

    # -- batches

    def row(self, draw: Draw) -> list[Piece]:
        """One example as a row of pieces; a function of the draw alone.

        Raises:
            ImageError: a picture cannot be read.
        """
        settings, backbone = self.settings, self.backbone
        rng = random.Random(draw.seed)
        if settings.mode == "direct":
            image = backbone.prepare(draw.example.load())
            transcript = build_transcript(draw.example, self.protocol, "plain", image=image)
        else:
            transcript = draw_transcript(
                backbone, self.protocol, draw, rng, settings.traces, settings.vit_drop
            )
        copies = settings.noised_copies if backbone.spec.kind == "flow" else 1
        times = [
            [draw_time(rng, settings.timestep_shift) for _ in range(copies)] for _ in transcript.restorations
        ]
        built = pieces(
            transcript,
            prepare=prepared,
            encode_text=backbone.encode_text,
            end_id=backbone.end_id,
            times=[own[0] for own in times],
        )
        return _with_copies(built, [own[1:] for own in times])

    def collate(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Packs draws; see `Objective.collate`."""
        batch = self.backbone.pack([self.row(draw) for draw in draws])
        return {
            "batch": batch,
            "noise": NoisePlan.of(batch, [draw.seed for draw in draws]),
            "counts": torch.tensor([float(batch.text_weight.sum()), float(len(batch.scored_at))]),
        }

    # -- loss

    def loss(self, module: nn.Module, batch: dict[str, Any], counts: Tensor) -> dict[str, Tensor]:
        """Cross-entropy and the restorations' loss; see `Objective.loss`."""
        packed = batch["batch"]
        packed = self.backbone.encode(packed, batch["noise"].draw(packed))
        outputs = module(packed)
        ce = F.cross_entropy(outputs.text_logits.float(), packed.text_targets, reduction="none")
        ce = (ce * packed.text_weight).sum() / counts[0].clamp(min=1)
        # Without a restoration these are empty: a zero that still hangs on the graph, so that every process takes part.
        restored = restoration_loss(outputs, packed).sum() / counts[1].clamp(min=1)
        settings = self.settings
        loss = settings.ce_weight * ce + settings.mse_weight * restored
        return {"loss": loss, "ce": ce, self.parts[1]: restored}


def _with_copies(built: list[Piece], times: list[list[float]]) -> list[Piece]:
    """Puts further noised copies behind the first one of each restoration, each on a branch of its own."""
    noised = [p for p in built if isinstance(p, LatentPiece) and p.scored]
    branch = max((p.branch for p in noised), default=0)
    own = iter(times)
    done: list[Piece] = []
    for piece in built:
        done.append(piece)
        if isinstance(piece, LatentPiece) and piece.scored:
            for time in next(own):
                branch += 1
                done.append(replace(piece, time=time, branch=branch))
    return done
