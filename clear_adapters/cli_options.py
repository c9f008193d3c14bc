"""Options that several commands have, and their defaults."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

MODEL = "builtin:bagel-tiny"
ADAPTER = "builtin:clear-bagel-tiny"


class Formulas(StrEnum):
    """Which formulas corrupt."""

    legacy = "legacy"
    fixed = "fixed"


ModelName = Annotated[
    str | None,
    typer.Option(help="builtin:NAME, a folder or a Hub id; the adapter's own base by default."),
]
AdapterName = Annotated[
    str | None,
    typer.Option(
        help=f"builtin:NAME, a folder, a Hub id, or 'none' for the plain model; {ADAPTER} unless --model says else."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or mps; where none is named, the CUDA GPU if there is one, else the CPU."),
]
