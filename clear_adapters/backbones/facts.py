"""The facts of a family, which need no weights: a `BackboneSpec`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
