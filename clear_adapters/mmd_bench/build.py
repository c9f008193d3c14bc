"""Builds the sets from the base benchmarks' TSV files: seeded, parallel, resumable, with a manifest.

Every picture follows from the seed, the name of its file and its index alone, and rows are written in the order of the
input, so the files are the same byte for byte for any number of processes. Only a few rows are in memory at a time, fewer
where pictures are large. A build that was stopped goes on where it was (journal.py). An input is known by its hash, so sets
of two versions of a file are never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clear_adapters._version import __version__
from clear_adapters.datasets.hub import Found, Source, locate
from clear_adapters.datasets.tsv import format_row
from clear_adapters.degradations import SEVERITIES
from clear_adapters.degradations.catalogue import generator
from clear_adapters.degradations.corruption import Formulas
from clear_adapters.errors import ClearValueError, unknown_name
from clear_adapters.journal import file_facts, sha256_of, size_of, write_whole
from clear_adapters.mmd_bench.journal import TaskJournal
from clear_adapters.mmd_bench.pictures import QUALITY, Item, Recipe, make
from clear_adapters.mmd_bench.questions import QuestionSet, lines_of, read_questions
from clear_adapters.mmd_bench.tasks import CLEAN, CORRUPTIONS, Task
from clear_adapters.results import installed_versions
from clear_adapters.workers import count_of, in_order, processes

MANIFEST = "manifest.json"
PLAN = "plan.json"


@dataclass(frozen=True)
class Input:
    """A base benchmark to build from.

    Attributes:
        task: which.
        path: its TSV file.
    """

    task: Task
    path: Path


def find_inputs(sources: Sequence[Source], tasks: Sequence[Task]) -> tuple[list[Input], Found]:
    """The base files of the tasks; those with distortions of their own have none.

    Raises:
        ClearValueError: no source has any of them.
    """
    wanted = [t for t in tasks if not t.real]
    found = locate(sources, [t.file_name(CLEAN) for t in wanted])
    inputs = [Input(t, found.files[t.file_name(CLEAN)]) for t in wanted if t.file_name(CLEAN) in found.files]
    if not inputs:
        names = ", ".join(found.missing) or "no file to build from"
        raise ClearValueError(
            f"{', '.join(s.name for s in sources)} holds none of the files that were looked for: {names}"
        )
    return inputs, found


def build(
    inputs: Sequence[Input],
    output: str | Path,
    *,
    seed: int = 0,
    conditions: Sequence[str] = (*SEVERITIES, *CORRUPTIONS),
    formulas: Formulas = "legacy",
    workers: int | None = None,
    skip_bad: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Builds the sets, or goes on with a build that was stopped; a finished one is left as it is.

    Files of a finished one that are gone or cut off are built again.

    Args:
        inputs: the base files.
        output: folder of the sets.
        seed: the same seed gives the same files.
        conditions: severities (mixed sets) and names of corruptions (their own sets, at high).
        formulas: `legacy`, as published, or `fixed`.
        workers: processes; None is one a core.
        skip_bad: leave bad rows out, with what is counted together with them, and say which in the manifest.
        progress: show a bar.

    Returns:
        The manifest, which is also `manifest.json`; the pictures are listed in one `*.manifest.jsonl` a task.

    Raises:
        TsvError: a file has a bad row; file and line are named. What was built so far is kept.
        ClearValueError: a setting cannot work, or the folder holds other sets.
        ClearError: a process was killed; what was built so far is kept.
        UnknownNameError: there is no such condition.
    """
    for name in conditions:
        if name not in SEVERITIES and name not in CORRUPTIONS:
            raise unknown_name("severity or corruption", name, (*SEVERITIES, *CORRUPTIONS))
    if not conditions:
        raise ClearValueError("no severity and no corruption was asked for, so there is nothing to build")
    count = count_of(workers)
    generator(seed, "draw")  # checks the seed
    recipe = Recipe(seed, tuple(dict.fromkeys(conditions)), formulas)
    folder = Path(output)
    settings = {
        **asdict(recipe),
        "version": __version__,
        "inputs": {i.task.name: file_facts(i.path) for i in inputs},
    }
    sets = [read_questions(i.path, i.task, skip_bad=skip_bad) for i in inputs]  # all, before any is built
    _claim(folder, settings)
    before = _whole_tasks(folder, sets)
    if before is not None and len(before["tasks"]) == len(sets):
        return before
    with ExitStack() as stack:
        bar = stack.enter_context(
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                disable=not progress,
                transient=True,
            )
        )
        pool = stack.enter_context(processes(count))
        facts = {
            s.task.name: _build_task(folder, s, recipe, skip_bad, pool, count, bar)
            for s in sets
            if before is None or s.task.name not in before["tasks"]
        }
    return _finish(folder, settings, sets, recipe, facts, before)


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    text = json.dumps(settings, sort_keys=True, indent=2) + "\n"
    file = folder / PLAN
    if file.is_file():
        old, new = _read_json(file), json.loads(text)
        other = [
            f"{key} {old.get(key)!r} there and {new.get(key)!r} here"
            for key in sorted({*old, *new} - {"inputs"})
            if old.get(key) != new.get(key)
        ]
        was, now = old.get("inputs", {}), new["inputs"]
        other += [f"other contents of {i['file']}" for n, i in now.items() if n in was and was[n] != i]
        if was.keys() != now.keys():
            other.append(f"tasks {', '.join(sorted(was))} there and {', '.join(sorted(now))} here")
        if other:
            raise ClearValueError(
                f"{folder} holds sets of other settings or other files ({'; '.join(other)}), which would be mixed: "
                "choose another folder, or delete it"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ClearValueError(f"{folder} is not empty and holds no sets: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        content = error
    if not isinstance(content, dict):
        raise ClearValueError(
            f"{path} is damaged ({content if isinstance(content, ValueError) else 'no JSON object'}), so what the folder "
            "holds cannot be told: delete the folder, or choose another, and build again"
        )
    return content


def _whole_tasks(folder: Path, sets: Sequence[QuestionSet]) -> dict[str, Any] | None:
    """The manifest without tasks of which files are lost or cut off; None where there is none."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = _read_json(folder / MANIFEST)
    lost = set()
    for s in sets:
        files = {n: f["bytes"] for n, f in manifest["files"].items() if f["task"] == s.task.name}
        files[f"{s.task.file}.manifest.jsonl"] = manifest["tasks"][s.task.name]["manifest_bytes"]
        if (folder / f"{s.task.file}.journal").is_file() or any(
            size_of(folder / n) != size for n, size in files.items()
        ):
            lost.add(s.task.name)
    for name in lost:
        del manifest["tasks"][name]
    manifest["files"] = {n: f for n, f in manifest["files"].items() if f["task"] not in lost}
    return manifest


def _items(questions: QuestionSet) -> list[Item]:
    shared: dict[str, dict[tuple[int, int], None]] = {}
    for q in questions.questions:
        shared.setdefault(q.group, {})[q.picture] = None
    return [Item(q.index, q.place, q.picture, tuple(shared[q.group])) for q in questions.questions]


def _build_task(
    folder: Path,
    questions: QuestionSet,
    recipe: Recipe,
    skip_bad: bool,
    pool: ProcessPoolExecutor | None,
    workers: int,
    bar: Progress,
) -> dict[str, Any]:
    task = questions.task
    journal = TaskJournal(folder, task, recipe.conditions)
    header = format_row(list(questions.file.columns))
    items = _items(questions)
    line = bar.add_task(task.title, total=len(items), completed=journal.done)
    jobs = [(questions.file.path, task.file, recipe, [i], skip_bad) for i in items[journal.done :]]
    if not journal.complete:
        with journal.rows(header) as rows:
            for made in in_order(make, jobs, pool, workers, lambda made: made.size):
                rows.write(made)
                bar.advance(line)
        journal.close()
    return journal.counts


def _finish(
    folder: Path,
    settings: Mapping[str, Any],
    sets: Sequence[QuestionSet],
    recipe: Recipe,
    facts: Mapping[str, dict[str, Any]],
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    tasks: dict[str, Any] = dict(before["tasks"]) if before else {}
    files: dict[str, Any] = dict(before["files"]) if before else {}
    for s in sets:
        if s.task.name not in facts:
            continue
        given = settings["inputs"][s.task.name]
        if file_facts(s.file.path) != given:
            (folder / f"{s.task.file}.journal").unlink(missing_ok=True)
            raise ClearValueError(
                f"{s.file.path} was changed while sets were built from it, so they are of neither: delete {folder} and "
                "build again"
            )
        counts = facts[s.task.name]
        if not counts["rows"]:
            raise ClearValueError(f"{s.file.path}: no row could be used, so there is no set to build")
        tasks[s.task.name] = {
            "input": given,
            "manifest_bytes": size_of(folder / f"{s.task.file}.manifest.jsonl"),
            "rows": counts["rows"],
            "pictures": counts["pictures"],
            "without_picture": s.without_picture,
            "left_with_group": s.left_with_group + counts["left_with_group"],
            "skipped": lines_of(s.skipped) + counts["bad"],
        }
        for condition in recipe.conditions:
            name = s.task.file_name(condition)
            files[name] = {
                "task": s.task.name,
                "condition": condition,
                "rows": counts["rows"],
                "bytes": size_of(folder / name),
                "sha256": sha256_of(folder / name),
            }
    manifest = {
        "schema_version": 1,
        "seed": recipe.seed,
        "formulas": recipe.formulas,
        "intensities": SEVERITIES,
        "jpeg_quality": QUALITY,
        "project_version": __version__,
        "versions": installed_versions(),
        "tasks": tasks,
        "files": files,
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    for s in sets:
        (folder / f"{s.task.file}.journal").unlink(missing_ok=True)
    return manifest
