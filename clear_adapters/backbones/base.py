"""What a backbone is: a `BackboneSpec` of facts and a `Backbone` class of verbs, and what passes between them.

The engine decides when to write, restore and read; a backbone only knows how. Every verb takes a batch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clear_adapters.backbones.packed import ModelOutputs, PackedBatch, Piece, PreparedImage
from clear_adapters.errors import BackboneMismatchError, ClearValueError
from clear_adapters.sampling import LatentSampling, RowRandom, TextSampling
from clear_adapters.transcript import TextSegment

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from clear_adapters.bridge import LatentBridge

# ------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True)
class LoraGroup:
    """Modules that are adapted together, named exactly.

    Attributes:
        prefix: dotted path of the list of layers.
        modules: paths below each layer.
        once: full paths that exist once, outside the layers.
    """

    prefix: str
    modules: tuple[str, ...]
    once: tuple[str, ...] = ()

    def names(self, layers: int) -> list[str]:
        """Every module name of the group for a model of that many layers."""
        return [f"{self.prefix}.{i}.{m}" for i in range(layers) for m in self.modules] + list(self.once)


@dataclass(frozen=True)
class BackboneSpec:
    """The facts of a family. Nothing here needs weights; all of it is checked against the real model.

    Attributes:
        name: registry key.
        title: how people call it.
        kind: `flow` restores continuous latents, `codes` restores discrete ones.
        backbone: `module:NAME` of the `Backbone` class.
        groups: LoRA groups by name; `understanding` and `generation` at least.
        roots: names of the root modules, of a family whose generator is a module of its own (a language model beside a
            diffusion transformer). Its `Backbone.model` is then a `torch.nn.ModuleDict` with these keys, so that every path
            begins with one of them, and `attach` takes the modules as a dict with the same keys, which `accepts` knows and
            `detach` gives back. Empty where one module holds everything.
        extras: modules that a recipe may train whole, by path.
        never: path prefixes that must never be adapted (vision towers, picture tokenizers).
        restoration_reader: the expert that reads a restoration back, `generation` or `understanding`.
        decodes: whether pixels can be decoded.
        checkpoints: Hub ids or built-in names known to fit.
        tested_with: library versions the family was tested with.
        license: licence of the usual checkpoints, as their owners state it.
        stages: training stages that are supported.
        tiny: `module:NAME` of a function `(seed) -> Backbone` that builds the real classes at toy size.
        sources: papers and repositories.
    """

    name: str
    title: str
    kind: Literal["flow", "codes"]
    backbone: str
    groups: dict[str, LoraGroup]
    tiny: str
    roots: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    restoration_reader: Literal["generation", "understanding"] = "generation"
    decodes: bool = True
    checkpoints: tuple[str, ...] = ()
    tested_with: str = ""
    license: str = ""
    stages: tuple[str, ...] = ("sft",)
    sources: tuple[str, ...] = ()

    @property
    def loss(self) -> str:
        """The name of the restorations' loss in logs."""
        return "mse" if self.kind == "flow" else "code_ce"


# ------------------------------------------------------------------------------------------------- restorations


@dataclass
class FlowTrace:
    """How flow latents were sampled: S recorded steps.

    Attributes:
        x: (B, S, N, C) float32, the latent before each step.
        x_next: (B, S, N, C) float32, the latent after it.
        t: (S,) float32, time before each step.
        dt: (S,) float32, length of each step.
        sigma: noise level.
        logprobs: (B, S) float32.
    """

    x: Tensor
    x_next: Tensor
    t: Tensor
    dt: Tensor
    sigma: float
    logprobs: Tensor

    def row(self, i: int) -> FlowTrace:
        """One row, still batched."""
        return replace(
            self, x=self.x[i : i + 1], x_next=self.x_next[i : i + 1], logprobs=self.logprobs[i : i + 1]
        )


@dataclass
class Restoration:
    """What the model generated for the clean picture, for B rows on one grid.

    Attributes:
        kind: `flow` or `codes`.
        grid: (h, w) of its tokens; N = h w.
        size: (height, width) in pixels.
        latent: (B, N, C) float32, of kind flow.
        codes: (B, N) int64, of kind codes.
        trace: how it was sampled; of kind flow only when the sampler was stochastic.
        code_logprobs: (B, N) float32, of kind codes; only when they were sampled from the model itself, without guidance.
        image: of a restoration of one row, its pixels once they were decoded by `Backbone.decode_each`.
    """

    kind: Literal["flow", "codes"]
    grid: tuple[int, int]
    size: tuple[int, int]
    latent: Tensor | None = None
    codes: Tensor | None = None
    trace: FlowTrace | None = None
    code_logprobs: Tensor | None = None
    image: Image | None = None

    @property
    def tokens(self) -> Tensor:
        """The latent (B, N, C), or the codes (B, N).

        Raises:
            ClearValueError: it holds neither.
        """
        found = self.latent if self.kind == "flow" else self.codes
        if found is None:
            raise ClearValueError(
                f"a restoration of kind {self.kind!r} has no {'latent' if self.kind == 'flow' else 'codes'}: make it by "
                "`restore` or `encode_images`"
            )
        return found

    @property
    def rows(self) -> int:
        """B."""
        tensor = self.latent if self.latent is not None else self.codes
        return 0 if tensor is None else int(tensor.shape[0])

    @classmethod
    def joined(cls, parts: Sequence[Restoration]) -> Restoration:
        """Restorations of one kind, grid and size as the rows of one, without their traces."""

        def together(found: list[Tensor | None]) -> Tensor | None:
            known = [x for x in found if x is not None]
            return torch.cat(known) if known else None

        return replace(
            parts[0],
            latent=together([p.latent for p in parts]),
            codes=together([p.codes for p in parts]),
            trace=None,
            code_logprobs=None,
            image=None,
        )

    def row(self, i: int) -> Restoration:
        """One row, still batched; shares storage."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[i : i + 1]

        return replace(
            self,
            latent=cut(self.latent),
            codes=cut(self.codes),
            trace=None if self.trace is None else self.trace.row(i),
            code_logprobs=cut(self.code_logprobs),
        )


# ------------------------------------------------------------------------------------------------------ context


@dataclass
class Context:
    """What a batch of rows has read so far.

    Appending returns a new context and leaves the old one usable. The two share storage: like a slice of an
    array, the first to append writes in place behind what is read, a second one copies first.

    Attributes:
        cache: the family's own key-value store, shared between forks.
        length: cache entries in use, the same for all rows; rows that did not read a block have holes there.
        valid: (B, length) bool, False at holes and padding.
        position: (B,) int64, the next position id of each row.
        random: the rows' random streams.
        sizes: (height, width) in pixels of the last picture each row read; what a restoration will have.
    """

    cache: Any
    length: int
    valid: Tensor
    position: Tensor
    random: RowRandom
    sizes: tuple[tuple[int, int] | None, ...]

    @property
    def rows(self) -> int:
        """B."""
        return int(self.position.shape[0])

    def fork(self) -> Context:
        """The same context, to go on separately. Copies nothing; draws of one do not advance the other."""
        return replace(self, random=self.random.clone())

    def hide(self, rows: Sequence[int], start: int) -> Context:
        """Takes back, for some rows, what was read from cache entry `start` on. Copies only the mask.

        Positions of those rows must be restored by the caller.
        """
        valid = self.valid.clone()
        valid[list(rows), start:] = False
        return replace(self, valid=valid)

    def expand(self, copies: int) -> Context:
        """Each row `copies` times, neighbours together. Copies the cache; seeds stay equal: set `random`."""
        index = torch.arange(self.rows, device=self.position.device).repeat_interleave(copies)
        return self._gather(index)

    def select(self, rows: Sequence[int]) -> Context:
        """Some rows, in the order given. Copies their part of the cache."""
        return self._gather(torch.tensor(list(rows), dtype=torch.int64, device=self.position.device))

    def _gather(self, index: Tensor) -> Context:
        host = index.tolist()
        return Context(
            cache=self.cache.gather(index, self.length),
            length=self.length,
            valid=self.valid[index],
            position=self.position[index],
            random=self.random.select(index),
            sizes=tuple(self.sizes[i] for i in host),
        )


# ------------------------------------------------------------------------------------------------------- verbs


class Backbone(ABC):
    """The verbs of a family over one loaded model. Subclasses keep to these signatures.

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

    @property
    def picture_positions(self) -> int:
        """How many positions a picture or a restoration takes, for families that number each of its tokens; else 0."""
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
        """Samples a turn, yielding (R,) token ids on the device after each step, -1 in finished rows."""

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
        random streams (nothing is read) and one restoration a row.
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

    @abstractmethod
    def reencode(
        self, context: Context, restorations: Sequence[Restoration], rows: Sequence[int] | None = None
    ) -> Context:
        """Decodes, encodes with the understanding encoder, appends."""

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
