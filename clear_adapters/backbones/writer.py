"""Writing text token by token over tensors that stay in place, so that a GPU replays one captured step.

A step of a small model is hundreds of kernels that are launched one by one; captured as a CUDA graph, it costs one launch.
On other devices the same step runs as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clear_adapters.backbones import fast
from clear_adapters.backbones.base import Context
from clear_adapters.backbones.cache import Slots
from clear_adapters.backbones.graphs import capture, tell
from clear_adapters.sampling import RowRandom, TextSampling, choose_token
from clear_adapters.transcript import Origin, TextSegment

_PORTIONS = {"cuda": 256}
"""Tokens for which room is made at once: a graph is captured for each portion."""
_PORTION = 32
_ALIGNED = 8
"""Tokens of a multiple of which the room ends: a row of 16-bit scores is then one of 16-byte pieces."""

Step = Callable[[Tensor, Tensor, Tensor, Slots], Tensor]
"""One token in every row: its ids (B,), positions (B, 1), mask (B, 1, 1, K) bool and the cache's room, to logits (B, V) of
the next token. Nothing in it may wait for the device."""


class Writer:
    """A batch of rows that write.

    Attributes:
        tokens: (B, max_new_tokens) int64 on the device; -1 where a row wrote nothing.
        logprobs: (B, max_new_tokens) float32.
        drawing: (B,) bool, rows that are not finished.
        cut: (B,) bool, rows that were cut off where the model's positions end.
        reading: (B,) bool, rows whose next token (`feed`) is one of theirs.
        feed: (B,) int64, the token that is read next.
        steps: tokens written so far.
    """

    def __init__(
        self,
        step: Step,
        context: Context,
        sampling: TextSampling,
        rows: Sequence[int],
        marks: tuple[int, int],
        *,
        captures: bool = False,
        warm: set[int] | None = None,
        room: int | None = None,
        positions: int | None = None,
    ) -> None:
        """Makes ready; nothing is read yet.

        Args:
            step: reads a token in every row.
            context: what the rows have read; it stays usable.
            sampling: of the tokens.
            rows: those that write.
            marks: ids of the token that is read first, and of the one that ends a turn.
            captures: whether the step may be captured, see `can_capture`.
            warm: numbers of rows of which such a step has run, so that it is captured without running first; added to. None
                is that every step has to.
            room: tokens to make room for at once; None is in portions.
            positions: that the model was made for; None is not known.
        """
        self._read, self._context, self._sampling = step, context, sampling
        device, count = context.position.device, context.rows
        start, self._end = marks
        active = torch.zeros(count, dtype=torch.bool)
        active[list(rows)] = True
        self.drawing = active.to(device)
        # A row goes on while there is room for one more token and the end that closes it. No row is longer than the cache, so that
        # most turns need not look.
        self._last: int | None = None
        if positions is not None and context.length + sampling.max_new_tokens + 2 > positions:
            self._last = positions - 2
            self.drawing &= context.position < self._last
        self.cut = torch.zeros_like(self.drawing)
        self.reading = self.drawing.clone()
        self.feed = torch.full((count,), start, device=device)
        self.tokens = torch.full((count, sampling.max_new_tokens), -1, device=device)
        self.logprobs = torch.zeros(count, sampling.max_new_tokens, device=device)
        self.steps = 0
        self._waits = captures and fast.takes("last", device)
        # Where the captured step reads the last token too, and the end of a turn that was cut off, there is room for both.
        self._limit = room or sampling.max_new_tokens + (2 if self._waits else 0)
        self._position = context.position.clone()
        self._random = context.random.clone()
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._captures = captures
        # The casts of autocast are made by a step that runs.
        self._warm = set() if warm is None or torch.is_autocast_enabled(device.type) else warm
        self._room = room
        self._graph: torch.cuda.CUDAGraph | None = None
        self._open(context)

    def _open(self, context: Context) -> None:
        """Room behind a context for the next portion of tokens."""
        portion = self._room or _PORTIONS.get(context.position.device.type, _PORTION)
        stop = context.length + min(portion, self._limit - self.steps)
        # Products over other lengths take kernels without loads of 16 bytes.
        room = context.cache.reserve(context.length, -(-stop // _ALIGNED) * _ALIGNED - context.length)
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
        self._move()
        self.steps += 1
        return self.tokens[:, self.steps - 1]

    def finish(self) -> bool:
        """Reads what rows wrote last, and the end of a turn that was cut off; `tokens` and `logprobs` are lost.

        Returns:
            Whether it did: only where the step is captured. Elsewhere tokens are read one by one as well as here.
        """
        if self._graph is None or not self._waits:
            return False
        cut = self.drawing | self.cut
        self.drawing.zero_()
        self._place.zero_()
        self._move()
        if bool(cut.any()):
            # What was cut off is closed, but nobody chose that token. `feed` is it in all rows now.
            self.reading.copy_(cut)
            self._place.zero_()
            self._move()
        return True

    def _move(self) -> None:
        if self._length == self._stop:
            self._open(self.context)
        rows = len(self.feed)
        captures = self._graph is None and self._captures and self._length + 1 < self._stop
        if captures and rows in self._warm:
            self._graph, captures = self._captured(), False
        if self._graph is not None:
            self._graph.replay()
        else:
            # The first step runs as it is: kernels are compiled and loaded, and the casts of autocast made, which outlive a graph.
            self._step()
            if captures:
                self._graph = self._captured()
                if self._graph is not None:
                    self._warm.add(rows)
        self._length += 1

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """The step as a graph; None where it cannot be captured, and the steps run as they are."""
        try:
            return capture(self._step, self.feed.device)
        except RuntimeError as error:
            if len(self.feed) in self._warm:
                # Something is new to it after all: it runs first, and is captured then.
                self._warm.discard(len(self.feed))
            else:
                self._captures = False
                tell("a step of writing", str(error))
            return None

    def _step(self) -> None:
        """One token in every row, all of it in place."""
        slots = self._slots
        # A token sees itself also where it is a hole, against NaN.
        self._mask.index_fill_(3, slots.place, True)
        logits = self._read(self.feed, self._position[:, None], self._mask, slots)
        self._mask.index_copy_(3, slots.place, self.reading[:, None, None, None])
        self._position += self.reading
        self._choose(logits)
        slots.place += 1
        self._place += 1

    def _choose(self, logits: Tensor) -> None:
        """Takes the next token of each row, in place."""
        token, logprob = self._draw(logits, self.drawing)
        self.tokens.index_copy_(1, self._place, torch.where(self.drawing, token, -1)[:, None])
        self.logprobs.index_copy_(1, self._place, logprob[:, None])
        self.feed.copy_(torch.where(self.drawing, token, self._end))
        self.reading.copy_(self.drawing)
        self.drawing &= token != self._end
        if self._last is not None:
            self.cut |= self.drawing & (self._position >= self._last)
            self.drawing &= ~self.cut

    def _draw(self, logits: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        random = RowRandom(self._random.seeds, self._random.counts)
        token, logprob = choose_token(logits, self._sampling, random, active)
        self._random.counts.copy_(random.counts)
        return token, logprob

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


class _End:
    """Whether all rows are finished, asked of a GPU without letting it wait: the answer is two steps old."""

    _LATE = 2

    def __init__(self, drawing: Tensor) -> None:
        self._drawing = drawing
        self._steps = 0
        self._asked: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def reached(self) -> bool:
        """Asks anew, and tells what was answered to the question before the last."""
        self._steps += 1
        if self._drawing.device.type != "cuda":
            # Where asking stalls and cannot be put off, it is done now and then.
            often = self._drawing.device.type == "cpu" or self._steps % 16 == 0
            return often and not bool(self._drawing.any())
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(self._drawing.any(), non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._asked.append((answer, done))
        if len(self._asked) <= self._LATE:
            return False
        answer, done = self._asked.popleft()
        done.synchronize()
        return not bool(answer)


@torch.no_grad()  # as a decorator it holds inside each step only, not in the caller between steps
def write_turn(
    writer: Writer,
    rows: Sequence[int],
    feed: Callable[[Context, Tensor, Tensor], Context],
    end: int,
    decode: Callable[[Tensor], str],
) -> Generator[Tensor, None, tuple[Context, list[TextSegment]]]:
    """Runs a writer to the end of all turns: what `Backbone.write_text_steps` gives.

    Args:
        writer: ready to write.
        rows: those that write.
        feed: reads one token (B,) where a mask (B,) is True.
        end: the token that ends a turn.
        decode: text of ids.
    """
    named = torch.tensor(rows, dtype=torch.int64).to(writer.tokens.device)
    limit, every = writer.tokens.shape[1], len(rows) == len(writer.tokens)
    end_of_all = _End(writer.drawing)
    while writer.steps < limit:
        ids = writer.advance()
        yield ids if every else ids[named]
        if end_of_all.reached():
            break
    table, scores = (x.to("cpu", copy=True) for x in (writer.tokens, writer.logprobs))
    if writer.finish():
        context = writer.context
    else:
        context = feed(writer.context, writer.feed, writer.reading)
        cut = writer.drawing | writer.cut
        if bool(cut.any()):
            # Cut off at the limit: the block is closed, but nobody chose that token.
            context = feed(context, torch.full_like(writer.feed, end), cut)
    segments = []
    for row in rows:
        own = table[row] >= 0
        ids = table[row][own]
        segments.append(TextSegment(ids, Origin.SAMPLED, decode(ids), logprobs=scores[row][own]))
    return context, segments
