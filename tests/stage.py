"""One stage of the toy in a process of its own: python stage.py STAGE DATA OUTPUT ADAPTER [key=value ...].

Questions with an odd sum of letters restore in stage 3, the others as they like; the untrained toy would hardly ever ask.
With NO_ROOM_AFTER=k no file can grow beyond ROOM bytes from the k-th optimizer step on, as on a full disk. With BUSY=s process 1
computes for s seconds before its second step, with STUCK=1 it stands still there, and with NO_STATE=1 where it would write its part
of a checkpoint. With PIDS=folder each process leaves its
number there, by rank.
"""

import gc
import os
import resource
import sys
import threading
import time
import weakref
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer

from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.backbones.graphs import can_capture
from clear_adapters.engine import Engine
from clear_adapters.errors import ClearError
from clear_adapters.rewards import register_reward
from clear_adapters.training import build as training_build
from clear_adapters.training.group import leave_group
from clear_adapters.training.run import train
from clear_adapters.training.trainer import ClearTrainer


def variety(prompts, completions, **columns):
    """A reward in which replies of an untrained toy differ."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def some_restore() -> None:
    """Half of the questions restore."""
    rollout = Engine.rollout

    def forced(self, images, questions, *, group=1, **more):
        # Told also inside `gathered`, where shards look like any tensor.
        assert can_capture(self.backbone.model, torch.device("cuda")) != ("shard=True" in sys.argv)
        always = rollout(self, images, questions, group=group, restore="always", **more)
        auto = rollout(self, images, questions, group=group, **more)
        wanted = [sum(map(ord, q)) % 2 for q in questions for _ in range(group)]
        return [a if w else b for a, b, w in zip(always, auto, wanted, strict=True)]

    Engine.rollout = forced


def run_out_of_room(steps: int) -> None:
    """Lets no file grow after so many optimizer steps."""
    real = ClearTrainer.compute_loss

    def full(self, *args, **kwargs):
        if self.state.global_step == steps:
            room = int(os.environ.get("ROOM", "20000"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        return real(self, *args, **kwargs)

    ClearTrainer.compute_loss = full


def be_late(seconds: float | None) -> None:
    """Lets a process compute for so long before its second step, or stand still for good."""
    real = ClearTrainer.compute_loss

    def late(self, *args, **kwargs):
        if self.state.global_step == 1:
            if seconds is None:
                threading.Event().wait()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                torch.randn(50, 50) @ torch.randn(50, 50)
        return real(self, *args, **kwargs)

    ClearTrainer.compute_loss = late


def check_shards(wanted: bool) -> None:
    """Fails where the base is not in shards and should be, or is and should not; with shards nothing else may hold its weights."""
    real, shard, loss = ClearTrainer.train, training_build.shard_layers, ClearTrainer.compute_loss
    whole: list[weakref.ref[torch.Tensor]] = []

    def layers(attached):
        named = attached.module.named_parameters()
        return [p for n, p in named if "language_model.model.layers." in n and ".lora_" not in n]

    def sharded(attached, some):
        whole.extend(map(weakref.ref, layers(attached)))
        return shard(attached, some)

    def checked(self, *args, **kwargs):
        assert layers(self.attached)
        assert all(isinstance(p, DTensor) == wanted for p in layers(self.attached))
        assert not any(isinstance(p, DTensor) for _, p in self.attached.named_parameters())
        # Compiled answers would read gathered layers, which look like any others.
        backbone = self.attached.backbone
        backbone.set_compiled(True, "eager")
        assert (backbone.model.language_model.model.experts(both=True) is None) == wanted
        backbone.set_compiled(False)
        gc.collect()
        assert bool(whole) == wanted
        assert not any(kept() is not None for kept in whole)
        return real(self, *args, **kwargs)

    def compute(self, *args, **kwargs):
        found = loss(self, *args, **kwargs)
        # What a layer gathered for its forward is given back when the next one computes.
        assert all(isinstance(p, DTensor) == wanted for p in layers(self.attached))
        return found

    ClearTrainer.train, training_build.shard_layers, ClearTrainer.compute_loss = checked, sharded, compute


def main() -> int:
    """Trains."""
    stage, data, output, adapter, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    if "PIDS" in os.environ:
        Path(os.environ["PIDS"], os.environ["RANK"]).write_text(str(os.getpid()))
    register_reward("variety", variety)
    some_restore()
    check_shards("shard=True" in overrides)
    if "NO_ROOM_AFTER" in os.environ:
        run_out_of_room(int(os.environ["NO_ROOM_AFTER"]))
    if os.environ.get("RANK") == "1" and "NO_STATE" in os.environ:
        Trainer._save_rng_state = lambda self, folder: threading.Event().wait()
    if os.environ.get("RANK") == "1" and {"BUSY", "STUCK"} & os.environ.keys():
        be_late(float(os.environ["BUSY"]) if "BUSY" in os.environ else None)
    try:
        train(
            "tiny",
            data,
            output,
            stage=stage,
            model=os.environ.get("MODEL") or build(0),
            adapter=None if adapter == "-" else adapter,
            device="cpu",
            overrides=overrides,
            progress=False,
        )
    except ClearError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    leave_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
