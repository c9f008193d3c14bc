"""The engine: answers, rollouts, streams and replays over one backbone and one bridge."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from clear_adapters.backbones.base import drain
from clear_adapters.errors import ClearTypeError, ClearValueError
from clear_adapters.images import ImageLike, Pictures, pair_images
from clear_adapters.prompts import Protocol, get_protocol
from clear_adapters.replay import Replay, replay
from clear_adapters.reply import (
    Answer,
    BlockText,
    Decision,
    DenoisingStep,
    Event,
    Reply,
    Restored,
    TextDelta,
    Timing,
)
from clear_adapters.rollout import Closed, Decided, Estimated, LatentFrom, Read, Restore, Rollout, Task, Wrote
from clear_adapters.sampling import LatentSampling, TextSampling
from clear_adapters.transcript import Origin, Transcript

if TYPE_CHECKING:
    from clear_adapters.backbones.base import Backbone
    from clear_adapters.bridge import LatentBridge

__all__ = ["Engine", "Reply"]

_MARKS = 8
"""Room in the length check for what stands around the blocks of a prompt."""


class Engine:
    """Decides when a model writes, restores, reads and answers.

    Attributes:
        backbone: the verbs.
        bridge: what restorations are read through; None is the backbone's own way back in.
        protocol: the system prompt.
        text: settings where a call gives none.
        latent: likewise.
        max_restores: the most restorations in one reply; then an answer is asked for.
        plain: be the plain model: no protocol and no bridge, in rollouts and replays too.

    Raises:
        ClearValueError: a negative `max_restores`.
        UnknownNameError: a protocol of an unknown name.
    """

    def __init__(
        self,
        backbone: Backbone,
        bridge: LatentBridge | None = None,
        protocol: Protocol | str = "default",
        text: TextSampling | None = None,
        latent: LatentSampling | None = None,
        max_restores: int = 2,
        plain: bool = False,
    ) -> None:
        if max_restores < 0:
            raise ClearValueError(f"max_restores={max_restores}: must be 0 or more; 0 grants no request")
        self.backbone = backbone
        self.bridge = bridge
        self.protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
        self.text = text or TextSampling()
        self.latent = latent or LatentSampling()
        self.max_restores = max_restores
        self.plain = plain

    @property
    def _own_bridge(self) -> LatentBridge | None:
        return None if self.plain else self.bridge

    # -- many rows

    def rollout(
        self,
        images: ImageLike | Sequence[ImageLike],
        questions: str | Sequence[str],
        *,
        seeds: Sequence[int],
        restore: Restore = "auto",
        text: TextSampling | None = None,
        latent: LatentSampling | None = None,
        latent_from: LatentFrom = "own",
        clean_images: ImageLike | Sequence[ImageLike] | None = None,
        group: int = 1,
    ) -> list[Transcript]:
        """Lets the model answer N questions, `group` times each, in one batch.

        A prompt is read once for its whole group. A row's outcome depends on its seed and its prompt, not on its
        neighbours.

        Args:
            images: one picture a question.
            questions: N questions.
            seeds: one for each of the N x group rows, a group's rows neighbours.
            restore: `auto` lets the model decide, `always` writes the request for it, `never` replaces a request by a
                sentence of refusal and lets it go on.
            text: how text is sampled.
            latent: how restorations are sampled.
            latent_from: what stands for a restoration: the model's `own`; controls are the `degraded` picture's latent,
                the `clean` picture's, or the model's own decoded and re-encoded (`reencode`).
            clean_images: N pictures, for `latent_from="clean"`.
            group: rows a prompt.

        Returns:
            N x group transcripts.

        Raises:
            ClearValueError: an unknown choice, lists of unequal length, a prompt that does not fit, or a restoration for which
                a row has no positions left once it is asked for.
            ClearTypeError: a seed that is no whole number.
            ImageError: a picture that cannot be loaded.
        """
        pictures, asked, _ = pair_images(images, questions)
        call = self._call(
            pictures, asked, seeds, restore, text, latent, latent_from, clean_images, group, self.plain
        )
        run = Rollout(self.backbone, self._own_bridge, call.batch())
        drain(run.steps())
        return run.transcripts

    def answer(
        self,
        images: ImageLike | Sequence[ImageLike],
        questions: str | Sequence[str],
        *,
        restore: Restore = "auto",
        text: TextSampling | None = None,
        latent: LatentSampling | None = None,
        latent_from: LatentFrom = "own",
        clean_images: ImageLike | Sequence[ImageLike] | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        plain: bool | None = None,
    ) -> list[Reply]:
        """Answers questions.

        With one seed every row starts from it, so a reply does not depend on what else is asked. Everything is checked before
        the first batch runs but what shows in decoding a picture alone: pictures are decoded batch by batch.

        Args:
            images: as in `rollout`.
            questions: as in `rollout`.
            restore: as in `rollout`.
            text: as in `rollout`.
            latent: as in `rollout`.
            latent_from: as in `rollout`.
            clean_images: as in `rollout`.
            seed: one for every row, or a list with one each.
            batch_size: rows at a time; None takes all at once.
            plain: ask without the protocol, the picture read by the understanding encoder only; None is the engine's own
                setting. (Weights are not touched: taking LoRA out is the caller's part.)

        Raises:
            ClearValueError: as in `rollout`; a batch size below 1.
            ClearTypeError: as in `rollout`.
            ImageError: a picture that cannot be loaded, named by its place; of one that cannot be decoded, once its batch is
                reached.
        """
        pictures, asked, _ = pair_images(images, questions)
        if batch_size is not None and batch_size < 1:
            raise ClearValueError(
                f"batch_size={batch_size}: must be at least 1, or None for all rows at once"
            )
        seeds = _seeds(seed, len(asked))
        if len(seeds) != len(asked):
            raise ClearValueError(
                f"{len(seeds)} seeds for {len(asked)} questions: give one, or one for each question"
            )
        call = self._call(pictures, asked, seeds, restore, text, latent, latent_from, clean_images, 1, plain)
        size = batch_size or len(asked)
        replies: list[Reply] = []
        for start in range(0, len(asked), size):
            run = Rollout(self.backbone, self.bridge, call.batch(start, start + size))
            drain(run.steps())
            replies += [
                Reply(t, dict(run.clock.seconds), call.task.plain, self.backbone.decode)
                for t in run.transcripts
            ]
        return replies

    # -- one row, as it happens

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
        plain: bool | None = None,
    ) -> Iterator[Event]:
        """Answers one question and tells what happens meanwhile; the reply equals that of `answer`.

        The deltas joined are `reply.transcript.reply`. Arguments are checked at once, not at the first event.

        Args:
            image: the picture.
            question: the question.
            restore: as in `rollout`.
            text: as in `rollout`.
            latent: as in `rollout`.
            latent_from: as in `rollout`.
            clean_image: the clean picture, for `latent_from="clean"`.
            seed: as in `answer`.
            plain: as in `answer`.

        Returns:
            An iterator of events; `Answer` and `Timing` come last. Dropping it stops the work.

        Raises:
            ClearValueError: as in `rollout`.
            ImageError: the picture cannot be loaded.
        """
        if not isinstance(question, str):
            raise ClearTypeError(f"stream takes one question as a string, not {type(question).__name__}")
        pictures, asked, _ = pair_images(image, question)
        seeds = _seeds(seed, 1)
        task = self._call(
            pictures, asked, seeds, restore, text, latent, latent_from, clean_image, 1, plain
        ).batch()
        return self._events(Rollout(self.backbone, self.bridge, task), task)

    def _events(self, run: Rollout, task: Task) -> Iterator[Event]:
        # A request that will be refused is not shown: its text is replaced, from the tag on.
        decode, hold = self.backbone.decode_text, task.restore == "never" and not task.plain
        block: BlockText | None = None
        first = True
        for moment in run.steps():
            if isinstance(moment, Wrote | Closed):
                if isinstance(moment, Closed) and not moment.rows:
                    continue  # taken back; the block that stands in its place comes next
                if block is None:
                    block = BlockText(decode, hold)
                    if not first:
                        yield TextDelta("\n", _origin(moment))
                    first = False
            if isinstance(moment, Wrote):
                token = int(moment.ids[0])
                shown = block.feed(token) if block is not None and token >= 0 else ""
                if shown:
                    yield TextDelta(shown)
            elif isinstance(moment, Closed):
                rest = block.close(moment.segments[0].text) if block is not None else ""
                if rest:
                    yield TextDelta(rest, _origin(moment))
                block = None
            elif isinstance(moment, Decided):
                yield Decision(
                    moment.actions[0], moment.forced and moment.actions[0] not in ("answer", "stop")
                )
            elif isinstance(moment, Estimated):
                yield DenoisingStep(moment.estimates[0], moment.step, moment.steps)
            elif isinstance(moment, Read):
                yield Restored(moment.segments[0].restoration, moment.segments[0].origin)
        reply = Reply(run.transcripts[0], dict(run.clock.seconds), task.plain, self.backbone.decode)
        yield Answer(reply.text, reply)
        yield Timing(reply.timings)

    # -- scoring

    def replay(
        self,
        transcripts: Sequence[Transcript],
        *,
        temperature: float | None = None,
        logprob: Literal["mean", "sum"] | None = None,
        steps: Sequence[Sequence[Sequence[int]]] | None = None,
        with_hidden: tuple[int, ...] = (),
    ) -> Replay:
        """Scores transcripts in one parallel forward; see `clear_adapters.replay.replay`.

        `temperature` and `logprob` are the engine's own settings where they are None.
        """
        return replay(
            self.backbone,
            self._own_bridge,
            transcripts,
            temperature=self.text.temperature if temperature is None else temperature,
            sampling=self.latent if logprob is None else replace(self.latent, logprob=logprob),
            steps=steps,
            with_hidden=with_hidden,
        )

    # -- checks

    def _call(
        self,
        pictures: Pictures,
        asked: list[str],
        seeds: Sequence[int],
        restore: Restore,
        text: TextSampling | None,
        latent: LatentSampling | None,
        latent_from: LatentFrom,
        clean_images: Any,
        group: int,
        plain: bool | None,
    ) -> _Call:
        plain = self.plain if plain is None else plain
        _one_of("restore", restore, get_args(Restore))
        _one_of("latent_from", latent_from, get_args(LatentFrom))
        clean = _clean(clean_images, len(asked))
        if latent_from == "clean" and clean is None:
            raise ClearValueError(
                "latent_from='clean' reads the clean pictures' latents: pass clean_images too"
            )
        if latent_from == "reencode" and not self.backbone.spec.decodes:
            raise ClearValueError(
                f"latent_from='reencode': backbone {self.backbone.spec.name!r} decodes no pixels"
            )
        if restore == "always" and not plain and self.max_restores == 0:
            raise ClearValueError(
                "restore='always' with max_restores=0: nothing may be restored; raise max_restores"
            )
        if group < 1:
            raise ClearValueError(f"group={group}: must be at least 1")
        if len(seeds) != len(asked) * group:
            raise ClearValueError(
                f"{len(seeds)} seeds for {len(asked)} questions in groups of {group}: give one seed for each of the "
                f"{len(asked) * group} rows"
            )
        text = text or self.text
        system = "" if plain else self.protocol.system
        asked = [self.protocol.ask_plainly(q) for q in asked] if plain else asked
        sizes = pictures.sizes()
        own = sizes if clean is None else clean.sizes()
        forced = restore == "always" and not plain
        drawn = (own if latent_from == "clean" else sizes) if forced else []
        self._check_length(system, asked, text, sizes, drawn, plain)
        task = Task(
            images=[],
            questions=asked,
            clean=None,
            seeds=_whole(seeds),
            protocol=self.protocol,
            restore=restore,
            latent_from=latent_from,
            text=text,
            latent=latent or self.latent,
            max_restores=self.max_restores,
            group=group,
            plain=plain,
        )
        return _Call(task, pictures, clean)

    def _check_length(
        self,
        system: str,
        questions: list[str],
        text: TextSampling,
        sizes: list[tuple[int, int]],
        drawn: list[tuple[int, int]],
        plain: bool,
    ) -> None:
        """Refuses what cannot work: a prompt, or one with the restorations that are forced, that leaves no room for a turn.

        What the model may do is not counted. Most turns end early and many replies restore nothing: with four turns of 512
        and two restorations an Emu3 of 9,216 positions could be asked nothing about a picture of 4,160, and
        `builtin:janus-tiny` no question of more than 300 letters. A row that does run out of positions is cut off where it
        writes, and an error where it would restore.
        """
        limit = self.backbone.max_positions
        if limit is None:
            return
        shared = len(self.backbone.encode_text(system)) + _MARKS + text.max_new_tokens
        if drawn:
            shared += len(self.backbone.encode_text(self.protocol.forced_restore))
        count = self.backbone.picture_positions
        given = {size: count(size, as_condition=not plain) for size in set(sizes)}
        made = {size: count(size, understanding=False) for size in set(drawn)}
        for place, question in enumerate(questions):
            pictures = given[sizes[place]] + (made[drawn[place]] if drawn else 0)
            needed = shared + pictures + len(self.backbone.encode_text(question))
            if needed > limit:
                raise ClearValueError(
                    f"question {place} needs {needed} positions (of these {pictures} for pictures and {text.max_new_tokens} for "
                    f"a turn of max_new_tokens), and backbone {self.backbone.spec.name!r} has {limit}: shorten the question, "
                    "give a smaller picture or lower max_new_tokens"
                )


@dataclass(frozen=True)
class _Call:
    """Rows that were checked together.

    Attributes:
        task: all of them, without their pictures.
        pictures: decoded batch by batch, since those of a whole benchmark would not fit into memory.
        clean: likewise.
    """

    task: Task
    pictures: Pictures
    clean: Pictures | None

    def batch(self, start: int = 0, stop: int | None = None) -> Task:
        """Some questions' rows, with their pictures."""
        group = self.task.group
        return replace(
            self.task,
            images=self.pictures.load(start, stop),
            clean=None if self.clean is None else self.clean.load(start, stop),
            questions=self.task.questions[start:stop],
            seeds=self.task.seeds[start * group : None if stop is None else stop * group],
        )


def _clean(images: Any, count: int) -> Pictures | None:
    if images is None:
        return None
    listed = images if isinstance(images, list | tuple) else [images]
    if len(listed) != count:
        raise ClearValueError(f"{len(listed)} clean images for {count} questions: give one for each question")
    return Pictures(listed, "clean_images" if listed is images else None)


def _origin(moment: Wrote | Closed) -> Origin:
    return moment.segments[0].origin if isinstance(moment, Closed) else Origin.SAMPLED


def _seeds(given: Any, rows: int) -> list[Any]:
    """One seed a row: of any type that stands for a whole number, such as NumPy's, or a list of them."""
    try:
        return [operator.index(given)] * rows
    except TypeError:
        if isinstance(given, str | bytes) or not isinstance(given, Iterable):
            raise ClearTypeError(f"seed={given!r}: must be a whole number, or a list of them") from None
    return list(given)


def _whole(seeds: Iterable[Any]) -> list[int]:
    # Python's own numbers: a row's random stream is reckoned in more bits than NumPy's hold.
    found = []
    for place, seed in enumerate(seeds):
        try:
            found.append(operator.index(seed))
        except TypeError:
            raise ClearTypeError(f"seed {place} is {seed!r}: must be a whole number") from None
    return found


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ClearValueError(f"{name}={value!r}: one of {', '.join(repr(a) for a in allowed)}")
