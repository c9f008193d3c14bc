"""What `bench run` does with names: finds and checks the sets, then the model, then runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_adapters.datasets.hub import Source
from clear_adapters.errors import ClearValueError
from clear_adapters.mmd_bench import miniature
from clear_adapters.mmd_bench.build import Input
from clear_adapters.mmd_bench.build import build as build_sets
from clear_adapters.mmd_bench.job import Settings
from clear_adapters.mmd_bench.protocol import wanted
from clear_adapters.mmd_bench.run import run as run_sets
from clear_adapters.mmd_bench.sets import find_sets, read_sets
from clear_adapters.mmd_bench.systems import get_system
from clear_adapters.mmd_bench.tasks import CLEAN, LEVELS, TASKS, Task, get_task

if TYPE_CHECKING:
    from clear_adapters.attached import AttachedModel
    from clear_adapters.results import ResultFile

QUESTIONS = 1000
"""Of the built-in set, where no limit is given."""

FEW = 32
"""Questions up to which the built-in set is degraded in this process."""


def run_command(
    output: Path,
    *,
    model: str | None,
    adapter: str,
    data: Sequence[str],
    tasks: Sequence[str] | None,
    severities: Sequence[str],
    protocols: Sequence[str],
    systems: Sequence[str] | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    max_new_tokens: int | None,
    steps: int | None,
    skip_bad: bool,
    skip_missing: bool,
    judge: Mapping[str, Any] | None,
    device: str | None,
    dtype: str | None,
    revision: str | None,
    report: Callable[[str], None],
    watch: Callable[[str, int, int], None] | None = None,
    load: Callable[[], AttachedModel] | None = None,
    progress: bool = True,
) -> ResultFile:
    """Runs the benchmark by names; `bench run` says what each argument is.

    Those it has no option for: `watch` is that of `run.run`, `load` gives the model of these names where it is loaded
    already, and `progress` shows a bar.

    Raises:
        ClearValueError: a file is missing, or a setting cannot work.
        UnknownNameError: an unknown task, system, model or adapter.
        TsvError: a file has a bad row.
    """
    for name in severities:
        if name not in LEVELS:
            raise ClearValueError(f"severity {name!r}: one of {', '.join(LEVELS)}")
    conditions = wanted(protocols, severities)
    plain = adapter == "none"
    chosen = [get_system(n) for n in dict.fromkeys(systems or (("base",) if plain else ("base", "clear")))]
    needs_clean = any(s.needs_clean for s in chosen)
    looked_for = conditions if not needs_clean or CLEAN in conditions else (CLEAN, *conditions)
    if any(s.sees == "clean" for s in chosen):
        conditions = looked_for
    judges = None
    if judge is not None:
        from clear_adapters.mmd_bench.judge import BenchJudge

        judges = BenchJudge(judge)
    names = [get_task(n) for n in dict.fromkeys(tasks)] if tasks else list(TASKS)
    folders = _folders(model, None if plain else adapter)
    sources = _sources(output, data, looked_for, limit, seed, revision)
    found = find_sets(sources, names, looked_for)
    if not tasks:
        names = [t for t in names if any(t.file_name(c) in found.files for c in t.conditions(looked_for))]
    missing = [n for n in found.missing if any(_is_of(n, t, looked_for) for t in names)]
    if (missing and not skip_missing) or not names:
        raise ClearValueError(
            f"{', '.join(data)} lacks {', '.join(missing or found.missing)}: build the sets with 'bench build', name "
            "another source with --data, choose others with --tasks and --severity, or pass --skip-missing"
        )
    if missing:
        report(f"missing, and left out: {', '.join(missing)}")
    sets = read_sets(found, names, conditions, needs_clean=needs_clean, limit=limit, skip_bad=skip_bad)
    for s in sets:
        for error in s.questions.skipped:
            report(f"left out: {error}")
    facts, own, place, computed_in = _model(*folders, device, dtype)
    settings = Settings(
        model=facts[0],
        adapter=facts[1],
        batch_size=batch_size,
        seed=seed,
        max_new_tokens=max_new_tokens,
        steps=steps,
        limit=limit,
        dtype=computed_in,
        device_kind=place.split(":")[0],
    )
    return run_sets(
        output,
        sets,
        chosen,
        settings,
        load or own,
        device=f"{_words(place)}, {computed_in}",
        judge=judges,
        missing=missing,
        revisions=found.revisions,
        watch=watch,
        progress=progress,
    )


def _is_of(name: str, task: Task, conditions: Sequence[str]) -> bool:
    return any(name == task.file_name(c) for c in task.conditions(tuple(conditions)))


def _sources(
    output: Path,
    data: Sequence[str],
    conditions: Sequence[str],
    limit: int | None,
    seed: int,
    revision: str | None,
) -> list[Source]:
    """The sources by name; the built-in set is drawn and built below the run's folder."""
    sources = []
    for name in data:
        if name != miniature.NAME:
            folder = Path(name).expanduser().is_dir()
            sources.append(Source(name, revision=None if folder else revision))
            continue
        count = limit or QUESTIONS
        place = output / "sets" / f"{seed}-{count}"
        with tempfile.TemporaryDirectory() as temporary:
            clean = miniature.write_clean(temporary, count, seed)
            target = place / "clean" / clean.name
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            part.write_bytes(clean.read_bytes())
            part.replace(target)
        sources.append(Source(target.parent))
        for condition in conditions:
            if condition != CLEAN:
                folder_of = place / condition
                build_sets(
                    [Input(get_task("miniature"), target)],
                    folder_of,
                    seed=seed,
                    conditions=[condition],
                    workers=1 if count <= FEW else None,
                )
                sources.append(Source(folder_of))
    return sources


def _folders(model: str | None, adapter: str | None) -> tuple[tuple[str, Path], tuple[str, Path] | None]:
    """Name and folder of the base, and of the adapter where there is one; a missing one is said before anything is built."""
    from clear_adapters import store

    found = None
    if adapter is not None:
        found = (adapter, store.resolve(adapter, "adapter"))
        model = model or store.read_adapter(found[1]).config.base_model
    if model is None:
        raise ClearValueError("no model was named: pass --model, or an adapter that knows its base")
    return (model, store.resolve(model, "model")), found


def _model(
    base: tuple[str, Path], adapter: tuple[str, Path] | None, device: str | None, dtype: str | None
) -> tuple[tuple[dict[str, Any], dict[str, Any] | None], Callable[[], AttachedModel], str, str]:
    """Facts about base and adapter, what loads them, device and type; nothing is loaded yet."""
    import torch

    from clear_adapters import store
    from clear_adapters.adapter import attach

    facts = {"name": _shown(*base), "digest": store.model_digest(base[1])}
    adapter_facts = None
    if adapter is not None:
        config = store.read_adapter(adapter[1]).config
        adapter_facts = {
            "name": _shown(*adapter),
            "digest": store.adapter_digest(adapter[1]),
            "stage": config.stage,
            "seed": config.provenance.get("seed"),
        }
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def load() -> AttachedModel:
        if adapter is None:
            return attach(base[0], lora=False, bridge=False, dtype=dtype, device=place)
        return attach(base[0], adapter[0], dtype=dtype, device=place)

    return (facts, adapter_facts), load, place, dtype or ("float32" if place == "cpu" else "stored type")


def _words(place: str) -> str:
    """A device in words."""
    import torch

    if place.startswith("cuda"):
        return torch.cuda.get_device_name(place)
    return f"{place}, {torch.get_num_threads()} threads"


def _shown(name: str, folder: Path) -> str:
    """A name for a result file: of a folder its last part, since paths are nobody else's business."""
    return folder.resolve().name if Path(name).expanduser().is_dir() else name
