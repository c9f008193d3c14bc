"""Seconds of loading a checkpoint that is not in memory yet, beside those of reading its files and doing nothing with them.

    python benchmarks/speed/loading.py --output benchmarks/results/speed/loading.json
    python benchmarks/speed/loading.py --size tiny --device cpu --output runs/loading.json          (seconds, anywhere)

A checkpoint of BAGEL-7B's shapes with random weights is written to `--folder` (29 GB; `--layers 4` writes 7 GB), and the system
is told to forget it before every reading. Where weights stay mapped files, as on a CPU in the stored type, each page is
touched. That no second copy is made is a test (tests/test_speed.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from shapes import build

from clear_adapters.backbones.bagel.checkpoint import load_checkpoint, save_checkpoint
from clear_adapters.results import ResultFile

BLOCK = 16 << 20
PAGE = 4096


def forget(folder: Path) -> None:
    """Lets the system drop the files from its memory."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> None:
    """All bytes, one after the other."""
    block = bytearray(BLOCK)
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(block):
                pass


def load(folder: Path, device: torch.device) -> None:
    """The network, whole and in its place."""
    for part in load_checkpoint(folder, None, device):
        for parameter in part.parameters():
            if device.type == "cpu":
                parameter.data.view(torch.uint8).flatten()[::PAGE].sum()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(work: Callable[[], None], folder: Path) -> float:
    """Seconds of some work on files that are not in memory."""
    forget(folder)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", choices=("7b", "small", "tiny"), default="7b")
    parser.add_argument("--layers", type=int, help="of the language model; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is written; one for temporary files by default"
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        made = build(args.size, torch.device("cpu"), torch.bfloat16, layers=args.layers)
        save_checkpoint(folder, made.model, made.autoencoder, made.tokenizer)
        del made
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        seconds: dict[str, list[float]] = {"read": [], "load": []}
        for _ in range(args.repeats):  # in turn, since a disk's rate drifts
            seconds["read"].append(timed(lambda: read(folder), folder))
            seconds["load"].append(timed(lambda: load(folder, device), folder))
    payload: dict[str, Any] = {"size": args.size, "layers": args.layers, "bytes": size, "runs": seconds}
    payload |= {what: statistics.median(own) for what, own in seconds.items()}
    rates = {what: size / 1e9 / payload[what] for what in seconds}
    print(
        f"{size / 1e9:.1f} GB: "
        + ", ".join(f"{w} {payload[w]:.1f} s, {r:.2f} GB/s" for w, r in rates.items())
    )
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    command = f"loading.py --size {args.size}" + (f" --layers {args.layers}" if args.layers else "")
    ResultFile.collect(
        "loading", payload, device=device_name, seeds=(0,), command=command, packages=("safetensors",)
    ).write(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
