"""Timing on a GPU or a CPU: a session of measurements whose file is written anew after each of them.

A measurement that fails, for want of memory or otherwise, is recorded as failed, and the next one begins. Of several
processes (torchrun) the first one writes, and a failure ends all of them: the others would wait for the one that failed.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clear_adapters.results import ResultFile
from clear_adapters.training.group import join_group, processes, rank

_PATIENCE = 120.0
"""Seconds that processes wait for each other: a shape that is new to one of them is compiled or captured meanwhile."""


def add_options(parser: argparse.ArgumentParser, parts: tuple[str, ...]) -> None:
    """Options that all of these commands have."""
    parser.add_argument("--size", choices=("7b", "small", "tiny"), default="7b")
    parser.add_argument("--output", type=Path, required=True, help="result file")
    parser.add_argument(
        "--only", help=f"comma-separated parts of {', '.join(parts)}; all by default", default=",".join(parts)
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="the whole command; then it stops")
    parser.add_argument("--repeats", type=int, default=5, help="of a measurement, after warm-up")
    parser.add_argument("--each", type=float, default=20.0, help="seconds of repeats for one measurement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quantization", choices=("int8", "nf4"), help="of the base; needs bitsandbytes")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="tables of kernels beside the result, one for each kind of work",
    )


class Session:
    """The measurements of one command.

    Attributes:
        device: where the work of this process is.
        processes: that measure together.
        payload: what is written.
    """

    def __init__(self, kind: str, args: argparse.Namespace, parts: tuple[str, ...]) -> None:
        self.kind, self.args = kind, args
        self.device = torch.device(args.device)
        self.processes, self._rank = processes(), rank()
        if self.processes > 1:
            join_group(self.device.type, timeout=_PATIENCE, patience=_PATIENCE)
            if self.device.type == "cuda":
                self.device = torch.device("cuda", torch.cuda.current_device())
        self.parts = [p for p in args.only.split(",") if p]
        unknown = [p for p in self.parts if p not in parts]
        if unknown:
            raise SystemExit(f"no part {unknown[0]!r}: {', '.join(parts)}")
        self._end = time.perf_counter() + args.seconds
        self._seen: set[str] = set()
        self.payload: dict[str, Any] = {
            "size": args.size,
            "quantization": args.quantization,
            "rows": [],
            "failed": [],
        }

    @property
    def device_name(self) -> str:
        """In words."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    @property
    def left(self) -> float:
        """Seconds until the command has to end."""
        return self._end - time.perf_counter()

    def each(self, value: float) -> list[float]:
        """This number of every process, by rank; all of them have to ask."""
        own = torch.tensor([value], dtype=torch.float64, device=self.device)
        if self.processes == 1:
            return [value]
        found = [torch.empty_like(own) for _ in range(self.processes)]
        torch.distributed.all_gather(found, own)
        return [float(f) for f in found]

    def is_over(self, need: float = 0.0) -> bool:
        """Whether less than so many seconds are left to any of the processes; all of them have to ask, and all are told so."""
        return any(self.each(float(self.left < need)))

    def sync(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def write(self) -> None:
        """Writes the result file."""
        if self._rank:
            return
        launch = f"torchrun --nproc_per_node {self.processes} " if self.processes > 1 else ""
        result = ResultFile.collect(
            self.kind,
            self.payload,
            device=self.device_name,
            seeds=(0,),
            # Of paths only the last part: they are places on a disk.
            command=f"{launch}{self.kind}.py --size {self.args.size} --only {self.args.only}"
            + (f" --quantization {self.args.quantization}" if self.args.quantization else ""),
            packages=("bitsandbytes", "triton"),
        )
        result.write(self.args.output)

    def forget(self) -> None:
        """Lets go of what the last measurement left on the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak(self) -> float | None:
        """Most gigabytes that were allocated since `reset`."""
        if self.device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)

    def reset(self) -> None:
        """Begins to watch memory anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def row(
        self,
        part: str,
        work: Callable[[], Any],
        *,
        facts: dict[str, Any],
        per: float = 1.0,
        warmup: int = 1,
        repeats: int | None = None,
        check: Callable[[Any], None] | None = None,
    ) -> dict[str, Any] | None:
        """Times some work.

        Args:
            part: the part that it belongs to.
            work: what is timed.
            facts: what tells this row from the others of its part.
            per: what the seconds are divided by, such as tokens.
            warmup: runs before.
            repeats: runs at most; None is the command's.
            check: looks at what the work gave, and raises where it was not what is to be timed.

        Returns:
            The row; None where it failed or where no time is left.
        """
        if self.left < 0:
            self.payload["failed"].append({"part": part, **facts, "error": "no time was left"})
            return None
        try:
            found = self._timed(work, repeats or self.args.repeats, warmup, check)
        except Exception as error:  # any of them: the other measurements go on
            self.fail(part, facts, error)
            return None
        row = {"part": part, **facts, **{k: v / per for k, v in found.items() if k != "runs"}}
        row |= {"runs": found["runs"], "peak_gb": self.peak()}
        self.add(row)
        kind = "-".join(str(x) for x in (part, facts.get("work")) if x)
        # Those of whole answers would show their parts once more.
        if self.args.profile and kind not in self._seen and facts.get("work") not in ("answer", "group"):
            self._seen.add(kind)
            self._profile(kind, facts, work)
        return row

    def add(self, row: dict[str, Any]) -> None:
        """Records a row that was measured elsewhere."""
        self.payload["rows"].append(row)
        shown = "  ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        if not self._rank:
            print(shown, flush=True)
        self.write()

    def fail(self, part: str, facts: dict[str, Any], error: BaseException) -> None:
        """Records a failure, and lets go of what it holds."""
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        where = traceback.extract_tb(error.__traceback__)[-1]
        error.__traceback__ = None
        self.payload["failed"].append(
            {"part": part, **facts, "error": f"{text} ({Path(where.filename).name}:{where.lineno})"}
        )
        print("FAILED", self.payload["failed"][-1], flush=True)
        self.forget()
        self.write()
        if self.processes > 1:
            # Without the interpreter's end, which would wait for exchanges that nobody joins any more.
            sys.stdout.flush()
            os._exit(1)

    def _timed(
        self, work: Callable[[], Any], repeats: int, warmup: int, check: Callable[[Any], None] | None
    ) -> dict[str, Any]:
        self.forget()
        self.reset()
        for _ in range(warmup):
            given = work()
        if warmup and check is not None:
            check(given)
        given = None
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < repeats:
            self.sync()
            start = time.perf_counter()
            given = work()
            self.sync()
            times.append(time.perf_counter() - start)
            given = None
            now = time.perf_counter()
            if now - began > self.args.each or self._end - now < times[-1]:
                break
        return {
            "seconds": statistics.median(times),
            "fastest": min(times),
            "slowest": max(times),
            "runs": len(times),
        }

    def profiler(self, device_only: bool = False) -> Any:
        """A profiler of what the device does; without what the host does beside it, which costs less."""
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.device.type == "cuda"
        kinds = [] if device_only and on_gpu else [ProfilerActivity.CPU]
        if on_gpu:
            kinds.append(ProfilerActivity.CUDA)
        return profile(activities=kinds)

    def keep_profile(self, taken: Any, part: str, facts: dict[str, Any]) -> None:
        """Writes tables of kernels beside the result."""
        keys = ["self_device_time_total"] if self.device.type == "cuda" else []
        averages = taken.key_averages()
        tables = [
            averages.table(sort_by=k, row_limit=45, max_name_column_width=90)
            for k in (*keys, "self_cpu_time_total")
        ]
        path = self.args.output.with_name(f"{self.args.output.stem}-{part}-profile.txt")
        path.write_text(f"{part} {facts}\n" + "\n".join(tables), encoding="utf-8")

    def _profile(self, part: str, facts: dict[str, Any], work: Callable[[], Any]) -> None:
        try:
            with self.profiler() as taken:
                work()
                self.sync()
            self.keep_profile(taken, part, facts)
        except Exception as error:  # a profile is no result
            print("no profile of", part, error, flush=True)

    def run(self, bench: Any) -> int:
        """Runs the parts, each a method of the bench.

        Returns:
            The exit status: 1 where something failed.
        """
        for part in self.parts:
            try:
                getattr(bench, part)()
            except Exception as error:  # the other parts go on
                self.fail(part, {}, error)
        self.write()
        return 1 if self.payload["failed"] else 0
