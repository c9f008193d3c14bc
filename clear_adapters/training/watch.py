"""Ends a run over several processes of which one is lost, or all stand still, instead of letting the others wait for it.

Each process has a thread that looks where the main thread stands, and tells the others through the launcher's store how often
that has changed. A process that waits in an exchange does not move, and need not: what counts is whether any of them does. So
rollouts that take one process long are no hang, whatever the others wait.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # public, but not marked so

from clear_adapters.errors import ClearError
from clear_adapters.training.group import LostProcessError, processes, rank

STATUS = 3
"""Exit status of a process that the watch ends."""

_LOOK = 0.05
"""Seconds between two looks at the main thread: often, because a loop spends most of its time in one line."""

_PATIENCE = 5.0
"""Seconds that the end of a run waits for a thread, which a store or a disk without an answer can hold up."""

_ON_ITS_WAY = 10.0
"""Seconds after an error for which a launcher's signal must not silence it."""

_POLLS = frozenset({"_get_data", "_try_get_data"})
"""Of torch's data loader, which asks its workers again and again: what happens inside is no move."""

_DONE, _FAILED = "done", "failed"
_PACKAGE = str(Path(__file__).parents[1])
_runs = 0


@contextmanager
def watching(timeout: float, advice: Callable[[], str]) -> Iterator[None]:
    """Watches the processes of the group inside a `with`; does nothing for one that is alone.

    Every process has to enter, in the same order where there are several runs one after the other. Where the launcher tells this
    process to end (SIGTERM), that is told in words as well.

    Args:
        timeout: seconds without a sign of a process, or without a move of any of them, after which this process ends.
        advice: what a user can do, told with the reason; called in another thread.

    Raises:
        LostProcessError: an exchange inside has failed because another process is gone.
    """
    if processes() < 2:
        yield
        return
    watch = _Watch(timeout, advice)
    watch.start()
    try:
        yield
    except BaseException as error:
        if not is_broken_exchange(error):
            watch.stop(_FAILED, str(error) if isinstance(error, ClearError) else None)
            raise
        lost = LostProcessError(
            f"process {watch.rank} of {watch.size} cannot reach another one any more, which has ended or lost its "
            f"connection ({_first_line(error)}). {_soon(advice)}"
        )
        watch.stop(_FAILED, str(lost))
        raise lost from error
    watch.stop(_DONE)


def is_broken_exchange(error: BaseException) -> bool:
    """Whether an error says that another process cannot be reached."""
    # gloo tells by a plain RuntimeError from its own source files.
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _soon(advice: Callable[[], str]) -> str:
    """An advice, or that there is none: it looks at files, and the disk can be what has failed."""
    told: list[str] = []

    def ask() -> None:
        with suppress(Exception):
            told.append(advice())

    asking = threading.Thread(target=ask, name="clear-advice", daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return told[0] if told else "Which checkpoint the same command goes on from cannot be read now"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


class _Watch:
    """The thread of one process."""

    def __init__(self, timeout: float, advice: Callable[[], str]) -> None:
        global _runs
        _runs += 1
        self.rank, self.size = rank(), processes()
        self._timeout, self._advice = timeout, advice
        self._every = min(30.0, timeout / 20)
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._keys = [f"clear_adapters/{restart}/{_runs}/{number}" for number in range(self.size)]
        # A connection of its own: another thread's waiting would hold up that of the group.
        self._store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
        self._main = threading.get_ident()
        self._beats, self._moves, self._stack = 0, 0, 0
        self._where = "?"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clear-watch", daemon=True)
        self._told_to_end, self._bell = os.pipe()
        self._before: Any = None

    def start(self) -> None:
        """Begins, in the thread that is watched."""
        self._catch()
        self._tell()
        self._thread.start()

    def stop(self, state: str, words: str | None = None) -> None:
        """Ends the watch, and tells the others how it went; a SIGTERM from then on ends this process with the words, if any."""
        self._ended.set()
        self._release(words)
        self._thread.join(_PATIENCE)
        if not self._thread.is_alive():
            os.close(self._bell)
            os.close(self._told_to_end)
        with suppress(RuntimeError):  # a store that is gone
            self._store.set(self._keys[self.rank], state)

    # -- the launcher's signal

    def _catch(self) -> None:
        """Lets the thread know of SIGTERM: the main one may stand in an exchange, where no handler runs."""
        global _current
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # someone else's to handle
            return
        os.set_blocking(self._bell, False)
        self._before = signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.set_wakeup_fd(self._bell)
        _current = self

    def _release(self, words: str | None) -> None:
        global _current
        if _current is self:
            _current = None
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, self._before if words is None else _saying(words, self._before))

    # -- the thread

    def _run(self) -> None:
        beat = moved = time.monotonic()
        seen = dict.fromkeys(range(self.size), ("0\t0\tnot begun\t?", beat))
        known: set[int] = set()
        while not self._ended.is_set():
            if select.select([self._told_to_end], [], [], _LOOK)[0]:
                signals = os.read(self._told_to_end, 64)
                if signal.SIGTERM in signals and not self._ended.is_set():
                    self._end(
                        f"process {self.rank} of {self.size} was told to end (SIGTERM), as launchers do when another process has "
                        "ended (its own message, or the launcher's, says which) or when the job is stopped",
                        status=128 + signal.SIGTERM,
                    )
            self._look()
            now = time.monotonic()
            if now - beat < self._every:
                continue
            beat = now
            try:
                self._tell()
                values = self._read(known)
            except RuntimeError as error:
                self._end(
                    f"process {self.rank} of {self.size} cannot reach the launcher's store any more ({_first_line(error)}): process "
                    "0, or the launcher, has ended or its machine is unreachable"
                )
                return
            now = time.monotonic()
            for number, value in values.items():
                if seen[number][0] != value:
                    if _moves(seen[number][0]) != _moves(value):
                        moved = now
                    seen[number] = (value, now)
            self._judge(seen, now, moved)

    def _look(self) -> None:
        """Notes whether the main thread is at another place than at the last look."""
        frame = sys._current_frames().get(self._main)
        places: list[tuple[int, int]] = []
        inner = frame
        while frame is not None:
            if frame.f_code.co_name in _POLLS:
                places.clear()
            else:
                places.append((id(frame), frame.f_lasti))
            frame = frame.f_back
        stack = hash(tuple(places))
        if stack != self._stack:
            self._stack = stack
            self._moves += 1
        self._where = _place(inner)

    def _tell(self) -> None:
        """The beat: counts of beats and of moves, then who and where this is."""
        self._beats += 1
        who = f"{socket.gethostname()}, pid {os.getpid()}"
        self._store.set(self._keys[self.rank], f"{self._beats}\t{self._moves}\t{who}\t{self._where}")

    def _read(self, known: set[int]) -> dict[int, str]:
        # The store waits for keys that do not exist yet.
        known |= {r for r, key in enumerate(self._keys) if r not in known and self._store.check([key])}
        ranks = sorted(known)
        values = self._store.multi_get([self._keys[r] for r in ranks])
        return {r: v.decode() for r, v in zip(ranks, values, strict=True)}

    def _judge(self, seen: dict[int, tuple[str, float]], now: float, moved: float) -> None:
        """Ends this process where another one is lost, or where none has moved."""
        running = {r: v for r, (v, _) in seen.items() if v not in (_DONE, _FAILED)}
        lost = [r for r in running if now - seen[r][1] > self._timeout]
        # One that has failed says why itself; its launcher may end this one first.
        failed = [r for r, (v, at) in seen.items() if v == _FAILED and now - at > 2 * self._every]
        if failed:
            self._end(f"process {failed[0]} of {self.size} has failed; its own message says why")
        elif lost:
            names = "; ".join(f"process {r} of {self.size} ({running[r].split(chr(9))[2]})" for r in lost)
            self._end(
                f"no sign of life for {self._timeout:g} s from {names}: killed, stopped, or on a machine that cannot be reached"
            )
        elif now - moved > self._timeout:
            places = "; ".join(f"process {r} in {v.split(chr(9))[3]}" for r, v in running.items())
            self._end(
                f"no process has moved for {self._timeout:g} s, so that they wait for each other: {places}"
            )

    def _end(self, reason: str, status: int = STATUS) -> None:
        if not self._ended.is_set():
            _exit(f"error: the run is ended: {reason}. {_soon(self._advice)}", status)


def _saying(words: str, before: Any) -> Callable[[int, FrameType | None], None]:
    """A handler for an error's way out: a launcher sees another one's end a moment after this process has, and would silence it."""
    until = time.monotonic() + _ON_ITS_WAY

    def handle(number: int, frame: FrameType | None) -> None:
        if time.monotonic() < until:
            _exit(f"error: {words}", 128 + number)
        signal.signal(number, before)
        os.kill(os.getpid(), number)

    return handle


def _exit(message: str, status: int) -> NoReturn:
    """Ends this process with a message; the interpreter's own end would wait for threads that are stuck in an exchange."""
    with suppress(OSError):
        os.write(2, f"{message}\n".encode())
    # Data workers end with the interpreter, which does not come to that.
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)


_current: _Watch | None = None


def _forget() -> None:
    """In a forked child: the signal is its own."""
    global _current
    if _current is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _current = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _moves(value: str) -> str:
    return value.split("\t")[1] if "\t" in value else value


def _place(frame: FrameType | None) -> str:
    """The innermost place in this package, or the innermost of all."""
    at = frame
    while at is not None and not at.f_code.co_filename.startswith(_PACKAGE):
        at = at.f_back
    at = at or frame
    if at is None:
        return "?"
    code = at.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{at.f_lineno})"
