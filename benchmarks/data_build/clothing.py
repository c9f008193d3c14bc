"""Training data from 1,260 real photographs, end to end, by templates and by a teacher that fails in every way.

    python benchmarks/data_build/clothing.py FOLDER --output benchmarks/results/data_build.json

FOLDER is the clothing dataset (see questions.py). Photographs of one sender stay in one split. Two runs with templates use
different numbers of processes, and their files must be the same. The teacher is a scripted one on this machine that speaks
the real protocol, so its numbers say how faults are dealt with and nothing about a model. At the end stage 1 takes a few
steps on both results, with the recipe `tiny`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from questions import write_rows
from service import LATE, scripted

from clear_adapters.datasets.audit import audit
from clear_adapters.datasets.builder.assembly import MANIFEST, REJECTED, Helpers
from clear_adapters.datasets.builder.build import build
from clear_adapters.datasets.builder.plan import FILES, Plan
from clear_adapters.datasets.builder.teachers import EndpointTeacher
from clear_adapters.endpoint import Endpoint
from clear_adapters.results import ResultFile

COUNTED = (
    "read",
    "not_sampled",
    "rejected",
    "rows",
    "pictures",
    "pathways",
    "severities",
    "corruptions",
    "teacher",
)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a data set, and one of all its pictures."""
    found = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in (*FILES.values(), MANIFEST, REJECTED)
    }
    pictures = hashlib.sha256()
    for path in sorted((folder / "images").rglob("*.*")):
        pictures.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return {**found, "images": pictures.hexdigest()}


def made(rows: Path, photographs: Path, folder: Path, plan: Plan, helpers: Helpers) -> dict[str, Any]:
    """One build, checked."""
    began = time.perf_counter()
    summary = build(rows, folder, plan, pictures=photographs, helpers=helpers)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    problems = [str(f.problem) for f in audit(folder).findings]
    lost = sum(sum(reasons.values()) for reasons in summary["rejected"].values())
    return {
        **{key: summary[key] for key in COUNTED},
        "adds_up": summary["read"] == summary["not_sampled"] + lost + sum(summary["rows"].values()),
        "sha256": digests(folder),
        "seconds": round(seconds, 1),
        "check": {"problems": problems, "seconds": round(time.perf_counter() - began, 1)},
    }


def senders_shared(rows: Path, folder: Path) -> int:
    """Senders whose photographs stand in more than one split."""
    groups = {r["id"]: r["group"] for r in map(json.loads, rows.read_text().splitlines())}
    where: dict[str, set[str]] = {}
    for name in FILES.values():
        for line in (folder / name).read_text().splitlines():
            where.setdefault(groups[json.loads(line)["id"]], set()).add(name)
    return sum(len(files) > 1 for files in where.values())


def senders_of(rows: Path, folder: Path) -> int:
    """Senders of the photographs that were used. Those that share near-duplicates are fewer groups."""
    made = (json.loads(line) for line in (folder / MANIFEST).read_text().splitlines())
    used = {record["source"] for record in made if "rejected" not in record}
    return len({r["group"] for r in map(json.loads, rows.read_text().splitlines()) if r["image"] in used})


def stage_1(data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """A few steps of stage 1 with the recipe `tiny`, and their losses."""
    from clear_adapters.training.run import train

    began = time.perf_counter()
    overrides = [f"loop.steps={steps}", "loop.batch=4", "loop.log_every=1", "optim.warmup=1"]
    adapter = train("tiny", data, folder / "adapter", stage="sft", device="cpu", overrides=overrides)
    log = [json.loads(line) for line in (folder / "adapter.training" / "log.jsonl").read_text().splitlines()]
    return {
        "steps": steps,
        "log": [{k: entry[k] for k in ("step", "loss", "ce", "mse")} for entry in log if "loss" in entry],
        "adapter_files": sorted(p.name for p in Path(adapter).iterdir()),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/data_build.json"))
    parser.add_argument("--keep", type=Path, help="Folder for the data sets; a temporary one by default.")
    parser.add_argument("--limit", type=int, help="Rows; all by default.")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        place = args.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        rows = place / "questions.jsonl"
        photographs = args.folder / "images"
        payload: dict[str, Any] = {"questions": write_rows(args.folder, rows)}
        # Half the pictures are at high, so that hardly a row is lost to a ratio of 1 to 1.
        plan = Plan(restore_from="high", limit=args.limit)
        for name, workers in (("template", 2), ("template_again", 1)):
            payload[name] = made(
                rows, photographs, place / name, plan, Helpers(workers=workers, progress=False)
            )
            payload[name]["workers"] = workers
            print(name, payload[name]["rows"], payload[name]["seconds"], "s", flush=True)
        payload["same_files"] = payload["template"]["sha256"] == payload["template_again"]["sha256"]
        payload["senders"] = senders_of(rows, place / "template")
        payload["senders_in_two_splits"] = senders_shared(rows, place / "template")
        with scripted() as (service, script):
            endpoint = Endpoint(service.url, "scripted", timeout=LATE / 2, retries=1, concurrency=8)
            payload["teacher"] = made(
                rows,
                photographs,
                place / "teacher",
                Plan(restore_from="high", limit=args.limit, writer="teacher"),
                Helpers(
                    teacher=EndpointTeacher(endpoint, side=64),
                    leave_unanswered=True,
                    workers=2,
                    progress=False,
                    report=print,
                ),
            )
            payload["teacher"]["served"] = dict(sorted(script.served.items()))
            payload["teacher"]["answered_again"] = sum(count - 1 for digest, count in script.paid.items())
        print("teacher", payload["teacher"]["rows"], payload["teacher"]["teacher"], flush=True)
        for name in ("template", "teacher"):
            payload[f"stage_1_on_{name}"] = stage_1(place / name, place / f"{name}-run", args.steps)
            print("stage 1 on", name, payload[f"stage_1_on_{name}"]["log"][-1], flush=True)
    ResultFile.collect(
        "data_build", payload, device="CPU, 2 shared cores", seeds=[0], command="clothing.py"
    ).write(args.output)
    problems = Counter(len(payload[n]["check"]["problems"]) for n in ("template", "teacher"))
    print(f"same files: {payload['same_files']}; problems found: {dict(problems)}; {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
