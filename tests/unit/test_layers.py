"""Imports only go downwards in the list of layers in docs/architecture.md, and there are no cycles."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CORE = "echodistill_core"
PACKAGES = (CORE, "nodes", "benchmarks", "tools")


def modules(root, packages):
    """Module name -> file, for every Python file of the packages below root."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root, packages):
    """Module -> the modules of the packages that it imports, anywhere in the file, also for type checking alone."""
    known = modules(root, packages)
    result = {}
    for name, path in known.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
                submodules = {f"{base}.{alias.name}".strip(".") for alias in node.names} & known.keys()
                # `from ..models import layout` imports the module layout; other names are in the package itself.
                targets |= submodules | ({base} if len(submodules) < len(node.names) else set())
        result[name] = (targets & known.keys()) - {name}
    return result


def layer(module):
    """The folder of the core that a module is in, or the module itself where it is in none."""
    return module.split(".")[1] if "." in module else "__init__"


def upward(graph, order):
    """Imports within the core from a layer to one above it, as text."""
    return [
        f"{module} -> {target}"
        for module, targets in graph.items()
        for target in targets
        if layer(module) != layer(target) and order.index(layer(module)) > order.index(layer(target))
    ]


def listed_layers():
    """Layer -> its text, in the order of the list under the page's heading "The core"."""
    block = re.search(r"## The core\n.*?```\n(.*?)```", PAGE, re.DOTALL)[1]
    return dict(re.findall(r"^(\w+)(.*?)(?=^\w|\Z)", block, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def graph():
    return imports(ROOT, PACKAGES)


def test_the_page_lists_every_layer_and_every_module_of_the_core():
    layers = listed_layers()
    names = [name for name in modules(ROOT, [CORE]) if name != CORE]
    assert set(layers) == {layer(name) for name in names} | {"__init__"}
    unlisted = [n for n in names if not re.search(rf"\b{n.split('.')[-1]}\b", layers[layer(n)] + layer(n))]
    assert not unlisted


def test_the_page_names_every_node_benchmark_and_tool():
    rest = PAGE[PAGE.index("## The nodes") :]
    names = [name for name in modules(ROOT, PACKAGES[1:]) if "." in name]
    assert [name for name in names if not re.search(rf"\b{name.split('.')[-1]}\b", rest)] == []


def test_imports_of_the_core_only_go_downwards(graph):
    core = {m: {t for t in targets if t.startswith(CORE)} for m, targets in graph.items() if m.startswith(CORE)}
    assert sum(len(targets) for targets in core.values()) > 300  # the parser finds the imports
    assert upward(core, list(listed_layers())) == []


def test_no_import_is_part_of_a_cycle(graph):
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)


def test_the_core_imports_no_node_benchmark_or_tool(graph):
    assert [
        m for m, targets in graph.items() if m.startswith(CORE) and any(not t.startswith(CORE) for t in targets)
    ] == []


def test_the_bridge_imports_no_node(graph):
    bridge = {m: targets for m, targets in graph.items() if m.startswith("nodes.bridge")}
    assert bridge
    assert [
        m for m, targets in bridge.items() if any(t.startswith("nodes.") and "bridge" not in t for t in targets)
    ] == []


def test_files_and_functions_that_the_page_names_exist():
    named = re.findall(r"`([\w/]+\.py)`(?:: `([\w.]+)`)?", PAGE)
    assert len(named) > 25
    for path, function in named:
        file = next((p for p in (ROOT / path, ROOT / CORE / path) if p.is_file()), None)
        assert file is not None, path
        if function:
            assert re.search(rf"(def|class) {function.split('.')[-1]}\b", file.read_text(encoding="utf-8")), function


@pytest.fixture
def package(tmp_path):
    def write(**files):
        for name, text in files.items():
            path = tmp_path / CORE / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return imports(tmp_path, [CORE])

    return write


@pytest.mark.parametrize(
    "text",
    ["from ..high.a import f", "from ..high import a", "def f():\n    from ..high import a", f"import {CORE}.high.a"],
)
def test_an_upward_import_is_found_in_every_form(package, text):
    graph = package(high__a="", low__b=text)
    assert upward(graph, ["high", "low"]) == [f"{CORE}.low.b -> {CORE}.high.a"]
    assert upward(graph, ["low", "high"]) == []


def test_a_cycle_is_found(package):
    graph = package(low__a="from .b import f", low__b="def g():\n    from . import a")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()
