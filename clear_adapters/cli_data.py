"""The commands of training data: `clear-adapters data`."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clear_adapters.cli_options import MODEL, Device, Formulas
from clear_adapters.errors import ClearValueError

if TYPE_CHECKING:
    from clear_adapters.datasets.builder.cost import Prices
    from clear_adapters.datasets.builder.plan import Plan
    from clear_adapters.datasets.builder.stream import Stream
    from clear_adapters.datasets.builder.teachers import Teacher
    from clear_adapters.endpoint import Endpoint

REPLIES, MARKS = "replies", "marks"

data = typer.Typer(no_args_is_help=True, help="Make training data, check it and look at it.")


class Weights(StrEnum):
    """How often each corruption is drawn."""

    training = "training"
    benchmark = "benchmark"


class Pathway(StrEnum):
    """Who decides whether a row restores."""

    severity = "severity"
    backbone = "backbone"
    teacher = "teacher"


class Writer(StrEnum):
    """Who writes traces."""

    template = "template"
    teacher = "teacher"


class Match(StrEnum):
    """How an answer is compared with the truth."""

    auto = "auto"
    exact = "exact"
    number = "number"
    fuzzy = "fuzzy"


CleanDir = Annotated[Path | None, typer.Option(help="Of clean pictures, for data in the authors' form.")]
CorruptedDir = Annotated[
    Path | None, typer.Option(help="Of degraded pictures, for data in the authors' form.")
]


@data.command(epilog="Example: clear-adapters data world --output runs/data --examples 24000")
def world(
    output: Annotated[Path, typer.Option(help="Folder of the data set.")],
    examples: Annotated[int, typer.Option(min=1, help="Rows in all.")] = 24_000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same files.")] = 0,
    split: Annotated[str, typer.Option(help="train or heldout.")] = "train",
    questions_per_scene: Annotated[int, typer.Option(min=1, help="Rows that share a picture.")] = 3,
    formulas: Annotated[Formulas, typer.Option(help="As for degrade.")] = Formulas.legacy,
    weights: Annotated[Weights, typer.Option(help="How often each degradation is drawn.")] = Weights.training,
    psnr_side: Annotated[int, typer.Option(help="Side in pixels at which the PSNR is taken.")] = 128,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core by default.")] = None,
) -> None:
    """Training data of the miniature world: scenes, degraded pictures, traces with thoughts."""
    from clear_adapters.datasets.world import build

    done = build(
        output,
        examples,
        seed=seed,
        split=split,
        workers=workers,
        questions_per_scene=questions_per_scene,
        formulas=formulas.value,
        weights=weights.value,
        psnr_side=psnr_side,
    )
    typer.echo(f"{examples} examples in {done}")


@data.command(
    epilog="Examples: clear-adapters data build questions.jsonl --pictures photos --output mine | clear-adapters data build "
    "questions.jsonl --pictures photos --output mine --writer teacher --teacher-url http://127.0.0.1:8000/v1 "
    "--teacher-model my-model --dry-run"
)
def build(
    source: Annotated[
        str,
        typer.Argument(
            help="A .json, .jsonl or .tsv file with questions, or a dataset of the Hub (owner/name)."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder of the data set; a build that was stopped goes on there.")
    ],
    pictures: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; the source's by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to sample; all by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same files.")] = 0,
    splits: Annotated[str, typer.Option(help="Shares of the splits.")] = "train=0.8,rl=0.1,heldout=0.1",
    severities: Annotated[
        str,
        typer.Option(
            rich_help_panel="Pictures",
            help="How often each level is drawn; 'clean' leaves the picture as it is.",
        ),
    ] = "low=0.2,mid=0.3,high=0.5",
    weights: Annotated[
        Weights, typer.Option(rich_help_panel="Pictures", help="How often each degradation is drawn.")
    ] = Weights.training,
    formulas: Annotated[
        Formulas, typer.Option(rich_help_panel="Pictures", help="As for degrade.")
    ] = Formulas.legacy,
    pathway: Annotated[
        Pathway,
        typer.Option(
            help="Who decides whether a row restores: its severity, the base model's answer to the degraded picture "
            "(the paper), or the teacher (the released code)."
        ),
    ] = Pathway.severity,
    restore_from: Annotated[
        str, typer.Option(help="Lowest severity that restores, for --pathway severity.")
    ] = "mid",
    balance: Annotated[
        str, typer.Option(help="Restoring to direct rows, as in 1:1, or 'none' for what there is.")
    ] = "1:1",
    writer: Annotated[Writer, typer.Option(help="Who writes traces.")] = Writer.template,
    teacher_model: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Teacher",
            help="Name of the model at --teacher-url, or a local folder or Hub id without one.",
        ),
    ] = None,
    teacher_url: Annotated[
        str | None, typer.Option(rich_help_panel="Teacher", help="OpenAI-compatible service of the teacher.")
    ] = None,
    teacher_key_env: Annotated[
        str | None, typer.Option(rich_help_panel="Teacher", help="Environment variable with its key.")
    ] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(rich_help_panel="Teacher", help="Folder that keeps its replies for other builds too."),
    ] = None,
    per_minute: Annotated[
        float | None,
        typer.Option(rich_help_panel="Teacher", help="Requests a minute at most; of a judge too."),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, rich_help_panel="Teacher", help="Requests under way at once; the same.")
    ] = 8,
    timeout: Annotated[
        float, typer.Option(rich_help_panel="Teacher", help="Seconds that a reply may take; the same.")
    ] = 120.0,
    max_tokens: Annotated[
        int, typer.Option(min=16, rich_help_panel="Teacher", help="Longest reply of the teacher.")
    ] = 1024,
    temperature: Annotated[
        float, typer.Option(min=0, rich_help_panel="Teacher", help="Of the teacher at a service.")
    ] = 0.3,
    tries: Annotated[
        int, typer.Option(min=1, rich_help_panel="Teacher", help="How often a trace is asked for.")
    ] = 3,
    price: Annotated[
        str | None,
        typer.Option(
            metavar="IN,OUT", rich_help_panel="Teacher", help="Of a million tokens, for the estimate."
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Teacher", help="Nothing is asked where this run could cost more than this."
        ),
    ] = None,
    match: Annotated[
        Match, typer.Option(rich_help_panel="Answers", help="How an answer is compared with the truth.")
    ] = Match.auto,
    leave_unanswered: Annotated[
        bool,
        typer.Option(
            "--leave-unanswered",
            rich_help_panel="Teacher",
            help="Finish without rows that a service did not answer.",
        ),
    ] = False,
    judge_url: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Answers", help="OpenAI-compatible service that marks answers that do not match."
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(rich_help_panel="Answers", help="Name of the model there.")
    ] = None,
    judge_key_env: Annotated[
        str | None, typer.Option(rich_help_panel="Answers", help="Environment variable with its key.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Base model", help=f"The base model of --pathway backbone; {MODEL} by default."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, rich_help_panel="Base model", help="Rows that it answers at a time.")
    ] = 16,
    device: Device = None,
    min_side: Annotated[
        int,
        typer.Option(
            rich_help_panel="Pictures", help="Pictures with a shorter side are left out, in pixels."
        ),
    ] = 64,
    max_aspect: Annotated[
        float, typer.Option(rich_help_panel="Pictures", help="Longer pictures are left out.")
    ] = 5.0,
    max_side: Annotated[
        int | None,
        typer.Option(
            rich_help_panel="Pictures",
            help="Larger pictures are scaled down to this side before they are degraded.",
        ),
    ] = None,
    any_language: Annotated[bool, typer.Option("--any-language", help="Keep texts in Chinese.")] = False,
    config: Annotated[
        str | None, typer.Option(rich_help_panel="Datasets of the Hub", help="Of a dataset of the Hub.")
    ] = None,
    hub_split: Annotated[
        str, typer.Option(rich_help_panel="Datasets of the Hub", help="The same.")
    ] = "train",
    revision: Annotated[
        str | None, typer.Option(rich_help_panel="Datasets of the Hub", help="The same.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core by default.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be read and what it would cost; write nothing.")
    ] = False,
) -> None:
    """Turn questions about clean pictures into data of stages 1 to 3: degraded pictures, paths, traces, three splits."""
    from rich.console import Console

    from clear_adapters.datasets.builder.assembly import Helpers
    from clear_adapters.datasets.builder.build import build as run
    from clear_adapters.datasets.builder.pathways import BaseModel
    from clear_adapters.datasets.builder.plan import Plan
    from clear_adapters.datasets.builder.stream import Stream
    from clear_adapters.datasets.builder.summary import tables
    from clear_adapters.rewards.judge import Judge

    plan = Plan(
        seed=seed,
        limit=limit,
        splits=_shares("splits", splits),
        severities=_shares("severities", severities),
        weights=weights.value,
        formulas=formulas.value,
        min_side=min_side,
        max_aspect=max_aspect,
        any_language=any_language,
        max_side=max_side,
        pathway=pathway.value,
        restore_from=restore_from,
        restore_share=_ratio(balance),
        writer=writer.value,
        match=match.value,
        tries=tries,
    )
    prices = _prices(price)
    origin = _origin(source, Stream(source, config, hub_split, revision))
    if dry_run:
        _tell_dry(origin, plan, pictures, prices, max_tokens)
        return
    judge = None
    pace: dict[str, Any] = {"per_minute": per_minute, "concurrency": concurrency, "timeout": timeout}
    if judge_url is not None or judge_model is not None:
        judge = Judge(
            _endpoint(
                "judge", judge_url, judge_model, key_env=judge_key_env, cache=str(output / MARKS), **pace
            )
        )
    done = run(
        origin,
        output,
        plan,
        pictures=pictures,
        helpers=Helpers(
            teacher=_teacher(
                teacher_url,
                teacher_model,
                device,
                max_tokens,
                key_env=teacher_key_env,
                cache=str(teacher_cache or output / REPLIES),
                options={"temperature": temperature, "max_tokens": max_tokens},
                **pace,
            ),
            judge=judge,
            base=BaseModel(model or MODEL, device=device, batch=batch_size, seed=seed)
            if plan.pathway == "backbone" or model is not None
            else None,
            prices=prices,
            budget=budget,
            leave_unanswered=leave_unanswered,
            workers=workers,
            report=lambda text: typer.echo(text, err=True),
        ),
    )
    for name in (
        REPLIES,
        MARKS,
    ):  # what a run needs that goes on; its rows are in the data or among the rejects
        shutil.rmtree(output / name, ignore_errors=True)
    Console().print(tables(done))
    typer.echo(
        f"{done['rows']['train']} training rows, {done['rows']['rl']} for stage 3 and {done['rows']['heldout']} held out "
        f"of {done['read']}, in {output}"
    )
    if not done["rows"]["train"] and plan.splits.get("train"):
        typer.echo(f"no training row is left: see {output / 'rejected.jsonl'}", err=True)


def _shares(name: str, text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in text.split(","):
        key, sign, value = part.partition("=")
        try:
            if not sign:
                raise ValueError
            found[key.strip()] = float(value)
        except ValueError:
            raise ClearValueError(f"--{name} {text!r}: must be shares as in 'a=0.8,b=0.2'") from None
    return found


def _ratio(text: str) -> float | None:
    """The share of the first of two numbers."""
    if text == "none":
        return None
    try:
        restore, direct = map(float, text.split(":"))
        if restore < 0 or direct < 0 or restore + direct == 0:
            raise ValueError
    except ValueError:
        raise ClearValueError(f"--balance {text!r}: must be a ratio as in '1:1', or 'none'") from None
    return restore / (restore + direct)


def _prices(text: str | None) -> Prices | None:
    from clear_adapters.datasets.builder.cost import Prices

    if text is None:
        return None
    try:
        prompt, completion = map(float, text.split(","))
        if prompt < 0 or completion < 0:
            raise ValueError
    except ValueError:
        raise ClearValueError(f"--price {text!r}: must be two numbers as in '2.5,10'") from None
    return Prices(prompt, completion)


def _origin(source: str, stream: Stream) -> Path | Stream:
    from clear_adapters.config import is_hub_id

    path = Path(source).expanduser()
    # A name of the Hub may hold a dot, and a mistyped file is none.
    file = path.exists() or path.suffix.lower() in (".json", ".jsonl", ".tsv", ".csv", ".parquet")
    if path.is_dir() or (not file and is_hub_id(source)):
        return stream
    return path


def _endpoint(what: str, url: str | None, model: str | None, **settings: Any) -> Endpoint:
    from clear_adapters.endpoint import Endpoint

    if url is None or model is None:
        raise ClearValueError(f"a {what} needs both --{what}-url and --{what}-model")
    return Endpoint(url, model, **settings)


def _teacher(
    url: str | None, model: str | None, device: str | None, max_tokens: int, **settings: Any
) -> Teacher | None:
    from clear_adapters.datasets.builder.teachers import EndpointTeacher, LocalTeacher

    if url is not None:
        return EndpointTeacher(_endpoint("teacher", url, model, **settings))
    return None if model is None else LocalTeacher(model, device=device, max_new_tokens=max_tokens)


def _tell_dry(
    origin: Path | Stream, plan: Plan, pictures: Path | None, prices: Prices | None, max_tokens: int
) -> None:
    from collections import Counter

    from clear_adapters.datasets.builder.build import foresee

    if not isinstance(origin, Path):
        raise ClearValueError("--dry-run reads a file: of a stream nothing is known before it is downloaded")
    found, expected = foresee(origin, plan, pictures=pictures, max_tokens=max_tokens)
    typer.echo(f"{found.read} rows read, {len(found.rows)} taken, {found.not_sampled} not sampled")
    for reason, count in Counter(r.reason for r in found.rejected).most_common():
        typer.echo(f"  left out: {reason}: {count}")
    if expected.requests:
        typer.echo(f"teacher, before balancing: {expected.told(prices)}")
    else:
        typer.echo("no teacher is asked, so it costs nothing")


@data.command(
    epilog="Examples: clear-adapters data check mine | clear-adapters data check train.jsonl test.jsonl"
)
def check(
    sets: Annotated[
        list[Path],
        typer.Argument(metavar="DATA...", help="A folder of data, or JSONL files, one a split."),
    ],
    match: Annotated[Match, typer.Option(help="How an answer is compared with the truth.")] = Match.auto,
    pictures: Annotated[bool, typer.Option(help="Decode every picture.")] = True,
    clean_image_dir: CleanDir = None,
    corrupted_image_dir: CorruptedDir = None,
) -> None:
    """Find what would spoil training, with file and line. Exit code 1 if something is found."""
    from clear_adapters.datasets.audit import audit

    found = audit(
        sets,
        clean_image_dir=clean_image_dir,
        corrupted_image_dir=corrupted_image_dir,
        match=match.value,
        pictures=pictures,
    )
    for finding in found.findings:
        typer.echo(str(finding))
    for name, counts in found.files.items():
        typer.echo(f"{name}: {counts['rows']} rows, {counts['traces']} traces", err=True)
    if found.findings:
        typer.echo(f"{len(found.findings)} problems", err=True)
        raise typer.Exit(1)
    typer.echo("no problem was found", err=True)


@data.command(epilog="Example: clear-adapters data view mine --output rows.html --rows 40")
def view(
    source: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with data.jsonl, or a JSONL file.")],
    output: Annotated[Path, typer.Option(help="The page, one file.")] = Path("data.html"),
    rows: Annotated[int, typer.Option(min=1, help="How many.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Which.")] = 0,
    clean_image_dir: CleanDir = None,
    corrupted_image_dir: CorruptedDir = None,
) -> None:
    """Write an HTML page of rows: clean, degraded, question, trace, answer, decision."""
    from clear_adapters.datasets.page import write_page

    typer.echo(
        write_page(
            source,
            output,
            rows=rows,
            seed=seed,
            clean_image_dir=clean_image_dir,
            corrupted_image_dir=corrupted_image_dir,
        )
    )
