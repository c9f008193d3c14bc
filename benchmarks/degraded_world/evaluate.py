r"""Measures base, direct tuning and CLEAR on held-out degraded scenes; one command, one result file.

    python benchmarks/degraded_world/evaluate.py --model builtin:bagel-tiny \
        --adapters direct=runs/table/direct0,runs/table/direct1 clear=runs/table/clear0,runs/table/clear1 \
        --output benchmarks/results/degraded_world.json --cache runs/heldout

Every finished cell (one system under one condition with one adapter) is written at once, so a run that is cut off
goes on where it was. `--systems`, `--conditions`, `--runs` and `--limit` choose a part; several parts may run side by
side, each with its own --output, and `--merge` takes them over. report.py makes table and figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

from heldout import CONDITIONS, HeldOut, build, training_statistics
from systems import BY_NAME, FAMILIES, SYSTEMS, Settings, System, load, read_signs, run_cell

from clear_adapters.errors import ClearError, ClearValueError, unknown_name
from clear_adapters.hub.scores import folder_digest
from clear_adapters.results import ResultFile, read_result

if TYPE_CHECKING:
    from clear_adapters.adapter import AttachedModel
    from clear_adapters.engine import Reply

KIND = "degraded_world"


@dataclass(frozen=True)
class Job:
    """One cell to be measured.

    Attributes:
        system: which.
        condition: under which.
        run: number of the adapter.
        adapter: its folder or name; None for the base.
    """

    system: System
    condition: str
    run: int
    adapter: str | None

    @property
    def key(self) -> str:
        """Its name in the result file."""
        return f"{self.system.name}/{self.condition}/{self.run}"

    @property
    def measures_pictures(self) -> bool:
        """Whether its restorations are measured too."""
        return self.system.pictures and self.condition == "high" and self.run == 0


@dataclass
class Record:
    """The result file as it grows.

    Attributes:
        path: where it is.
        payload: what is in it.
        device: in words.
    """

    path: Path
    payload: dict[str, Any]
    device: str

    def write(self) -> None:
        """Writes it whole, with the training seeds of all its cells."""
        adapters = [c["adapter"] for c in self.payload["cells"].values() if c["adapter"] is not None]
        seeds = sorted({a["seed"] for a in adapters if a["seed"] is not None})
        ResultFile.collect(
            KIND, self.payload, device=self.device, seeds=seeds, packages=["scikit-image"]
        ).write(self.path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="builtin:bagel-tiny", help="the base: builtin:NAME, folder or Hub id")
    p.add_argument(
        "--adapters",
        nargs="+",
        default=[],
        metavar="FAMILY=A,B",
        help="adapters of a family, one a training seed; families are " + ", ".join(FAMILIES),
    )
    p.add_argument("--output", type=Path, default=Path("runs/degraded_world.json"))
    p.add_argument("--cache", type=Path, help="folder that keeps the pictures for the next run")
    p.add_argument("--systems", help="comma-separated, of " + ", ".join(BY_NAME))
    p.add_argument("--conditions", help="comma-separated, of " + ", ".join(CONDITIONS))
    p.add_argument("--runs", help="comma-separated numbers of adapters: 0 is the first of each family")
    p.add_argument(
        "--merge",
        nargs="*",
        default=[],
        type=Path,
        metavar="FILE",
        help="take the cells of these results over",
    )
    p.add_argument("--only-merge", action="store_true", help="take cells over and measure nothing")
    p.add_argument("--limit", type=int, default=1000, metavar="N", help="questions")
    p.add_argument("--seed", type=int, default=0, help="of the held-out set")
    p.add_argument("--seconds", type=float, help="begin no cell that would end after this")
    p.add_argument("--device", help="cuda or cpu; the GPU if there is one")
    p.add_argument("--dtype", help="float32, bfloat16; as stored on a GPU, float32 on a CPU")
    p.add_argument("--batch-size", type=int, help="rows at a time; 512 on a GPU, 32 on a CPU")
    p.add_argument("--workers", type=int, default=0, help="processes that make pictures; 0 is one a core")
    p.add_argument("--plain-tokens", type=int, default=48, help="longest plain answer")
    p.add_argument("--clear-tokens", type=int, help="longest turn under the protocol; the adapter's own")
    p.add_argument("--steps", type=int, help="points of the flow schedule; the adapter's own")
    p.add_argument("--answers", type=Path, metavar="FOLDER", help="also write every reply, one file a cell")
    p.add_argument("--fresh", action="store_true", help="ignore an earlier result file")
    return p.parse_args(arguments)


def chosen(text: str | None, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """A comma-separated choice, checked."""
    if text is None:
        return known
    names = tuple(n.strip() for n in text.split(",") if n.strip())
    for name in names:
        if name not in known:
            raise unknown_name(what, name, known)
    return tuple(n for n in known if n in names)


def families(given: list[str]) -> dict[str | None, list[str | None]]:
    """The adapters of each family, and none for the base, in the order of tables.

    Raises:
        ClearValueError: an unreadable argument.
        UnknownNameError: an unknown family.
    """
    found: dict[str, list[str | None]] = {}
    for text in given:
        name, equals, paths = text.partition("=")
        if name not in FAMILIES and equals:
            raise unknown_name("family", name, FAMILIES)
        if not equals or not paths or name in found:
            raise ClearValueError(f"--adapters {text}: give each family once, as FAMILY=ADAPTER,ADAPTER")
        found[name] = [path for path in paths.split(",") if path]
    return {None: [None]} | {name: found[name] for name in FAMILIES if name in found}


def plan(args: argparse.Namespace) -> list[Job]:
    """All cells, those of the first adapters first; one model is loaded for neighbours."""
    systems = [BY_NAME[n] for n in chosen(args.systems, tuple(BY_NAME), "system")]
    conditions = chosen(args.conditions, CONDITIONS, "condition")
    adapters = families(args.adapters)
    jobs = []
    numbers = tuple(str(n) for n in range(max(1, *map(len, adapters.values()))))
    for run in map(int, chosen(args.runs, numbers, "run")):
        # One adapter after the other, so that each is loaded once.
        for family, own in adapters.items():
            for system in (s for s in systems if s.family == family):
                if run < (len(own) if system.every_seed else min(1, len(own))):
                    jobs += [Job(system, c, run, own[run]) for c in conditions if c in system.conditions]
    if not jobs:
        raise ClearValueError(
            "nothing to measure: pass --adapters FAMILY=ADAPTER for the systems, or choose other systems"
        )
    return jobs


def identity(name: str, kind: str) -> dict[str, Any]:
    """What a result file says about a model or an adapter: its name, hash, stage and seed, no path."""
    from clear_adapters import store

    folder = store.resolve(name, kind)  # type: ignore[arg-type]
    facts: dict[str, Any] = {
        "name": name if name.startswith("builtin:") else folder.resolve().name,
        "digest": folder_digest(folder),
    }
    if kind == "adapter":
        config = store.read_adapter(folder).config
        facts |= {"stage": config.stage, "seed": config.provenance.get("seed")}
    return facts


def open_record(args: argparse.Namespace, facts: dict[str, Any], device: str) -> Record:
    """An earlier result file of the same set and model to go on with, or an empty one."""
    asked = {"plain_tokens": args.plain_tokens, "clear_tokens": args.clear_tokens, "steps": args.steps}
    payload: dict[str, Any] = {
        "set": facts,
        "model": identity(args.model, "model"),
        "asked": asked,
        "cells": {},
    }
    earlier = [args.output] if args.output.is_file() and not args.fresh else []
    for path in [*earlier, *args.merge]:
        before = read_result(path)
        for name in ("set", "model", "asked"):
            old, new = before.payload.get(name, {}), payload[name]
            if before.kind != KIND or any(old.get(k) != v for k, v in new.items() if k != "name"):
                raise ClearValueError(
                    f"{path} was measured with another {name!r}: choose another --output, pass --fresh to replace it, "
                    "or leave it out of --merge"
                )
        both = {"cells": payload["cells"] | before.payload["cells"]}
        if "restorations" in before.payload:
            old = payload.get("restorations", {})
            both["restorations"] = {
                part: old.get(part, {}) | found for part, found in before.payload["restorations"].items()
            }
        payload = payload | before.payload | both
    return Record(args.output, payload, device)


def describe_device(args: argparse.Namespace) -> tuple[str, str]:
    """The device and its name in words."""
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    words = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return device, f"{words}, {args.dtype or ('float32' if device == 'cpu' else 'stored type')}"


def measure_pictures(
    model: AttachedModel,
    system: System,
    settings: Settings,
    data: HeldOut,
    replies: list[Reply],
    args: argparse.Namespace,
    before: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Restorations of the replies against the clean scenes, beside ways that were measured before; also draws their sheet.

    Returns:
        `ways` and `signs`, with what was restored under the system's name.
    """
    import numpy as np
    from restorers import measure
    from sheet import draw_sheet

    pictures = [r.restored_image for r in replies]
    found = [p for p in pictures if p is not None]
    if len(found) != len(pictures):
        raise ClearValueError(
            f"{len(pictures) - len(found)} of {len(pictures)} replies hold no decodable restoration"
        )
    restored = [np.asarray(p) for p in found]
    ways = measure(data, restored, training_statistics(), args.workers, before.get("ways"))
    sheet = args.output.with_name(f"{args.output.stem}_{system.name}.jpg")
    draw_sheet(data, restored, ways, sheet)
    signs = read_signs(model, settings, data, found)
    return {
        "ways": {system.name if w == "restored" else w: values for w, values in ways.items()},
        "signs": {system.name if w == "restored" else w: values for w, values in signs.items()},
    }


def run(args: argparse.Namespace) -> Record:
    """Measures what is asked for and not yet in the result file."""
    began = time.perf_counter()
    jobs = [] if args.only_merge else plan(args)
    needed = {"clean"} | {j.condition for j in jobs} if jobs else set()
    if any(j.measures_pictures for j in jobs):
        needed.add("high")
    data = build(
        args.limit,
        seed=args.seed,
        conditions=[c for c in CONDITIONS if c in needed],
        cache=args.cache,
        workers=args.workers,
    )
    device, words = describe_device(args)
    if args.only_merge:
        words = ", ".join(dict.fromkeys(read_result(path).device for path in args.merge))
    print(f"{len(data.items)} questions ready after {time.perf_counter() - began:.0f} s; {words}", flush=True)
    settings = Settings(
        model=args.model,
        device=device,
        dtype=args.dtype,
        batch_size=args.batch_size or (32 if device == "cpu" else 512),
        plain_tokens=args.plain_tokens,
        clear_tokens=args.clear_tokens,
        steps=args.steps,
    )
    record = open_record(args, data.facts(), words)
    if args.merge:
        record.write()
    took: dict[tuple[bool, str], float] = {}
    for job, model, adapter in with_models(jobs, record, settings):
        kind = (job.system.plain, job.system.restore)
        elapsed = time.perf_counter() - began
        if args.seconds is not None and elapsed + took.get(kind, 0.0) > args.seconds:
            print(f"stopped before {job.key}: {elapsed:.0f} s of {args.seconds:.0f} are used", flush=True)
            break
        cell, replies = run_cell(model, job.system, job.condition, settings, data)
        if job.measures_pictures:
            known = record.payload.setdefault("restorations", {})
            for part, found in measure_pictures(
                model, job.system, settings, data, replies, args, known
            ).items():
                known[part] = known.get(part, {}) | found
        record.payload["cells"][job.key] = cell | {"run": job.run, "adapter": adapter}
        record.write()
        if args.answers is not None:
            write_answers(args.answers / f"{job.key.replace('/', '_')}.json", data, replies)
        took[kind] = max(took.get(kind, 0.0), time.perf_counter() - began - elapsed)
        share = cell["correct"].count("1") / len(data.items)
        extra = (
            f", restored {cell['restored'].count('1') / len(data.items):.1%}" if "restored" in cell else ""
        )
        print(
            f"{job.key:26s} {share:6.1%} right{extra}, {cell['seconds_per_question'] * 1e3:.1f} ms each",
            flush=True,
        )
    return record


def with_models(
    jobs: list[Job], record: Record, settings: Settings
) -> Iterator[tuple[Job, AttachedModel, dict[str, Any] | None]]:
    """The cells that are missing, or of another adapter, each with its model; neighbours share one."""
    names = {j.adapter for j in jobs if j.adapter is not None}
    known = {name: identity(name, "adapter") for name in sorted(names)}
    loaded: tuple[str | None, AttachedModel] | None = None
    for job in jobs:
        facts = None if job.adapter is None else known[job.adapter]
        cell = record.payload["cells"].get(job.key)
        pictures = record.payload.get("restorations", {}).get("ways", {})
        complete = job.system.name in pictures or not job.measures_pictures
        if cell is not None and cell["adapter"] == facts and complete:
            print(f"{job.key:26s} is there already", flush=True)
            continue
        if loaded is None or loaded[0] != job.adapter:
            loaded = (job.adapter, load(settings, job.adapter))
        yield job, loaded[1], facts


def write_answers(path: Path, data: HeldOut, replies: list[Reply]) -> None:
    """Every question with its truth and reply."""
    rows = [
        {
            "kind": i.kind,
            "degradation": i.degradation,
            "question": i.text,
            "truth": i.truth,
            "answer": r.text,
            "right": i.score(r.text),
            "written": r.transcript.reply,
        }
        for i, r in zip(data.items, replies, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Runs, and tells in one line what the library refuses."""
    try:
        record = run(parse(arguments))
    except ClearError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(record.payload['cells'])} cells in {record.path} ({len(SYSTEMS)} systems are known)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
