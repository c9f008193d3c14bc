r"""How much of a restoration an adapter reads: cross-entropy of the reply after true clean latents and after its own.

    clear-adapters data world --output runs/reading-data --split heldout --examples 400 --questions-per-scene 1
    python benchmarks/degraded_world/reading.py --data runs/reading-data --adapters builtin:clear-bagel-tiny runs/a2 \
        --output benchmarks/results/reading.json
    python benchmarks/degraded_world/reading.py --table benchmarks/results/reading.json

The second puts the table between its markers in benchmarks/README.md.

Far more precise than right answers, and quick on a CPU. Equal numbers mean that the latent is not read at all; a lower one
after true latents alone, that the model trusts what it will not be given. Rows are highly degraded pictures that a trace
would restore; the understanding tokens of the degraded picture stay in view.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from readme import inserted, markers

from clear_adapters import attach, store
from clear_adapters.attached import AttachedModel
from clear_adapters.datasets import read_examples
from clear_adapters.datasets.example import Example
from clear_adapters.datasets.traces import TraceSettings
from clear_adapters.errors import ClearError, ClearValueError
from clear_adapters.mmd_bench.tables import table
from clear_adapters.results import ResultFile, read_result
from clear_adapters.training.bridge import BridgeObjective, BridgeSettings
from clear_adapters.training.objective import Draw

KIND = "reading"
MARKERS = markers("reading")
README = Path(__file__).parents[1] / "README.md"
BELOW = 20.0
SOURCES = {"true": 0.0, "own": 1.0}


def rows_of(data: Path, limit: int) -> list[Example]:
    """Highly degraded examples that the recipes' traces restore."""
    found = [e for e in read_examples(data) if e.severity == "high" and e.psnr is not None and e.psnr < BELOW]
    if len(found) < limit:
        raise ClearValueError(
            f"{data} has {len(found)} highly degraded rows below {BELOW:g} dB, and {limit} were asked for: lower --limit, "
            "or build more examples"
        )
    return found[:limit]


@torch.no_grad()
def read(model: AttachedModel, rows: list[Example], own: float, batch_size: int) -> dict[str, float]:
    """Cross-entropy in nats a token, and the share of rows whose tokens are all the likeliest ones."""
    settings = BridgeSettings(
        own=own,
        estimate=0.0,
        own_steps=model.config.latent.steps,
        vit_drop=0.0,
        distill="none",
        traces=TraceSettings(restore_below=BELOW, explore=0.0, declined=0.0, always=0.0),
    )
    objective = BridgeObjective(model.backbone, model.config.protocol, settings, model.config.latent)
    total, tokens, right = 0.0, 0, 0.0
    for at in range(0, len(rows), batch_size):
        draws = [Draw(e, 0, at + i) for i, e in enumerate(rows[at : at + batch_size])]
        (batch,) = objective.prepare([objective.collate(draws)])
        packed = batch["batch"]
        logits = model.module(packed).text_logits.float()
        total += float(F.cross_entropy(logits, packed.text_targets, reduction="sum"))
        tokens += len(packed.text_targets)
        likeliest = (logits.argmax(-1) == packed.text_targets).float()
        right += float(
            torch.ones(len(draws), device=likeliest.device)
            .scatter_reduce(0, packed.text_row, likeliest, "amin")
            .sum()
        )
    return {"cross_entropy": round(total / tokens, 5), "whole_rows": round(right / len(rows), 4)}


@torch.no_grad()
def bridge_lengths(model: AttachedModel, rows: list[Example]) -> dict[str, float]:
    """Mean length of the tokens that the backbone itself would read, and of what the bridge adds to them."""
    if model.bridge is None:
        return {}
    found: dict[str, float] = {}

    def note(module: Any, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        native = given[1].float()
        added = made.float() - native
        found["native"] = round(float(native.norm(dim=-1).mean()), 3)
        found["added"] = round(float(added.norm(dim=-1).mean()), 3)
        found["added_to_all"] = round(float(added.flatten(0, -2).mean(0).norm()), 3)

    hook = model.bridge.register_forward_hook(note)
    try:
        read(model, rows, 0.0, len(rows))
    finally:
        hook.remove()
    return found


def render(result: ResultFile) -> str:
    """The table."""
    p = result.payload
    head = [
        "adapter",
        "steps",
        "true: nats a token",
        "own",
        "true: whole replies, %",
        "own",
        "tokens",
        "added",
    ]
    rows = []
    for own in p["adapters"]:
        values = [f"{own[s]['cross_entropy']:.4f}" for s in SOURCES]
        values += [f"{100 * own[s]['whole_rows']:.0f}" for s in SOURCES]
        lengths = own["bridge"]
        sizes = [f"{lengths[k]:.1f}" if lengths else "–" for k in ("native", "added")]
        rows.append([own["label"], str(own["steps"]), *values, *sizes])
    note = f"{p['n']} highly degraded held-out rows; {result.device.upper()}, float32, {result.date[:10]}."
    return f"{note}\n\n{table(head, rows)}"


def main(arguments: list[str] | None = None) -> int:
    """Measures, and tells in one line what the library refuses."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing: put this result's table in its place"
    )
    p.add_argument("--readme", type=Path, default=README, help="where the table goes")
    p.add_argument("--data", type=Path, help="a held-out data set of the miniature world")
    p.add_argument("--adapters", nargs="+", default=[], metavar="[LABEL=]ADAPTER")
    p.add_argument("--model", default="builtin:bagel-tiny")
    p.add_argument("--output", type=Path, default=Path("runs/reading.json"))
    p.add_argument("--limit", type=int, default=96, metavar="N", help="rows")
    p.add_argument("--batch-size", type=int, default=24)
    p.add_argument("--device", default="cpu")
    args = p.parse_args(arguments)
    found = []
    try:
        if args.table is not None:
            text = inserted(
                args.readme.read_text(encoding="utf-8"),
                render(read_result(args.table)),
                str(args.readme),
                MARKERS,
            )
            args.readme.write_text(text, encoding="utf-8")
            return 0
        if args.data is None or not args.adapters:
            raise ClearValueError("pass --data and --adapters to measure, or --table with a result to show")
        rows = rows_of(args.data, args.limit)
        for text in args.adapters:
            label, equals, name = text.rpartition("=")
            folder = store.resolve(name, "adapter")
            model = attach(args.model, folder, device=args.device, dtype="float32")
            facts = {"label": label if equals else Path(name).name, "stage": model.config.stage}
            facts |= {"steps": model.config.provenance.get("steps")}
            facts |= {source: read(model, rows, own, args.batch_size) for source, own in SOURCES.items()}
            facts["bridge"] = bridge_lengths(model, rows[: args.batch_size])
            found.append(facts)
            print(facts, flush=True)
    except ClearError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    payload = {"n": len(rows), "model": args.model, "adapters": found}
    ResultFile.collect(KIND, payload, device=args.device, seeds=[0]).write(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
