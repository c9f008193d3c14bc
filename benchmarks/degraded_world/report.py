"""Tables and figure from a result file of evaluate.py, put between the markers of a README.

    python benchmarks/degraded_world/report.py benchmarks/results/degraded_world.json --page clear_adapters/builtin/page

README.md gets the main table of the first built-in model; benchmarks/README.md gets all tables of either, and that of results/tried.
Both need the marker lines. The figure is written beside the result file; with `--page`, into that folder, where the page of the extra `demo` has main
table and figure and the README shows the figure from. No number is typed by hand: a test renders the committed files again and compares.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import summary
from readme import Markers, inserted, markers
from summary import Value
from systems import ALL, BY_NAME

from clear_adapters.errors import ClearError, unknown_name
from clear_adapters.mmd_bench.tables import table
from clear_adapters.results import ResultFile, read_result
from clear_adapters.world import KINDS

MARKERS, TRIED_MARKERS = markers("results"), markers("tried")
SECTIONS = {"builtin:bagel-tiny": MARKERS, "builtin:janus-tiny": markers("results-janus")}
"""Where the tables of a base model stand; README.md has only the first."""
TRIED = Path(__file__).parents[1] / "results" / "tried"
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "clear_adapters" / "builtin" / "page"
STAGES = ("sft", "bridge", "clear")
WAYS = {
    "clean": "clean",
    "input": "degraded",
    "gain_offset": "gain and offset",
    "classical": "classical",
    "sft-always": "SFT",
    "clear-always": "GRPO",
}
MEASURES = {
    "psnr": ("PSNR, dB", ".1f"),
    "ssim": ("SSIM", ".2f"),
    "blur": ("blur, 0 to 1", ".2f"),
    "again": ("degraded again against the input, dB", ".1f"),
}
DIFFERENCES = (
    ("GRPO minus SFT, at high", ("clear", "high"), ("sft", "high")),
    ("GRPO minus SFT, on clean", ("clear", "clean"), ("sft", "clean")),
    ("GRPO minus direct LoRA, at high", ("clear", "high"), ("direct", "high")),
    ("GRPO minus direct LoRA, on clean", ("clear", "clean"), ("direct", "clean")),
    ("GRPO minus base, at high", ("clear", "high"), ("base", "high")),
    ("GRPO minus base, on clean", ("clear", "clean"), ("base", "clean")),
    ("SFT minus base, at high", ("sft", "high"), ("base", "high")),
    ("SFT minus base, on clean", ("sft", "clean"), ("base", "clean")),
    ("SFT minus direct LoRA, at high", ("sft", "high"), ("direct", "high")),
    ("SFT minus direct LoRA, on clean", ("sft", "clean"), ("direct", "clean")),
    ("SFT + bridge minus SFT, at high", ("bridge", "high"), ("sft", "high")),
    ("GRPO minus SFT + bridge, at high", ("clear", "high"), ("bridge", "high")),
    ("bridge minus decode and re-encode, at high", ("clear", "high"), ("reencode", "high")),
    ("image loss weight 0.3 minus 0, at high", ("clear", "high"), ("image0", "high")),
    ("rewards without minus with decision, at high", ("clear", "high"), ("decision", "high")),
    *(
        row
        for family, title in (("sft", "SFT"), ("clear", "GRPO"))
        for row in (
            (
                f"{title}: always minus never restoring, at high",
                (f"{family}-always", "high"),
                (f"{family}-never", "high"),
            ),
            (
                f"{title}: true clean latent minus own, at high",
                (f"{family}-clean", "high"),
                (f"{family}-always", "high"),
            ),
            (
                f"{title}: own latent minus the degraded picture's, at high",
                (f"{family}-always", "high"),
                (f"{family}-degraded", "high"),
            ),
        )
    ),
)


def percent(value: Value | None) -> str:
    """`71.2 [69.0, 73.3]`."""
    return "–" if value is None else f"{value.mean * 100:.1f} [{value.low * 100:.1f}, {value.high * 100:.1f}]"


def points(value: Value) -> str:
    """`+4.0 [+1.9, +6.2]`."""
    return f"{value.mean * 100:+.1f} [{value.low * 100:+.1f}, {value.high * 100:+.1f}]"


def main_table(result: ResultFile, full: bool) -> str:
    """Right answers by system and severity, with how it was measured; the short one has the main systems only."""
    p = result.payload
    shown = [n for n in summary.measured(p) if full or BY_NAME[n].every_seed or BY_NAME[n].family is None]
    rows, rates = [], []
    for name in shown:
        values = [summary.accuracy(p, name, c) for c in ALL]
        runs = max(v.runs for v in values if v is not None)
        rows.append([BY_NAME[name].title, str(runs), *map(percent, values)])
        restored = [summary.restore_rate(p, name, c) for c in ALL]
        if any(restored) and BY_NAME[name].restore == "auto":
            rates.append([f"*{BY_NAME[name].title}: restores*", str(runs), *map(percent, restored)])
    note = (
        f"Right answers in % of {p['set']['n']:,} held-out questions [95 % interval]; model `{p['model']['name']}`, "
        f"{result.device}, {result.date[:10]}."
    )
    return f"{note}\n\n{table(['system', 'seeds', *ALL], rows + (rates if full else rates[-1:]))}"


def differences(result: ResultFile) -> str:
    """Paired differences and the share won back."""
    p = result.payload
    found = [(title, summary.difference(p, a, b)) for title, a, b in DIFFERENCES]
    rows = [[title, str(v.runs), points(v)] for title, v in found if v is not None]
    for name in ("direct", *STAGES):
        value = summary.won_back(p, name)
        if value is not None:
            title = f"share of the base's loss at high won back by {BY_NAME[name].title}, in %"
            rows.append([title, str(value.runs), percent(value)])
    return table(["difference in points, question by question", "seeds", "mean [95 %]"], rows) if rows else ""


def pictures(result: ResultFile, full: bool) -> str:
    """Restorations: each measure by way, what was gained, who can read the sign; and decibels by corruption."""
    p = result.payload
    if "restorations" not in p:
        return ""
    ways = [w for w in WAYS if w in p["restorations"]["ways"]]
    own = [w for w in ways if BY_NAME.get(w) is not None]
    rows = []
    for measure, (title, style) in MEASURES.items():
        medians = summary.restorations(p, measure)[-1][2]
        if medians:
            rows.append([title, *(f"{medians[w]:{style}}" if w in medians else "–" for w in ways)])
    signs = summary.signs(p)
    by_way = {"input": "high"}
    read = [signs.get(by_way.get(w, w)) for w in ways]
    rows.append(["the plain base reads the sign, %", *map(percent, read)])
    parts = [
        f"Pictures at high, median of {p['set']['n']:,}; restorations are of the first seed.",
        table(["", *(WAYS[w] for w in ways)], rows),
    ]
    gains = [(f"{WAYS[w]} has {decibels(summary.gain(p, w))} above its input") for w in own]
    if len(own) == 2:
        gains.append(f"GRPO {decibels(summary.gain(p, own[1], own[0]))} above SFT")
    parts.append(f"Picture by picture, in the median: {', '.join(gains)}.")
    if full:
        psnr, ssim = summary.restorations(p, "psnr"), summary.restorations(p, "ssim")
        corrupted = [w for w in ways if w != "clean"]
        lines = [
            [name, str(n), *(f"{decibel[w]:.1f} / {similar[w]:.2f}" for w in corrupted)]
            for (name, n, decibel), (_, _, similar) in zip(psnr, ssim, strict=True)
        ]
        parts.append(table(["median dB / SSIM", "n", *(WAYS[w] for w in corrupted)], lines))
    return "\n\n".join(parts)


def decibels(value: Value) -> str:
    """`+0.8 dB [+0.5, +1.0]`."""
    return f"{value.mean:+.1f} dB [{value.low:+.1f}, {value.high:+.1f}]"


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
    parts = [main_table(result, full), differences(result), pictures(result, full)]
    if full:
        parts.append(kinds(result))
    return "\n\n".join(p for p in parts if p)


def section_of(result: ResultFile) -> Markers:
    """Where the tables of a result stand.

    Raises:
        UnknownNameError: the README has no section for its base model.
    """
    name = result.payload["model"]["name"]
    if name not in SECTIONS:
        raise unknown_name("base model of a section", name, SECTIONS)
    return SECTIONS[name]


def tried_table(folder: Path) -> str:
    """Right answers of adapters that were tried and not kept: one result file each, in the order of their names.

    The set is told by its seed; that of the main table has 0.
    """
    rows = []
    for path in sorted(folder.glob("*.json")):
        p = read_result(path).payload
        (name,) = summary.measured(p)
        values = [summary.accuracy(p, name, c) for c in ("clean", "high")]
        seeds = max(v.runs for v in values if v is not None)
        rows.append([path.stem, str(p["set"]["seed"]), str(seeds), *map(percent, values)])
    return table(["result", "set", "seeds", "clean", "high"], rows)


def draw(result: ResultFile, path: Path) -> None:
    """Accuracy by severity with intervals, and how often a picture is restored; one colour a family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    p = result.payload
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4.6), width_ratios=(3, 2), layout="constrained"
    )
    shown = [n for n in summary.measured(p) if BY_NAME[n].conditions == ALL]
    colours = {
        name: f"C{number}" for number, name in enumerate(n for n in BY_NAME if BY_NAME[n].conditions == ALL)
    }

    def line(axes: Any, name: str, values: list[Value | None], shift: float) -> Any:
        there = [(i + shift, v) for i, v in enumerate(values) if v is not None]
        means = [100 * v.mean for _, v in there]
        spread = [
            [100 * max(0, v.mean - v.low) for _, v in there],
            [100 * max(0, v.high - v.mean) for _, v in there],
        ]
        seeds = max(v.runs for _, v in there)
        trained = BY_NAME[name].family is not None
        title = f"{BY_NAME[name].title} ({seeds} seed{'s' * (seeds > 1)})" if trained else BY_NAME[name].title
        return axes.errorbar(
            [x for x, _ in there],
            means,
            yerr=spread,
            fmt="o-" if BY_NAME[name].every_seed or not trained else "s:",
            color=colours[name],
            capsize=3,
            label=title,
            markersize=4,
            linewidth=1.2,
        )

    for n, name in enumerate(shown):
        shift = (n - (len(shown) - 1) / 2) * 0.07
        line(left, name, [summary.accuracy(p, name, c) for c in ALL], shift)
        rates = [summary.restore_rate(p, name, c) for c in ALL]
        if any(rates):
            line(right, name, rates, shift)
    left.set_ylabel("right answers, %")
    left.set_title(f"{p['set']['n']:,} held-out questions, 95 % intervals", fontsize=10)
    right.set_ylim(-4, 104)
    right.set_ylabel("restored, %")
    right.set_title("how often the picture is restored", fontsize=10)
    for axes in (left, right):
        axes.set_xticks(range(len(ALL)), ALL)
        axes.grid(axis="y", alpha=0.3)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
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
    parser.add_argument(
        "--page",
        type=Path,
        help=f"folder that gets table and figure for the demo's page: {PAGE.relative_to(ROOT)}",
    )
    parser.add_argument("--print", action="store_true", help="print all tables and write the figure only")
    args = parser.parse_args(arguments)
    try:
        result = read_result(args.result)
        texts = {}
        if not args.print:
            section = section_of(result)
            for path, full in ((args.readme, False), (args.full, True)):
                if section != MARKERS and not full:
                    continue
                texts[path] = inserted(
                    path.read_text(encoding="utf-8"), render(result, full), str(path), section
                )
                if TRIED_MARKERS[0] in texts[path]:
                    texts[path] = inserted(texts[path], tried_table(TRIED), str(path), TRIED_MARKERS)
    except (ClearError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figure = args.result.with_suffix(".png")
    if args.page is not None:
        texts[args.page / "results.md"] = render(result) + "\n"
        figure = args.page / "results.png"  # the README shows it from there
    draw(result, figure)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    if args.print:
        print(render(result, full=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
