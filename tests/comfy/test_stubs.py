"""The type stubs in typings/ against the modules of the ComfyUI under test."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

TYPINGS = Path(__file__).parents[2] / "typings"
STUBS = sorted(TYPINGS.rglob("*.pyi"))
# conftest.py replaces the server module; older ComfyUI versions lack search_aliases.
REPLACED, NEWER = {"server"}, {"search_aliases"}


def stubbed(body: list[ast.stmt], prefix: str = "") -> list[tuple[str, set[str]]]:
    """Every public class, function and module attribute of a stub, with its parameters."""
    found: list[tuple[str, set[str]]] = []
    for entry in body:
        if isinstance(entry, ast.ClassDef) and not entry.name.startswith("_"):
            found += [(f"{prefix}{entry.name}", set()), *stubbed(entry.body, f"{prefix}{entry.name}.")]
        elif isinstance(entry, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*entry.args.args, *entry.args.kwonlyargs]
            found.append((f"{prefix}{entry.name}", {a.arg for a in arguments} - {"self"}))
        elif isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and not prefix:
            found.append((entry.target.id, set()))
    return found


@pytest.mark.parametrize("path", STUBS, ids=lambda path: path.relative_to(TYPINGS).as_posix())
def test_every_stubbed_name_and_parameter_exists(bridge, path):
    name = ".".join(path.relative_to(TYPINGS).with_suffix("").parts).removesuffix(".__init__")
    if name in REPLACED:
        pytest.skip("conftest.py replaces this module")
    parent, _, last = name.rpartition(".")
    # comfy_api.latest.io and .ui are attributes, not importable modules.
    module = getattr(importlib.import_module(parent), last, None) if parent else None
    module = module or importlib.import_module(name)
    for qualified, parameters in stubbed(ast.parse(path.read_text()).body):
        found = module
        for part in qualified.split("."):
            assert hasattr(found, part), f"{name}.{qualified}"
            found = getattr(found, part)
        if parameters:
            known = inspect.signature(found).parameters
            assert parameters - NEWER <= known.keys(), f"{name}.{qualified}: {parameters - known.keys()}"
