"""Asks a model the questions of some sets, in every way that is named, and writes answers and a result file.

    OUTPUT/run.json                                   settings; another run is not mixed in
    OUTPUT/answers/TASK/CONDITION/SYSTEM.jsonl        a line a question, written batch by batch
    OUTPUT/run.lock                                   held by the process that is at work
    OUTPUT/result.json                                the result file

A run that was killed goes on where it was and ends with the same result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clear_adapters.endpoint import EndpointError
from clear_adapters.errors import ClearError, ClearValueError
from clear_adapters.mmd_bench.answers import AnswerFile
from clear_adapters.mmd_bench.protocol import Cell, protocols
from clear_adapters.mmd_bench.score import mark
from clear_adapters.mmd_bench.sets import BenchSet
from clear_adapters.mmd_bench.systems import System, ask
from clear_adapters.mmd_bench.tasks import CLEAN, PROMPT_VERSION, REAL
from clear_adapters.results import ResultFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

    from clear_adapters.attached import AttachedModel
    from clear_adapters.mmd_bench.judge import BenchJudge
    from clear_adapters.mmd_bench.questions import Question

KIND = "mmd_bench"
RESULT = "result.json"
RUN = "run.json"
LOCK = "run.lock"


@dataclass(frozen=True)
class Settings:
    """How a model is asked.

    Attributes:
        model: facts about the base: name and digest.
        adapter: facts about the adapter; None without one.
        batch_size: rows at a time. Part of the settings since batches of another size may round differently.
        seed: of sampling; question i of a set is asked with seed + i.
        max_new_tokens: longest turn; None is the adapter's own.
        steps: points of the flow schedule; None is the adapter's own.
        limit: first units of every set; None is all.
        dtype: in which the model computes, in words: other types give other answers.
        device_kind: `cpu`, `cuda`, ...: the same holds for it.

    Raises:
        ClearValueError: a number out of its range.
    """

    model: Mapping[str, Any]
    adapter: Mapping[str, Any] | None
    batch_size: int = 16
    seed: int = 0
    max_new_tokens: int | None = None
    steps: int | None = None
    limit: int | None = None
    dtype: str | None = None
    device_kind: str | None = None

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("seed", 0), ("max_new_tokens", 1), ("steps", 2), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ClearValueError(f"{name}={value}: must be at least {low}")


@dataclass(frozen=True)
class Job:
    """One system on one set.

    Attributes:
        system: which.
        asked: the system that is asked: of the ceiling, the base.
        data: the set.
        path: of the answers.
    """

    system: System
    asked: System
    data: BenchSet
    path: Path


def plan(output: Path, sets: Sequence[BenchSet], systems: Sequence[System]) -> list[Job]:
    """All cells. The ceiling is measured once, on the clean set; what needs clean pictures, not where there are none.

    Raises:
        ClearValueError: nothing is to be measured.
    """
    base = System("base", "base", plain=True)
    jobs = []
    for data in sets:
        for system in systems:
            if system.sees == "clean" and data.condition != CLEAN:
                continue
            if system.needs_clean and data.condition == REAL:
                continue
            asked = replace(base, restorer=system.restorer) if system.sees == "clean" else system
            path = output / "answers" / data.task.name / data.condition / f"{asked.name}.jsonl"
            jobs.append(Job(system, asked, data, path))
    if not jobs:
        raise ClearValueError(
            "there is nothing to measure: choose tasks, severities and systems that go together"
        )
    return jobs


def run(
    output: str | Path,
    sets: Sequence[BenchSet],
    systems: Sequence[System],
    settings: Settings,
    load: Callable[[], AttachedModel],
    *,
    device: str,
    judge: BenchJudge | None = None,
    missing: Sequence[str] = (),
    revisions: Mapping[str, str] | None = None,
    progress: bool = True,
    command: str | None = None,
) -> ResultFile:
    """Measures what is asked for and not there yet.

    Args:
        output: folder of the run.
        sets: what is asked.
        systems: in which ways.
        settings: how.
        load: gives base and adapter; called once, if anything is left to be asked.
        device: in words, for the result file.
        judge: for tasks with a judge.
        missing: names of files that no source has, for the result file.
        revisions: commit by dataset repository, for the result file.
        progress: show a bar.
        command: for the result file; None is the running one.

    Returns:
        The result file, written to `result.json`.

    Raises:
        ClearValueError: the folder holds a run of other settings, another process is at work in it, or a system needs
            an adapter.
        TsvError: a picture cannot be decoded.
        MissingMarksError: some answers have no mark of the judge; the result of the other sets is written before.
        EndpointError: the same, where the judge refuses every request or failed too often.
    """
    output = Path(output)
    for system in systems:
        if settings.adapter is None and not system.plain:
            raise ClearValueError(f"system {system.name!r} needs an adapter, and the model has none")
    for data in sets:
        if data.task.rule == "judge" and judge is None:
            raise ClearValueError(
                f"{data.task.title} is marked by a judge: name a service and a model (--judge-url, --judge-model)"
            )
    jobs = plan(output, sets, systems)
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ClearValueError(
            f"another process is at work in {output}: wait until it is done, or choose another folder"
        ) from None
    try:
        claim(output, settings, sets)
        return _measure(
            output,
            jobs,
            settings,
            load,
            judge,
            progress,
            lambda cells, unmarked: ResultFile.collect(
                KIND,
                payload(cells, sets, settings, missing, judge, revisions, unmarked),
                device=device,
                seeds=[settings.seed],
                command=command,
            ),
        )
    finally:
        lock.release()


def _measure(
    output: Path,
    jobs: Sequence[Job],
    settings: Settings,
    load: Callable[[], AttachedModel],
    judge: BenchJudge | None,
    progress: bool,
    collect: Callable[[Sequence[Cell], Sequence[str]], ResultFile],
) -> ResultFile:
    """Asks what is left to ask, has it marked, and writes the result."""
    model: AttachedModel | None = None
    cells: list[Cell] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        disable=not progress,
        transient=True,
    ) as bar:
        whole = bar.add_task("all sets", total=len(jobs))
        for job in jobs:
            questions = job.data.questions.questions
            answers = AnswerFile(job.path, [q.index for q in questions], settings.batch_size)
            name = f"{job.data.task.title}, {job.data.condition}, {job.system.name}"
            line = bar.add_task(name, total=len(questions), completed=len(answers.records))
            if len(answers.records) < len(questions):
                model = model or load()
                for records in answer(model, job, settings, len(answers.records)):
                    answers.append(records)
                    bar.advance(line, len(records))
            cells.append(Cell(job.data.task, job.data.condition, job.system.name, answers.records))
            bar.update(line, visible=False)
            bar.advance(whole)
    cells, unmarked, failure = _marked(cells, judge)
    if failure is None:
        result = collect(cells, [])
        result.write(output / RESULT)
        return result
    if not cells:
        raise failure
    written = collect(cells, unmarked).write(output / RESULT)
    raise type(failure)(f"{failure} {written} holds the other sets.") from failure


def _marked(
    cells: Sequence[Cell], judge: BenchJudge | None
) -> tuple[list[Cell], list[str], EndpointError | None]:
    """The cells that have a score, the names of those that lack marks, and why the first of them does."""
    if judge is None:
        return list(cells), [], None
    from clear_adapters.mmd_bench.judge import MissingMarksError

    scored: list[Cell] = []
    unmarked: list[str] = []
    failure: EndpointError | None = None
    for cell in cells:
        if cell.task.rule != "judge":
            scored.append(cell)
            continue
        try:
            if failure is not None and not isinstance(failure, MissingMarksError):
                raise failure  # the service is down: it is not asked again
            scored.append(judge.marked(cell))
        except EndpointError as error:
            unmarked.append(cell.name)
            failure = failure if failure is not None and isinstance(error, MissingMarksError) else error
    return scored, unmarked, failure


def payload(
    cells: Sequence[Cell],
    sets: Sequence[BenchSet],
    settings: Settings,
    missing: Sequence[str],
    judge: BenchJudge | None,
    revisions: Mapping[str, str] | None = None,
    unmarked: Sequence[str] = (),
) -> dict[str, Any]:
    """What the result file holds."""
    facts = {f"{s.task.name}/{s.condition}": s.facts() for s in sets}
    set_seeds = sorted({f["set_seed"] for f in facts.values() if f["set_seed"] is not None})
    seeds = {"seed": settings.seed, "set_seed": set_seeds[0] if len(set_seeds) == 1 else set_seeds or None}
    return {
        "model": dict(settings.model),
        "adapter": None if settings.adapter is None else dict(settings.adapter),
        "settings": _plain(settings),
        "prompts": PROMPT_VERSION,
        "judge": None if judge is None else judge.facts(),
        "sets": facts,
        "missing": list(missing),
        "without_marks": list(unmarked),
        "revisions": dict(revisions or {}),
        "cells": {c.name: c.facts(settings.seed) for c in cells},
        "protocols": protocols(cells, seeds, settings.seed),
    }


def _plain(settings: Settings) -> dict[str, Any]:
    return {k: v for k, v in asdict(settings).items() if k not in ("model", "adapter")}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of what differs."""
    before = old.get("settings") or {}
    for name, value in new["settings"].items():
        if before.get(name) != value:
            yield name, before.get(name), value
    for name in ("model", "adapter", "prompts"):
        if old.get(name) != new[name]:
            yield name, old.get(name), new[name]


def _read_run(file: Path) -> dict[str, Any]:
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ClearValueError(
            f"{file} is damaged ({error}), so that nothing says with which settings the answers beside it were given: "
            "choose another folder, or delete this one"
        ) from None
    if not isinstance(old, dict) or not isinstance(old.get("sets"), dict):
        raise ClearValueError(f"{file} is not that of a benchmark run: choose another folder")
    return old


def claim(output: Path, settings: Settings, sets: Sequence[BenchSet]) -> None:
    """Makes the folder this run's; one of a run of the same model, settings and sets is gone on with.

    Sets may be added later: what is there must agree.

    Raises:
        ClearValueError: the folder holds another run, or something else.
    """
    file = output / RUN
    new: dict[str, Any] = {
        "settings": _plain(settings),
        "model": settings.model.get("digest"),
        "adapter": (settings.adapter or {}).get("digest"),
        "prompts": PROMPT_VERSION,
        "sets": {f"{s.task.name}/{s.condition}": [s.facts()["bytes"], s.questions.digest()] for s in sets},
    }
    if file.is_file():
        old = _read_run(file)
        for name, was, now in _changed(old, new):
            raise ClearValueError(
                f"{output} holds a run with {name} = {was!r}, not {now!r}; answers of both in one result would be "
                "those of neither: choose another folder, or go on with what was chosen first"
            )
        for name, facts in new["sets"].items():
            if name in old["sets"] and old["sets"][name] != facts:
                raise ClearValueError(
                    f"{output} holds answers to another set {name}: its file was changed, or other rows of it are left "
                    "out as bad (--skip-bad, systems that need clean pictures). Seeds and batches go by a row's place, "
                    "so these answers cannot be gone on with: choose another folder, or ask as before"
                )
        new["sets"] = old["sets"] | new["sets"]
    elif (output / "answers").exists():
        raise ClearValueError(f"{output} holds answers and no {RUN}: choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    part = file.with_name(RUN + ".part")
    part.write_text(json.dumps(new, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(file)


# ----------------------------------------------------------------------------------------------------- one cell


@dataclass(frozen=True)
class _Batch:
    first: int
    questions: Sequence[Question]
    images: list[Image]
    clean: list[Image] | None


def _batches(job: Job, size: int, start: int) -> Iterator[_Batch]:
    """The batches from a question on; the next one's pictures are decoded while the model is at work."""
    questions = job.data.questions.questions
    clean_rows = job.data.clean_rows() if job.asked.latent_from == "clean" else {}
    clean_set = job.data.clean

    def load(first: int) -> _Batch:
        rows = questions[first : first + size]
        images = [job.data.questions.image(q) for q in rows]
        clean = None
        if clean_rows and clean_set is not None:
            clean = [clean_set.image(clean_rows[q.index]) for q in rows]
        return _Batch(first, rows, images, clean)

    places = range(start, len(questions), size)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, places[0])
        for following in places[1:]:
            batch = ahead.result()
            ahead = pool.submit(load, following)
            yield batch
        yield ahead.result()


def answer(model: AttachedModel, job: Job, settings: Settings, start: int) -> Iterator[list[dict[str, Any]]]:
    """The lines of the answers file from a question on, a batch at a time."""
    text, latent = model.config.text, model.config.latent
    if settings.max_new_tokens is not None:
        text = replace(text, max_new_tokens=settings.max_new_tokens)
    if settings.steps is not None:
        latent = replace(latent, steps=settings.steps)
    for batch in _batches(job, settings.batch_size, start):
        began = time.perf_counter()
        try:
            replies = ask(
                model,
                job.asked,
                batch.images,
                [q.prompt for q in batch.questions],
                seeds=[settings.seed + batch.first + i for i in range(len(batch.questions))],
                clean=batch.clean,
                text=text,
                latent=latent,
            )
        except ClearError as error:
            lines = f"{batch.questions[0].place[0]} to {batch.questions[-1].place[0]}"
            raise ClearValueError(f"{job.data.questions.file.path}, lines {lines}: {error}") from error
        seconds = (time.perf_counter() - began) / len(replies)
        records = []
        for question, reply in zip(batch.questions, replies, strict=True):
            found = mark(job.data.task, question, reply.text)
            record: dict[str, Any] = {
                "index": question.index,
                "line": question.place[0],
                "group": question.group,
                "category": question.category,
                "source": question.source,
                "question": question.text,
                "truth": question.truth,
                "answer": reply.text,
                "read": found.read,
                "value": found.value,
                "seconds": round(seconds, 5),
            }
            if not job.asked.plain:
                record |= {
                    "restored": reply.restored,
                    "answered": reply.answered,
                    "thoughts": list(reply.thoughts),
                }
            records.append(record)
        yield records
