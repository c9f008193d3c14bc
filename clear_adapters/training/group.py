"""The group of processes that train together, one a device."""

from __future__ import annotations

import gc
import os
from datetime import timedelta

import torch


def processes() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def join_group(kind: str, timeout: float) -> None:
    """Begins this process's part in the group that `torchrun` or `accelerate launch` describes; does nothing without one.

    Args:
        kind: type of the device that computes: NCCL for `cuda`, else gloo.
        timeout: seconds that an exchange may take.
    """
    if processes() < 2 or torch.distributed.is_initialized():
        return
    # NVLink multicast can put the GPUs of a host out of service, also for others who share it; NCCL does without.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=timeout)
    )


def leave_group() -> None:
    """Ends this process's part in the group of a finished run; does nothing where there is none.

    The group's own threads outlive it where something still holds it, and one that lets go of a tensor while the interpreter
    ends takes the process down. What `train` leaves behind holds itself in a circle, so that is collected first.
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
