"""Small files in VLMEvalKit's form, as the base benchmarks have them: columns, circular rotations, pointers, pairs."""

import base64
import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image

from clear_adapters.mmd_bench.tasks import CLEAN, get_task


def picture(seed: int, size=(64, 56), kind="JPEG", mode="RGB") -> str:
    """A small picture with some structure, as base64 text."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (7, 8, 3), dtype=np.uint8))
    encoded = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(encoded, kind)
    return base64.b64encode(encoded.getvalue()).decode("ascii")


def write(path: Path, columns: list[str], rows: list[list[str]]) -> Path:
    """The table as pandas writes one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    return path


CHOICE = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "l2-category",
    "split",
]


def mmbench(groups: int = 3) -> tuple[list[str], list[list[str]]]:
    """Circular: every rotation after the first points at the first one's picture."""
    rows = []
    options = ["red", "green", "dark blue", "no\ncolour"]
    for rotation in range(4):
        for group in range(groups):
            index = group + 1 + rotation * 1_000_000
            turned = options[rotation:] + options[:rotation]
            answer = "ABCD"[turned.index(options[group % 4])]
            image = picture(group) if rotation == 0 else str(group + 1)
            hint = "Look at the\ttop." if group == 1 else ""
            question = f'Which colour is "thing" {group}?'
            rows.append([str(index), question, hint, *turned, answer, "colour", image, "fine", "dev"])
    return CHOICE, rows


def choice(n: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    rows = []
    for i in range(n):
        extra = ["", ""] if i % 3 == 2 else ["four", "five"]
        rows.append(
            [
                str(i),
                f"How many, picture {i}?",
                "",
                "two",
                "three",
                *extra,
                "AB"[i % 2],
                "count",
                picture(seed + i),
                "x",
                "val",
            ]
        )
    return CHOICE, rows


def mmvp(pairs: int = 3) -> tuple[list[str], list[list[str]]]:
    rows = []
    for i in range(2 * pairs):
        rows.append(
            [str(i + 1), f"Is the door open, {i // 2}?", "Open", "Closed", "AB"[i % 2], picture(50 + i)]
        )
    return ["index", "question", "A", "B", "answer", "image"], rows


def cvbench(n: int = 8) -> tuple[list[str], list[list[str]]]:
    columns = [
        "index",
        "image",
        "question",
        "prompt",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "source",
        "split",
    ]
    rows = []
    for i in range(n):
        prompt = f"How many cups are in image {i}? Select from the following choices.\n(A) 1\n(B) 2\n(C) 0"
        source = "ADE20K" if i < 3 else "COCO"
        rows.append(
            [
                str(i),
                picture(90 + i),
                f"How many cups {i}?",
                prompt,
                "1",
                "2",
                "0",
                "",
                f"({'ABC'[i % 3]})",
                "Count",
                source,
                "2D",
            ]
        )
    return columns, rows


def mmvet(n: int = 5) -> tuple[list[str], list[list[str]]]:
    truths = ["-1 <AND> -5", "red<OR>crimson", "a long tale", "7", "the left one"]
    rows = [[str(i), picture(120 + i), f"What is x, {i}?", truths[i % 5], "ocr,math"] for i in range(n)]
    return ["index", "image", "question", "answer", "category"], rows


TABLES = {
    "mmbench": mmbench,
    "mmvet": mmvet,
    "mmvp": mmvp,
    "cvbench2d": cvbench,
    "mmstar": lambda: choice(9),
    "realworldqa": lambda: choice(6, 20),
    "rbench": lambda: choice(5, 40),
}


def base_folder(folder: Path, names=tuple(TABLES)) -> Path:
    """A folder with the base files of some tasks."""
    for name in names:
        columns, rows = TABLES[name]()
        write(folder / get_task(name).file_name(CLEAN), columns, rows)
    return folder
