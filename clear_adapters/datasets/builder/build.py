"""The build: rows in, pictures degraded, paths chosen and balanced, traces written; killed at any time, it goes on.

Whatever is finished (a picture, an answer of the base model, a reply of a teacher) is a line of one journal at once. The
files of the data are written at the end, in the order of the source, so they are the same for any number of processes and
for any order in which replies come.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image

from clear_adapters._version import __version__
from clear_adapters.datasets.builder import writers
from clear_adapters.datasets.builder.assembly import (
    JOURNAL,
    SOURCE,
    SUMMARY,
    Assembly,
    Helpers,
    expect,
    unasked,
)
from clear_adapters.datasets.builder.cost import Estimate
from clear_adapters.datasets.builder.pathways import drawn
from clear_adapters.datasets.builder.plan import Plan
from clear_adapters.datasets.builder.rows import Found, Row
from clear_adapters.datasets.builder.sources import read_rows
from clear_adapters.datasets.builder.stream import STEPS, Stream, commit_of, fetch
from clear_adapters.datasets.builder.teachers import MAX_TOKENS
from clear_adapters.errors import ClearError, ClearValueError
from clear_adapters.journal import claim, file_facts
from clear_adapters.workers import count_of

SETTINGS = "build.json"
LOCK = "build.lock"


def build(
    source: str | Path | Stream,
    output: str | Path,
    plan: Plan | None = None,
    *,
    pictures: str | Path | None = None,
    helpers: Helpers | None = None,
) -> dict[str, Any]:
    """Builds training data, or goes on with a build that was stopped; a finished one is left as it is.

    Args:
        source: a `.json`, `.jsonl` or `.tsv` file, or a `Stream` of the Hub.
        output: the folder of the data set: `data.jsonl` (stages 1 and 2), `rl.jsonl` (stage 3), `heldout.jsonl`, `images`,
            `manifest.jsonl` (a record a picture), `rejected.jsonl` (rows that were drawn, or could not be used, and are in
            none, with the reason), `summary.json`.
        plan: what it contains; None is the default.
        pictures: folder of the pictures; None is the source's own.
        helpers: who works at it; None is processes alone.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        ClearValueError: a setting cannot work, a helper is missing, no row can be used, the budget is too small, or the
            folder holds something else.
        EndpointError: the teacher's service refuses every request, failed too often, or left rows unanswered, or the judge did;
            all that is paid for is kept.
        ClearError: a process was killed from outside; what was made is kept.
    """
    plan, helpers = plan or Plan(), helpers or Helpers()
    _check_helpers(plan, helpers)
    count_of(helpers.workers)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ClearValueError(
            f"another process is at work in {folder}: wait until it is done, or choose another folder"
        ) from None
    try:
        settings: dict[str, Any] = {
            "plan": asdict(plan),
            "version": __version__,
            "prompts": writers.VERSION,
            "source": source.facts() if isinstance(source, Stream) else _facts(Path(source)),
            "teacher": helpers.teacher.name if helpers.teacher else None,
            "base": helpers.base.name if helpers.base else None,
            "judge": helpers.judge.name if helpers.judge else None,
            "pictures": None if isinstance(source, Stream) else _folder(source, pictures),
        }
        claim(folder, SETTINGS, settings)
        if (folder / SUMMARY).is_file():
            return _finished(folder)
        try:
            if isinstance(source, Stream):
                place = fetch(source, folder / SOURCE, plan, helpers.progress)
                settings["source"]["commit"] = commit_of(source, place.parent)
                source, pictures = place, place.parent
            found = read_rows(source, pictures, plan)
        except ClearError:
            _release(folder)
            raise
        return Assembly(folder, plan, helpers, found, settings).run()
    finally:
        lock.release()


def foresee(
    source: str | Path,
    plan: Plan,
    *,
    pictures: str | Path | None = None,
    sample: int = 200,
    max_tokens: int = MAX_TOKENS,
) -> tuple[Found, Estimate]:
    """What a build would read and ask a teacher; no picture is decoded, nothing is written or asked.

    Args:
        source: a file.
        plan: what it would contain.
        pictures: folder of the pictures.
        sample: rows of which the picture's size is looked up.
        max_tokens: longest reply of the teacher.

    Returns:
        What the source gives, and an estimate of the teacher's part (of all training rows before balancing, since paths
        are not known yet).

    Raises:
        ClearValueError: no row can be used.
    """
    found = read_rows(source, pictures, plan)
    ordered = {r.id: r for r in found.rows}
    sizes = [s for i in drawn(ordered, plan.seed)[:sample] if (s := _size(ordered[i])) is not None]
    side = (
        (round(sum(w for w, _ in sizes) / len(sizes)), round(sum(h for _, h in sizes) / len(sizes)))
        if sizes
        else (512, 512)
    )
    rows = [unasked(r.question + r.answer, side, plan) for r in found.rows]
    return found, expect(rows[: round(len(rows) * plan.splits.get("train", 0.0))], plan, max_tokens)


def _size(row: Row) -> tuple[int, int] | None:
    import io

    try:
        with Image.open(io.BytesIO(row.picture.read())) as opened:
            return opened.size
    except (OSError, ValueError, Image.DecompressionBombError):  # told when it is decoded
        return None


def _check_helpers(plan: Plan, helpers: Helpers) -> None:
    needs = "teacher" in (plan.writer, plan.pathway)
    if needs and helpers.teacher is None:
        raise ClearValueError(
            f"pathway={plan.pathway!r} with writer={plan.writer!r} needs a teacher: name a service and a model there "
            "(--teacher-url and --teacher-model), or a local model (--teacher-model alone)"
        )
    if helpers.teacher is not None and not needs:
        raise ClearValueError(
            "a teacher was given, and neither pathway nor writer is 'teacher': it would never be asked"
        )
    if plan.pathway == "backbone" and helpers.base is None:
        raise ClearValueError("pathway='backbone' needs the base model that answers (--model)")
    if helpers.judge is not None and plan.pathway != "backbone" and plan.writer != "teacher":
        raise ClearValueError(
            "a judge was given, and neither a base model nor a teacher writes answers: it would never be asked"
        )
    if plan.pathway != "backbone" and helpers.base is not None:
        raise ClearValueError(
            "a base model was given, and the pathway is not 'backbone': it would never be asked"
        )
    if helpers.budget is not None and helpers.prices is None:
        raise ClearValueError("a budget needs the prices of the service (--price)")
    if helpers.budget is not None and getattr(helpers.teacher, "max_tokens", None) is None:
        raise ClearValueError(
            "a budget needs a limit of the teacher's replies: give its endpoint options with max_tokens"
        )


def _folder(source: str | Path, pictures: str | Path | None) -> str:
    folder = Path(source).expanduser().parent if pictures is None else Path(pictures).expanduser()
    return str(folder.resolve())


def _facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"file": path.name}  # said later, with what a source may be
    return file_facts(path)


def _release(folder: Path) -> None:
    """A build that holds nothing yet leaves its folder, so that a mistyped source can be mended and built there."""
    if not (folder / JOURNAL).exists() and not (folder / SOURCE / STEPS).exists():
        shutil.rmtree(folder / SOURCE, ignore_errors=True)
        (folder / SETTINGS).unlink()


def _finished(folder: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        lost = [name for name in summary["files"] if not (folder / name).is_file()]
    except (ValueError, KeyError, TypeError) as error:
        raise ClearValueError(f"{folder / SUMMARY} is damaged: delete {folder} and build again") from error
    if lost:
        raise ClearValueError(
            f"{folder} is finished, and {', '.join(lost)} is gone: delete {folder} and build again"
        )
    return summary
