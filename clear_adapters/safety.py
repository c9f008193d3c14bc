"""What an adapter's folder or repository may not hold, by the names of its files, before any of them is read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from clear_adapters.errors import AdapterError

PICKLES = frozenset(
    [
        ".bin",
        ".ckpt",
        ".dill",
        ".h5",
        ".joblib",
        ".keras",
        ".npy",
        ".npz",
        ".pickle",
        ".pkl",
        ".pt",
        ".pth",
        ".t7",
    ]
)
"""Endings of formats that can run code when they are loaded."""

CODE = frozenset(
    [
        ".bash",
        ".bat",
        ".cmd",
        ".com",
        ".cu",
        ".dll",
        ".dylib",
        ".exe",
        ".ipynb",
        ".jar",
        ".js",
        ".lua",
        ".pl",
        ".ps1",
        ".py",
        ".pyc",
        ".pyd",
        ".pyo",
        ".pyw",
        ".pyx",
        ".rb",
        ".sh",
        ".so",
        ".vbs",
        ".wasm",
        ".whl",
        ".zsh",
    ]
)
"""Endings of files that are programs."""

_DRIVE = re.compile(r"[A-Za-z]:")


def check_names(names: Iterable[str], source: str) -> None:
    """Refuses names that no adapter needs and an attack would use.

    Args:
        names: paths below the adapter's root, with forward slashes.
        source: what messages call the adapter.

    Raises:
        AdapterError: a pickle, a program, or a path that leads elsewhere or cannot be shown.
    """
    for name in names:
        path = PurePosixPath(name)
        shown = repr(name)
        if not name or any(ord(c) < 32 or ord(c) == 127 for c in name):
            raise AdapterError(f"{source} holds a file named {shown}: a name is printable text")
        if path.is_absolute() or _DRIVE.match(name) or name.startswith(("\\", "~")):
            raise AdapterError(
                f"{source} holds {shown}, an absolute path: it would be read or written elsewhere"
            )
        if ".." in re.split(r"[/\\]", name):
            raise AdapterError(
                f"{source} holds {shown}, which leads to a parent folder: it would be read or written elsewhere"
            )
        if "\\" in name:
            raise AdapterError(
                f"{source} holds {shown}: a backslash separates folders on one system and not on another"
            )
        suffix = path.suffix.lower()
        if suffix in PICKLES:
            raise AdapterError(
                f"{source} holds {name}: pickled files can run code when they are loaded, so an adapter with one is not "
                "read at all; its weights are safetensors. Remove it, or ask its authors to"
            )
        if suffix in CODE:
            raise AdapterError(
                f"{source} holds {name}: an adapter is weights and settings, and brings no program. Remove it, or ask its "
                "authors to"
            )


def check_folder(folder: Path) -> None:
    """Refuses a folder on this machine by the names in it and by where its links lead.

    Hidden folders (a `.git`, a cache) are no part of an adapter and are passed by.

    Raises:
        AdapterError: as for `check_names`, or a link out of the folder.
    """
    root = folder.resolve()
    # A snapshot in the Hub's cache consists of links to the contents beside it.
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    names = []
    todo = [folder]
    while todo:
        for path in sorted(todo.pop().iterdir()):
            try:
                target = path.resolve(strict=path.is_symlink())
            except (OSError, RuntimeError):  # a loop is either, by the version of Python
                raise AdapterError(
                    f"{folder} holds {path.relative_to(folder)}, a link that leads nowhere: take it out"
                ) from None
            if path.is_symlink() and not (target.is_relative_to(root) or target.is_relative_to(blobs)):
                raise AdapterError(
                    f"{folder} holds {path.relative_to(folder)}, a link to {target}, out of the folder: an adapter consists "
                    "of files of its own; copy the file there"
                )
            if path.is_dir():
                if not path.name.startswith(".") and not path.is_symlink():
                    todo.append(path)
                continue
            names.append(path.relative_to(folder).as_posix())
    check_names(sorted(names), str(folder))
