"""Asks a model the questions of some sets, in every way that is named, and writes answers and a result file.

    OUTPUT/run.json                                   settings; another run is not mixed in
    OUTPUT/answers/TASK/CONDITION/SYSTEM.jsonl        a line a question, written batch by batch
    OUTPUT/run.lock                                   held by the process that is at work
    OUTPUT/result.json                                the result file

A run that was killed goes on where it was and ends with the same result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clear_adapters.endpoint import EndpointError
from clear_adapters.errors import ClearValueError
from clear_adapters.journal import write_whole
from clear_adapters.mmd_bench.answers import AnswerFile
from clear_adapters.mmd_bench.job import Job, Settings, answer
from clear_adapters.mmd_bench.protocol import Cell, protocols
from clear_adapters.mmd_bench.sets import BenchSet
from clear_adapters.mmd_bench.systems import System
from clear_adapters.mmd_bench.tasks import CLEAN, PROMPT_VERSION, REAL
from clear_adapters.results import ResultFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from clear_adapters.attached import AttachedModel
    from clear_adapters.mmd_bench.judge import BenchJudge

KIND = "mmd_bench"
RESULT = "result.json"
RUN = "run.json"
LOCK = "run.lock"


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
    watch: Callable[[str, int, int], None] | None = None,
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
        watch: told after every batch what was asked, how many questions are answered and how many there are in all;
            what it raises ends the run, whose answers stay to be gone on with.

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
            watch,
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
    watch: Callable[[str, int, int], None] | None,
    collect: Callable[[Sequence[Cell], Sequence[str]], ResultFile],
) -> ResultFile:
    """Asks what is left to ask, has it marked, and writes the result."""
    model: AttachedModel | None = None
    cells: list[Cell] = []
    done, asked = 0, sum(len(j.data.questions.questions) for j in jobs)
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
            done += len(answers.records)
            if len(answers.records) < len(questions):
                model = model or load()
                for records in answer(model, job, settings, len(answers.records)):
                    answers.append(records)
                    bar.advance(line, len(records))
                    done += len(records)
                    if watch is not None:
                        watch(name, done, asked)
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
    write_whole(file, json.dumps(new, indent=2, sort_keys=True) + "\n")
