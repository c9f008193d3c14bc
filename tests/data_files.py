"""Small pictures with questions, as sources of training data."""

import base64
import json
from pathlib import Path
from typing import Any

from tests.bench_files import picture


def photographs(folder: Path, count: int = 12) -> list[str]:
    """Pictures that have nothing to do with each other; gives their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(base64.b64decode(picture(i, (96, 80))))
    return names


def rows_of(names: list[str]) -> list[dict[str, Any]]:
    """Two questions a picture."""
    made = []
    for i, name in enumerate(names):
        made.append(
            {"id": f"{i}-a", "image": name, "question": f"What is thing {i}?", "answer": f"a kind {i}"}
        )
        options = ["red", "green", "blue"]
        made.append(
            {"id": f"{i}-b", "image": name, "question": "Which?", "answer": "ABC"[i % 3], "options": options}
        )
    return made


def write_rows(path: Path, rows: list[Any]) -> Path:
    """JSONL; a text is a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but the lock."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".lock"
    }
