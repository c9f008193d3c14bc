"""What is compared: the systems, and one system's answers under one condition."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from clear_adapters.mmd_bench import systems as mmd_bench

if TYPE_CHECKING:
    from heldout import HeldOut, Item
    from PIL import Image

    from clear_adapters.adapter import AttachedModel
    from clear_adapters.engine import Reply

SIGN = "What does the sign say?"
ENDS = ("clean", "high")
ALL = ("clean", "low", "mid", "high")


@dataclass(frozen=True)
class System:
    """One way to answer.

    Attributes:
        name: in result files and on the command line.
        title: in tables.
        family: whose adapters it runs with, as train_table.py names them; None is the base alone.
        conditions: where it is measured.
        every_seed: whether with all adapters of the family, or with the first only.
        plain: asked in the model family's own chat format, without the protocol.
        warned: with a sentence on degradation before the question.
        restore: as in `answer`.
        latent_from: as in `answer`.
        pictures: whether its restorations at high, of the first adapter, are measured too.
    """

    name: str
    title: str
    family: str | None
    conditions: tuple[str, ...] = ENDS
    every_seed: bool = False
    plain: bool = False
    warned: bool = False
    restore: Literal["auto", "always", "never"] = "auto"
    latent_from: Literal["own", "degraded", "clean", "reencode"] = "own"
    pictures: bool = False


# What is asked of the first and of the last stage beside their own decision, with what title.
_MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "always": ("always restoring", {"restore": "always", "pictures": True}),
    "never": ("never restoring", {"restore": "never"}),
    "degraded": ("reading the degraded picture's latent", {"restore": "always", "latent_from": "degraded"}),
    "clean": ("reading the true clean latent", {"restore": "always", "latent_from": "clean"}),
}

SYSTEMS = (
    System("base", "base", None, ALL, plain=True),
    System("base-warned", "base, warned of degradation", None, plain=True, warned=True),
    System("direct", "direct LoRA", "direct", ALL, every_seed=True, plain=True),
    System("sft", "CLEAR: SFT", "sft", ALL, every_seed=True),
    System("bridge", "CLEAR: SFT + bridge", "bridge", ALL, every_seed=True),
    System("truth", "CLEAR: SFT + bridge, true latents only", "truth"),
    System("own", "CLEAR: SFT + bridge, true and own latents", "own"),
    System("published", "CLEAR: SFT + bridge, states compared as published", "published"),
    System("centred", "CLEAR: SFT + bridge, centred states compared", "centred"),
    System("clear", "CLEAR: SFT + bridge + GRPO", "clear", ALL, every_seed=True),
    System(
        "reencode",
        "CLEAR: GRPO, decode and re-encode for the bridge",
        "reencode",
        ALL,
        every_seed=True,
        latent_from="reencode",
    ),
    System("image0", "CLEAR: GRPO, image loss weight 0", "image0", ALL),
    System("decision", "CLEAR: GRPO, rewards with decision", "decision", ALL),
    *(
        System(f"{family}-{mode}", f"{title}, {words}", family, **settings)
        for family, title in (("sft", "SFT"), ("clear", "GRPO"))
        for mode, (words, settings) in _MODES.items()
    ),
)
FAMILIES = tuple(dict.fromkeys(s.family for s in SYSTEMS if s.family is not None))
BY_NAME = {s.name: s for s in SYSTEMS}


@dataclass(frozen=True)
class Settings:
    """How models are loaded and asked.

    Attributes:
        model: the base.
        device: where.
        dtype: type of the weights; None is the stored one on a GPU, float32 on a CPU.
        batch_size: rows at a time.
        plain_tokens: longest answer of a plainly asked model.
        clear_tokens: longest turn under the protocol; None is the adapter's own.
        steps: points of the flow schedule; None is the adapter's own.
    """

    model: str
    device: str
    dtype: str | None = None
    batch_size: int = 256
    plain_tokens: int = 48
    clear_tokens: int | None = None
    steps: int | None = None


def load(settings: Settings, adapter: str | None) -> AttachedModel:
    """The base with an adapter, or, without one, the base alone behind the same door."""
    from clear_adapters import attach
    from clear_adapters.prompts import Protocol

    if adapter is None:
        model = attach(settings.model, lora=False, bridge=False, dtype=settings.dtype, device=settings.device)
        model.config = replace(model.config, protocol=Protocol("plain", "1", ""))
        return model
    return attach(settings.model, adapter, dtype=settings.dtype, device=settings.device)


def ask(
    model: AttachedModel,
    system: System,
    settings: Settings,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    clean: Sequence[Image.Image] | None = None,
) -> list[Reply]:
    """The replies of one system."""
    text, latent = model.config.text, model.config.latent
    if system.plain:
        text = replace(text, max_new_tokens=settings.plain_tokens)
    elif settings.clear_tokens is not None:
        text = replace(text, max_new_tokens=settings.clear_tokens)
    if settings.steps is not None:
        latent = replace(latent, steps=settings.steps)
    way = mmd_bench.System(
        system.name,
        system.title,
        plain=system.plain,
        warned=system.warned,
        restore=system.restore,
        latent_from=system.latent_from,
    )
    return mmd_bench.ask(
        model,
        way,
        images,
        questions,
        seeds=range(len(questions)),
        clean=clean,
        text=text,
        latent=latent,
        batch_size=settings.batch_size,
        keep_adapter=True,  # direct tuning answers plainly, with its LoRA
    )


def run_cell(
    model: AttachedModel, system: System, condition: str, settings: Settings, data: HeldOut
) -> tuple[dict[str, Any], list[Reply]]:
    """One system's answers under one condition, scored.

    Returns:
        What the result file keeps (one character a question in `correct` and `restored`), and the replies.
    """
    clean = data.images("clean") if system.latent_from == "clean" else None
    began = time.perf_counter()
    replies = ask(model, system, settings, data.images(condition), [i.text for i in data.items], clean)
    seconds = time.perf_counter() - began
    scores = [item.score(reply.text) for item, reply in zip(data.items, replies, strict=True)]
    cell: dict[str, Any] = {
        "system": system.name,
        "condition": condition,
        "correct": bits(s is True for s in scores),
        "unread": sum(s is None for s in scores),
        "seconds_per_question": round(seconds / len(replies), 5),
    }
    if not system.plain:
        cell["restored"] = bits(r.restored for r in replies)
        cell["unanswered"] = sum(not r.answered for r in replies)
    return cell, replies


def read_signs(
    model: AttachedModel, settings: Settings, data: HeldOut, restored: Sequence[Image.Image]
) -> dict[str, str]:
    """Whether the plain base model reads the sign in the clean, the degraded and the restored picture.

    Returns:
        Bits for `clean`, `high` and `restored`, one for each question that `asked`, a bit a question, marks.
    """
    chosen = [i for i in data.items if i.sign]
    sources = {"clean": data.images("clean"), "high": data.images("high"), "restored": list(restored)}
    found: dict[str, str] = {"asked": bits(bool(i.sign) for i in data.items)}
    if not chosen:
        return found
    with model.disabled():
        for name, images in sources.items():
            pictures = [images[i.index] for i in chosen]
            replies = ask(model, BY_NAME["base"], settings, pictures, [SIGN] * len(chosen))
            found[name] = bits(_says(i, r.text) for i, r in zip(chosen, replies, strict=True))
    return found


def _says(item: Item, answer: str) -> bool:
    from clear_adapters.scoring import exact_match

    return exact_match(answer, item.sign)


def bits(values: Any) -> str:
    """Truth values as a string of 0 and 1."""
    return "".join("1" if v else "0" for v in values)
