"""Loads the frozen backbones from a user's folder, given files, the hub cache, or as tiny random networks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn
from transformers import CLIPConfig, ViTModel

from ..errors import InputError
from ..files import why_missing
from ..logs import logger
from ..messages import quoted, shortened
from ..models.embedded import embedded_folder
from ..models.finite import check_finite
from ..models.hub import cached_folder
from ..models.quantized import dequantized
from ..models.tiny import random_weights
from ..settings import nearest
from ..tensorfile import read_tensors
from .backbones import MINIATURE_SPECS, SPECS, TINY_SPECS, Backbone, BackboneSpec
from .conversion import in_transformers_names
from .files import PROJECTOR, activation_mismatch, encoder_in, projector_mismatch, projector_name, tensors_in
from .layouts import TIMM, TRANSFORMERS, network_expected, network_mismatch, network_of

log = logger(__name__)

# timm's and Meta's layer norms, with which DINO was trained; the published transformers folder has 1e-12.
TIMM_EPS = 1e-6


@dataclass(frozen=True)
class BackboneFiles:
    """Paths of a backbone: the encoder, and IP-Adapter's projector where it is a separate file (`load_backbone`)."""

    encoder: Path
    projector: Path | None = None


@torch.inference_mode(False)
def load_backbones(wanted: Mapping[str, str], source: str | Mapping[str, BackboneFiles] = "") -> dict[str, Backbone]:
    """Load several backbones, frozen, on the CPU in the files' precision.

    wanted: role -> name in SPECS, as training.build.needed_backbones returns it. The result has the same roles.
    source: "tiny" for small random networks; "miniature" for the embedded family's; a folder with one subfolder or file
        for each name; "" for the hub cache; or a mapping from name to files.
    Raises InputError for an unknown name, and naming all missing backbones with the command that downloads them.
    """
    for name in wanted.values():
        if name not in SPECS:
            raise InputError(
                f"there is no backbone named {quoted(name)}{nearest(name, SPECS)}; expected one of {', '.join(SPECS)}."
            )
    backbones = _load_all(wanted, source)
    for role, backbone in backbones.items():
        dtype = next(backbone.parameters()).dtype
        log.info("backbone %s: %s, %d features, %s", role, backbone.spec.title, backbone.width, dtype)
    return backbones


def _load_all(wanted: Mapping[str, str], source: str | Mapping[str, BackboneFiles]) -> dict[str, Backbone]:
    if source == "tiny":
        return {role: tiny_backbone(name) for role, name in wanted.items()}
    if source == "miniature":
        # The miniature family has one DINO v2 for both sizes.
        names = {role: name.removesuffix("-small") for role, name in wanted.items()}
        folder = embedded_folder("backbones")
        for name in names.values():
            if name not in MINIATURE_SPECS:
                raise InputError(
                    f"the miniature family has no backbone {quoted(name)}, only {', '.join(MINIATURE_SPECS)}; choose "
                    "another family or turn the loss term off that uses it."
                )
        return {role: load_backbone(name, folder / name, specs=MINIATURE_SPECS) for role, name in names.items()}
    if isinstance(source, str):
        found = {name: _find(name, source) for name in wanted.values()}
        backbone_files = {name: BackboneFiles(path) for name, path in found.items() if path is not None}
        where = f"the folder {source} or the hub cache" if source else "the hub cache"
    else:
        backbone_files, where = dict(source), "the folders that were given"
    missing = [name for name in wanted.values() if name not in backbone_files]
    if missing:
        titles = ", ".join(f"{SPECS[n].title} ({n})" for n in missing)
        raise InputError(
            f"backbones are missing: {titles}; looked in {where}. Run: echodistill download {' '.join(missing)}"
        )
    for name, files in backbone_files.items():
        if name in wanted.values():
            log.debug("files of backbone %s: %s, projector %s", name, shortened(files.encoder), files.projector)
    return {
        role: load_backbone(name, backbone_files[name].encoder, backbone_files[name].projector)
        for role, name in wanted.items()
    }


def load_backbone(
    name: str, place: Path, projector: Path | None = None, *, specs: Mapping[str, BackboneSpec] | None = None
) -> Backbone:
    """Load one backbone from a folder or a safetensors file, in any layout of `layouts`.

    A folder is transformers' (config.json and model.safetensors), OpenCLIP's or timm's. A CLIP's text encoder in the
    same file is ignored. Layer norms of timm's and Meta's layouts get their epsilon of 1e-6.
    projector: IP-Adapter's file, for a backbone with a projector; None to search the folder.
    specs: the table with `name`; None for SPECS.
    Raises InputError for another network, naming it, and for missing tensors.
    """
    spec = (SPECS if specs is None else specs)[name]
    if spec.projector is not None and place.is_dir():
        projector = projector or next(iter(sorted(place.rglob(PROJECTOR))), None)
    encoder = _encoder(spec, encoder_in(place, spec))
    if spec.projector is None:
        return Backbone(spec, encoder)
    if projector is None:
        raise InputError(
            f"{place} holds no ip-adapter_sd15.safetensors, whose projector the identity loss needs; put it there."
        )
    # IP-Adapter publishes its projector in half precision and the encoder in single.
    head = _projector(spec, read_tensors(projector), projector).to(next(encoder.parameters()).dtype)
    return Backbone(spec, encoder, head)


def tiny_backbone(name: str) -> Backbone:
    """The small random backbone of this name; equal weights in every call."""
    if name not in TINY_SPECS:
        raise InputError(
            f"the tiny family has no backbone {quoted(name)}, only {', '.join(TINY_SPECS)}; register a small "
            "specification in perception.backbones.TINY_SPECS."
        )
    spec = TINY_SPECS[name]
    seed = 10 + list(TINY_SPECS).index(name)
    with torch.random.fork_rng(devices=[]):  # the constructors draw initial weights
        encoder = spec.build(spec.config)
        projector = None if spec.projector is None else ImageProjection(**spec.projector)
    for module in (encoder, projector):
        if module is not None:
            module.load_state_dict(random_weights(module.state_dict(), seed))
    return Backbone(spec, encoder, projector)


def _find(name: str, source: str) -> Path | None:
    if source:
        root = Path(source)
        if not root.is_dir():
            raise InputError(
                f"backbones folder {source} {why_missing(root)}; expected one subfolder or .safetensors file each."
            )
        for place in (root / name, root / f"{name}.safetensors"):
            if place.exists():
                return place
    return cached_folder(name)


def _encoder(spec: BackboneSpec, place: Path) -> nn.Module:
    with torch.device("meta"):
        empty = spec.build(spec.config)
    cls, expected = type(empty), empty.state_dict()
    tensors = dict(dequantized(tensors_in(place), {}, str(place)))
    whole = [name for name, tensor in tensors.items() if tensor.ndim > 1 and not tensor.is_floating_point()]
    if [name for name in whole if not name.endswith("position_ids")]:
        raise InputError(
            f"{place}: tensor {shortened(whole[0])} holds whole numbers; take the file without quantisation."
        )
    # Other architectures are read under transformers' names alone.
    known = network_expected(spec) is not None
    found = network_of({n: tuple(t.shape) for n, t in tensors.items()}) if known else None
    if found is not None:
        if reason := network_mismatch(found, spec):
            raise InputError(f"{place} is {reason}; choose another file or run: echodistill download {spec.name}")
        tensors = in_transformers_names(tensors, found, with_text=isinstance(spec.config, CLIPConfig))
    if place.is_dir() and (found is None or found.layout == TRANSFORMERS):
        config = _config(cls, place)
    else:
        config = copy.deepcopy(spec.config)
        if found is not None and found.layout == TIMM:
            config.layer_norm_eps = TIMM_EPS
    if reason := activation_mismatch(place, spec):
        raise InputError(f"{reason}; choose another file or run: echodistill download {spec.name}")
    # The file's precision, not the configuration's. Some versions of transformers still load float32.
    config.dtype = dtype = _precision(tensors)
    # from_pretrained, not load_state_dict: it maps tensor names of earlier versions of transformers.
    options = {"add_pooling_layer": False} if cls is ViTModel else {}
    encoder, info = cls.from_pretrained(  # type: ignore[attr-defined]
        None, config=config, state_dict=tensors, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    # A folder's own configuration may have built another model.
    built = {n: t.shape for n, t in encoder.state_dict().items()}
    absent = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    absent.update(n for n, like in expected.items() if built.get(n) != like.shape)
    if absent:
        raise InputError(
            f"{place} is no {spec.title}: {len(absent)} tensors are missing or of another shape, the first "
            f"{min(absent)}; run: echodistill download {spec.name}"
        )
    check_finite(encoder.state_dict(), {}, str(place))
    return encoder.to(dtype)


def _precision(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most values: OpenCLIP stores the norms of half-precision networks in float32."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            numbers[tensor.dtype] += tensor.numel()
    return max(numbers, key=lambda dtype: numbers[dtype], default=torch.float32)


def _config(cls: Any, folder: Path) -> Any:
    try:
        return cls.config_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read; download the backbone again.") from error


def _projector(spec: BackboneSpec, tensors: Mapping[str, Tensor], path: Path) -> ImageProjection:
    assert spec.projector is not None
    if reason := projector_mismatch({n: tuple(t.shape) for n, t in tensors.items()}, spec):
        raise InputError(f"{path} holds no projector of {spec.title}: {reason}; expected {PROJECTOR} of IP-Adapter.")
    with torch.device("meta"):
        projector = ImageProjection(**spec.projector)
    projector.load_state_dict({projector_name(n): t for n, t in tensors.items() if projector_name(n)}, assign=True)
    check_finite(projector.state_dict(), {}, str(path))
    return projector
