"""Rows of a dataset repository of the Hub, streamed: those that are drawn are kept until the build is finished.

A limit of N draws among the first N + `BUFFER` rows of the files, which are shuffled; about as many are downloaded, pictures
included. A fetch that was stopped reads them from the start again and keeps what it has.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from clear_adapters.datasets.builder.plan import Plan
from clear_adapters.errors import BrokenEntryError, ClearValueError
from clear_adapters.journal import Journal, write_whole

BUFFER = 1000
"""Rows among which the next one is drawn."""

ROWS = "rows.jsonl"
STEPS = "rows.journal"
COMMIT = "commit"

_ARCHIVE = re.compile(r"(?:zip|tar|gzip|bz2|xz|zstd|lz4)://")
"""How the place of a file inside an archive begins, before `::` and the place of the archive."""

Inside = Callable[[str], bool]
"""Whether a path lies below the dataset."""


@dataclass(frozen=True)
class Stream:
    """A dataset of the Hub, or a folder in a form that `datasets` reads.

    Attributes:
        name: `owner/name`, or the folder.
        config: of a dataset that has several.
        split: of the dataset.
        revision: branch, tag or commit.
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    def facts(self) -> dict[str, Any]:
        """For the settings of a build."""
        return {**asdict(self), "name": Path(self.name).name if Path(self.name).is_dir() else self.name}


def fetch(stream: Stream, folder: Path, plan: Plan, progress: bool = True) -> Path:
    """Draws rows by seed and writes them with their pictures to a JSONL file; a fetch that was stopped goes on.

    Args:
        stream: from where.
        folder: where to.
        plan: seed and limit.
        progress: show how many there are.

    Returns:
        The JSONL file, with the pictures beside it.

    Raises:
        BrokenEntryError: `datasets` is not installed.
        ClearValueError: the dataset cannot be read, or has no pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ROWS
    journal = Journal(folder / STEPS, {"rows": path})
    if journal.complete:
        return path
    rows, inside = _open(replace(stream, revision=commit_of(stream, folder) or stream.revision), plan.seed)
    with (
        Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            disable=not progress,
            transient=True,
        ) as bar,
        journal.opened() as log,
    ):
        line = bar.add_task("rows of the stream", total=plan.limit, completed=journal.done)
        # Skipped, not sought: the order is drawn, and only its beginning is known.
        for number, row in enumerate(_guarded(rows, stream)):
            if plan.limit is not None and number >= plan.limit:
                break
            if number < journal.done:
                continue
            text = json.dumps(_entry(row, number, folder, inside), ensure_ascii=False) + "\n"
            log.write({}, {"rows": text.encode("utf-8", "surrogatepass")})
            bar.advance(line)
    journal.close()
    return path


def commit_of(stream: Stream, folder: Path) -> str | None:
    """The commit that is read: looked up once, so that a branch that moves does not mix two states. None of a folder.

    Args:
        stream: from where.
        folder: as for `fetch`; the commit stands there.

    Raises:
        ClearValueError: it cannot be looked up.
    """
    if Path(stream.name).is_dir():
        return None
    file = folder / COMMIT
    if not file.is_file():
        from huggingface_hub import HfApi

        try:
            write_whole(file, str(HfApi().dataset_info(stream.name, revision=stream.revision).sha))
        except Exception as error:  # of a hundred kinds: network, names
            raise _unreadable(stream, error) from error
    return file.read_text(encoding="utf-8")


def _open(stream: Stream, seed: int) -> tuple[Any, Inside]:
    """The rows in their drawn order, and which paths of pictures may be read."""
    try:
        import datasets
    except ImportError as error:
        raise BrokenEntryError(
            "A stream of the Hub needs datasets: pip install 'clear-adapters[train]'"
        ) from error
    try:
        rows = datasets.load_dataset(
            stream.name, stream.config, split=stream.split, revision=stream.revision, streaming=True
        )
        columns = rows.features or {}
        column = next((c for c in ("image", "images") if c in columns), None)
        if column is None:
            raise ClearValueError(
                f"{stream.name}: no column 'image'; the columns are {', '.join(columns) or 'unknown'}"
            )
        # Decoding would open whatever a row names.
        rows = rows.decode(False).shuffle(seed=seed, buffer_size=BUFFER)
        kind = columns[column]
        kind = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", kind)
        if not isinstance(kind, datasets.Image):
            return rows, lambda path: False
        return rows, lambda path: lies_below(path, stream.name, datasets.config.HF_ENDPOINT)
    except ClearValueError:
        raise
    except Exception as error:  # of a hundred kinds: network, formats, names
        raise _unreadable(stream, error) from error


def lies_below(path: str, dataset: str, hub: str) -> bool:
    """Whether a path is of the dataset itself: below its folder, or its address on the Hub, or in an archive there.

    A row names its pictures, and may name any file of this machine or any address; those are not read.

    Args:
        path: as a row of a stream gives it: a path, an address, or `zip://NAME::` and one of them.
        dataset: a folder, or `owner/name`.
        hub: address of the Hub.
    """
    *inner, place = path.split("::")
    if len(inner) > 1 or not all(_ARCHIVE.match(hop) for hop in inner):
        return False
    if Path(dataset).is_dir():
        try:
            return Path(place).is_absolute() and Path(place).resolve().is_relative_to(Path(dataset).resolve())
        except (OSError, ValueError, RuntimeError):
            return False
    if ".." in re.split(r"[/\\]|%2f|%5c", place.replace("%2e", ".").replace("%2E", "."), flags=re.IGNORECASE):
        return False
    below = (f"hf://datasets/{dataset}@", f"hf://datasets/{dataset}/", f"{hub}/datasets/{dataset}/resolve/")
    return place.startswith(below)


def _guarded(rows: Any, stream: Stream) -> Any:
    try:
        yield from rows
    except Exception as error:
        raise _unreadable(stream, error) from error


def _unreadable(stream: Stream, error: Exception) -> ClearValueError:
    reason = " ".join(str(error).split())[:300]
    return ClearValueError(f"the dataset {stream.name!r} cannot be read as a stream: {reason}")


def _entry(row: Mapping[str, Any], number: int, folder: Path, inside: Inside) -> dict[str, Any]:
    """A row as `sources` reads it; what has no picture, or several, is left to be told there."""
    entry = {k: v for k, v in row.items() if k not in ("image", "images") and _plain(v)}
    if "answers" in row and "answer" not in entry and isinstance(row["answers"], list) and row["answers"]:
        entry["answer"] = row["answers"][0]
    entry["id"] = str(entry.get("id") or entry.get("question_id") or f"row-{number}")
    pictures = row.get("image", row.get("images"))
    if isinstance(pictures, list):
        if len(pictures) != 1:
            return {**entry, "image": ["?"] * len(pictures)}
        pictures = pictures[0]
    data = _bytes(pictures, inside)
    if data is not None:
        name = hashlib.sha256(data).hexdigest()[:20]
        (folder / name).write_bytes(data)
        entry["image"] = name
    return entry


def _bytes(picture: Any, inside: Inside) -> bytes | None:
    if isinstance(picture, Mapping):
        found = picture.get("bytes")
        if isinstance(found, bytes):
            return found
        return _file(picture.get("path"), inside)
    return None


def _file(path: object, inside: Inside) -> bytes | None:
    """A picture of the dataset that is named, on this machine or on the Hub; None where there is none.

    Raises:
        ClearValueError: the Hub does not give it, which must not cost its row.
    """
    from datasets.utils.file_utils import xopen

    if not isinstance(path, str) or not inside(path):
        return None
    try:
        with xopen(path, "rb") as opened:
            data: bytes = opened.read()
    except (FileNotFoundError, ValueError):
        return None
    except Exception as error:  # of a hundred kinds again
        if isinstance(error, OSError) and "://" not in path:
            return None
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ClearValueError(
            f"the picture {path!r} could not be read: {reason}. What was drawn is kept: run again to go on"
        ) from error
    return data


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
