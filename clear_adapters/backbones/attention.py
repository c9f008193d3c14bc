"""Which attention kernels a family runs with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

_KERNELS = [b for n, b in SDPBackend.__members__.items() if n not in ("ERROR", "CUDNN_ATTENTION")]


@contextmanager
def any_shape() -> Iterator[None]:
    """Attention without cuDNN's kernels, which torch prefers on recent GPUs; a decorator too.

    They build a plan for every shape that they have not seen, tens of milliseconds each. Here nearly all are new: a
    context grows by one place a token, and batches differ in rows, pictures and lengths.
    """
    with sdpa_kernel(_KERNELS):
        yield


_FASTEST = [SDPBackend.CUDNN_ATTENTION, *_KERNELS]


@contextmanager
def one_shape() -> Iterator[None]:
    """Attention with cuDNN's kernels where there are any, for a shape that comes again and again.

    They build a plan for the shape, which then serves every layer and step of a flow.
    """
    with sdpa_kernel(_FASTEST, set_priority=True):
        yield
