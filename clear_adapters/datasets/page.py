"""A page that shows rows of a data set: clean, degraded, question, trace, answer, decision. One HTML file, no network."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clear_adapters.datasets.example import Example, read_lines
from clear_adapters.datasets.parts import Parts, read_parts
from clear_adapters.errors import ClearValueError
from clear_adapters.images import ImageLike, data_url, load_image
from clear_adapters.scoring import letter_of, letters_of

SIDE = 320
"""Longest side of the pictures on the page, in pixels."""

TEMPLATE = "page.html"


def write_page(
    data: str | Path,
    output: str | Path,
    *,
    rows: int = 24,
    seed: int = 0,
    clean_image_dir: str | Path | None = None,
    corrupted_image_dir: str | Path | None = None,
) -> Path:
    """Draws rows by seed and shows them in the order of the file.

    Args:
        data: a folder with `data.jsonl`, or a JSONL file.
        output: the HTML file.
        rows: how many are shown.
        seed: which.
        clean_image_dir: of clean pictures, for rows in the authors' form.
        corrupted_image_dir: of degraded ones.

    Returns:
        The file.

    Raises:
        ClearValueError: a row cannot be read; the message names file and line.
        ImageError: a picture cannot be decoded.
    """
    import jinja2

    if rows < 1:
        raise ClearValueError(f"rows={rows}: at least one row is needed")
    found = read_lines(data, clean_image_dir=clean_image_dir, corrupted_image_dir=corrupted_image_dir)
    places = sorted(random.Random(seed).sample(range(len(found)), min(rows, len(found))))
    traces = [_trace(example) for _, example in found]
    shown = [_entry(*found[place], traces[place]) for place in places]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clear_adapters.datasets", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template(TEMPLATE).render(
        title=Path(data).resolve().name,
        rows=shown,
        total=len(found),
        ways=Counter(trace.way for trace in traces).most_common(),
        severities=Counter(e.severity or "clean" for _, e in found).most_common(),
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    return output


@dataclass(frozen=True)
class _Trace:
    """A reply as it is shown: its parts, or what is wrong with it."""

    way: str
    parts: Parts | None = None
    problem: str = ""


def _trace(example: Example) -> _Trace:
    if example.reply is None:
        return _Trace("no trace")
    try:
        parts = read_parts(example.reply)
    except ClearValueError as error:
        return _Trace("damaged trace", problem=str(error))
    return _Trace(parts.way, parts)


def _entry(line: int, example: Example, trace: _Trace) -> dict[str, Any]:
    letters = letters_of(example.options)
    letter = letter_of(example.answer, letters) if letters else None
    return {
        "line": line,
        "id": example.id,
        "question": example.question,
        "answer": example.answer,
        "spelled": letters[letter] if letter and letters[letter] != example.answer else "",
        "way": trace.way,
        "parts": trace.parts,
        "reply": example.reply,
        "problem": trace.problem,
        "damage": (example.degradation or "").replace("_", " "),
        "severity": example.severity or "clean",
        "psnr": example.psnr if example.degradation else None,
        "degraded": _inline(example.image),
        "clean": None if example.clean_image is None else _inline(example.clean_image),
    }


def _inline(image: ImageLike) -> str:
    picture = load_image(image)
    picture.thumbnail((SIDE, SIDE))
    return data_url(picture, "JPEG", quality=85)
