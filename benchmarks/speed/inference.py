"""Seconds and memory of answering: prefill, text, restoration, whole answers, groups of rollouts, and how they grow.

    python benchmarks/speed/inference.py --output benchmarks/results/speed/inference.json --profile
    python benchmarks/speed/inference.py --only text,restoration --output runs/some.json --seconds 300
    python benchmarks/speed/inference.py --size tiny --device cpu --output runs/tiny.json          (a minute, anywhere)

The model has BAGEL-7B's shapes and random weights (see shapes.py), LoRA of rank 16 on both groups and a bridge, unless a
row says otherwise. The workload is that of DESIGN.md, section 9: one picture of 512 x 512 pixels, a system prompt of 520
tokens, texts of 64 tokens, 30 flow points with guidance 4 and 2 in (0.4, 1], shift 3; rollouts with 20 stochastic ones.
Medians of repeats after a warm-up; `peak_gb` is what was allocated at most, weights included.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from shapes import Turns, build, parameters, picture, protocol, text
from stopwatch import Session, add_options

from clear_adapters import attach
from clear_adapters.adapter import AttachedModel
from clear_adapters.backbones import fast
from clear_adapters.backbones.base import Context, Restoration
from clear_adapters.engine import Engine
from clear_adapters.lora import ADAPTER_NAME
from clear_adapters.sampling import LatentSampling, TextSampling
from clear_adapters.transcript import Origin, TextSegment, Transcript

PARTS = (
    *("prefill", "text", "restoration", "answer", "group", "bridge"),
    *("picture", "length", "batch", "groups", "ways", "compiled", "states"),
)


@dataclass(frozen=True)
class Load:
    """The workload.

    Attributes:
        side: of the picture, pixels.
        sides: of the sweep.
        system: tokens of the system prompt.
        question: of the question.
        text: of each text.
        lengths: of the sweep.
        points: of the flow.
        rollout_points: of a rollout's flow.
        group: rollouts of a question.
        groups: of the sweep.
        batches: of the sweep.
        large: rows of the larger batch of restorations.
    """

    side: int = 512
    sides: tuple[int, ...] = (512, 640, 768, 1024)
    system: int = 520
    question: int = 16
    text: int = 64
    lengths: tuple[int, ...] = (16, 64, 256, 512)
    points: int = 30
    rollout_points: int = 20
    group: int = 8
    groups: tuple[int, ...] = (2, 4, 8, 16)
    batches: tuple[int, ...] = (1, 8, 32)
    large: int = 8


TINY = Load(
    side=64,
    sides=(32, 64),
    system=20,
    question=6,
    text=6,
    lengths=(3, 6),
    points=4,
    rollout_points=4,
    group=2,
    groups=(2, 3),
    batches=(1, 2),
    large=2,
)


class Bench:
    """A model and the workload."""

    def __init__(self, session: Session, load: Load, dtype: torch.dtype) -> None:
        self.s, self.load = session, load
        self.backbone: Turns = build(session.args.size, session.device, dtype, session.args.quantization)
        self.attached: AttachedModel | None = self._attach()
        self.engine = self._engine()

    def _attach(self) -> AttachedModel:
        attached = attach(self.backbone)
        assert attached.lora is not None
        generator = torch.Generator().manual_seed(1)
        for layer in attached.lora.layers.values():
            # An update that does something; its size is no matter. In the base's type, as one that is loaded.
            for factor in (layer.lora_A, layer.lora_B):
                weight = factor[ADAPTER_NAME].weight
                drawn = torch.randn(weight.shape, generator=generator) * 1e-2
                weight.data = drawn.to(weight.device, self.backbone.dtype)
        return attached

    def _engine(self) -> Engine:
        bridge = None if self.attached is None else self.attached.bridge
        return Engine(self.backbone, bridge, protocol(self.load.system))

    def use(self, state: str) -> None:
        """`bare`, `attached` or `merged`, from the state before; there is no way back from `merged`."""
        if state == "bare" and self.attached is not None:
            self.attached.detach()
            self.attached = None
        elif state == "attached" and self.attached is None:
            self.attached = self._attach()
        elif state == "merged":
            assert self.attached is not None
            self.attached.merge(keep_bridge=True)
            self.attached = attach(self.backbone, lora=False)
        self.engine = self._engine()

    # -- pieces of the work

    def texts(self, tokens: int, temperature: float = 0.0) -> TextSampling:
        """Settings of a text."""
        return TextSampling(max_new_tokens=tokens, temperature=temperature)

    def latents(self, guided: bool = True) -> LatentSampling:
        """Settings of a restoration."""
        plain = {} if guided else {"guidance_text": 1.0, "guidance_image": 1.0}
        return LatentSampling(steps=self.load.points, **plain)  # type: ignore[arg-type]

    def stochastic(self) -> LatentSampling:
        """Settings of a rollout's restoration."""
        return replace(self.latents(guided=False), steps=self.load.rollout_points, sde_sigma=0.3)

    def ids(self, tokens: int) -> torch.Tensor:
        """A block of text of so many tokens, marks included."""
        return self.backbone.encode_text(text(max(1, tokens - 2)))

    def prompt(self, side: int, rows: int = 1) -> Context:
        """A prompt that is read once, as the engine reads it, for so many rows."""
        b, load = self.backbone, self.load
        context = b.read_text(b.start(1, [0]), [self.ids(load.system)])
        context = b.read_image(context, [b.prepare(picture(side))])
        context = b.read_text(context, [self.ids(load.question)])
        return context.expand(rows) if rows > 1 else context

    def before_restoring(self, side: int, rows: int) -> tuple[Context, tuple[Context, Context]]:
        """The context with a thought, and those without it and without the picture."""
        b, load = self.backbone, self.load
        before = self.prompt(side, rows)
        thought = [self.ids(load.text)] * rows
        own = b.read_text(before.fork(), thought, own=True)
        blind = b.start(rows, [0] * rows)
        for tokens in (load.system, load.question):
            blind = b.read_text(blind, [self.ids(tokens)] * rows)
        return own, (before, b.read_text(blind, thought, own=True))

    # -- parts

    def prefill(self) -> None:
        """Reading a prompt."""
        for side, rows in ((self.load.side, 1), (self.load.side, self.load.large), (self.load.sides[-1], 1)):
            images = [picture(side, i) for i in range(rows)]
            prepared = [self.backbone.prepare(i) for i in images]

            def work(prepared: Any = prepared, rows: int = rows) -> Context:
                b = self.backbone
                context = b.read_text(b.start(1, [0]), [self.ids(self.load.system)])
                context = context.expand(rows) if rows > 1 else context
                context = b.read_image(context, prepared)
                return b.read_text(context, [self.ids(self.load.question)] * rows)

            length = self.prompt(side).length
            self.s.row("prefill", work, facts={"batch": rows, "side": side, "tokens": length}, warmup=2)

    def _write(self, part: str, rows: int, tokens: int, **facts: Any) -> None:
        try:
            context = self.prompt(self.load.side, rows)
        except RuntimeError as error:
            self.s.fail(part, {"batch": rows, **facts}, error)
            return

        def work() -> list[TextSegment]:
            return self.backbone.write_text(context.fork(), self.texts(tokens))[1]

        def check(found: list[TextSegment]) -> None:
            exact([s.ids for s in found], tokens)

        facts = {"batch": rows, "text": tokens, "context": context.length, **facts}
        self.s.row(part, work, facts=facts, per=tokens, warmup=2, check=check)

    def text(self) -> None:
        """Seconds a step of text (a token in every row), turn included."""
        for rows in self.load.batches:
            self._write("text", rows, self.load.text)
        # What a turn costs beside its tokens shows in the longer one.
        self._write("text", 1, 4 * self.load.text)

    def _restore(self, part: str, side: int, rows: int, guided: bool, **facts: Any) -> None:
        try:
            own, guidance = self.before_restoring(side, rows)
        except RuntimeError as error:
            self.s.fail(part, {"side": side, "batch": rows, "guided": guided, **facts}, error)
            return
        sampling = self.latents(guided)

        def work() -> list[Restoration]:
            return self.backbone.restore(own.fork(), sampling, guidance if guided else ())[1]

        facts = {"side": side, "batch": rows, "guided": guided, "points": sampling.steps, **facts}
        # The larger ones take a minute each: what a first run costs more is nothing beside it.
        pixels = rows * side**2 if self.s.args.size != "tiny" else 0
        repeats = 1 if pixels >= 8 * 512**2 else None
        self.s.row(part, work, facts=facts, repeats=repeats, warmup=int(pixels < 8 * 1024**2))

    def restoration(self) -> None:
        """A restoration, with and without guidance."""
        first, last = self.load.side, self.load.sides[-1]
        for side, rows in ((first, 1), (last, 1), (first, self.load.large), (last, self.load.large)):
            for guided in (True, False):
                self._restore("restoration", side, rows, guided)

    def _answer(self, part: str, rows: int = 1, side: int | None = None, **facts: Any) -> None:
        load, last = self.load, {}
        images = [picture(side or load.side, i) for i in range(rows)]
        sampling = self.texts(load.text), self.latents()

        def work() -> list[Any]:
            self.backbone.script(rows)
            replies = self.engine.answer(
                images, [text(load.question - 2)] * rows, text=sampling[0], latent=sampling[1]
            )
            last.update(replies[0].timings)
            return [r.transcript for r in replies]

        facts = {"batch": rows, "side": side or load.side, "points": load.points, "text": load.text, **facts}
        row = self.s.row(part, work, facts=facts, check=lambda found: whole(found, load.text))
        if row is not None:
            row["phases"] = {k: round(v, 4) for k, v in last.items()}
            self.s.write()

    def answer(self) -> None:
        """Prompt, thought, restoration, text: one call of `answer`, the picture's own preparation included."""
        self._answer("answer")
        self._answer("answer", self.load.large)

    def _group(self, part: str, size: int, **facts: Any) -> None:
        load = self.load
        image = picture(load.side)

        def work() -> list[Transcript]:
            self.backbone.script(size)
            return self.engine.rollout(
                [image],
                [text(load.question - 2)],
                seeds=list(range(size)),
                text=self.texts(load.text, 1.0),
                latent=self.stochastic(),
                group=size,
            )

        facts = {"group": size, "points": load.rollout_points, "text": load.text, **facts}
        self.s.row(part, work, facts=facts, repeats=3, check=lambda found: whole(found, load.text))

    def group(self) -> None:
        """The rollouts of a GRPO group."""
        self._group("group", self.load.group)

    def groups(self) -> None:
        """Groups of other sizes."""
        for size in self.load.groups:
            self._group("groups", size)

    def bridge(self) -> None:
        """Reading a restoration through the bridge, or decoded and encoded again."""
        b = self.backbone
        for side in (self.load.side, self.load.sides[-1]):
            context = self.prompt(side)
            found = b.encode_images([b.prepare(picture(side))])
            bridge = None if self.attached is None else self.attached.bridge

            def through(context: Context = context, found: Any = found, bridge: Any = bridge) -> Context:
                return b.read_restoration(context.fork(), found, bridge)

            def again(context: Context = context, found: Any = found) -> Context:
                found[0].image = None
                return b.reencode(context.fork(), found)

            for way, work in (("bridge", through), ("decoded and encoded again", again)):
                self.s.row("bridge", work, facts={"way": way, "side": side}, warmup=2)

    def picture(self) -> None:
        """Restorations of pictures of several sizes."""
        for side in self.load.sides:
            self._restore("picture", side, 1, guided=True)

    def length(self) -> None:
        """Texts of several lengths."""
        for tokens in self.load.lengths:
            self._write("length", 1, tokens)

    def batch(self) -> None:
        """Answers to several questions at once."""
        for rows in self.load.batches:
            if rows <= self.load.large:
                self._answer("batch", rows)

    def _targets(self, part: str, **facts: Any) -> None:
        """What targets are set for."""
        self._three(part, **facts)
        self._write(part, self.load.large, self.load.text, **facts, work="text")
        self._group(part, self.load.group, **facts, work="group")

    def _three(self, part: str, **facts: Any) -> None:
        """A text, a restoration and a whole answer."""
        self._write(part, 1, self.load.text, **facts, work="text")
        self._restore(part, self.load.side, 1, guided=True, **facts, work="restoration")
        self._answer(part, **facts, work="answer")

    def ways(self) -> None:
        """What each of the library's fast ways is worth: text and restoration without it."""
        for way in (None, *fast.WAYS):
            others = [w for w in fast.WAYS if w != way]
            with fast.switched(*fast.WAYS, on=False), fast.switched(*others, on=True):
                facts = {"without": way or "nothing"}
                self._write("ways", 1, self.load.text, **facts, work="text")
                self._write("ways", self.load.large, self.load.text, **facts, work="text")
                self._restore("ways", self.load.side, 1, guided=True, **facts, work="restoration")

    def compiled(self) -> None:
        """Compiled; what the compiler takes is the first row."""
        assert self.attached is not None
        context = self.prompt(self.load.side)
        began = time.perf_counter()
        self.attached.compile()
        try:
            self.backbone.write_text(context.fork(), self.texts(8))
            self.backbone.restore(context.fork(), replace(self.latents(False), steps=2))
            self.s.sync()
            self.s.add({"part": "compiled", "work": "compiling", "seconds": time.perf_counter() - began})
            self._targets("compiled", state="attached")
            with self.attached.folded():
                self._targets("compiled", state="folded")
        finally:
            self.attached.compile(False)
            torch._dynamo.reset()

    def states(self) -> None:
        """The model with an adapter, with LoRA folded in for a while, without, and merged; last, since it changes weights."""
        self._three("states", state="attached")
        assert self.attached is not None
        began = time.perf_counter()
        with self.attached.folded():
            self.s.sync()
            self.s.add({"part": "states", "work": "folding", "seconds": time.perf_counter() - began})
            self._targets("states", state="folded")
        for state in ("bare", "merged"):
            if state == "merged":
                self.use("attached")
            self.use(state)
            self._three("states", state=state)


def exact(texts: Sequence[torch.Tensor], tokens: int) -> None:
    """Raises where a text has not the length that is timed."""
    found = {len(t) for t in texts}
    if found != {tokens}:
        raise AssertionError(f"texts of {sorted(found)} tokens and not of {tokens}")


def whole(transcripts: Sequence[Transcript], tokens: int) -> None:
    """Raises where a transcript is not thought, restoration, text."""
    for transcript in transcripts:
        sampled = [s for s in transcript if isinstance(s, TextSegment) and s.origin is Origin.SAMPLED]
        exact([s.ids for s in sampled], tokens)
        if (len(sampled), len(transcript.restorations)) != (2, 1):
            raise AssertionError(f"{len(sampled)} texts and {len(transcript.restorations)} restorations")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, PARTS)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=None)
    args = parser.parse_args(arguments)
    session = Session("inference", args, PARTS)
    load = TINY if args.size == "tiny" else Load()
    dtype = args.dtype or ("float32" if session.device.type == "cpu" else "bfloat16")
    session.payload |= {"load": asdict(load), "dtype": dtype}
    torch.set_grad_enabled(False)
    try:
        bench = Bench(session, load, getattr(torch, dtype))
    finally:
        torch.set_grad_enabled(True)
    session.payload["parameters"] = parameters(bench.backbone.model)
    # What is held before anything is done.
    session.payload["weights_gb"] = session.peak()
    return session.run(bench)


if __name__ == "__main__":
    sys.exit(main())
