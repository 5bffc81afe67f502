"""Where the frozen backbones come from: a folder of the user's, files, the hub cache, or tiny random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn

from ..errors import InputError
from ..models.hub import cached_folder
from ..models.tiny import random_weights
from ..tensorfile import read_tensors
from .backbones import SPECS, TINY_SPECS, Backbone, Spec

# IP-Adapter's own names of its image projector, and diffusers'.
_PROJECTOR_NAMES = {
    "image_proj.proj.weight": "image_embeds.weight",
    "image_proj.proj.bias": "image_embeds.bias",
    "image_proj.norm.weight": "norm.weight",
    "image_proj.norm.bias": "norm.bias",
}


def load_backbones(wanted: Mapping[str, str], source: str = "") -> dict[str, Backbone]:
    """Load several backbones, frozen, on the CPU in the files' precision.

    wanted: role -> name in SPECS, as training.state.needed_backbones returns it. The result has the same roles.
    source: "tiny" for small random ones; a folder with one subfolder or file for each name; or "" for the hub cache.
    Raises InputError naming everything that is missing at once and the command that gets it.
    """
    if source == "tiny":
        return {role: tiny_backbone(name) for role, name in wanted.items()}
    places: dict[str, Path] = {}
    missing = []
    for name in wanted.values():
        place = _find(name, source)
        if place is None:
            missing.append(name)
        else:
            places[name] = place
    if missing:
        titles = ", ".join(f"{SPECS[n].title} ({n})" for n in missing)
        where = f"the folder {source} or the hub cache" if source else "the hub cache"
        raise InputError(
            f"backbones are missing: {titles}; looked in {where}. Run: echodistill download {' '.join(missing)}"
        )
    return {role: load_backbone(name, places[name]) for role, name in wanted.items()}


def load_backbone(name: str, place: Path, projector: Path | None = None) -> Backbone:
    """One backbone from a folder in transformers' format or a single safetensors file with its tensors.

    projector: IP-Adapter's file for a backbone that has one; otherwise looked for in the folder.
    Raises InputError where tensors are missing or of other shapes.
    """
    spec = SPECS[name]
    encoder_place = place
    if spec.projector is not None and place.is_dir():
        projector = projector or next(iter(sorted(place.rglob("ip-adapter_sd15.safetensors"))), None)
        encoder_place = next((p.parent for p in sorted(place.rglob("image_encoder/config.json"))), place)
    encoder = _encoder(spec, encoder_place)
    if spec.projector is None:
        return Backbone(spec, encoder)
    if projector is None:
        raise InputError(
            f"{place} holds no ip-adapter_sd15.safetensors, whose projector the identity loss needs; put it there."
        )
    return Backbone(spec, encoder, _projector(spec, read_tensors(projector), projector))


def tiny_backbone(name: str) -> Backbone:
    """A small random backbone under this name, always the same."""
    spec = TINY_SPECS[name]
    seed = 10 + list(TINY_SPECS).index(name)
    encoder = spec.build(spec.config)
    encoder.load_state_dict(random_weights(encoder.state_dict(), seed))
    projector = None
    if spec.projector is not None:
        projector = ImageProjection(**spec.projector)
        projector.load_state_dict(random_weights(projector.state_dict(), seed))
    return Backbone(spec, encoder, projector)


def _find(name: str, source: str) -> Path | None:
    if source:
        root = Path(source)
        if not root.is_dir():
            raise InputError(
                f"backbones folder {source} does not exist; expected one subfolder or .safetensors file each."
            )
        for place in (root / name, root / f"{name}.safetensors"):
            if place.exists():
                return place
    return cached_folder(name)


def _encoder(spec: Spec, place: Path) -> nn.Module:
    cls = spec.build if isinstance(spec.build, type) else type(_on_meta(spec))
    if place.is_dir():
        if not list(place.glob("*.safetensors")):
            raise InputError(
                f"{place} holds no .safetensors file of {spec.title}; pickles are not opened, convert them."
            )
        options = {"add_pooling_layer": False} if cls.__name__ == "ViTModel" else {}
        encoder, info = cls.from_pretrained(  # type: ignore[attr-defined]
            place, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
        absent = sorted(info["missing_keys"])
    else:
        expected = _on_meta(spec).state_dict()
        tensors = _strip_to(read_tensors(place), expected)
        absent = [n for n, like in expected.items() if n not in tensors or tensors[n].shape != like.shape]
        if not absent:
            encoder = spec.build(spec.config)
            encoder.load_state_dict(tensors, assign=True)
    if absent:
        raise InputError(
            f"{place} is no {spec.title}: {len(absent)} tensors are missing or of another shape, the first {absent[0]}."
        )
    return encoder


def _on_meta(spec: Spec) -> nn.Module:
    with torch.device("meta"):
        return spec.build(spec.config)


def _strip_to(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are expected, whether or not one prefix (vit., dinov2.) stands before all names."""
    result = {}
    for name, tensor in tensors.items():
        _, _, bare = name.partition(".")
        if name in expected:
            result[name] = tensor
        elif bare in expected:
            result[bare] = tensor
    return result


def _projector(spec: Spec, tensors: Mapping[str, Tensor], path: Path) -> ImageProjection:
    assert spec.projector is not None
    projector = ImageProjection(**spec.projector)
    given = {own: tensors[name] for name, own in _PROJECTOR_NAMES.items() if name in tensors}
    expected = projector.state_dict()
    wrong = [n for n, like in expected.items() if n not in given or given[n].shape != like.shape]
    if wrong:
        raise InputError(
            f"{path} holds no projector of {spec.title}: {wrong[0]} is missing or of another shape; "
            "expected ip-adapter_sd15.safetensors of IP-Adapter."
        )
    projector.load_state_dict(given, assign=True)
    return projector
