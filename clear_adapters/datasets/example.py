"""One training example, and folders of them: `data.jsonl` beside the pictures that it names.

A row names pictures by paths below its own folder. The rows of the CLEAR authors' released data (`conversations`
instead of `question` and `answer`) are read too, as recorded traces.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from clear_adapters.errors import ClearValueError
from clear_adapters.images import load_image
from clear_adapters.transcript import RESTORE, parse

DATA = "data.jsonl"
_TEXTS = ("question", "answer")


@dataclass(frozen=True)
class Example:
    """A question about a degraded picture.

    Attributes:
        id: unique in its data set.
        image: the degraded picture, or where it lies.
        question: what is asked.
        answer: the truth.
        clean_image: the picture before it was degraded; None where it is not known.
        options: possible answers, where there is a closed list.
        kind: of the question.
        fact: one sentence that says what in the picture gives the answer.
        degradation: name of the corruption; None is a picture left as it was.
        severity: `low`, `mid`, `high` or other words.
        intensity: from 0 to 1.
        psnr: of the degraded against the clean picture in dB, taken with a long side of `extra["psnr_side"]` pixels.
        group: examples of one group never stand in two splits; the id where it is empty.
        reply: a recorded reply in the protocol's tags, instead of one built from the answer.
        extra: further plain data that nothing here reads.
    """

    id: str
    image: Path | Image.Image
    question: str
    answer: str
    clean_image: Path | Image.Image | None = None
    options: tuple[str, ...] = ()
    kind: str = ""
    fact: str = ""
    degradation: str | None = None
    severity: str = ""
    intensity: float = 0.0
    psnr: float | None = None
    group: str = ""
    reply: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def split_key(self) -> str:
        """What splits are drawn by."""
        return self.group or self.id

    def load(self) -> Image.Image:
        """The degraded picture, RGB.

        Raises:
            ImageError: it cannot be read.
        """
        return load_image(self.image)

    def load_clean(self) -> Image.Image | None:
        """The clean picture, RGB; None where there is none.

        Raises:
            ImageError: it cannot be read.
        """
        return None if self.clean_image is None else load_image(self.clean_image)


def decibels(error: float) -> float:
    """PSNR in dB of a mean squared error of values from 0 to 255; 99 where nothing differs."""
    return 99.0 if error == 0 else min(99.0, 10 * math.log10(255**2 / error))


def psnr(clean: Image.Image, degraded: Image.Image, side: int) -> float:
    """PSNR in dB of two pictures of one size, with a long side of at most `side` pixels; 99 where they are equal."""
    scale = min(1.0, side / max(clean.size))
    size = (max(1, round(clean.width * scale)), max(1, round(clean.height * scale)))
    a, b = (
        np.asarray(i if i.size == size else i.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        for i in (clean, degraded)
    )
    return decibels(float(np.mean((a - b) ** 2)))


# ------------------------------------------------------------------------------------------------------ reading


def read_examples(
    data: str | Path,
    *,
    clean_image_dir: str | Path | None = None,
    corrupted_image_dir: str | Path | None = None,
) -> list[Example]:
    """Reads a folder with `data.jsonl`, or a JSONL file.

    Args:
        data: the folder or the file.
        clean_image_dir: where rows in the authors' form find their clean pictures; None is `clean` beside the file.
        corrupted_image_dir: the same for their degraded ones; None is `corrupted` beside the file.

    Returns:
        The examples in the order of the file.

    Raises:
        ClearValueError: a row cannot be used; the message names file and line.
    """
    rows = read_lines(data, clean_image_dir=clean_image_dir, corrupted_image_dir=corrupted_image_dir)
    return [example for _, example in rows]


def read_lines(
    data: str | Path,
    *,
    clean_image_dir: str | Path | None = None,
    corrupted_image_dir: str | Path | None = None,
    bad: list[tuple[int, str]] | None = None,
) -> list[tuple[int, Example]]:
    """The same with the line of each example.

    Args:
        data: as for `read_examples`.
        clean_image_dir: the same.
        corrupted_image_dir: the same.
        bad: takes up line and reason of rows that cannot be used, which are then left out.

    Raises:
        ClearValueError: the file cannot be read, or a row cannot be used and `bad` is None.
    """
    path = Path(data)
    path = path / DATA if path.is_dir() else path
    folder = path.parent
    clean = folder / "clean" if clean_image_dir is None else Path(clean_image_dir)
    corrupted = folder / "corrupted" if corrupted_image_dir is None else Path(corrupted_image_dir)
    found: list[tuple[int, Example]] = []
    lines: dict[str, int] = {}
    for number, row in _rows(path):
        try:
            if isinstance(row, ClearValueError):
                raise row
            example = _recorded(row, clean, corrupted) if "conversations" in row else _example(row, folder)
            if _lacks_clean(example):
                raise ClearValueError(
                    "the reply restores and has no clean_image, which it would be restored to"
                )
            if example.id in lines:
                raise ClearValueError(f"id {example.id!r} stands in line {lines[example.id]} already")
        except ClearValueError as error:
            if bad is None:
                raise ClearValueError(f"{path}, line {number}: {error}") from error
            bad.append((number, str(error)))
            continue
        lines[example.id] = number
        found.append((number, example))
    if not found and not bad:
        raise ClearValueError(f"{path} holds no example")
    return found


def _lacks_clean(example: Example) -> bool:
    return example.reply is not None and RESTORE in example.reply and example.clean_image is None


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | ClearValueError]]:
    try:
        with path.open(encoding="utf-8") as opened:
            for number, line in enumerate(opened, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, ClearValueError(f"not valid JSON: {error}")
                    continue
                if isinstance(row, dict):
                    yield number, row
                else:
                    yield number, ClearValueError(f"a row must be a JSON object, not {type(row).__name__}")
    except FileNotFoundError:
        raise ClearValueError(
            f"{path} does not exist: a data set is a folder with {DATA}, or a JSONL file"
        ) from None
    except UnicodeDecodeError as error:
        raise ClearValueError(f"{path} is not UTF-8 text: {error}") from error


def _text(row: Mapping[str, Any], key: str, required: bool = False) -> str:
    if key not in row:
        if required:
            raise ClearValueError(
                f"key {key!r} is missing; the row has {', '.join(map(repr, row)) or 'none'}"
            )
        return ""
    value = row[key]
    if not isinstance(value, str):
        raise ClearValueError(f"{key}={value!r}: must be a string")
    if required and not value.strip():
        raise ClearValueError(f"{key} is empty")
    return value


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise ClearValueError(f"{key}={value!r}: must be a number")
    return float(value)


def below(folder: Path, name: str, key: str) -> Path:
    """The file of a name that a row gives.

    Args:
        folder: which it must be below, by its words alone.
        name: a relative path.
        key: under which it stands in the row.

    Raises:
        ClearValueError: it leads out of the folder.
    """
    windows = PureWindowsPath(name)
    if windows.is_absolute() or windows.drive or PurePosixPath(name).is_absolute() or ".." in windows.parts:
        raise ClearValueError(
            f"{key}={name!r}: must be a path below {folder}, neither absolute nor through a parent folder"
        )
    return folder / name


def _picture(value: str, key: str, folder: Path) -> Path:
    path = below(folder, value, key)
    if not path.is_file():
        raise ClearValueError(f"{key}={value!r}: there is no file {path}")
    return path


def _example(row: dict[str, Any], folder: Path) -> Example:
    question, answer = (_text(row, key, required=True) for key in _TEXTS)
    image = _text(row, "image", required=True)
    clean = _text(row, "clean_image") if row.get("clean_image") is not None else ""
    options = row.get("options", [])
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise ClearValueError(f"options={options!r}: must be a list of strings")
    extra = row.get("extra", {})
    if not isinstance(extra, dict):
        raise ClearValueError(f"extra={extra!r}: must be an object")
    known = set(Example.__dataclass_fields__)
    unknown = sorted(set(row) - known)
    if unknown:
        raise ClearValueError(f"unknown key {unknown[0]!r}: put further data into 'extra'")
    return Example(
        id=_text(row, "id", required=True),
        image=_picture(image, "image", folder),
        question=question,
        answer=answer,
        clean_image=_picture(clean, "clean_image", folder) if clean else None,
        options=tuple(options),
        kind=_text(row, "kind"),
        fact=_text(row, "fact"),
        degradation=_text(row, "degradation") if row.get("degradation") else None,
        severity=_text(row, "severity"),
        intensity=_number(row, "intensity") or 0.0,
        psnr=_number(row, "psnr"),
        group=_text(row, "group"),
        reply=_text(row, "reply", required=True) if row.get("reply") is not None else None,
        extra=extra,
    )


def _recorded(row: dict[str, Any], clean: Path, corrupted: Path) -> Example:
    turns = row["conversations"]
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(t, dict) for t in turns):
        raise ClearValueError("conversations must be a list of a human's and a model's turn")
    human, model = turns[0], turns[1]
    if human.get("from") != "human" or model.get("from") != "gpt":
        raise ClearValueError("conversations must begin with a turn from 'human' and one from 'gpt'")
    question = _text(human, "value", required=True).replace("<image>", "").strip()
    reply = _text(model, "value", required=True)
    if not question:
        raise ClearValueError("the human's turn asks nothing")
    answer = parse(reply).answer
    if not answer:
        raise ClearValueError("the reply has no <answer>...</answer>, or an empty one")
    name = _text(row, "image", required=True)
    needs_clean = RESTORE in reply
    return Example(
        id=str(row["id"]) if "id" in row else _text(row, "id", required=True),
        image=_picture(name, "image", corrupted),
        question=question,
        answer=answer,
        clean_image=_picture(name, "image", clean) if needs_clean or (clean / name).is_file() else None,
        kind=str(row.get("subset", "")),
        group=name,
        reply=reply,
        extra={k: row[k] for k in ("subset", "split_type", "tool_used") if k in row},
    )


# ------------------------------------------------------------------------------------------------------ writing


def to_row(example: Example, folder: Path) -> dict[str, Any]:
    """The row of `data.jsonl` for an example whose pictures lie below a folder; empty values are left out.

    Raises:
        ClearValueError: a picture is not a file below the folder.
    """
    row: dict[str, Any] = {}
    for name in Example.__dataclass_fields__:
        value = getattr(example, name)
        if isinstance(value, Image.Image):
            raise ClearValueError(
                f"example {example.id!r}: {name} is in memory; save it below {folder} first"
            )
        if isinstance(value, Path):
            try:
                value = value.relative_to(folder).as_posix()
            except ValueError:
                raise ClearValueError(f"example {example.id!r}: {value} is not below {folder}") from None
        elif isinstance(value, tuple):
            value = list(value)
        if value not in (None, "", [], {}) or name in _TEXTS:
            row[name] = value
    return row


def write_examples(examples: Iterable[Example], folder: str | Path) -> Path:
    """Writes `data.jsonl` for pictures that lie below the folder, in one move; gives its path.

    Raises:
        ClearValueError: a picture is not a file below the folder.
    """
    path = Path(folder) / DATA
    temporary = path.with_suffix(".part")
    with temporary.open("w", encoding="utf-8") as opened:
        for example in examples:
            opened.write(json.dumps(to_row(example, Path(folder)), ensure_ascii=False) + "\n")
    temporary.replace(path)
    return path


# ------------------------------------------------------------------------------------------------------- splits


def split_examples(
    examples: Sequence[Example], shares: Mapping[str, float], seed: int = 0
) -> dict[str, list[Example]]:
    """Splits by group: all examples of a group stand in one part, whatever else is in the data set.

    Args:
        examples: what is split.
        shares: share of each part; they sum to 1.
        seed: another seed, another split.

    Raises:
        ClearValueError: the shares do not sum to 1.
    """
    if not shares or abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
        raise ClearValueError(f"shares={dict(shares)!r}: shares must be positive and sum to 1")
    parts: dict[str, list[Example]] = {name: [] for name in shares}
    for example in examples:
        parts[split_of(example.split_key, shares, seed)].append(example)
    return parts


def split_of(key: str, shares: Mapping[str, float], seed: int) -> str:
    """The part that a group stands in: it follows from the key and the seed alone.

    Args:
        key: of the group.
        shares: share of each part; they sum to 1.
        seed: another seed, another split.
    """
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    bounds = itertools.accumulate(shares.values())
    named = [name for name, share in shares.items() if share]
    return next((n for n, bound in zip(shares, bounds, strict=True) if place < bound), named[-1])
