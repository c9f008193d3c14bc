"""Tables and figure from a result file of evaluate.py, put between the markers of a README.

    python benchmarks/degraded_world/report.py benchmarks/results/degraded_world.json

README.md gets the main table, benchmarks/README.md all of them; both need the two marker lines. The figure is written
beside the result file. No number is typed by hand: a test renders the committed file again and compares.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import summary
from summary import Value
from systems import ALL, BY_NAME

from clear_adapters.errors import ClearError, ClearValueError
from clear_adapters.results import ResultFile, read_result
from clear_adapters.world import KINDS

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ROOT = Path(__file__).resolve().parents[2]
WAYS = {
    "input": "degraded",
    "gain_offset": "gain and offset",
    "classical": "classical",
    "restored": "restored",
}
DIFFERENCES = (
    ("CLEAR, deciding, minus base, at high", ("clear-auto", "high"), ("base", "high")),
    ("CLEAR, deciding, minus direct LoRA, at high", ("clear-auto", "high"), ("direct", "high")),
    ("CLEAR, deciding, minus base, on clean", ("clear-auto", "clean"), ("base", "clean")),
    ("CLEAR, always minus never restoring, at high", ("clear-always", "high"), ("clear-never", "high")),
    ("gate: true clean latent minus own, at high", ("clear-clean", "high"), ("clear-always", "high")),
    (
        "gate: own latent minus the degraded picture's, at high",
        ("clear-always", "high"),
        ("clear-degraded", "high"),
    ),
)


def percent(value: Value | None) -> str:
    """`71.2 [69.0, 73.3]`."""
    return "–" if value is None else f"{value.mean * 100:.1f} [{value.low * 100:.1f}, {value.high * 100:.1f}]"


def points(value: Value) -> str:
    """`+4.0 [+1.9, +6.2]`."""
    return f"{value.mean * 100:+.1f} [{value.low * 100:+.1f}, {value.high * 100:+.1f}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main_table(result: ResultFile) -> str:
    """Right answers by system and severity, with how it was measured."""
    p = result.payload
    rows = []
    for name in summary.measured(p):
        values = [summary.accuracy(p, name, c) for c in ALL]
        runs = max(v.runs for v in values if v is not None)
        rows.append([BY_NAME[name].title, str(runs), *map(percent, values)])
    rates = [summary.restore_rate(p, c) for c in ALL]
    if any(rates):
        rows.append(["*restores, when deciding*", str(max(r.runs for r in rates if r)), *map(percent, rates)])
    note = (
        f"Right answers in % of {p['set']['n']:,} held-out questions [95 % interval]; model `{p['model']['name']}`, "
        f"{result.device}, {result.date[:10]}."
    )
    return f"{note}\n\n{table(['system', 'seeds', *ALL], rows)}"


def differences(result: ResultFile) -> str:
    """Paired differences and the share won back."""
    p = result.payload
    found = [(title, summary.difference(p, a, b)) for title, a, b in DIFFERENCES]
    rows = [[title, str(v.runs), points(v)] for title, v in found if v is not None]
    for name in ("direct", "clear-auto"):
        value = summary.won_back(p, name)
        if value is not None:
            title = f"share of the base's loss at high won back by {BY_NAME[name].title}, in %"
            rows.append([title, str(value.runs), percent(value)])
    return table(["difference in points, question by question", "seeds", "mean [95 %]"], rows) if rows else ""


def pictures(result: ResultFile, full: bool) -> str:
    """Restorations: one sentence, and by corruption."""
    p = result.payload
    if "restorations" not in p:
        return ""
    found = summary.restorations(p)
    _, _, overall = found[-1]
    gain, signs = summary.gain(p), summary.signs(p)
    text = (
        f"Restorations at high, median of {p['set']['n']:,}: {overall['restored'][0]:.1f} dB (SSIM "
        f"{overall['restored'][1]:.2f}) where the degraded picture has {overall['input'][0]:.1f} dB "
        f"({overall['input'][1]:.2f}), a gain-and-offset correction {overall['gain_offset'][0]:.1f} dB "
        f"({overall['gain_offset'][1]:.2f}) and a classical restorer {overall['classical'][0]:.1f} dB "
        f"({overall['classical'][1]:.2f}); picture by picture {gain.mean:+.1f} dB [{gain.low:+.1f}, {gain.high:+.1f}]."
    )
    if signs:
        words = {"clean": "clean", "high": "degraded", "restored": "restored"}
        read = ", ".join(f"{words[n]} {percent(v)} %" for n, v in signs.items())
        text += f" The plain base reads the sign in: {read}."
    if not full:
        return text
    rows = [
        [name, str(n), *(f"{medians[w][0]:.1f} / {medians[w][1]:.2f}" for w in WAYS)]
        for name, n, medians in found
    ]
    return text + "\n\n" + table(["median dB / SSIM", "n", *WAYS.values()], rows)


def kinds(result: ResultFile) -> str:
    """Right answers by kind of question."""
    p = result.payload
    rows = [
        [f"{BY_NAME[name].title}, {c}", *(percent(summary.accuracy(p, name, c, k)) for k in KINDS)]
        for name in summary.measured(p)
        for c in ("clean", "high")
        if summary.accuracy(p, name, c) is not None
    ]
    return table(["system", *KINDS], rows)


def render(result: ResultFile, full: bool = False) -> str:
    """Everything that stands between the markers.

    Args:
        result: as evaluate.py wrote it.
        full: with kinds of questions and corruptions.
    """
    parts = [main_table(result), differences(result), pictures(result, full)]
    if full:
        parts.append(kinds(result))
    return "\n\n".join(p for p in parts if p)


def inserted(text: str, content: str, source: str) -> str:
    """A README with the content between its markers.

    Raises:
        ClearValueError: it does not have each marker once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ClearValueError(
            f"{source} needs the lines {BEGIN} and {END}, each once: add them where the table goes"
        )
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{content}\n{text[text.index(END) :]}"


def between(text: str) -> str | None:
    """What stands between the markers; None without them."""
    if BEGIN not in text or END not in text:
        return None
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def draw(result: ResultFile, path: Path) -> None:
    """Accuracy by severity with intervals, and how often a picture is restored."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    p = result.payload
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 2), layout="constrained")

    def line(axes: Any, values: list[Value | None], title: str, shift: float, style: str) -> None:
        there = [(i + shift, v) for i, v in enumerate(values) if v is not None]
        means = [100 * v.mean for _, v in there]
        spread = [
            [100 * max(0, v.mean - v.low) for _, v in there],
            [100 * max(0, v.high - v.mean) for _, v in there],
        ]
        axes.errorbar(
            [x for x, _ in there], means, yerr=spread, fmt=style, capsize=3, label=title, markersize=5
        )

    names = summary.measured(p)
    for n, name in enumerate(names):
        style = "o-" if BY_NAME[name].conditions == ALL else "s"
        values = [summary.accuracy(p, name, c) for c in ALL]
        line(left, values, BY_NAME[name].title, (n - (len(names) - 1) / 2) * 0.06, style)
    left.set_ylabel("right answers, %")
    left.set_title(f"{p['set']['n']:,} held-out questions, 95 % intervals", fontsize=10)
    left.legend(fontsize=7)
    line(right, [summary.restore_rate(p, c) for c in ALL], "CLEAR, deciding", 0, "o-")
    right.set_ylim(-4, 104)
    right.set_ylabel("restored, %")
    right.set_title("how often the picture is restored", fontsize=10)
    for axes in (left, right):
        axes.set_xticks(range(len(ALL)), ALL)
        axes.grid(axis="y", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Writes figure and READMEs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="gets the main table")
    parser.add_argument(
        "--full", type=Path, default=ROOT / "benchmarks" / "README.md", help="gets all tables"
    )
    parser.add_argument("--print", action="store_true", help="print all tables and write the figure only")
    args = parser.parse_args(arguments)
    try:
        result = read_result(args.result)
        texts = {}
        if not args.print:
            for path, full in ((args.readme, False), (args.full, True)):
                texts[path] = inserted(path.read_text(encoding="utf-8"), render(result, full), str(path))
    except (ClearError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(result, args.result.with_suffix(".png"))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    if args.print:
        print(render(result, full=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
