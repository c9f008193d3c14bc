"""The quick start: held-out degraded scenes, answered without and with an adapter, as a table, a sheet and JSON."""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clear_adapters.adapter import attach
from clear_adapters.degradations import degrade, list_degradations
from clear_adapters.errors import ClearValueError
from clear_adapters.mmd_bench.miniature import compare, spelled
from clear_adapters.world import KINDS, Question, ask, pair_scenes, render, sample_scene

SEVERITIES = ("high", "mid", "high", "low", "high", "clean", "high", "mid")
"""They take turns. Most are high, since there the two answers differ; one in eight is a picture in order."""
_FIRST = 900_000_000
"""Where scene seeds begin: no training script and no benchmark looks there."""


@dataclass
class Row:
    """One question, and what became of it.

    Attributes:
        question: what is asked.
        degradation: name of the corruption; `none` for a clean picture.
        severity: `clean`, `low`, `mid` or `high`.
        clean: the scene.
        degraded: what the models see.
        base_answer: of the plain model.
        clear_answer: of the model with the adapter.
        restored: whether it restored the picture.
        restored_image: what it restored.
    """

    question: Question
    degradation: str
    severity: str
    clean: Image.Image
    degraded: Image.Image
    base_answer: str = ""
    clear_answer: str = ""
    restored: bool = False
    restored_image: Image.Image | None = None

    @property
    def _options(self) -> tuple[str, ...]:
        """What letters of the answer stand for; empty where none are asked for."""
        return tuple(self.question.options) if self.question.is_lettered else ()

    def is_right(self, answer: str) -> bool:
        """Whether an answer is the truth."""
        return compare(answer, self.question.answer, self.question.kind, self._options) is True

    @property
    def shown_question(self) -> str:
        """On one line."""
        return " ".join(self.question.text.split())

    @property
    def shown_truth(self) -> str:
        """With the words behind a letter."""
        return spelled(self.question.answer, self._options)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "question": self.question.text,
            "truth": self.question.answer,
            "degradation": self.degradation,
            "severity": self.severity,
            "base_answer": self.base_answer,
            "clear_answer": self.clear_answer,
            "restored": self.restored,
        }


def sample_rows(count: int, seed: int) -> list[Row]:
    """Held-out scenes with a question of each kind in turn and various corruptions.

    Args:
        count: how many.
        seed: which; the same seed gives the same rows.

    Raises:
        ClearValueError: a negative seed, or no scene is asked for.
    """
    if count < 1 or seed < 0:
        raise ClearValueError(f"scenes={count}, seed={seed}: at least one scene, and a seed of 0 or more")
    names = [d.name for d in list_degradations()]
    rows = []
    for place in range(count):
        kind = KINDS[(place - 1) % len(KINDS)]  # reading first: a sign shows best what a restoration is worth
        number = _FIRST + seed * 4096 + place * 64
        if kind == "pair":
            scene, question, _, _ = pair_scenes(number, "heldout")
        else:
            while True:
                scene = sample_scene(number, "heldout")
                asked = ask(scene, number, (kind,), 1)
                if asked:
                    question = asked[0]
                    break
                number += 1
        severity = SEVERITIES[place % len(SEVERITIES)]
        name = "none" if severity == "clean" else names[(seed + place * 5) % len(names)]
        clean = render(scene)
        seen = clean if severity == "clean" else degrade(clean, name, severity=severity, seed=number)  # type: ignore[arg-type]
        rows.append(Row(question, name, severity, clean, seen))
    return rows


def run(
    model: str,
    adapter: str,
    *,
    scenes: int = 8,
    seed: int = 0,
    output: Path,
    json_file: Path | None = None,
    device: str | None = "cpu",
    console: Console | None = None,
) -> list[Row]:
    """Asks both, prints the table and writes the files.

    Args:
        model: as `attach` takes it.
        adapter: likewise.
        scenes: how many.
        seed: which scenes.
        output: the sheet.
        json_file: rows as JSON.
        device: where the model runs.
        console: where the table goes; None is standard output.

    Returns:
        The rows.

    Raises:
        ClearError: a model, adapter, file name or number that cannot be used.
    """
    console = console or Console()
    check_image_name(output)
    began = time.perf_counter()
    attached = attach(model, adapter, device=device)
    rows = sample_rows(scenes, seed)
    pictures, questions = [r.degraded for r in rows], [r.question.text for r in rows]
    with console.status(f"{len(rows)} scenes: the base model answers"), attached.disabled():
        plain = attached.engine.answer(pictures, questions, plain=True, text=None, seed=seed)
    with console.status(f"{len(rows)} scenes: the model with the adapter answers"):
        skilled = attached.engine.answer(pictures, questions, seed=seed)
    for row, before, after in zip(rows, plain, skilled, strict=True):
        row.base_answer, row.clear_answer = before.text.strip(), after.text.strip()
        row.restored, row.restored_image = after.restored, after.restored_image
    console.print(render_table(rows))
    right = [
        sum(r.is_right(a) for r, a in ((r, getattr(r, n)) for r in rows))
        for n in ("base_answer", "clear_answer")
    ]
    console.print(
        f"right: base {right[0]} of {len(rows)}, CLEAR {right[1]} of {len(rows)}; a handful of scenes shows the "
        f"mechanism and measures nothing ({time.perf_counter() - began:.0f} s)"
    )
    save_image(draw_sheet(rows), output)
    console.print(f"pictures: {escape(str(output))}", soft_wrap=True)
    if json_file is not None:
        text = json.dumps([r.to_json() for r in rows], indent=2, ensure_ascii=False) + "\n"
        write_whole(json_file, text.encode())
        console.print(f"rows: {escape(str(json_file))}", soft_wrap=True)
    return rows


def render_table(rows: list[Row]) -> Table:
    """Question, truth and both answers."""
    table = Table(show_lines=True)
    table.add_column("question", ratio=1)
    for name in ("truth", "base", "CLEAR"):
        table.add_column(name, max_width=14, overflow="fold")
    for name in ("degradation", "restored"):
        table.add_column(name, no_wrap=True)

    def marked(row: Row, answer: str) -> str:
        color, mark = ("green", "✓") if row.is_right(answer) else ("red", "✗")
        return f"[{color}]{mark} {escape(shorten(answer, 40))}[/]"

    for row in rows:
        table.add_row(
            escape(row.question.text),
            escape(row.shown_truth),
            marked(row, row.base_answer),
            marked(row, row.clear_answer),
            f"{row.degradation}\n{row.severity}",
            "yes" if row.restored else "no",
        )
    return table


def shorten(text: str, limit: int) -> str:
    """On one line, cut at `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


# ------------------------------------------------------------------------------------------------------- the sheet

_TILE, _GAP, _LINE = 200, 12, 20
_RIGHT, _WRONG, _GREY = (20, 120, 50), (180, 30, 40), (110, 110, 110)


def draw_sheet(rows: list[Row]) -> Image.Image:
    """Every row as a card: clean, degraded and restored picture, question, truth and answers; two cards across."""
    font, bold = ImageFont.load_default(15), ImageFont.load_default(16)
    wide = 3 * _TILE + 4 * _GAP
    wrapped = [_wrap(f"Question: {r.shown_question}", font, wide - 2 * _GAP) for r in rows]
    lines = max(len(w) for w in wrapped)
    high = _LINE + _TILE + (lines + 3) * _LINE + 3 * _GAP
    columns = min(2, len(rows))
    sheet = Image.new("RGB", (columns * wide, -(-len(rows) // columns) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for place, row in enumerate(rows):
        left, top = (place % columns) * wide + _GAP, (place // columns) * high + _GAP
        known = "as it is" if row.severity == "clean" else f"{row.degradation}, {row.severity}"
        tiles = (("clean", row.clean), (known, row.degraded), ("restored", row.restored_image))
        for n, (title, picture) in enumerate(tiles):
            x = left + n * (_TILE + _GAP)
            pen.text((x, top), title, fill="black", font=font)
            box = (x, top + _LINE, x + _TILE, top + _LINE + _TILE)
            if picture is None:
                pen.rectangle(box, fill=(238, 238, 238))
                note = "restored, no pixels" if row.restored else "not restored"
                pen.text((x + _TILE // 2, top + _LINE + _TILE // 2), note, fill=_GREY, font=font, anchor="mm")
            else:
                sheet.paste(picture.resize((_TILE, _TILE), Image.Resampling.BICUBIC), box[:2])
        y = top + _LINE + _TILE + 6
        for line in wrapped[place]:
            pen.text((left, y), line, fill="black", font=font)
            y += _LINE
        pen.text((left, y), f"Truth: {row.shown_truth}", fill="black", font=bold)
        for title, answer in (("Base", row.base_answer), ("CLEAR", row.clear_answer)):
            y += _LINE
            right = row.is_right(answer)
            text = f"{title}: {shorten(answer, 48) or '(nothing)'} - {'right' if right else 'wrong'}"
            pen.text((left, y), text, fill=_RIGHT if right else _WRONG, font=bold)
    return sheet


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


# ------------------------------------------------------------------------------------------------------- files


def check_image_name(path: Path) -> str:
    """The format that a file name's ending stands for.

    Raises:
        ClearValueError: the ending is none that Pillow writes.
    """
    Image.init()
    format_name = Image.registered_extensions().get(path.suffix.lower())
    if format_name is None or format_name not in Image.SAVE:
        raise ClearValueError(
            f"{str(path)!r}: no picture can be written with the ending {path.suffix!r}; use .png, .jpg or .webp"
        )
    return format_name


def save_image(image: Image.Image, path: Path) -> None:
    """Writes a picture whole or not at all, in the format of the file's ending; missing folders are made.

    Raises:
        ClearValueError: the ending is none that Pillow writes.
    """
    format_name = check_image_name(path)
    buffer = io.BytesIO()
    image.save(buffer, format_name)
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file beside its place and moves it there; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    try:
        half.write_bytes(content)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
