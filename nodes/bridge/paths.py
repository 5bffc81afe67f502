"""Resolves names from widgets to paths inside ComfyUI's folders.

Anyone who can reach the server can queue a prompt. So a name from a widget must be in a list made by this module, and
its real path, with links followed, must lie inside the listed folder. The check is written by hand for safety, so that
it does not depend on ComfyUI's version.
"""

from __future__ import annotations

import re
from pathlib import Path

import folder_paths

from ...echodistill_core.adapter.file import FORMAT
from ...echodistill_core.concept.photographs import find_photographs
from ...echodistill_core.errors import InputError
from ...echodistill_core.messages import quoted
from ...echodistill_core.tensorfile import read_header

NONE = "none"
RUNS = "echodistill"  # sub-folder of the output folder
DEPTH = 3  # levels of sub-folders that are listed

_headers: dict[tuple[str, float, int], bool] = {}


def input_folders() -> list[str]:
    """Relative paths of the sub-folders of ComfyUI's input folder, with "/" between levels, up to DEPTH levels deep."""
    root = Path(folder_paths.get_input_directory())
    found: list[str] = []
    level = [root]
    for _ in range(DEPTH):
        level = sorted(p for folder in level for p in _folders_in(folder) if _inside(p, root))
        found += [p.relative_to(root).as_posix() for p in level]
    return sorted(found)


def input_folder(name: str) -> Path:
    """The path of a listed sub-folder of the input folder. Raises InputError for any other name."""
    root = Path(folder_paths.get_input_directory())
    if name not in input_folders():
        raise InputError(
            f"{quoted(name)} is no folder of ComfyUI's input folder {root}; put the photographs into a folder there, "
            "press R to have it listed, and choose it. Other places of the disk are not read."
        )
    return root / name


def adapter_names() -> list[str]:
    """The EchoDistill adapters in ComfyUI's `loras` folders (output/loras among them), by their listed names."""
    return [name for name in folder_paths.get_filename_list("loras") if _is_adapter(name)]


def adapter_path(name: str) -> Path:
    """The path of a listed adapter. Raises InputError if it is no adapter, is gone, or lies outside its folder."""
    found = folder_paths.get_full_path("loras", name) if name in folder_paths.get_filename_list("loras") else None
    roots = [Path(root) for root in folder_paths.get_folder_paths("loras")]
    if found is None or not any(_inside(Path(found), root) for root in roots):
        raise InputError(
            f"the adapter {quoted(name)} is not in ComfyUI's loras folders ({', '.join(map(str, roots))}); it was "
            "moved or deleted since the list was made: press R to have the list made again, and choose another."
        )
    if not _is_adapter(name):
        raise InputError(f"{name} is no EchoDistill adapter; load it with ComfyUI's own Load LoRA.")
    return Path(found)


def run_folder(class_noun: str, fingerprint: str) -> Path:
    """The folder of the run with this fingerprint: output/echodistill/<noun>-<fingerprint>."""
    noun = re.sub(r"[^\w-]+", "-", class_noun.strip().lower()).strip("-")[:40] or "concept"
    return Path(folder_paths.get_output_directory()) / RUNS / f"{noun}-{fingerprint}"


def folder_state(folder: Path) -> list[tuple[str, int, int]]:
    """Names, modification times (ns) and sizes (bytes) of a folder's photographs, to detect changes."""
    return [(p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in find_photographs(folder)]


def _folders_in(folder: Path) -> list[Path]:
    try:
        return [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    except OSError:
        return []


def _inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _is_adapter(name: str) -> bool:
    path = folder_paths.get_full_path("loras", name)
    if path is None or not name.endswith(".safetensors"):
        return False
    try:
        stat = Path(path).stat()
        key = (path, stat.st_mtime, stat.st_size)
        if key not in _headers:
            _headers[key] = read_header(Path(path)).metadata.get("format") == FORMAT
        return _headers[key]
    except (OSError, InputError):
        return False
