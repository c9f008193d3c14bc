"""What the server holds of a visitor and for how long, and how much it takes of a request.

Gradio keeps what the components of a visit last showed, pictures and all, until many other visits have pushed it out,
and for an hour after the page was closed. Here it is forgotten when the page is closed, and after an hour without use.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gradio as gr
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

UNUSED = 3600
"""Seconds after which a visit that does nothing is forgotten."""
_AFTERGLOW = 10
"""Seconds within which an answer that was on its way when the page was closed may still be noted down by Gradio."""
_EVERY = 20
"""Seconds between two looks for what to forget."""


class Sessions:
    """The visits to a page.

    Args:
        demo: the page.
        end: ends what a visitor has asked.
    """

    def __init__(self, demo: gr.Blocks, end: Callable[[gr.Request], Any]) -> None:
        self._demo = demo
        self._end = end
        self._left: dict[str, float] = {}

    def leave(self, request: gr.Request) -> None:
        """The page was closed: ends what was asked, and forgets the visit."""
        self._end(request)
        self._left[str(request.session_hash)] = time.time()
        self._forget(str(request.session_hash))

    def sweep(self, now: float | None = None) -> None:
        """Forgets visits without use, and what was noted down of those that ended.

        Args:
            now: the time; None is the present.
        """
        now = time.time() if now is None else now
        used = {name: at.timestamp() for name, at in list(self._demo.state_holder.time_last_used.items())}
        for session, at in used.items():
            left = self._left.get(session)
            if now - at > UNUSED or (left is not None and at - left < _AFTERGLOW):
                self._forget(session)
        for session, at in list(self._left.items()):
            if now - at > 2 * _EVERY + _AFTERGLOW:
                del self._left[session]
        self._drop_copies()

    def _drop_copies(self) -> None:
        """Drops what Gradio (6.31) makes of components that an event leaves as they are.

        It replaces each by a copy with another number, notes the copy down under that number as well at the next event, and
        never comes back to it, pictures and all.
        """
        holder = self._demo.state_holder
        with holder.lock:
            visits = list(holder.session_data.values())
        for visit in visits:
            for noted in (visit.blocks_config.blocks, visit.config_values):
                for number in [n for n in list(noted) if n not in self._demo.blocks]:
                    noted.pop(number, None)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Sweeps in a thread of its own once the page is served, for as long as it is; to be put around the launch."""
        failed = threading.Event()

        def run() -> None:
            started = False
            while not failed.wait(_EVERY) and (self._demo.is_running or not started):
                started = started or self._demo.is_running
                if started:
                    self.sweep()
                    give_back()

        threading.Thread(target=run, name="clear-demo-forget", daemon=True).start()
        try:
            yield
        except BaseException:
            failed.set()
            raise

    def _forget(self, session: str) -> None:
        holder = self._demo.state_holder
        with holder.lock:
            holder.session_data.pop(session, None)
            holder.time_last_used.pop(session, None)


def give_back() -> None:
    """Gives memory that was freed back to the system, where the C library (glibc) keeps it.

    Each question has a thread of its own, and what threads free stays in pieces that later ones do not fill.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class RequestLimit:
    """Refuses requests with more than so many bytes: Gradio bounds each file of an upload, but not their number.

    Args:
        app: what is served.
        limit: bytes of a request's body.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > self._limit:
            await PlainTextResponse(_TOO_LARGE, 413)(scope, receive, send)
            return
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self._limit:
                raise MultiPartException(_TOO_LARGE)  # on which Gradio deletes what came before
            return message

        await self._app(scope, counted, send)


_TOO_LARGE = "This upload is larger than the maximum allowed size of the page."
