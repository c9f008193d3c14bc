"""Scores of one adapter, read from result files: with N and interval, beside the base under the same conditions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clear_adapters.errors import ClearValueError
from clear_adapters.results import (
    ResultFile,
    bootstrap_interval,
    mean_of_seeds_interval,
    proportion_interval,
    read_result,
)

DEGRADED_WORLD = "clear-adapters/degraded-world"
"""The name of the miniature benchmark's set in the forms that want one of a dataset."""

ALWAYS, NEVER = "this adapter, always restoring", "this adapter, never restoring"

_CONDITIONS = ("clean", "low", "mid", "high")
_MODES = {
    "always": ALWAYS,
    "never": NEVER,
    "degraded": "this adapter, always restoring, reading the degraded picture's latent",
    "clean": "this adapter, always restoring, reading the true clean latent",
}


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval.

    Attributes:
        value: the number.
        low: lower bound.
        high: upper bound.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """The share of right answers of one system under one condition.

    Attributes:
        system: in words.
        condition: of the pictures.
        n: questions.
        seeds: training runs in it.
        right: share of right answers.
        restored: share of restored pictures; None where nothing is restored.
        own: whether it is this adapter, deciding for itself when to restore.
    """

    system: str
    condition: str
    n: int
    seeds: int
    right: Interval
    restored: Interval | None = None
    own: bool = False


@dataclass(frozen=True)
class Difference:
    """One system minus another, question by question.

    Attributes:
        first: the one.
        other: the other.
        condition: of the pictures.
        right: difference of the shares of right answers.
    """

    first: str
    other: str
    condition: str
    right: Interval


@dataclass(frozen=True)
class Scores:
    """What one result file says about an adapter.

    Attributes:
        benchmark: in words.
        dataset_id: by which the Hub's forms name it.
        file: name of the result file.
        sha256: of the result file.
        device: that it was measured on.
        date: when.
        commit: of the library.
        scores: in the order of tables.
        differences: in the order of tables.
    """

    benchmark: str
    dataset_id: str
    file: str
    sha256: str
    device: str
    date: str
    commit: str | None
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]

    @property
    def own(self) -> list[Score]:
        """Those of this adapter, deciding for itself."""
        return [s for s in self.scores if s.own]


def read_scores(path: str | Path, digest: str) -> Scores:
    """What a result file says about the adapter with a digest.

    Raises:
        ClearValueError: no result file, one of a kind that cards do not know, or one that measured other adapters.
    """
    path = Path(path)
    result = read_result(path)
    reader = _READERS.get(result.kind)
    if reader is None:
        raise ClearValueError(
            f"the result file {str(path)!r} is of kind {result.kind!r}; cards show {', '.join(sorted(_READERS))}"
        )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        return reader(result, path.name, sha256, digest)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ClearValueError(
            f"the result file {str(path)!r} is damaged ({type(error).__name__}: {error}): measure again"
        ) from error


def folder_digest(folder: Path) -> str:
    """By which result files of the degraded world name what they measured.

    An adapter's is `store.adapter_digest`. A model's is of all files of weights and settings, but of large ones their
    first and last MiB alone: result files recorded it so. What says how a model was made is none of them.
    """
    from clear_adapters.store import CONFIG, adapter_digest

    if (folder / CONFIG).is_file():
        return adapter_digest(folder)
    paths = [
        p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json") and p.name != "provenance.json"
    ]
    found = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        found.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            found.update(file.read(2**20))
            if size > 2**20:
                file.seek(max(2**20, size - 2**20))
                found.update(file.read())
    return found.hexdigest()[:16]


def _degraded_world(result: ResultFile, file: str, sha256: str, digest: str) -> Scores:
    cells: list[Mapping[str, Any]] = list(result.payload["cells"].values())
    mine = [c for c in cells if (c.get("adapter") or {}).get("digest") == digest]
    if not mine:
        names = sorted(
            {f"{c['adapter']['name']} ({c['adapter']['digest']})" for c in cells if c.get("adapter")}
        )
        raise ClearValueError(
            f"the result file {file!r} has no score of this adapter, whose digest is {digest}: it measured "
            f"{', '.join(names) or 'none'}. Scores of other weights are not shown; measure this one"
        )
    (family,) = {c["system"].partition("-")[0] for c in mine}
    run = mine[0]["run"]
    scores: list[Score] = []
    differences: list[Difference] = []

    def cell(system: str, condition: str, number: int = 0) -> Mapping[str, Any] | None:
        found = [c for c in cells if (c["system"], c["condition"], c["run"]) == (system, condition, number)]
        return found[0] if found else None

    def add(title: str, found: Mapping[str, Any] | None, own: bool = False) -> None:
        if found is not None:
            right, n = found["correct"], len(found["correct"])
            shown = "restored" in found and (own or ("always" not in title and "never" not in title))
            restored = _share(found["restored"]) if shown else None
            scores.append(Score(title, found["condition"], n, 1, _share(right), restored, own))

    def subtract(
        first: str, one: Mapping[str, Any] | None, other: str, two: Mapping[str, Any] | None
    ) -> None:
        if one is not None and two is not None:
            right = _difference(one["correct"], two["correct"])
            differences.append(Difference(first, other, one["condition"], right))

    for condition in _CONDITIONS:
        own, base, direct = (
            cell(family, condition, run),
            cell("base", condition),
            cell("direct", condition, run),
        )
        add("the base alone", base)
        add("direct LoRA, as many samples and steps as the three stages", direct)
        add("this adapter", own, own=True)
        every = [c for c in cells if (c["system"], c["condition"]) == (family, condition)]
        if len(every) > 1:
            right = _mean([c["correct"] for c in every])
            restored = _mean([c["restored"] for c in every])
            n = len(every[0]["correct"])
            scores.append(Score("runs of this recipe, mean", condition, n, len(every), right, restored))
        for other, title in ((base, "the base alone"), (direct, "direct LoRA")):
            subtract("this adapter", own, title, other)
        for mode, title in _MODES.items():
            add(title, cell(f"{family}-{mode}", condition, run))
        always, never = (cell(f"{family}-{mode}", condition, run) for mode in ("always", "never"))
        subtract(ALWAYS, always, NEVER, never)
    return Scores(
        f"{result.payload['set']['n']:,} held-out questions about scenes of the miniature world, whose pictures are "
        "clean, or corrupted at one of three severities by one of the sixteen corruptions of MMD-Bench",
        DEGRADED_WORLD,
        *(file, sha256, result.device, result.date, result.commit),
        tuple(scores),
        tuple(differences),
    )


def _bits(text: str) -> list[float]:
    return [float(b) for b in text]


def _share(bits: str) -> Interval:
    right, n = bits.count("1"), len(bits)
    return Interval(right / n, *proportion_interval(right, n))


def _mean(rows: Sequence[str]) -> Interval:
    values = [_bits(r) for r in rows]
    return Interval(sum(map(sum, values)) / sum(map(len, values)), *mean_of_seeds_interval(values))


def _difference(own: str, other: str) -> Interval:
    values = [a - b for a, b in zip(_bits(own), _bits(other), strict=True)]
    return Interval(sum(values) / len(values), *bootstrap_interval(values))


_READERS: dict[str, Callable[[ResultFile, str, str, str], Scores]] = {"degraded_world": _degraded_world}
"""From a result file's kind to what reads it."""
