"""Training steps on 1, 2, 4, 8 GPUs of one host: tokens and rollouts a second, memory a GPU, and the share of time spent waiting.

    python benchmarks/speed/scaling.py --output benchmarks/results/speed/scaling_1.json
    torchrun --nproc_per_node 2 benchmarks/speed/scaling.py --output benchmarks/results/speed/scaling_2.json
    torchrun --nproc_per_node 2 benchmarks/speed/scaling.py --size tiny --device cpu --output runs/scaling_2.json   (anywhere)

Model, workload and settings are those of training.py; each number of GPUs has a file of its own. Parts, each of them weak (as
much work a GPU) and strong (as much work in all):

    sft    4 rows a GPU; 16 rows in all. The base is replicated (DDP)
    shard  the same rows weak, with the base in shards over the GPUs (`loop.shard`, FSDP2); not on one GPU
    grpo   a question and its group of 8 rollouts on each GPU; one question, its group spread over the GPUs

`waiting` is of one watched step, before those that are timed: the share of its time in which the GPU has a kernel of NCCL's
running and no other, mean over the GPUs (`waiting_most`: of the one that waits longest). A kernel of NCCL's runs from the moment
in which its own GPU arrives until all have arrived and the data is through, so that both the wait for slower ones and the
transfer are in it, unless something is computed meanwhile. On a CPU it is the time of gloo's operations without any of
PyTorch's beside them. `peak_gb` is that of the GPU that needs most, `peaks_gb` of each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))

from inference import Load
from shapes import build
from stopwatch import Session
from training import Bench, measure

from clear_adapters.training.group import leave_group
from clear_adapters.training.recipe import Recipe

PARTS = ("sft", "shard", "grpo")
ROWS, MOST = 4, 16
"""Supervised rows a GPU where the work grows with the GPUs, and rows in all where it does not."""

Span = tuple[float, float]


def union(spans: Iterable[Span]) -> list[Span]:
    """Spans of time that do not touch, in order, which cover the same."""
    made: list[Span] = []
    for start, end in sorted(spans):
        if made and start <= made[-1][1]:
            made[-1] = (made[-1][0], max(made[-1][1], end))
        else:
            made.append((start, end))
    return made


def length(spans: Iterable[Span]) -> float:
    """Of all spans together."""
    return sum(end - start for start, end in spans)


def alone(spans: Iterable[Span], others: Iterable[Span]) -> float:
    """How long one of `spans` lasts and none of `others`."""
    spans, others = list(spans), list(others)
    return length(union([*spans, *others])) - length(union(others))


def waited(events: Iterable[Any], on_gpu: bool) -> float | None:
    """Seconds of communication without computation in a profile; None where it holds no computation, so that nothing is known."""
    talks: list[Span] = []
    works: list[Span] = []
    for event in events:
        span = (event.time_range.start * 1e-6, event.time_range.end * 1e-6)
        if on_gpu:
            # Annotations also stand on the GPU's line, and span what is not busy.
            if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
                continue
            (talks if event.name.startswith("nccl") else works).append(span)
        elif event.name.startswith("gloo:"):
            talks.append(span)
        elif event.name.startswith("aten::"):
            works.append(span)
    return alone(talks, works) if works else None


class Scaling(Bench):
    """The same work on several GPUs."""

    def __init__(self, session: Session, load: Load, dtype: torch.dtype) -> None:
        super().__init__(session, load, dtype)
        session.payload["processes"] = session.processes
        self._waited: float | None = None
        with session.profiler():  # the first one takes seconds, which would be another process's wait
            torch.ones(1, device=session.device).sum()

    def _is_watched(self, part: str) -> bool:
        return True

    def _profile(self, trainer: Any, part: str, facts: dict[str, Any]) -> None:
        """Watches the second step for what is waited."""
        bench, taken = self, self.s.profiler(device_only=True)
        self._waited = None

        class Watch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 1:
                    taken.__enter__()
                    self.began = time.perf_counter()
                elif state.global_step == 2:
                    seconds = time.perf_counter() - self.began
                    taken.__exit__(None, None, None)
                    found = waited(taken.events(), bench.s.device.type == "cuda")
                    bench._waited = None if found is None else found / seconds

        trainer.add_callback(Watch())

    def _more(self, stage: str, recipe: Recipe, row: dict[str, Any]) -> dict[str, Any]:
        shares = self.s.each(float("nan") if self._waited is None else self._waited)
        peaks = self.s.each(row["peak_gb"] or 0.0)
        more: dict[str, Any] = {"processes": self.s.processes}
        if not any(s != s for s in shares):
            more |= {"waiting": sum(shares) / len(shares), "waiting_most": max(shares)}
        if max(peaks):
            more |= {"peak_gb": max(peaks), "peaks_gb": peaks}
        if stage == "grpo":
            more["rollouts_per_second"] = self.load.group * recipe.loop.batch / row["seconds"]
        return more

    # -- parts

    def _case(self, part: str, stage: str, growth: str, rows: int, **loop: Any) -> None:
        try:
            self._train(part, stage, rows, {"stage": stage, "growth": growth, "micro": rows}, **loop)
        except Exception as error:  # the other cases go on
            self.s.fail(part, {"growth": growth}, error)

    def sft(self) -> None:
        """Supervised steps, the base on each."""
        rows, most = (1, 4) if self.s.args.size == "tiny" else (ROWS, MOST)
        self._case("sft", "sft", "weak", rows)
        self._case("sft", "sft", "strong", min(rows, most // self.s.processes), batch=most)

    def shard(self) -> None:
        """Supervised steps, the base in shards."""
        if self.s.processes == 1:
            return
        self._case("shard", "sft", "weak", 1 if self.s.args.size == "tiny" else ROWS, shard=True)
        if self.s.parts[-1] == "shard":
            return
        # It is in shards for good.
        args = self.s.args
        self.s.forget()
        self.backbone = build(args.size, self.s.device, self.backbone.dtype, args.quantization)

    def grpo(self) -> None:
        """Steps on groups of rollouts."""
        self._case("grpo", "grpo", "weak", 1)
        if self.s.processes > 1:  # on one GPU they are the same
            self._case("grpo", "grpo", "strong", 1, batch=1)


def main(arguments: Sequence[str] | None = None) -> int:
    status = measure("scaling", __doc__, PARTS, Scaling, arguments)
    leave_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
