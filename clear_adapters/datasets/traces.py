"""Traces: an example as the transcript that a model is trained to produce.

The blocks are those that the engine reads and writes, letter by letter, so that what is trained is what is sampled.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal

import torch

from clear_adapters.datasets.example import Example
from clear_adapters.errors import ClearValueError
from clear_adapters.prompts import Protocol
from clear_adapters.transcript import (
    ANSWER_OPEN,
    RESTORE,
    THINK_CLOSE,
    ImageSegment,
    Origin,
    RestorationSegment,
    Segment,
    TextSegment,
    Transcript,
)

TracePath = Literal["direct", "restore", "always", "declined", "recorded", "plain"]

CONDITIONS = {
    "lens_blur": "blurred",
    "lens_flare": "glaring",
    "motion_blur": "smeared",
    "dirty_lens": "dirty",
    "hsv_saturation": "faded",
    "jpeg_compression": "compressed",
    "block_exchange": "shuffled",
    "mean_shift": "flattened",
    "scan_lines": "striped",
    "dark_illumination": "dark",
    "atmospheric_turbulence": "warped",
    "gaussian_noise": "noisy",
    "color_diffusion": "bleeding",
    "sharpness_change": "too sharp",
    "graffiti": "scribbled over",
    "watermark_damage": "patched",
}
"""What each corruption looks like; short, because the built-in models read bytes."""

_MILD, _STRONG = 0.34, 0.67

_JOINT = re.compile(rf"({THINK_CLOSE})\s*({ANSWER_OPEN})")


@dataclass(frozen=True)
class TraceSettings:
    """How the path of an example is chosen.

    Attributes:
        restore_below: pictures below this many dB against their clean ones are restored.
        explore: share of examples that take the other path.
        declined: share of would-be restorations that are refused (`restore="never"` of the engine).
        always: share of restorations that the caller asks for (`restore="always"` of the engine).

    Raises:
        ClearValueError: a share outside [0, 1], or shares of restorations that sum to more than 1.
    """

    restore_below: float = 20.0
    explore: float = 0.1
    declined: float = 0.1
    always: float = 0.1

    def __post_init__(self) -> None:
        for name in ("explore", "declined", "always"):
            if not 0 <= getattr(self, name) <= 1:
                raise ClearValueError(f"{name}={getattr(self, name)}: a share in [0, 1]")
        if self.declined + self.always > 1:
            raise ClearValueError(f"declined={self.declined} and always={self.always} sum to more than 1")


def condition(example: Example) -> str:
    """The state of the picture in two or three words, at most 30 bytes of them."""
    if example.degradation is None:
        return "Clear."
    word = CONDITIONS.get(example.degradation, "degraded")
    if example.intensity <= 0:
        # A record that names the degradation but not how strong it is.
        return f"{word.capitalize()}."
    if example.intensity < _MILD:
        return f"Slightly {word}."
    if example.intensity < _STRONG:
        return f"{word.capitalize()}."
    return f"Badly {word}."


def choose_path(
    example: Example, settings: TraceSettings, rng: random.Random, psnr: float | None
) -> TracePath:
    """Which way the trace goes; the same number of draws for every example.

    Args:
        example: a recorded reply goes its own way; without a clean picture nothing can be restored.
        settings: thresholds and shares.
        rng: where chance comes from.
        psnr: of the degraded against the clean picture at the model's resolution; None takes the example's own.
    """
    flip, how = rng.random(), rng.random()
    if example.reply is not None:
        return "recorded"
    if example.clean_image is None:
        return "direct"
    value = example.psnr if psnr is None else psnr
    restores = value is not None and value < settings.restore_below
    if flip < settings.explore:
        restores = not restores
    if not restores:
        return "direct"
    if how < settings.declined:
        return "declined"
    return "always" if how < settings.declined + settings.always else "restore"


def build_transcript(
    example: Example,
    protocol: Protocol,
    path: TracePath,
    *,
    image: object,
    clean: object = None,
    understanding: bool = True,
) -> Transcript:
    """The transcript of one example; text segments carry no ids yet.

    Args:
        example: what is asked and what is true.
        protocol: the system prompt; `plain` leaves it out.
        path: from `choose_path`, or `plain` for the family's own chat.
        image: the degraded picture, in the form that `pieces` prepares.
        clean: the clean picture in the same form.
        understanding: whether the understanding encoder's tokens of the degraded picture are present.

    Raises:
        ClearValueError: the path restores and there is no clean picture.
    """
    plain = path == "plain"
    segments: list[Segment] = []
    if protocol.system and not plain:
        segments.append(_text(protocol.system, Origin.PROMPT))
    segments.append(ImageSegment(image, as_condition=not plain, understanding=understanding))
    question = protocol.ask_plainly(example.question) if plain else example.question
    segments.append(_text(question, Origin.PROMPT))
    if plain:
        segments.append(_text(example.answer, Origin.SAMPLED))
    elif path == "recorded":
        segments += _recorded(example, protocol, clean)
    else:
        segments += _reply(example, protocol, path, clean)
    return Transcript(segments)


def _reply(example: Example, protocol: Protocol, path: TracePath, clean: object) -> list[Segment]:
    state = condition(example)
    if path != "direct" and state == "Clear.":
        # Nobody restores what he calls clear: an unnamed degradation, or a restoration tried for its own sake.
        state = "Unsure."
    answer = f"<answer>{example.answer}</answer>"
    joint = protocol.joint
    second = f"<think>{example.fact}</think>{joint}{answer}"
    if path == "direct":
        thought = f"{state} {example.fact}".strip()
        return [_text(f"<think>{thought}</think>{joint}{answer}", Origin.SAMPLED)]
    request = f"<think>{state}</think>{joint}{RESTORE}"
    if path == "declined":
        return [_text(protocol.declined(request), Origin.FORCED), _text(second, Origin.SAMPLED)]
    first = (
        _text(request, Origin.SAMPLED) if path == "restore" else _text(protocol.forced_restore, Origin.FORCED)
    )
    return [first, _restoration(example, clean), _text(second, Origin.SAMPLED)]


def _recorded(example: Example, protocol: Protocol, clean: object) -> list[Segment]:
    """A recorded reply, cut at every request; each is followed by the clean picture.

    What stands between a thought and an answer is the protocol's joint, as the engine and the built traces have it.
    """
    parts = (example.reply or "").split(RESTORE)
    segments: list[Segment] = []
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        text = part.strip() if last else (part.strip() + protocol.joint + RESTORE).strip()
        text = _JOINT.sub(lambda found: found[1] + protocol.joint + found[2], text)
        if text:
            segments.append(_text(text, Origin.SAMPLED))
        if not last:
            segments.append(_restoration(example, clean))
    return segments


def _restoration(example: Example, clean: object) -> RestorationSegment:
    if clean is None:
        raise ClearValueError(f"example {example.id!r} restores and has no clean picture")
    return RestorationSegment(target=clean)


def _text(text: str, origin: Origin) -> TextSegment:
    return TextSegment(torch.zeros(0, dtype=torch.int64), origin, text)
