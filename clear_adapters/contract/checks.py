"""The checks. Each takes a freshly built tiny model and says what is wrong by a `ContractError`."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Final

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from clear_adapters.adapter import attach
from clear_adapters.attached import AttachedModel
from clear_adapters.backbones.base import Backbone
from clear_adapters.backbones.packed import ImagePiece, LatentPiece, PackedBatch, Piece, TextPiece
from clear_adapters.config import LoraSettings
from clear_adapters.contract.paths import (
    GREEDY,
    GUIDED,
    ODE,
    QUESTIONS,
    SDE,
    SIZES,
    SMALL,
    TOLERANCE,
    WARM,
    ask,
    describe,
    difference,
    images,
    pictures,
    pieces,
    randomise,
    run,
)
from clear_adapters.engine import Engine
from clear_adapters.errors import ClearError, ClearValueError
from clear_adapters.sampling import LatentSampling, TextSampling, sde_logprob, sde_mean
from clear_adapters.transcript import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    RESTORE,
    THINK_CLOSE,
    THINK_OPEN,
    ImageSegment,
    Origin,
    RestorationSegment,
    Segment,
    TextSegment,
    Transcript,
)


class ContractError(ClearError, AssertionError):
    """A backbone does not do what it has to."""


Check = Callable[[Backbone], None]


def need(condition: bool, message: str) -> None:
    """Fails with the message where the condition does not hold."""
    if not condition:
        raise ContractError(message)


@contextmanager
def _attached(backbone: Backbone, lora: LoraSettings | None = None) -> Iterator[AttachedModel]:
    """An adapter with random weights, taken out at the end whatever happens."""
    attached = randomise(attach(backbone, lora=False if lora is None else lora))
    try:
        yield attached
    finally:
        attached.detach()


# ------------------------------------------------------------------------------------------------------- facts


def facts(backbone: Backbone) -> None:
    """The spec is complete, and every path that it names exists."""
    spec = backbone.spec
    for name in ("checkpoints", "license", "sources", "tested_with", "stages"):
        need(bool(getattr(spec, name)), f"the spec has no {name}: whoever lists the backbones sees it")
    need(
        {"understanding", "generation"} <= set(spec.groups),
        f"the spec has the LoRA groups {', '.join(spec.groups) or 'none'}, but recipes name understanding and generation",
    )
    for kind, paths in (("extras", spec.extras), ("never", spec.never)):
        for path in paths:
            try:
                backbone.model.get_submodule(path)
            except AttributeError as error:
                raise ContractError(f"spec.{kind} names {path!r}, which the model does not have") from error
    held = [n for n, _ in backbone.model.named_children()]
    need(
        not spec.roots or list(spec.roots) == held,
        f"the spec's roots are {list(spec.roots)}, but the model holds {held}",
    )
    given = dict(backbone.model.named_children()) if spec.roots else backbone.model
    need(type(backbone).accepts(given), "`accepts` refuses the family's own model")
    need(not type(backbone).accepts(nn.Linear(1, 1)), "`accepts` takes a torch.nn.Linear for its model")
    with tempfile.TemporaryDirectory() as empty:
        need(not type(backbone).recognises(Path(empty)), "`recognises` takes an empty folder for its own")
    need(backbone.layers >= 1, f"layers={backbone.layers}")


def widths(backbone: Backbone) -> None:
    """Grids and widths of what comes out are those that the backbone states."""
    spec = backbone.spec
    prepared = pictures(backbone)
    for picture, own in zip(prepared, backbone.encode_images(prepared), strict=True):
        need(
            own.kind == spec.kind,
            f"encode_images gives {own.kind}, but the spec's kind is {spec.kind}",
        )
        grid = backbone.latent_grid(picture.size)
        need(own.grid == grid, f"encode_images gives grid {own.grid}, latent_grid {grid}")
        need(own.size == picture.size, f"a restoration of size {own.size} of a picture of {picture.size}")
        shape = tuple(backbone.latents(own).shape)
        expected = (1, grid[0] * grid[1], backbone.latent_width)
        need(
            shape == expected,
            f"latents are {shape}, but grid and latent_width={backbone.latent_width} ask for {expected}",
        )
    for features in backbone.understand(prepared):
        need(
            features.shape[-1] == backbone.width,
            f"understand gives width {features.shape[-1]}, but the language model's is {backbone.width}",
        )
    (own,) = backbone.encode_images(prepared[:1])
    drawn = backbone.decode(own)
    need(
        (drawn is not None) == spec.decodes,
        f"spec.decodes is {spec.decodes}, but decode gives {type(drawn).__name__}",
    )
    if drawn is not None:
        need(
            drawn[0].size == (own.size[1], own.size[0]),
            f"decode gives {drawn[0].size} of a restoration of height and width {own.size}",
        )


def frozen(backbone: Backbone) -> None:
    """Training mode changes nothing about how pictures are read and drawn, and no buffer of the model."""

    def seen() -> list[torch.Tensor]:
        prepared = pictures(backbone)
        own = backbone.encode_images(prepared)
        drawn = [np.asarray(image) for image in backbone.decode_each(own) if image is not None]
        found = [r.tokens for r in own] + backbone.understand(prepared)
        return found + [torch.from_numpy(image.copy()) for image in drawn]

    buffers = {n: b.clone() for n, b in backbone.model.named_buffers()}
    expected = seen()
    backbone.model.train()
    found = seen()
    backbone.model.eval()
    equal = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    need(
        equal, "in training mode pictures are read or drawn as others: use the frozen parts in inference mode"
    )
    moved = [n for n, b in backbone.model.named_buffers() if not torch.equal(b, buffers[n])]
    need(not moved, f"reading pictures in training mode changes buffers, such as {moved[:1]}")


def targets(backbone: Backbone) -> None:
    """LoRA hits exactly the linear layers that each group names, and none that must stay as it is."""
    never = tuple(f"{p}." for p in backbone.spec.never)
    for group in backbone.spec.groups:
        names = backbone.lora_names([group])
        need(len(names) == len(set(names)), f"group {group} names a module twice")
        banned = [n for n in names if n.startswith(never)] if never else []
        need(not banned, f"group {group} names {banned[:1]}, which spec.never forbids")
        attached = attach(backbone, lora=LoraSettings({group: 2}), bridge=False)
        try:
            hit = {n for n, m in backbone.model.named_modules() if isinstance(m, BaseTunerLayer)}
        finally:
            attached.detach()
        need(
            hit == set(names),
            f"group {group} hits other modules than it names: {sorted(hit ^ set(names))[:4]}",
        )


def tags(backbone: Backbone) -> None:
    """Tags and any other text come back from their ids, and end no turn."""
    for text in (THINK_OPEN, THINK_CLOSE, RESTORE, ANSWER_OPEN, ANSWER_CLOSE, "a <think>é</think>\n 12%"):
        ids = backbone.encode_text(text)
        back = backbone.decode_text(ids)
        need(back == text, f"{text!r} comes back from its ids as {back!r}")
        need(backbone.end_id not in ids.tolist(), f"{text!r} holds the end-of-turn token")
        closed = torch.cat((ids, torch.tensor([backbone.end_id])))
        need(backbone.decode_text(closed) == text, f"the end-of-turn token shows in the text of {text!r}")


# ------------------------------------------------------------------------------------------- adapter and bridge


def detach(backbone: Backbone) -> None:
    """Attach and detach leave the model as it was, bit for bit; switched off, the adapter is not there."""
    before, out = describe(backbone), run(backbone, None, [0, 1])
    again = difference(out, run(backbone, None, [0, 1]))
    need(again is None, f"the same seeds give another path: {again}")
    attached = randomise(attach(backbone, lora=replace(SMALL, whole=backbone.spec.extras)))
    try:
        need(
            difference(out, run(backbone, attached.bridge, [0, 1]), TOLERANCE) is not None,
            "random LoRA weights change nothing: the adapted layers are not used",
        )
        with attached.disabled():
            off = difference(out, run(backbone, None, [0, 1]))
        need(off is None, f"with the adapter disabled the model is not its plain self: {off}")
    finally:
        attached.detach()
    after = describe(backbone)
    changed = [name for name in before if before[name] != after[name]]
    need(not changed, f"detach leaves other {' and '.join(changed)}")
    off = difference(out, run(backbone, None, [0, 1]))
    need(off is None, f"after detach the model does something else: {off}")


def bridge(backbone: Backbone) -> None:
    """An untrained bridge is the family's own way back in, bit for bit; a trained one is read."""
    attached = attach(backbone, lora=False)
    try:
        native = run(backbone, None, [0, 1, 2])
        found = difference(native, run(backbone, attached.bridge, [0, 1, 2]))
        need(found is None, f"an untrained bridge changes what is read: {found}")
        found = difference(native, run(backbone, randomise(attached).bridge, [0, 1, 2]), TOLERANCE)
        need(found is not None, "a bridge with random weights changes nothing: read_restoration ignores it")
    finally:
        attached.detach()


# ------------------------------------------------------------------------------------------------------- verbs


def batch(backbone: Backbone) -> None:
    """A batch gives what its rows give one by one: sampled or greedy, with guidance and without."""
    with _attached(backbone, SMALL) as attached:
        for latent in (ODE, SDE, GUIDED):
            for text in (GREEDY, WARM):
                check_batch(backbone, attached, text, latent)


def check_batch(
    backbone: Backbone, attached: AttachedModel, text: TextSampling, latent: LatentSampling
) -> None:
    """The same for one way of sampling."""
    together = run(backbone, attached.bridge, [0, 1, 2], latent, text)
    alone = [run(backbone, attached.bridge, [r], latent, text)[0] for r in range(3)]
    found = difference(together, alone, TOLERANCE)
    need(found is None, f"a batch is not what its rows are one by one ({text}, {latent}): {found}")
    for row, (t, a) in enumerate(zip(together, alone, strict=True)):
        left, right = t.restoration, a.restoration
        pairs = [(left.code_logprobs, right.code_logprobs)]
        if left.trace is not None and right.trace is not None:
            pairs += [(left.trace.logprobs, right.trace.logprobs), (left.trace.x, right.trace.x)]
        for p, q in pairs:
            far = p is not None and q is not None and float((p - q).abs().max()) > TOLERANCE
            need(not far, f"the record of how row {row} was restored depends on its batch")


def forks(backbone: Backbone) -> None:
    """Contexts that go on separately do not see each other, and rows that wait are as if never in the batch."""
    long, short = ([backbone.encode_text(t)] * 2 for t in ("A thought of some length.", "No."))
    with _attached(backbone, SMALL) as attached:

        def ending(context: object, ids: object) -> list[list[int]]:
            read = backbone.read_text(context, ids)  # type: ignore[arg-type]
            return [s.ids.tolist() for s in backbone.write_text(read, WARM)[1]]

        wanted = [ending(ask(backbone, [0, 1])[0], ids) for ids in (long, short)]
        context, _ = ask(backbone, [0, 1])
        left, right = context.fork(), context.fork()
        one, two = backbone.read_text(left, long), backbone.read_text(right, short)
        found = [[s.ids.tolist() for s in backbone.write_text(c, WARM)[1]] for c in (one, two)]
        need(found == wanted, "what is read into one fork of a context shows in another")
        need(ending(context, long) == wanted[0], "what forks read shows in the context they came from")
        alone = [written(backbone, attached, [r])[0] for r in range(3)]
        together = written(backbone, attached, [0, 1, 2])
        need(together == alone, "a row that waits while others restore goes on as another one")


def written(backbone: Backbone, attached: AttachedModel, rows: list[int]) -> list[list[int]]:
    """What rows write of which only row 1 restores."""
    context, blind = ask(backbone, rows)
    some = [i for i, r in enumerate(rows) if r == 1]
    if some:
        context, found = backbone.restore(context, GUIDED, [context.fork(), blind], rows=some)
        context = backbone.read_restoration(context, found, attached.bridge, rows=some)
    return [s.ids.tolist() for s in backbone.write_text(context, WARM)[1]]


# ------------------------------------------------------------------------------------------- the uncached path


def forward(backbone: Backbone) -> None:
    """The uncached forward scores what the cached verbs recorded: text before and after, every flow step or code."""
    with _attached(backbone, SMALL) as attached:
        rows = run(backbone, attached.bridge, [0, 1, 2])
        for step in range(SDE.steps - 1 if backbone.spec.kind == "flow" else 1):
            packed = backbone.pack([pieces(backbone, i, r, step) for i, r in enumerate(rows)])
            with torch.no_grad():
                out = attached.module(backbone.encode(packed))
            scores = out.text_logits.float().log_softmax(-1).gather(1, packed.text_targets[:, None])[:, 0]
            for i, r in enumerate(rows):
                far = float((scores[packed.text_row == i] - torch.cat(r.logprobs)).abs().max())
                need(
                    far <= TOLERANCE,
                    f"log-probabilities of row {i}'s text differ from the recorded by {far:.2g}",
                )
                trace, scored = r.restoration.trace, out.scored[packed.scored_row == i].float()
                if trace is not None:
                    t, dt = float(trace.t[step]), float(trace.dt[step])
                    mean = sde_mean(trace.x[0, step], scored, t, dt, trace.sigma)
                    again = sde_logprob(trace.x_next[0, step], mean, dt, trace.sigma, SDE.logprob)
                    recorded = trace.logprobs[0, step]
                else:
                    need(r.restoration.code_logprobs is not None, "restore recorded no log-probabilities")
                    assert r.restoration.code_logprobs is not None
                    recorded = r.restoration.code_logprobs[0]
                    again = scored.log_softmax(-1).gather(1, r.restoration.tokens[0][:, None])[:, 0]
                far = float((again - recorded).abs().max())
                need(
                    far <= TOLERANCE,
                    f"log-probabilities of row {i}'s restoration differ from the recorded by {far:.2g}",
                )


def replay(backbone: Backbone) -> None:
    """The engine's replay gives what its rollout recorded, whether rows restore or not."""
    with _attached(backbone, SMALL) as attached:
        engine = Engine(backbone, attached.bridge, "tiny", WARM, SDE)
        for restore in ("auto", "always", "never"):
            transcripts = engine.rollout(images(), QUESTIONS, seeds=[1, 2, 3], restore=restore)
            with torch.no_grad():
                found = engine.replay(transcripts)
            for row, (transcript, text) in enumerate(zip(transcripts, found.text_logprobs, strict=True)):
                own = [
                    s.logprobs
                    for s in transcript
                    if isinstance(s, TextSegment) and s.origin is Origin.SAMPLED and s.logprobs is not None
                ]
                far = float((torch.cat(own) - text).abs().max())
                made = [s.restoration for s in transcript.restorations]
                steps = [
                    r.code_logprobs[0] if r.trace is None else r.trace.logprobs[0]
                    for r in made
                    if r.trace is not None or r.code_logprobs is not None
                ]
                need(len(steps) == len(made), "a restoration was sampled without log-probabilities")
                latent = found.latent_logprobs[row]
                far = max([far, *(torch.cat(steps) - latent).abs().tolist()]) if steps else far
                need(
                    far <= TOLERANCE,
                    f"with restore={restore!r} the replay of row {row} differs from the rollout by {far:.2g}",
                )
            restored = sum(len(t.restorations) for t in transcripts)
            need(restore != "always" or restored >= len(SIZES), "restore='always' restored nothing")


def recorded(backbone: Backbone) -> None:
    """Stage 2's own latents are those of a rollout and of the packed row, with understanding tokens and without."""
    from clear_adapters.training.bridge import own_latents

    if "bridge" not in backbone.spec.stages:
        return

    def ready(segment: Segment) -> Segment:
        if isinstance(segment, ImageSegment):
            return replace(segment, image=backbone.prepare(segment.image))
        return segment

    seeds, understood, heads = [1, 2, 3], (True, False, True), []
    with _attached(backbone, SMALL) as attached:
        engine = Engine(backbone, attached.bridge, "tiny", WARM, SDE)
        rollouts = engine.rollout(images(), QUESTIONS, seeds=seeds, restore="always")
        for rollout, seen in zip(rollouts, understood, strict=True):
            head = takewhile(lambda s: not isinstance(s, RestorationSegment), rollout)
            heads.append([replace(s, understanding=seen) if isinstance(s, ImageSegment) else s for s in head])
        traces = [Transcript([*map(ready, head), RestorationSegment()]) for head in heads]
        found = own_latents(backbone, traces, seeds, SDE)
        rows = [Transcript([*head, RestorationSegment(r)]) for head, r in zip(heads, found, strict=True)]
        with torch.no_grad():
            scores = engine.replay(rows).latent_logprobs
        for row, (own, score, seen) in enumerate(zip(found, scores, understood, strict=True)):
            made = rollouts[row].restorations[0].restoration
            far = float((own.tokens - made.tokens).abs().max())
            need(
                not seen or far <= TOLERANCE,
                f"the latent that row {row} generates for stage 2 differs from its rollout's by {far:.2g}",
            )
            logprobs = own.code_logprobs if own.trace is None else own.trace.logprobs
            need(logprobs is not None, "a restoration was sampled without log-probabilities")
            assert logprobs is not None
            far = float((logprobs[0] - score).abs().max())
            need(
                far <= TOLERANCE,
                f"the packed row scores the latent that row {row} generates for stage 2 otherwise, by {far:.2g}",
            )


def gradients(backbone: Backbone) -> None:
    """In a batch in which one row restores and another does not, every adapter weight gets a gradient, and no other."""
    with _attached(backbone, replace(SMALL, whole=backbone.spec.extras)) as attached:
        row = run(backbone, attached.bridge, [0])[0]
        _, other, _, first, *_ = pieces(backbone, 1, row)
        packed = backbone.pack([pieces(backbone, 0, row, step=1), [other, first]])
        attached.module.train()
        out = attached.module(backbone.encode(packed))
        text = out.text_logits.float().log_softmax(-1).gather(1, packed.text_targets[:, None])
        (text.square().mean() + out.scored.float().square().mean()).backward()
        own = dict(attached.named_parameters())
        without = [n for n, p in own.items() if p.grad is None or not bool(p.grad.any())]
        need(not without, f"{len(without)} adapter weights get no gradient, such as {without[:1]}")
        ids = {id(p) for p in own.values()}
        strange = [
            n
            for n, p in attached.module.named_parameters()
            if id(p) not in ids and (p.requires_grad or p.grad is not None)
        ]
        need(not strange, f"weights of the base get gradients, such as {strange[:1]}")


def folder(backbone: Backbone) -> None:
    """What `save` writes loads by its folder's name and answers, in float32 and in bfloat16."""
    question = "What is it?"
    with tempfile.TemporaryDirectory() as place:
        try:
            backbone.save(Path(place))
        except ClearValueError:
            return  # the family does not write checkpoints
        loaded = attach(place, dtype="float32", device="cpu")
        need(
            type(loaded.backbone) is type(backbone),
            f"the folder that was written is taken for a model of {loaded.backbone.spec.name!r}",
        )
        half = attach(place, dtype="bfloat16", device="cpu")
        need(half.backbone.dtype == torch.bfloat16, f"dtype='bfloat16' loads {half.backbone.dtype}")
        for dtype, attached in (("float32", loaded), ("bfloat16", half)):
            try:
                attached.answer(images()[0], question, restore="always", text=GREEDY, latent=GUIDED)
            except Exception as error:
                raise ContractError(f"loaded in {dtype} it cannot answer: {error}") from error


def workers(backbone: Backbone) -> None:
    """A copy without weights, pickled as for a spawned data worker, prepares and packs the same."""
    from clear_adapters.training.rows import without_weights

    light = pickle.loads(pickle.dumps(without_weights(backbone)))
    need(light.end_id == backbone.end_id, "end_id is another without weights")

    def packed(verbs: Backbone) -> PackedBatch:
        (own, *_), ids = pictures(verbs), verbs.encode_text(QUESTIONS[0])
        row: list[Piece] = [
            ImagePiece(own),
            LatentPiece(image=own, time=0.5, scored=True, branch=1),
            TextPiece(ids, scored=True),
        ]
        return verbs.pack([row])

    one, other = packed(backbone), packed(light)
    for name, value in vars(one).items():
        found = getattr(other, name)
        need(
            not isinstance(value, torch.Tensor) or torch.equal(value, found),
            f"pack gives other {name} without weights",
        )


def stages(backbone: Backbone) -> None:
    """Every stage that the spec names takes two optimizer steps, in which rows restore, and writes its adapter."""
    from clear_adapters.datasets.world import build as build_world
    from clear_adapters.training.recipe import STAGES
    from clear_adapters.training.run import train

    strange = [s for s in backbone.spec.stages if s not in STAGES]
    need(not strange, f"the spec names the stages {strange}: there are {', '.join(STAGES)}")
    with tempfile.TemporaryDirectory() as place:
        data = build_world(Path(place) / "data", 8, workers=1, progress=False)
        adapter: Path | None = None
        for stage in [s for s in STAGES if s in backbone.spec.stages]:
            adapter = train(
                "tiny",
                data,
                Path(place) / stage,
                stage=stage,
                model=backbone,
                adapter=adapter,
                device="cpu",
                overrides=[*_SHORT, *_SHORT_STAGE[stage]],
                progress=False,
            )
            need((adapter / "clear_config.json").is_file(), f"stage {stage} wrote no adapter")


_SHORT: Final = (
    *("loop.steps=2", "loop.batch=2", "micro_batch=1", "log_every=1", "save_every=0", "workers=0"),
    *("text.max_new_tokens=12", "latent.steps=3"),
)
_SHORT_STAGE: Final = {
    "sft": ("lora.groups={understanding: 2, generation: 2}", "sft.traces.restore_below=90"),
    "bridge": ("own_steps=3", "own=0.5", "estimate=0.5", "bridge.traces.restore_below=90"),
    "grpo": ("group=2", "flow_steps=3"),
}
"""The tiny recipe, for two steps on a machine without a GPU."""

CHECKS: Final[dict[str, Check]] = {
    c.__name__: c
    for c in (
        facts,
        widths,
        frozen,
        targets,
        tags,
        detach,
        bridge,
        batch,
        forks,
        forward,
        replay,
        recorded,
        gradients,
        workers,
        folder,
        stages,
    )
}
"""Every check by name, the cheap ones first."""
