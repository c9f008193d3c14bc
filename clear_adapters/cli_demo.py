"""The command that serves the page: `clear-adapters demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from clear_adapters.cli_options import ADAPTER, Device, ModelName
from clear_adapters.errors import BrokenEntryError


def demo(
    model: ModelName = None,
    adapter: Annotated[
        str | None,
        typer.Option(help=f"builtin:NAME, a folder or a Hub id; {ADAPTER} by default."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 by default.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also open a public address through Gradio's service.")
    ] = False,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
    restricted: Annotated[
        bool | None,
        typer.Option(
            "--restricted/--any-model",
            help="Whether visitors may only take built-in models and those named here; so by default with --share "
            "or a --host that others can reach.",
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Serve a page on which a model answers about degraded pictures, as it is and with an adapter, side by side."""
    try:
        import gradio  # noqa: F401  # the extra, looked for before anything else is imported
    except ModuleNotFoundError as error:
        raise BrokenEntryError("The page needs gradio: pip install 'clear-adapters[demo]'") from error
    from clear_adapters.ui import build_demo, launch

    public = share or host not in ("127.0.0.1", "localhost", "::1")
    page = build_demo(
        model,
        adapter,
        allow_other_models=not (public if restricted is None else restricted),
        device=device,
    )
    launch(page, server_name=host, server_port=port, share=share, inbrowser=browser)
