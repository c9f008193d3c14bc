"""The group of processes that train together, one a device."""

from __future__ import annotations

import gc
import os
from datetime import timedelta

import torch
from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from clear_adapters.errors import ClearError, ClearValueError


class LostProcessError(ClearError, RuntimeError):
    """Another process of the run has ended or cannot be reached."""


def processes() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def join_group(kind: str, timeout: float, patience: float) -> None:
    """Begins this process's part in the group that `torchrun` or `accelerate launch` describes; does nothing without one.

    Args:
        kind: type of the device that computes: NCCL for `cuda`, else gloo.
        timeout: seconds that an exchange may take.
        patience: seconds that the others may take to come.

    Raises:
        ClearValueError: more processes than GPUs, or settings of accelerate that the recipe has of its own.
        LostProcessError: not all of them come.
    """
    _check_accelerate()
    if processes() < 2 or torch.distributed.is_initialized():
        return
    # NVLink multicast can put the GPUs of a host out of service, also for others who share it; NCCL does without.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if kind == "cuda":
        own, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= count:
            raise ClearValueError(
                f"process {rank()} is the {own + 1}. of this host, which has {count} GPUs: one process drives one GPU, so start "
                f"it with --nproc_per_node {count} (torchrun) or --num_processes {count} (accelerate)"
            )
        torch.cuda.set_device(own)
    _meet(kind, timeout, patience)


def _meet(kind: str, timeout: float, patience: float) -> None:
    try:
        store, number, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=patience))))
    except DistError as error:
        reason = str(error).strip().partition("\n")[0]
        raise LostProcessError(
            f"process {rank()} of {processes()} has waited {patience:g} s for the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} ({reason}): one has failed before, was never started, or cannot reach that address"
        ) from error
    # From here on one process waits for what another computes.
    store.set_timeout(timedelta(seconds=timeout))
    torch.distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=PrefixStore("default", store),
        rank=number,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )


_OF_THE_RECIPE = {
    "ACCELERATE_USE_FSDP": ("FSDP", "loop.shard=true spreads the base"),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "loop.shard=true spreads the base"),
    "ACCELERATE_DYNAMO_BACKEND": ("its own compiling", "loop.compile=true compiles the layers"),
}


def _check_accelerate() -> None:
    """Refuses what `accelerate config` may have chosen and the recipe has of its own: both together would be neither."""
    for name, (what, instead) in _OF_THE_RECIPE.items():
        value = os.environ.get(name, "").lower()
        if value not in ("", "no", "false", "0"):
            raise ClearValueError(
                f"accelerate is configured for {what} ({name}={value}), which this library does not train with: {instead}. Start with "
                "a configuration without it, as in `accelerate launch --config_file other.yaml ...`, or with torchrun"
            )


def leave_group() -> None:
    """Ends this process's part in the group of a finished run; does nothing where there is none.

    The group's own threads outlive it where something still holds it, and one that lets go of a tensor while the interpreter
    ends takes the process down. What `train` leaves behind holds itself in a circle, so that is collected first.
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
