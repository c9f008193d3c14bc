"""Scores of one adapter, read from result files: with N and interval, beside the base under the same conditions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, NoReturn

from clear_adapters.errors import ClearValueError
from clear_adapters.results import (
    ResultFile,
    bootstrap_interval,
    mean_of_seeds_interval,
    proportion_interval,
    read_result,
    strata_interval,
)

DEGRADED_WORLD = "clear-adapters/degraded-world"
"""The name of the miniature benchmark's set in the forms that want one of a dataset."""

MMD_BENCH = "clear-adapters/mmd-bench"
"""Beginning of the names of MMD-Bench's sets in the same forms; the benchmark's own name follows."""

ALWAYS, NEVER = "this adapter, always restoring", "this adapter, never restoring"

COUNTED = {"accuracy": "right answers", "score": "score"}
"""What is counted, in words, by metric."""

CONDITIONS = ("clean", "low", "mid", "high")
"""Of pictures, in the order of tables and figures."""

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
        metric: `accuracy`, or `score` where there are marks of a judge.
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
    metric: str
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


def read_scores(path: str | Path, digest: str) -> tuple[Scores, ...]:
    """What a result file says about the adapter with a digest, by benchmark.

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


def _refuse(file: str, digest: str, measured: Sequence[Mapping[str, Any]]) -> NoReturn:
    names = sorted({f"{a['name']} ({a['digest']})" for a in measured})
    raise ClearValueError(
        f"the result file {file!r} has no score of this adapter, whose digest is {digest}: it measured "
        f"{', '.join(names) or 'none'}. Scores of other weights are not shown; measure this one"
    )


def _degraded_world(result: ResultFile, file: str, sha256: str, digest: str) -> tuple[Scores, ...]:
    cells: list[Mapping[str, Any]] = list(result.payload["cells"].values())
    mine = [c for c in cells if (c.get("adapter") or {}).get("digest") == digest]
    if not mine:
        _refuse(file, digest, [c["adapter"] for c in cells if c.get("adapter")])
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

    for condition in CONDITIONS:
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
    shown = Scores(
        f"{result.payload['set']['n']:,} held-out questions about scenes of the miniature world, whose pictures are "
        "clean, or corrupted at one of three severities by one of the sixteen corruptions of MMD-Bench",
        DEGRADED_WORLD,
        "accuracy",
        *(file, sha256, result.device, result.date, result.commit),
        tuple(scores),
        tuple(differences),
    )
    return (shown,)


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


_SYSTEMS = {
    "base": "the base alone",
    "warned": "the base alone, warned of degradation",
    "classical": "the base alone, after a classical restorer",
    "ceiling": "the base alone, on the clean pictures",
    "clear": "this adapter",
    "never": NEVER,
    "always": ALWAYS,
    "swap": "this adapter, reading the degraded picture's latent in place of its own",
    "clean-latent": _MODES["clean"],
}
"""Systems of MMD-Bench, in the order of tables."""

_OWN = "clear"
_DECIDING = (_OWN, "swap")
_OVER = ((_OWN, "base"), ("always", "never"))
_MACRO, _REAL = "macro16", "real"
_PICTURES = {
    "clean": "clean",
    "low, mid, high": "with one corruption drawn (low, mid, high)",
    _MACRO: "with each of the sixteen at high (macro16)",
    _REAL: "distorted already (real)",
}
"""What the conditions of MMD-Bench are, in words short enough for one line of a card."""


def _mmd_bench(result: ResultFile, file: str, sha256: str, digest: str) -> tuple[Scores, ...]:
    """The mean over the benchmarks where there are several, then each of them."""
    payload = result.payload
    adapter = payload["adapter"]
    if adapter is None or adapter["digest"] != digest:
        _refuse(file, digest, [] if adapter is None else [adapter])
    mixed, macro = (payload["protocols"].get(name, {}) for name in ("mixed", _MACRO))
    # By system and condition, what was scored there: an entry a benchmark, and `mean`.
    entries: dict[tuple[str, str], Mapping[str, Any]] = {
        (system, condition): found for system in mixed for condition, found in mixed[system].items()
    }
    entries |= {(system, _MACRO): found for system, found in macro.items()}
    if not any(system == _OWN for system, _ in entries):
        raise ClearValueError(
            f"the result file {file!r} did not let the adapter decide for itself: measure the system {_OWN!r} too"
        )
    asked = list(dict.fromkeys(c["task"] for c in payload["cells"].values()))
    if not all(re.fullmatch("[a-z0-9]+", task) for task in asked):
        raise ClearValueError(
            f"the result file {file!r} names benchmarks {asked}: none of MMD-Bench is called so"
        )
    marked = {c["task"] for c in payload["cells"].values() if "score" in c["metrics"]}
    rotated = {c["task"] for c in payload["cells"].values() if "rotations" in c["metrics"]}
    means = [set(found["mean"]["tasks"]) for (_, condition), found in entries.items() if condition != _REAL]
    whole = [t for t in asked if any(t in tasks for tasks in means)]
    groups = [*([whole] if len(whole) > 1 else []), *([t] for t in asked)]

    def shown(tasks: Sequence[str]) -> Scores:
        scores, differences = [], []
        there = {condition for (_, condition), found in entries.items() if _of(found, tasks)}
        places = [c for c in (*CONDITIONS, _MACRO, _REAL) if c in there]
        for condition in places:
            for system, title in _SYSTEMS.items():
                found = entries.get((system, condition), {})
                entry = _of(found, tasks)
                if entry is not None:
                    right = Interval(*(entry[k] / 100 for k in ("value", "low", "high")))
                    parts = [found[t] for t in tasks] if system in _DECIDING else []
                    restored = _rate(entry, parts) if parts else None
                    scores.append(
                        Score(title, condition, index(entry["n"]), 1, right, restored, system == _OWN)
                    )
            for one, other in _OVER:
                cells = [[payload["cells"].get(f"{t}/{condition}/{s}") for t in tasks] for s in (one, other)]
                less = _paired(*cells)
                if less is not None:
                    differences.append(Difference(_SYSTEMS[one], _SYSTEMS[other], condition, less))
        of_judge = bool(marked & set(tasks))
        pictures = [words for names, words in _PICTURES.items() if set(names.split(", ")) & set(places)]
        told = [
            f"mean over {', '.join(tasks)}" if len(tasks) > 1 else tasks[0],
            f"pictures {', '.join(pictures)}",
        ]
        if rotated.issuperset(tasks):
            told.append("right where all rotations of a question are")
        if of_judge and payload["judge"]:
            told.append(f"with marks of the judge {payload['judge']['model']}")
        return Scores(
            f"MMD-Bench, {'; '.join(told)}",
            "-".join([MMD_BENCH, *(["mean"] if len(tasks) > 1 else []), *tasks]),
            "score" if of_judge else "accuracy",
            *(file, sha256, result.device, result.date, result.commit),
            tuple(scores),
            tuple(differences),
        )

    return tuple(shown(tasks) for tasks in groups)


def _of(found: Mapping[str, Any], tasks: Sequence[str]) -> Mapping[str, Any] | None:
    """The entry of a benchmark, or that of the mean over several; None where it is over others."""
    if len(tasks) == 1:
        single: Mapping[str, Any] | None = found.get(tasks[0])
        return single
    mean: Mapping[str, Any] | None = found.get("mean")
    return mean if mean is not None and set(mean["tasks"]) == set(tasks) else None


def _rate(entry: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> Interval | None:
    """A restore rate; its interval is that of as many pictures as questions count, so never too narrow."""
    value = entry["restored"]
    if value is None or any(p["restored"] is None for p in parts):
        return None
    hits = [(round(p["restored"] * p["n"]), p["n"]) for p in parts]
    if len(hits) == 1:
        low, high = proportion_interval(*hits[0])
    else:
        low, high = strata_interval([[1.0] * k + [0.0] * (n - k) for k, n in hits])
    return Interval(value, min(low, value), max(high, value))


def _paired(one: Sequence[Any], other: Sequence[Any]) -> Interval | None:
    """The mean over benchmarks of first minus second, question by question; None where they have not the same ones."""
    strata = []
    for first, second in zip(one, other, strict=True):
        if first is None or second is None or first["units"] != second["units"]:
            return None
        strata.append([float(a) - float(b) for a, b in zip(first["values"], second["values"], strict=True)])
    return Interval(sum(sum(s) / len(s) for s in strata) / len(strata), *strata_interval(strata))


_READERS: dict[str, Callable[[ResultFile, str, str, str], tuple[Scores, ...]]] = {
    "degraded_world": _degraded_world,
    "mmd_bench": _mmd_bench,
}
"""From a result file's kind to what reads it."""
