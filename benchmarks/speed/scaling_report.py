"""What several GPUs are worth, and a plan of what 8, 64 and 512 would take for the paper's recipe, put into docs/scaling.md.

    python benchmarks/speed/scaling_report.py benchmarks/results/speed/*.json

It reads the files of scaling.py (one for each number of GPUs), equality.py, training.py and inference.py among them, and draws the figure
beside the first file. What is assumed and not measured stands here in capitals and in the document; a test renders the
committed files again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from equality import WAYS, furthest
from readme import asked, inserted, markers
from shapes import config_of
from speed_report import KINDS, Results, Row

from clear_adapters.mmd_bench.tables import table
from clear_adapters.results import ResultFile
from clear_adapters.training.recipe import Recipe, load_recipe

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
MEASURED, EQUAL, PLAN = markers("scaling"), markers("equality"), markers("scaling-plan")
FIGURE = "scaling.png"
NOTHING = "Not measured yet."

DIRECT, RESTORING = 12_267, 12_619
"""Traces of the paper's stage 1 that answer at once, and that restore (its table 8)."""
DIRECT_TEXT, RESTORING_TEXT = 606, 1_080
"""Their mean lengths (table 8). The paper gives no unit; tokens are assumed."""
LATENT = 1_026
"""Tokens of a restoration of 512 x 512 pixels, marks included; a trained row holds it twice (noised, and read)."""
LINK = 50e9
"""Assumed bytes a second of each GPU to other hosts: one 400 Gb/s adapter a GPU. Within a host the measured share holds."""
HOST = 8
"""GPUs of a host."""
PLANNED = (1, 8, 64, 512)


@dataclass(frozen=True)
class Figures:
    """What the plan is computed from.

    Attributes:
        tokens: a second, of supervised steps on one GPU, by rows of a forward.
        row: tokens of a row of the measured workload.
        words: tokens of text in it that are trained.
        text: seconds of a step of text, by rows that are written side by side.
        flow: seconds of a flow step for each row without guidance, by rows that are restored side by side.
        guided: seconds of a flow step for each row with it, likewise.
        share: by number of GPUs, tokens a second over those of as many single GPUs.
        cards: on which card each kind of work was measured: `supervised`, `share`, `text`, `flow`.
    """

    tokens: Mapping[int, float]
    row: float
    words: int
    text: Mapping[int, float]
    flow: Mapping[int, float]
    guided: Mapping[int, float]
    share: Mapping[int, float]
    cards: Mapping[str, str]

    @property
    def rows(self) -> tuple[float, float]:
        """Tokens of a row of the recipe that answers at once, and of one that restores."""
        bare = self.row - self.words
        return bare - 2 * LATENT + DIRECT_TEXT, bare + RESTORING_TEXT

    def efficiency(self, gpus: int) -> float:
        """The share of so many GPUs, or of the most that were measured below."""
        return below(self.share, gpus)

    def step_of_text(self, rows: float) -> float:
        """Seconds of a step of text for so many rows, between the measured numbers in proportion."""
        known = sorted(self.text)
        if rows <= known[0]:
            return self.text[known[0]]
        for low, high in pairwise(known):
            if rows <= high:
                part = (rows - low) / (high - low)
                return self.text[low] + part * (self.text[high] - self.text[low])
        return self.text[known[-1]] * rows / known[-1]


def below(measured: Mapping[int, float], number: float) -> float:
    """What was measured for so many, or for the most of fewer; for the fewest where there are no fewer."""
    return measured[max((n for n in measured if n <= number), default=min(measured))]


def of_one_card(rows: Sequence[Row], device: str) -> list[Row]:
    """Rows of a card; those of the last other one where it has none."""
    own = [r for r in rows if r["device"] == device]
    return own or [r for r in rows if r["device"] == rows[-1]["device"]]


def figures(files: Sequence[ResultFile]) -> Figures | None:
    """From result files, of the card of which several were measured where it has them; None where one that is needed is missing."""
    found = Results(files, (*KINDS, "scaling"))
    single = found.find("sft", kind="scaling", growth="weak", processes=1)
    if single is None:
        return None
    device = single["device"]
    plain = {"checkpointing": True, "compile": False}
    supervised = [r for part in ("sft", "grid") for r in found.each(part, kind="training", **plain)]
    steps = of_one_card(supervised, device) if supervised else []
    texts = of_one_card(found.each("text", text=64), device)
    restored = of_one_card(found.each("restoration", side=512), device)
    flows = [[r for r in restored if r["guided"] is guided] for guided in (False, True)]
    step = next((r for r in steps if r["micro"] == 1), None)
    if step is None or not texts or not all(flows):
        return None
    load = next(f.payload["load"] for f in files if f.kind == "training")
    flow, guided = (
        {r["batch"]: r["seconds"] / r["batch"] / (r["points"] - 1) for r in rows} for rows in flows
    )
    share = {
        r["processes"]: r["tokens_per_second"] / r["processes"] / single["tokens_per_second"]
        for r in found.each("sft", kind="scaling", growth="weak", device=device)
    }
    used = {"supervised": steps, "share": [single], "text": texts, "flow": flows[0]}
    return Figures(
        tokens={r["micro"]: r["tokens_per_second"] for r in steps},
        row=step["tokens_per_second"] * step["seconds"] / step["micro"],
        words=2 * load["text"],
        text={r["batch"]: r["seconds"] for r in texts},
        flow=flow,
        guided=guided,
        share=share,
        cards={kind: rows[-1]["device"] for kind, rows in used.items()},
    )


# ------------------------------------------------------------------------------------------------------------ plan


def most_of(rows: int, gpus: int, share: float) -> float:
    """How many of its rows restore, on the GPU that has most of them: the mean of the largest of `gpus` binomials."""
    total, below = 0.0, 0.0
    for k in range(rows + 1):
        below += math.comb(rows, k) * share**k * (1 - share) ** (rows - k)
        total += 1 - min(1.0, below) ** gpus  # the mean is the sum of the chances of more than k
    return total


def adapter_bytes(recipe: Recipe) -> int:
    """Of the gradients that are exchanged: LoRA's, in float32."""
    llm = config_of("7b").llm
    width, mlp = int(llm["hidden_size"]), int(llm["intermediate_size"])
    kv = width // int(llm["num_attention_heads"]) * int(llm["num_key_value_heads"])
    sides = 2 * (width + width) + 2 * (width + kv) + 3 * (width + mlp)
    return 4 * sum(recipe.lora.ranks.values()) * sides * int(llm["num_hidden_layers"])


def exchange(gpus: int, size: int) -> float:
    """Seconds of a ring all-reduce between hosts that nothing is computed beside."""
    return 2 * (gpus - 1) / gpus * size / LINK if gpus > HOST else 0.0


def most_gpus(recipe: Recipe, gpus: int) -> int:
    """How many of them a step of the recipe keeps busy: its rows, or in stage 3 its rollouts, have to be as many."""
    work = recipe.loop.batch * (recipe.grpo.group if recipe.stage == "grpo" else 1)
    return max(n for n in range(1, min(gpus, work) + 1) if work % n == 0)


def trained(known: Figures, rows: float, restoring: float, gpus: int, together: int) -> float:
    """Seconds of the supervised work on so many rows of one GPU, so many of them in a forward."""
    direct, restored = known.rows
    tokens = rows * direct + restoring * (restored - direct)
    return tokens / (below(known.tokens, together) * known.efficiency(gpus))


def rolled(known: Figures, rollouts: int, side: int, words: float, points: int) -> float:
    """Seconds of rollouts that all restore, so many side by side."""
    portions = math.ceil(rollouts / side)
    together = rollouts / portions
    flow = rollouts * (points - 1) * below(known.flow, together)
    return portions * words * known.step_of_text(together) + flow


def step_seconds(known: Figures, recipe: Recipe, gpus: int, size: int) -> float:
    """Seconds of an optimizer step of a recipe on so many GPUs, each of which has work."""
    chance = RESTORING / (DIRECT + RESTORING)
    micro = recipe.loop.micro_batch or recipe.loop.batch // gpus
    if recipe.stage == "grpo":
        rollouts = recipe.loop.batch * recipe.grpo.group // gpus
        side = recipe.grpo.rollout_rows or rollouts
        sampled = rolled(known, rollouts, side, RESTORING_TEXT, recipe.grpo.flow_steps)
        # The reference's forward is one pass more beside three: forward, forward again, backward.
        together = min(rollouts, micro * recipe.grpo.group)
        return sampled + 4 / 3 * trained(known, rollouts, rollouts, gpus, together) + exchange(gpus, size)
    rows = recipe.loop.batch // gpus
    seconds = trained(known, rows, most_of(rows, gpus, chance), gpus, micro) + exchange(gpus, size)
    if recipe.stage == "bridge":
        drawn = most_of(rows, gpus, recipe.bridge.own)
        seconds += drawn * (recipe.bridge.own_steps - 1) * below(known.guided, micro)
    return seconds


def shown(seconds: Mapping[int, float]) -> str:
    """`42 ms with 1, 31 ms with 8`."""
    return ", ".join(f"{s * 1e3:.0f} ms with {n}" for n, s in sorted(seconds.items()))


def plan(known: Figures) -> str:
    """The table of what GPUs would take for the recipe, and the arithmetic's own check."""
    recipes = [load_recipe("paper", (), stage) for stage in ("sft", "bridge", "grpo")]
    size = adapter_bytes(recipes[0])
    lines, alone = [], 0.0
    for gpus in PLANNED:
        cells, hours, held = [], 0.0, 0.0
        for recipe in recipes:
            busy = most_gpus(recipe, gpus)
            spent = recipe.loop.steps * step_seconds(known, recipe, busy, size) / 3600
            hours, held = hours + spent, held + spent * busy
            cells.append(f"{spent:.1f} h" + (f" on {busy}" if busy < gpus else ""))
        alone = alone or hours
        lines.append([str(gpus), *cells, f"{hours:.1f} h", f"{held:,.0f}", f"{alone / hours:.1f}"])
    direct, restoring = known.rows
    total = recipes[0].loop.steps * recipes[0].loop.batch
    tokens = total * (DIRECT * direct + RESTORING * restoring) / (DIRECT + RESTORING)
    rates = ", ".join(f"{t:,.0f} tokens a second with {n}" for n, t in sorted(known.tokens.items()))
    own = ", ".join(f"{s * 1e3:.1f} ms with {n}" for n, s in sorted(known.text.items()))
    shares = ", ".join(f"{s:.0%} on {n}" for n, s in sorted(known.share.items()))
    inputs = [
        f"- supervised ({known.cards['supervised']}): {rates} rows in a forward; a row of {direct:,.0f} tokens, or {restoring:,.0f} where it "
        f"restores; {total:,} rows in {recipes[0].loop.steps:,} steps are {tokens / 1e6:,.0f} million tokens, "
        f"{tokens / below(known.tokens, recipes[0].loop.micro_batch or 1) / 3600:.1f} GPU-hours",
        f"- of as many single GPUs' rate ({known.cards['share']}): {shares}",
        f"- a step of text ({known.cards['text']}): {own} rows side by side",
        f"- a flow step for each row ({known.cards['flow']}): {shown(known.flow)}, guided {shown(known.guided)} rows side by side",
        f"- gradients: {size / 1e9:.2f} GB a step, between hosts {exchange(512, size) * 1e3:.0f} ms",
    ]
    head = ["GPUs", "stage 1", "stage 2", "stage 3", "all", "GPU-hours", "times as fast as one"]
    return "\n".join(inputs) + "\n\n" + table(head, lines)


def check(files: Sequence[ResultFile], known: Figures) -> str:
    """The arithmetic of stage 3 beside the step that was measured."""
    row = Results(files, (*KINDS, "scaling")).find("grpo", kind="scaling", growth="weak", processes=1)
    load = next((f.payload["load"] for f in files if f.kind == "scaling"), None)
    if row is None or load is None:
        return ""
    count = load["group"]
    told = rolled(known, count, count, 2 * load["text"], load["rollout_points"])
    told += 4 / 3 * count * known.row / below(known.tokens, count)
    return (
        f"\n\nThe same arithmetic gives {told:.1f} s for the measured step of stage 3 ({count} rollouts of {2 * load['text']} tokens, "
        f"{load['rollout_points']} points), which took {row['seconds']:.1f} s."
    )


# -------------------------------------------------------------------------------------------------------- measured

WORK = (
    ("stage 1, 4 rows a GPU", "sft", "weak"),
    ("stage 1, 16 rows in all", "sft", "strong"),
    ("stage 1 in shards, 4 rows a GPU", "shard", "weak"),
    ("stage 3, a question a GPU", "grpo", "weak"),
    ("stage 3, a question in all", "grpo", "strong"),
)


def rate(row: Row) -> float:
    """Rollouts a second of stage 3, else tokens a second."""
    return float(row.get("rollouts_per_second", row["tokens_per_second"]))


def single(found: Results, part: str) -> Row | None:
    """What one GPU does of a kind of work; it has nobody to share a base or a question with."""
    return found.find("sft" if part == "shard" else part, kind="scaling", growth="weak", processes=1)


def of_work(found: Results, part: str, growth: str) -> list[Row]:
    """The rows of a kind of work, by number of GPUs; one GPU's is that of the other kind where both are the same."""
    rows = {r["processes"]: r for r in found.each(part, kind="scaling", growth=growth)}
    one = single(found, part)
    if one is not None and rows and (part, growth) != ("sft", "strong"):
        rows.setdefault(1, one)
    return [rows[n] for n in sorted(rows)]


def measured(files: Sequence[ResultFile]) -> str:
    """The table of what was measured."""
    found = Results(files, (*KINDS, "scaling"))
    lines = []
    for name, part, growth in WORK:
        rows = of_work(found, part, growth)
        for row in rows:
            unit = "rollouts/s" if part == "grpo" else "tokens/s"
            shown = f"{rate(row):,.2f}" if part == "grpo" else f"{rate(row):,.0f}"
            one = single(found, part)
            share = "–" if one is None else f"{rate(row) / row['processes'] / rate(one):.0%}"
            waiting = f"{row['waiting']:.1%}" if "waiting" in row else "–"
            memory = f"{row['peak_gb']:.1f} GB" if row["peak_gb"] else "–"
            cells = (f"{row['seconds']:.2f} s", f"{shown} {unit}", share, waiting, memory)
            lines.append([name, str(row["processes"]), *cells])
    if not lines:
        return NOTHING
    own = [f for f in files if f.kind == "scaling"]
    devices = ", ".join(dict.fromkeys(f.device for f in own))
    dates = ", ".join(dict.fromkeys(f.date[:10] for f in own))
    head = ["work", "GPUs", "a step", "rate", "of as many single GPUs", "waiting", "memory a GPU"]
    commits: dict[str, list[str]] = {}
    for file in own:
        for part in {r["part"] for r in file.payload["rows"]} & {part for _, part, _ in WORK}:
            commits.setdefault(file.commit[:7], []).append(part)
    told = "; ".join(
        f"{', '.join(p for p in ('sft', 'shard', 'grpo') if p in parts)} at {c}"
        for c, parts in commits.items()
    )
    note = f"BAGEL-7B's shapes with random weights, bfloat16, LoRA of rank 16, {devices}, {dates}; {told}."
    return (
        f"{note}\n\n{table(head, lines)}\n\n![How cost grows with GPUs](../benchmarks/results/speed/{FIGURE})"
    )


def equal(files: Sequence[ResultFile]) -> str:
    """The table of differences from one process: a line for each stage and number of processes, a column for each way."""
    own = [f for f in files if f.kind == "equality"]
    found: dict[tuple[bool, str, int, str, str], dict[str, Row]] = {}
    for file in own:
        for row in file.payload["rows"]:
            key = (file.device == "CPU", row["stage"], row["processes"], file.device, row["dtype"])
            # Of the curves, so that rows of different days are measured alike.
            loss = furthest(row["curve_of_one"], row["curve"], row["stage"])
            found.setdefault(key, {})[row["way"]] = {**row, "loss": loss}
    if not found:
        return NOTHING
    limits = {dtype: limit for f in own for dtype, limit in f.payload["tolerance"].items()}

    def cell(values: Sequence[float], limit: float) -> str:
        most = max(values, default=None)
        return "–" if most is None else f"{most:.1e}" if most <= limit else f"**{most:.1e}**"

    lines = []
    for (_, stage, processes, device, dtype), ways in sorted(found.items()):
        limit = limits[dtype]
        steps = [cell([ways[w]["step"]] if w in ways else [], limit) for w in WAYS]
        losses = cell([row["loss"] for row in ways.values() if stage != "spread"], limit)
        beside = cell([row["beside"] for row in ways.values() if "beside" in row], limit)
        lines.append([stage, str(processes), device, dtype, f"{limit:g}", losses, *steps, beside])
    head = ["stage", "processes", "each on", "type", "at most", "loss", *WAYS, "beside"]
    dates = ", ".join(sorted({f.date[:10] for f in own}))
    return f"The built-in model, {dates}.\n\n{table(head, lines)}"


COST = "GPU-s a million tokens"
PANELS = ("tokens/s", COST, "rollouts/s", "waiting, %", "GB a GPU")
"""Of the figure; those of which nothing was measured are left out."""


def figure(files: Sequence[ResultFile], path: Path) -> None:
    """Rates, cost, waiting and memory against the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = Results(files, (*KINDS, "scaling"))
    series: dict[str, list[tuple[str, str, list[int], list[float]]]] = {}
    for name, part, growth in WORK:
        rows = of_work(found, part, growth)
        values: dict[str, Callable[[Row], float | None]] = {
            "waiting, %": _waiting,
            "GB a GPU": lambda r: r["peak_gb"],
        }
        if part == "grpo":
            values["rollouts/s"] = rate
        else:
            values |= {"tokens/s": rate, COST: lambda r: 1e6 * r["processes"] / rate(r)}
        for label, value in values.items():
            known = [(r["processes"], v) for r in rows if (v := value(r)) is not None]
            if known:
                counts, heights = (list(x) for x in zip(*known, strict=True))
                series.setdefault(label, []).append((name, growth, counts, heights))
    shown = [label for label in PANELS if label in series]
    columns, count = 2, len(shown) // 2 + 1  # with a place for the legend
    drawn, axes = plt.subplots(
        count, columns, figsize=(4.2 * columns, 2.9 * count), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    colours = {name: f"C{i}" for i, (name, _, _) in enumerate(WORK)}
    handles: dict[str, Any] = {}
    for axis, label in zip(axes.flat, shown, strict=False):
        for name, growth, counts, heights in series[label]:
            style = "-" if growth == "weak" else "--"
            (handles[name],) = axis.plot(counts, heights, style, marker="o", color=colours[name])
        ticks = sorted({n for _, _, counts, _ in series[label] for n in counts})
        top = max(height for *_, heights in series[label] for height in heights)
        axis.set(xlabel="GPUs", ylabel=label, ylim=(0, 1.1 * top or 1), xscale="log")
        axis.set_xticks(ticks, [str(n) for n in ticks], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes.flat[len(shown)].legend(list(handles.values()), list(handles), loc="center")
    drawn.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(drawn)


def _waiting(row: Row) -> float | None:
    return 100 * row["waiting"] if "waiting" in row else None


def sections(files: Sequence[ResultFile]) -> dict[tuple[str, str], str]:
    """What stands between each pair of markers."""
    known = figures(files)
    shown = NOTHING if known is None else plan(known) + check(files, known)
    return {MEASURED: measured(files), EQUAL: equal(files), PLAN: shown}


def main(arguments: Sequence[str] | None = None) -> int:
    paths, files, only_shown = asked(__doc__, arguments)
    made = sections(files)
    if only_shown:
        print("\n\n".join(made.values()))
        return 0
    text = DOCUMENT.read_text(encoding="utf-8")
    for where, content in made.items():
        text = inserted(text, content, str(DOCUMENT), where)
    if made[MEASURED] != NOTHING:
        figure(files, paths[0].with_name(FIGURE))
    DOCUMENT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
