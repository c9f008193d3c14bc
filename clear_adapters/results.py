"""Result files: what was measured, with its provenance, and the intervals that go beside a score.

A result file is one JSON object with sorted keys. It says which version, commit, command, device and seeds made the
payload, so that no number in a card or a table has to be typed by hand.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from clear_adapters._version import __version__
from clear_adapters.errors import ClearTypeError, ClearValueError

SCHEMA_VERSION = 1
"""Raised when a reader of the old form would misread the new one."""

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "diffusers",
    "numpy",
    "pillow",
    "opencv-python-headless",
)
"""Distributions whose versions every result file records; one that is not installed is left out."""


def proportion_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    With `p = successes / n` and `z` the normal quantile of `(1 + confidence) / 2`, the bounds are
    `(p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)` (Wilson 1927, "Probable inference"). Unlike `p ± z·s` it
    stays within 0..1 and keeps a width at 0 of n and n of n.

    Args:
        successes: How many succeeded.
        n: How many there were.
        confidence: Between 0 and 1.

    Returns:
        The lower and the upper bound. Without observations nothing is known: (0, 1).

    Raises:
        ClearValueError: The counts are negative or contradict each other, or `confidence` is not within 0..1.
    """
    _check_settings(confidence)
    if not 0 <= successes <= n:
        raise ClearValueError(
            f"{successes} successes of {n} cannot be: they must lie between 0 and the number tried."
        )
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def bootstrap_interval(
    values: Sequence[float],
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
    statistic: Callable[[np.ndarray[Any, Any]], Any] = np.mean,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of independent values.

    Args:
        values: One number an observation.
        confidence: Between 0 and 1.
        samples: How many resamples are drawn.
        seed: The same seed gives the same interval.
        statistic: From an array of as many values to one number.

    Returns:
        The lower and the upper bound.

    Raises:
        ClearValueError: There are no values, one is not finite, or a setting is out of range.
    """
    _check_settings(confidence, samples)
    observed = _finite(values, "values", dimensions=1)
    random = np.random.default_rng(seed)
    drawn = [
        float(statistic(observed[random.integers(0, observed.size, observed.size)])) for _ in range(samples)
    ]
    return _percentiles(drawn, confidence)


@lru_cache(maxsize=4)
def _crossed_draws(
    seeds: int, questions: int, samples: int, seed: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """How often each seed, (samples, seeds), and each question, (samples, questions), is drawn: the same for all values."""
    random = np.random.default_rng(seed)
    of_questions = np.empty((samples, questions), dtype=np.uint16)
    of_seeds = np.empty((samples, seeds), dtype=np.uint16)
    for i in range(samples):
        of_questions[i] = np.bincount(random.integers(0, questions, questions), minlength=questions)
        of_seeds[i] = np.bincount(random.integers(0, seeds, seeds), minlength=seeds)
    return of_seeds, of_questions


def mean_of_seeds_interval(
    values: Sequence[Sequence[float]], confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean over several seeds that answered the same questions.

    Seeds and questions are crossed: every seed saw every question, so the cells are not independent. Each resample
    therefore draws questions with replacement and, separately, seeds with replacement, and takes the mean of the cells
    where they meet (the pigeonhole bootstrap, Owen 2007). The interval covers another draw of questions and another
    draw of seeds. With one seed it is `bootstrap_interval` over questions and says nothing about seeds; with two or
    three it is somewhat too narrow in that direction, since resampling k seeds shows only (k-1)/k of their variance.

    Args:
        values: One row a seed, one number a question in the same order, all rows equally long.
        confidence: Between 0 and 1.
        samples: How many resamples are drawn.
        seed: The same seed gives the same interval.

    Returns:
        The lower and the upper bound.

    Raises:
        ClearValueError: There are no values, rows differ in length, one is not finite, or a setting is out of range.
    """
    _check_settings(confidence, samples)
    lengths = {len(row) for row in values}
    if len(lengths) > 1:
        raise ClearValueError(
            f"The seeds have {sorted(lengths)} values: every seed must answer the same questions in the same order."
        )
    observed = _finite(values, "values", dimensions=2)
    seeds, questions = observed.shape
    # The mean of the drawn cells is a bilinear form in how often each seed and each question was drawn.
    drawn = [
        float(of_seeds @ observed @ of_questions) / (seeds * questions)
        for of_seeds, of_questions in zip(*_crossed_draws(seeds, questions, samples, seed), strict=True)
    ]
    return _percentiles(drawn, confidence)


def strata_interval(
    strata: Sequence[Sequence[float]], confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean over strata of the means within them; every stratum counts the same.

    Strata (benchmarks of a mean, sources of a benchmark) are fixed: each resample draws within each of them, as many
    values as it has (stratified percentile bootstrap, Efron and Tibshirani 1993, chapter 8).

    Args:
        strata: One list of values a stratum; they may differ in length.
        confidence: Between 0 and 1.
        samples: How many resamples are drawn.
        seed: The same seed gives the same interval.

    Returns:
        The lower and the upper bound. With one stratum it is `bootstrap_interval` of the mean, drawn otherwise.

    Raises:
        ClearValueError: There is no stratum or an empty one, a value is not finite, or a setting is out of range.
    """
    _check_settings(confidence, samples)
    if not strata:
        raise ClearValueError("There are no strata, so there is no mean: at least one is needed.")
    random = np.random.default_rng(seed)
    total = np.zeros(samples)
    for values in strata:
        observed = _finite(values, "values", dimensions=1)
        # A resample is told by how often each different value is drawn: far fewer numbers than values.
        distinct, counts = np.unique(observed, return_counts=True)
        drawn = random.multinomial(observed.size, counts / observed.size, size=samples)
        total += drawn @ distinct / observed.size
    return _percentiles((total / len(strata)).tolist(), confidence)


def _check_settings(confidence: float, samples: int = 1) -> None:
    if not 0 < confidence < 1:
        raise ClearValueError(f"A confidence must lie between 0 and 1, not {confidence}: write 95 % as 0.95.")
    if samples < 1:
        raise ClearValueError(f"A bootstrap needs at least one sample, not {samples}; 2000 is usual.")


def _finite(values: Any, name: str, *, dimensions: int) -> np.ndarray[Any, Any]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ClearValueError(f"{name} must be numbers ({error}).") from error
    if array.ndim != dimensions or array.size == 0:
        raise ClearValueError(
            f"{name} has shape {array.shape}: at least one value in {dimensions} dimension(s) is needed."
        )
    if not np.isfinite(array).all():
        raise ClearValueError(
            f"{name} holds {np.count_nonzero(~np.isfinite(array))} missing or infinite numbers: leave out what was not "
            "scored, and say how many that were."
        )
    return array


def _percentiles(drawn: list[float], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class ResultFile:
    """One measurement and how it was made. `collect` fills in everything but the measurement."""

    kind: str
    """What the payload is: `"mmd_bench"`, `"speed"`, ...; its writer decides the payload's keys."""
    payload: Mapping[str, Any]
    """The measurement: JSON values only, no NaN."""
    device: str
    """The device in words, as the caller tells it: `"NVIDIA H100 80GB, bfloat16"`."""
    command: str
    """The command line that made it."""
    date: str
    """When, as ISO 8601 in UTC."""
    commit: str | None
    """The git commit of the checkout it ran from; None for an installed package."""
    dirty: bool | None
    """Whether that checkout differed from the commit; None without a commit."""
    versions: Mapping[str, str]
    """Versions of Python and of the distributions in use."""
    seeds: Sequence[int] = ()
    """Every seed that the payload covers."""
    project_version: str = __version__
    """The version of this library that made it."""
    schema_version: int = SCHEMA_VERSION
    """The form of the file."""

    @classmethod
    def collect(
        cls,
        kind: str,
        payload: Mapping[str, Any],
        *,
        device: str,
        seeds: Sequence[int] = (),
        command: str | None = None,
        packages: Sequence[str] = (),
    ) -> ResultFile:
        """Make a result of the running process: date, versions and commit are looked up.

        Args:
            kind: What the payload is.
            payload: The measurement.
            device: The device in words.
            seeds: Every seed that the payload covers.
            command: The command line; None takes the running one, with the program's folder left out.
            packages: Distributions whose versions are recorded besides `PACKAGES`.

        Returns:
            The result, not yet written.
        """
        commit, dirty = git_state()
        return cls(
            kind=kind,
            payload=payload,
            device=device,
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if command is None else command,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=commit,
            dirty=dirty,
            versions=installed_versions(packages),
            seeds=tuple(seeds),
        )

    def write(self, path: str | Path) -> Path:
        """Write the file whole or not at all: it is written beside its place and then moved there.

        Args:
            path: Where; missing folders are made, an existing file is replaced.

        Returns:
            The path.

        Raises:
            ClearValueError: The payload holds NaN or infinity, for which JSON has no word.
            ClearTypeError: The payload holds something that is no JSON value.
        """
        try:
            text = json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
        except ValueError as error:
            raise ClearValueError(
                f"The {self.kind} result cannot be written: {error}. Put None where there is no number."
            ) from error
        except TypeError as error:
            raise ClearTypeError(
                f"The {self.kind} result cannot be written: {error}. Turn arrays and tensors into plain numbers first."
            ) from error
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path


_TYPES: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "payload": dict,
    "device": str,
    "command": str,
    "date": str,
    "commit": (str, type(None)),
    "dirty": (bool, type(None)),
    "versions": dict,
    "seeds": list,
    "project_version": str,
    "schema_version": int,
}


def read_result(path: str | Path) -> ResultFile:
    """Read and check a result file.

    Args:
        path: The file.

    Returns:
        What `ResultFile.write` wrote.

    Raises:
        ClearValueError: The file is missing or no JSON object, its schema version is another one, or a key is missing,
            unknown or of the wrong type.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ClearValueError(f"The result file {str(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ClearValueError(f"The result file {str(path)!r} is no JSON text: {error}.") from error
    if not isinstance(content, dict):
        raise ClearValueError(
            f"The result file {str(path)!r} holds a {type(content).__name__}, not an object."
        )
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        found = "none" if version is None else repr(version)
        raise ClearValueError(
            f"The result file {str(path)!r} has schema version {found}; this library reads {SCHEMA_VERSION}. "
            "Measure again, or read it with the version that wrote it."
        )
    names = {entry.name for entry in fields(ResultFile)}
    if missing := sorted(names - set(content)):
        raise ClearValueError(f"The result file {str(path)!r} lacks {', '.join(missing)}.")
    if unknown := sorted(set(content) - names):
        raise ClearValueError(f"The result file {str(path)!r} has unknown keys: {', '.join(unknown)}.")
    for name, accepted in _TYPES.items():
        if not isinstance(content[name], accepted):
            raise ClearValueError(
                f"The result file {str(path)!r} has {name} = {content[name]!r}, a {type(content[name]).__name__}."
            )
    return ResultFile(**{**content, "seeds": tuple(content["seeds"])})


def installed_versions(extra: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of Python, `PACKAGES` and `extra`, importing none of them.

    Args:
        extra: Further distributions.

    Returns:
        Versions by name; what is not installed is absent.
    """
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, *extra):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


_A_RESULT = re.compile(r"(^|/)results/.*\.(json|md)$")


def git_state(folder: str | Path | None = None) -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that the library runs from, and whether files differ from it.

    Result files themselves (JSON and Markdown below a `results` folder) do not count as a difference: a sweep writes
    several of them.

    Args:
        folder: The checkout's root; None for the one that holds this package.

    Returns:
        Commit and flag; None for both where the folder is not the root of a git checkout, as with an installed package
        (even if some other project's checkout surrounds it), or where git is missing.
    """
    root = Path(__file__).resolve().parents[1] if folder is None else Path(folder).resolve()
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != root:
        return None, None
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    status = _git(root, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all")
    if commit is None or status is None:
        return None, None
    changed = [entry[3:] for entry in status.split("\0") if entry]
    return commit.strip(), any(not _A_RESULT.search(name) for name in changed)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            encoding="utf-8",
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
