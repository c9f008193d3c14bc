"""A training run from a recipe: model and data in, adapter folder out.

Work in progress (checkpoints, log) stands beside the output, in `<output>.training`; the adapter appears in one move.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from clear_adapters.adapter import attach, choose_device
from clear_adapters.attached import AttachedModel
from clear_adapters.config import LoraSettings, is_builtin_name, is_hub_id
from clear_adapters.datasets.example import DATA, Example, read_examples
from clear_adapters.errors import ClearValueError
from clear_adapters.prompts import get_protocol
from clear_adapters.results import git_state, installed_versions
from clear_adapters.store import CONFIG, model_digest, resolve
from clear_adapters.training.objective import Order
from clear_adapters.training.recipe import Recipe, load_recipe
from clear_adapters.training.sft import SftObjective
from clear_adapters.training.trainer import (
    ClearTrainer,
    compile_layers,
    last_checkpoint,
    training_arguments,
)

RUN = "run.json"
LOG = "log.jsonl"


def train_sft(
    recipe: Recipe | str | Path,
    data: str | Path,
    output: str | Path,
    model: Any = "builtin:bagel-tiny",
    resume: bool = True,
    device: str | torch.device | None = None,
    overrides: Sequence[str] = (),
    clean_image_dir: str | Path | None = None,
    corrupted_image_dir: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Trains stage 1 and writes the adapter.

    Args:
        recipe: one that is loaded, its name, or a file.
        data: a folder with `data.jsonl`, or a JSONL file.
        output: folder of the adapter.
        model: what `attach` takes.
        resume: go on with a run of the same recipe, data and model that was stopped; one that is finished is left as it
            is. Of a loaded model only the type is compared.
        device: where a model that is named runs; None is the CUDA GPU if there is one. A loaded model stays where it is.
        overrides: `key=value` for the recipe.
        clean_image_dir: for data in the authors' form.
        corrupted_image_dir: for data in the authors' form.
        progress: show a bar.

    Returns:
        The adapter's folder.

    Raises:
        ClearValueError: settings or data that cannot work, an output that exists without `resume`, a run of other
            settings in its place, or a loss that is not finite.
        UnknownNameError: an unknown recipe, key or model.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise ClearValueError("overrides= is for a recipe that is read here; this one is loaded already")
    output = Path(os.path.abspath(output))  # noqa: PTH100 (a link at the end stays one)
    work = output.with_name(output.name + ".training")
    examples = read_examples(data, clean_image_dir=clean_image_dir, corrupted_image_dir=corrupted_image_dir)
    facts = None
    if int(os.environ.get("RANK", "0")) == 0:  # the process that checks the place and writes
        facts = {
            "recipe": recipe.to_dict(),
            "data_hash": data_hash(data),
            "examples": len(examples),
            "model": _identity(model),
            "protocol": _digest(repr(get_protocol(recipe.protocol))),
            "images": _digest(
                *(f"{p and Path(p).absolute()}" for p in (clean_image_dir, corrupted_image_dir))
            ),
        }
        facts = json.loads(json.dumps(facts))
    if _is_done(output, work, facts, resume):
        return output
    attached = _attach(model, recipe, device)
    try:
        trainer = sft_trainer(attached, recipe, examples, work, progress=progress)
        last = None
        if facts is not None:
            # Only now: settings that were refused until here leave nothing behind.
            _claim(work, facts)
            last = last_checkpoint(work)
            if last is None:
                (work / LOG).unlink(missing_ok=True)
        last = broadcast_object_list([last])[0]
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if facts is not None:
            attached.config = replace(
                attached.config, stage=recipe.stage, provenance=_provenance(facts, trainer)
            )
            attached.save_pretrained(output, dtype=getattr(torch, recipe.loop.save_dtype))
        trainer.accelerator.wait_for_everyone()
    finally:
        attached.detach()
    return output


def sft_trainer(
    attached: AttachedModel,
    recipe: Recipe,
    examples: Sequence[Example],
    work: Path,
    *,
    progress: bool = True,
) -> ClearTrainer:
    """A trainer of stage 1 over an attached model, ready to run where the model is.

    Switches of the base (checkpointing, compiled layers) go with `attached.detach()`.

    Raises:
        ClearValueError: the batch does not divide among the processes, or the base has another type than the recipe's, or
            is on another device than this process trains on.
    """
    loop, optim = recipe.loop, recipe.optim
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = loop.micro_batch or max(1, loop.batch // world)
    if loop.batch % (micro * world):
        raise ClearValueError(
            f"batch={loop.batch} does not divide into micro-batches of {micro} on {world} processes: change one of them"
        )
    backbone, device = attached.backbone, attached.backbone.device
    if not loop.bf16 and backbone.dtype != torch.float32:
        raise ClearValueError(
            f"bf16=False computes in float32, but the model is in {str(backbone.dtype).removeprefix('torch.')}: load it "
            "with dtype='float32', or pass its name"
        )
    _set_trainable(attached)
    if loop.checkpointing:
        # The one attribute that every family's decoder is switched by.
        for module in backbone.model.modules():
            if hasattr(module, "checkpointing"):
                module.checkpointing = True  # type: ignore[assignment]  # a plain attribute
    if loop.compile:
        compile_layers(decoder_layers(attached))
    objective = SftObjective(backbone, attached.config.protocol, recipe.sft)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(12, max(0, cores // world - 1)) if loop.workers is None else loop.workers
    cosine_end = optim.schedule == "cosine" and optim.min_lr > 0
    args = training_arguments(
        work,
        max_steps=loop.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=loop.batch // (micro * world),
        learning_rate=optim.lr,
        lr_scheduler_type="cosine_with_min_lr" if cosine_end else optim.schedule,
        lr_scheduler_kwargs={"min_lr_rate": optim.min_lr} if cosine_end else None,
        warmup_steps=optim.warmup,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        max_grad_norm=optim.max_grad_norm,
        bf16=loop.bf16 and device.type == "cuda",
        use_cpu=device.type == "cpu",
        dataloader_num_workers=workers,
        dataloader_pin_memory=device.type == "cuda",
        logging_steps=loop.log_every,
        save_strategy="steps" if loop.save_every else "no",
        save_steps=loop.save_every or 500,
        save_total_limit=2,
        seed=loop.seed,
        disable_tqdm=not progress,
    )
    if not _is_same(args.device, device):
        raise ClearValueError(
            f"the model is on {device}, but this process trains on {args.device}: choose one GPU by CUDA_VISIBLE_DEVICES, "
            "several by torchrun"
        )
    order = Order(examples, loop.steps * loop.batch, loop.seed)
    return ClearTrainer(attached, objective, order, args, rates=optim.rates, log_file=work / LOG)


def decoder_layers(attached: AttachedModel) -> list[torch.nn.Module]:
    """The decoder layers that the family's LoRA groups name."""
    model, groups = attached.backbone.model, attached.backbone.spec.groups.values()
    prefixes = dict.fromkeys(g.prefix for g in groups)
    return [layer for p in prefixes for layer in model.get_submodule(p).children()]


def _attach(model: Any, recipe: Recipe, device: torch.device | str | None) -> AttachedModel:
    lora = recipe.lora
    if recipe.sft.mode == "direct":
        # No latent is in sight: the generation group would train on nothing.
        ranks = {n: r for n, r in lora.ranks.items() if n == "understanding"}
        lora = LoraSettings(ranks, {n: lora.alphas[n] for n in ranks}, lora.dropout)
    if isinstance(model, str | Path):
        where = choose_device(device)
        rank = int(os.environ.get("LOCAL_RANK", "-1"))
        if where.type == "cuda" and rank >= 0:
            where = torch.device("cuda", rank)
        attached = attach(model, lora=lora, device=where, dtype=None if recipe.loop.bf16 else torch.float32)
    else:
        attached = attach(model, lora=lora)
        held = attached.backbone.device
        if device is not None and not _is_same(choose_device(device), held):
            attached.detach()
            raise ClearValueError(
                f"device={str(device)!r}, but the model that was passed is on {held}: move it before, or pass its name"
            )
    attached.initialise(recipe.loop.seed)
    attached.config = replace(
        attached.config, protocol=get_protocol(recipe.protocol), text=recipe.text, latent=recipe.latent
    )
    return attached


def _is_same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one; a device without a number is any of its type."""
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))


def _set_trainable(attached: AttachedModel) -> None:
    """Stage 1 trains LoRA and the modules that the recipe trains whole; the bridge stands still."""
    for name, parameter in attached.named_parameters():
        parameter.requires_grad_(not name.startswith("bridge."))
        # Small steps would be rounded away in bfloat16.
        parameter.data = parameter.data.float()


def _identity(model: Any) -> dict[str, str | None]:
    """What tells one base model from another: name and hash of its files, or the type of a loaded one."""
    if not isinstance(model, str | Path):
        return {"name": type(model).__name__, "hash": None}
    name, folder = str(model), resolve(model, "model")
    is_public = is_builtin_name(name) or (is_hub_id(name) and not Path(name).exists())
    # It is published with the adapter: of a folder on this machine only the last part.
    return {"name": name if is_public else folder.resolve().name, "hash": model_digest(folder)}


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
        if before != facts:
            parts = [k for k in facts if before.get(k) != facts[k]]
            raise ClearValueError(
                f"{work} holds a run of other settings ({', '.join(parts)} differ): choose another output, or delete it"
            )
        return (output / CONFIG).is_file()
    if exists:
        raise ClearValueError(f"{output} is not empty and was not trained by this run: choose another output")
    return False


def _claim(work: Path, facts: dict[str, Any]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    record = work / RUN
    temporary = record.with_name(f"{RUN}.{os.getpid()}")
    temporary.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(record)


def data_hash(data: str | Path) -> str:
    """SHA-256 of the rows (not of the pictures that they name)."""
    path = Path(data)
    return hashlib.sha256((path / DATA if path.is_dir() else path).read_bytes()).hexdigest()


def _provenance(facts: dict[str, Any], trainer: ClearTrainer) -> dict[str, Any]:
    commit, dirty = git_state()
    device = trainer.args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    last: dict[str, float] = next((e for e in reversed(trainer.state.log_history) if "ce" in e), {})
    return {
        **facts,
        "seed": facts["recipe"]["loop"]["seed"],
        "steps": trainer.state.global_step,
        "seconds": round(trainer.seconds, 1),
        "device": f"{name}, {trainer.args.world_size} process(es)",
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": installed_versions(),
        "final": {k: round(float(last[k]), 6) for k in ("loss", *trainer.objective.parts) if k in last},
    }
