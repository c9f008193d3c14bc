"""Pictures on their way to the page and from it: uploads read within bounds, and pictures as the page shows them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from clear_adapters import images
from clear_adapters.degradations import SEVERITIES, degrade, draw, intensity_of
from clear_adapters.errors import ImageError
from clear_adapters.images import load_image

if TYPE_CHECKING:
    from clear_adapters.ui.samples import Sample

MAX_UPLOAD = 20 * 2**20
"""Bytes of an upload."""
MAX_PIXELS = 32_000_000
"""Of an upload: 32 megapixels hold what phones take."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What an upload may be: as few decoders as visitors need. (MPO, which some phones take, is opened as JPEG.)"""

RANDOM = "random"
AS_IT_IS = "none"
"""Degradations that are none of the sixteen: a drawn one, and the picture as it is."""

_LOSSLESS = 300 * 300
_URL = "data_url"


@dataclass(frozen=True)
class Subject:
    """What is asked about.

    Attributes:
        picture: as it was chosen or uploaded, its longest side bounded.
        sample: the sample that it is; None for a visitor's own picture.
        degradation: name of the corruption that it was given; None for none.
        intensity: of that corruption, 0 to 1.
        seed: of that corruption.
        seen: what the models see.
        drawn: whether the corruption was drawn and not named.
        version: of what the visitor has before him; 0 for none.
    """

    picture: Image.Image
    sample: Sample | None
    seen: Image.Image
    degradation: str | None = None
    intensity: float = 0.0
    seed: int = 0
    drawn: bool = False
    version: int = 0

    @property
    def clean(self) -> Image.Image | None:
        """The clean picture; None where what the models see is all that is known."""
        return self.picture if self.degradation is not None else None

    @property
    def title(self) -> str:
        """What was done to it, in words."""
        if self.degradation is None:
            return "as it is"
        word = next(
            (w for w, value in SEVERITIES.items() if value == self.intensity), f"{self.intensity:.2f}"
        )
        return f"{self.degradation.replace('_', ' ')}, {word}{' (drawn)' if self.drawn else ''}"


def degraded(
    picture: Image.Image,
    sample: Sample | None,
    name: str,
    severity: Literal["low", "mid", "high"] | float,
    seed: int,
) -> Subject:
    """A picture with a corruption.

    Args:
        picture: as it was chosen.
        sample: the sample that it is, if it is one.
        name: one of the sixteen, `RANDOM` or `AS_IT_IS`.
        severity: one of the three levels, or a number from 0 to 1.
        seed: of the corruption.

    Raises:
        ClearValueError, UnknownNameError: as `degrade`.
    """
    if name == AS_IT_IS:
        return Subject(picture, sample, picture)
    intensity = intensity_of(severity)
    drawn = name == RANDOM
    if drawn:
        name = draw(seed)
    seen = degrade(picture, name, severity=intensity, seed=seed)
    return Subject(picture, sample, seen, name, intensity, seed, drawn)


def read_upload(path: str | Path, max_side: int) -> Image.Image:
    """Reads an uploaded file and deletes it.

    Args:
        path: of the file, and of nothing else: it is gone afterwards, read or not.
        max_side: a picture with a longer side is scaled down to it, in pixels.

    Returns:
        A new RGB image, upright.

    Raises:
        ImageError: it is no picture, a damaged one, or one above the bounds.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_UPLOAD:
            raise ImageError(
                f"This file has more than {MAX_UPLOAD // 2**20} MB. Save the picture smaller first."
            )
        data = file.read_bytes()
    except OSError as error:
        raise ImageError(
            "The upload is not here: it did not arrive, or was deleted because another visitor sent the same file. "
            f"Upload it again. ({error.strerror})"
        ) from error
    finally:
        file.unlink(missing_ok=True)
    _check_pixels(data)
    picture = load_image(data)
    if max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return picture


def _check_pixels(data: bytes) -> None:
    """Refuses a picture by what its head says, before anything is unpacked."""
    try:
        Image.init()
        with Image.open(io.BytesIO(data), formats=[f for f in _FORMATS if f in Image.OPEN]) as opened:
            width, height = opened.size
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"This picture is far too large. At most {MAX_PIXELS // 10**6} megapixels."
        ) from error
    except Exception as error:  # decoders raise anything
        raise ImageError(
            "This file is no picture that can be read: it is of another kind, whatever its name says, or its beginning is "
            "damaged. JPEG, PNG and WebP are good choices."
        ) from error
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"This picture has {width * height / 1e6:.0f} megapixels ({width} x {height}), and at most "
            f"{MAX_PIXELS // 10**6} are taken. Scale it down first."
        )


def data_url(image: Image.Image) -> str:
    """A picture as text that a page can show: nothing is written to a disk, and nothing stays behind.

    It is made once a picture and kept in its `info`, since a page is drawn anew many times a second.
    """
    if _URL not in image.info:
        small = image.width * image.height <= _LOSSLESS
        image.info[_URL] = images.data_url(
            image, "WEBP", lossless=small, quality=60 if small else 88, method=2
        )
    return str(image.info[_URL])
