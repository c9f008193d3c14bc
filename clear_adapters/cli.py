"""The command line: quick start, answers, degradations, the page, the Hub, data and training.

Libraries that take seconds to import are imported inside the commands, so `--help` is fast. What the library refuses is
one line on stderr and exit code 2; `--debug` shows the traceback instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from clear_adapters._version import __version__
from clear_adapters.cli_bench import bench
from clear_adapters.cli_data import data
from clear_adapters.cli_demo import demo
from clear_adapters.cli_options import ADAPTER, MODEL, AdapterName, Device, Formulas, ModelName
from clear_adapters.cli_train import train
from clear_adapters.errors import ClearError, ClearValueError

if TYPE_CHECKING:
    from clear_adapters.attached import AttachedModel
    from clear_adapters.reply import Event, Reply


class _Guarded(TyperGroup):
    """A group whose commands tell a refusal in one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ClearError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            message = " ".join(str(error).split())
            Console(stderr=True, soft_wrap=True).print(
                f"[bold red]error:[/] {escape(message)}", highlight=False
            )
            raise typer.Exit(2) from error


main = typer.Typer(
    cls=_Guarded,
    name="clear-adapters",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Let unified multimodal models restore a poor picture as a latent before they answer.",
    epilog="Begin with [bold]clear-adapters quickstart[/]: it is offline, on the CPU, and takes under a minute.",
)
main.add_typer(train, name="train")
main.add_typer(data, name="data")
main.add_typer(bench, name="bench")
main.command(
    epilog="Examples: clear-adapters demo | clear-adapters demo --adapter my-run/3-grpo --port 8000"
)(demo)


class Restoring(StrEnum):
    """When to restore."""

    auto = "auto"
    always = "always"
    never = "never"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"clear-adapters {__version__}")
        raise typer.Exit


@main.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass


@main.command(epilog="Example: clear-adapters quickstart --scenes 12 --json answers.json")
def quickstart(
    model: Annotated[str, typer.Option(help="builtin:NAME, a folder or a Hub id.")] = MODEL,
    adapter: Annotated[str, typer.Option(help="builtin:NAME, a folder or a Hub id.")] = ADAPTER,
    scenes: Annotated[int, typer.Option(min=1, max=64, help="How many.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Which scenes.")] = 0,
    output: Annotated[Path, typer.Option(help="The picture sheet.")] = Path("quickstart.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Answer questions about held-out degraded scenes, without and with the adapter, beside the truth."""
    from clear_adapters.quickstart import run

    run(model, adapter, scenes=scenes, seed=seed, output=output, json_file=json_file, device=device)


@main.command(
    epilog="Examples: clear-adapters answer street.jpg 'What does the sign say?' | "
    "clear-adapters answer street.jpg 'What is it?' --restore always --save-restored clear.png"
)
def answer(
    image: Annotated[Path, typer.Argument(help="Any picture: JPEG, PNG, WebP, ...")],
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    model: ModelName = None,
    adapter: AdapterName = None,
    restore: Annotated[
        Restoring, typer.Option(help="Let the model decide, or decide for it.")
    ] = Restoring.auto,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest turn; the adapter's own setting by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole reply as JSON.")] = False,
    save_restored: Annotated[Path | None, typer.Option(help="Write the restored picture here.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it is written.")] = False,
    device: Device = None,
) -> None:
    """Answer a question about a picture, restoring the picture first where it is too poor."""
    from clear_adapters.images import load_images
    from clear_adapters.quickstart import check_image_name

    load_images(image, question)  # before a model is loaded
    if save_restored is not None:
        check_image_name(save_restored)
    if stream and as_json:
        raise ClearValueError("--stream prints text and --json prints one object: choose one of them")
    attached, plain = _attach(model, adapter, device)
    if plain and restore is not Restoring.auto:
        raise ClearValueError(
            f"--restore {restore.value} needs an adapter, and the plain model has none: pass --adapter"
        )
    text = attached.config.text
    if max_new_tokens is not None:
        text = replace(text, max_new_tokens=max_new_tokens)
    with attached.disabled() if plain else nullcontext():
        if stream:
            events = attached.stream(image, question, restore=restore.value, text=text, seed=seed)
            reply = _print_stream(events)
        else:
            found = attached.answer(image, question, restore=restore.value, text=text, seed=seed)
            assert not isinstance(found, list)
            reply = found
    if save_restored is not None:
        _save_restored(reply, save_restored)
    if as_json:
        typer.echo(json.dumps(reply.to_json(), ensure_ascii=False, indent=2))
    elif not stream:
        typer.echo(reply.text)
        if reply.restored:
            typer.echo("(the picture was restored first)", err=True)


def _attach(model: str | None, adapter: str | None, device: str | None) -> tuple[AttachedModel, bool]:
    """The model, and whether it is to answer without an adapter."""
    from clear_adapters.adapter import attach

    if adapter is None and model in (None, MODEL):
        adapter = ADAPTER
    if adapter is None or adapter == "none":
        if adapter is None:
            typer.echo("no --adapter given: the plain model answers", err=True)
        return attach(model or MODEL, lora=False, bridge=False, device=device), True
    return attach(model, adapter, device=device), False


def _print_stream(events: Iterator[Event]) -> Reply:
    from clear_adapters.reply import Answer, DenoisingStep, TextDelta

    reply: Reply | None = None
    for event in events:
        if isinstance(event, TextDelta):
            typer.echo(event.text, nl=False)
        elif isinstance(event, DenoisingStep):
            end = event.step == event.steps
            typer.echo(f"\rrestoring {event.step}/{event.steps}", nl=end, err=True)
        elif isinstance(event, Answer):
            reply = event.reply
    typer.echo()
    assert reply is not None
    return reply


def _save_restored(reply: Reply, path: Path) -> None:
    from clear_adapters.quickstart import save_image

    picture = reply.restored_image
    if picture is None:
        typer.echo(f"nothing was restored, so {path} is not written; --restore always restores", err=True)
    else:
        save_image(picture, path)


def _list_degradations(wanted: bool) -> None:
    if not wanted:
        return
    from clear_adapters.degradations import list_degradations

    table = Table("name", "category", "weight", "what it does", title="Degradations of MMD-Bench")
    for entry in list_degradations():
        table.add_row(entry.name, entry.category, str(entry.weight), entry.description)
    Console().print(table)
    raise typer.Exit


@main.command(
    epilog="Examples: clear-adapters degrade --list | clear-adapters degrade in.jpg out.png --name lens_blur "
    "--severity high"
)
def degrade(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Any picture.")],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The format follows the ending.")],
    name: Annotated[
        str | None, typer.Option(help="One of --list; drawn with the benchmark's weights by default.")
    ] = None,
    severity: Annotated[str, typer.Option(help="low, mid, high, or a number from 0 to 1.")] = "mid",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    formulas: Annotated[
        Formulas, typer.Option(help="As the benchmark, or with damage that grows with severity.")
    ] = Formulas.legacy,
    list_all: Annotated[
        bool,
        typer.Option("--list", callback=_list_degradations, is_eager=True, help="List the names and leave."),
    ] = False,
) -> None:
    """Corrupt a picture as MMD-Bench does."""
    from clear_adapters import degradations
    from clear_adapters.quickstart import save_image

    if source.exists() and target.exists() and target.samefile(source):
        raise ClearValueError(f"{target} is the input: give the degraded picture another name")
    level: Any = severity
    with suppress(ValueError):  # a word: the library knows which there are
        level = float(severity)
    result = degradations.degrade(source, name, severity=level, seed=seed, formulas=formulas.value)
    save_image(result, target)
    typer.echo(f"{name or degradations.draw(seed)} at {severity}: {target}")


Results = Annotated[
    list[Path] | None,
    typer.Option(help="Result file with scores of this very adapter; repeat for more."),
]
License = Annotated[str | None, typer.Option(help="Of the adapter, as the Hub writes it: apache-2.0.")]


@main.command(
    epilog="Examples: clear-adapters push my-run/3-grpo me/clear-mine --private --license apache-2.0 | clear-adapters push "
    "my-run/3-grpo me/clear-mine --revision seed-1. The token is that of 'hf auth login', or HF_TOKEN."
)
def push(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    repo_id: Annotated[str, typer.Argument(help="Model repository, owner/name; made if there is none.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a repository that is made.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made if there is none.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it in a pull request.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another adapter there.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload CLEAR adapter",
    results: Results = None,
    license: License = None,
) -> None:
    """Push an adapter folder with its card to the Hub, in one commit."""
    from clear_adapters.hub.push import push_folder

    done = push_folder(
        adapter,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        overwrite=overwrite,
        results=results or (),
        license=license,
    )
    typer.echo(
        done.pull_request or done.url if done.changed else f"nothing to do: {done.url} has these files"
    )


@main.command(
    epilog="Example: clear-adapters card builtin:clear-bagel-tiny --output model_cards/clear-bagel-tiny "
    "--results benchmarks/results/degraded_world.json --license apache-2.0"
)
def card(
    adapter: Annotated[str, typer.Argument(help="A folder, builtin:NAME or a Hub id.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the card and its facts; the adapter's own by default.")
    ] = None,
    results: Results = None,
    license: License = None,
    repo_id: Annotated[str | None, typer.Option(help="Repository that the card tells to load.")] = None,
) -> None:
    """Write an adapter's model card from what is recorded about it; a README's own text is kept."""
    from clear_adapters.hub.write import write_card

    typer.echo(write_card(adapter, output, results=results or (), license=license, repo_id=repo_id))


@main.command()
def backbones() -> None:
    """List the families of models that adapters can be attached to."""
    from clear_adapters.backbones import BACKBONES, get_backbone, list_backbones
    from clear_adapters.errors import BrokenEntryError, ClearTypeError

    table = Table("name", "", title="Backbones", show_header=False, show_lines=True)
    for name in list_backbones():
        try:
            spec = get_backbone(name)
        except (BrokenEntryError, ClearTypeError) as error:
            table.add_row(name, f"cannot be used: {escape(str(error))}")
            continue
        restores = "flow latents" if spec.kind == "flow" else "codes"
        can = ["answer", f"restore ({restores})", *(["decode"] if spec.decodes else [])]
        facts = {
            "family": spec.title,
            "can": ", ".join([*can, *(f"train {s}" for s in spec.stages)]),
            "checkpoints": ", ".join(spec.checkpoints),
            "tested": spec.tested_with,
            "licence": spec.license,
            "from": BACKBONES.origin(name),
        }
        told = "\n".join(f"[dim]{key}[/] {escape(value)}" for key, value in facts.items() if value)
        table.add_row(f"[bold]{escape(name)}[/]", told)
    Console().print(table)


@main.command()
def validate(
    backbone: Annotated[
        str, typer.Argument(help="A name, or module:NAME of a BackboneSpec that is not registered yet.")
    ],
    check: Annotated[
        list[str] | None, typer.Option(help="Only this check; repeat for more. All by default.")
    ] = None,
) -> None:
    """Check on a tiny model that a backbone does all that it has to; tell what fails and why. Exit code 1 if something does."""
    from clear_adapters.contract import find_spec
    from clear_adapters.contract import validate as checked

    console, failed = Console(soft_wrap=True), 0
    for result in checked(find_spec(backbone), check):
        mark = "[green]ok[/]  " if result.problem is None else "[bold red]FAIL[/]"
        console.print(
            f"{mark} {result.name}: {escape(result.what)} ({result.seconds:.1f} s)", highlight=False
        )
        if result.problem is not None:
            failed += 1
            console.print(f"     {escape(' '.join(result.problem.split()))}", highlight=False)
    if failed:
        console.print(f"[bold red]{failed} of the checks failed.[/]")
        raise typer.Exit(1)
    console.print("All checks passed.")


if __name__ == "__main__":
    main()
