"""What an adapter says about itself: the contents of `clear_config.json`, checked value by value.

A file from the Hub is data to validate: every value has its type checked, names that stand for places must be built-in
names or Hub ids, an unknown key is named in a warning and left out, and a newer schema is refused.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn

from clear_adapters._version import __version__
from clear_adapters.errors import AdapterError, ClearError, ClearTypeError, ClearValueError
from clear_adapters.prompts import Protocol, get_protocol
from clear_adapters.sampling import LatentSampling, TextSampling

SCHEMA_VERSION = 1
"""Raised when an older library could misread the file."""

_ALIASES = {"text_sampling": "text", "latent_sampling": "latent"}
"""Keys of the file whose attributes have shorter names."""

_MAX_RANK = 4096
"""A larger rank is more than the layers of any model can use, and far more than memory can."""

_BUILTIN = re.compile(r"builtin:[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")


def is_builtin_name(name: str) -> bool:
    """Whether a string reads `builtin:NAME`."""
    return _BUILTIN.fullmatch(name) is not None


def is_hub_id(name: str) -> bool:
    """Whether a string has the form of a Hub id, `owner/name`."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def is_revision(name: str) -> bool:
    """Whether a string has the form of a branch, tag, commit or `refs/pr/N`; the Hub's client looks it up as a path."""
    return _REVISION.fullmatch(name) is not None and ".." not in name and "//" not in name


# ---------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class LoraSettings:
    """What of a model is adapted, by the groups that its backbone names.

    Attributes:
        groups: LoRA groups and the rank of each; several names without ranks take 16.
        alpha: by group, or one for all; an update is scaled by `alpha / rank`. None is twice the rank.
        dropout: probability with which inputs of the update are dropped in training.
        whole: modules that are trained whole beside LoRA, from the `extras` of the backbone.

    Raises:
        ClearTypeError: a value of another type.
        ClearValueError: no group and no module, or a number out of its range.
    """

    groups: Mapping[str, int] | tuple[str, ...] = ("understanding", "generation")
    alpha: Mapping[str, float] | float | None = None
    dropout: float = 0.0
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        groups = _ranks(self.groups)
        if self.alpha is None:
            alpha = {name: 2.0 * rank for name, rank in groups.items()}
        elif isinstance(self.alpha, Mapping):
            alpha = {name: _number(f"alpha[{name!r}]", value) for name, value in self.alpha.items()}
        else:
            alpha = dict.fromkeys(groups, _number("alpha", self.alpha))
        if set(alpha) != set(groups):
            raise ClearValueError(
                f"alpha names the groups {', '.join(map(str, alpha))} but the ranks {', '.join(groups)}: "
                "give one for each group"
            )
        bad = [name for name, value in alpha.items() if not value > 0]
        if bad:
            raise ClearValueError(
                f"alpha[{bad[0]!r}]={alpha[bad[0]]}: must be positive, or the update does nothing"
            )
        dropout = _number("dropout", self.dropout)
        if not 0 <= dropout < 1:
            raise ClearValueError(f"dropout={dropout}: a probability in [0, 1)")
        if not isinstance(self.whole, tuple | list) or not all(isinstance(n, str) for n in self.whole):
            raise ClearTypeError(f"whole={self.whole!r}: must be a tuple of module names")
        if not groups and not self.whole:
            raise ClearValueError("groups is empty: name at least one LoRA group, or a module in `whole`")
        object.__setattr__(self, "groups", dict(sorted(groups.items())))
        object.__setattr__(self, "alpha", dict(sorted(alpha.items())))
        object.__setattr__(self, "dropout", dropout)
        object.__setattr__(self, "whole", tuple(sorted(set(self.whole))))

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by group, sorted by name."""
        return dict(self.groups)  # type: ignore[arg-type]  # a mapping since __post_init__

    @property
    def alphas(self) -> dict[str, float]:
        """Alpha by group, sorted by name."""
        return dict(self.alpha)  # type: ignore[arg-type]  # a mapping since __post_init__

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `clear_config.json`."""
        return {
            "groups": self.ranks,
            "alpha": self.alphas,
            "dropout": self.dropout,
            "whole": list(self.whole),
        }


def _ranks(groups: Any) -> dict[str, int]:
    if isinstance(groups, str) or not isinstance(groups, Mapping | tuple | list):
        raise ClearTypeError(
            f"groups={groups!r}: must be a tuple of group names, or a mapping from a group's name to its rank"
        )
    strange = [name for name in groups if not isinstance(name, str)]
    if strange:
        raise ClearTypeError(f"groups holds {strange[0]!r}: the name of a group is a string")
    ranks = dict(groups) if isinstance(groups, Mapping) else dict.fromkeys(groups, 16)
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise ClearTypeError(f"groups[{name!r}]={rank!r}: a rank must be a whole number")
        if not 1 <= rank <= _MAX_RANK:
            raise ClearValueError(
                f"groups[{name!r}]={rank}: a rank must be from 1 to {_MAX_RANK}; leave out a group that is not to be "
                "adapted"
            )
    return ranks


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClearTypeError(f"{name}={value!r}: must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ClearValueError(f"{name}={_short(value)}: must be a finite number")
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


# ---------------------------------------------------------------------------------------------------- the file


@dataclass(frozen=True)
class ClearConfig:
    """The contents of `clear_config.json`.

    Attributes:
        backbone: name of the family.
        base_model: `builtin:NAME` or Hub id of the model that it was trained on; None where it has neither.
        base_revision: revision of that model on the Hub.
        bridge: sizes of the bridge; None when it has none.
        lora: what is adapted; None when nothing is.
        protocol: the words that the model was trained with.
        stage: the last training stage it went through; None is an untrained one.
        text: sampling of text that works for it.
        latent: sampling of restorations that works for it.
        max_restores: the most restorations in one reply; 0 grants no request.
        provenance: how it was made: plain data that nothing here reads.
        library_version: of the library that wrote the file.
        schema_version: of the file's form.

    Raises:
        AdapterError: a value of another type or out of its range, or a newer schema.
    """

    backbone: str
    base_model: str | None = None
    base_revision: str | None = None
    bridge: Mapping[str, int] | None = None
    lora: LoraSettings | None = None
    protocol: Protocol = field(default_factory=lambda: get_protocol("default"))
    stage: str | None = None
    text: TextSampling = field(default_factory=TextSampling)
    latent: LatentSampling = field(default_factory=LatentSampling)
    max_restores: int = 2
    provenance: Mapping[str, Any] = field(default_factory=dict)
    library_version: str = __version__
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        version = self.schema_version
        if isinstance(version, bool) or not isinstance(version, int):
            raise AdapterError(f"schema_version={version!r}: must be a whole number")
        if version > SCHEMA_VERSION or version < 1:
            raise AdapterError(
                f"schema_version={version}, but this library ({__version__}) reads versions 1 to {SCHEMA_VERSION}: "
                f"the adapter was written by clear-adapters {self.library_version!r}; upgrade to that version"
            )
        for name in ("backbone", "library_version"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise AdapterError(f"{name}={getattr(self, name)!r}: must be a string")
        for name in ("base_model", "base_revision", "stage"):
            if not isinstance(getattr(self, name), str | None):
                raise AdapterError(f"{name}={getattr(self, name)!r}: must be a string or null")
        if self.base_revision is not None and not is_revision(self.base_revision):
            raise AdapterError(
                f"base_revision={self.base_revision!r}: must be a branch, tag or commit of the Hub, which has no '..' and no spaces"
            )
        if self.base_model is not None and not (
            is_builtin_name(self.base_model) or is_hub_id(self.base_model)
        ):
            raise AdapterError(
                f"base_model={self.base_model!r}: must be 'builtin:NAME' or a Hub id 'owner/name'. A path of one "
                "machine means nothing, and may mean harm, on another"
            )
        for name, wanted in (("protocol", Protocol), ("text", TextSampling), ("latent", LatentSampling)):
            if not isinstance(getattr(self, name), wanted):
                raise AdapterError(f"{name}={getattr(self, name)!r}: must be a {wanted.__name__}")
        restores = self.max_restores
        if isinstance(restores, bool) or not isinstance(restores, int) or restores < 0:
            raise AdapterError(f"max_restores={restores!r}: must be a whole number, 0 or more")
        if not isinstance(self.lora, LoraSettings | None):
            raise AdapterError(f"lora={self.lora!r}: must be LoraSettings or null")
        if not isinstance(self.bridge, Mapping | None):
            raise AdapterError(f"bridge={self.bridge!r}: must be a mapping of sizes or null")
        if not isinstance(self.provenance, Mapping):
            raise AdapterError(f"provenance={self.provenance!r}: must be a mapping")

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "backbone": self.backbone,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "bridge": None if self.bridge is None else dict(self.bridge),
            "latent_sampling": asdict(self.latent),
            "library_version": self.library_version,
            "lora": None if self.lora is None else self.lora.to_dict(),
            "max_restores": self.max_restores,
            "protocol": self.protocol.to_dict(),
            "provenance": dict(self.provenance),
            "schema_version": self.schema_version,
            "stage": self.stage,
            "text_sampling": asdict(self.text),
        }

    def to_json(self) -> str:
        """The text of the file, keys sorted.

        Raises:
            AdapterError: `provenance` holds what JSON cannot.
        """
        try:
            return (
                json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
                + "\n"
            )
        except (TypeError, ValueError) as error:
            raise AdapterError(f"provenance must be plain data that JSON can hold: {error}") from error

    @classmethod
    def from_dict(cls, data: Any, source: str = "clear_config.json") -> ClearConfig:
        """Checks plain data and makes a config of it; a key that nothing knows is named in a warning.

        Args:
            data: what the file held.
            source: what messages call it.

        Raises:
            AdapterError: it is no mapping, lacks `backbone` or `schema_version`, a value does not fit, or the schema
                is newer than this library.
        """
        if not isinstance(data, dict):
            raise AdapterError(f"{source} must hold one JSON object, not {type(data).__name__}")
        missing = [key for key in ("backbone", "schema_version") if key not in data]
        if missing:
            raise AdapterError(
                f"{source} lacks {' and '.join(missing)}: it does not describe a CLEAR adapter"
            )
        values = {_ALIASES.get(str(key), str(key)): value for key, value in data.items()}
        try:
            newer = values["schema_version"]
            if isinstance(newer, int) and newer > SCHEMA_VERSION:
                # Before anything else is read: a newer file may hold anything.
                cls(backbone="?", schema_version=newer, library_version=str(values.get("library_version")))
            known = _known(values, cls, source)
            for name, part in (
                ("lora", LoraSettings),
                ("protocol", Protocol),
                ("text", TextSampling),
                ("latent", LatentSampling),
            ):
                if known.get(name) is not None:
                    known[name] = _part(known[name], part, name, source)
                elif name in known and name != "lora":
                    del known[name]
            return cls(**known)
        except ClearError as error:
            raise AdapterError(f"{source}: {error}") from error

    @classmethod
    def from_json(cls, text: str, source: str = "clear_config.json") -> ClearConfig:
        """Reads the text of a file.

        Raises:
            AdapterError: it is not JSON, or as for `from_dict`.
        """
        try:
            data = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_finite)
            json.dumps(data, ensure_ascii=False).encode()  # an escape may stand for half a character
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{source} is not valid JSON: {error}") from error
        return cls.from_dict(data, source)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not abs(number) < 1e20:  # also where it is infinite, and no count of anything
        return _refuse(digits[:40])
    return number if set(digits) & set(".eE") else int(digits)


def _known(values: dict[str, Any], cls: type, source: str) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    strange = sorted(set(values) - names)
    if strange:
        warnings.warn(
            f"{source}: unknown {'keys' if len(strange) > 1 else 'key'} {', '.join(map(repr, strange))} left out; "
            "the file may come from a newer version of clear-adapters",
            stacklevel=4,
        )
    return {k: v for k, v in values.items() if k in names}


def _part(value: Any, cls: type, name: str, source: str) -> Any:
    """One nested dataclass, its values' types compared with those of the defaults."""
    if not isinstance(value, dict):
        raise ClearTypeError(f"{name} must be an object, not {value!r}")
    values = _known(value, cls, f"{source}: {name}")
    for f in fields(cls):
        if f.name not in values or cls is LoraSettings:
            continue  # that one checks its own types
        wanted, given = str(f.type), values[f.name]
        if wanted.startswith("tuple") and isinstance(given, list | tuple):
            values[f.name] = tuple(_number(f"{name}: {f.name}", x) for x in given)
        elif wanted == "float":
            values[f.name] = _number(f"{name}: {f.name}", given)
        elif isinstance(given, bool) or not isinstance(given, int if wanted == "int" else str):
            raise ClearTypeError(f"{name}: {f.name}={given!r}: must be of type {wanted}")
    try:
        return cls(**values)
    except (ClearError, TypeError) as error:
        raise ClearTypeError(f"{name}: {error}") from error
