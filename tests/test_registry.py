"""The registry: laziness, collisions, misses, third parties."""

import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

from clear_adapters.errors import (
    BrokenEntryError,
    ClearError,
    ClearTypeError,
    ClearValueError,
    UnknownNameError,
    unknown_name,
)
from clear_adapters.registry import Registry

GROUP = "clear_adapters.test_group"


class Shape:
    pass


class Square(Shape):
    pass


def install(folder: Path, dist: str, entries: dict[str, str], modules: dict[str, str]) -> None:
    """Make a distribution that the import system finds in a folder."""
    info = folder / f"{dist.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_an_object_is_returned_and_its_origin_is_the_line_that_registered_it():
    registry: Registry[Shape] = Registry("shape", instance_of=Shape)
    square = Square()
    registry.register("square", square)
    assert registry.get("square") is square
    assert "square" in registry
    assert "circle" not in registry
    file, _, line = registry.origin("square").rpartition(":")
    assert file == __file__
    assert 'registry.register("square", square)' in Path(file).read_text().splitlines()[int(line) - 1]


def test_stacklevel_names_the_callers_line():
    registry: Registry[Shape] = Registry("shape")

    def helper() -> None:
        registry.register("square", Square(), stacklevel=2)

    helper()
    line = int(registry.origin("square").rpartition(":")[2])
    assert Path(__file__).read_text().splitlines()[line - 1].strip() == "helper()"


def test_a_lazy_entry_is_imported_by_the_first_get_only(site):
    (site / "lazy_shapes.py").write_text("class Oval: pass\nOVAL = Oval()\n")
    registry: Registry[object] = Registry("shape")
    registry.register("oval", "lazy_shapes:OVAL")
    assert registry.names() == ["oval"]
    assert registry.origin("oval") == "lazy_shapes:OVAL"
    assert "oval" in registry
    assert "lazy_shapes" not in sys.modules
    assert registry.get("oval") is registry.get("oval")
    assert type(registry.get("oval")).__name__ == "Oval"


def test_a_collision_names_both_origins_and_changes_nothing():
    registry: Registry[object] = Registry("shape")
    first = Square()
    registry.register("square", first)
    with pytest.raises(ClearValueError) as caught:
        registry.register("square", "other:SQUARE")
    assert registry.origin("square") in str(caught.value)
    assert "other:SQUARE" in str(caught.value)
    assert registry.get("square") is first


@pytest.mark.parametrize("name", ["", " square", "square ", 3])
def test_names_are_checked(name):
    with pytest.raises(ClearValueError, match="name"):
        Registry("shape").register(name, Square())


@pytest.mark.parametrize("entry", ["square", "shapes.SQUARE", "shapes:", ":SQUARE", "a b:C"])
def test_a_string_must_be_a_lazy_entry(entry):
    with pytest.raises(ClearValueError, match="module:NAME"):
        Registry("shape").register("square", entry)


def test_the_base_class_is_checked_on_registration():
    registry: Registry[object] = Registry("shape", instance_of=Shape)
    for wrong in (3, Square):
        with pytest.raises(ClearTypeError, match="must be a Shape"):
            registry.register("square", wrong)
    classes: Registry[object] = Registry("shape", subclass_of=Shape)
    classes.register("square", Square)
    for wrong in (int, Square()):
        with pytest.raises(ClearTypeError, match="subclass of Shape"):
            classes.register("other", wrong)
    assert registry.names() == []
    assert classes.names() == ["square"]


def test_the_base_class_of_a_lazy_entry_is_checked_on_resolution():
    registry: Registry[object] = Registry("shape", instance_of="decimal:Decimal")
    registry.register("fraction", "fractions:Fraction")
    with pytest.raises(ClearTypeError, match=r"'fraction' of fractions:Fraction must be a Decimal"):
        registry.get("fraction")


def test_a_miss_suggests_typing_errors_and_other_capitals():
    registry: Registry[object] = Registry("shape")
    for name in ("square", "Circle"):
        registry.register(name, Square())
    with pytest.raises(UnknownNameError) as caught:
        registry.get("sqaure")
    assert str(caught.value) == "Unknown shape 'sqaure'. Did you mean 'square'? Known: Circle, square."
    with pytest.raises(UnknownNameError, match="mean 'Circle'"):
        registry.origin("CIRCLE")
    with pytest.raises(KeyError):
        registry.unregister("circle")


def test_a_long_list_is_not_printed():
    known = [f"name{i}" for i in range(100)]
    assert "mean 'JPEG'" in str(unknown_name("shape", "jpeg", ["JPEG", "PNG"]))
    assert "100 known names" in str(unknown_name("shape", "zzz", known))
    assert "Did you mean" in str(unknown_name("shape", "name7", known))
    assert str(unknown_name("shape", "x", [], hint="Install one.")).endswith(
        "No shape is registered. Install one."
    )


def test_unregister_frees_the_name():
    registry: Registry[object] = Registry("shape")
    registry.register("square", Square())
    registry.unregister("square")
    assert registry.names() == []
    registry.register("square", Square())


@pytest.mark.parametrize("target", ["no_such_module:X", "math:no_such_name"])
def test_a_broken_lazy_entry_is_reported_by_name(target):
    registry: Registry[object] = Registry("shape")
    registry.register("broken", target)
    with pytest.raises(BrokenEntryError, match=f"'broken' of {target}") as caught:
        registry.get("broken")
    assert isinstance(caught.value, ClearError)
    assert isinstance(caught.value, ImportError)
    assert caught.value.__cause__ is not None


def test_an_entry_point_is_listed_without_import_and_loaded_on_get(site):
    install(site, "shape-pack", {"oval": "shape_pack:OVAL"}, {"shape_pack": "OVAL = object()\n"})
    registry: Registry[object] = Registry("shape", group=GROUP)
    assert registry.names() == ["oval"]
    assert "oval" in registry
    assert registry.origin("oval") == "shape-pack 1.0 (shape_pack:OVAL)"
    assert "shape_pack" not in sys.modules
    assert registry.get("oval") is registry.get("oval")
    assert "shape_pack" in sys.modules
    assert Registry("shape").names() == []


def test_a_broken_plugin_is_reported_when_asked_for_and_breaks_only_itself(site):
    install(site, "bad-pack", {"bad": "bad_pack:X"}, {"bad_pack": "raise RuntimeError('boom')\n"})
    registry: Registry[object] = Registry("shape", group=GROUP)
    registry.register("square", Square())
    assert registry.names() == ["bad", "square"]
    assert isinstance(registry.get("square"), Square)
    with pytest.raises(BrokenEntryError, match=r"'bad' of bad-pack 1\.0 .*RuntimeError: boom"):
        registry.get("bad")


def test_a_plugin_of_the_wrong_class_is_refused(site):
    install(site, "odd-pack", {"odd": "odd_pack:X"}, {"odd_pack": "X = 3\n"})
    registry: Registry[object] = Registry("shape", group=GROUP, instance_of=Shape)
    with pytest.raises(ClearTypeError, match="odd-pack"):
        registry.get("odd")


def test_a_plugin_cannot_shadow_what_is_registered_in_code(site):
    source = "raise RuntimeError('must not be imported')\n"
    install(site, "evil-pack", {"square": "evil_pack:X"}, {"evil_pack": source})
    registry: Registry[object] = Registry("shape", group=GROUP)
    square = Square()
    registry.register("square", square)
    with pytest.warns(UserWarning, match=r"evil-pack 1\.0 .* is ignored: .*test_registry\.py"):
        assert registry.get("square") is square
    assert registry.names() == ["square"]


def test_two_plugins_of_one_name_are_an_error_that_names_both(site):
    install(site, "pack-one", {"oval": "one:X"}, {"one": "X = 1\n"})
    install(site, "pack-two", {"oval": "two:X"}, {"two": "X = 2\n"})
    registry: Registry[object] = Registry("shape", group=GROUP)
    with pytest.raises(ClearValueError) as caught:
        registry.get("oval")
    assert "pack-one 1.0" in str(caught.value)
    assert "pack-two 1.0" in str(caught.value)


def test_a_registry_asks_for_entry_points_only_when_used(monkeypatch):
    def refuse(**_: object) -> None:
        raise AssertionError("entry points were read")

    monkeypatch.setattr(metadata, "entry_points", refuse)
    registry: Registry[object] = Registry("shape", group=GROUP)
    registry.register("square", Square())
    assert registry.origin("square")
    with pytest.raises(AssertionError, match="entry points"):
        registry.names()


def test_the_module_loads_nothing_heavy():
    code = """
        import sys
        import clear_adapters.registry
        print(sorted({"torch", "numpy", "PIL"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip() == "[]"
