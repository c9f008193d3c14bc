"""The built-in benchmark's small subset on a CPU: base and CLEAR, clean and high, 200 questions each, under five minutes.

    python benchmarks/miniature/measure.py --output benchmarks/results/miniature.json

A test runs it again and compares answer for answer, so the file is to be written anew whenever the built-in model or
adapter changes. It is what `clear-adapters bench run --limit 200 --batch-size 40 --device cpu` gives, with the answers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from clear_adapters.mmd_bench.command import run_command
from clear_adapters.results import ResultFile

QUESTIONS = 200
BATCH = 40
THREADS = 1
"""Of the measurement and of the test: sums of another number of threads may round differently."""

CLOCKED = frozenset({"seconds_per_question", "seconds", "cpu_seconds"})
"""What differs from one run to the next."""


def timeless(value: Any) -> Any:
    """A payload without what a clock gave."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCKED}
    return value


def measure(folder: Path, report: Any = print, questions: int = QUESTIONS) -> dict[str, Any]:
    """Runs the subset.

    Args:
        folder: where the run goes.
        report: told what is left out.
        questions: so many of its first ones.

    Returns:
        The run's payload, with `answers` by cell, the `seconds` that it took and the `cpu_seconds` of its one core.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    began, worked = time.perf_counter(), time.process_time()
    try:
        result = run_command(
            folder,
            model=None,
            adapter="builtin:clear-bagel-tiny",
            data=["builtin:miniature"],
            tasks=["miniature"],
            severities=["clean", "high"],
            protocols=["mixed"],
            systems=["base", "clear"],
            limit=questions,
            batch_size=BATCH,
            seed=0,
            max_new_tokens=None,
            steps=None,
            skip_bad=False,
            skip_missing=False,
            judge=None,
            device="cpu",
            dtype=None,
            revision=None,
            report=report,
        )
    finally:
        torch.set_num_threads(before)
    answers: dict[str, list[str]] = {}
    for cell in result.payload["cells"]:
        text = (folder / "answers" / f"{cell}.jsonl").read_text(encoding="utf-8")
        answers[cell] = [json.loads(line)["answer"] for line in text.split("\n") if line]
    clocks = {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
    }
    return {**result.payload, "answers": answers, **clocks}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/miniature.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        payload = measure(Path(temporary))
    # Without arguments, which are places on a disk.
    device = f"CPU, {THREADS} thread, float32"
    ResultFile.collect("miniature", payload, device=device, seeds=[0], command="measure.py").write(
        args.output
    )
    for name, cell in payload["cells"].items():
        found = cell["metrics"]["accuracy"]
        print(f"{name:28s} {found['value']:5.1f} % of {found['n']}, restored {cell['restored']}")
    print(f"{payload['seconds']:.0f} s, {payload['cpu_seconds']:.0f} s of one core: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
