"""Transcripts as rows of pieces for the uncached forward, and the log-probabilities that come out of it.

`pieces` is shared by replay and by every training stage, so that what is trained is what was sampled: a restoration
stands as noised copies that nothing later sees (for the velocity), then as its final latent, which the text reads.

In float32 a replay says what the rollout recorded within 1e-4. In bfloat16 the cached and the uncached forward round
differently: on a GPU 99 % of the built-in model's text tokens agree within 0.05 and of its flow steps within 2e-3, half of
them within 1e-6 and 2e-4 (benchmarks/results/replay_precision.json).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clear_adapters.backbones.base import Restoration
from clear_adapters.backbones.packed import (
    ImagePiece,
    LatentPiece,
    ModelOutputs,
    PackedBatch,
    Piece,
    PreparedImage,
    TextPiece,
    prepare_once,
)
from clear_adapters.errors import ClearValueError
from clear_adapters.sampling import LatentSampling, sde_mean, sde_terms
from clear_adapters.transcript import (
    ImageSegment,
    Origin,
    RestorationSegment,
    Segment,
    TextSegment,
    Transcript,
)

if TYPE_CHECKING:
    from clear_adapters.backbones.base import Backbone
    from clear_adapters.bridge import LatentBridge


@dataclass
class Replay:
    """What one parallel forward says about transcripts, row by row.

    Attributes:
        text_logprobs: (T_i,) float32 of all SAMPLED tokens in order.
        latent_logprobs: (S_i,) float32 of all scored steps of SAMPLED restorations in order.
        hidden: layer -> (B, L, D) where layers were asked for.
        batch: the packed batch, to find places in `hidden`.
        outputs: the raw outputs.
    """

    text_logprobs: list[Tensor]
    latent_logprobs: list[Tensor]
    hidden: dict[int, Tensor] | None
    batch: PackedBatch
    outputs: ModelOutputs


# ------------------------------------------------------------------------------------------ segments to pieces


@dataclass
class _Builder:
    prepare: Callable[[Any], PreparedImage]
    encode_text: Callable[[str], Tensor] | None
    end_id: int | None
    decode: Callable[[Sequence[Restoration]], list[Any]] | None
    times: Iterator[float] | None
    steps: Iterator[Sequence[int]] | None
    pieces: list[Piece] = field(default_factory=list)
    branches: int = 0

    def text(self, segment: TextSegment) -> None:
        sampled = segment.origin is Origin.SAMPLED
        ids = segment.ids
        if not len(ids) and segment.text:
            if self.encode_text is None:
                raise ClearValueError(
                    f"the text {segment.text[:40]!r} has no ids: pass encode_text to make them"
                )
            ids = self.encode_text(segment.text)
            if sampled and self.end_id is not None:
                ids = torch.cat((ids, torch.tensor([self.end_id])))
        self.pieces.append(TextPiece(ids, scored=sampled, own=segment.origin is not Origin.PROMPT))

    def image(self, segment: ImageSegment) -> None:
        self.pieces.append(
            ImagePiece(self.prepare(segment.image), segment.as_condition, segment.understanding)
        )

    def restoration(self, segment: RestorationSegment) -> None:
        if segment.restoration is None:
            self._recorded(segment)
        else:
            self._sampled(segment, segment.restoration)

    def _branch(self) -> int:
        self.branches += 1
        return self.branches

    def _recorded(self, segment: RestorationSegment) -> None:
        if segment.target is None:
            raise ClearValueError("a recorded restoration needs its target, the clean picture")
        prepared = self.prepare(segment.target)
        if self.times is not None and segment.origin is Origin.SAMPLED:
            try:
                time = next(self.times)
            except StopIteration:
                raise ClearValueError("times has fewer entries than there are restorations") from None
            self.pieces.append(LatentPiece(image=prepared, time=time, scored=True, branch=self._branch()))
        if segment.reencoded:
            self.pieces.append(ImagePiece(prepared, as_condition=False))
        else:
            self.pieces.append(LatentPiece(image=prepared, bridged=True))

    def _sampled(self, segment: RestorationSegment, restoration: Restoration) -> None:
        tokens, trace = restoration.tokens[0], restoration.trace
        if restoration.code_logprobs is not None and segment.origin is Origin.SAMPLED:
            self.pieces.append(LatentPiece(tokens, grid=restoration.grid, scored=True, branch=self._branch()))
        if trace is not None and segment.origin is Origin.SAMPLED:
            chosen = range(len(trace.t)) if self.steps is None else next(self.steps, ())
            for k in chosen:
                self.pieces.append(
                    LatentPiece(
                        trace.x[0, k],
                        grid=restoration.grid,
                        time=float(trace.t[k]),
                        noised=True,
                        scored=True,
                        branch=self._branch(),
                    )
                )
        if segment.reencoded:
            image = self.decode([restoration])[0] if self.decode is not None else None
            if image is None:
                raise ClearValueError("a re-encoded restoration needs decode, which gives its pixels")
            self.pieces.append(ImagePiece(self.prepare(image), as_condition=False))
        else:
            self.pieces.append(LatentPiece(tokens, grid=restoration.grid, bridged=True))


def pieces(
    segments: Iterable[Segment],
    *,
    prepare: Callable[[Any], PreparedImage],
    encode_text: Callable[[str], Tensor] | None = None,
    end_id: int | None = None,
    decode: Callable[[Sequence[Restoration]], list[Any]] | None = None,
    times: Iterable[float] | None = None,
    steps: Iterable[Sequence[int]] | None = None,
) -> list[Piece]:
    """One row's segments as the pieces of a packed row. Runs on the CPU, in data workers too.

    SAMPLED text is scored, all other text is not. A rollout's restoration stands as one noised copy for each scored
    step of its trace, each on a branch of its own, or as one copy of all its codes, and then as its final latent through
    the bridge; a recorded one as the noised clean picture at a time, or its codes, and then the clean picture through the
    bridge.

    Args:
        segments: a transcript, or its segments.
        prepare: `Backbone.prepare`.
        encode_text: `Backbone.encode_text`, for recorded segments without ids.
        end_id: `Backbone.end_id`, put behind recorded SAMPLED text that is encoded here.
        decode: `Backbone.decode_each`, for restorations that were re-encoded.
        times: flow times of the noised copies of recorded restorations, one each; None leaves the copies out.
        steps: indices of the scored steps, for each restoration that has a trace; None scores every step.

    Raises:
        ClearValueError: something that a segment needs was not given.
    """
    builder = _Builder(
        prepare,
        encode_text,
        end_id,
        decode,
        None if times is None else iter(times),
        None if steps is None else iter(steps),
    )
    for segment in segments:
        if isinstance(segment, TextSegment):
            builder.text(segment)
        elif isinstance(segment, ImageSegment):
            builder.image(segment)
        else:
            builder.restoration(segment)
    return builder.pieces


# ------------------------------------------------------------------------------------------------------ replay


def replay(
    backbone: Backbone,
    bridge: LatentBridge | None,
    transcripts: Sequence[Transcript],
    *,
    temperature: float = 1.0,
    sampling: LatentSampling | None = None,
    steps: Sequence[Sequence[Sequence[int]]] | None = None,
    with_hidden: tuple[int, ...] = (),
) -> Replay:
    """Scores transcripts in one parallel forward. Gradients flow where they are enabled.

    Args:
        backbone: the model.
        bridge: the bridge that the rollouts read through.
        transcripts: the rows.
        temperature: of the text sampling; 0 (greedy) is scored at 1, as the rollout recorded it.
        sampling: of the restorations, for the reduction over latent dimensions and the temperature of codes.
        steps: for each transcript, for each of its restorations that has a trace, the steps to score; None is all.
        with_hidden: layers whose output is asked for.

    Raises:
        ClearValueError: no transcripts, a `steps` list of another length, or a negative temperature.
    """
    if not transcripts:
        raise ClearValueError("replay needs at least one transcript")
    if temperature < 0:
        raise ClearValueError(f"temperature={temperature}: must be 0 (greedy) or a positive number")
    sampling = sampling or LatentSampling()
    chosen = [None] * len(transcripts) if steps is None else list(steps)
    if len(chosen) != len(transcripts):
        raise ClearValueError(f"steps has {len(chosen)} entries for {len(transcripts)} transcripts")
    prepare = prepare_once(backbone.prepare)
    rows = [
        pieces(t, prepare=prepare, decode=backbone.decode_each, steps=own)
        for t, own in zip(transcripts, chosen, strict=True)
    ]
    batch = backbone.pack(rows, with_hidden).to(backbone.device)
    # Nothing is mixed with noise here: without this, `encode` would draw from the global generator.
    batch = backbone.encode(batch, noise=torch.zeros_like(batch.latents))
    outputs = backbone.forward(batch, bridge)
    targets = restoration_targets(backbone.spec.kind, transcripts, chosen, backbone.device)
    counts = [sum(len(p.ids) for p in row if isinstance(p, TextPiece) and p.scored) for row in rows]
    return Replay(
        text_logprobs=list(score_text(outputs, batch, temperature).split(counts)),
        latent_logprobs=list(targets.score(outputs, sampling).split(targets.per_row)),
        hidden=outputs.hidden if with_hidden else None,
        batch=batch,
        outputs=outputs,
    )


def score_text(outputs: ModelOutputs, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
    """(T,) float32 log-probabilities of the batch's scored tokens, at a temperature (0 is scored as 1)."""
    logits = outputs.text_logits.float()
    if temperature not in (0, 1):
        logits = logits / temperature
    return -torch.nn.functional.cross_entropy(logits, batch.text_targets, reduction="none")


@dataclass
class FlowTargets:
    """Where the scored steps of rollouts went, token by token, in the order in which their velocities come.

    Attributes:
        x: (M, C) float32, latent tokens before their step.
        x_next: (M, C) float32, after it.
        t: (M, 1) float32, time before it.
        dt: (M, 1) float32, its length.
        step: (M,) int64, the number of the step that the token belongs to, from 0 to S - 1.
        sigma: (M, 1) float32, noise level.
        recorded: (S,) float32 log-probabilities at sampling.
        tokens: (S,) float32, latent tokens a step.
        per_row: steps of each row; they sum to S.
    """

    x: Tensor
    x_next: Tensor
    t: Tensor
    dt: Tensor
    step: Tensor
    sigma: Tensor
    recorded: Tensor
    tokens: Tensor
    per_row: list[int]

    @classmethod
    def of(
        cls,
        transcripts: Sequence[Transcript],
        chosen: Sequence[Sequence[Sequence[int]] | None],
        device: torch.device,
    ) -> FlowTargets:
        """Collects the scored steps of SAMPLED restorations; `chosen` as in `pieces`, None for all of a row's."""
        x, x_next, recorded = [], [], []
        facts: list[tuple[float, float, float, int]] = []  # t, dt, sigma, tokens
        per_row = []
        for transcript, own in zip(transcripts, chosen, strict=True):
            wanted, before = None if own is None else iter(own), len(facts)
            for segment in transcript.restorations:
                trace = None if segment.restoration is None else segment.restoration.trace
                if trace is None or segment.origin is not Origin.SAMPLED:
                    continue
                index = list(range(len(trace.t)) if wanted is None else next(wanted, ()))
                # Views, step by step: a list of places would wait for the device to take it.
                x += [trace.x[0, k] for k in index]
                x_next += [trace.x_next[0, k] for k in index]
                recorded += [trace.logprobs[0, k : k + 1] for k in index]
                size = trace.x.shape[2]
                facts += [(float(trace.t[k]), float(trace.dt[k]), trace.sigma, size) for k in index]
            per_row.append(len(facts) - before)
        table = torch.tensor(facts, dtype=torch.float32).view(-1, 4).to(device)
        counts = torch.tensor([f[3] for f in facts], dtype=torch.int64)
        step = torch.arange(len(facts)).repeat_interleave(counts).to(device)
        empty = [torch.zeros(0, 1, device=device)]
        return cls(
            x=torch.cat(x or empty).to(device),
            x_next=torch.cat(x_next or empty).to(device),
            t=table[step, 0:1],
            dt=table[step, 1:2],
            step=step,
            sigma=table[step, 2:3],
            recorded=torch.cat(recorded or [torch.zeros(0)]).to(device),
            tokens=table[:, 3],
            per_row=per_row,
        )

    def score(self, outputs: ModelOutputs, sampling: LatentSampling) -> Tensor:
        """(S,) float32 log-probabilities of the steps as the model sees them now; see `sampling.sde_logprob`."""
        velocity = outputs.scored
        if not len(self.step):
            return velocity.new_zeros(0) + velocity.sum()
        mean = sde_mean(self.x, velocity, self.t, self.dt, self.sigma)
        token = sde_terms(self.x_next, mean, self.dt, self.sigma).sum(-1)
        total = token.new_zeros(len(self.tokens)).index_add(0, self.step, token)
        return total / (self.tokens * velocity.shape[-1]) if sampling.logprob == "mean" else total


@dataclass
class CodeTargets:
    """The codes of SAMPLED restorations, in the order in which their logits come: every code is a step.

    Attributes:
        codes: (S,) int64.
        recorded: (S,) float32 log-probabilities at sampling.
        per_row: codes of each row; they sum to S.
    """

    codes: Tensor
    recorded: Tensor
    per_row: list[int]

    @classmethod
    def of(cls, transcripts: Sequence[Transcript], device: torch.device) -> CodeTargets:
        """Collects them; those of restorations that were sampled with guidance have no log-probabilities and are left out."""
        codes, recorded, per_row = [], [], []
        for transcript in transcripts:
            own = [s.restoration for s in transcript.restorations if s.origin is Origin.SAMPLED]
            found = [r for r in own if r is not None and r.code_logprobs is not None]
            codes += [r.codes[0] for r in found]
            recorded += [r.code_logprobs[0] for r in found]
            per_row.append(sum(r.codes.shape[1] for r in found))
        empty = torch.zeros(0)
        return cls(
            torch.cat(codes or [empty.long()]).to(device), torch.cat(recorded or [empty]).to(device), per_row
        )

    def score(self, outputs: ModelOutputs, sampling: LatentSampling) -> Tensor:
        """(S,) float32 log-probabilities of the codes as the model sees them now, at the sampling temperature."""
        logits = outputs.scored.float() / (sampling.temperature or 1.0)
        return -torch.nn.functional.cross_entropy(logits, self.codes, reduction="none")


def restoration_targets(
    kind: str,
    transcripts: Sequence[Transcript],
    chosen: Sequence[Sequence[Sequence[int]] | None],
    device: torch.device,
) -> FlowTargets | CodeTargets:
    """What a family's restorations are scored against: chosen steps of a flow, or all codes."""
    return (
        FlowTargets.of(transcripts, chosen, device) if kind == "flow" else CodeTargets.of(transcripts, device)
    )
