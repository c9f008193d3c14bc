"""The commands of MMD-Bench: `clear-adapters bench build`, `run` and `report`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clear_adapters.cli_options import ADAPTER, AdapterName, Device, Formulas, ModelName
from clear_adapters.errors import ClearValueError

if TYPE_CHECKING:
    from clear_adapters.datasets.hub import Source

bench = typer.Typer(no_args_is_help=True, help="MMD-Bench: build its sets, run a model on them, report.")

MINIATURE = "builtin:miniature"
MINIATURE_QUESTIONS = 1000


Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a dataset repository; its main branch by default."),
]
Tasks = Annotated[str | None, typer.Option(help="Comma-separated; those whose files are there by default.")]


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _sources(names: list[str], revision: str | None) -> list[Source]:
    from clear_adapters.datasets.hub import Source

    return [Source(n, revision=None if Path(n).expanduser().is_dir() else revision) for n in names]


def _say_missing(missing: Any) -> None:
    if missing:
        typer.echo(f"missing: {', '.join(missing)}", err=True)


@bench.command(
    epilog="Examples: clear-adapters bench build --input LMUData --output sets --seed 0 | "
    "clear-adapters bench build --input builtin:miniature --output sets --no-per-corruption"
)
def build(
    source: Annotated[
        list[str],
        typer.Option(
            "--input", help="Folder or dataset repository with the base TSV files; repeat for more."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the sets.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same files.")] = 0,
    tasks: Tasks = None,
    severity: Annotated[
        str, typer.Option(help="Mixed sets, comma-separated; an empty text for none.")
    ] = "low,mid,high",
    per_corruption: Annotated[
        bool, typer.Option(help="Build the sixteen sets of one corruption too.")
    ] = True,
    formulas: Annotated[
        Formulas, typer.Option(help="As the benchmark, or corrected ones.")
    ] = Formulas.legacy,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core by default.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out and count them.")] = False,
    questions: Annotated[int, typer.Option(min=1, help=f"Questions of {MINIATURE}.")] = MINIATURE_QUESTIONS,
    revision: Revision = None,
) -> None:
    """Build the mixed sets and the sets of one corruption from the base benchmarks' TSV files."""
    import tempfile

    from clear_adapters.mmd_bench.build import build as build_sets
    from clear_adapters.mmd_bench.build import find_inputs
    from clear_adapters.mmd_bench.miniature import write_clean
    from clear_adapters.mmd_bench.tasks import CORRUPTIONS, TASKS, get_task

    with tempfile.TemporaryDirectory() as temporary:
        names = [n for n in source if n != MINIATURE]
        if MINIATURE in source:
            write_clean(temporary, questions, seed)
            names.append(temporary)
        wanted = [get_task(n) for n in _split(tasks)] if tasks else list(TASKS)
        inputs, found = find_inputs(_sources(names, revision), wanted)
        _say_missing(found.missing if tasks else ())
        manifest = build_sets(
            inputs,
            output,
            seed=seed,
            conditions=[*_split(severity), *(CORRUPTIONS if per_corruption else ())],
            formulas=formulas.value,
            workers=workers,
            skip_bad=skip_bad,
        )
    if MINIATURE in source:
        write_clean(output, questions, seed)
    for name, facts in manifest["tasks"].items():
        skipped = f", {len(facts['skipped'])} bad rows left out" if facts["skipped"] else ""
        if facts["left_with_group"]:
            skipped += f", {facts['left_with_group']} more that are counted with them"
        typer.echo(f"{name}: {facts['rows']} rows, {facts['pictures']} pictures{skipped}")
    typer.echo(f"{len(manifest['files'])} files in {output}")


@bench.command(
    epilog="Examples: clear-adapters bench run --output runs/mini | clear-adapters bench run --model BAGEL-7B-MoT "
    "--adapter my-adapter --data LMUData --data sets --tasks mmbench,mmstar --severity clean,high --output runs/7b"
)
def run(
    output: Annotated[Path, typer.Option(help="Folder of answers and result; a run goes on where it was.")],
    model: ModelName = None,
    adapter: AdapterName = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or dataset repository with the sets; repeat for more. The built-in set by default."
        ),
    ] = None,
    tasks: Tasks = None,
    severity: Annotated[str, typer.Option(help="Of clean, low, mid, high; comma-separated.")] = "clean,high",
    protocol: Annotated[
        str, typer.Option(help="mixed (as the published tables), macro16 (mean over the types), or both.")
    ] = "mixed",
    systems: Annotated[
        str | None,
        typer.Option(
            help="Of base, warned, classical, ceiling, clear, never, always, swap, clean-latent; base and clear by default."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First questions of every set.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling, and of the built-in set.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest turn; the adapter's own by default.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Points of the flow schedule; the adapter's own.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out and count them.")] = False,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Go on without files that no source has.")
    ] = False,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible service that marks MM-Vet.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Name of the model there.")] = None,
    judge_key_env: Annotated[str | None, typer.Option(help="Environment variable with its key.")] = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; as stored by default.")] = None,
    revision: Revision = None,
) -> None:
    """Ask a model the questions, in every way that is named, and write answers and a result file."""
    from clear_adapters.mmd_bench.command import run_command

    logging.basicConfig(format="%(message)s")
    if adapter is None:
        adapter = ADAPTER if model is None else "none"
        if model is not None:
            typer.echo("no --adapter given: the plain model alone is measured", err=True)
    judge = None
    if judge_url is not None or judge_model is not None:
        if judge_url is None or judge_model is None:
            raise ClearValueError("a judge needs both --judge-url and --judge-model")
        judge = {
            "base_url": judge_url,
            "model": judge_model,
            "key_env": judge_key_env,
            "cache": str(output / "judge"),
        }
    result = run_command(
        output,
        model=model,
        adapter=adapter,
        data=data or [MINIATURE],
        tasks=_split(tasks) if tasks else None,
        severities=_split(severity),
        protocols=_split(protocol),
        systems=_split(systems) if systems else None,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        max_new_tokens=max_new_tokens,
        steps=steps,
        skip_bad=skip_bad,
        skip_missing=skip_missing,
        judge=judge,
        device=device,
        dtype=dtype,
        revision=revision,
        report=lambda text: typer.echo(text, err=True),
    )
    from clear_adapters.mmd_bench.tables import overview

    typer.echo(overview(result))
    typer.echo(f"{output / 'result.json'}")


@bench.command(
    epilog="Example: clear-adapters bench report runs/mini/result.json --output report --published"
)
def report(
    results: Annotated[list[Path], typer.Argument(help="Result files of `bench run`, or folders of runs.")],
    output: Annotated[Path, typer.Option(help="Folder of tables and figures.")] = Path("report"),
    published: Annotated[
        bool,
        typer.Option(
            "--published/--no-published", help="Lay the paper's numbers beside, marked as published."
        ),
    ] = False,
) -> None:
    """Make the tables (Markdown and JSON) and the figures (PNG and SVG) of result files."""
    from clear_adapters.mmd_bench.report import write_report

    for path in write_report(results, output, published=published):
        typer.echo(str(path))
