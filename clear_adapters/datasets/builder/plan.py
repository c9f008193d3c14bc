"""The settings that decide what a build contains, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from clear_adapters.degradations import SEVERITIES
from clear_adapters.degradations.catalogue import Weights, generator
from clear_adapters.degradations.corruption import Formulas
from clear_adapters.errors import ClearValueError
from clear_adapters.scoring import KINDS, Kind

Pathway = Literal["severity", "backbone", "teacher"]
Writer = Literal["template", "teacher"]

FILES: dict[str, str] = {"train": "data.jsonl", "rl": "rl.jsonl", "heldout": "heldout.jsonl"}
"""The file of each split. The training split has the name that a data folder's file has."""

LEVELS = ("clean", *SEVERITIES)


@dataclass(frozen=True)
class Plan:
    """What decides the contents of a build.

    Attributes:
        seed: of everything random.
        limit: rows that are sampled; None is all.
        splits: share of each split.
        severities: how often each level is drawn; `clean` leaves the picture as it is. The released code draws
            0.2 / 0.3 / 0.5 at 0.23 / 0.45 / 0.90.
        weights: how often each corruption is drawn; the released code's training weights.
        formulas: of the corruptions.
        min_side: pictures with a shorter side are left out, in pixels; 64 in the released code.
        max_aspect: pictures with a larger ratio of their sides are left out; 5 in the released code.
        any_language: keep texts with Chinese characters, which the released code drops.
        max_side: longest side in pixels; larger pictures are scaled down before they are degraded. None keeps them.
        near: pictures whose 63-bit hashes differ in at most so many bits are one for the splits.
        pathway: who decides whether a row restores: `severity` (restore_from and above), `backbone` (the paper: the base
            model answers the degraded picture; right is direct, wrong restores), `teacher` (the released code).
        restore_from: lowest level that restores, for `severity`.
        restore_share: share of rows that restore after balancing, 0.5 in the paper (1 to 1); None keeps what there is.
        writer: who writes traces.
        match: how an answer is compared with the truth, of `scoring.KINDS`.
        tries: how often a teacher is asked for one trace; 3 in the paper.
        psnr_side: longest side in pixels at which the PSNR is taken.

    Raises:
        ClearValueError: a value out of its range, or two that do not go together.
    """

    seed: int = 0
    limit: int | None = None
    splits: Mapping[str, float] = field(default_factory=lambda: {"train": 0.8, "rl": 0.1, "heldout": 0.1})
    severities: Mapping[str, float] = field(
        default_factory=lambda: {"clean": 0.0, "low": 0.2, "mid": 0.3, "high": 0.5}
    )
    weights: Weights = "training"
    formulas: Formulas = "legacy"
    min_side: int = 64
    max_aspect: float = 5.0
    any_language: bool = False
    max_side: int | None = None
    near: int = 8
    pathway: Pathway = "severity"
    restore_from: str = "mid"
    restore_share: float | None = 0.5
    writer: Writer = "template"
    match: Kind = "auto"
    tries: int = 3
    psnr_side: int = 512

    def __post_init__(self) -> None:
        generator(self.seed, "draw")  # checks the seed
        for name, low, high in (
            ("limit", 1, 10**9),
            ("min_side", 1, 30_000),
            ("max_aspect", 1, 200),
            ("max_side", 16, 30_000),
            ("near", 0, 30),
            ("tries", 1, 10),
            ("psnr_side", 16, 30_000),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ClearValueError(f"{name}={value!r}: must be from {low} to {high}")
        for name, keys in (("splits", FILES), ("severities", LEVELS)):
            shares = getattr(self, name)
            unknown = set(shares) - set(keys)
            if unknown or not abs(sum(shares.values()) - 1) <= 1e-6 or min(shares.values()) < 0:
                raise ClearValueError(
                    f"{name}={dict(shares)!r}: shares of {', '.join(keys)} that are not negative and sum to 1"
                )
        for name, values in (
            ("weights", get_args(Weights)),
            ("formulas", get_args(Formulas)),
            ("pathway", get_args(Pathway)),
            ("writer", get_args(Writer)),
            ("match", KINDS),
            ("restore_from", LEVELS),
        ):
            if getattr(self, name) not in values:
                raise ClearValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(values)}")
        if self.restore_share is not None and not 0 <= self.restore_share <= 1:
            raise ClearValueError(f"restore_share={self.restore_share!r}: a share from 0 to 1")
        if self.match == "option":
            raise ClearValueError("match='option': options are compared as such wherever a row has them")

    def restores(self, severity: str) -> bool:
        """Whether a level restores by the rule `severity`; an empty word is a clean picture."""
        return LEVELS.index(severity or "clean") >= LEVELS.index(self.restore_from)
