"""Who can be asked to write a trace: a model behind an OpenAI-compatible service, or a transformers model on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from clear_adapters.endpoint import Endpoint, Failure, Messages
from clear_adapters.errors import CheckpointError
from clear_adapters.images import data_url, load_image

SIDE = 1024
"""Longest side in pixels at which a teacher sees a picture: larger ones cost more and are scaled down by most services."""

MAX_TOKENS = 1024
"""Of one reply, as in the released code."""


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: `system`, `user` or `assistant`.
        text: what is said.
        pictures: files that stand before the text.
    """

    role: str
    text: str
    pictures: tuple[Path, ...] = ()


Conversation = Sequence[Turn]


class Teacher(Protocol):
    """Something that answers conversations with pictures.

    With a budget it needs `max_tokens` too, its longest reply.

    Attributes:
        name: for records.
    """

    name: str

    def replies(self, conversations: Iterable[Conversation]) -> Iterator[tuple[int, str | Failure]]:
        """Asks lazily; gives the place of a conversation and its reply, in any order.

        Raises:
            EndpointError: nothing can be had.
        """


def shown(path: Path, side: int = SIDE) -> Image.Image:
    """A picture as a teacher sees it: RGB, its longer side at most `side` pixels.

    Raises:
        ImageError: it cannot be read.
    """
    image = load_image(path)
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


class EndpointTeacher:
    """A model behind a service; concurrent, retried and limited as the endpoint says."""

    def __init__(self, endpoint: Endpoint, side: int = SIDE) -> None:
        self.endpoint = endpoint
        self.name = endpoint.model
        self.max_tokens = endpoint.max_tokens
        self.side = side

    def replies(self, conversations: Iterable[Conversation]) -> Iterator[tuple[int, str | Failure]]:
        """Replies as they come; one that is empty or cut off is a failure, and not asked for again here."""
        return self.endpoint.stream(map(self._messages, conversations), str, repeats=0)

    def _messages(self, conversation: Conversation) -> Messages:
        messages: list[dict[str, Any]] = []
        for turn in conversation:
            content: Any = turn.text
            if turn.pictures:
                content = [
                    *({"type": "image_url", "image_url": {"url": self._url(p)}} for p in turn.pictures),
                    {"type": "text", "text": turn.text},
                ]
            messages.append({"role": turn.role, "content": content})
        return messages

    def _url(self, path: Path) -> str:
        return data_url(shown(path, self.side), "JPEG", quality=90)


class LocalTeacher:
    """A transformers model that reads pictures and writes text (`AutoModelForImageTextToText`), one conversation at a time."""

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        revision: str | None = None,
        max_new_tokens: int = MAX_TOKENS,
        side: int = SIDE,
    ) -> None:
        """Loads the model, without running code of a repository.

        Args:
            model: a folder or a Hub id.
            device: where it runs; None is the CUDA GPU if there is one, else the CPU.
            revision: of a repository.
            max_new_tokens: longest reply.
            side: longest side of pictures in pixels.

        Raises:
            CheckpointError: it cannot be loaded, or has no chat template.
        """
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self._processor = AutoProcessor.from_pretrained(model, revision=revision)
            self._model = AutoModelForImageTextToText.from_pretrained(
                model, revision=revision, dtype="auto", use_safetensors=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{model!r} cannot be loaded as a model of pictures and text: {reason}"
            ) from error
        if not getattr(self._processor, "chat_template", None):
            raise CheckpointError(f"{model!r} has no chat template, so it cannot be asked anything")
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device).eval()
        self.name = model
        self.max_tokens = self._limit = max_new_tokens
        self._side = side

    def replies(self, conversations: Iterable[Conversation]) -> Iterator[tuple[int, str | Failure]]:
        """Replies in order, decoded greedily."""
        for place, conversation in enumerate(conversations):
            yield place, self._reply(conversation)

    def _reply(self, conversation: Conversation) -> str | Failure:
        import torch

        messages = [
            {
                "role": turn.role,
                "content": [
                    *({"type": "image", "image": shown(p, self._side)} for p in turn.pictures),
                    {"type": "text", "text": turn.text},
                ],
            }
            for turn in conversation
        ]
        inputs = self._processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self._device)
        with torch.inference_mode():
            written = self._model.generate(**inputs, max_new_tokens=self._limit, do_sample=False)
        fresh = written[0, inputs["input_ids"].shape[1] :]
        text = str(self._processor.decode(fresh, skip_special_tokens=True))
        ends = self._model.generation_config.eos_token_id
        ended = {ends} if isinstance(ends, int) else set(ends or ())
        if len(fresh) >= self._limit and int(fresh[-1]) not in ended:
            return Failure(f"cut off (length): {text[:100]!r}", "cut off")
        return text if text.strip() else Failure("no text", "empty")
