"""Tables of speed and the figure of how cost grows, from result files, put into benchmarks/README.md; the targets into README.md too.

    python benchmarks/speed/speed_report.py benchmarks/results/speed/*.json

Of several files the later one's rows win. The figure is written beside the first file. No number is typed by hand but those
of the authors' code and the floors, which stand in DESIGN.md, section 9; a test renders the committed files again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from readme import asked, inserted, markers

from clear_adapters.mmd_bench.tables import table
from clear_adapters.results import ResultFile

MARKERS = markers("bagel-speed")
README = Path(__file__).parents[1] / "README.md"
MAIN = README.parents[1] / "README.md"
CARD = "H100"
"""For which the targets are set."""
FIGURE = "growth.png"
KINDS = ("inference", "training")
"""Kinds of result files whose rows are told apart by their parts."""

Row = dict[str, Any]


class Results:
    """Rows of several result files, with the facts of each."""

    def __init__(self, files: Sequence[ResultFile], kinds: Sequence[str] = KINDS) -> None:
        self.files = list(files)
        self.rows: list[Row] = []
        for file in files:
            if file.kind not in kinds:
                continue
            facts = {"device": file.device, "quantization": file.payload.get("quantization")}
            self.rows += [{"kind": file.kind, **facts, **row} for row in file.payload["rows"]]

    def find(self, part: str, **facts: Any) -> Row | None:
        """The last of them."""
        own = self.each(part, **facts)
        return own[-1] if own else None

    def each(self, part: str, **facts: Any) -> list[Row]:
        """All rows of a part with these facts, of unquantized weights unless told."""
        facts = {"quantization": None, **facts}
        return [r for r in self.rows if r["part"] == part and all(r.get(k) == v for k, v in facts.items())]


def seconds(row: Row) -> str:
    """`2.13 s`."""
    return f"{row['seconds']:.2f} s"


def milliseconds(row: Row) -> str:
    """`6.4 ms`."""
    return f"{row['seconds'] * 1e3:.1f} ms"


def training(row: Row) -> str:
    """`1.30 s, 4,100 tokens/s, 38% of the card's rate (57% with what is run twice), 61 GB`."""
    shown = [seconds(row), f"{row['tokens_per_second']:,.0f} tokens/s"]
    if "share_run" in row:
        shown.append(f"{row['share']:.0%} of the card's rate ({row['share_run']:.0%} with what is run twice)")
    if row["peak_gb"]:
        shown.append(f"{row['peak_gb']:.0f} GB")
    return ", ".join(shown)


Target = tuple[str, str, dict[str, Any], Callable[[Row], str], str, str, float | None, str]
TARGETS: tuple[Target, ...] = (
    ("text, batch 1", "text", {"batch": 1, "text": 64}, milliseconds, "39 ms a token", "7 ms", 7e-3, "5 ms"),
    ("text, batch 8", "text", {"batch": 8, "text": 64}, milliseconds, "8 x 39 ms", "9 ms", 9e-3, "5 ms"),
    (
        *("restoration, guidance 4/2, 30 points", "restoration"),
        *({"batch": 1, "side": 512, "guided": True}, seconds, "5.5 s", "2.2 s", 2.2, "1.7 s"),
    ),
    ("restore then answer", "answer", {"batch": 1, "side": 512}, seconds, "11.8 s", "3.5 s", 3.5, "2.5 s"),
    ("group of 8 rollouts", "group", {"group": 8}, seconds, "74 s", "6 s", 6.0, "4 s"),
    ("SFT step, LoRA, one card", "sft", {}, training, "needs eight cards", "runs; 45 %", None, ""),
    ("GRPO step, group of 8, one card", "grpo", {}, training, "needs eight cards", "runs", None, ""),
)
"""Work, part, facts, how it is shown, the authors' code, the target in words and in seconds, the floor."""


def best(found: Results, part: str, facts: dict[str, Any], state: str) -> Row | None:
    """The fastest row of a target in a state of the model, `attached` or `folded`, compiled or not."""
    rows = found.each(part, **facts) if state == "attached" else []
    rows += [r for p in ("states", "compiled") for r in found.each(p, work=part, state=state, **facts)]
    return min(
        rows,
        key=lambda r: 1 / r["tokens_per_second"] if "tokens_per_second" in r else r["seconds"],
        default=None,
    )


def targets(found: Results) -> str:
    """The targets beside what was measured; those of which nothing was are left out."""
    lines = []
    for work, part, facts, show, authors, limit, most, floor in TARGETS:
        rows = [best(found, part, facts, state) for state in ("attached", "folded")]
        if rows == [None, None]:
            continue
        cells = []
        for row in rows:
            met = row is not None and most is not None and row["seconds"] <= most
            cells.append("–" if row is None else f"**{show(row)}**" if met else show(row))
        lines.append([work, authors, limit, floor or "–", *cells])
    head = ["work", "authors' code", "ours at most", "floor", "attached", "folded"]
    return table(head, lines) if lines else ""


def restorations(found: Results) -> str:
    """Restorations of two sizes, with guidance and without."""
    rows = {(r["side"], r["batch"], r["guided"]): r for r in found.each("restoration")}
    lines = []
    for side, batch in sorted({k[:2] for k in rows}):
        pair = [rows.get((side, batch, guided)) for guided in (True, False)]
        peak = max(r["peak_gb"] or 0 for r in pair if r is not None)
        lines.append(
            [
                f"{side} x {side}",
                f"{batch}",
                *("–" if r is None else seconds(r) for r in pair),
                f"{peak:.0f} GB",
            ]
        )
    return table(["restoration, attached", "batch", "guidance 4/2", "none", "peak"], lines) if lines else ""


def readings(found: Results) -> str:
    """Prompts, and restorations that are read again."""
    lines = []
    for r in found.each("prefill"):
        name = f"prompt of {r['tokens']:,} tokens, picture of {r['side']} x {r['side']}"
        lines.append([name, f"{r['batch']}", seconds(r)])
    for r in found.each("bridge"):
        lines.append([f"restoration of {r['side']} x {r['side']} read, {r['way']}", "1", seconds(r)])
    return table(["reading, attached", "batch", "measured"], lines) if lines else ""


def trainings(found: Results) -> str:
    """Supervised steps with other numbers of rows, without checkpointing, compiled."""
    grid = found.each("grid")
    if not grid:
        return ""
    lines = []
    for r in [*found.each("sft"), *grid]:
        how = [
            w
            for w, given in (("compiled", r["compile"]), ("no checkpointing", not r["checkpointing"]))
            if given
        ]
        size = f"{r['rows']} x {r['row_tokens']:,} tokens"
        lines.append([", ".join((size, *how)), training(r)])
    return table(["SFT step", "measured"], lines)


def ways(found: Results) -> str:
    """What each fast way is worth."""
    rows = found.each("ways")
    if not rows:
        return ""
    lines = []
    for name in dict.fromkeys(r["without"] for r in rows):
        own = [r for r in rows if r["without"] == name]
        texts = {r["batch"]: milliseconds(r) for r in own if r["work"] == "text"}
        restored = [seconds(r) for r in own if r["work"] == "restoration"]
        lines.append([name, *(texts.get(b, "–") for b in (1, 8)), restored[-1] if restored else "–"])
    shown = table(["without", "text, batch 1", "text, batch 8", "restoration"], lines)
    return f"With one fast way left out at a time (`backbones/fast.py` says what they are):\n\n{shown}"


def memory(found: Results) -> str:
    """Peak memory by quantization, on each card."""
    lines = []
    for kind in (None, "int8", "nf4"):
        for device in sorted({r["device"] for r in found.rows}):
            facts = {"quantization": kind, "device": device}
            answer = found.find("answer", batch=1, **facts)
            texts = found.each("text", batch=1, **facts)
            text = min(texts, key=lambda r: r["text"]) if texts else None
            if answer is None and text is None:
                continue
            step = found.find("sft", micro=1, **facts)
            peaks = [
                "–" if row is None or not row["peak_gb"] else f"{row['peak_gb']:.0f} GB"
                for row in (answer, step)
            ]
            shown = "–" if text is None else milliseconds(text)
            lines.append([kind or "bfloat16", peaks[0], shown, peaks[1], device])
    return (
        table(["base weights", "answer, peak", "text, batch 1", "SFT step, peak", "card"], lines)
        if any(line[0] != "bfloat16" for line in lines)
        else ""
    )


def changes(files: Sequence[ResultFile]) -> str:
    """What quantization changes in the built-in model's outputs."""
    own = [f for f in files if f.kind == "quantized"]
    if not own:
        return ""
    p = own[-1].payload
    lines = []
    for kind, row in p["kinds"].items():
        same = f"{row['same_answers']} of {p['scenes']}"
        numbers = (row["token_difference"], row["latent_error"])
        difference, latent = (f"{n:.4f}" for n in numbers)
        lines.append([kind, f"{row['bytes'] / 1e6:.1f}", difference, same, latent])
    head = ["base weights", "MB", "difference of a token's log-probability", "same answers", "latent error"]
    return f"What that changes in the built-in model's outputs:\n\n{table(head, lines)}"


def loads(files: Sequence[ResultFile]) -> str:
    """Loading a checkpoint, beside reading its files."""
    lines = []
    for file in files:
        if file.kind == "loading":
            p, name = file.payload, f"{file.payload['bytes'] / 1e9:.1f} GB, {file.device}"
            lines.append(
                [name, *(f"{p[k]:.1f} s, {p['bytes'] / 1e9 / p[k]:.2f} GB/s" for k in ("read", "load"))]
            )
    head = ["checkpoint that is not in memory", "its files read", "loaded"]
    return table(head, lines) if lines else ""


def render(files: Sequence[ResultFile]) -> str:
    """What stands between the markers: the tables of each card, then those of fewer bits."""
    own = [f for f in files if f.kind in (*KINDS, "quantized")]
    shown = [
        "BAGEL-7B's shapes with random weights, bfloat16. Text is seconds a step (a token in every row) of a 64-token turn, all "
        "of the turn's cost included; bold is within the target, which is set for an H100. Both columns have the fastest of what "
        "was measured, compiled or not."
    ]
    for device in sorted({f.device for f in own}):
        there = [f for f in own if f.device == device]
        found = Results(there)
        dates = ", ".join(dict.fromkeys(f.date[:10] for f in there))
        parts = (
            targets(found),
            readings(found),
            restorations(found),
            ways(found),
            trainings(found),
        )
        if any(parts):
            shown.append(f"**{device}**, {dates}:\n\n" + "\n\n".join(p for p in parts if p))
    bits = [p for p in (memory(Results(own)), changes(own)) if p]
    if bits:
        shown += ["**With fewer bits:**", *bits]
    if loaded := loads(files):
        shown.append(loaded)
    return "\n\n".join(shown)


def short(files: Sequence[ResultFile]) -> str:
    """What stands between the markers of the main README: the targets on their card."""
    there = [f for f in files if f.kind in KINDS and CARD in f.device]
    shown = targets(Results(there))
    if not shown:
        return "Not measured yet."
    dates = ", ".join(dict.fromkeys(f.date[:10] for f in there))
    return f"{there[0].device}, {dates}; bold is within the target.\n\n{shown}"


def figure(files: Sequence[ResultFile], path: Path) -> bool:
    """How cost grows with picture size, text length, batch and group; False, and no file, where none of it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = Results(files)
    panels: list[tuple[str, str, str, Callable[[Row], float], str]] = [
        ("picture", "side", "side of the picture, pixels", lambda r: r["seconds"], "restoration, s"),
        ("length", "text", "tokens of a text", lambda r: r["seconds"] * r["text"], "text, s"),
        ("batch", "batch", "questions at once", lambda r: r["seconds"], "answers, s"),
        ("groups", "group", "rollouts of a question", lambda r: r["seconds"], "rollouts, s"),
    ]
    panels = [panel for panel in panels if found.each(panel[0])]
    if not panels:
        return False
    drawn, axes = plt.subplots(
        1, len(panels), figsize=(3.4 * len(panels), 2.8), layout="constrained", squeeze=False
    )
    for axis, (part, key, name, value, label) in zip(axes[0], panels, strict=True):
        rows = sorted(found.each(part), key=lambda r: r[key])
        axis.plot([r[key] for r in rows], [value(r) for r in rows], "o-", color="tab:blue")
        axis.set(xlabel=name, ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    drawn.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(drawn)
    return True


def insert(files: Sequence[ResultFile], drawn: bool) -> None:
    """Puts tables between the markers of both files, and the figure where there is one."""
    shown = render(files) + (f"\n\n![How cost grows](results/speed/{FIGURE})" if drawn else "")
    texts = {
        path: inserted(path.read_text(encoding="utf-8"), content, str(path), MARKERS)
        for path, content in ((README, shown), (MAIN, short(files)))
    }
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    paths, files, only_shown = asked(__doc__, arguments)
    if only_shown:
        print(render(files))
        return 0
    insert(files, figure(files, paths[0].with_name(FIGURE)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
