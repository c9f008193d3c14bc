"""The page as a whole: `build_demo` makes it, `launch` serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from clear_adapters import store
from clear_adapters._version import __version__
from clear_adapters.cli_options import ADAPTER, MODEL
from clear_adapters.errors import ClearValueError
from clear_adapters.ui.asking import SECONDS
from clear_adapters.ui.benchmark import Benchmark
from clear_adapters.ui.models import ModelPool, Names
from clear_adapters.ui.pictures import MAX_UPLOAD
from clear_adapters.ui.playground import Playground
from clear_adapters.ui.sessions import RequestLimit, Sessions

STYLE = Path(__file__).with_name("style.css")
QUEUE = 64
"""Questions that may wait; whoever comes after them is told to come back."""
MAX_REQUEST = MAX_UPLOAD + 2**16
"""Bytes of a request: one upload and what is around it."""
SESSIONS = 200
"""Visitors whose pictures are held in memory at the same time; the one who was away for longest is forgotten first."""


def build_demo(
    model: str | None = None,
    adapter: str | None = None,
    *,
    allow_other_models: bool = False,
    device: str | None = None,
    max_side: int = 512,
    keep_models: int | None = None,
    max_seconds: float = SECONDS,
) -> gr.Blocks:
    """Builds the page; nothing is loaded until somebody asks.

    Args:
        model: that the page begins with: `builtin:NAME`, a folder or a Hub id; None is the adapter's own base.
        adapter: the same; None is that of the built-in model. One that is on the Hub is downloaded now.
        allow_other_models: let visitors type any folder and any Hub id. Off by default: on a public page it would let
            strangers look for folders on the server, fill its disk with downloads and its memory with models.
        device: as `attach` takes it.
        max_side: longest side in pixels that a visitor's picture is scaled down to. Corruptions act at this size, and
            some of them take seconds on a large picture.
        keep_models: attached models that stay in memory; None is two with the built-in model and one with another.
        max_seconds: that a question may take once the model is there; after them it ends with a message.

    Returns:
        The page, to be served by `launch`, which sets the limits that belong to serving.

    Raises:
        ClearValueError: a number out of its range, or a model of one's own without an adapter.
        ClearError: model or adapter are not there.
    """
    if max_side < 32:
        raise ClearValueError(f"max_side={max_side}: pictures of fewer than 32 pixels show nothing")
    if keep_models is not None and keep_models < 1:
        raise ClearValueError(f"keep_models={keep_models}: at least the one that answers")
    if not max_seconds > 0:
        raise ClearValueError(f"max_seconds={max_seconds}: no question is answered in no time")
    if adapter is None and model not in (None, MODEL):
        raise ClearValueError(f"model={model!r}: name the adapter too, since {ADAPTER!r} is for {MODEL!r}")
    names = Names(MODEL if adapter is None else model, adapter or ADAPTER)
    store.resolve(names.adapter, "adapter")
    if names.model is not None:
        store.resolve(names.model, "model")
    capacity = keep_models or (2 if names.is_builtin else 1)
    pool = ModelPool(names, allow_others=allow_other_models, device=device, capacity=capacity)
    # Files of uploads are deleted when they are read; what was uploaded and never read is gone three minutes later.
    with gr.Blocks(title="CLEAR adapters", analytics_enabled=False, delete_cache=(60, 120)) as demo:
        gr.HTML(_HEAD, elem_id="head")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Try it", elem_id="tab-try"):
                playground = Playground(pool, max_side, demo.upload_file_set, max_seconds)
            with gr.Tab("Results", elem_id="tab-results"):
                Benchmark(pool, playground.on.model, playground.on.adapter)
        gr.HTML(_FOOT, elem_id="foot")
        held = [playground.on.subject, playground.on.version]
        sessions = Sessions(demo, playground.end)
        demo.unload(sessions.leave)
        demo.load(playground.begin, None, held, show_progress="hidden", queue=False, api_visibility="private")
    demo.sessions = sessions
    demo.queue(max_size=QUEUE, default_concurrency_limit=4)
    return demo


def launch(demo: gr.Blocks, **settings: Any) -> Any:
    """Serves the page with its limits: size of uploads, number of visitors, no file but its own.

    Args:
        demo: what `build_demo` gave.
        settings: further ones of `gradio.Blocks.launch`, such as `server_name`, `server_port`, `share`,
            `inbrowser` and `prevent_thread_lock`.

    Returns:
        What `gradio.Blocks.launch` gives: the application, its local address and its public one.
    """
    theme = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    served = dict(settings.pop("app_kwargs", None) or {})
    served["middleware"] = [*served.get("middleware", []), Middleware(RequestLimit, limit=MAX_REQUEST)]
    with demo.sessions.watch():
        return demo.launch(
            **{
                "app_kwargs": served,
                "theme": theme,
                "css_paths": STYLE,
                "max_file_size": MAX_UPLOAD,
                "state_session_capacity": SESSIONS,
                "footer_links": ["settings"],
                "ssr_mode": False,
                "pwa": False,
                "mcp_server": False,
                "enable_monitoring": False,
                "run_history": False,
                **settings,
            }
        )


_HEAD = """
<header><h1>A model that repairs a picture before it answers</h1>
<p>Below, <b>one model</b> gets <b>one spoilt picture</b> and <b>one question</b>, twice: as it is, and with a small
<b>CLEAR</b> adapter. With the adapter it looks, decides whether the picture is too poor for this question, and if so restores
it first. Click an example and watch.</p></header>
"""

_FOOT = f"""
<p class="small">clear-adapters {__version__}. The method is CLEAR (arXiv 2604.04780). The built-in model has 5.9 million
weights and knows a miniature world of coloured shapes and signs; it shows how the method works and says nothing about how well it
works in large models.</p>
"""
