"""Pictures as callers give them, turned into upright 8-bit RGB Pillow images.

This is the one door: whatever a caller hands over (a path, bytes, an array, an image of any mode) is checked and
converted here, so that no other module asks what a picture is. Colour profiles are not applied.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from clear_adapters.errors import ClearTypeError, ClearValueError, ImageError

ImageLike: TypeAlias = "Image.Image | str | Path | bytes | bytearray | np.ndarray[Any, Any]"
"""What `load_image` accepts."""

_Found = TypeVar("_Found")

MAX_PIXELS = 178_956_970
"""Largest picture in pixels: the size at which Pillow itself suspects a decompression bomb."""
MAX_SIDE = 30_000
"""Longest side in pixels."""
MAX_ASPECT = 200
"""Largest ratio of the longer to the shorter side: no backbone can resize anything thinner to its grid."""

_DECODING_ERRORS = (
    AssertionError,
    AttributeError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise, by format, for damaged data and for a file that was closed under an image."""

_STARTING_PROGRAMS = ("EPS",)
"""Formats for which Pillow starts another program (Ghostscript) on the bytes that it was given."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(image: ImageLike) -> Image.Image:
    """Turn one picture in any accepted form into a new RGB image, upright and 8 bit.

    Args:
        image: A Pillow image of any mode, a path, the bytes of an image file, or a uint8 array of shape (H, W) grey,
            (H, W, 3) RGB or (H, W, 4) RGBA.

    Returns:
        A new image of mode RGB without metadata, which shares no memory with the input. EXIF orientation has been
        applied, transparency composited on white, 16-bit values scaled to 8 bit. Of an animation it is the first
        frame (of an open Pillow image, the frame it stands at). Loading the result again changes nothing.

    Raises:
        ImageError: The file is missing, is no image or is truncated; the picture is empty, absurdly large or thinner
            than 1 to 200; an array has the wrong type or shape; a list stands where one picture is expected.
        ClearTypeError: The value is nothing that can hold a picture.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image, f"the image of mode {image.mode}")
    if isinstance(image, str | Path | bytes | bytearray):
        data, source = _read(image)
        with _open(data, source) as opened:
            return _to_rgb(opened, source)
    if isinstance(image, np.ndarray):
        source = _check_array(image)
        _check_size(image.shape[1], image.shape[0], source)
        return _to_rgb(Image.fromarray(np.ascontiguousarray(image)), source)
    raise _refused(image)


def _refused(image: object) -> ImageError | ClearTypeError:
    if isinstance(image, list | tuple):
        return ImageError(
            f"A {type(image).__name__} of {len(image)} stands where one image is expected. "
            "Each question takes one image: pass the image itself, or a list of images with a list of questions."
        )
    return ClearTypeError(
        f"Not an image: {_named_type(image)}. Accepted are a PIL image, a path, the bytes of an image file, and a "
        "numpy array of shape (H, W, 3) and type uint8 (for a tensor (C, H, W) in [0, 1]: "
        "`(x.permute(1, 2, 0) * 255).round().byte().cpu().numpy()`)."
    )


def data_url(image: Image.Image, kind: str, **options: Any) -> str:
    """Return a picture as text that a page or a request can hold.

    Args:
        image: The picture.
        kind: Format of Pillow's that is a type of pictures too, such as `"JPEG"`.
        **options: Of that format, as `Image.save` takes them.
    """
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def image_size(image: ImageLike) -> tuple[int, int]:
    """(height, width) of what `load_image` makes of a picture, without decoding it: of a file only the head is looked at.

    A PNG that is to be turned, and says so behind its pixels, is measured as it lies.

    Raises:
        ImageError: As for `load_image`, but for what shows in decoding alone.
        ClearTypeError: As for `load_image`.
    """
    if isinstance(image, Image.Image):
        return _upright_size(image, f"the image of mode {image.mode}")
    if isinstance(image, np.ndarray):
        source = _check_array(image)
        return _check_size(image.shape[1], image.shape[0], source)
    if isinstance(image, str | Path | bytes | bytearray):
        data, source = _read(image)
        with _open(data, source) as opened:
            return _upright_size(opened, source)
    raise _refused(image)


class Pictures:
    """One picture for each of several rows, decoded when it is their turn.

    Neighbours that have the same object share what it is decoded to.
    """

    def __init__(self, images: Sequence[ImageLike], name: str | None = None) -> None:
        """Takes them as they are.

        Args:
            images: One for each row, in any form `load_image` accepts.
            name: What messages call the list; None is a picture that was given alone.
        """
        self._images = images
        self._name = name
        self._last: tuple[ImageLike, Image.Image] | None = None

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each, see `image_size`: this is how all are checked before the first is decoded.

        Raises:
            ImageError: One cannot be loaded, as far as that shows without decoding; its place is named.
            ClearTypeError: One is nothing that can hold a picture.
        """
        found: list[tuple[int, int]] = []
        for place, image in enumerate(self._images):
            same = place > 0 and image is self._images[place - 1]
            found.append(found[-1] if same else self._named(place, image_size))
        return found

    def load(self, start: int = 0, stop: int | None = None) -> list[Image.Image]:
        """Those of some rows, as `load_image` gives them.

        Raises:
            ImageError: One cannot be loaded; its place is named.
            ClearTypeError: One is nothing that can hold a picture.
        """
        loaded = []
        for place, image in list(enumerate(self._images))[start:stop]:
            if self._last is None or self._last[0] is not image:
                self._last = None  # room for the next
                self._last = (image, self._named(place, load_image))
            loaded.append(self._last[1])
        return loaded

    def _named(self, place: int, what: Callable[[ImageLike], _Found]) -> _Found:
        try:
            return what(self._images[place])
        except (ImageError, ClearTypeError) as error:
            if self._name is None:
                raise
            raise type(error)(f"{self._name}[{place}]: {error}") from error


def pair_images(
    images: ImageLike | Sequence[ImageLike], questions: str | Sequence[str]
) -> tuple[Pictures, list[str], bool]:
    """Pair pictures with questions as `load_images` does, and decode none of them yet.

    Returns:
        The pictures and the questions, equally long, and whether the caller gave one of each.

    Raises:
        ImageError: The list is empty, or several images are given for one question.
        ClearValueError: The lists differ in length, or a question is empty.
        ClearTypeError: A question is no string.
    """
    asked = _checked_questions(questions)
    several_asked = not isinstance(questions, str)
    if not isinstance(images, list | tuple):
        # A Sequence that is neither is refused where it is loaded.
        return Pictures([images] * len(asked)), asked, not several_asked  # type: ignore[list-item]
    if not images:
        raise ImageError(
            "The list of images is empty: there is nothing to ask about. Pass at least one image."
        )
    for place, image in enumerate(images):
        if isinstance(image, list | tuple):
            raise ImageError(
                f"images[{place}] is a {type(image).__name__} of {len(image)}: several images for one question are not "
                "supported. Pass one image a question."
            )
    if not several_asked:
        raise ImageError(
            f"{len(images)} images in a list came with a single question. Several images for one question are not "
            "supported; to ask the same of each image pass `[question] * len(images)`, and for one image drop the list."
        )
    if len(images) != len(asked):
        raise ClearValueError(
            f"{len(images)} images came with {len(asked)} questions; they are paired one to one. "
            "Pass equally long lists, or one image with a list of questions about it."
        )
    return Pictures(images, "images"), asked, False


def load_images(
    images: ImageLike | Sequence[ImageLike], questions: str | Sequence[str]
) -> tuple[list[Image.Image], list[str], bool]:
    """Pair pictures with questions, one picture a question.

    One image with a list of questions asks each of them about that image, and is loaded once for all. A list of images with
    a single question is refused, because it may as well mean one question about several images, which no backbone takes yet.

    Args:
        images: One image in any form `load_image` accepts, or a list of them.
        questions: One question, or a list of them.

    Returns:
        The loaded images and the questions, equally long, and whether the caller gave one of each (and so expects one
        reply, not a list).

    Raises:
        ImageError: An image cannot be loaded (its place in the list is named), the list is empty, or several images
            are given for one question.
        ClearValueError: The lists differ in length, or a question is empty.
        ClearTypeError: A question is no string, or an image is nothing that can hold a picture.
    """
    pictures, asked, single = pair_images(images, questions)
    return pictures.load(), asked, single


def _checked_questions(questions: str | Sequence[str]) -> list[str]:
    single = isinstance(questions, str)
    if not single and not isinstance(questions, list | tuple):
        raise ClearTypeError(
            f"A question must be a string, not {_named_type(questions)}. Pass one string or a list of strings."
        )
    asked = [questions] if isinstance(questions, str) else list(questions)
    if not asked:
        raise ClearValueError("The list of questions is empty. Pass one question an image.")
    for place, question in enumerate(asked):
        name = "The question" if single else f"questions[{place}]"
        if not isinstance(question, str):
            raise ClearTypeError(f"{name} must be a string, not {_named_type(question)}.")
        if not question.strip():
            raise ClearValueError(
                f"{name} is {'blank' if question else 'empty'}: the model would have nothing to answer."
            )
    return asked


def _read(image: str | Path | bytes | bytearray) -> tuple[bytes, str]:
    """The bytes of an image file, and what messages call it."""
    if isinstance(image, str | Path):
        return _read_file(image)
    return bytes(image), f"the {len(image)} bytes given"


def _read_file(path: str | Path) -> tuple[bytes, str]:
    text = str(path)
    shown = repr(text if len(text) <= 200 else text[:197] + "...")
    if "://" in text[:12] or text.startswith("data:"):
        raise ImageError(
            f"{shown} is an address, not a file. Nothing is downloaded here: fetch it and pass its bytes."
        )
    try:
        file = Path(path).expanduser()
        if file.is_dir():
            raise ImageError(f"{shown} is a folder, not an image file.")
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(
            f"No image file at {shown} (looked from {str(Path.cwd())!r}). Check the path."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"The image file {shown} cannot be read: {reason}.") from error
    return data, shown


def _formats() -> list[str]:
    """Every format that Pillow decodes itself."""
    Image.init()
    return [name for name in Image.ID if name not in _STARTING_PROGRAMS]


def _open(data: bytes, source: str) -> Image.Image:
    """The picture in a file, not decoded yet."""
    if not data:
        raise ImageError(f"No image in {source}: it is empty (0 bytes).")
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{source} holds more than {MAX_PIXELS:,} pixels. Scale it down first. ({error})"
        ) from error
    except _DECODING_ERRORS as error:
        raise ImageError(
            f"No image in {source}: Pillow cannot tell the format of these {len(data)} bytes. It is another kind of "
            "file, or its head is damaged."
        ) from error


def _check_array(array: np.ndarray[Any, Any]) -> str:
    """What messages call an array that has the type and shape of a picture."""
    source = f"the array of shape {array.shape} and type {array.dtype}"
    accepted = "Accepted are uint8 arrays of shape (H, W), (H, W, 3) and (H, W, 4)."
    if array.dtype != np.uint8:
        hint = (
            " For values in [0, 1] pass `(array * 255).round().astype(np.uint8)`."
            if array.dtype.kind == "f"
            else ""
        )
        raise ImageError(f"{source} has the wrong type: its scale cannot be told. {accepted}{hint}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        if array.ndim == 4:
            hint = " A batch goes in as a list of arrays: `list(array)`."
        elif array.ndim == 3 and array.shape[2] == 1:
            hint = " For grey drop the last axis: `array[..., 0]`."
        elif array.ndim == 3 and array.shape[0] in (3, 4):
            hint = " Channels come last: `array.transpose(1, 2, 0)`."
        else:
            hint = ""
        raise ImageError(f"{source} has the wrong shape. {accepted}{hint}")
    return source


def _to_rgb(image: Image.Image, source: str) -> Image.Image:
    _check_size(*image.size, source)
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{source} unpacks to more than {MAX_PIXELS:,} pixels. Scale it down first."
        ) from error
    except _DECODING_ERRORS as error:
        raise ImageError(
            f"{source} cannot be decoded: it is truncated, damaged or closed ({error})."
        ) from error
    _check_size(*image.size, source)  # some formats (ICO) know their true size only now
    turn = _UPRIGHT.get(_orientation(image))
    try:
        flat = _flatten(image, source)
    except (ValueError, OSError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(
            f"{source} has mode {image.mode}, which cannot be turned into RGB ({error})."
        ) from error
    if turn is not None:
        flat = flat.transpose(turn)
    flat.info = {}  # an orientation left here would be applied again by the next load
    return flat


def _upright_size(image: Image.Image, source: str) -> tuple[int, int]:
    height, width = _check_size(*image.size, source)
    # Pillow decodes a PNG to look for an orientation behind its pixels.
    told = image.format != "PNG" or "exif" in image.info
    return (width, height) if told and _orientation(image) >= 5 else (height, width)


def _check_size(width: int, height: int, source: str) -> tuple[int, int]:
    """(height, width) of a picture that can be taken."""
    if width < 1 or height < 1:
        raise ImageError(f"{source} is empty: {width} x {height} pixels.")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{source} is too large: {width} x {height} pixels, where at most {MAX_PIXELS:,} in all and {MAX_SIDE:,} a "
            "side are accepted. Scale it down first."
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{source} is too thin: {width} x {height} pixels, a ratio above {MAX_ASPECT} to 1, which no backbone can "
            "resize to its grid. Crop or pad it first."
        )
    return height, width


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none or the block is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODING_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _flatten(image: Image.Image, source: str) -> Image.Image:
    """Return a new RGB image: deep modes scaled to 8 bit, transparency composited on white."""
    if image.mode.startswith("I;16"):
        return _from_depth(np.asarray(image), 65535.0)
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        return _from_depth(values, _full_scale(values, source))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _full_scale(values: np.ndarray[Any, Any], source: str) -> float:
    """Tell which value of a 32-bit image is white.

    Pillow's modes I and F do not say: 8-bit values stand in them as often as 16-bit ones, and F may hold 0 to 1. The
    smallest of these ranges that holds every value is taken.
    """
    low, high = float(values.min()), float(values.max())
    for scale in (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0):
        if low >= 0 and high <= scale:
            return scale
    raise ImageError(
        f"{source} holds values from {low:g} to {high:g}, so which of them is white cannot be told. Scale them to "
        "0..255 first."
    )


def _from_depth(values: np.ndarray[Any, Any], scale: float) -> Image.Image:
    eight = np.rint(values.astype(np.float64) * (255.0 / scale)).astype(np.uint8)
    return Image.fromarray(eight).convert("RGB")


def _named_type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
