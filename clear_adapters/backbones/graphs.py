"""Work that is captured once as a CUDA graph and then replayed, with one launch for hundreds of kernels."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

_MODE = "thread_local"
"""A data loader's thread may pin memory while something is captured."""

_LOG = logging.getLogger(__name__)
_ONE_AT_A_TIME = threading.RLock()
"""Captures share a stream and memory, and what the compiler may do is a setting of the whole process."""


class _Place:
    """Where work is captured on one GPU: a stream and a memory pool whose workspaces and blocks serve every capture.

    Attributes:
        stream: on which work is captured; a workspace belongs to its stream.
        keeper: a graph that stays, since a pool lives as long as one of its graphs does.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.keeper = torch.cuda.CUDAGraph()
            self._anchor = torch.zeros(1, device=device)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.keeper.capture_begin(capture_error_mode=_MODE)
                self._anchor.fill_(1)
                self.keeper.capture_end()


_capturing = cache(_Place)


def can_capture(model: nn.Module, device: torch.device) -> bool:
    """Whether a model's passes can be replayed as a graph: on a GPU, and not where the host takes part in them.

    It does where hooks gather shards of the base, and with 8-bit weights, whose outliers are looked for in every input. Shards are
    told by their modules: gathered ones are plain tensors.
    """
    if device.type != "cuda" or getattr(model, "is_loaded_in_8bit", False):
        return False
    # Thousands of modules are looked through only where there can be shards.
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not (spread and any(isinstance(m, FSDPModule) for m in model.modules()))


def capture(work: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """Work as a graph; it is not done meanwhile.

    What it reads and writes has to stay in place as long as the graph is replayed, and nothing in it may wait for the device.

    Raises:
        RuntimeError: it cannot be captured, or has to be compiled first.
    """
    graph = torch.cuda.CUDAGraph()
    with _ONE_AT_A_TIME, torch.cuda.device(device):
        place = _capturing(device)
        place.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(place.stream):
            graph.capture_begin(pool=place.keeper.pool(), capture_error_mode=_MODE)
            try:
                with without_compiling():
                    work()
            except BaseException:  # an interrupt too: whatever came afterwards would be captured, or fail
                with suppress(RuntimeError):  # a capture that has ended by the error
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(place.stream)
    return graph


@contextmanager
def without_compiling() -> Iterator[None]:
    """What would have to be compiled inside raises a RuntimeError: a compiler tries kernels, which a capture does not survive.

    It holds for all threads; those that come here too wait.
    """
    # Where nothing has been compiled its import would take seconds.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _ONE_AT_A_TIME, torch.compiler.set_stance("fail_on_recompile"):
        yield


@cache
def tell(what: str, reason: str) -> None:
    """That something is slower than it could be, once a reason."""
    _LOG.warning("%s cannot be captured (%s): it runs without, which is slower", what, reason)


class Repeated:
    """Work that is done again and again over the same tensors: first as it is, then captured, then replayed."""

    def __init__(self, device: torch.device, what: str) -> None:
        """Makes ready.

        Args:
            device: where it is done.
            what: its name in a warning.
        """
        self._device, self._what = device, what
        self._graph: torch.cuda.CUDAGraph | None = None
        self._done = 0

    def __call__(self, work: Callable[[], None]) -> None:
        """Does the work, which is always the same: as for `capture`. It is not kept, since its owner keeps this."""
        if self._done == 1:
            # What is done once would be captured for nothing, and kernels are compiled and loaded by then.
            try:
                self._graph = capture(work, self._device)
            except RuntimeError as error:
                tell(self._what, str(error))
        if self._graph is None:
            work()
        else:
            self._graph.replay()
        self._done += 1
