"""Finds the files of the frozen backbones in ComfyUI's models folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import folder_paths
import torch

from ...echodistill_core.errors import InputError
from ...echodistill_core.models.hub import HUB, cached_folder
from ...echodistill_core.perception.backbones import SPECS
from ...echodistill_core.perception.files import PROJECTOR, choose, choose_projector
from ...echodistill_core.perception.load import BackboneFiles

FOLDER = "echodistill"  # sub-folder of ComfyUI's models folder, for files that belong in no other


def register_folder() -> None:
    """Register models/echodistill with ComfyUI, in addition to the folders in extra_model_paths.yaml."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def find_backbones(names: Iterable[str]) -> dict[str, BackboneFiles]:
    """The files of each backbone, from models/echodistill, clip_vision, ipadapter or the hub cache.

    Raises InputError that lists all missing backbones with their sizes and the download command.
    """
    backbone_files, missing = search_backbones(names)
    if missing:
        raise InputError(missing)
    return backbone_files


def search_backbones(names: Iterable[str]) -> tuple[dict[str, BackboneFiles], str]:
    """The files of the backbones that were found, and a message about the missing ones ("" if none is missing)."""
    reasons: list[str] = []
    found = {name: _find(name, reasons) for name in dict.fromkeys(names)}
    missing = [name for name, files in found.items() if files is None]
    text = ""
    if missing:
        wanted = ", ".join(f"{SPECS[n].title} ({n}, {_gigabytes(n):.1f} GB, {HUB[n].repo})" for n in missing)
        searched = ", ".join(str(p) for kind in (FOLDER, "clip_vision", "ipadapter") for p in _folders(kind))
        text = (
            f"backbones are missing: {wanted}. Nothing is downloaded unasked; run: python -m echodistill_core download "
            f"{' '.join(missing)} (in this pack's folder, with ComfyUI's Python), or put their files into "
            f"{_folders(FOLDER)[0]}. Looked in {searched}, and in the hub cache."
        )
        text = " ".join([text, *(f"{reason}." for reason in reasons)])
    return {name: files for name, files in found.items() if files is not None}, text


def _find(name: str, reasons: list[str]) -> BackboneFiles | None:
    """The files of a backbone, or None; `reasons` then gets the reason for each rejected candidate."""
    rejected: list[str] = []
    for kind in (FOLDER, "clip_vision"):
        path, why = choose(name, _candidates(name, kind))
        rejected += why
        if path is not None and (files := _with_projector(name, path)) is not None:
            return files
        if path is not None:
            rejected.append(f"{path} is there, but no {PROJECTOR} of IP-Adapter that fits it")
    cached = cached_folder(name)
    if cached is None:
        reasons += rejected
    return None if cached is None else BackboneFiles(cached)


def _candidates(name: str, kind: str) -> list[tuple[Path, str]]:
    """Candidate files and folders in ComfyUI's folders of this kind, each with its path relative to the folder."""
    found = []
    for folder in _folders(kind):
        if folder.is_dir():
            paths = [path for path in (folder / name,) if path.is_dir()] + sorted(folder.rglob("*.safetensors"))
            found += [(path, path.relative_to(folder).as_posix()) for path in paths]
    return found


def _with_projector(name: str, encoder: Path) -> BackboneFiles | None:
    """An encoder's files; None if it needs IP-Adapter's projector and that was not found."""
    if SPECS[name].projector is None:
        return BackboneFiles(encoder)
    folders = [*([encoder] if encoder.is_dir() else []), *_folders(FOLDER), *_folders("ipadapter")]
    candidates = [path for folder in folders if folder.is_dir() for path in sorted(folder.rglob(PROJECTOR))]
    projector = choose_projector(name, candidates)
    return None if projector is None else BackboneFiles(encoder, projector)


def _gigabytes(name: str) -> float:
    """The size of a backbone's published float32 weights, in GB (10^9 bytes)."""
    with torch.device("meta"):
        encoder = SPECS[name].build(SPECS[name].config)
    return sum(p.numel() for p in encoder.parameters()) * 4 / 1e9


def _folders(kind: str) -> list[Path]:
    """ComfyUI's folders of one kind of model. `ipadapter` belongs to another pack and may not be registered."""
    known = folder_paths.folder_names_and_paths.get(kind)
    if known is None:
        return [Path(folder_paths.models_dir) / kind]
    return [Path(path) for path in known[0]]
