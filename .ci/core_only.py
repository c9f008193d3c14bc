"""Import every module of the library as if only its core dependencies were installed."""

import importlib
import importlib.util
import sys
import traceback
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

EXTRAS = {"datasets", "gradio", "matplotlib", "openai", "skimage", "tensorboard"}
"""What the extras bring, by the name it is imported under."""

DECLARED = ("clear_adapters.ui",)
"""Modules, and folders whole, that may need an extra to be imported: the page (extra `demo`)."""


class CoreOnly(PathFinder):
    """The usual finder, to which the extras are not installed."""

    @classmethod
    def find_spec(cls, fullname: str, path=None, target=None) -> ModuleSpec | None:
        """Find nothing for an extra, and everything else as usual."""
        return None if fullname.partition(".")[0] in EXTRAS else super().find_spec(fullname, path, target)


def main() -> int:
    """Import all modules, print which of them fail, and return how many do."""
    sys.meta_path[:] = [CoreOnly if finder is PathFinder else finder for finder in sys.meta_path]
    assert CoreOnly in sys.meta_path
    assert importlib.util.find_spec("gradio") is None
    root = Path(importlib.import_module("clear_adapters").__path__[0])
    files = sorted(file.relative_to(root.parent).with_suffix("") for file in root.rglob("*.py"))
    names = [".".join(file.parts).removesuffix(".__init__") for file in files]
    failed = 0
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if name.startswith(DECLARED) and (error.name or "").partition(".")[0] in EXTRAS:
                continue
            failed += 1
            print(f"{name} needs {error.name}, which is no core dependency", file=sys.stderr)
            traceback.print_exc()
        except Exception:
            failed += 1
            print(f"{name} cannot be imported", file=sys.stderr)
            traceback.print_exc()
    print(f"core only: {len(names) - failed} of {len(names)} modules import without the extras")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
