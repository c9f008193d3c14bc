"""What a backbone is: a `BackboneSpec` of facts and a `Backbone` class of verbs, and what passes between them.

The engine decides when to write, restore and read; a backbone only knows how. Every verb takes a batch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from clear_adapters.backbones.facts import BackboneSpec, LoraGroup
from clear_adapters.backbones.packed import ModelOutputs, PackedBatch, Piece, PreparedImage
from clear_adapters.backbones.state import Context, FlowTrace, Restoration
from clear_adapters.errors import BackboneMismatchError, ClearValueError
from clear_adapters.sampling import LatentSampling, TextSampling
from clear_adapters.transcript import TextSegment

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from clear_adapters.bridge import LatentBridge

__all__ = [
    "Backbone",
    "BackboneSpec",
    "Context",
    "FlowTrace",
    "LoraGroup",
    "Restoration",
    "drain",
    "named_rows",
]


class Backbone(ABC):
    """The verbs of a family over one loaded model. Subclasses keep to these signatures.

    A verb that reads for no rows gives the context back as it is.

    Attributes:
        spec: the family's facts.
        model: the module that holds every weight.
        tokenizer: the text tokenizer.
    """

    spec: ClassVar[BackboneSpec]
    model: nn.Module
    tokenizer: Any

    # -- facts of the loaded model

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type of the weights."""

    @property
    @abstractmethod
    def layers(self) -> int:
        """Number of transformer layers."""

    @property
    @abstractmethod
    def width(self) -> int:
        """D, the width of the language model."""

    @property
    @abstractmethod
    def latent_width(self) -> int:
        """C, the width of a latent token or code embedding."""

    @property
    def max_positions(self) -> int | None:
        """The longest row that the model was made for, in positions; None when that is not known."""
        return None

    def picture_positions(
        self, size: tuple[int, int], as_condition: bool = True, understanding: bool = True
    ) -> int:
        """How many positions `read_image` takes for a picture of (height, width) in pixels as it is given.

        A restoration of that picture takes as many as the condition alone. 0 is for families that do not number each token of
        a picture.
        """
        return 0

    @classmethod
    @abstractmethod
    def accepts(cls, model: Any) -> bool:
        """Whether an object is a model of this family."""

    @classmethod
    @abstractmethod
    def load(
        cls,
        folder: str,
        *,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        quantization: str | None,
    ) -> Backbone:
        """Loads a checkpoint folder."""

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether a checkpoint folder is of this family, by its files' names and small JSON files alone."""
        return False

    def save(self, folder: Path) -> None:
        """Writes the model with all that belongs to it, as `load` reads it.

        Raises:
            ClearValueError: the family does not write checkpoints.
        """
        raise ClearValueError(f"backbone {self.spec.name!r} does not write checkpoints")

    @classmethod
    def near_miss(cls, what: Any) -> str | None:
        """What to load instead, of an object or a folder (a `Path`) that is a part or another form of this family."""
        return None

    @classmethod
    def wrap(cls, model: nn.Module, processor: Any) -> Backbone:
        """The verbs over a module that `accepts` took, with what the module itself does not hold.

        Raises:
            ClearValueError: the processor is not what the family needs, or the family cannot be wrapped.
        """
        raise ClearValueError(
            f"backbone {cls.spec.name!r} cannot be made from a bare {type(model).__name__}: pass a folder or a name"
        )

    # -- text

    @abstractmethod
    def encode_text(self, text: str) -> Tensor:
        """(T,) int64 token ids without start and end tokens."""

    @abstractmethod
    def decode_text(self, ids: Tensor | Sequence[int]) -> str:
        """The text of ids, start and end tokens left out."""

    @property
    @abstractmethod
    def end_id(self) -> int:
        """The end-of-turn token, which the model writes and which is scored."""

    # -- pictures

    @abstractmethod
    def prepare(self, image: Image) -> PreparedImage:
        """Resizes and normalises a picture; on the CPU."""

    @abstractmethod
    def encode_images(self, images: Sequence[PreparedImage]) -> list[Restoration]:
        """The pictures' own latents, as restorations of one row each."""

    @abstractmethod
    def latent_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the latent of a picture of (height, width) in pixels."""

    @abstractmethod
    def understand(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        """The understanding encoder's features of pictures, (P, D) each, as the language model reads them."""

    @abstractmethod
    def decode(self, restoration: Restoration) -> list[Image] | None:
        """Pixels, one PIL image a row; None for a family that cannot."""

    def decode_each(self, restorations: Sequence[Restoration]) -> list[Image | None]:
        """Pixels of restorations of one row each, equal grids and sizes at once; None for each where a family has none.

        They stay with the restoration: pixels depend on the batch by a rounding, and what is read again in a replay has to
        be what was read in the rollout.
        """
        missing = [r for r in restorations if r.image is None]
        for shape in dict.fromkeys((r.grid, r.size) for r in missing):
            own = [r for r in missing if (r.grid, r.size) == shape]
            for restoration, image in zip(own, self.decode(Restoration.joined(own)) or [], strict=False):
                restoration.image = image
        return [r.image for r in restorations]

    # -- the cached path

    @abstractmethod
    def start(self, rows: int, seeds: Sequence[int]) -> Context:
        """An empty context with one random stream a row."""

    @abstractmethod
    def read_text(
        self,
        context: Context,
        ids: Sequence[Tensor],
        rows: Sequence[int] | None = None,
        own: bool = False,
    ) -> Context:
        """Appends a block of text to some rows (all when None); the others get holes.

        `own` is text that stands as the model's own, for families whose chat format tells speakers apart.
        """

    @abstractmethod
    def read_image(
        self,
        context: Context,
        images: Sequence[PreparedImage],
        as_condition: bool = True,
        understanding: bool = True,
        rows: Sequence[int] | None = None,
    ) -> Context:
        """Appends a picture to some rows, for the generator, the understanding encoder, or both."""

    @abstractmethod
    def write_text_steps(
        self, context: Context, sampling: TextSampling, rows: Sequence[int] | None = None
    ) -> Generator[Tensor, None, tuple[Context, list[TextSegment]]]:
        """Samples a turn, yielding (R,) token ids on the device after each step, -1 in finished rows.

        A row that reaches `max_positions` is cut off there, as at the sampling's own limit.
        Weights and adapter must stay between the steps what they are at the first.
        """

    @abstractmethod
    def restore_steps(
        self,
        context: Context,
        sampling: LatentSampling,
        guidance: Sequence[Context | None] = (),
        rows: Sequence[int] | None = None,
    ) -> Generator[list[Restoration], None, tuple[Context, list[Restoration]]]:
        """Samples restorations for some rows, yielding the estimates of the clean latents after each step.

        `guidance` holds the contexts without thought and without picture. Returns the context with advanced
        random streams (nothing is read) and one restoration a row. Weights and adapter must stay between the steps what they
        are at the first.
        """

    @abstractmethod
    def read_restoration(
        self,
        context: Context,
        restorations: Sequence[Restoration],
        bridge: LatentBridge | None,
        rows: Sequence[int] | None = None,
    ) -> Context:
        """Appends restorations through the bridge, wrapped as the family wraps an image."""

    @torch.no_grad()
    def reencode(
        self, context: Context, restorations: Sequence[Restoration], rows: Sequence[int] | None = None
    ) -> Context:
        """Decodes, encodes with the understanding encoder, appends."""
        drawn = self.decode_each(restorations)
        images = [self.prepare(image) for image in drawn if image is not None]
        names = named_rows(context, rows, len(images))
        return self.read_image(context, images, as_condition=False, rows=names)

    # -- the uncached path

    @abstractmethod
    def pack(self, rows: Sequence[Sequence[Piece]], hidden_layers: tuple[int, ...] = ()) -> PackedBatch:
        """Lays rows out for one forward; on the CPU, in data workers."""

    @abstractmethod
    def encode(self, batch: PackedBatch, noise: Tensor | None = None) -> PackedBatch:
        """Fills in latents that come from pictures, mixes noise into noised ones, sets velocity targets."""

    @abstractmethod
    def forward(self, batch: PackedBatch, bridge: LatentBridge | None = None) -> ModelOutputs:
        """One uncached parallel forward; the only path of training."""

    def latents(self, restoration: Restoration) -> Tensor:
        """(B, N, C) of a restoration: its latent, or the embeddings of its codes."""
        return restoration.tokens

    def estimate(self, batch: PackedBatch, outputs: ModelOutputs) -> Tensor:
        """(M, C): what the scored latent tokens would become in one step, with gradient to the generator.

        For a flow the clean latent `x_t - t v`; a family of codes gives embeddings of the codes it would take.
        """
        at = batch.scored_at
        return batch.latents[at] - batch.latent_time[at][:, None] * outputs.scored.float()

    def set_checkpointing(self, enabled: bool) -> None:
        """Lets the decoder recompute activations in the backward pass of `forward`, or not."""
        for module in self.model.modules():
            if hasattr(module, "checkpointing"):
                module.checkpointing = enabled  # type: ignore[assignment]  # a plain attribute

    compiles: ClassVar[bool] = False
    """Whether `set_compiled` does something."""

    def set_compiled(self, enabled: bool, backend: Any = "inductor", training: bool = False) -> None:
        """Compiles what reading, writing and restoring do with the cache, or what `forward` does, or no longer.

        Raises:
            ClearValueError: the family does not compile it.
        """
        if enabled:
            raise ClearValueError(f"backbone {self.spec.name!r} does not compile its inference: leave it out")

    # -- shared by all families

    def write_text(
        self, context: Context, sampling: TextSampling, rows: Sequence[int] | None = None
    ) -> tuple[Context, list[TextSegment]]:
        """Samples until the end-of-turn token or the limit (all rows when None)."""
        return drain(self.write_text_steps(context, sampling, rows))

    def restore(
        self,
        context: Context,
        sampling: LatentSampling,
        guidance: Sequence[Context | None] = (),
        rows: Sequence[int] | None = None,
    ) -> tuple[Context, list[Restoration]]:
        """Samples restorations for some rows (all when None)."""
        return drain(self.restore_steps(context, sampling, guidance, rows))

    def lora_names(self, groups: Sequence[str]) -> list[str]:
        """The exact module names of LoRA groups, in order.

        Raises:
            BackboneMismatchError: an unknown group, or a name that the model does not have as a linear layer.
        """
        names: list[str] = []
        modules = dict(self.model.named_modules())
        for group in groups:
            if group not in self.spec.groups:
                raise BackboneMismatchError(
                    f"LoRA group {group!r} is unknown to backbone {self.spec.name!r}; it has "
                    f"{', '.join(self.spec.groups)}"
                )
            own = self.spec.groups[group]
            # Roots may differ in depth, so each group counts its own layers.
            stack = modules.get(own.prefix) if own.modules else None
            count = self.layers if stack is None else len(list(stack.children()))
            for name in own.names(count):
                module = modules.get(name)
                base = getattr(module, "base_layer", module)
                if not isinstance(base, nn.Linear):
                    found = "nothing" if module is None else type(module).__name__
                    raise BackboneMismatchError(
                        f"backbone {self.spec.name!r} names {name!r} in LoRA group {group!r}, but the model has "
                        f"{found} there and not a linear layer: it is another architecture, or the spec is wrong"
                    )
                names.append(name)
        banned = [n for n in names if any(re.match(re.escape(p) + r"(\.|$)", n) for p in self.spec.never)]
        if banned:
            raise BackboneMismatchError(
                f"LoRA must not adapt {banned[0]!r}: the spec of {self.spec.name!r} forbids it"
            )
        return names


def drain(steps: Generator[Any, None, Any]) -> Any:
    """Runs a generator to its end and gives its return value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def named_rows(context: Context, rows: Sequence[int] | None, given: int | None = None) -> list[int]:
    """The rows that a verb is for, all when None.

    Raises:
        ClearValueError: `given` blocks are not one for each of them.
    """
    names = list(range(context.rows)) if rows is None else list(rows)
    if given is not None and given != len(names):
        raise ClearValueError(f"{given} blocks for {len(names)} rows: give one for each row")
    return names
