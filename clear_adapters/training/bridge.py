"""Stage 2: the latent representation bridge, which lets a restoration be read (paper, section 3.2).

States of the bridged tokens are pulled towards those of an understanding encoder's tokens of the same picture, and the
text after them is learnt. The paper trains on true clean latents alone; a model that has read only those trusts its own,
poorer ones too much. Here rows read latents of three kinds: true ones, the model's own, and one-step estimates, through
which the answer's gradient reaches the generator.

The teacher's picture is never resized to the latent grid, as the released code does: the encoder would see it at a scale
that it does not know. Its states are averaged over the grid instead.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear_adapters.backbones.base import Backbone, Restoration
from clear_adapters.backbones.packed import (
    ImagePiece,
    LatentPiece,
    ModelOutputs,
    PackedBatch,
    Piece,
    PreparedImage,
    restoration_loss,
)
from clear_adapters.datasets.traces import TraceSettings
from clear_adapters.errors import ClearValueError
from clear_adapters.prompts import Protocol
from clear_adapters.replay import pieces
from clear_adapters.sampling import LatentSampling
from clear_adapters.training.objective import Draw, Objective
from clear_adapters.training.rows import NoisePlan, draw_time, draw_transcript, prepared, without_weights
from clear_adapters.transcript import ImageSegment, Origin, RestorationSegment, TextSegment, Transcript


@dataclass(frozen=True)
class BridgeSettings:
    """What stage 2 does.

    Attributes:
        own: share of rows that read a latent which the model itself generates.
        estimate: share of rows that read the one-step estimate of the clean latent (`x_t - t v`, or the codes that would
            be taken next to the true ones), through which the answer's gradient reaches the generator. The remaining rows
            read the true clean latent.
        own_steps: points of the flow schedule for the rows of `own`.
        own_rows: latents of the model's own that are generated side by side; None is all of a step.
        vit_drop: probability with which a row's understanding tokens of the degraded picture are left out.
        timestep_shift: as in stage 1, for the times of estimates.
        distill: `per_layer_kl` between the states of teacher and bridged tokens, place by place; `final_mse` of the mean
            last states; `none`.
        centred: compare states less their mean over the picture's tokens. Without it, as in the paper and the released code,
            most of the distance lies between the means of all states, which a bridge of its own closes by adding one large
            constant to every token: the distance falls, and what the tokens say is drowned (benchmarks/README.md).
        layer_stride: every so many layers, and the last, are compared.
        ce_weight: of the cross-entropy of all SAMPLED text, that after the restoration and the decision before it.
        distill_weight: of the distillation.
        mse_weight: of the restorations' loss on the estimates: the flow loss, or the cross-entropy of codes.
        traces: how paths are chosen, as in stage 1: rows that do not restore keep the decision as it is.

    Raises:
        ClearValueError: a value out of its range.
    """

    own: float = 0.4
    estimate: float = 0.2
    own_steps: int = 10
    own_rows: int | None = None
    vit_drop: float = 0.4
    timestep_shift: float = 1.0
    distill: Literal["per_layer_kl", "final_mse", "none"] = "per_layer_kl"
    centred: bool = False
    layer_stride: int = 1
    ce_weight: float = 1.0
    distill_weight: float = 0.1
    mse_weight: float = 0.0
    traces: TraceSettings = field(default_factory=TraceSettings)

    def __post_init__(self) -> None:
        for name in ("own", "estimate", "vit_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ClearValueError(f"{name}={getattr(self, name)}: a share in [0, 1]")
        if self.own + self.estimate > 1:
            raise ClearValueError(f"own={self.own} and estimate={self.estimate} sum to more than 1")
        if self.own_steps < 2:
            raise ClearValueError(f"own_steps={self.own_steps}: a flow needs at least 2 points")
        if self.own_rows is not None and self.own_rows < 1:
            raise ClearValueError(f"own_rows={self.own_rows}: must be at least 1")
        if self.layer_stride < 1:
            raise ClearValueError(f"layer_stride={self.layer_stride}: must be at least 1")
        if self.centred and self.distill == "final_mse":
            raise ClearValueError(
                "centred=True with distill='final_mse': it compares the means, which centring takes away; choose one of them"
            )
        if self.distill not in ("per_layer_kl", "final_mse", "none"):
            raise ClearValueError(f"distill={self.distill!r}: 'per_layer_kl', 'final_mse' or 'none'")
        for name in ("ce_weight", "distill_weight", "mse_weight"):
            if not getattr(self, name) >= 0:
                raise ClearValueError(f"{name}={getattr(self, name)}: must not be negative")
        if not self.timestep_shift > 0:
            raise ClearValueError(f"timestep_shift={self.timestep_shift}: must be positive")


Source = Literal["true", "own", "estimate"]
Grid = tuple[int, int]


@dataclass(frozen=True)
class _Trace:
    """A row before its latent is there.

    Attributes:
        transcript: recorded, with prepared pictures.
        source: what stands for the restoration.
        seed: of the row.
        time: of the noised copy that an estimate is made from.
    """

    transcript: Transcript
    source: Source
    seed: int
    time: float

    @property
    def wants_own(self) -> bool:
        """Whether the model has to generate a latent for it."""
        return self.source == "own"


@dataclass(frozen=True)
class _Pairs:
    """Teachers and students of one pair of grids.

    Attributes:
        teacher: (P, h w) int64, flat places in B x L of the teacher's tokens.
        student: (P, h' w') int64.
        teacher_grid: (h, w).
        student_grid: (h', w').
    """

    teacher: Tensor
    student: Tensor
    teacher_grid: tuple[int, int]
    student_grid: tuple[int, int]

    def to(self, device: torch.device | str) -> _Pairs:
        """The places on a device."""
        return replace(self, teacher=self.teacher.to(device), student=self.student.to(device))


class BridgeObjective(Objective):
    """Stage 2's latents, batches and loss."""

    counts = ("text_tokens", "pairs", "latent_tokens")

    def __init__(
        self,
        backbone: Backbone,
        protocol: Protocol,
        settings: BridgeSettings,
        latent: LatentSampling,
    ) -> None:
        """Gets ready.

        Args:
            backbone: the verbs over the adapted network.
            protocol: of the traces.
            settings: of the stage.
            latent: for the shift of the model's own latents; they are sampled without guidance and noise.
        """
        self.parts = ("ce", "distill", backbone.spec.loss)
        self.backbone = backbone
        self.protocol = protocol
        self.settings = settings
        self._sampling = replace(
            latent, steps=settings.own_steps, guidance_text=1.0, guidance_image=1.0, sde_sigma=0.0
        )
        layers = backbone.layers
        self._layers: tuple[int, ...] = ()
        if settings.distill != "none" and settings.distill_weight > 0:
            every = range(0, layers, settings.layer_stride) if settings.distill == "per_layer_kl" else ()
            self._layers = tuple(sorted({*every, layers - 1}))

    def __getstate__(self) -> dict[str, Any]:
        """What a data worker gets where it is spawned: preparing needs no weights."""
        return {**vars(self), "backbone": without_weights(self.backbone)}

    # -- batches

    def collate(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Traces with prepared pictures; see `Objective.collate`.

        Raises:
            ImageError: a picture cannot be read.
        """
        return {"rows": [self._trace(draw) for draw in draws]}

    def _trace(self, draw: Draw) -> _Trace:
        settings, rng = self.settings, random.Random(draw.seed)
        transcript = draw_transcript(
            self.backbone, self.protocol, draw, rng, settings.traces, settings.vit_drop
        )
        share = rng.random()
        source: Source = "true"
        if (
            len(transcript.restorations) == 1
        ):  # in a recorded reply with several, what is own cannot stand for the next
            limits = (settings.own, settings.own + settings.estimate)
            source = "own" if share < limits[0] else "estimate" if share < limits[1] else "true"
        return _Trace(transcript, source, draw.seed, draw_time(rng, settings.timestep_shift))

    def prepare(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Generates the model's own latents and packs; see `Objective.prepare`."""
        wanted = [row for batch in batches for row in batch["rows"] if row.wants_own]
        own: dict[int, tuple[Restoration, PreparedImage | None]] = {}
        if wanted:
            portion = self.settings.own_rows or len(wanted)
            found: list[Restoration] = []
            for at in range(0, len(wanted), portion):
                rows = wanted[at : at + portion]
                found += own_latents(
                    self.backbone, [r.transcript for r in rows], [r.seed for r in rows], self._sampling
                )
            teachers = self._decoded(found) if self._layers else [None] * len(found)
            own = {id(r): pair for r, *pair in zip(wanted, found, teachers, strict=True)}  # type: ignore[misc]
        return [self._pack(batch["rows"], own) for batch in batches]

    def _decoded(self, found: Sequence[Restoration]) -> list[PreparedImage | None]:
        """The model's own latents as pictures; None for a family that draws no pixels."""
        drawn = self.backbone.decode_each(found)
        return [None if image is None else self.backbone.prepare(image) for image in drawn]

    def _pack(
        self, rows: Sequence[_Trace], own: Mapping[int, tuple[Restoration, PreparedImage | None]]
    ) -> dict[str, Any]:
        backbone, device = self.backbone, self.backbone.device
        laid: list[list[Piece]] = []
        grids: list[tuple[Grid, Grid]] = []
        for row in rows:
            times = [row.time] * len(row.transcript.restorations) if row.source == "estimate" else None
            built = pieces(
                row.transcript,
                prepare=prepared,
                encode_text=backbone.encode_text,
                end_id=backbone.end_id,
                times=times,
            )
            laid.append(self._with_teachers(built, row, own.get(id(row)), grids))
        packed = backbone.pack(laid, self._layers)
        plan = NoisePlan.of(packed, [row.seed for row in rows])
        pairs = _pairs(packed, grids)
        counts = [float(packed.text_weight.sum()), float(len(grids)), float(len(packed.scored_at))]
        packed = packed.to(device)
        return {
            "batch": backbone.encode(packed, plan.to(device).draw(packed)),
            "pairs": [p.to(device) for p in pairs],
            "counts": torch.tensor(counts),
        }

    def _with_teachers(
        self,
        built: Sequence[Piece],
        row: _Trace,
        own: tuple[Restoration, PreparedImage | None] | None,
        grids: list[tuple[Grid, Grid]],
    ) -> list[Piece]:
        """Puts the model's own latent in its place, and the teacher before the final latent.

        The teacher stands on a branch of its own: it sees what stands before the restoration, at the same position, and
        nothing sees it. (In the released code it stands behind the student and sees it.)
        """
        done: list[Piece] = []
        branch = 1 + max((p.branch for p in built), default=0)
        for piece in built:
            if not isinstance(piece, LatentPiece) or piece.scored:
                done.append(piece)
                continue
            teacher = piece.image if row.source == "true" else None
            if own is not None:
                found, teacher = own
                piece = replace(piece, latent=found.tokens[0], image=None, grid=found.grid)
            if teacher is not None and self._layers:
                number = 2 * len(grids)
                done.append(ImagePiece(teacher, as_condition=False, branch=branch, watched=number))
                piece = replace(piece, watched=number + 1)
                grids.append((teacher.patch_grid, self.backbone.latent_grid(teacher.size)))
                branch += 1
            done.append(piece)
        return done

    # -- loss

    def loss(self, module: nn.Module, batch: dict[str, Any], counts: Tensor) -> dict[str, Tensor]:
        """Cross-entropy, distillation and the restorations' loss; see `Objective.loss`."""
        settings, packed = self.settings, batch["batch"]
        restored = counts.new_zeros(())
        # Asked of the settings and not of the batch, so that every process takes the same forwards.
        if settings.estimate > 0:
            packed, restored = self._estimate(module, packed, counts)
        outputs = module(packed)
        ce = F.cross_entropy(outputs.text_logits.float(), packed.text_targets, reduction="none")
        ce = (ce * packed.text_weight).sum() / counts[0].clamp(min=1)
        # Zeros that hang on the graph, so that every process takes part in everything.
        distill = 0 * (ce + outputs.scored.float().sum())
        for pairs in batch["pairs"]:
            distill = distill + self._distance(outputs, pairs)
        distill = distill / counts[1].clamp(min=1)
        loss = settings.ce_weight * ce + settings.distill_weight * distill + settings.mse_weight * restored
        return {"loss": loss, "ce": ce, "distill": distill, self.parts[2]: restored}

    def _estimate(self, module: nn.Module, packed: PackedBatch, counts: Tensor) -> tuple[PackedBatch, Tensor]:
        """The batch with estimates in the place of final latents, and the restorations' loss."""
        outputs = module(replace(packed, hidden_layers=()))
        at = packed.scored_at
        clean = self.backbone.estimate(packed, outputs)
        # A copy's final latent stands right behind it, and is as long; a row has one restoration that is estimated.
        # Rows are sorted. Counting them by `bincount` would wait for the device.
        row = packed.scored_row
        length = torch.searchsorted(row, row, right=True) - torch.searchsorted(row, row)
        latents = packed.latents.index_copy(0, at + length, clean)
        restored = restoration_loss(outputs, packed).sum() / counts[2].clamp(min=1)
        return replace(packed, latents=latents), restored

    def _distance(self, outputs: ModelOutputs, pairs: _Pairs) -> Tensor:
        """Sum over pairs of the distance between teacher and student, over layers that weigh more the higher they are."""
        weights = [float(layer + 1) for layer in self._layers]
        total = outputs.text_logits.new_zeros((), dtype=torch.float32)
        for layer, weight in zip(self._layers, weights, strict=True):
            states = outputs.hidden[layer].flatten(0, 1)
            teacher = states[pairs.teacher].detach().float()
            student = states[pairs.student].float()
            if self.settings.centred:
                teacher, student = (s - s.mean(1, keepdim=True) for s in (teacher, student))
            if self.settings.distill == "final_mse":
                # Not aligned before: cells of grids that do not divide overlap, and would weigh some tokens twice.
                return total + (teacher.mean(1) - student.mean(1)).pow(2).mean(-1).sum()
            teacher = align(teacher, pairs.teacher_grid, pairs.student_grid)
            teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
            kl = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
            total = total + weight / sum(weights) * kl.mean(1).sum()
        return total


def align(states: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """States (P, h w, D) of one grid as the means over the cells of another: (P, h' w', D)."""
    spread = states.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(spread, size=wanted, mode="area").flatten(2).transpose(1, 2)


def _pairs(packed: PackedBatch, grids: Sequence[tuple[Grid, Grid]]) -> list[_Pairs]:
    """Places of teachers and students, pairs of equal grids together."""
    if packed.watch_index is None or packed.watch_piece is None:
        return []
    sizes = torch.bincount(packed.watch_piece).tolist()
    places = packed.watch_index[packed.watch_piece.argsort(stable=True)].split(sizes)
    groups: dict[tuple[Grid, Grid], list[int]] = {}
    for number, pair in enumerate(grids):
        groups.setdefault(pair, []).append(number)
    return [
        _Pairs(
            torch.stack([places[2 * n] for n in members]),
            torch.stack([places[2 * n + 1] for n in members]),
            *pair,
        )
        for pair, members in groups.items()
    ]


@torch.no_grad()
def own_latents(
    backbone: Backbone, transcripts: Sequence[Transcript], seeds: Sequence[int], sampling: LatentSampling
) -> list[Restoration]:
    """What the model restores where recorded transcripts first do, one restoration each.

    Args:
        backbone: the model, by the cached path.
        transcripts: with a restoration each, and the same kinds of blocks before it.
        seeds: of the rows, so that a row's latent does not depend on its batch.
        sampling: of the flow.
    """
    context = backbone.start(len(transcripts), seeds)
    heads = [list(t)[: [isinstance(s, RestorationSegment) for s in t].index(True)] for t in transcripts]
    for block in zip(*heads, strict=True):
        if isinstance(block[0], ImageSegment):
            # One call a row: where a family both conditions on codes and understands by them, they are read once.
            for seen in (True, False):
                rows = [i for i, s in enumerate(block) if s.understanding is seen]
                if rows:
                    images = [prepared(block[i].image) for i in rows]
                    context = backbone.read_image(context, images, understanding=seen, rows=rows)
        else:
            texts = [s for s in block if isinstance(s, TextSegment)]
            ids = [s.ids if len(s.ids) else backbone.encode_text(s.text) for s in texts]
            context = backbone.read_text(context, ids, own=texts[0].origin is not Origin.PROMPT)
    return list(backbone.restore(context, sampling)[1])
