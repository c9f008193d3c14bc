"""Work spread over processes, its results in the order of the work."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from clear_adapters.errors import ClearError, ClearValueError

T = TypeVar("T")

WAITING = 2**25
"""Bytes of finished results that may wait for a slower one before them."""


def count_of(workers: int | None) -> int:
    """How many processes are meant; None is one a core.

    Raises:
        ClearValueError: fewer than one.
    """
    if workers is not None and workers < 1:
        raise ClearValueError(f"workers={workers}: at least one process is needed")
    return workers or os.cpu_count() or 1


@contextmanager
def processes(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Spawned processes in which OpenCV takes one thread each; None for a single one, which is this process."""
    if workers == 1:
        yield None
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin) as pool:
        yield pool


def _begin() -> None:
    import cv2

    cv2.setNumThreads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A process that was killed cannot end its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def in_order(
    work: Callable[[Any], T],
    jobs: Sequence[Any],
    pool: ProcessPoolExecutor | None,
    workers: int,
    size: Callable[[T], int] = lambda result: 0,
) -> Iterator[T]:
    """Results in order, with only as many of them and of their bytes under way as keep the processes busy.

    Args:
        work: a function of one job; it must be importable by another process.
        jobs: what is to be done.
        pool: from `processes`.
        workers: how many processes it has.
        size: bytes of a result.

    Raises:
        ClearError: a process was ended from outside.
    """
    if pool is None:
        yield from map(work, jobs)
        return
    left = iter(jobs)
    ahead: deque[Future[T]] = deque()
    try:
        while True:
            running = [f for f in ahead if not f.done()]
            waiting = sum(size(f.result()) for f in ahead if f.done() and f.exception() is None)
            may_start = len(running) <= workers and len(ahead) < 16 * workers and waiting < WAITING
            if may_start and (job := next(left, None)) is not None:
                ahead.append(pool.submit(work, job))
            elif not ahead:
                return
            elif ahead[0].done():
                yield ahead.popleft().result()
            else:
                wait(running, return_when=FIRST_COMPLETED)
    except BrokenProcessPool as error:
        raise ClearError(
            f"one of {workers} processes that make pictures was ended from outside, most likely because memory ran "
            "out: take fewer --workers; the same command goes on where the build was"
        ) from error
    finally:
        for future in ahead:
            future.cancel()
