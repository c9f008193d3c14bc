"""A report of result files: `report.md`, `report.json` and figures. No number is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clear_adapters.errors import BrokenEntryError
from clear_adapters.mmd_bench import published as paper
from clear_adapters.mmd_bench.compare import lines, read_results
from clear_adapters.mmd_bench.figures import draw
from clear_adapters.mmd_bench.tables import tables
from clear_adapters.results import ResultFile


def write_report(paths: Sequence[str | Path], output: str | Path, *, published: bool = False) -> list[Path]:
    """Writes tables and figures.

    Args:
        paths: result files of `bench run`, or folders of runs.
        output: folder; files of an earlier report in it are replaced.
        published: lay the paper's numbers beside, marked as published.

    Returns:
        The files.

    Raises:
        ClearValueError: a result file cannot be read.
        BrokenEntryError: matplotlib is not installed.
    """
    results = read_results(paths)
    shown = lines(results)
    made = tables(shown, published)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        figures = draw(shown, folder, published)
    except ModuleNotFoundError as error:
        raise BrokenEntryError(
            "Drawing figures needs matplotlib: pip install 'clear-adapters[bench]'"
        ) from error
    text = "\n\n".join(
        [
            "# MMD-Bench",
            "\n".join(_origin(number, r) for number, r in enumerate(results, 1)),
            *(t.markdown() for t in made),
            *(f"![{p.stem}]({p.name})" for p in figures if p.suffix == ".png"),
        ]
    )
    markdown = folder / "report.md"
    markdown.write_text(text + "\n", encoding="utf-8")
    data: dict[str, Any] = {
        "results": [_facts(r) for r in results],
        "published": paper.SOURCE if published else None,
        "tables": {t.name: {"title": t.title, "rows": list(t.data)} for t in made},
    }
    file = folder / "report.json"
    file.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return [markdown, file, *figures]


def _facts(result: ResultFile) -> dict[str, Any]:
    return {
        "model": result.payload["model"],
        "adapter": result.payload["adapter"],
        "judge": result.payload["judge"],
        "settings": result.payload["settings"],
        "missing": result.payload["missing"],
        "without_marks": result.payload.get("without_marks", []),
        "revisions": result.payload.get("revisions", {}),
        "device": result.device,
        "date": result.date,
        "commit": result.commit,
        "dirty": result.dirty,
        "project_version": result.project_version,
    }


def _origin(number: int, result: ResultFile) -> str:
    p = result.payload
    parts = [f"{number}. model `{p['model']['name']}`"]
    if p["adapter"] is not None:
        parts.append(f"adapter `{p['adapter']['name']}`")
    if p["judge"] is not None:
        parts.append(f"judge `{p['judge']['model']}`")
    parts.append(result.device)
    parts.append(result.date[:10])
    if result.commit is not None:
        parts.append(f"commit {result.commit[:12]}{' with changes' if result.dirty else ''}")
    if p["settings"]["limit"] is not None:
        parts.append(f"the first {p['settings']['limit']} questions of every set")
    if p["missing"]:
        parts.append(f"missing: {', '.join(p['missing'])}")
    if p.get("without_marks"):
        parts.append(f"without marks of the judge: {', '.join(p['without_marks'])}")
    return ", ".join(parts) + "."
