"""Whether several processes take the step that one takes, and continue what one has begun.

    python benchmarks/speed/equality.py --processes 2 4 --output benchmarks/results/speed/equality.json
    python benchmarks/speed/equality.py --processes 4 8 --device cpu --output benchmarks/results/speed/equality_cpu.json
    python benchmarks/speed/equality.py --processes 2 --device cpu --stages sft --output runs/equality.json     (anywhere)

Each stage of the built-in model is trained for four steps by one process, and by N processes that torchrun starts: with the
base replicated (`ddp`), with the base in shards (`shard`), and from a checkpoint that one process left after two steps
(`resumed`); `accelerate` is `ddp` under `accelerate launch` instead. `spread` is a step of stage 3 of one question, whose
rollouts the N processes share. AdamW's eps is 1, so that a step is nearly its gradient: with a small one it would be the
gradient's sign, which hides what differs.

`loss` is the largest difference of a logged loss from that of one process, relative to that loss, or in stage 3, where advantages
of size 1 cancel in it, to 1; `step` is the norm of the difference of the adapter's weights, over the norm of the way that
they went. Both are to be within the tolerance: that of bfloat16, whose numbers have 8 bits, is 0.02, and that of float32 0.001.
Stage 3 is computed in float32: in bfloat16 rollouts are rounded otherwise when other rows stand beside them, and rewards that are
normalised within a group make much of it (on two H200 a step differed by 0.05 that way). Supervised steps have no such source.

What rounding alone does is told by `alone`: one process that takes the step in N micro-batches, each as large as that of one of
N processes. `beside` is the step's difference from that one, whose products have the same shapes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clear_adapters.datasets.world import build as build_world
from clear_adapters.results import ResultFile
from clear_adapters.store import StoredAdapter, read_adapter
from clear_adapters.training.build import LOG, attach_for
from clear_adapters.training.recipe import STAGES, load_recipe
from clear_adapters.training.run import MODEL, work_of

TOLERANCE = {"bfloat16": 0.02, "float32": 1e-3}
WAYS = ("alone", "ddp", "shard", "resumed", "accelerate")
CANCEL = {"grpo": 1.0, "spread": 1.0}
"""Stages in whose loss terms cancel, and their size: that of an advantage."""
STEPS = 4
BEFORE = {"sft": None, "bridge": "builtin:clear-bagel-tiny-sft", "grpo": "builtin:clear-bagel-tiny-bridge"}
ROWS = 4
"""Of a step at least, and rollouts of a question that is spread; as many as there are processes where those are more."""
COMMON = (
    *(f"loop.steps={STEPS}", f"save_every={STEPS // 2}", "log_every=1", "workers=0"),
    *("save_dtype=float32", "schedule=constant", "warmup=0", "max_grad_norm=0", "eps=1.0", "optim.lr=0.1"),
)
OWN = {
    "sft": (),
    "bridge": ("bridge_lr=0.1",),
    "grpo": (
        *(f"grpo.group={ROWS}", f"rollout_rows={ROWS}", "text.max_new_tokens=64"),
        "grpo.rewards={latent_quality: {weight: 1, absent: neutral}, format: 0.3}",
    ),
}


def weights(adapter: StoredAdapter) -> dict[str, Tensor]:
    """All of an adapter, by its parameters' names."""
    named = {**adapter.lora, **adapter.extra, **{f"bridge.{n}": t for n, t in adapter.bridge.items()}}
    return {n: t.double().cpu() for n, t in named.items()}


def norm(tensors: dict[str, Tensor]) -> float:
    """Of all of them together."""
    return sum(float(t.pow(2).sum()) for t in tensors.values()) ** 0.5


def losses(output: Path) -> dict[int, float]:
    """The logged loss by step."""
    lines = (work_of(output) / LOG).read_text(encoding="utf-8").splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row}


class Trials:
    """Runs of one stage in one folder."""

    def __init__(self, named: str, data: Path, folder: Path, device: str, dtype: str, most: int) -> None:
        self.stage = "grpo" if named == "spread" else named
        self.data, self.folder, self.device = data, folder, device
        bf16, rows = str(dtype == "bfloat16").lower(), max(ROWS, most)
        self.options = [*COMMON, *OWN[self.stage], f"loop.bf16={bf16}", f"loop.batch={rows}"]
        self.rows = rows
        if named == "spread":
            self.options += ["loop.batch=1", f"grpo.group={rows}", f"rollout_rows={rows}"]

    def run(self, name: str, processes: int, *more: str, accelerate: bool = False) -> Path:
        """Trains; the adapter's folder."""
        output = self.folder / f"{self.stage}-{name}"
        launch = [sys.executable, "-m"]
        if accelerate:
            options = f"--multi_gpu --num_machines 1 --num_processes {processes} --main_process_port 0"
            options += " --mixed_precision no --dynamo_backend no"
            launch += ["accelerate.commands.launch", *options.split(), "-m"]
        elif processes > 1:
            launch += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
        command = [*launch, "clear_adapters.cli", "train", self.stage, "--recipe", "tiny"]
        command += ["--data", str(self.data), "--output", str(output), "--device", self.device]
        before = BEFORE[self.stage]
        command += [] if before is None else ["--adapter", before]
        for option in [*self.options, *more]:
            command += ["--set", option]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-6000:]}")
        return output

    def start(self) -> dict[str, Tensor]:
        """The weights that the stage begins with."""
        recipe = load_recipe("tiny", self.options, self.stage)
        attached = attach_for(recipe, MODEL, BEFORE[self.stage], self.device)
        try:
            return {n: p.detach().double().cpu() for n, p in attached.named_parameters()}
        finally:
            attached.detach()

    def way(self, way: str, count: int, alone: Path | None) -> Path:
        """Trains by so many processes in a way; the adapter's folder.

        Args:
            way: one of `WAYS`.
            count: of processes.
            alone: the run of that way, which `resumed` goes on from.

        Raises:
            RuntimeError: training failed, or there is nothing to go on from.
        """
        name = f"{way}-{count}"
        if way == "alone":
            return self.run(name, 1, f"loop.micro_batch={self.rows // count}")
        if way == "resumed":
            if alone is None:
                raise RuntimeError(
                    "resumed goes on from the run `alone`, which failed or is not among the ways"
                )
            # What a run that was killed after half of its steps has left.
            work = work_of(self.folder / f"{self.stage}-{name}")
            shutil.copytree(work_of(alone), work)
            shutil.rmtree(work / f"checkpoint-{STEPS}")
        more = ["loop.shard=true"] if way == "shard" else []
        return self.run(name, count, *more, accelerate=way == "accelerate")


def furthest(one: Sequence[float], other: Sequence[float], stage: str) -> float:
    """The largest difference of logged losses, relative to that of one process or to the size of the terms that cancel in it."""
    size = CANCEL.get(stage, 0.0)
    return max(abs(a - b) / max(abs(a), size) for a, b in zip(one, other, strict=True))


def compare(one: Path, other: Path, start: dict[str, Tensor], stage: str) -> dict[str, Any]:
    """How far apart two runs are."""
    a, b = weights(read_adapter(one)), weights(read_adapter(other))
    moved = norm({n: a[n] - start[n] for n in a})
    curves = losses(one), losses(other)
    if curves[0].keys() != curves[1].keys():
        raise RuntimeError(f"the runs logged other steps: {list(curves[0])} and {list(curves[1])}")
    values = [list(curve.values()) for curve in curves]
    return {
        "loss": furthest(*values, stage),
        "step": norm({n: a[n] - b[n] for n in a}) / moved if moved else float("inf"),
        "moved": moved,
        "curve": values[1],
        "curve_of_one": values[0],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--stages", nargs="+", choices=(*STAGES, "spread"), default=[*STAGES, "spread"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=540.0, help="no run is begun afterwards")
    parser.add_argument("--output", type=Path, required=True, help="result file")
    args = parser.parse_args(arguments)
    end = time.monotonic() + args.seconds
    payload: dict[str, Any] = {"steps": STEPS, "tolerance": TOLERANCE, "rows": [], "failed": []}

    def keep() -> None:
        name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        chosen = {
            "processes": args.processes,
            "stages": args.stages,
            "ways": args.ways,
            "device": [args.device],
        }
        shown = " ".join(["equality.py", *(f"--{k} {' '.join(map(str, v))}" for k, v in chosen.items())])
        ResultFile.collect("equality", payload, device=name, seeds=(0,), command=shown).write(args.output)

    with tempfile.TemporaryDirectory() as folder:
        data = build_world(Path(folder) / "data", 24, workers=1, progress=False)
        for named in args.stages:
            dtype = "float32" if named in CANCEL or args.device == "cpu" else "bfloat16"
            trials = Trials(named, data, Path(folder) / named, args.device, dtype, max(args.processes))
            one = start = None
            for count in args.processes:
                alone: Path | None = None
                for way in [w for w in WAYS if w in args.ways] if named != "spread" else ["ddp"]:
                    facts = {"stage": named, "processes": count, "way": way, "dtype": dtype}
                    if time.monotonic() > end:
                        payload["failed"].append({**facts, "error": "no time was left"})
                        continue
                    try:
                        if one is None or start is None:
                            one, start = trials.run("one", 1), trials.start()
                        own = trials.way(way, count, alone)
                        found = compare(one, own, start, named)
                        if way == "alone":
                            alone = own
                        elif alone is not None:
                            found["beside"] = compare(alone, own, start, named)["step"]
                        found["within"] = max(found["loss"], found["step"]) <= TOLERANCE[dtype]
                        payload["rows"].append({**facts, **found})
                        print({**facts, **{k: found.get(k) for k in ("loss", "step", "beside", "within")}})
                    except RuntimeError as error:  # the other runs go on
                        payload["failed"].append({**facts, "error": str(error).strip().splitlines()[-1]})
                        print("FAILED", facts, error, flush=True)
                    sys.stdout.flush()
                    keep()
        keep()
    return 0 if not payload["failed"] and all(r["within"] for r in payload["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
