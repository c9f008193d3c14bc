r"""Janus's chat as frames around blocks.

A prompt becomes what the chat template of the checkpoints makes of it,
`<bos>{system}\n\n<|User|>: <boi>...<eoi>\n{question}\n\n<|Assistant|>:`, and a restoration stands as the pictures that the
model was trained to draw, `<|Assistant|>:<boi>...<eoi>`. A given picture's own codes, which the generator restores from, stand
before the user's turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clear_adapters.backbones.layout import SLOT
from clear_adapters.errors import CheckpointError

_MARKS = ("image_token", "boi_token", "eoi_token", "bos_token", "eos_token")


@dataclass(frozen=True)
class JanusFrames:
    """The ids; see `Frames`.

    Attributes:
        bos: begins a row.
        end: the end-of-turn token.
        image_start: opens a picture.
        image_end: closes it.
        user: of the words that open the user's turn.
        assistant: of those that open the model's.
        line: of a line break.
    """

    bos: int
    end: int
    image_start: int
    image_end: int
    user: tuple[int, ...]
    assistant: tuple[int, ...]
    line: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> JanusFrames:
        """The frames of a checkpoint's tokenizer; Janus-Pro names the speakers by tokens of their own, Janus by words.

        Raises:
            CheckpointError: the tokenizer lacks a mark.
        """
        missing = [m for m in _MARKS if getattr(tokenizer, f"{m}_id", None) is None]
        if missing:
            raise CheckpointError(
                f"the tokenizer has no {missing[0]}: it is not that of a Janus model, or of the remote-code repositories "
                "(deepseek-ai/...); take the one of deepseek-community/Janus-Pro-1B"
            )

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        named = "<|User|>" in tokenizer.get_vocab()
        user, assistant = ("<|User|>: ", "<|Assistant|>:") if named else ("User: ", "Assistant:")
        return cls(
            bos=tokenizer.bos_token_id,
            end=tokenizer.eos_token_id,
            image_start=tokenizer.boi_token_id,
            image_end=tokenizer.eoi_token_id,
            user=ids(user),
            assistant=ids(assistant),
            line=ids("\n"),
        )

    @property
    def start(self) -> list[int]:
        """The token that begins a row."""
        return [self.bos]

    def text(self, own: bool) -> tuple[list[int], list[int]]:
        """`<|Assistant|>:` text `<eos>`, or text and an empty line."""
        return (list(self.assistant), [self.end]) if own else ([], [*self.line, *self.line])

    def restoration(self, grid: tuple[int, int]) -> list[int]:
        """`<|Assistant|>:<boi>` codes `<eoi>`."""
        return [*self.assistant, *self.condition(grid)]

    def condition(self, grid: tuple[int, int]) -> list[int]:
        """`<boi>` codes `<eoi>`."""
        return [self.image_start, *[SLOT] * (grid[0] * grid[1]), self.image_end]

    def picture(self, count: int) -> list[int]:
        """`<|User|>: <boi>` tokens `<eoi>` and a line break."""
        return [*self.user, self.image_start, *[SLOT] * count, self.image_end, *self.line]
