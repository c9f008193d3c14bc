"""What a run is built of: the attached model, what of it is trained, the stage's objective, the trainer."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clear_adapters.adapter import attach, choose_device
from clear_adapters.attached import AttachedModel
from clear_adapters.config import LoraSettings
from clear_adapters.datasets.example import Example
from clear_adapters.errors import ClearValueError
from clear_adapters.lora import PREFIX, target_names
from clear_adapters.prompts import get_protocol
from clear_adapters.training.group import processes
from clear_adapters.training.objective import Objective, Order
from clear_adapters.training.recipe import DEFAULT_PARTS, PARTS, STAGES, Recipe
from clear_adapters.training.shard import shard_layers
from clear_adapters.training.trainer import ClearTrainer, compile_layers, training_arguments

LOG = "log.jsonl"

_LOG = logging.getLogger(__name__)


def attach_for(
    recipe: Recipe,
    model: Any,
    adapter: str | Path | None = None,
    device: torch.device | str | None = None,
) -> AttachedModel:
    """The model with the adapter that a stage begins with.

    Args:
        recipe: of the stage.
        model: what `attach` takes.
        adapter: of the stage before, whose layout, protocol and weights are kept; None is a fresh one, its first
            weights drawn from the recipe's seed.
        device: where a model that is named is loaded to.

    Raises:
        ClearValueError: `device` is not where a loaded model is.
        ClearError: as for `attach`.
    """
    fresh: dict[str, Any] = {} if adapter is not None else {"lora": _layout(recipe)}
    if model is None or isinstance(model, str | Path):
        where = choose_device(device)
        rank = int(os.environ.get("LOCAL_RANK", "-1"))
        if where.type == "cuda" and rank >= 0:
            where = torch.device("cuda", rank)
        dtype = None if recipe.loop.bf16 else torch.float32
        kind = recipe.loop.quantization
        attached = attach(model, adapter, device=where, dtype=dtype, quantization=kind, **fresh)
    else:
        if recipe.loop.quantization is not None:
            raise ClearValueError(
                f"loop.quantization={recipe.loop.quantization!r} is for a model that is loaded here, and this one was passed "
                "loaded: pass its name instead, or one that was loaded so"
            )
        if recipe.loop.shard:
            raise ClearValueError(
                "loop.shard=True takes a model apart for good, and this one was passed loaded: pass its name instead"
            )
        attached = attach(model, adapter, **fresh)
        held = attached.backbone.device
        if device is not None and not _is_same(choose_device(device), held):
            attached.detach()
            raise ClearValueError(
                f"device={str(device)!r}, but the model that was passed is on {held}: move it before, or pass its name"
            )
    config = replace(
        attached.config, text=recipe.text, latent=recipe.latent, max_restores=recipe.max_restores
    )
    if adapter is None:
        attached.initialise(recipe.loop.seed)
        config = replace(config, protocol=get_protocol(recipe.protocol))
    else:
        before = STAGES[STAGES.index(recipe.stage) - 1]
        if config.stage != before:
            _LOG.info(
                "stage %s follows %s, but %s is an adapter of %s: it is trained as it is",
                *(recipe.stage, before, adapter, f"stage {config.stage}" if config.stage else "no stage"),
            )
    attached.config = config
    return attached


def _layout(recipe: Recipe) -> LoraSettings:
    lora = recipe.lora
    if recipe.sft.mode == "direct":
        # No latent is in sight: the generation group would train on nothing.
        ranks = {n: r for n, r in lora.ranks.items() if n == "understanding"}
        lora = LoraSettings(ranks, {n: lora.alphas[n] for n in ranks}, lora.dropout)
    return lora


def trainer_for(
    attached: AttachedModel,
    recipe: Recipe,
    examples: Sequence[Example],
    work: Path,
    *,
    progress: bool = True,
) -> ClearTrainer:
    """A trainer of the recipe's stage over an attached model, ready to run where the model is.

    The weights that the adapter has now are what stage 3 measures its KL to. Switches of the base (checkpointing, compiled
    layers) go with `attached.detach()`.

    Raises:
        ClearValueError: the batch does not divide among the processes, the base has another type than the recipe's or is
            on another device than this process trains on, or the adapter lacks what is to be trained.
    """
    loop, optim = recipe.loop, recipe.optim
    world = processes()
    spread = _spread(recipe, world)
    micro = 1 if spread > 1 else loop.micro_batch or max(1, loop.batch // world)
    rows = loop.batch * spread
    if rows % (micro * world):
        raise ClearValueError(
            f"batch={loop.batch} does not divide into micro-batches of {micro} on {world} processes: change one of them"
        )
    backbone, device = attached.backbone, attached.backbone.device
    if not loop.bf16 and backbone.dtype != torch.float32:
        raise ClearValueError(
            f"bf16=False computes in float32, but the model is in {str(backbone.dtype).removeprefix('torch.')}: load it "
            "with dtype='float32', or pass its name"
        )
    set_trainable(attached, recipe)
    if loop.checkpointing:
        backbone.set_checkpointing(True)
    if loop.compile and backbone.compiles and not loop.shard:
        backbone.set_compiled(True, training=True)
    elif loop.compile:
        compile_layers(decoder_layers(attached))
    objective = objective_for(attached, recipe, spread)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(12, max(0, cores // world - 1)) if loop.workers is None else loop.workers
    cosine_end = optim.schedule == "cosine" and optim.min_lr > 0
    args = training_arguments(
        work,
        max_steps=loop.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // (micro * world),
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
    if loop.shard:
        shard_layers(attached, decoder_layers(attached))
    order = Order(
        *(examples, loop.steps * loop.batch, loop.seed),
        batch=loop.batch,
        repeat=recipe.repeat,
        parts=spread,
    )
    return ClearTrainer(attached, objective, order, args, rates=optim.rates, log_file=work / LOG)


def _spread(recipe: Recipe, world: int) -> int:
    """How many processes share the rollouts of a question: 1 unless there are fewer questions in a step than processes."""
    batch = recipe.loop.batch
    if batch >= world:
        return 1
    if recipe.stage != "grpo":
        raise ClearValueError(
            f"batch={batch} on {world} processes leaves some of them without an example: make loop.batch a multiple of the "
            "processes, or start fewer of them"
        )
    if world % batch:
        raise ClearValueError(
            f"batch={batch} questions a step on {world} processes: a question's rollouts can be spread over several, but over "
            "as many for each. Make loop.batch a divisor or a multiple of the processes"
        )
    return world // batch


def objective_for(attached: AttachedModel, recipe: Recipe, spread: int = 1) -> Objective:
    """The objective of the recipe's stage, of which a question's rollouts are spread over so many processes."""
    backbone, protocol = attached.backbone, attached.config.protocol
    if recipe.stage == "sft":
        from clear_adapters.training.sft import SftObjective

        return SftObjective(backbone, protocol, recipe.sft)
    if recipe.stage == "bridge":
        from clear_adapters.training.bridge import BridgeObjective

        parts = recipe.trains or DEFAULT_PARTS[recipe.stage]
        if recipe.bridge.estimate > 0 and "generation" not in parts:
            _LOG.warning(
                "bridge.estimate=%g, but trains=%s leaves the generator as it is: an answer that reads an estimate has no "
                "weights to send its gradient to. Add 'generation', or set bridge.estimate=0",
                *(recipe.bridge.estimate, list(parts)),
            )
        return BridgeObjective(backbone, protocol, recipe.bridge, recipe.latent)
    from clear_adapters.training.grpo import GrpoObjective

    # Before a checkpoint is loaded: what stage 2 left, also in a run that goes on.
    reference = {n: p.detach().float().clone() for n, p in attached.named_parameters()}
    return GrpoObjective(attached, recipe.grpo, reference, recipe.text, recipe.latent, spread)


def set_trainable(attached: AttachedModel, recipe: Recipe) -> None:
    """Lets exactly the parts that the recipe trains receive gradients; weights of the adapter become float32.

    Raises:
        ClearValueError: the adapter lacks a part that the recipe names, or the stage is about.
    """
    backbone, settings = attached.backbone, attached.config.lora
    groups = {} if settings is None else target_names(backbone, settings)

    def part(name: str) -> str:
        if name.startswith("bridge."):
            return "bridge"
        return groups[name[len(PREFIX) : name.index(".lora_")]] if ".lora_" in name else "extra"

    parts = {name: part(name) for name, _ in attached.named_parameters()}
    held = [p for p in PARTS if p in parts.values()]
    if recipe.trains is not None:
        wanted = set(recipe.trains)
    else:
        wanted = set(DEFAULT_PARTS[recipe.stage]) & set(held)
        if recipe.stage == "bridge":
            wanted.add("bridge")
    missing = sorted(wanted - set(held))
    if missing:
        raise ClearValueError(
            f"stage {recipe.stage} is to train {' and '.join(missing)}, but this adapter has only "
            f"{', '.join(held) or 'nothing'}: change `trains`, or take an adapter that has it"
        )
    for name, parameter in attached.named_parameters():
        parameter.requires_grad_(parts[name] in wanted)
        # Small steps would be rounded away in bfloat16.
        parameter.data = parameter.data.float()


def decoder_layers(attached: AttachedModel) -> list[torch.nn.Module]:
    """The decoder layers that the family's LoRA groups name."""
    model, groups = attached.backbone.model, attached.backbone.spec.groups.values()
    prefixes = dict.fromkeys(g.prefix for g in groups)
    return [layer for p in prefixes for layer in model.get_submodule(p).children()]


def _is_same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one; a device without a number is any of its type."""
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))
