"""Emu3's chat and its picture grammar as frames around blocks.

A prompt becomes what the chat template of the checkpoints makes of it, `<bos>{system} USER: {picture}{question} ASSISTANT:`.
A picture is `<boi>{h}*{w}<wrap>`, its rows of w codes with an end of line behind each, `<eof><eoi>`. Pictures that are given
and pictures that the model draws are written alike, so there is no other frame for an understanding encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clear_adapters.backbones.layout import SLOT
from clear_adapters.errors import CheckpointError

_MARKS = ("boi_token", "eoi_token", "eof_token", "image_wrapper_token", "bos_token", "eos_token")
_LINE = "<|extra_200|>"


@dataclass(frozen=True)
class Emu3Frames:
    """The ids; see `Frames`.

    Attributes:
        tokenizer: writes sizes and speakers.
        bos: begins a row.
        end: the end-of-turn token.
        image_start: opens a picture.
        image_end: closes it.
        wrap: stands before a picture's first code.
        line: stands behind each row of codes.
        frame: stands behind the last row.
    """

    tokenizer: Any
    bos: int
    end: int
    image_start: int
    image_end: int
    wrap: int
    line: int
    frame: int

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: dict[str, int] | None) -> Emu3Frames:
        """The frames of a checkpoint.

        Args:
            tokenizer: its tokenizer.
            vocabulary: `config.vocabulary_map`.

        Raises:
            CheckpointError: the tokenizer or the vocabulary map lacks a mark.
        """
        missing = [m for m in _MARKS if getattr(tokenizer, f"{m}_id", None) is None]
        missing += [_LINE] if _LINE not in (vocabulary or {}) else []
        if missing:
            raise CheckpointError(
                f"tokenizer and config.vocabulary_map have no {missing[0]}: they are not those of an Emu3 in the layout of "
                "transformers; take those of BAAI/Emu3-Chat-hf"
            )
        assert vocabulary is not None
        return cls(
            tokenizer=tokenizer,
            bos=tokenizer.bos_token_id,
            end=tokenizer.eos_token_id,
            image_start=tokenizer.boi_token_id,
            image_end=tokenizer.eoi_token_id,
            wrap=tokenizer.image_wrapper_token_id,
            line=vocabulary[_LINE],
            frame=tokenizer.eof_token_id,
        )

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    @property
    def grammar(self) -> list[int]:
        """The tokens of a picture that are no codes."""
        return [self.image_start, self.image_end, self.wrap, self.line, self.frame]

    @property
    def start(self) -> list[int]:
        """The token that begins a row."""
        return [self.bos]

    def text(self, own: bool) -> tuple[list[int], list[int]]:
        """`ASSISTANT:` text `<eos>`, or text and a space."""
        return (self._ids("ASSISTANT:"), [self.end]) if own else ([], self._ids(" "))

    def restoration(self, grid: tuple[int, int]) -> list[int]:
        """`ASSISTANT:` and the picture."""
        return [*self._ids("ASSISTANT:"), *self._picture(grid)]

    def condition(self, grid: tuple[int, int]) -> list[int]:
        """`USER: ` and the picture."""
        return [*self._ids("USER: "), *self._picture(grid)]

    def picture(self, count: int) -> list[int]:
        """None: Emu3 understands a picture by its codes."""
        return []

    def _picture(self, grid: tuple[int, int]) -> list[int]:
        height, width = grid
        head = [self.image_start, *self._ids(f"{height}*{width}"), self.wrap]
        return [*head, *[*[SLOT] * width, self.line] * height, self.frame, self.image_end]
