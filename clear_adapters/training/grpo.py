"""Stage 3: Interleaved GRPO over text tokens and restoration steps (paper, section 3.3)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from clear_adapters.backbones.packed import ModelOutputs, PackedBatch, PreparedImage, prepare_once
from clear_adapters.datasets.example import Example
from clear_adapters.errors import ClearError, ClearValueError
from clear_adapters.replay import CodeTargets, FlowTargets, pieces, restoration_targets, score_text
from clear_adapters.rewards import Rewards, Scores, columns_of, read_terms
from clear_adapters.sampling import LatentSampling, TextSampling
from clear_adapters.training.objective import Draw, Objective, row_seed
from clear_adapters.training.policy import advantages, clipped, k3
from clear_adapters.transcript import Origin, TextSegment, Transcript

if TYPE_CHECKING:
    from PIL.Image import Image

    from clear_adapters.attached import AttachedModel


_LATENT_COLUMNS = frozenset({"clean_latent", "restored_latent", "clean_features", "restored_features"})
"""Columns of rewards that cost a pass of an encoder."""


@dataclass(frozen=True)
class GrpoSettings:
    """What stage 3 does.

    Attributes:
        group: rollouts of one question, G.
        rewards: terms of the reward, as `read_terms` takes them.
        temperature: of the rollouts' text and codes; top-p is 1.
        flow_steps: points of the flow schedule in rollouts; the released code has 20.
        sigma: noise level of the stochastic steps.
        scored_steps: steps of a restoration that are trained on, of those that were sampled.
        step_choice: `random` steps, `round_robin` through the rollouts of a group, or a random `window` of neighbours.
        latent_from: what the text reads: the model's `own` latent, or it decoded and encoded again (`reencode`).
        clip: of the text's ratios, 1 +- clip.
        latent_clip: of the steps' ratios.
        image_weight: lambda, of the restoration's part of the loss.
        beta: of the KL to the frozen stage-2 adapter, in k3 form.
        scale: advantages divided by the `group`'s standard deviation, or not (`none`).
        advantage: `shared` by text and restoration, or `separate`: restorations get the one of `latent_rewards`.
        latent_rewards: names of the terms that make the restorations' advantage when it is separate.
        reduction: `grpo` averages tokens in a rollout and then rollouts, `bnpo` all tokens of the step, `dr_grpo`
            divides by rollouts times the longest turn allowed, `text.max_new_tokens`.
        iterations: optimizer steps on the same rollouts.
        rollout_rows: rollouts sampled side by side; None is all of a step.

    Raises:
        ClearValueError: a value out of its range, or rewards that cannot work.
        UnknownNameError: an unknown reward.
    """

    group: int = 4
    rewards: Mapping[str, Any] = field(
        default_factory=lambda: {"accuracy": 0.75, "format": 0.10, "decision": 0.15}
    )
    temperature: float = 1.0
    flow_steps: int = 20
    sigma: float = 0.3
    scored_steps: int = 1
    step_choice: Literal["random", "round_robin", "window"] = "random"
    latent_from: Literal["own", "reencode"] = "own"
    clip: float = 0.2
    latent_clip: float = 0.2
    image_weight: float = 0.3
    beta: float = 0.04
    scale: Literal["group", "none"] = "group"
    advantage: Literal["shared", "separate"] = "shared"
    latent_rewards: tuple[str, ...] = ("latent_quality",)
    reduction: Literal["grpo", "bnpo", "dr_grpo"] = "grpo"
    iterations: int = 1
    rollout_rows: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("group", 2), ("flow_steps", 3), ("scored_steps", 1), ("iterations", 1)):
            if getattr(self, name) < low:
                raise ClearValueError(f"{name}={getattr(self, name)}: must be at least {low}")
        if self.scored_steps > self.flow_steps - 1:
            raise ClearValueError(
                f"scored_steps={self.scored_steps}: {self.flow_steps} points make {self.flow_steps - 1} steps"
            )
        for name in ("temperature", "sigma", "clip", "latent_clip"):
            if not getattr(self, name) > 0:
                raise ClearValueError(f"{name}={getattr(self, name)}: must be positive")
        for name in ("image_weight", "beta"):
            if not getattr(self, name) >= 0:
                raise ClearValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.rollout_rows is not None and self.rollout_rows < self.group:
            raise ClearValueError(f"rollout_rows={self.rollout_rows}: a group of {self.group} must fit")
        terms = read_terms(self.rewards)
        if self.advantage == "separate":
            missing = [n for n in self.latent_rewards if n not in terms]
            if missing or not self.latent_rewards:
                raise ClearValueError(
                    f"advantage='separate' needs latent_rewards among the rewards; {missing} are not"
                )


@dataclass(frozen=True)
class _Question:
    """A draw with its pictures loaded."""

    draw: Draw
    image: Image
    clean: Image | None


@dataclass
class _Rollouts:
    """What one optimizer step's questions led to, for this process.

    Attributes:
        key: seeds of the draws that it was made from.
        members: (rows,) the place of each rollout in its question's group.
        transcripts: a question's rollouts stand next to each other.
        prepare: `Backbone.prepare`, once for each of their pictures.
        text_advantage: (rows,) float32.
        flow_advantage: (rows,) float32.
        scored: (rows,) float32, 1 where the group has a reward and 0 elsewhere.
    """

    key: tuple[int, ...]
    members: list[int]
    transcripts: list[Transcript]
    prepare: Callable[[Image], PreparedImage]
    text_advantage: Tensor
    flow_advantage: Tensor
    scored: Tensor


class GrpoObjective(Objective):
    """Stage 3's rollouts, rewards and loss.

    Rollout and loss see the same tokens, the same latents and the same context: the text after a restoration reads its
    final latent, and the velocity comes from a hidden noised copy (the released code scores that text against a noised
    latent, on tokens that were encoded anew). The ratio's denominator is what the rollout recorded; the reference of
    the KL is the adapter that the run began with, not the current policy.

    Attributes:
        reference: the parameters of the reference by name; they are exchanged with the trained ones for one forward.
    """

    parts = ("policy", "flow", "kl", "flow_kl", "ratio", "clipped")
    counts = ("text", "flow")

    def __init__(
        self,
        attached: AttachedModel,
        settings: GrpoSettings,
        reference: Mapping[str, Tensor],
        text: TextSampling,
        latent: LatentSampling,
        spread: int = 1,
    ) -> None:
        """Makes the rewards.

        Args:
            attached: the model with the adapter that is trained.
            settings: of the stage.
            reference: by the names of `attached.named_parameters()`, of the same shapes and devices.
            text: for the longest reply; temperature and top-p come from the settings.
            latent: for the shift and the reduction; rollouts run without guidance.
            spread: processes that share the rollouts of a question; each draw's `part` says which of them this is.

        Raises:
            ClearValueError, UnknownNameError: rewards that cannot work, a reference that lacks a parameter, or a group
                that does not divide among so many processes.
        """
        missing = [n for n, _ in attached.named_parameters() if n not in reference]
        if missing:
            raise ClearValueError(
                f"the reference lacks {missing[0]!r} and {len(missing) - 1} more parameters"
            )
        if settings.group % spread:
            raise ClearValueError(
                f"grpo.group={settings.group} does not divide among the {spread} processes that share a question: make it a "
                "multiple of them, or start fewer processes"
            )
        self.attached = attached
        self.backbone = attached.backbone
        self.settings = settings
        self._spread = spread
        self._own = settings.group // spread
        self.reference = dict(reference)
        self.rewards = Rewards(settings.rewards)
        self._text = replace(text, temperature=settings.temperature, top_p=1.0, top_k=0)
        self._latent = replace(
            latent,
            steps=settings.flow_steps,
            guidance_text=1.0,
            guidance_image=1.0,
            sde_sigma=settings.sigma,
            temperature=settings.temperature,
        )
        # What a rollout was sampled without is left out of its score too, in training mode.
        self._dropouts = [
            m
            for m in attached.module.modules()
            if isinstance(m, nn.Dropout) or getattr(m, "attention_dropout", False)
        ]
        self._held: _Rollouts | None = None
        self._sums: dict[str, tuple[float, float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a data worker gets where it is spawned: loading pictures needs nothing."""
        return {}

    # -- questions

    def collate(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """The questions with their pictures loaded; see `Objective.collate`.

        Raises:
            ImageError: a picture cannot be read.
        """
        return {"rows": [_Question(d, d.example.load(), d.example.load_clean()) for d in draws]}

    # -- rollouts

    def prepare(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Samples, rewards, and packs for the loss; see `Objective.prepare`.

        Raises:
            ClearError: a reward that cannot be computed, such as a judge that failed too often.
        """
        rows = [question for batch in batches for question in batch["rows"]]
        key = tuple(q.draw.seed for q in rows)
        if self._held is None or self._held.key != key:
            self._held = self._sample(rows, key)
        made, at = [], 0
        for batch in batches:
            count = len(batch["rows"]) * self._own
            made.append(self._pack(self._held, range(at, at + count)))
            at += count
        return made

    def _sample(self, rows: Sequence[_Question], key: tuple[int, ...]) -> _Rollouts:
        own = self._own
        portion = max(1, (self.settings.rollout_rows or len(rows) * own) // own)
        members = [g for q in rows for g in range(q.draw.part * own, (q.draw.part + 1) * own)]
        transcripts: list[Transcript] = []
        for at in range(0, len(rows), portion):
            some = rows[at : at + portion]
            numbers = members[at * own : (at + portion) * own]
            seeds = [q.draw.seed for q in some for _ in range(own)]
            transcripts += self.attached.engine.rollout(
                [q.image for q in some],
                [q.draw.example.question for q in some],
                seeds=[row_seed(s, f"rollout {g}", 0) for s, g in zip(seeds, numbers, strict=True)],
                text=self._text,
                latent=self._latent,
                latent_from=self.settings.latent_from,
                group=own,
            )
        scores = self._score(rows, transcripts)
        group = self.settings.group
        totals = _table(scores.totals, group)
        text = advantages(totals, self.settings.scale)
        flow = text
        if self.settings.advantage == "separate":
            terms = self.rewards.terms
            parts = [terms[n].weight * _table(scores.parts[n], group) for n in self.settings.latent_rewards]
            flow = advantages(torch.stack(parts).sum(0), self.settings.scale)
        self._note(scores, transcripts, totals)
        index = torch.arange(len(rows)).repeat_interleave(own), torch.tensor(members)
        scored = (~totals.isnan()).float()
        prepare = prepare_once(self.backbone.prepare)
        return _Rollouts(key, members, transcripts, prepare, text[index], flow[index], scored[index])

    def _score(self, rows: Sequence[_Question], transcripts: Sequence[Transcript]) -> Scores:
        """Rewards of the questions' whole groups, of which each process scores its own rollouts.

        What fails on one process ends all of them, instead of leaving the others waiting.
        """
        own = self._own
        repeated = [q for q in rows for _ in range(own)]
        examples = [q.draw.example for q in repeated]
        columns: dict[str, list[Any]] = {
            f.name: [getattr(e, f.name) for e in examples]
            for f in fields(Example)
            if f.name not in ("extra", "group")
        }
        columns |= {"image": [q.image for q in repeated], "clean_image": [q.clean for q in repeated]}
        columns |= columns_of(transcripts)
        columns |= self._latent_columns(rows, transcripts)
        completions = columns.pop("completions")
        error: ClearError | None = None
        scores = None
        try:
            scores = self.rewards([e.question for e in examples], completions, group=own, **columns)
        except ClearError as caught:
            error = caught
        if torch.distributed.is_initialized():
            told: list[Any] = [None] * torch.distributed.get_world_size()
            parts = {} if scores is None else {n: _split(v, own) for n, v in scores.parts.items()}
            names = [(q.draw.seed, q.draw.part) for q in rows]
            torch.distributed.all_gather_object(told, (error and str(error), names, parts))
            others = [f"process {i}: {text}" for i, (text, *_) in enumerate(told) if text is not None]
            if others and error is None:
                error = ClearError(f"rewards failed on another process: {others[0]}")
            if error is None and self._spread > 1:
                scores = self._gathered(rows, [t[1:] for t in told])
        if error is not None:
            raise error
        assert scores is not None
        return scores

    def _gathered(self, rows: Sequence[_Question], told: Sequence[tuple[Any, Any]]) -> Scores:
        """Scores of whole groups, from what each process says of its parts of them."""
        whole: dict[str, list[float | None]] = {}
        for name in self.rewards.terms:
            found = {key: v for keys, parts in told for key, v in zip(keys, parts[name], strict=True)}
            whole[name] = [v for q in rows for p in range(self._spread) for v in found[q.draw.seed, p]]
        return self.rewards.summed(whole, self.settings.group)

    def _latent_columns(
        self, rows: Sequence[_Question], transcripts: Sequence[Transcript]
    ) -> dict[str, list[Any]]:
        """Latents and features, where a reward asks for them."""
        wanted, group = self.rewards.columns, self._own
        found: dict[str, list[Any]] = {}
        if _LATENT_COLUMNS.isdisjoint(wanted):
            return found
        last = [t.restorations[-1].restoration if t.restorations else None for t in transcripts]
        clean = [None if q.clean is None else self.backbone.prepare(q.clean) for q in rows]
        known = [i for i, c in enumerate(clean) if c is not None]
        if "clean_latent" in wanted or "restored_latent" in wanted:
            encoded = self.backbone.encode_images([c for c in clean if c is not None]) if known else []
            latents = dict(zip(known, (self.backbone.latents(r) for r in encoded), strict=True))
            own = [None if r is None else self.backbone.latents(r) for r in last]
            pairs = [(r, latents.get(i // group)) for i, r in enumerate(own)]
            found["restored_latent"] = own
            found["clean_latent"] = [
                c if r is not None and c is not None and r.shape == c.shape else None for r, c in pairs
            ]
        if "clean_features" in wanted or "restored_features" in wanted:
            features = self.backbone.understand([c for c in clean if c is not None]) if known else []
            by_row = dict(zip(known, features, strict=True))
            found["clean_features"] = [by_row.get(i // group) for i in range(len(transcripts))]
            restored: list[Any] = [None] * len(transcripts)
            places = [i for i, r in enumerate(last) if r is not None]
            drawn = self.backbone.decode_each([r for r in last if r is not None])
            images = {
                i: self.backbone.prepare(d) for i, d in zip(places, drawn, strict=True) if d is not None
            }
            for i, feature in zip(images, self.backbone.understand(list(images.values())), strict=True):
                restored[i] = feature
            found["restored_features"] = restored
        return found

    # -- packing

    def _pack(self, held: _Rollouts, places: range) -> dict[str, Any]:
        """The rollouts of one micro-batch with all that the loss compares with."""
        backbone, device = self.backbone, self.backbone.device
        transcripts = [held.transcripts[i] for i in places]
        seeds = [held.key[i // self._own] for i in places]
        members = [held.members[i] for i in places]
        steps = [self._steps(s, m, t) for s, m, t in zip(seeds, members, transcripts, strict=True)]
        rows = [
            pieces(t, prepare=held.prepare, decode=backbone.decode_each, steps=own)
            for t, own in zip(transcripts, steps, strict=True)
        ]
        batch = backbone.pack(rows).to(device)
        batch = backbone.encode(batch, noise=torch.zeros_like(batch.latents))
        targets = restoration_targets(backbone.spec.kind, transcripts, steps, device)
        old = [s.logprobs for t in transcripts for s in _sampled(t) if s.logprobs is not None]
        index = torch.tensor(list(places))
        made: dict[str, Any] = {
            "batch": batch,
            "targets": targets,
            "text_old": torch.cat(old).to(device),
            "text_advantage": held.text_advantage[index].to(device),
            "flow_advantage": held.flow_advantage[index].to(device),
        }
        made |= self._weights(batch, targets, held.scored[index])
        if self.settings.beta > 0:
            with self._as_reference():
                made["text_reference"], made["flow_reference"] = self._logprobs(
                    backbone.forward(batch, self.attached.bridge), batch, targets
                )
        return made

    def _steps(self, seed: int, member: int, transcript: Transcript) -> list[list[int]]:
        """The steps of each restoration that are trained on, in the rollout of this number of a question."""
        settings, total = self.settings, self.settings.flow_steps - 1
        rng = random.Random(row_seed(seed, f"steps {member}", 0))
        first = random.Random(seed).randrange(total)
        found = []
        for number in range(len(transcript.restorations)):
            if settings.step_choice == "random":
                own = rng.sample(range(total), settings.scored_steps)
            elif settings.step_choice == "window":
                start = rng.randrange(total - settings.scored_steps + 1)
                own = list(range(start, start + settings.scored_steps))
            else:
                start = first + (member + number) * settings.scored_steps
                own = [(start + i) % total for i in range(settings.scored_steps)]
            found.append(sorted(own))
        return found

    def _weights(
        self, batch: PackedBatch, targets: FlowTargets | CodeTargets, scored: Tensor
    ) -> dict[str, Any]:
        """What each token and each step weighs, and the sums by which the step's losses are divided."""
        device, rows = batch.text_row.device, len(scored)
        scored = scored.to(device)
        tokens = torch.bincount(batch.text_row, minlength=rows).float()
        text = scored[batch.text_row]
        if self.settings.reduction == "grpo":
            text = text / tokens[batch.text_row]
            total = (scored * (tokens > 0)).sum()
        elif self.settings.reduction == "bnpo":
            total = text.sum()
        else:
            total = scored.sum() * self._text.max_new_tokens
        per_row = torch.tensor(targets.per_row, device=device)
        row = torch.arange(rows, device=device).repeat_interleave(per_row)
        flow = scored[row] / per_row[row]
        restoring = (scored * (per_row > 0)).sum()
        return {
            "text_weight": text,
            "flow_weight": flow,
            "flow_row": row,
            "counts": torch.stack((total, restoring)),
        }

    def _logprobs(
        self, outputs: ModelOutputs, batch: PackedBatch, targets: FlowTargets | CodeTargets
    ) -> tuple[Tensor, Tensor]:
        return (
            score_text(outputs, batch, self.settings.temperature),
            targets.score(outputs, self._latent),
        )

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """The reference in the adapter's place: tensors change hands, nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self.attached.named_parameters():
            parameter.data, self.reference[name] = self.reference[name], parameter.data
        # Autocast keeps casts of weights by the parameter, not by what it holds.
        torch.clear_autocast_cache()

    # -- loss

    def loss(self, module: nn.Module, batch: dict[str, Any], counts: Tensor) -> dict[str, Tensor]:
        """Clipped policy loss on text and steps with a k3 KL; see `Objective.loss`.

        `-min(r A, clip(r, 1 - e, 1 + e) A) + beta (exp(d) - d - 1)`, with r the ratio to the rollout's policy and d the
        difference of the reference's log-probability to the present one (paper, section 3.3).
        """
        settings, packed = self.settings, batch["batch"]
        for dropout in self._dropouts:
            dropout.eval()
        text, flow = self._logprobs(module(packed), packed, batch["targets"])
        text_weight = batch["text_weight"] / counts[0].clamp(min=1)
        flow_weight = batch["flow_weight"] / counts[1].clamp(min=1)
        text_advantage = batch["text_advantage"][packed.text_row]
        flow_advantage = batch["flow_advantage"][batch["flow_row"]]
        policy, ratio, was_clipped = clipped(text, batch["text_old"], text_advantage, settings.clip)
        flow_policy, _, _ = clipped(flow, batch["targets"].recorded, flow_advantage, settings.latent_clip)
        out = {
            "policy": (policy * text_weight).sum(),
            "flow": (flow_policy * flow_weight).sum(),
            "ratio": ((ratio - 1).abs() * text_weight).sum(),
            "clipped": (was_clipped * text_weight).sum(),
            # Without steps these are empty sums that still hang on the graph, so that every process takes part.
            "kl": 0 * text.sum(),
            "flow_kl": 0 * flow.sum(),
        }
        if settings.beta > 0:
            out["kl"] = (k3(text, batch["text_reference"]) * text_weight).sum()
            out["flow_kl"] = (k3(flow, batch["flow_reference"]) * flow_weight).sum()
        restoration = out["flow"] + settings.beta * out["flow_kl"]
        out["loss"] = out["policy"] + settings.beta * out["kl"] + settings.image_weight * restoration
        return out

    # -- facts for the log

    def _note(self, scores: Scores, transcripts: Sequence[Transcript], totals: Tensor) -> None:
        columns: dict[str, list[float]] = {
            f"reward/{n}": [v for v in values if v is not None] for n, values in scores.parts.items()
        }
        columns["reward/total"] = [v for v in scores.totals if v is not None]
        columns["restored"] = [float(bool(t.restorations)) for t in transcripts]
        columns["tokens"] = [float(sum(len(s.ids) for s in _sampled(t))) for t in transcripts]
        known = totals[~totals.isnan().any(1)]
        columns["unscored"] = totals.isnan().any(1).float().tolist()
        columns["equal"] = (known.amax(1) == known.amin(1)).float().tolist() if len(known) else []
        for name, values in columns.items():
            total, count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + sum(values), count + len(values))

    def facts(self) -> dict[str, tuple[float, float]]:
        """Means over rollouts (`unscored` and `equal`: over groups) of rewards and lengths; see `Objective.facts`."""
        found, self._sums = self._sums, {}
        return found


def _table(values: Sequence[float | None], group: int) -> Tensor:
    """(P, G) float32 with NaN for None."""
    return torch.tensor([float("nan") if v is None else v for v in values]).view(-1, group)


def _split(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[at : at + size] for at in range(0, len(values), size)]


def _sampled(transcript: Transcript) -> list[TextSegment]:
    return [s for s in transcript if isinstance(s, TextSegment) and s.origin is Origin.SAMPLED]
