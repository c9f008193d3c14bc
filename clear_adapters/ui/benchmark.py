"""The second tab: the official tables and figure, and a small run of the built-in set."""

from __future__ import annotations

import base64
import logging
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from clear_adapters.errors import ClearError
from clear_adapters.mmd_bench.tables import overview
from clear_adapters.ui import render
from clear_adapters.ui.inputs import read_whole
from clear_adapters.ui.models import ModelPool, Stopped
from clear_adapters.ui.samples import PAGE_DATA

if TYPE_CHECKING:
    from clear_adapters.attached import AttachedModel
    from clear_adapters.ui.models import Names

QUESTIONS = 24
"""Of a small run, at most."""
BATCH = 4
"""Rows at a time: after each, somebody who asks a question goes first."""

_log = logging.getLogger(__name__)


class SmallRun:
    """A small run on its way, in a thread of its own.

    Args:
        pool: where the model is.
        names: which.
        count: questions of each set.
    """

    def __init__(self, pool: ModelPool, names: Names, count: int) -> None:
        self._pool, self._names, self._count = pool, names, count
        self._events: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self.stop = threading.Event()

    def follow(self) -> Iterator[tuple[str, Any]]:
        """What happens: `("progress", (what, done, total))`, and last `("done", table)`, `("failed", message)` or `("stopped", "")`.

        Closing the iterator, or setting `stop`, ends the run after its present batch.
        """
        threading.Thread(target=self._work, name="clear-demo-run", daemon=True).start()
        try:
            while (event := self._events.get()) is not None:
                yield event
        finally:
            self.stop.set()

    def _work(self) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
                table = self._run(
                    Path(folder), lambda: stack.enter_context(self._pool.use(self._names, self.stop))
                )
            self._events.put(("done", table))
        except Stopped:
            self._events.put(("stopped", ""))
        except (ClearError, OSError) as error:
            self._events.put(("failed", self._pool.explain(error)))
        except Exception:
            _log.exception("a small run failed")
            self._events.put(("failed", "Something failed in the run; the server's log says what."))
        finally:
            self._events.put(None)

    def _run(self, folder: Path, load: Callable[[], AttachedModel]) -> str:
        from clear_adapters.mmd_bench.command import run_command

        result = run_command(
            folder,
            model=self._names.model,
            adapter=self._names.adapter,
            data=["builtin:miniature"],
            tasks=["miniature"],
            severities=["clean", "high"],
            protocols=["mixed"],
            systems=["base", "clear"],
            limit=self._count,
            batch_size=BATCH,
            seed=0,
            max_new_tokens=None,
            steps=None,
            skip_bad=False,
            skip_missing=False,
            judge=None,
            device=self._pool.device,
            dtype=None,
            revision=None,
            report=_log.info,
            watch=self._watch,
            load=load,
            progress=False,
        )
        return overview(result)

    def _watch(self, what: str, done: int, total: int) -> None:
        if self.stop.is_set():
            raise Stopped
        self._events.put(("progress", (what, done, total)))
        self._pool.give_way()


class Benchmark:
    """The tab and what its controls do; to be made inside a `gr.Blocks`.

    Args:
        pool: the models.
        model: the first tab's choice of a model.
        adapter: its choice of an adapter.
    """

    def __init__(self, pool: ModelPool, model: Any, adapter: Any) -> None:
        self.pool = pool
        self._running: dict[str, threading.Event] = {}
        gr.HTML(_figure(), elem_id="figure")
        with gr.Accordion("The tables", open=False, elem_id="tables"):
            gr.Markdown((PAGE_DATA / "results.md").read_text(encoding="utf-8"), elem_classes="tables")
        gr.Markdown(_ABOUT_RUN)
        with gr.Row(elem_id="run-controls"):
            self.count = gr.Slider(
                6, QUESTIONS, 6, step=6, label="Questions of each set", elem_id="run-count", scale=3
            )
            self.go = gr.Button("Run", variant="primary", elem_id="run", scale=1, min_width=90)
            self.end = gr.Button("Cancel", elem_id="run-cancel", scale=1, min_width=90)
        self.status = gr.HTML("", elem_id="run-status")
        self.table = gr.Markdown("", elem_id="run-table", elem_classes="tables")
        going = self.go.click(
            self.run,
            [self.count, model, adapter],
            [self.status, self.table],
            preprocess=False,  # what is sent is checked by `inputs`
            concurrency_limit=1,
            concurrency_id="run",
            show_progress="minimal",
            show_progress_on=self.status,
            api_name="run",
        )
        self.end.click(
            self.cancel,
            None,
            self.status,
            queue=False,
            cancels=[going],
            show_progress="hidden",
            api_visibility="private",
        )

    def run(self, count: Any, model: Any, adapter: Any, request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Runs base and CLEAR on the first questions of the built-in set, clean and at high severity."""
        try:
            count = read_whole(count, "number of questions", 1, QUESTIONS)
            names = self.pool.names(model, adapter)
        except ClearError as error:
            yield {self.status: render.problem(str(error)), self.table: ""}
            return
        running = SmallRun(self.pool, names, count)
        session = str(request.session_hash)
        self._running[session] = running.stop
        yield {
            self.status: render.bar(0, 4 * count, "Drawing the set, loading the model"),
            self.table: "",
        }
        try:
            for kind, event in running.follow():
                if kind == "progress":
                    what, done, total = event
                    yield {self.status: render.bar(done, total, what)}
                elif kind == "done":
                    yield {self.status: _said(f"Done: {count} questions of each set."), self.table: event}
                else:
                    yield {
                        self.status: render.problem(event) if event else _said("Cancelled."),
                        self.table: "",
                    }
        finally:
            running.stop.set()
            if self._running.get(session) is running.stop:
                del self._running[session]

    def cancel(self, request: gr.Request) -> str:
        """Ends this visitor's run after its present batch."""
        running = self._running.pop(str(request.session_hash), None)
        if running is not None:
            running.set()
        return _said("Cancelled.")


_ABOUT_RUN = (
    "### A small run of your own\n\nThe first questions of the built-in set, clean and at high severity, asked of the model and "
    "adapter that are chosen under *Advanced*. So few questions show that it works, and measure nothing."
)


def _said(text: str) -> str:
    return f'<p class="status" role="status">{render.escape(text)}</p>'


def _figure() -> str:
    content = base64.b64encode((PAGE_DATA / "results.png").read_bytes()).decode("ascii")
    return (
        "<h2>What the adapter is worth</h2><p>Held-out questions, each picture clean and degraded at three severities, put to the "
        "model as it is, to plain fine-tuning on degraded pictures, and to CLEAR after each of its stages. The built-in model "
        "shows the mechanism; its numbers say nothing about large models.</p>"
        f'<figure class="official"><img src="data:image/png;base64,{content}" '
        'alt="Two charts: right answers by severity, and how often the picture is restored. The tables below hold the numbers."></figure>'
    )
