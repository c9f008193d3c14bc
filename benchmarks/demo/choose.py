"""Asks base and CLEAR about the page's first samples, and records what became of each: the page's gallery is chosen from it.

    python benchmarks/demo/choose.py

Every sample is degraded at high severity by the corruption that it draws, and asked its own question with seed 0, as on the
page. Which rows the gallery shows is the rule `clear_adapters.ui.samples.choose`; no picture is picked by hand.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from clear_adapters import attach, degrade
from clear_adapters.cli_options import ADAPTER, MODEL
from clear_adapters.results import ResultFile
from clear_adapters.ui.samples import PAGE_DATA, SET, SEVERITY, choose, draw_sample, outcome

THREADS = 1
BATCH = 20


def measure(count: int) -> dict[str, Any]:
    """Asks about samples 0 to `count` - 1.

    Returns:
        The payload: a row a sample.
    """
    torch.set_num_threads(THREADS)
    model = attach(MODEL, ADAPTER, device="cpu")
    rows: list[dict[str, Any]] = []
    for start in range(0, count, BATCH):
        samples = [draw_sample(i) for i in range(start, min(count, start + BATCH))]
        seen = [degrade(s.clean, s.degradation, severity=SEVERITY, seed=s.seed) for s in samples]
        questions = [s.suggestions[0].text for s in samples]
        with model.disabled():
            plain = model.answer(seen, questions)
        skilled = model.answer(seen, questions)
        for sample, before, after in zip(samples, plain, skilled, strict=True):
            own = sample.suggestions[0]
            base, clear = own.is_right(before.text.strip()), own.is_right(after.text.strip())
            rows.append(
                {
                    "index": sample.index,
                    "kind": own.kind,
                    "degradation": sample.degradation,
                    "base": base,
                    "clear": clear,
                    "restored": after.restored,
                    "outcome": outcome(base, clear, after.restored),
                }
            )
        print(f"{len(rows)} of {count}", file=sys.stderr)
    counts = dict(sorted(Counter(r["outcome"] for r in rows).items()))
    return {
        "set": SET,
        "severity": SEVERITY,
        "model": MODEL,
        "adapter": ADAPTER,
        "counts": counts,
        "rows": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--output", type=Path, default=PAGE_DATA / "examples.json")
    args = parser.parse_args()
    began = time.perf_counter()
    payload = measure(args.count)
    device = f"CPU, {THREADS} thread, float32"
    ResultFile.collect("demo_examples", payload, device=device, seeds=[0]).write(args.output)
    print(
        payload["counts"],
        [(r["index"], r["outcome"], r["kind"], r["degradation"]) for r in choose(payload["rows"])],
    )
    print(f"{time.perf_counter() - began:.0f} s: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
