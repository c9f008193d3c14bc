"""The house: imports point down, or sideways; nothing in the library knows demo, benchmarks or tests."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "clear_adapters"

LAYERS = {
    7: [
        "cli",
        "cli_bench",
        "cli_data",
        "cli_demo",
        "cli_options",
        "cli_train",
        "quickstart",
        "ui/",
        "contract/",
    ],
    6: ["training/", "mmd_bench/"],
    5: ["datasets/", "rewards/"],
    4: ["adapter", "attached", "engine", "rollout", "reply", "replay"],
    3: ["backbones/*/", "hub/"],
    2: [
        *("backbones/__init__", "backbones/base", "backbones/packed", "backbones/attention"),
        *(
            "backbones/cache",
            "backbones/writer",
            "backbones/layout",
            "backbones/byte_tokenizer",
            "backbones/random_weights",
        ),
        *("backbones/codes", "backbones/code_writer", "backbones/codes_packing", "backbones/decoder"),
        *("backbones/pixels", "backbones/checkpoints", "backbones/facts", "backbones/state"),
        *("backbones/fast", "backbones/quantized", "backbones/rows", "backbones/spans", "lora_linear"),
        *("backbones/joined", "backbones/graphs"),
        *("lora", "bridge", "store"),
    ],
    1: [
        *(
            "registry",
            "config",
            "transcript",
            "prompts",
            "sampling",
            "scoring",
            "endpoint",
            "results",
            "images",
            "download",
            "safety",
            "journal",
            "workers",
        ),
        *("degradations/", "world/"),
    ],
    0: ["errors", "_version"],
}
"""A module, or with a slash a folder whole; the package's own `__init__` stands above all, as its front door."""

FRONT = 8
OUTSIDE = ("demo", "benchmarks", "tests")
MODULES = sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> tuple[int, str]:
    """Return the layer of a module and the part of the house it belongs to: its own file, or its folder."""
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    if name == "__init__":
        return FRONT, name
    for layer, parts in LAYERS.items():
        for part in parts:
            if part == name:
                return layer, part
            if part == "backbones/*/" and name.startswith("backbones/") and name.count("/") > 1:
                return layer, name[: name.index("/", len("backbones/")) + 1]
            if part.endswith("/") and name.startswith(part):
                return layer, part
    pytest.fail(f"{name}: which layer? Give the new module a place in DESIGN and in LAYERS of {__file__}.")


def imports(path: Path, *, at_import_only: bool = False) -> Iterator[tuple[str, int]]:
    """Yield every dotted name that a module imports, with its line.

    Of `from a import b` it is `a.b`. `at_import_only` leaves out what is imported within functions or for type
    checkers only.
    """
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if at_import_only and function:
            continue
        todo.extend(node.orelse if at_import_only and typing_only else ast.iter_child_nodes(node))


def module_file(name: str) -> Path | None:
    """Return the file of the module that `clear_adapters.a.b` imports: that of a.b, else of a, else the front door."""
    parts = name.split(".")
    if parts[0] != PACKAGE.name:
        return None
    for length in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[1:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def allowed(importer: Path, imported: Path) -> bool:
    layer, part = place(importer)
    other_layer, other_part = place(imported)
    if other_layer != layer:
        return other_layer < layer
    # Sideways: within a folder; between single files of a layer; between them and a folder. Not from folder to folder.
    return part == other_part or not (part.endswith("/") and other_part.endswith("/"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down_or_sideways(path):
    place(path)
    wrong = []
    for name, line in imports(path):
        if name.split(".")[0] in OUTSIDE:
            wrong.append(f"line {line}: {name} is no part of the library")
        file = module_file(name)
        if file is not None and not allowed(path, file):
            (layer, part), (other_layer, other_part) = place(path), place(file)
            wrong.append(f"line {line}: {part} (layer {layer}) imports {other_part} (layer {other_layer})")
    assert not wrong, "\n".join(wrong)


def test_no_cycle_at_import():
    graph = {
        path: {
            file
            for name, _ in imports(path, at_import_only=True)
            if (file := module_file(name)) not in (None, path)
        }
        for path in MODULES
    }
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        if path in trail:
            cycle = [str(step.relative_to(PACKAGE)) for step in (*trail[trail.index(path) :], path)]
            pytest.fail(f"modules import each other: {' -> '.join(cycle)}")
        if path not in done:
            for following in graph[path]:
                visit(following, (*trail, path))
            done.add(path)

    for path in MODULES:
        visit(path, ())


def test_the_walk_sees_every_form_of_import(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        "import clear_adapters.errors\n"
        "from clear_adapters import images\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from clear_adapters.registry import Registry\n"
        "def f():\n    from clear_adapters.results import read_result\n"
    )
    every = {name for name, _ in imports(module)}
    assert {module_file(name) for name in every} - {None} == {
        PACKAGE / f"{name}.py" for name in ("errors", "images", "registry", "results")
    }
    direct = {name for name, _ in imports(module, at_import_only=True)}
    assert direct == {"clear_adapters.errors", "clear_adapters.images", "typing.TYPE_CHECKING"}


@pytest.mark.parametrize(
    ("importer", "imported", "expected"),
    [
        ("engine", "bridge", True),
        ("bridge", "engine", False),
        ("adapter", "engine", True),
        ("bridge", "backbones/base", True),
        ("degradations/noise", "images", True),
        ("degradations/noise", "world/scene", False),
        ("backbones/bagel/model", "backbones/bagel/cache", True),
        ("backbones/bagel/model", "backbones/janus/model", False),
        ("backbones/bagel/model", "backbones/base", True),
        ("backbones/__init__", "backbones/bagel/__init__", False),
        ("training/loop", "mmd_bench/tasks", False),
        ("cli", "__init__", False),
        ("__init__", "engine", True),
    ],
)
def test_the_rule(importer, imported, expected):
    assert allowed(PACKAGE / f"{importer}.py", PACKAGE / f"{imported}.py") is expected


def test_a_module_without_a_layer_fails():
    with pytest.raises(pytest.fail.Exception, match="which layer"):
        place(PACKAGE / "helpers.py")
