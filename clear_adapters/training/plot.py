"""A picture of a run, drawn from its log."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clear_adapters.errors import BrokenEntryError, ClearValueError

_TITLES = {
    "loss": "loss",
    "ce": "cross-entropy of text",
    "mse": "flow loss",
    "distill": "distillation",
}
_NO_LOSS = ("step", "epoch", "grad_norm", "learning_rate", "seconds_per_step", "total_flos")
"""Numbers of a log line that are no part of the loss, beside those of the whole run, `train_...`."""

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
"""Okabe and Ito's, which are told apart with any eyes."""

_Panel = tuple[str, dict[str, str], bool]
"""Title, label by key of the log, and whether it shows shares."""


def plot_log(log: str | Path, output: str | Path) -> Path:
    """Draws a run: the parts of its loss and, of stage 3, rewards, restore rate, KL, length of replies and other shares.

    A thin line is what was logged, a thick one its running mean.

    Args:
        log: `<output>.training/log.jsonl` of a run, finished or not.
        output: picture file; its ending (.png, .svg, .pdf, ...) says the format.

    Returns:
        The picture file.

    Raises:
        ClearValueError: no log, a damaged one, one without a logged step, or an ending that cannot be written.
        BrokenEntryError: matplotlib is not installed.
    """
    log, output = Path(log), Path(output)
    rows = _read(log)
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise BrokenEntryError(
            "drawing needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    panels = _panels(rows)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * lines + 0.4), layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if output.suffix.lower().removeprefix(".") not in kinds:
        raise ClearValueError(
            f"{str(output)!r}: no picture can be written with the ending {output.suffix!r}; use one of "
            f"{', '.join('.' + k for k in sorted(kinds))}"
        )
    figure.suptitle(log.parent.name.removesuffix(".training") or log.name, fontsize=11, fontweight="bold")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, rows, panel)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for axis in list(figure.axes)[len(panels) :]:
        axis.set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    return output


def _read(log: Path) -> list[dict[str, Any]]:
    """The lines of steps, in order."""
    if not log.is_file():
        raise ClearValueError(f"{log} is no file: give the log.jsonl that stands in OUTPUT.training")
    rows = []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break  # a run is writing it, or was killed meanwhile
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ClearValueError(
                f"{log}:{number}: not a line of JSON ({error}): it is no log of a run"
            ) from error
        if isinstance(row, dict) and "step" in row and "loss" in row:
            rows.append(row)
    if not rows:
        raise ClearValueError(f"{log} has no logged step yet: wait for one, or lower log_every")
    return rows


def _panels(rows: Sequence[dict[str, Any]]) -> list[_Panel]:
    """What is drawn, of what was logged."""
    keys = list(dict.fromkeys(k for row in rows for k in row))
    rewards = [k for k in keys if k.startswith("reward/")]
    if not rewards:
        parts = [k for k in keys if k not in _NO_LOSS and not k.startswith("train_")]
        return [(_TITLES.get(k, k), {k: _TITLES.get(k, k)}, False) for k in parts]
    total = [k for k in rewards if k == "reward/total"]
    ordered = total + [k for k in rewards if k not in total]
    panels: list[_Panel] = [
        ("reward", {k: k.removeprefix("reward/") for k in ordered}, False),
        ("restore rate", {"restored": "restored"}, True),
        ("tokens a reply", {"tokens": "tokens"}, False),
        ("KL to the reference", {"kl": "text", "flow_kl": "restoration"}, False),
        ("loss", {"loss": "loss", "policy": "text", "flow": "restoration"}, False),
        (
            "shares",
            {"clipped": "clipped", "unscored": "unscored groups", "equal": "groups of equal rewards"},
            True,
        ),
    ]
    held = [(title, {k: v for k, v in names.items() if k in keys}, share) for title, names, share in panels]
    return [panel for panel in held if panel[1]]


def _draw(axis: Any, rows: Sequence[dict[str, Any]], panel: _Panel) -> None:
    title, names, share = panel
    for (key, label), colour in zip(names.items(), _COLOURS * len(names), strict=False):
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        steps, values = [p[0] for p in points], [p[1] for p in points]
        first = key == next(iter(names))
        marker = "." if len(points) < 3 else None
        axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35 if first else 0.2, marker=marker)
        axis.plot(
            *(steps, _smooth(values)),
            color=colour,
            linewidth=2.2 if first else 1.5,
            label=label,
            zorder=3 if first else 2,
        )
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.01)
    if share:
        axis.set_ylim(-0.03, 1.03)
    if len(names) > 1:
        axis.legend(fontsize=8, frameon=False)


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over a twentieth of the run on either side of each point, and over what there is of it at the ends."""
    reach = len(values) // 20
    around = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(own) / len(own) for own in around]
