"""`import clear_adapters` is free: names are loaded on first use, and each of them exists."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import clear_adapters

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "PIL", "transformers", "peft", "diffusers", "cv2")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy():
    assert run(f"import sys, clear_adapters; print(sorted(set({HEAVY}) & set(sys.modules)))") == "[]"


def test_asking_what_there_is_loads_nothing_heavy():
    code = f"""
import sys, clear_adapters
names = dir(clear_adapters)
assert set(clear_adapters.__all__) <= set(names), names
try:
    clear_adapters.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise SystemExit("no error")
print(sorted(set({HEAVY}) & set(sys.modules)))
"""
    assert run(code) == "[]"


@pytest.mark.parametrize("name", clear_adapters.__all__)
def test_every_public_name_resolves(name):
    value = getattr(clear_adapters, name)
    assert vars(clear_adapters)[name] is value
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__name__ == name
        assert inspect.getdoc(value)


def test_the_list_is_sorted_and_every_name_has_one_home():
    assert sorted(clear_adapters.__all__) == clear_adapters.__all__
    assert set(clear_adapters._HOMES) | {"__version__"} == set(clear_adapters.__all__)
