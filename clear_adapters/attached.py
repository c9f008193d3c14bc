"""The attached model: a backbone with LoRA and bridge in place, and the ways to use, save and undo them."""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from clear_adapters import store
from clear_adapters.backbones.base import Backbone
from clear_adapters.backbones.packed import ModelOutputs, PackedBatch
from clear_adapters.bridge import LatentBridge
from clear_adapters.config import ClearConfig
from clear_adapters.engine import Engine
from clear_adapters.errors import AdapterError, AttachError
from clear_adapters.lora import Lora, Snapshot, config_dict

if TYPE_CHECKING:
    from clear_adapters.hub.push import Pushed
    from clear_adapters.images import ImageLike
    from clear_adapters.reply import Event, Reply
    from clear_adapters.rollout import LatentFrom, Restore
    from clear_adapters.sampling import LatentSampling, TextSampling

ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The networks that have an adapter now."""


@dataclass(frozen=True)
class AdapterSize:
    """How large an adapter is.

    Attributes:
        parameters: numbers in it.
        bytes: what they take as they are held now.
    """

    parameters: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {self.bytes / 1e6:.1f} MB"


@dataclass(frozen=True)
class Origin:
    """Where an adapter was loaded from.

    Attributes:
        name: `builtin:NAME` or Hub id; of a folder on this machine its last part.
        commit: of the repository on the Hub; None for others.
        hashes: SHA-256 of each file that was read.
    """

    name: str
    commit: str | None
    hashes: Mapping[str, str]


@dataclass
class Switch:
    """Whether a skill is on; an object of its own, so that those who share it do not hold each other in memory.

    Attributes:
        off: how many `disabled()` are entered.
        turns: how often it was switched.
    """

    off: int = 0
    turns: int = 0

    @property
    def on(self) -> bool:
        """Whether it is on."""
        return self.off == 0


class ClearModule(nn.Module):
    """Base model and bridge as one module: what an optimizer sees and DDP or FSDP wraps.

    Attributes:
        base: the network with its adapted layers.
        bridge: the bridge, or None.
    """

    def __init__(self, backbone: Backbone, bridge: LatentBridge | None, switch: Switch) -> None:
        super().__init__()
        self.base = backbone.model
        self.bridge = bridge
        self._backbone = backbone
        self._switch = switch

    def forward(self, batch: PackedBatch) -> ModelOutputs:
        """One uncached parallel forward."""
        return self._backbone.forward(batch, self.bridge if self._switch.on else None)


class AttachedModel:
    """A model with the CLEAR skill; made by `attach`.

    Attributes:
        backbone: the verbs over the adapted network.
        lora: the adapter's weights inside it, or None.
        bridge: the bridge, or None.
        origin: where the adapter was loaded from; None for a fresh one.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: ClearConfig,
        lora: Lora | None,
        bridge: LatentBridge | None,
        snapshot: Snapshot,
        base: Any,
    ) -> None:
        self.backbone = backbone
        self.lora = lora
        self.bridge = bridge
        self._switch = Switch()
        self._switching = threading.Lock()
        self.module = ClearModule(backbone, bridge, self._switch)
        self.origin: Origin | None = None
        self._config = config
        self._snapshot: Snapshot | None = snapshot
        self._base = base
        self._engine: Engine | None = None

    # -- state

    @property
    def config(self) -> ClearConfig:
        """What is written beside the weights. Set it to change protocol, sampling, stage or provenance.

        Raises:
            AdapterError: on setting one that describes other weights than these.
        """
        return self._config

    @config.setter
    def config(self, value: ClearConfig) -> None:
        for name in ("backbone", "bridge", "lora"):
            if getattr(value, name) != getattr(self._config, name):
                raise AdapterError(
                    f"config.{name} describes weights that are in place: attach anew to change it"
                )
        self._config = value
        self._engine = None

    @property
    def enabled(self) -> bool:
        """Whether the skill is on; off, the model is its plain self."""
        return self._switch.on

    @property
    def engine(self) -> Engine:
        """The state machine behind `answer`, `stream`, rollouts and replays."""
        self._require()
        if self._engine is None:
            c = self._config
            self._engine = Engine(self.backbone, self.bridge, c.protocol, c.text, c.latent, c.max_restores)
        self._engine.plain = not self._switch.on
        return self._engine

    def _require(self) -> None:
        if self._snapshot is None:
            raise AttachError("this adapter was detached or merged: attach again to use it")

    def _turn(self, by: int) -> None:
        """Counts a `disabled()` that is entered (1) or left (-1), and switches where that makes a difference."""
        with self._switching:
            before = self._switch.on
            self._switch.off += by
            if self._switch.on == before:
                return
            self._switch.turns += 1
            if self._snapshot is None:
                return
            if self.lora is not None:
                self.lora.set_enabled(self._switch.on)
            if self._engine is not None:
                self._engine.plain = before

    @contextmanager
    def disabled(self) -> Iterator[AttachedModel]:
        """The plain model inside a `with`: no LoRA, no bridge, no protocol, until the last of several is left.

        It is so for all threads: an answer of another one that is written meanwhile fails instead of being half of either model.
        """
        self._require()
        self._turn(1)
        try:
            yield self
        finally:
            self._turn(-1)

    def _check_turns(self, turns: int, what: str) -> None:
        self._require()
        if self._switch.turns != turns:
            raise AttachError(
                f"disabled() was entered or left while {what}() ran: half an answer of either model"
            )

    def initialise(self, seed: int) -> None:
        """Makes the adapter an untrained one, whose random factors are drawn from a seed: it changes nothing yet.

        Args:
            seed: runs of several seeds should not share their first weights. Global random numbers stay as they are.

        Raises:
            AttachError: it was detached.
        """
        self._require()
        if self.lora is not None:
            self.lora.initialise(seed)
        if self.bridge is not None:
            self.bridge.initialise(seed)

    # -- answers

    def answer(
        self,
        image: ImageLike | Sequence[ImageLike],
        question: str | Sequence[str],
        *,
        restore: Restore = "auto",
        text: TextSampling | None = None,
        latent: LatentSampling | None = None,
        latent_from: LatentFrom = "own",
        clean_image: ImageLike | Sequence[ImageLike] | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> Reply | list[Reply]:
        """Answers questions about pictures, restoring those that are too poor for their question.

        Args:
            image: one picture, or a list of them.
            question: one question a picture; a list of questions gives a list of replies.
            restore: let the model decide, always restore, or never.
            text: how text is sampled; None is the adapter's default.
            latent: how restorations are sampled; None is the adapter's default.
            latent_from: the latent that is read: the model's own, that of the picture as given, that of `clean_image`,
                or the model's own decoded and encoded again in the bridge's place.
            clean_image: the true clean picture or pictures, for `latent_from="clean"`.
            seed: of every row, so that a reply does not depend on its place in the list.
            batch_size: rows at a time; None takes all at once.

        Raises:
            ImageError: a picture cannot be read.
            ClearValueError: lists of different lengths, or values out of their range.
            AttachError: the adapter was detached; or, while it ran, switched on or off by another thread.
        """
        engine, turns = self.engine, self._switch.turns
        replies = engine.answer(
            image,
            question,
            restore=restore,
            text=text,
            latent=latent,
            latent_from=latent_from,
            clean_images=clean_image,
            seed=seed,
            batch_size=batch_size,
        )
        self._check_turns(turns, "answer")
        return replies[0] if isinstance(question, str) else replies

    def stream(
        self,
        image: ImageLike,
        question: str,
        *,
        restore: Restore = "auto",
        text: TextSampling | None = None,
        latent: LatentSampling | None = None,
        latent_from: LatentFrom = "own",
        clean_image: ImageLike | None = None,
        seed: int = 0,
    ) -> Iterator[Event]:
        """Answers one question and tells what happens meanwhile; arguments and errors as for `answer`.

        Raises:
            AttachError: while it runs, the adapter was switched on or off, or detached.
        """
        events = self.engine.stream(
            image,
            question,
            restore=restore,
            text=text,
            latent=latent,
            latent_from=latent_from,
            clean_image=clean_image,
            seed=seed,
        )
        return self._guarded(events, self._switch.turns)

    def _guarded(self, events: Iterator[Event], turns: int) -> Iterator[Event]:
        while True:
            self._check_turns(turns, "stream")
            try:
                event = next(events)
            except StopIteration:
                return
            yield event

    # -- speed

    def compile(self, enabled: bool = True) -> AttachedModel:
        """Compiles the network as answers and rollouts use it; the first of each kind then waits for the compiler.

        Worth it for many answers on a GPU, where it is best inside `folded()`. Goes with `detach()`. Not while an answer is written:
        weights move in memory. Layers that are quantized or adapted only in part run as they are, and the log says so.

        Args:
            enabled: False takes it back.

        Returns:
            Itself.

        Raises:
            ClearValueError: the family does not compile its inference.
            AttachError: it was detached.
        """
        self._require()
        self.backbone.set_compiled(enabled)
        return self

    @contextmanager
    def folded(self) -> Iterator[AttachedModel]:
        """LoRA in the weights inside a `with`, so that it costs nothing; the base weights come back as they were.

        Takes as much memory again as the adapted weights, since they are kept. Updates smaller than the weights' rounding are
        lost, as in `merge()`. Nothing can be trained or merged meanwhile; `disabled()` inside it is the plain model.

        Raises:
            ClearValueError: the base is quantized, or a weight is not finite.
            AttachError: it was detached.
        """
        self._require()
        if self.lora is None or not self._switch.on:
            yield self
            return
        with self.lora.folded():
            yield self

    # -- taking out

    def detach(self) -> Any:
        """Takes everything out and gives back the model that was given to `attach` (its `Backbone` if by name).

        Modules, trainability and modes are those from before; weights were never touched.

        Raises:
            AttachError: it was detached already.
        """
        self._require()
        snapshot, self._snapshot = self._snapshot, None
        assert snapshot is not None
        snapshot.restore()
        ATTACHED.discard(self.backbone.model)
        self._engine = None
        return self._base

    def adopt_base(self) -> None:
        """Lets `detach()` put back the base's parameters that are there now: those from before are let go of.

        For what takes the base apart for good, as shards over several processes do.
        """
        self._require()
        assert self._snapshot is not None
        self._snapshot.adopt({p for _, p in self.named_parameters()})

    def merge(self, *, keep_bridge: bool = False) -> Any:
        """Folds LoRA into the base weights and gives back the model, which has no adapter afterwards.

        Args:
            keep_bridge: that you go on using `bridge` yourself, as in `attach(model, lora=False, bridge=bridge, config=config)`.

        Raises:
            AttachError: it was detached already, is `folded()`, or a trained bridge would be lost.
            ClearValueError: a weight is not finite.
        """
        self._require()
        if self.lora is not None and self.lora.is_folded:
            raise AttachError(
                "merge() inside folded(), whose end puts the base weights back: leave it before"
            )
        if self.bridge is not None and not keep_bridge and not _untrained(self.bridge):
            raise AttachError(
                "the bridge is trained, and a base model has no place for it: call merge(keep_bridge=True) and go on "
                "with attach(model, lora=False, bridge=attached.bridge, config=attached.config), or detach() to keep the adapter apart"
            )
        if self.lora is not None:
            self.lora.merge()
        return self.detach()

    # -- files

    def save_pretrained(
        self, folder: str | Path, *, overwrite: bool = False, dtype: torch.dtype | None = None
    ) -> Path:
        """Writes the adapter folder.

        Args:
            folder: new or empty, unless `overwrite`; other files in it are kept.
            overwrite: replace an adapter that is there.
            dtype: type of the weights in the files; None as they are.

        Raises:
            AdapterError: the folder is not empty.
            AttachError: it was detached.
        """
        self._require()
        lora, extra = ({}, {}) if self.lora is None else self.lora.state_dict()
        settings = self._config.lora
        has_groups = settings is not None and bool(settings.ranks)
        return store.write_adapter(
            Path(folder),
            self._config,
            adapter_config=config_dict(self.backbone, settings, self._config.base_model)
            if settings is not None and has_groups
            else None,
            lora=lora,
            bridge={}
            if self.bridge is None
            else {n: t.detach() for n, t in self.bridge.state_dict().items()},
            extra=extra,
            overwrite=overwrite,
            dtype=dtype,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        commit_message: str = "Upload CLEAR adapter",
        overwrite: bool = False,
        dtype: torch.dtype | None = None,
        results: Sequence[str | Path] = (),
        license: str | None = None,
    ) -> Pushed:
        """Uploads the adapter folder with its card to a model repository of the Hub, in one commit.

        Args:
            repo_id: `owner/name`; the repository is made if there is none.
            private: whether a repository that is made is; None is the account's default.
            revision: branch; one that does not exist begins where the main branch is. None is the main branch.
            create_pr: propose the files in a pull request instead.
            token: None is the one of `hf auth login` or `HF_TOKEN`.
            commit_message: of the commit.
            overwrite: replace another adapter that is there.
            dtype: type of the weights in the files; None as they are.
            results: result files whose scores of this very adapter the card shows.
            license: of the adapter, as the Hub writes it (`apache-2.0`); None leaves it open.

        Raises:
            ClearValueError: no Hub id; or a public repository where a private one is asked for.
            AdapterError: another adapter is there, or the Hub does not take the files; nothing was changed then but that
                a repository or branch may have been made, as the message says.
            AttachError: it was detached.
        """
        from clear_adapters.hub.push import push_folder

        with tempfile.TemporaryDirectory() as temporary:
            try:
                folder = self.save_pretrained(Path(temporary) / "adapter", dtype=dtype)
            except (OSError, SafetensorError) as error:
                raise AdapterError(
                    f"nothing was pushed: the adapter cannot be written to {tempfile.gettempdir()} first: {error}. Make room, "
                    "or set TMPDIR to another disk"
                ) from error
            return push_folder(
                folder,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                token=token,
                commit_message=commit_message,
                overwrite=overwrite,
                results=results,
                license=license,
            )

    # -- facts

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything that the adapter consists of; the bridge's names begin with `bridge.`."""
        if self.lora is not None:
            yield from self.lora.parameters()
        if self.bridge is not None:
            yield from ((f"bridge.{n}", p) for n, p in self.bridge.named_parameters())

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Those of them that receive gradients now."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def size(self) -> AdapterSize:
        """How large the adapter is."""
        held = [p for _, p in self.named_parameters()]
        return AdapterSize(sum(p.numel() for p in held), sum(p.numel() * p.element_size() for p in held))

    def __repr__(self) -> str:
        state = "detached" if self._snapshot is None else "on" if self._switch.on else "off"
        base = self._config.base_model or type(self.backbone.model).__name__
        return f"AttachedModel(backbone={self._config.backbone!r}, base={base!r}, adapter: {self.size()}, {state})"


def _untrained(bridge: LatentBridge) -> bool:
    return not any(bool(p.detach().any()) for p in bridge.up.parameters())
