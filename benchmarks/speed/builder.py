"""How many pictures a second the set builder makes, by corruption, beside other libraries.

    python benchmarks/speed/builder.py --pictures-only runs/pictures.npz
    peers/bin/python benchmarks/speed/peers.py runs/pictures.npz --output runs/peers.json      (see there)
    python benchmarks/speed/builder.py --peers runs/peers.json --output benchmarks/results/builder_speed.json
    python benchmarks/speed/builder.py --table benchmarks/results/builder_speed.json      (into benchmarks/README.md)

"formula" is the corruption alone, from array to array; "builder" is the builder's whole way of one picture: base64 and
JPEG decoded, corrupted, encoded again and hashed. Pictures are scenes of 512 x 512 pixels, at high.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from pictures import rate
from readme import inserted, markers

from clear_adapters.degradations import SEVERITIES, apply, list_degradations
from clear_adapters.degradations.catalogue import generator
from clear_adapters.mmd_bench.tables import table
from clear_adapters.results import ResultFile, read_result

SIDE = 512
COUNT = 12


def write_pictures(path: Path) -> Path:
    """Scenes of the miniature world, the same every time."""
    from clear_adapters.world import render, sample_scene

    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [np.asarray(render(sample_scene(i, "heldout"), SIDE)) for i in range(COUNT)]
    np.savez(path, pictures=np.stack(pictures))
    return path


def formula(name: str, picture: np.ndarray) -> np.ndarray:
    """One corruption, from array to array."""
    return apply(name, picture, SEVERITIES["high"], generator(0, name))


def whole_way(folder: str, name: str, picture: np.ndarray) -> Any:
    """One row of a table through the builder; the rows were written beforehand, and the picture tells which."""
    from clear_adapters.mmd_bench.pictures import Recipe, make

    path = Path(folder) / "MMStar.tsv"
    items = _items(str(path))
    return make((path, "MMStar", Recipe(0, (name,)), [items[int(picture[0, 0, 0]) % len(items)]], False))


@functools.cache
def _items(path: str) -> list[Any]:
    from clear_adapters.mmd_bench.pictures import Item
    from clear_adapters.mmd_bench.questions import read_questions
    from clear_adapters.mmd_bench.tasks import get_task

    questions = read_questions(path, get_task("mmstar")).questions
    return [Item(q.index, q.place, q.picture, (q.picture,)) for q in questions]


def write_table(folder: Path, pictures: np.ndarray) -> None:
    """The pictures as a base benchmark's file."""
    import base64

    from clear_adapters.datasets.tsv import format_row
    from clear_adapters.mmd_bench.pictures import encode

    rows = [format_row(["index", "image", "question", "A", "B", "answer"])]
    for i, picture in enumerate(pictures):
        encoded = base64.b64encode(encode(picture)).decode("ascii")
        rows.append(format_row([str(i), encoded, "?", "yes", "no", "A"]))
    (folder / "MMStar.tsv").write_text("".join(rows), encoding="utf-8")


MARKERS = markers("speed")
README = Path(__file__).parents[1] / "README.md"


def render(result: ResultFile) -> str:
    """What stands between the markers of the README: how it was measured, and the table."""
    p = result.payload
    note = f"Pictures a second of {p['processes']} cores, {p['side']} x {p['side']} pixels, {p['severity']} severity, {result.device}, {result.date[:10]}."
    if p["peers"]:
        versions = p["peers"]["versions"]
        named = ", ".join(f"{name} {versions[name]}" for name in ("imagecorruptions", "albumentations"))
        note += f" Beside them {named}: the nearest corruption of each, at its nearest strength."
    return f"{note}\n\n{rates(p)}"


def rates(payload: dict[str, Any]) -> str:
    """The rates as Markdown."""
    head = ["corruption", "formula", "builder", "imagecorruptions", "albumentations"]
    rows = []
    for name in (d.name for d in list_degradations() if d.name in payload["rates"]):
        own = payload["rates"][name]
        peers = payload["peers"]["rates"].get(name, {}) if payload["peers"] else {}
        shown = [
            f"{number(p['rate'])} (`{p['name']}`)" if (p := peers.get(library)) else "–"
            for library in head[3:]
        ]
        rows.append([name, number(own["formula"]), number(own["builder"]), *shown])
    return table(head, rows)


def number(rate: float) -> str:
    """Without decimals, but for what takes seconds."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def insert(result: ResultFile) -> None:
    """Puts the table into the README."""
    text = README.read_text(encoding="utf-8")
    README.write_text(inserted(text, render(result), str(README), MARKERS), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pictures-only", type=Path, metavar="FILE", help="write the pictures for peers.py and leave"
    )
    parser.add_argument("--peers", type=Path, metavar="FILE", help="what peers.py wrote")
    parser.add_argument("--output", type=Path, default=Path("runs/builder_speed.json"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--names", help="comma-separated corruptions; all by default")
    parser.add_argument(
        "--table", type=Path, metavar="RESULT", help="put the table of a result into the README and leave"
    )
    args = parser.parse_args()
    if args.table:
        insert(read_result(args.table))
        return 0
    if args.pictures_only:
        write_pictures(args.pictures_only)
        return 0
    peers = json.loads(args.peers.read_text()) if args.peers else None
    names = args.names.split(",") if args.names else [d.name for d in list_degradations()]
    rates: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        pictures = write_pictures(Path(temporary) / "pictures.npz")
        write_table(Path(temporary), np.load(pictures)["pictures"])
        for name in names:
            alone = rate(partial(formula, name), pictures, args.processes)
            built = rate(partial(whole_way, temporary, name), pictures, args.processes)
            rates[name] = {"formula": round(alone, 1), "builder": round(built, 1)}
            print(f"{name:24s} {alone:8.1f} {built:8.1f} pictures a second", flush=True)
    payload = {"rates": rates, "peers": peers, "side": SIDE, "processes": args.processes, "severity": "high"}
    # Without arguments, which are places on a disk.
    result = ResultFile.collect("builder_speed", payload, device="CPU", seeds=[0], command="builder.py")
    result.write(args.output)
    print(render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
