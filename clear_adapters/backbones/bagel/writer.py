"""Writing text token by token over tensors that stay in place, so that a GPU replays one captured step.

A step of a small model is hundreds of kernels that are launched one by one; captured as a CUDA graph, it costs one launch.
On other devices the same step runs as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from clear_adapters.backbones.bagel.cache import Slots
from clear_adapters.backbones.bagel.model import BagelModel, Frame
from clear_adapters.backbones.base import Context
from clear_adapters.sampling import RowRandom, TextSampling, choose_token

_PORTIONS = {"cuda": 256}
"""Tokens for which room is made at once: a graph is captured for each portion."""
_PORTION = 32
_MODE = "thread_local"
"""A data loader's thread may pin memory while a step is captured."""

_LOG = logging.getLogger(__name__)


class _Place:
    """Where steps are captured on one GPU: a stream and a memory pool whose workspaces and blocks serve every capture.

    Attributes:
        stream: on which steps are captured; a workspace belongs to its stream.
        keeper: a graph that stays, since a pool lives as long as one of its graphs does.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.keeper = torch.cuda.CUDAGraph()
            self._anchor = torch.zeros(1, device=device)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.keeper.capture_begin(capture_error_mode=_MODE)
                self._anchor.fill_(1)
                self.keeper.capture_end()


_capturing = cache(_Place)


@cache
def _tell(reason: str) -> None:
    """Once a reason."""
    _LOG.warning(
        "a step of writing cannot be captured (%s): text is written without, which is slower", reason
    )


def can_capture(model: BagelModel, device: torch.device) -> bool:
    """Whether a step can be replayed as a graph: on a GPU, and not where hooks gather shards of the base.

    Shards are told by their modules: gathered ones are plain tensors.
    """
    return device.type == "cuda" and not any(isinstance(m, FSDPModule) for m in model.modules())


class Writer:
    """A batch of rows that write.

    Attributes:
        tokens: (B, max_new_tokens) int64 on the device; -1 where a row wrote nothing.
        logprobs: (B, max_new_tokens) float32.
        drawing: (B,) bool, rows that are not finished.
        reading: (B,) bool, rows whose next token (`feed`) is one of theirs.
        feed: (B,) int64, the token that is read next.
        steps: tokens written so far.
    """

    def __init__(
        self,
        model: BagelModel,
        context: Context,
        sampling: TextSampling,
        rows: Sequence[int],
        marks: tuple[int, int],
    ) -> None:
        """Makes ready; nothing is read yet.

        Args:
            model: the network.
            context: what the rows have read; it stays usable.
            sampling: of the tokens.
            rows: those that write.
            marks: ids of the tokens that open and close a block.
        """
        self._model, self._context, self._sampling = model, context, sampling
        device, count = context.position.device, context.rows
        start, self._end = marks
        active = torch.zeros(count, dtype=torch.bool)
        active[list(rows)] = True
        self.drawing = active.to(device)
        self.reading = self.drawing.clone()
        self.feed = torch.full((count,), start, device=device)
        self.tokens = torch.full((count, sampling.max_new_tokens), -1, device=device)
        self.logprobs = torch.zeros(count, sampling.max_new_tokens, device=device)
        self.steps = 0
        self._position = context.position.clone()
        self._random = context.random.clone()
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._rows = torch.arange(count, device=device)
        self._captures = can_capture(model, device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._open(context)

    def _open(self, context: Context) -> None:
        """Room behind a context for the next portion of tokens."""
        portion = _PORTIONS.get(context.position.device.type, _PORTION)
        room = context.cache.reserve(context.length, min(portion, self._sampling.max_new_tokens - self.steps))
        # The room is taken at once: what is appended to a fork of the context meanwhile goes elsewhere.
        room.commit()
        self._slots = Slots(room, torch.full_like(self._place, room.start))
        wide = context.valid.new_zeros(context.rows, room.stop)
        wide[:, : room.start] = context.valid
        self._mask = wide[:, None, None]
        self._stop = room.stop
        self._length = room.start
        self._graph = None

    def advance(self) -> Tensor:
        """Reads the last token of each row and writes the next: (B,) ids, -1 in finished rows."""
        if self._length == self._stop:
            self._open(self.context)
        if self._graph is not None:
            self._graph.replay()
        else:
            # The first step of a portion runs as it is: it makes the casts of autocast, which outlive a graph.
            self._step()
            if self._captures and self._length + 1 < self._stop:
                self._graph = self._captured()
        self._length += 1
        self.steps += 1
        return self.tokens[:, self.steps - 1]

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """The step as a graph; None where it cannot be captured, and the steps run as they are."""
        device, graph = self.feed.device, torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            try:
                place = _capturing(device)
                place.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(place.stream):
                    graph.capture_begin(pool=place.keeper.pool(), capture_error_mode=_MODE)
                    self._step()
                    graph.capture_end()
            except RuntimeError as error:
                self._captures = False
                _tell(str(error))
                with suppress(RuntimeError):  # a capture that has not ended by the error
                    graph.capture_end()
                return None
            torch.cuda.current_stream().wait_stream(place.stream)
        return graph

    def _step(self) -> None:
        """One token in every row, all of it in place."""
        decoder, slots = self._model.language_model.model, self._slots
        und = decoder.embed_tokens(self.feed)
        # A token sees itself also where it is a hole, against NaN.
        self._mask.index_fill_(3, slots.place, True)
        cos, sin = decoder.rotary(self._position[:, None])
        frame = Frame((len(self.feed), 1), self._rows, self._rows[:0], cos, sin, self._mask)
        und, _, _ = decoder(und, und.new_zeros(0, und.shape[-1]), frame, slots)
        self._mask.index_copy_(3, slots.place, self.reading[:, None, None, None])
        self._position += self.reading
        random = RowRandom(self._random.seeds, self._random.counts)
        token, logprob = choose_token(self._model.logits(und), self._sampling, random, self.drawing)
        self._random.counts.copy_(random.counts)
        self.tokens.index_copy_(1, self._place, torch.where(self.drawing, token, -1)[:, None])
        self.logprobs.index_copy_(1, self._place, logprob[:, None])
        self.feed.copy_(torch.where(self.drawing, token, self._end))
        self.reading.copy_(self.drawing)
        self.drawing &= token != self._end
        slots.place += 1
        self._place += 1

    @property
    def context(self) -> Context:
        """What the rows have read: all but the last token of each."""
        return replace(
            self._context,
            cache=self._slots.commit(self._length),
            length=self._length,
            valid=self._mask[:, 0, 0, : self._length].clone(),
            position=self._position.clone(),
            random=self._random.clone(),
        )
