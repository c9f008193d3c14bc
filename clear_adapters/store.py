"""An adapter folder read, checked and written, and names of models and adapters resolved to folders.

    clear_config.json
    lora/adapter_config.json            stock PEFT
    lora/adapter_model.safetensors
    bridge.safetensors
    extra.safetensors                   where modules were trained whole

Only these files are ever read, tensors only from safetensors, and everything is checked before a model is touched. A
folder or repository with pickles, programs or paths that lead elsewhere is refused whole.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clear_adapters.backbones.base import Backbone
from clear_adapters.bridge import BridgeConfig
from clear_adapters.config import ClearConfig, is_builtin_name, is_hub_id, is_revision
from clear_adapters.download import commit_of, download, explain, hide, is_damaged, listing_of
from clear_adapters.errors import (
    AdapterError,
    BackboneMismatchError,
    CheckpointError,
    ClearError,
    unknown_name,
)
from clear_adapters.lora import check_tensors, config_dict, expected_shapes, whole_parameters
from clear_adapters.safety import PICKLES, check_folder, check_names

CONFIG = "clear_config.json"
LORA_CONFIG = "lora/adapter_config.json"
LORA_WEIGHTS = "lora/adapter_model.safetensors"
BRIDGE = "bridge.safetensors"
EXTRA = "extra.safetensors"
FILES = (CONFIG, LORA_CONFIG, LORA_WEIGHTS, BRIDGE, EXTRA)

_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_JSON_LIMIT = 16 * 2**20

_DECISIVE = ("r", "lora_alpha", "target_modules")
_FREE = ("base_model_name_or_path", "peft_version", "inference_mode", "auto_mapping", "revision", "task_type")
"""Keys of a stock configuration that must be there, and those whose values do not matter here."""

Kind = Literal["model", "adapter"]

# ------------------------------------------------------------------------------------------------------- names


def _builtin_root() -> Path:
    return Path(str(resources.files("clear_adapters"))) / "builtin"


def _kind_of(folder: Path) -> Kind | None:
    if (folder / CONFIG).is_file():
        return "adapter"
    return "model" if any(folder.glob("*config.json")) else None


def builtin_names(kind: Kind | None = None) -> list[str]:
    """Built-in models and adapters, as `builtin:NAME`, sorted.

    Args:
        kind: only `model` or only `adapter`; None is both.
    """
    root = _builtin_root()
    found = {p.name: _kind_of(p) for p in root.iterdir() if p.is_dir()} if root.is_dir() else {}
    return sorted(f"builtin:{n}" for n, k in found.items() if k is not None and kind in (None, k))


def resolve(name: str | Path, kind: Kind, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder that a name stands for; a model or adapter of the Hub is downloaded.

    Args:
        name: `builtin:NAME`, a folder, or a Hub id.
        kind: what is looked for.
        revision: on the Hub.
        token: for the Hub.

    Raises:
        UnknownNameError: there is no such built-in entry.
        CheckpointError: a model that is neither; the message offers both spellings.
        AdapterError: an adapter that is neither, or that the Hub does not give.
    """
    error = AdapterError if kind == "adapter" else CheckpointError
    text = str(name)
    if text.startswith("builtin:"):
        names = builtin_names(kind)
        if not is_builtin_name(text) or text not in names:
            other = text in builtin_names() and is_builtin_name(text)
            hint = f"{text} is built in, but it is not of that kind." if other else ""
            raise unknown_name(f"built-in {kind}", text, names, hint=hint)
        return _builtin_root() / text.removeprefix("builtin:")
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise error(f"{text!r} is a file, and the {kind} is a folder: pass the folder that holds it")
    if isinstance(name, Path) or not is_hub_id(text):
        raise error(_no_place(text, kind))
    if revision is not None and not is_revision(revision):
        raise AdapterError(
            f"revision={revision!r} of {text!r}: must be a branch, tag or commit of the Hub, which has no '..' and no spaces"
        )
    return _download(text, kind, revision, token)


def _no_place(text: str, kind: Kind) -> str:
    close = difflib.get_close_matches(f"builtin:{text}", builtin_names(kind), n=2, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    bare = re.sub(r"^[./\\~]+", "", text)
    return (
        f"{text!r} is no folder on this machine, and no Hub id, which reads 'owner/name'.{hint} For a folder check the "
        f"path ('./{bare}' is looked up in {Path.cwd()}); for the Hub write 'owner/{bare.rstrip('/').split('/')[-1]}'; "
        f"for a built-in {kind} 'builtin:NAME'"
    )


def _download(repo_id: str, kind: Kind, revision: str | None, token: str | None) -> Path:
    error = AdapterError if kind == "adapter" else CheckpointError
    try:
        folder = download(
            repo_id, FILES if kind == "adapter" else _MODEL_FILES, revision=revision, token=token
        )
    except Exception as cause:  # the client raises its own errors and those of its transport
        refusal = error(
            f"{repo_id!r} is no folder on this machine, and the Hub does not give it"
            f"{f' at revision {revision!r}' if revision else ''}: {explain(cause, repo_id, revision, token)}. For a folder "
            f"write its path, './{repo_id}'"
        )
        # A traceback shows the cause too, and some of the client's errors quote what was sent.
        raise refusal from (cause if hide(str(cause), token) == str(cause) else None)
    if kind == "adapter":
        names = listing_of(folder)
        check_names(names, f"the repository {repo_id}")
        for path in (folder / name for name in FILES):
            if path.is_file() and is_damaged(path):
                raise AdapterError(
                    f"{path.relative_to(folder).as_posix()} of {repo_id} is not what the Hub says it is (its hash differs): it was "
                    f"damaged on its way, or on this disk. Delete {path.resolve()} and load again"
                )
        if not (folder / CONFIG).is_file():
            raise AdapterError(
                f"the repository {repo_id} has no {CONFIG}: it is no CLEAR adapter"
                f"{', but a plain PEFT adapter' if 'adapter_config.json' in names else ''}. A model is passed as model="
            )
    return folder


def adapter_digest(folder: Path) -> str:
    """A short hash of an adapter's own files, whole: by it runs, result files and cards know the same weights again.

    Whatever else lies in the folder, such as a card or checkpoints, is no part of it.
    """
    found = hashlib.sha256()
    for name in sorted(FILES):
        path = folder / name
        if path.is_file():
            found.update(f"{name} {path.stat().st_size}\n".encode())
            with path.open("rb") as opened:
                while part := opened.read(2**20):
                    found.update(part)
    return found.hexdigest()[:16]


def model_digest(folder: Path) -> str:
    """A short hash of the files that a model is read from."""
    found = hashlib.sha256()
    for path in sorted({p for pattern in _MODEL_FILES for p in folder.glob(pattern)}):
        with path.open("rb") as opened:
            found.update(f"{path.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter folder's contents, in memory on the CPU.

    Attributes:
        folder: where it was read.
        config: what it says about itself.
        commit: of its repository, where it came from the Hub.
        hashes: SHA-256 of each file that was read.
        adapter_config: the stock PEFT configuration, None without LoRA.
        lora: tensors of the stock PEFT file.
        bridge: tensors of the bridge.
        extra: parameters of modules that were trained whole.
    """

    folder: Path
    config: ClearConfig
    adapter_config: dict[str, Any] | None = None
    lora: dict[str, Tensor] = field(default_factory=dict)
    bridge: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    commit: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)

    def check(self, backbone: Backbone) -> None:
        """Compares everything with a loaded model, and changes nothing.

        Raises:
            BackboneMismatchError: it was made for another family, other widths or other layers.
            AdapterError: its files contradict each other.
        """
        spec, config = backbone.spec, self.config
        if config.backbone != spec.name:
            raise BackboneMismatchError(
                f"the adapter in {self.folder} was made for backbone {config.backbone!r}, but this model is one of "
                f"{spec.name!r}: load it onto its own base, {config.base_model or 'a ' + config.backbone + ' model'}"
            )
        if config.lora is not None:
            if self.adapter_config is not None:
                self._check_stock(config_dict(backbone, config.lora, config.base_model))
            check_tensors(self.lora, expected_shapes(backbone, config.lora), f"{self.folder / LORA_WEIGHTS}")
            model = backbone.model
            shapes = {n: tuple(model.get_parameter(n).shape) for n in whole_parameters(backbone, config.lora)}
            check_tensors(self.extra, shapes, f"{self.folder / EXTRA}")
        if config.bridge is not None:
            sizes = BridgeConfig(**config.bridge)
            wanted = (backbone.latent_width, backbone.width)
            if (sizes.latent_width, sizes.width) != wanted:
                raise BackboneMismatchError(
                    f"the bridge in {self.folder} has latent_width={sizes.latent_width} and width={sizes.width}, but "
                    f"the model's are {wanted[0]} and {wanted[1]}: it was made for a model of other sizes"
                )
            check_tensors(self.bridge, bridge_shapes(sizes), f"{self.folder / BRIDGE}")

    def _check_stock(self, expected: dict[str, Any]) -> None:
        found = dict(self.adapter_config or {})
        if isinstance(found.get("target_modules"), list):
            found["target_modules"] = sorted(map(str, found["target_modules"]))
        for key, wanted in sorted(expected.items()):
            if key in _FREE or (key not in found and key not in _DECISIVE):
                continue
            if found.get(key) != wanted:
                raise AdapterError(
                    f"{self.folder / LORA_CONFIG} has {key}={_short(found.get(key))}, where {CONFIG} and the model ask "
                    f"for {_short(wanted)}: the two files do not belong together, or the model has other layers"
                )
        for key in sorted(set(found) - set(expected)):
            if found[key] is True:
                raise AdapterError(
                    f"{self.folder / LORA_CONFIG} turns on {key!r}, which the installed PEFT does not know: upgrade it"
                )


def bridge_shapes(sizes: BridgeConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of `bridge.safetensors`."""
    return {
        "down.weight": (sizes.hidden, sizes.latent_width + sizes.width),
        "down.bias": (sizes.hidden,),
        "up.weight": (sizes.width, sizes.hidden),
        "up.bias": (sizes.width,),
    }


def read_config(folder: str | Path) -> ClearConfig:
    """What an adapter folder says about itself, without its tensors.

    Raises:
        AdapterError: the file is missing or damaged, or the folder holds what is refused.
    """
    folder = Path(folder)
    if folder.is_dir():
        check_folder(folder)
    return ClearConfig.from_json(_text(folder, CONFIG), str(folder / CONFIG))


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Reads an adapter folder; what needs no model is checked here.

    Raises:
        AdapterError: a file is missing, damaged, a pickle or a program, a link leads out of the folder, or a file says
            what cannot be.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.bridge is not None:
        try:
            BridgeConfig(**config.bridge)
        except (ClearError, TypeError) as error:
            raise AdapterError(f"{folder / CONFIG}: bridge={dict(config.bridge)!r}: {error}") from error
    settings = config.lora
    stock = None
    lora: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    if settings is not None and settings.ranks:
        try:
            stock = json.loads(_text(folder, LORA_CONFIG))
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{folder / LORA_CONFIG} is not valid JSON: {error}") from error
        if not isinstance(stock, dict) or stock.get("peft_type") != "LORA":
            raise AdapterError(
                f"{folder / LORA_CONFIG} is no LoRA configuration of PEFT (peft_type is not 'LORA')"
            )
        base = stock.get("base_model_name_or_path")
        if isinstance(base, str) and (Path(base).is_absolute() or ".." in re.split(r"[/\\]", base)):
            raise AdapterError(
                f"{folder / LORA_CONFIG} has base_model_name_or_path={base!r}: a path of one machine means nothing, and may "
                "mean harm, on another"
            )
        lora = _tensors(folder, LORA_WEIGHTS)
    if settings is not None and settings.whole:
        extra = _tensors(folder, EXTRA)
    bridge = _tensors(folder, BRIDGE) if config.bridge is not None else {}
    for name, used in ((BRIDGE, bridge), (EXTRA, extra), (LORA_WEIGHTS, lora)):
        if not used and (folder / name).is_file():
            raise AdapterError(
                f"{folder} holds {name}, but its {CONFIG} knows nothing of it: it would be lost silently"
            )
    hashes = {n: _sha256(folder / n) for n in FILES if (folder / n).is_file()}
    return StoredAdapter(folder, config, stock, lora, bridge, extra, commit_of(folder), hashes)


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _find(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file():
        return path
    pickles = (
        sorted(p.name for p in path.parent.glob("*") if p.suffix in PICKLES) if path.parent.is_dir() else []
    )
    if pickles and path.suffix == ".safetensors":
        raise AdapterError(
            f"{folder} lacks {name} and has {', '.join(pickles)} instead: pickled files can run code when they are "
            "loaded, so only safetensors are read; ask its authors to save it again"
        )
    if not folder.is_dir():
        raise AdapterError(f"{folder} is no folder")
    stock = ""
    if name == CONFIG and (folder / "adapter_config.json").is_file():
        stock = " It looks like a plain PEFT adapter, which has no bridge and no protocol."
    raise AdapterError(f"{folder} lacks {name}: it is no CLEAR adapter, or not all of one.{stock}")


def _text(folder: Path, name: str) -> str:
    path = _find(folder, name)
    if path.stat().st_size > _JSON_LIMIT:
        raise AdapterError(f"{path} has {path.stat().st_size} bytes: no settings are that long")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path} is not UTF-8 text: {error}") from error


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    path = _find(folder, name)
    found: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                found[key] = opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged, or is no safetensors file: {error}") from error
    for key, tensor in found.items():
        if tensor.dtype not in _FLOATS:
            raise AdapterError(
                f"{path}: {key} is of type {tensor.dtype}; weights are float32, bfloat16 or float16"
            )
        if not bool(tensor.isfinite().all()):
            raise AdapterError(
                f"{path}: {key} holds values that are not finite, so every answer would be noise"
            )
    return found


# ----------------------------------------------------------------------------------------------------- writing


def write_adapter(
    folder: Path,
    config: ClearConfig,
    *,
    adapter_config: Mapping[str, Any] | None = None,
    lora: Mapping[str, Tensor] | None = None,
    bridge: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes an adapter folder: beside it first, then in one move, so that no half of one is ever seen.

    Args:
        folder: new or empty, unless `overwrite`.
        config: what the adapter says about itself.
        adapter_config: the stock PEFT configuration.
        lora: tensors of the stock PEFT file.
        bridge: tensors of the bridge.
        extra: parameters of modules trained whole.
        overwrite: replace the adapter that is there; files that are none of ours are kept.
        dtype: `torch.bfloat16` or `torch.float32`; None as the tensors are.

    Returns:
        The folder.

    Raises:
        AdapterError: the folder is a file, or not empty; another type; or weights that are not finite.
    """
    if dtype not in (None, torch.bfloat16, torch.float32):
        raise AdapterError(
            f"dtype={dtype}: adapters are saved in torch.bfloat16, torch.float32 or, with None, as is"
        )
    given = Path(os.path.abspath(folder.expanduser()))  # noqa: PTH100 (a link at the end stays one)
    folder = given.resolve()  # and is written through
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file: give the name of a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise AdapterError(f"{folder} is not empty: choose another folder, or pass overwrite=True")
    texts = {CONFIG: config.to_json()}
    if adapter_config is not None:
        texts[LORA_CONFIG] = json.dumps(dict(adapter_config), indent=2, sort_keys=True) + "\n"
    weights: dict[str, dict[str, Tensor]] = {}
    for file, tensors in ((LORA_WEIGHTS, lora), (BRIDGE, bridge), (EXTRA, extra)):
        for name, tensor in sorted((tensors or {}).items()):
            ready = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
            if not bool(ready.isfinite().all()):
                raise AdapterError(
                    f"{file} is not written: {name} holds values that are not finite. A training that ends so went "
                    "wrong before; go back to an earlier checkpoint, or train with a lower learning rate"
                )
            weights.setdefault(file, {})[name] = ready
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        (new / "lora").mkdir(parents=True)
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        for name, tensors in weights.items():
            save_file(tensors, new / name, metadata={"format": "pt"})
        if not any((new / "lora").iterdir()):
            (new / "lora").rmdir()
        old = Path(temporary) / "old"
        if folder.is_dir():
            _keep_foreign(folder, new)
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    return given


def _keep_foreign(folder: Path, new: Path) -> None:
    """Copies what is not ours from the folder that is replaced."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if name.as_posix() in FILES or (path.is_dir() and not path.is_symlink()):
            continue
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, new / name, follow_symlinks=False)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
