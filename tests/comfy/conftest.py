"""One real ComfyUI server for all tests here, with photographs of two toys in its input folder."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

PACK = Path(__file__).parents[2]
CACHE = Path.home() / ".cache" / "echodistill"
# The requirements of ComfyUI without which the server does not start.
NEEDED = ("aiohttp", "torchsde", "av", "sqlalchemy", "websocket")
FRONT_END = "comfyui_frontend_package"


def find_comfyui() -> Path | None:
    """The ComfyUI to test with: COMFYUI_PATH, or the newest in the cache folder."""
    if given := os.environ.get("COMFYUI_PATH"):
        return Path(given)
    found = [p for p in CACHE.glob("comfyui-*") if (p / "main.py").is_file()]
    return max(found, key=lambda p: [int(n) for n in p.name.split("-")[1].split(".")], default=None)


def why_not() -> str:
    """Why no server can be started here; "" if one can."""
    comfyui = find_comfyui()
    if comfyui is None or not (comfyui / "main.py").is_file():
        return f"no ComfyUI at COMFYUI_PATH or in {CACHE}; run: sh tests/comfy/run VERSION"
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    # Every version pins its own front end, so tests/comfy/run installs it outside the environment.
    beside = Path(os.environ.get("COMFYUI_FRONT_END", ".")) / FRONT_END
    if not beside.is_dir() and importlib.util.find_spec(FRONT_END) is None:
        absent.append(FRONT_END)
    if absent:
        return f"ComfyUI's requirements are not installed ({', '.join(absent)}); run: sh tests/comfy/run VERSION"
    return ""


REASON = why_not()
collect_ignore_glob = ["test_*.py"] if REASON else []


def pytest_report_header() -> str:
    """The ComfyUI under test, or the reason for none."""
    return f"ComfyUI: {REASON or find_comfyui()}"


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the ComfyUI under test."""
    found = find_comfyui()
    assert found is not None
    return found


@pytest.fixture(scope="session")
def bridge(comfyui: Path) -> Any:
    """Modules of nodes/bridge by name, imported in this process as ComfyUI imports them, without a server."""
    sys.path.insert(0, str(comfyui))
    cli_args = importlib.import_module("comfy.cli_args")
    cli_args.args.cpu = True
    # ComfyUI's server module would import all of its nodes.
    stub = ModuleType("server")
    stub.PromptServer = SimpleNamespace(instance=None)  # type: ignore[attr-defined]
    sys.modules["server"] = stub
    spec = importlib.util.spec_from_file_location("pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pack"])
    return lambda name: importlib.import_module(f"pack.nodes.bridge.{name}")


@pytest.fixture(scope="session")
def core(bridge: Any) -> Any:
    """Modules of the core by name, as the modules of nodes/bridge import them."""
    return lambda name: importlib.import_module(f"pack.echodistill_core.{name}")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's folder: input, output, models, with photographs of two toys."""
    from echodistill_core.miniature.concepts import CONCEPTS, photographs

    folder = tmp_path_factory.mktemp("comfyui")
    for name, concept in (("mug", "dotted-mug"), ("cat", "striped-cat")):
        photos = folder / "input" / name
        photos.mkdir(parents=True)
        for i, photograph in enumerate(photographs(CONCEPTS[concept])):
            photograph.image.save(photos / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def server(comfyui: Path, base: Path) -> Iterator[Any]:
    """The server, running."""
    from comfy_server import Server

    running = Server(comfyui, base, base / "server.log").start()
    yield running
    running.kill()


@pytest.fixture(scope="session")
def info(server: Any) -> dict[str, Any]:
    """The server's description of every node (object_info)."""
    return dict(server.get("object_info"))
