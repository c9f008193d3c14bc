"""Trains every adapter of the table, several side by side on one GPU, and measures each as soon as it is there.

    clear-adapters data world --output runs/sft-data --examples 90000 --questions-per-scene 5
    clear-adapters data world --output runs/rl-data --examples 30000 --questions-per-scene 1 --seed 1
    python benchmarks/degraded_world/train_table.py --data runs/sft-data --rl-data runs/rl-data --output runs/table \
        --results benchmarks/results/degraded_world.json

A small model leaves a GPU mostly idle, so that six runs take little longer than one; with `--gpus N` each run goes to the
GPU that has the fewest. What is finished is left as it is and what was stopped goes on, since that is what the commands do.
A family begins when the one that it goes on from has ended. With `--results` evaluate.py measures in parts, which stand in
OUTPUT and are merged at the end, also where some runs failed. `--ship` then puts the first seed's adapter of each stage in
the place of the built-in ones.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from systems import SYSTEMS

from clear_adapters import store
from clear_adapters.errors import ClearError, ClearValueError, unknown_name
from clear_adapters.training.recipe import STAGES, divide_overrides, load_recipe

ROOT = Path(__file__).resolve().parents[2]
EVALUATE = Path(__file__).with_name("evaluate.py")
BUILTIN = ROOT / "clear_adapters" / "builtin"


@dataclass(frozen=True)
class Family:
    """Adapters of one way of training, one a seed.

    Attributes:
        stage: of the recipe.
        before: the family whose adapter of the same seed it goes on from; None begins anew.
        overrides: of the recipe.
        every_seed: whether all seeds are trained, or the first only.
    """

    stage: str
    before: str | None = None
    overrides: tuple[str, ...] = ()
    every_seed: bool = True


FAMILIES = {
    "direct": Family("sft", None, ("sft.mode=direct",)),  # for how long: see `direct_steps`
    "sft": Family("sft"),
    "bridge": Family("bridge", "sft"),
    "truth": Family(
        "bridge",
        "sft",
        (
            "trains=[understanding,bridge]",
            "bridge.own=0",
            "bridge.estimate=0",
            "bridge.mse_weight=0",
        ),
        every_seed=False,
    ),
    "own": Family(
        "bridge",
        "sft",
        ("trains=[understanding,bridge]", "bridge.estimate=0", "bridge.mse_weight=0"),
        every_seed=False,
    ),
    "published": Family(
        "bridge", "sft", ("bridge.distill=per_layer_kl", "bridge.distill_weight=0.02"), every_seed=False
    ),
    "centred": Family(
        "bridge",
        "sft",
        ("bridge.distill=per_layer_kl", "bridge.distill_weight=0.02", "bridge.centred=true"),
        every_seed=False,
    ),
    "clear": Family("grpo", "bridge"),
    "reencode": Family("grpo", "bridge", ("grpo.latent_from=reencode",)),
    "image0": Family("grpo", "bridge", ("grpo.image_weight=0",), every_seed=False),
    "decision": Family(
        "grpo",
        "bridge",
        ("grpo.rewards={accuracy: 0.75, format: 0.1, decision: {weight: 0.15, settings: {table: paper}}}",),
        every_seed=False,
    ),
}


SHIPPED = {
    "builtin:bagel-tiny": {
        "sft": "clear-bagel-tiny-sft",
        "bridge": "clear-bagel-tiny-bridge",
        "clear": "clear-bagel-tiny",
    },
    "builtin:janus-tiny": {"clear": "clear-janus-tiny"},
}
"""Built-in adapters of each built-in model, by the family that they are of."""


@dataclass(frozen=True)
class Job:
    """One adapter to be trained, or a part of the table to be measured.

    Attributes:
        name: of its folder or result file.
        needs: names of the jobs before.
        command: what trains or measures it.
    """

    name: str
    needs: tuple[str, ...]
    command: tuple[str, ...]


def plan(args: argparse.Namespace) -> list[Job]:
    """All jobs, each behind what it needs.

    Raises:
        UnknownNameError: a family that does not exist, or a key of --set that no stage has.
        ClearValueError: --set cannot be read.
    """
    for name in args.families:
        if name not in FAMILIES:
            raise unknown_name("family", name, FAMILIES)
    wanted = with_those_before(args.families)
    given = divide_overrides(args.set, sorted({FAMILIES[family].stage for family in wanted}))
    steps = direct_steps(args.recipe, given)
    jobs = []
    for family in wanted:
        own = FAMILIES[family]
        for seed in seeds_of(family, args.seeds):
            needs = None if own.before is None else f"{own.before}{seed}"
            data = args.rl_data if own.stage == "grpo" else args.data
            command = [
                sys.executable,
                "-m",
                "clear_adapters.cli",
                "train",
                own.stage,
                "--recipe",
                args.recipe,
            ]
            command += [
                "--model",
                args.model,
                "--data",
                str(data),
                "--output",
                str(args.output / f"{family}{seed}"),
            ]
            command += [] if needs is None else ["--adapter", str(args.output / needs)]
            overrides = [*own.overrides, f"seed={seed}", *given[own.stage]]
            overrides += [f"loop.steps={steps}"] if family == "direct" else []
            command += [part for override in overrides for part in ("--set", override)]
            jobs.append(Job(f"{family}{seed}", () if needs is None else (needs,), tuple(command)))
    return jobs + (measurements(args, wanted) if args.results else [])


def direct_steps(recipe: str, given: Mapping[str, Sequence[str]]) -> int:
    """Steps of direct tuning: as many samples as the three stages together have, rollouts counted singly, and a little more.

    Raises:
        UnknownNameError: no such recipe.
        ClearValueError: an override cannot be used.
    """
    stages = [load_recipe(recipe, given.get(stage, ()), stage) for stage in STAGES]
    samples = sum(r.loop.steps * r.loop.batch * (r.grpo.group if r.stage == "grpo" else 1) for r in stages)
    return math.ceil(1.025 * samples / stages[0].loop.batch)


def with_those_before(names: Sequence[str]) -> list[str]:
    """Families and all that they go on from, in the order of training."""
    wanted = set(names)
    for name in names:
        before = FAMILIES[name].before
        while before is not None:
            wanted.add(before)
            before = FAMILIES[before].before
    return [family for family in FAMILIES if family in wanted]


def seeds_of(family: str, seeds: Sequence[int]) -> Sequence[int]:
    """Those that a family is trained with."""
    return seeds if FAMILIES[family].every_seed else seeds[:1]


def measurements(args: argparse.Namespace, wanted: Sequence[str]) -> list[Job]:
    """What evaluate.py has to measure: the base, then each adapter; the first also as controls and by its pictures."""
    systems: dict[tuple[str | None, bool], list[str]] = {}
    for system in SYSTEMS:
        systems.setdefault((system.family, system.every_seed), []).append(system.name)
    # The base comes first: it draws the held-out pictures for all.
    jobs = [_measurement(args, "measure-base", (), systems[None, False])]
    for family in wanted:
        for run, seed in enumerate(seeds_of(family, args.seeds)):
            for every_seed in (True, False):
                names = systems.get((family, every_seed), [])
                if names and (every_seed or run == 0):
                    name = f"measure-{family}{seed}{'' if every_seed else '-controls'}"
                    jobs.append(_measurement(args, name, (f"{family}{seed}",), names, "--runs", str(run)))
    return jobs


def _measurement(
    args: argparse.Namespace, name: str, needs: tuple[str, ...], systems: Sequence[str], *more: str
) -> Job:
    command = [sys.executable, str(EVALUATE), "--model", args.model, "--systems", ",".join(systems), *more]
    command += ["--output", str(args.output / f"{name}.json"), "--cache", str(args.output / "heldout")]
    if needs:
        command.append("--adapters")
        for family in with_those_before(args.families):
            folders = (str(args.output / f"{family}{seed}") for seed in seeds_of(family, args.seeds))
            command.append(f"{family}={','.join(folders)}")
    first = () if name == "measure-base" else ("measure-base",)
    return Job(name, (*needs, *first), (*command, *(part for own in args.measure for part in own.split())))


def merge(args: argparse.Namespace, jobs: Sequence[Job], failed: Sequence[str]) -> int:
    """Puts the parts that were measured into one result file; gives the exit status of evaluate.py."""
    done = [j.name for j in jobs if j.name.startswith("measure-") and j.name not in failed]
    parts = [str(args.output / f"{name}.json") for name in done]
    command = [sys.executable, str(EVALUATE), "--model", args.model, "--output", str(args.results)]
    command += ["--fresh", "--only-merge", "--merge", *parts]
    command += [part for own in args.measure for part in own.split()]
    return subprocess.run(command, check=False).returncode if parts else 1


def run(jobs: list[Job], output: Path, parallel: int, gpus: int = 0) -> list[str]:
    """Runs jobs side by side; gives the names of those that failed or could not begin.

    Args:
        jobs: each behind what it needs.
        output: folder of the adapters, and of a log for each job.
        parallel: jobs at a time.
        gpus: GPUs that they share; 0 leaves the choice to them.
    """
    output.mkdir(parents=True, exist_ok=True)
    waiting, running, done, failed = list(jobs), {}, set(), []
    places: dict[str, int] = {}
    known = {job.name for job in jobs}
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    env.setdefault("OMP_NUM_THREADS", "1")
    began = time.perf_counter()
    while waiting or running:
        for job in [j for j in waiting if any(name in failed for name in j.needs)]:
            waiting.remove(job)
            failed.append(job.name)
        ready = [j for j in waiting if all(name in done or name not in known for name in j.needs)]
        for job in ready[: parallel - len(running)]:
            waiting.remove(job)
            own = dict(env)
            if gpus:
                load = Counter(places[name] for name in running)
                places[job.name] = min(range(gpus), key=lambda gpu: load[gpu])
                own["CUDA_VISIBLE_DEVICES"] = str(places[job.name])
            with (output / f"{job.name}.log").open("ab") as log:
                running[job.name] = subprocess.Popen(job.command, stdout=log, stderr=log, env=own)
        for name, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            print(f"{time.perf_counter() - began:6.0f} s  {name}: exit {process.returncode}", flush=True)
            (failed.append if process.returncode else done.add)(name)
        time.sleep(0.2)
    return failed


def ship(output: Path, seed: int, builtin: Path, model: str) -> list[str]:
    """Copies one seed's adapters to where the package keeps its own; gives their names.

    Raises:
        UnknownNameError: the model is none whose adapters ship.
        ClearValueError: an adapter is not there.
    """
    if model not in SHIPPED:
        raise unknown_name("model whose adapters ship", model, SHIPPED)
    shipped = SHIPPED[model]
    for family in shipped:
        if not (output / f"{family}{seed}" / store.CONFIG).is_file():
            raise ClearValueError(
                f"{output / f'{family}{seed}'} is no finished adapter: train family {family} first"
            )
    for family, name in shipped.items():
        shutil.rmtree(builtin / name, ignore_errors=True)
        shutil.copytree(output / f"{family}{seed}", builtin / name)
    return list(shipped.values())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="of stages 1 and 2, and of direct tuning")
    p.add_argument("--rl-data", type=Path, required=True, help="of stage 3: other scenes than --data")
    p.add_argument("--output", type=Path, required=True, help="folder of all adapters")
    p.add_argument("--model", default="builtin:bagel-tiny")
    p.add_argument("--recipe", default="tiny")
    p.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="F", help=", ".join(FAMILIES))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for every run, or STAGE:KEY=VALUE"
    )
    p.add_argument("--parallel", type=int, default=6, metavar="N", help="runs side by side")
    p.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs that the runs are spread over")
    p.add_argument("--results", type=Path, metavar="FILE", help="also measure, into this result file")
    p.add_argument(
        "--measure", action="append", default=[], metavar="OPTIONS", help="further options of evaluate.py"
    )
    p.add_argument("--ship", action="store_true", help="make the first seed's adapters the built-in ones")
    p.add_argument("--dry-run", action="store_true", help="print the commands")
    return p.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Trains and measures what is asked for."""
    args = parse(arguments)
    try:
        jobs = plan(args)
    except ClearError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.dry_run:
        for job in jobs:
            print(" ".join(job.command))
        return 0
    failed = run(jobs, args.output, max(1, args.parallel), args.gpus)
    for name in failed:
        print(f"error: {name} failed; see {args.output / f'{name}.log'}", file=sys.stderr)
    if args.results and merge(args, jobs, failed):
        print(f"error: the parts in {args.output} could not be merged into {args.results}", file=sys.stderr)
        return 1
    if failed:
        return 1
    if args.ship:
        try:
            print("shipped", ", ".join(ship(args.output, args.seeds[0], BUILTIN, args.model)))
        except ClearError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
