"""A training run from a recipe: model, data and the adapter of the stage before in, adapter folder out.

Work in progress (checkpoints, log) stands beside the output, in `<output>.training`; the adapter appears in one move.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from clear_adapters import store
from clear_adapters.adapter import choose_device
from clear_adapters.backbones.base import Backbone
from clear_adapters.config import ClearConfig, is_builtin_name, is_hub_id
from clear_adapters.datasets.example import DATA, read_examples
from clear_adapters.download import commit_of
from clear_adapters.errors import ClearValueError
from clear_adapters.prompts import get_protocol
from clear_adapters.results import git_state, installed_versions
from clear_adapters.store import CONFIG
from clear_adapters.training.build import LOG, attach_for, trainer_for
from clear_adapters.training.group import join_group, rank
from clear_adapters.training.publish import Publisher, check_access
from clear_adapters.training.recipe import STAGES, Recipe, divide_overrides, list_recipes, load_recipe
from clear_adapters.training.trainer import ClearTrainer, last_checkpoint, newest_checkpoint
from clear_adapters.training.watch import watching

_LOG = logging.getLogger(__name__)
RUN = "run.json"
_HOW = ("micro_batch", "shard", "timeout", "workers")
MODEL = "builtin:bagel-tiny"
_OWN = "tiny"
"""The recipe of that model."""
_COMING = 60.0
"""Seconds at least that processes wait for each other to begin: they do not load their libraries equally fast."""


def train(
    recipe: Recipe | str | Path,
    data: str | Path,
    output: str | Path,
    *,
    stage: str | None = None,
    model: Any = None,
    adapter: str | Path | None = None,
    resume: bool = True,
    device: str | torch.device | None = None,
    overrides: Sequence[str] = (),
    clean_image_dir: str | Path | None = None,
    corrupted_image_dir: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Trains one stage and writes the adapter.

    Args:
        recipe: one that is loaded, its name, a folder of recipes, or a file.
        data: a folder with `data.jsonl`, or a JSONL file.
        output: folder of the adapter.
        stage: `sft`, `bridge` or `grpo`; None is that of a loaded recipe, else `sft`.
        model: what `attach` takes. None is the built-in one for `sft`, and later the model that the adapter was trained on.
        adapter: for `bridge` and `grpo`: `builtin:NAME`, folder or Hub id of the stage before. Its layout and protocol are
            kept, and its weights are what `grpo` measures its KL to.
        resume: go on with a run of the same recipe, data, model and adapter that was stopped, on any number of processes; one
            that is finished is left as it is. Of a loaded model only the type is compared, and of a recipe not
            `loop.micro_batch`, `shard`, `timeout` and `workers`.
        device: where a model that is named runs; None is the CUDA GPU if there is one. A loaded model stays where it is.
        overrides: `key=value` for the recipe.
        clean_image_dir: for data in the authors' form.
        corrupted_image_dir: for data in the authors' form.
        progress: show a bar.

    Returns:
        The adapter's folder.

    Raises:
        ClearValueError: settings or data that cannot work, an adapter that is missing or not wanted, an output that
            exists without `resume`, a run of other settings in its place, or a loss that is not finite.
        UnknownNameError: an unknown recipe, key, model or adapter.
        AdapterError: the adapter cannot be used, or the finished one cannot be published where the recipe says.
        LostProcessError: of several processes another one has ended. One that gives no sign for `loop.timeout` seconds, or
            processes that wait for each other so long, end this one with a message and exit status 3.
    """
    named, recipe = recipe, _recipe(recipe, stage, overrides)
    _check_adapter(recipe.stage, adapter)
    if model is None and adapter is None:
        model = _default_model(named)
    output = Path(os.path.abspath(output))  # noqa: PTH100 (a link at the end stays one)
    # Exchanges may wait for the slowest: the watch ends those that would wait for good, and their own limit is the last resort.
    join_group(_device_type(model, device), 10 * recipe.loop.timeout, max(_COMING, recipe.loop.timeout))
    with watching(recipe.loop.timeout, lambda: _going_on(work_of(output))):
        return _run(
            *(recipe, data, output, model, adapter, resume, device),
            *(clean_image_dir, corrupted_image_dir, progress),
        )


def _run(
    recipe: Recipe,
    data: str | Path,
    output: Path,
    model: Any,
    adapter: str | Path | None,
    resume: bool,
    device: str | torch.device | None,
    clean_image_dir: str | Path | None,
    corrupted_image_dir: str | Path | None,
    progress: bool,
) -> Path:
    work = work_of(output)
    examples = read_examples(data, clean_image_dir=clean_image_dir, corrupted_image_dir=corrupted_image_dir)
    facts = None
    if rank() == 0:  # the process that checks the place and writes
        before = None if adapter is None else store.read_adapter(store.resolve(adapter, "adapter")).config
        protocol = get_protocol(recipe.protocol) if before is None else before.protocol
        facts = {
            "recipe": recipe.to_dict(),
            "data_hash": data_hash(data),
            "examples": len(examples),
            "model": _identity(model) if model is not None else _base_of(adapter, before),
            "protocol": _digest(repr(protocol)),
            "images": _digest(
                *(f"{p and Path(p).absolute()}" for p in (clean_image_dir, corrupted_image_dir))
            ),
        }
        if adapter is not None:
            facts["adapter"] = _name_and_hash(adapter, "adapter", store.adapter_digest)
        facts = json.loads(json.dumps(facts))
    before_made = None if facts is None or before is None else dict(before.provenance)
    hub = recipe.hub if facts is not None and recipe.hub.repo_id is not None else None
    if hub is not None:
        check_access(hub)
    if _is_done(output, work, facts, resume):
        if hub is not None and facts is not None:
            Publisher(hub, facts, before_made, lambda folder: folder).finish(output)
        return output
    attached = attach_for(recipe, model, adapter, device)
    try:
        with _writing_to(work):
            trainer = trainer_for(attached, recipe, examples, work, progress=progress)
        last, publisher = None, None

        def save(folder: Path) -> Path:
            assert facts is not None
            provenance = _provenance(facts, trainer, attached.config)
            # Of this copy only: a checkpoint's adapter goes on from what it was.
            attached.config, held = (
                replace(attached.config, stage=recipe.stage, provenance=provenance),
                attached.config,
            )
            try:
                return attached.save_pretrained(folder, dtype=getattr(torch, recipe.loop.save_dtype))
            finally:
                attached.config = held

        if hub is not None and facts is not None:
            publisher = Publisher(hub, facts, before_made, save)
            trainer.add_callback(publisher)
        if facts is not None:
            # Only now: settings that were refused until here leave nothing behind.
            _claim(work, facts)
            last = last_checkpoint(work)
            if last is not None:
                _LOG.info("going on from %s", last.name)
            else:
                (work / LOG).unlink(missing_ok=True)
        last = broadcast_object_list([last])[0]
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if facts is not None:
            save(output)
        if publisher is not None:
            publisher.finish(output)
        trainer.accelerator.wait_for_everyone()
    finally:
        attached.detach()
    return output


def train_all(
    recipe: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    model: Any = None,
    overrides: Sequence[str] = (),
    report: Callable[[str, Path], None] | None = None,
    **settings: Any,
) -> list[Path]:
    """Trains the three stages, each from the adapter of the one before.

    Stages that are finished are left as they are, and one that was stopped goes on.

    Args:
        recipe: a name, or a folder of recipes with a file for each stage.
        data: as for `train`, for every stage.
        output: folder of the adapters `1-sft`, `2-bridge` and `3-grpo`.
        model: as for `train`, for every stage.
        overrides: `key=value` for each stage that has the key, `stage:key=value` for that one.
        report: called with stage and adapter folder when one is finished, also when it was before.
        **settings: further ones of `train`.

    Returns:
        The adapters' folders.

    Raises:
        ClearError: as for `train`; recipes are checked before the first stage begins.
    """
    divided = divide_overrides(overrides, STAGES)
    recipes = [load_recipe(recipe, divided[stage], stage) for stage in STAGES]
    model = _default_model(recipe) if model is None else model
    done: list[Path] = []
    for number, loaded in enumerate(recipes, 1):
        folder = Path(output) / f"{number}-{loaded.stage}"
        before = done[-1] if done else None
        done.append(train(loaded, data, folder, model=model, adapter=before, **settings))
        gc.collect()  # trainer and model hold each other, and a GPU may have no room for the next one beside them
        if report is not None:
            report(loaded.stage, done[-1])
    return done


def summary(folder: Path) -> str:
    """One line on a finished run: stage, steps, time, and its last logged losses."""
    config = ClearConfig.from_json((folder / CONFIG).read_text(encoding="utf-8"), str(folder / CONFIG))
    made = config.provenance
    minutes, seconds = divmod(round(made["seconds"]), 60)
    final = sorted(made["final"].items(), key=lambda item: item[0] != "loss")
    losses = ", ".join(f"{name} {value:.4g}" for name, value in final)
    return (
        f"{config.stage}: {made['steps']} steps in {minutes}:{seconds:02} min; {losses}; adapter in {folder}"
    )


def _default_model(recipe: Any) -> str:
    """The built-in model, for the recipe that is for it and for those of a user's own."""
    if recipe in list_recipes() and recipe != _OWN:
        raise ClearValueError(
            f"recipe {recipe!r} is not for the built-in {MODEL}, which {_OWN!r} is for: name the model to train (--model, "
            "model=); `clear-adapters backbones` lists what each family loads"
        )
    return MODEL


def work_of(output: Path) -> Path:
    """Where the checkpoints and the log of a run stand."""
    return output.with_name(f"{output.name}.training")


def _device_type(model: Any, device: str | torch.device | None) -> str:
    """Of the device that this process trains on."""
    if isinstance(model, torch.nn.Module):
        return next(model.parameters()).device.type
    return model.device.type if isinstance(model, Backbone) else choose_device(device).type


def _going_on(work: Path) -> str:
    """What can be done about a run that was ended."""
    newest = newest_checkpoint(work)
    state = "No checkpoint was written yet" if newest is None else f"The checkpoints in {work} are whole"
    return (
        f"{state}: the same command again, on any number of processes, goes on from "
        f"{'the beginning' if newest is None else newest.name}. Where one call of a library may take longer, raise loop.timeout"
    )


def _recipe(recipe: Recipe | str | Path, stage: str | None, overrides: Sequence[str]) -> Recipe:
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides, stage or STAGES[0])
    if overrides:
        raise ClearValueError("overrides= is for a recipe that is read here; this one is loaded already")
    if stage not in (None, recipe.stage):
        raise ClearValueError(f"stage={stage!r}, but the recipe that was passed is of stage {recipe.stage!r}")
    return recipe


def _check_adapter(stage: str, adapter: str | Path | None) -> None:
    number = STAGES.index(stage)
    if number == 0 and adapter is not None:
        raise ClearValueError(
            f"stage {stage} makes a new adapter and does not go on from adapter={str(adapter)!r}: leave it out, or train "
            f"stage {' or '.join(STAGES[1:])} from it"
        )
    if number > 0 and adapter is None:
        raise ClearValueError(
            f"stage {stage} goes on from the adapter of stage {STAGES[number - 1]}, and none was given: pass its folder, "
            "'builtin:NAME' or Hub id as adapter= (--adapter)"
        )


def _identity(model: Any) -> dict[str, str | None]:
    """What tells one base model from another: name and hash of its files, or the type of a loaded one."""
    if not isinstance(model, str | Path):
        return {"name": type(model).__name__, "hash": None}
    return _name_and_hash(model, "model", store.model_digest)


def _base_of(adapter: Any, config: ClearConfig | None) -> dict[str, str | None]:
    assert config is not None
    if config.base_model is None:
        raise ClearValueError(
            f"adapter {adapter} does not say which model it was trained on (it was none with a public name): pass that "
            "model as model= (--model)"
        )
    return _name_and_hash(config.base_model, "model", store.model_digest, config.base_revision)


def _name_and_hash(
    name: str | Path, kind: store.Kind, digest: Callable[[Path], str], revision: str | None = None
) -> dict[str, str | None]:
    folder = store.resolve(name, kind, revision=revision)
    text = str(name)
    is_public = is_builtin_name(text) or (is_hub_id(text) and not Path(text).exists())
    # It is published with the adapter: of a folder on this machine only the last part.
    found: dict[str, str | None] = {
        "name": text if is_public else folder.resolve().name,
        "hash": digest(folder),
    }
    commit = commit_of(folder)
    return found if commit is None else {**found, "revision": commit}


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _is_done(output: Path, work: Path, facts: dict[str, Any] | None, resume: bool) -> bool:
    """Whether the run is finished; refuses a place that holds something else, and changes nothing."""
    record = work / RUN
    if facts is None:
        # The first process checks the place.
        return record.is_file() and (output / CONFIG).is_file()
    exists = record.is_file() or (output.is_dir() and any(output.iterdir()))
    if exists and not resume:
        raise ClearValueError(f"{output} (or {work}) exists: choose another output, or pass resume=True")
    if record.is_file():
        try:
            before = dict(json.loads(record.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ClearValueError(f"{record} is damaged ({error}): delete {work} and train again") from error
        own, other = _decisive(facts), _decisive(before)
        parts = [k for k in {**own, **other} if own.get(k) != other.get(k)]
        if parts:
            told = _differing(other.get("recipe"), own.get("recipe")) if "recipe" in parts else []
            others = [part for part in parts if part != "recipe"]
            told += [f"{', '.join(others)} differ"] if others else []
            raise ClearValueError(
                f"{work} holds a run of other settings ({'; '.join(told)}): choose another output, or delete {work} and {output}"
            )
        return (output / CONFIG).is_file()
    if exists:
        raise ClearValueError(f"{output} is not empty and was not trained by this run: choose another output")
    return False


def _differing(there: Any, here: Any, name: str = "") -> list[str]:
    """What differs of two recipes, with both values."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [k for k in {**there, **here} if there.get(k) != here.get(k)]
        return [d for k in keys for d in _differing(there.get(k), here.get(k), f"{name}.{k}" if name else k)]
    return [f"{name} is {there!r} there and {here!r} here"]


def _decisive(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts without how a run is computed, which may change where it goes on, such as on other GPUs."""
    recipe = dict(facts.get("recipe", {}))
    recipe["loop"] = {k: v for k, v in recipe.get("loop", {}).items() if k not in _HOW}
    return {**facts, "recipe": recipe}


def _claim(work: Path, facts: dict[str, Any]) -> None:
    record = work / RUN
    temporary = record.with_name(f"{RUN}.{os.getpid()}")
    with _writing_to(work):
        work.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(record)


@contextmanager
def _writing_to(work: Path) -> Iterator[None]:
    """Says in words that a run's folder cannot be made or written to."""
    try:
        yield
    except OSError as error:
        raise ClearValueError(
            f"nothing can be written to {work}: {error}. Choose another output, make room, or make it writable"
        ) from error


def data_hash(data: str | Path) -> str:
    """SHA-256 of the rows (not of the pictures that they name)."""
    path = Path(data)
    return hashlib.sha256((path / DATA if path.is_dir() else path).read_bytes()).hexdigest()


def _provenance(facts: dict[str, Any], trainer: ClearTrainer, before: ClearConfig) -> dict[str, Any]:
    commit, dirty = git_state()
    device = trainer.args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    names = ("loss", *trainer.objective.parts)
    last: dict[str, float] = next(
        (e for e in reversed(trainer.state.log_history) if all(n in e for n in names)), {}
    )
    return {
        **facts,
        # How the adapter came about that this run began with.
        **({"before": dict(before.provenance)} if "adapter" in facts else {}),
        "seed": facts["recipe"]["loop"]["seed"],
        "steps": trainer.state.global_step,
        "seconds": round(trainer.seconds, 1),
        "device": f"{name}, {trainer.args.world_size} process(es)",
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": installed_versions(),
        "final": {k: round(float(last[k]), 6) for k in names if k in last},
    }
