"""The ways to answer that are compared, by name, and the one call that asks a model in any of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from clear_adapters.errors import unknown_name

if TYPE_CHECKING:
    from PIL import Image

    from clear_adapters.attached import AttachedModel
    from clear_adapters.reply import Reply
    from clear_adapters.sampling import LatentSampling, TextSampling

WARNING = (
    "The picture may be degraded: blurred, noisy, dark, compressed or painted over. Look closely.\n{question}"
)
"""What the warned base is asked."""


@dataclass(frozen=True)
class System:
    """One way to answer.

    Attributes:
        name: on the command line and in result files.
        title: in tables.
        plain: the base model alone, in its own chat format; else the adapter under its protocol.
        warned: with a sentence on degradation before the question.
        restore: as in `AttachedModel.answer`.
        latent_from: as in `AttachedModel.answer`.
        restorer: what acts on the picture before the model sees it.
        sees: the picture of the condition, or the clean one of the same row whatever the condition.
    """

    name: str
    title: str
    plain: bool = False
    warned: bool = False
    restore: Literal["auto", "always", "never"] = "auto"
    latent_from: Literal["own", "degraded", "clean", "reencode"] = "own"
    restorer: Literal["classical"] | None = None
    sees: Literal["condition", "clean"] = "condition"

    @property
    def needs_clean(self) -> bool:
        """Whether the clean picture of every row is needed."""
        return self.sees == "clean" or self.latent_from == "clean"


SYSTEMS = (
    System("base", "base", plain=True),
    System("warned", "base, warned of degradation", plain=True, warned=True),
    System("classical", "classical restorer, then base", plain=True, restorer="classical"),
    System("ceiling", "base on the clean picture (ceiling)", plain=True, sees="clean"),
    System("clear", "CLEAR"),
    System("never", "CLEAR, never restoring", restore="never"),
    System("always", "CLEAR, always restoring", restore="always"),
    System("swap", "CLEAR, the degraded picture's latent swapped in", latent_from="degraded"),
    System("clean-latent", "CLEAR, reading the true clean latent", restore="always", latent_from="clean"),
)
_BY_NAME = {system.name: system for system in SYSTEMS}


def get_system(name: str) -> System:
    """The system of a name.

    Raises:
        UnknownNameError: there is none; close matches are in the message.
    """
    if name not in _BY_NAME:
        raise unknown_name("system", name, _BY_NAME)
    return _BY_NAME[name]


def ask(
    model: AttachedModel,
    system: System,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    seeds: Sequence[int],
    clean: Sequence[Image.Image] | None = None,
    text: TextSampling | None = None,
    latent: LatentSampling | None = None,
    batch_size: int | None = None,
    keep_adapter: bool = False,
) -> list[Reply]:
    """The replies of one system to a batch.

    Args:
        model: base and adapter.
        system: which way.
        images: one picture a question, as the system sees them but for its restorer, which acts here.
        questions: N questions.
        seeds: N seeds.
        clean: N clean pictures, for `latent_from="clean"`.
        text: how text is sampled; None is the adapter's own.
        latent: how restorations are sampled; None is the adapter's own.
        batch_size: rows at a time; None takes all at once.
        keep_adapter: leave the adapter in for a plain system too: for one that was tuned to answer plainly.

    Returns:
        N replies.

    Raises:
        ImageError, ClearValueError: as `Engine.answer`.
    """
    pictures = list(images)
    if system.restorer is not None:
        from clear_adapters.mmd_bench.restorer import classical_image

        pictures = [classical_image(p) for p in pictures]
    with nullcontext() if keep_adapter or not system.plain else model.disabled():
        engine = model.engine
        protocol = engine.protocol
        engine.protocol = replace(protocol, plain=WARNING) if system.warned else protocol
        try:
            return engine.answer(
                pictures,
                list(questions),
                restore=system.restore,
                text=text,
                latent=latent,
                latent_from=system.latent_from,
                clean_images=list(clean) if system.latent_from == "clean" and clean is not None else None,
                seed=list(seeds),
                batch_size=batch_size,
                plain=system.plain,
            )
        finally:
            engine.protocol = protocol
