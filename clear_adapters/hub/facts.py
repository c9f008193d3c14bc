"""What a card says, as recorded facts: of the adapter's own files, its provenance, and result files."""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from clear_adapters.errors import AdapterError, ClearValueError
from clear_adapters.hub.scores import Scores, read_scores
from clear_adapters.store import StoredAdapter, adapter_digest, read_adapter

SCHEMA_VERSION = 1
"""Raised when an older library could misread the file."""

_LIMIT = 32
"""Stages of a chain that are followed: no adapter has more."""


@dataclass(frozen=True)
class Stage:
    """A training stage, as its run recorded it.

    Attributes:
        stage: its name.
        steps: of the optimizer.
        examples: rows of the data.
        data_sha256: of the rows.
        began_from: name and hash of the adapter that it went on from.
        seed: of the run.
        seconds: of training.
        device: that it ran on.
        date: when it ended.
        commit: of the library.
        final: the last logged losses.
        recipe: every setting.
    """

    stage: str
    steps: int | None
    examples: int | None
    data_sha256: str | None
    began_from: str | None
    seed: int | None
    seconds: float | None
    device: str | None
    date: str | None
    commit: str | None
    final: Mapping[str, Any]
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class Weights:
    """A file of weights or settings.

    Attributes:
        name: in the folder.
        bytes: its size.
        sha256: its hash.
    """

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says.

    Attributes:
        name: of the adapter.
        where: what `attach` loads it by: `builtin:NAME` or Hub id.
        revision: on the Hub, where it is not the main branch.
        backbone: name of the family.
        base_model: `builtin:NAME` or Hub id; None where it has neither.
        base_revision: on the Hub.
        base_hash: of the base's files, as the run recorded it.
        stage: the last one.
        parameters: numbers in it.
        lora: what LoRA adapts; None without.
        bridge: sizes of the bridge; None without.
        protocol: name and version.
        text: how text is sampled.
        latent: how restorations are.
        library_version: of the library that wrote the folder.
        digest: by which result files name it.
        files: of the folder.
        stages: in the order of training.
        scores: from result files.
        license: as the Hub writes it; None is not stated.
        schema_version: of these facts' form.
    """

    name: str
    where: str
    revision: str | None
    backbone: str
    base_model: str | None
    base_revision: str | None
    base_hash: str | None
    stage: str | None
    parameters: int
    lora: Mapping[str, Any] | None
    bridge: Mapping[str, int] | None
    protocol: str
    text: Mapping[str, Any]
    latent: Mapping[str, Any]
    library_version: str
    digest: str
    files: tuple[Weights, ...]
    stages: tuple[Stage, ...]
    scores: tuple[Scores, ...]
    license: str | None
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The text of a file, keys sorted."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "facts.json") -> CardFacts:
        """Reads the text of a file.

        Raises:
            ClearValueError: it is no facts of this form; `source` is what the message calls it.
        """
        try:
            data = json.loads(text)
            if data["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version is {data['schema_version']}, not {SCHEMA_VERSION}")
            made = _build(cls, data)
        except (ValueError, KeyError, TypeError) as error:
            raise ClearValueError(
                f"{source} holds no facts of a card ({type(error).__name__}: {error}): collect them again"
            ) from error
        assert isinstance(made, CardFacts)
        return made


def collect_facts(
    folder: str | Path,
    where: str | None = None,
    *,
    results: Sequence[str | Path] = (),
    license: str | None = None,
    revision: str | None = None,
) -> CardFacts:
    """What is recorded about an adapter.

    Args:
        folder: of the adapter.
        where: what it is or will be loaded by; None is the folder's name alone.
        results: result files that measured it.
        license: as the Hub writes it.
        revision: that it is pushed to.

    Raises:
        AdapterError: the folder is no adapter.
        ClearValueError: a result file cannot be read or did not measure this adapter, or the license is no identifier.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ClearValueError(
            f"license={license!r}: write it as the Hub does, such as 'apache-2.0' or 'cc-by-4.0'"
        )
    folder = Path(folder)
    stored = read_adapter(folder)
    config, made = stored.config, _mapping(stored.config.provenance)
    tensors = [*stored.lora.values(), *stored.bridge.values(), *stored.extra.values()]
    digest = adapter_digest(folder)
    where = folder.resolve().name if where is None else where
    return CardFacts(
        name=re.split(r"[/:]", where)[-1],
        where=where,
        revision=revision,
        backbone=config.backbone,
        base_model=config.base_model,
        base_revision=config.base_revision,
        base_hash=_word(_mapping(made.get("model")).get("hash")),
        stage=config.stage,
        parameters=sum(t.numel() for t in tensors),
        lora=None if config.lora is None else config.lora.to_dict(),
        bridge=None if config.bridge is None else dict(config.bridge),
        protocol=f"{config.protocol.name}, version {config.protocol.version}",
        text=asdict(config.text),
        latent={k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config.latent).items()},
        library_version=config.library_version,
        digest=digest,
        files=tuple(
            Weights(n, (folder / n).stat().st_size, sha256) for n, sha256 in sorted(stored.hashes.items())
        ),
        stages=tuple(_stages(stored)),
        scores=tuple(s for path in results for s in read_scores(path, digest)),
        license=license,
    )


def _stages(stored: StoredAdapter) -> list[Stage]:
    """The chain of runs, first to last. Provenance is plain data that anybody may have written: each value is checked."""
    found: list[Stage] = []
    made, name = _mapping(stored.config.provenance), stored.config.stage
    while made and len(found) < _LIMIT:
        recipe = _mapping(made.get("recipe"))
        name = _word(recipe.get("stage")) or name or "unknown"
        before = _mapping(made.get("adapter"))
        began = ", ".join(
            filter(
                None, (_word(before.get("name")), _word(before.get("hash")), _word(before.get("revision")))
            )
        )
        found.append(
            Stage(
                stage=name,
                steps=_whole(made.get("steps")),
                examples=_whole(made.get("examples")),
                data_sha256=_word(made.get("data_hash")),
                began_from=began or None,
                seed=_whole(made.get("seed")),
                seconds=_number(made.get("seconds")),
                device=_word(made.get("device")),
                date=_word(made.get("date")),
                commit=_word(made.get("commit")),
                final={str(k): v for k, v in _mapping(made.get("final")).items() if _number(v) is not None},
                recipe=recipe,
            )
        )
        made, name = _mapping(made.get("before")), None
    if made:
        raise AdapterError(
            f"{stored.folder} goes on from more than {_LIMIT} adapters: its provenance is no chain of runs"
        )
    return found[::-1]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _build(wanted: Any, data: Any) -> Any:
    """Plain data as the dataclasses that it was made of."""
    if dataclasses.is_dataclass(wanted):
        hints = get_type_hints(wanted)
        names = {f.name for f in fields(wanted)}
        if set(data) != names:
            raise KeyError(", ".join(sorted(set(data) ^ names)))
        return wanted(**{n: _build(hints[n], v) for n, v in data.items()})  # type: ignore[operator]  # a class here
    if get_origin(wanted) in (Union, types.UnionType):
        if data is None:
            return None
        return _build(next(a for a in get_args(wanted) if a is not type(None)), data)
    if get_origin(wanted) is tuple:
        return tuple(_build(get_args(wanted)[0], v) for v in data)
    return data
