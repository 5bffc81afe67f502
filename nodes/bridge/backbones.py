"""Where the frozen backbones lie among ComfyUI's models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import folder_paths
import torch

from ...echodistill_core.errors import InputError
from ...echodistill_core.models.hub import HUB, cached_folder
from ...echodistill_core.perception.backbones import SPECS
from ...echodistill_core.perception.load import Place

FOLDER = "echodistill"  # of ComfyUI's models, for what no other folder holds
# How people name these files in models/clip_vision, where any name is possible; the loader checks what is in them.
_FILES = {
    "clip": re.compile(r"(clip-)?vit-h[-_]14|^model\.safetensors$", re.IGNORECASE),
    "dinov2": re.compile(r"dino_?v2.*(large|vitl)", re.IGNORECASE),
    "dinov2-small": re.compile(r"dino_?v2.*(small|vits)", re.IGNORECASE),
    "dino": re.compile(r"dino[-_]?(v1[-_])?vits?[-_]?16", re.IGNORECASE),
}
_PROJECTOR = "ip-adapter_sd15.safetensors"


def register_folder() -> None:
    """Make models/echodistill known to ComfyUI, beside what extra_model_paths.yaml names."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def find_backbones(names: Iterable[str]) -> dict[str, Place]:
    """Where each backbone is: models/echodistill, clip_vision, ipadapter, or the hub cache.

    Raises InputError naming all that are missing at once, with their sizes and the command that gets them.
    """
    places, missing = look_for(names)
    if missing:
        raise InputError(missing)
    return places


def look_for(names: Iterable[str]) -> tuple[dict[str, Place], str]:
    """The same as far as they are there, and in words what is missing; "" where nothing is."""
    found = {name: _find(name) for name in dict.fromkeys(names)}
    missing = [name for name, place in found.items() if place is None]
    text = ""
    if missing:
        wanted = ", ".join(f"{SPECS[n].title} ({n}, {_gigabytes(n):.1f} GB, {HUB[n].repo})" for n in missing)
        places = ", ".join(str(p) for kind in (FOLDER, "clip_vision", "ipadapter") for p in _folders(kind))
        text = (
            f"backbones are missing: {wanted}. Nothing is downloaded unasked; run: python -m echodistill_core download "
            f"{' '.join(missing)} (in this pack's folder, with ComfyUI's Python), or put their files into "
            f"{_folders(FOLDER)[0]}. Looked in {places}, and in the hub cache."
        )
    return {name: place for name, place in found.items() if place is not None}, text


def _find(name: str) -> Place | None:
    for folder in _folders(FOLDER):
        for path in (folder / name, folder / f"{name}.safetensors"):
            if path.is_dir():
                return Place(path)
            if path.is_file():
                return _with_projector(name, path)
    for folder in _folders("clip_vision"):
        for path in sorted(folder.rglob("*.safetensors")) if folder.is_dir() else ():
            pattern = _FILES.get(name)
            if pattern is not None and pattern.search(path.name) and (place := _with_projector(name, path)) is not None:
                return place
    cached = cached_folder(name)
    return None if cached is None else Place(cached)


def _with_projector(name: str, encoder: Path) -> Place | None:
    """The place of an encoder's file; None where it needs IP-Adapter's projector and that is nowhere."""
    if SPECS[name].projector is None:
        return Place(encoder)
    folders = [*_folders(FOLDER), *_folders("ipadapter")]
    candidates = [path for folder in folders if folder.is_dir() for path in sorted(folder.rglob(_PROJECTOR))]
    return Place(encoder, candidates[0]) if candidates else None


def _gigabytes(name: str) -> float:
    """The size of a backbone's weights in float32, as they are published."""
    with torch.device("meta"):
        encoder = SPECS[name].build(SPECS[name].config)
    return sum(p.numel() for p in encoder.parameters()) * 4 / 1e9


def _folders(kind: str) -> list[Path]:
    """ComfyUI's folders of one kind of model; `ipadapter` is another pack's, and may not be registered."""
    known = folder_paths.folder_names_and_paths.get(kind)
    if known is None:
        return [Path(folder_paths.models_dir) / kind]
    return [Path(path) for path in known[0]]
