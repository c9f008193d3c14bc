"""Seconds, tokens a second, memory and use of the card of training steps with LoRA on both groups.

    python benchmarks/speed/training.py --output benchmarks/results/speed/training.json --profile
    python benchmarks/speed/training.py --only grpo --output runs/some.json --seconds 300
    python benchmarks/speed/training.py --size tiny --device cpu --output runs/tiny.json          (half a minute, anywhere)

The model and the workload are those of inference.py: a degraded picture of 512 x 512 pixels, a system prompt of 520 tokens, a
thought of 64 tokens, the restoration (one noised copy and the latent that is read), 64 tokens more. Steps go through the
package's trainer with the `release` recipe's settings: bfloat16, activation checkpointing, AdamW on float32 LoRA.

`share` is what the step's matrix products and attention would take at the rate of a large matrix product on the same card,
over what the step took: with the forward that checkpointing repeats (`share_run`), and without it (`share`). A frozen weight
has no gradient of its own, so a step is two forwards' worth of products, three with checkpointing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))

from inference import TINY, Load
from shapes import Turns, build, parameters, picture, text
from stopwatch import Session, add_options

from clear_adapters.backbones.packed import PackedBatch
from clear_adapters.config import LoraSettings
from clear_adapters.datasets.example import Example
from clear_adapters.sampling import LatentSampling, TextSampling
from clear_adapters.training.build import attach_for, trainer_for
from clear_adapters.training.grpo import GrpoSettings
from clear_adapters.training.recipe import LoopSettings, Recipe
from clear_adapters.training.sft import SftSettings
from clear_adapters.transcript import RESTORE

PARTS = ("rate", "sft", "grpo", "grid")
RANK = 16


def forward_products(backbone: Turns, batch: PackedBatch, rank: int) -> float:
    """Floating-point operations in the matrix products and the attention of one uncached forward.

    Attention is counted over the pairs of tokens that see each other, whatever more a kernel with a mask computes.
    """
    config = backbone.config
    width, layers = config.width, backbone.layers
    heads = int(config.llm["num_attention_heads"])
    kv = int(config.llm["num_key_value_heads"]) * config.head_dim
    mlp = int(config.llm["intermediate_size"])
    shapes = [(width, width), (width, kv), (width, kv), (width, width)]
    shapes += [(width, mlp), (width, mlp), (mlp, width)]
    a_token = sum(i * o + rank * (i + o) for i, o in shapes)
    tokens = len(batch.und_index) + len(batch.gen_index)
    total = 2.0 * layers * a_token * tokens
    total += 4.0 * layers * pairs(batch) * heads * config.head_dim
    total += 2.0 * len(batch.text_at) * width * int(config.llm["vocab_size"])
    if batch.patches is not None:
        images, patches, numbers = batch.patches.shape
        seen, inner = int(config.vit["hidden_size"]), int(config.vit["intermediate_size"])
        a_patch = config.vit_layers * (4 * seen**2 + 2 * seen * inner) + numbers * seen
        a_patch += seen * width + width**2
        total += 2.0 * images * patches * a_patch
        total += 4.0 * config.vit_layers * images * patches**2 * seen
    return total


def pairs(batch: PackedBatch) -> int:
    """Pairs of a token and one that it sees, padding left out."""
    total = 0
    for spans in batch.spans or ():
        for span in spans:
            n = span.tokens
            total += n * sum(spans[i].tokens for i in span.seen)
            total += n * n if span.full else n * (n + 1) // 2
    return total


class Clock(TrainerCallback):
    """When steps ended, and what memory they took after the first."""

    def __init__(self, session: Session) -> None:
        self._s = session
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes the time."""
        self._s.sync()
        self.ends.append(time.perf_counter())
        if len(self.ends) == 1:
            self._s.reset()
        elif self._s.is_over(self.ends[-1] - self.ends[-2]):
            control.should_training_stop = True


class Bench:
    """A model and the workload."""

    def __init__(self, session: Session, load: Load, dtype: torch.dtype) -> None:
        self.s, self.load = session, load
        self.backbone = build(session.args.size, session.device, dtype, session.args.quantization)
        self.peak: float | None = None
        self._profiled: set[str] = set()

    def examples(self) -> list[Example]:
        """Questions whose recorded reply restores; thought and answer are of the workload's length."""
        load, made = self.load, []
        for i in range(16):
            # The tag stands at the end of the first text; both are closed by a mark that is scored.
            first = text(max(1, load.text - len(RESTORE) - 2)) + "\n" + RESTORE
            made.append(
                Example(
                    id=str(i),
                    image=picture(load.side, i),
                    clean_image=picture(load.side, 100 + i),
                    question=text(load.question - 2),
                    answer="seven",
                    reply=first + text(load.text - 1),
                )
            )
        return made

    def rate(self) -> None:
        """What the card does in a large matrix product, in operations a second."""
        side = 8192 if self.s.device.type == "cuda" else 256
        dtype = self.backbone.dtype
        a, b = (torch.randn(side, side, device=self.s.device, dtype=dtype) for _ in range(2))
        row = self.s.row(
            "rate", lambda: [a @ b for _ in range(10)], facts={"side": side}, per=10, warmup=3, repeats=20
        )
        if row is not None:
            self.peak = 2 * side**3 / row["seconds"]
            row["tflops"] = self.peak / 1e12
            self.s.write()

    def _recipe(self, stage: str, rows: int, steps: int, **loop: Any) -> Recipe:
        load = self.load
        given = {"batch": rows * self.s.processes, "micro_batch": rows, "checkpointing": True, **loop}
        return Recipe(
            stage=stage,
            protocol=str(self._prompt),
            lora=LoraSettings({"understanding": RANK, "generation": RANK}),
            loop=LoopSettings(
                steps=steps,
                save_every=0,
                log_every=10**6,
                workers=0,
                **given,
            ),
            sft=SftSettings(vit_drop=0.0, noised_copies=1),
            grpo=GrpoSettings(
                group=load.group,
                flow_steps=load.rollout_points,
                rewards={"accuracy": 0.75, "format": 0.25},
            ),
            text=TextSampling(max_new_tokens=load.text),
            latent=LatentSampling(steps=load.points),
        )

    def _train(self, part: str, stage: str, rows: int, facts: dict[str, Any], **loop: Any) -> None:
        if self.s.is_over():
            self.s.payload["failed"].append({"part": part, **facts, "error": "no time was left"})
            return
        seen: dict[str, Any] = {"prepare": [], "loss": 0.0}
        self.s.forget()
        with tempfile.TemporaryDirectory() as folder:
            self._prompt = Path(folder) / "prompt.txt"
            self._prompt.write_text(text(self.load.system - 2).strip() + ".", encoding="utf-8")
            watched = self._is_watched(part)
            # Steps that are not timed: the first, and those that the profile slows.
            apart = 3 if watched else 1
            recipe = self._recipe(stage, rows, self.s.args.repeats + apart, **loop)
            # A model that is passed loaded is not put in shards by `attach_for`: this one is made anew afterwards.
            whole = replace(recipe, loop=replace(recipe.loop, shard=False))
            attached = attach_for(whole, self.backbone, device=None)
            try:
                trainer = trainer_for(attached, recipe, self.examples(), Path(folder) / "run", progress=False)
                self._watch(trainer.objective, seen)
                clock = Clock(self.s)
                trainer.add_callback(clock)
                self.backbone.script(self.load.group * recipe.loop.batch // self.s.processes)
                if watched:
                    self._profile(trainer, part, facts)
                trainer.train()
            finally:
                self.backbone.scripted = False
                attached.detach()
        ends = clock.ends[apart - 1 :]
        times = sorted(b - a for a, b in pairwise(ends))
        if not times:
            raise RuntimeError("one step alone, and no time was left for another")
        middle = times[len(times) // 2]
        batch: PackedBatch = seen["batch"]
        tokens = (len(batch.und_index) + len(batch.gen_index)) * trainer.args.gradient_accumulation_steps
        products = forward_products(self.backbone, batch, RANK) * trainer.args.gradient_accumulation_steps
        row: dict[str, Any] = {
            "part": part,
            "rows": len(batch.ids),
            "row_tokens": batch.ids.shape[1],
            "checkpointing": True,
            "compile": False,
            **facts,
            **loop,
            "seconds": middle,
            "fastest": times[0],
            "slowest": times[-1],
            "runs": len(times),
            "first": clock.ends[0] - seen["began"],
            "tokens_per_second": sum(self.s.each(tokens)) / middle,
            "products": products,
            "peak_gb": self.s.peak(),
        }
        if seen["prepare"]:
            prepared = sorted(seen["prepare"][1:] or seen["prepare"])
            row["prepare"] = prepared[len(prepared) // 2]
        if self.peak and stage == "sft":
            row["share"] = 2 * products / self.peak / middle
            row["share_run"] = (3 if row["checkpointing"] else 2) * products / self.peak / middle
        self.s.add(row | self._more(stage, recipe, row))

    def _is_watched(self, part: str) -> bool:
        """Whether a profile is taken: once for each part, where the command asks for it."""
        watched = self.s.args.profile and part not in self._profiled
        self._profiled.add(part)
        return bool(watched)

    def _more(self, stage: str, recipe: Recipe, row: dict[str, Any]) -> dict[str, Any]:
        """What else a row says."""
        return {}

    def _watch(self, objective: Any, seen: dict[str, Any]) -> None:
        """Keeps the last batch, and what preparing took."""
        loss, prepare = objective.loss, objective.prepare
        seen["began"] = time.perf_counter()

        def watched(module: Any, batch: dict[str, Any], counts: Any) -> Any:
            seen["batch"] = batch["batch"]
            return loss(module, batch, counts)

        def timed(batches: list[Any]) -> list[Any]:
            self.s.sync()
            began = time.perf_counter()
            made = prepare(batches)
            self.s.sync()
            seen["prepare"].append(time.perf_counter() - began)
            return list(made)

        objective.loss, objective.prepare = watched, timed

    def _profile(self, trainer: Any, part: str, facts: dict[str, Any]) -> None:
        """Watches the second step."""
        session, taken = self.s, self.s.profiler()

        class Watch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 1:
                    taken.__enter__()
                elif state.global_step == 2:
                    taken.__exit__(None, None, None)
                    session.keep_profile(taken, part, facts)

        trainer.add_callback(Watch())

    # -- parts

    def sft(self) -> None:
        """A supervised step with as many rows as are fast."""
        self._each("sft", "sft", [{"micro": 1}, {"micro": 4}])

    def grpo(self) -> None:
        """A step on one question's group: rollouts, rewards, reference, loss."""
        self._each("grpo", "grpo", [{"micro": 1}])

    def grid(self) -> None:
        """Supervised steps with more rows, without checkpointing, and compiled."""
        cases: list[dict[str, Any]] = [{"micro": 2}, {"micro": 8}, {"micro": 1, "checkpointing": False}]
        cases += [{"micro": 4, "compile": True}]
        self._each("grid", "sft", cases)

    def _each(self, part: str, stage: str, cases: Sequence[dict[str, Any]]) -> None:
        for case in cases:
            loop = {k: v for k, v in case.items() if k != "micro"}
            if self.s.args.size == "tiny":
                loop.pop("compile", None)
            facts = {"stage": stage, "micro": case["micro"], "group": self.load.group} | loop
            if stage == "sft":
                facts.pop("group")
            try:
                self._train(part, stage, case["micro"], facts, **loop)
            except Exception as error:  # the other cases go on
                self.s.fail(part, facts, error)


def measure(
    kind: str, words: str | None, parts: tuple[str, ...], bench: type[Bench], arguments: Sequence[str] | None
) -> int:
    """A command: reads its options, makes the model, and runs the parts.

    Args:
        kind: of the result file.
        words: what `--help` says.
        parts: that the bench has.
        bench: the class.
        arguments: of the command line; None is this process's own.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, parts)
    args = parser.parse_args(arguments)
    session = Session(kind, args, parts)
    load = TINY if args.size == "tiny" else Load()
    dtype = torch.float32 if session.device.type == "cpu" else torch.bfloat16
    session.payload |= {"load": asdict(load), "dtype": str(dtype).removeprefix("torch."), "rank": RANK}
    made = bench(session, load, dtype)
    session.payload["parameters"] = parameters(made.backbone.model)
    # What is held before anything is done.
    session.payload["weights_gb"] = session.peak()
    if "rate" not in session.parts:
        made.rate()
    return session.run(made)


def main(arguments: Sequence[str] | None = None) -> int:
    return measure("training", __doc__, PARTS, Bench, arguments)


if __name__ == "__main__":
    sys.exit(main())
