"""One picture: whether it is taken, its hashes, and its degraded version, all of which follow from its pixels and the seed.

Clean pictures are kept as the files they are (JPEG, PNG, WebP; others become PNG). What the released code does differently
(METHOD of the released data pipeline): it draws without a seed, and a picture that fails is logged and left out; here it is
in the list of rejects.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from clear_adapters.datasets.builder.plan import Plan
from clear_adapters.datasets.builder.rows import Picture
from clear_adapters.datasets.duplicates import content_hash, perceptual_hash
from clear_adapters.datasets.example import decibels, psnr
from clear_adapters.degradations import SEVERITIES, degrade, draw
from clear_adapters.errors import ClearError, ClearValueError
from clear_adapters.images import load_image

QUALITY = 95
"""JPEG quality of degraded pictures: OpenCV's default, which the authors' generators use."""

_ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}


@dataclass(frozen=True)
class PictureJob:
    """One picture to be made.

    Attributes:
        picture: where it lies.
        folder: of the build.
        plan: how.
    """

    picture: Picture
    folder: Path
    plan: Plan


def make_picture(job: PictureJob) -> dict[str, Any]:
    """Checks, hashes and degrades a picture.

    Returns:
        Its record: `source`, and either `rejected` with a `detail`, or the paths of both pictures below the folder, `content`
        (hash of the pixels), `hash` (of `perceptual_hash`), `size` (width, height), and, where it was degraded,
        `degradation`, `severity`, `intensity`, `seed`; `psnr` in dB.
    """
    plan, record = job.plan, {"source": job.picture.name}
    try:
        data = job.picture.read()
        image = load_image(data)
    except (ClearValueError, OSError) as error:
        return {**record, "rejected": "unreadable picture", "detail": str(error)}
    width, height = image.size
    if min(image.size) < plan.min_side:
        detail = f"{width} x {height} pixels, where the shorter side must have {plan.min_side}"
        return {**record, "rejected": "small picture", "detail": detail}
    if max(image.size) > plan.max_aspect * min(image.size):
        detail = f"{width} x {height} pixels, a ratio above {plan.max_aspect:g}"
        return {**record, "rejected": "narrow picture", "detail": detail}
    if plan.max_side is not None and max(image.size) > plan.max_side:
        scale = plan.max_side / max(image.size)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        data = _jpeg(image.resize(size, Image.Resampling.LANCZOS))
        image = load_image(data)
    content = content_hash(image)
    made: dict[str, Any] = {
        "content": content,
        "hash": f"{perceptual_hash(image):016x}",
        "size": list(image.size),
        "clean_image": _save(job.folder, *_clean_file(data, image)),
    }
    drawn = random.Random(f"{plan.seed}/picture/{content}")
    severity = drawn.choices(list(plan.severities), list(plan.severities.values()))[0]
    seed = drawn.getrandbits(31)
    if severity == "clean":
        return {**record, **made, "image": made["clean_image"], "psnr": decibels(0)}
    name = draw(seed, plan.weights)
    facts = {
        "degradation": name,
        "severity": severity,
        "intensity": SEVERITIES[severity],
        "seed": seed,
    }
    try:
        poor = degrade(image, name, severity=SEVERITIES[severity], seed=seed, formulas=plan.formulas)
    except ClearError as error:
        return {**record, **facts, "rejected": "cannot be degraded", "detail": f"{name}: {error}"}
    if poor.tobytes() == image.tobytes():
        detail = f"{name} at {severity} changes no pixel of it"
        return {**record, **facts, "rejected": "unchanged by its degradation", "detail": detail}
    facts["psnr"] = round(psnr(image, poor, plan.psnr_side), 2)
    return {**record, **made, **facts, "image": _save(job.folder, _jpeg(poor), ".jpg")}


def _clean_file(data: bytes, image: Image.Image) -> tuple[bytes, str]:
    """The file as it is where any reader can open it, else the pixels as PNG."""
    with Image.open(io.BytesIO(data)) as opened:
        ending = _ENDINGS.get(opened.format or "")
    if ending is not None:
        return data, ending
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), ".png"


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _save(folder: Path, data: bytes, ending: str) -> str:
    """Writes a file named by its contents, whole or not at all; gives its path below the folder."""
    name = hashlib.sha256(data).hexdigest()[:20]
    path = Path("images") / name[:2] / f"{name}{ending}"
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(target)
    return path.as_posix()
