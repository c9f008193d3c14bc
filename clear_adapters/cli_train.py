"""The commands of training: `clear-adapters train`."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from clear_adapters.cli_options import MODEL, Device

train = typer.Typer(no_args_is_help=True, help="Train an adapter, one stage a command or all of them.")


def _run_options(
    data: Annotated[Path, typer.Option(help="Folder with data.jsonl, or a JSONL file.")],
    output: Annotated[Path, typer.Option(help="Folder of the adapter; of the three adapters for 'all'.")],
    recipe: Annotated[
        str, typer.Option(help="A name (tiny, paper, release), a folder with a file a stage, or a YAML file.")
    ] = "tiny",
    model: Annotated[
        str | None,
        typer.Option(
            help=f"builtin:NAME, a folder or a Hub id; {MODEL}, or what the adapter was trained on."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[STAGE:]KEY=VALUE",
            help="Change the recipe, of every stage that has the key or of one; repeat for more.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was stopped.")] = True,
    seed: Annotated[int | None, typer.Option(help="Of the run; the recipe's by default.")] = None,
    clean_image_dir: Annotated[
        Path | None, typer.Option(help="Of clean pictures, for data in the authors' form.")
    ] = None,
    corrupted_image_dir: Annotated[
        Path | None, typer.Option(help="Of degraded pictures, for data in the authors' form.")
    ] = None,
    device: Device = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The options that all training commands share, as arguments of `train` and `train_all`."""
    return (recipe, data, output), {
        "model": model,
        "resume": resume,
        "device": device,
        "overrides": [*(settings or []), *([] if seed is None else [f"loop.seed={seed}"])],
        "clean_image_dir": clean_image_dir,
        "corrupted_image_dir": corrupted_image_dir,
    }


def _training(command: Callable[..., None]) -> Callable[..., None]:
    """A command with these options beside its own; it is called with what `_run_options` makes of them."""
    shared = inspect.signature(_run_options, eval_str=True).parameters
    own = list(inspect.signature(command, eval_str=True).parameters.values())[2:]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("clear_adapters.training").setLevel(logging.INFO)
        places, more = _run_options(**{name: values.pop(name) for name in shared})
        try:
            command(places, more, **values)
        except KeyboardInterrupt:
            typer.echo(
                "\nstopped: the same command goes on from the last checkpoint (every save_every steps)",
                err=True,
            )
            raise typer.Exit(130) from None
        from clear_adapters.training.group import leave_group

        leave_group()

    parameters = [*shared.values(), *own]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


AdapterBefore = Annotated[
    str | None, typer.Option(help="Adapter of the stage before: a folder, builtin:NAME or a Hub id.")
]


@train.command(
    epilog="Example: clear-adapters train sft --recipe tiny --data runs/data --output runs/clear-0 "
    "--set loop.steps=500 --set optim.lr=1e-4"
)
@_training
def sft(places: Any, more: Any) -> None:
    """Stage 1: generate, then answer (supervised)."""
    _train("sft", places, more)


@train.command(
    epilog="Example: clear-adapters train bridge --recipe tiny --data runs/data --adapter runs/clear-0 "
    "--output runs/clear-1"
)
@_training
def bridge(places: Any, more: Any, adapter: AdapterBefore = None) -> None:
    """Stage 2: read the restoration through the bridge."""
    _train("bridge", places, {**more, "adapter": adapter})


@train.command(
    epilog="Example: clear-adapters train grpo --recipe tiny --data runs/data --adapter runs/clear-1 "
    "--output runs/clear-2 --set grpo.rewards.accuracy=1"
)
@_training
def grpo(places: Any, more: Any, adapter: AdapterBefore = None) -> None:
    """Stage 3: interleaved GRPO over text and restorations."""
    _train("grpo", places, {**more, "adapter": adapter})


@train.command(
    "all",
    epilog="Example: clear-adapters train all --recipe tiny --data runs/data --output runs/clear --set grpo:steps=50",
)
@_training
def all_stages(places: Any, more: Any) -> None:
    """The three stages one after the other, into OUTPUT/1-sft, 2-bridge and 3-grpo; goes on where it was stopped."""
    from clear_adapters.training.run import train_all

    train_all(*places, **more, report=_report)


def _train(stage: str, places: tuple[Any, ...], more: dict[str, Any]) -> None:
    from clear_adapters.training.run import train as run

    _report(stage, run(*places, stage=stage, **more))


def _report(stage: str, folder: Path) -> None:
    from clear_adapters.training.group import rank
    from clear_adapters.training.run import summary

    if rank():  # one of several processes tells
        return
    typer.echo(summary(folder))


@train.command(
    epilog="Example: clear-adapters train plot runs/clear-2.training/log.jsonl --output clear-2.png"
)
def plot(
    log: Annotated[Path, typer.Argument(help="The log.jsonl in OUTPUT.training of a run.")],
    output: Annotated[Path, typer.Option(help="The picture; its ending says the format.")] = Path(
        "training.png"
    ),
) -> None:
    """Draw a run from its log: losses and, of stage 3, rewards, restore rate, KL and length of replies."""
    from clear_adapters.training.plot import plot_log

    typer.echo(plot_log(log, output))
