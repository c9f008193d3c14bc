"""Looks through data sets for what would spoil training, and says where: file and line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clear_adapters.datasets.answers import says
from clear_adapters.datasets.builder.plan import FILES, Plan
from clear_adapters.datasets.duplicates import content_hash, near_pairs, perceptual_hash
from clear_adapters.datasets.example import Example, read_lines
from clear_adapters.datasets.parts import read_parts
from clear_adapters.errors import ClearValueError
from clear_adapters.images import load_image
from clear_adapters.scoring import Kind, letter_of, letters_of, matches


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        path: of the file.
        line: where in it.
        problem: what.
    """

    path: Path
    line: int
    problem: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.problem}"


@dataclass
class Audit:
    """What was looked at, and what was found.

    Attributes:
        findings: in the order of files and lines.
        files: rows and traces by file.
    """

    findings: list[Finding] = field(default_factory=list)
    files: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    path: Path
    line: int
    example: Example


def audit(
    data: str | Path | Sequence[str | Path],
    *,
    clean_image_dir: str | Path | None = None,
    corrupted_image_dir: str | Path | None = None,
    match: Kind = "auto",
    near: int = Plan.near,
    pictures: bool = True,
) -> Audit:
    """Checks the files of a data set, each by itself and against the others.

    Found are: rows that cannot be read (a missing picture, a key), pictures that cannot be decoded or differ in size from
    their clean ones, traces whose tags do not parse, traces that restore without a clean picture, answers of a trace that
    are not the ground truth, truths that are no option, and leaks: two files that share a group, a picture or a
    near-duplicate.

    Args:
        data: a folder with `data.jsonl` and perhaps `rl.jsonl` and `heldout.jsonl`, or JSONL files, one a split.
        clean_image_dir: of clean pictures, for rows in the authors' form.
        corrupted_image_dir: of degraded ones.
        match: how else an answer without options may say the truth; `auto` asks for its words.
        near: pictures whose hashes differ in at most so many bits of 63 are near-duplicates.
        pictures: decode every picture; without, leaks are told by files and groups alone.

    Raises:
        ClearValueError: there is no file to check, or one is no text.
    """
    found = Audit()
    rows: list[_Place] = []
    for path in _paths(data):
        bad: list[tuple[int, str]] = []
        read = read_lines(
            path, clean_image_dir=clean_image_dir, corrupted_image_dir=corrupted_image_dir, bad=bad
        )
        found.findings += [Finding(path, line, problem) for line, problem in bad]
        rows += [_Place(path, line, example) for line, example in read]
        traced = sum(e.reply is not None for _, e in read)
        found.files[str(path)] = {"rows": len(read) + len(bad), "traces": traced}
    for row in rows:
        found.findings += [Finding(row.path, row.line, problem) for problem in _wrong(row.example, match)]
    hashes: dict[Path, tuple[str, int]] = {}
    if pictures:
        sizes: dict[Path, tuple[int, int]] = {}
        broken: dict[Path, str] = {}
        for row in rows:
            found.findings += [Finding(row.path, row.line, p) for p in _decode(row, sizes, hashes, broken)]
    found.findings += _leaks(rows, hashes, near)
    order = {path: place for place, path in enumerate(dict.fromkeys(r.path for r in rows))}
    found.findings.sort(key=lambda f: (order.get(f.path, len(order)), f.line))
    return found


def _paths(data: str | Path | Sequence[str | Path]) -> list[Path]:
    given = [data] if isinstance(data, str | Path) else list(data)
    paths: list[Path] = []
    for name in map(Path, given):
        here = [name / f for f in FILES.values() if (name / f).is_file()] if name.is_dir() else [name]
        if not here:
            raise ClearValueError(
                f"{name} holds none of {', '.join(FILES.values())}: there is nothing to check"
            )
        # A split that is empty on purpose is no fault; a file that was named is read.
        paths += [p for p in here if not name.is_dir() or p.name == FILES["train"] or p.stat().st_size]
    return paths


def _wrong(example: Example, match: Kind) -> Iterator[str]:
    if example.options and letter_of(example.answer, letters_of(example.options)) is None:
        yield f"the answer {example.answer!r} is none of the options"
    if example.reply is None:
        return
    try:
        parts = read_parts(example.reply)
    except ClearValueError as error:
        yield str(error)
        return
    same = says(parts.answer, example.answer, example.options)
    if not same and match not in ("auto", "option") and not example.options:
        same = matches(parts.answer, example.answer, kind=match)
    if not same:
        yield f"the trace answers {parts.answer!r}, and the ground truth is {example.answer!r}"


def _decode(
    row: _Place,
    sizes: dict[Path, tuple[int, int]],
    hashes: dict[Path, tuple[str, int]],
    broken: dict[Path, str],
) -> Iterator[str]:
    paths = [p for p in (row.example.image, row.example.clean_image) if isinstance(p, Path)]
    for path in paths:
        if path not in sizes and path not in broken:
            try:
                image = load_image(path)
            except ClearValueError as error:
                broken[path] = str(error)
                continue
            sizes[path] = image.size
            hashes[path] = content_hash(image), perceptual_hash(image)
    yield from (broken[path] for path in dict.fromkeys(paths) if path in broken)
    if len(paths) == 2 and all(p in sizes for p in paths) and sizes[paths[0]] != sizes[paths[1]]:
        yield f"degraded {sizes[paths[0]]} and clean {sizes[paths[1]]} differ in size"


def _leaks(rows: Sequence[_Place], hashes: dict[Path, tuple[str, int]], near: int) -> Iterator[Finding]:
    """One finding a row that shares something with a row of a file before its own."""
    if len({r.path for r in rows}) < 2:
        return
    first: dict[Any, _Place] = {}
    told: set[int] = set()
    shown = [_shown(row) for row in rows]
    for place, row in enumerate(rows):
        keys: list[tuple[str, Any]] = [("picture", shown[place])]
        if row.example.group:
            keys.append(("group", row.example.group))
        if shown[place] in hashes:
            keys.append(("picture", hashes[shown[place]][0]))
        for what, key in keys:
            other = first.setdefault(key, row)
            if other.path != row.path and place not in told:
                told.add(place)
                yield Finding(row.path, row.line, f"leak: its {what} stands in {other.path}:{other.line} too")
    known = [place for place, path in enumerate(shown) if path in hashes]
    by_hash: dict[int, list[int]] = {}
    for place in known:
        by_hash.setdefault(hashes[shown[place]][1], []).append(place)
    values = list(by_hash)
    pairs = [(a, a) for a in range(len(values))] + list(near_pairs(values, near))
    for a, b in pairs:
        sharing = sorted({*by_hash[values[a]], *by_hash[values[b]]})
        earliest = rows[sharing[0]]
        for place in sharing[1:]:
            row = rows[place]
            other = next((rows[p] for p in sharing if rows[p].path != row.path and p < place), earliest)
            if other.path != row.path and place not in told:
                told.add(place)
                yield Finding(
                    row.path,
                    row.line,
                    f"leak: a near-duplicate of its picture stands in {other.path}:{other.line}",
                )


def _shown(row: _Place) -> Path:
    picture = row.example.image if row.example.clean_image is None else row.example.clean_image
    return picture if isinstance(picture, Path) else Path()
