"""Identifies the backbone in a file, by tensor names and shapes, and by the file name where those are equal."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from diffusers.models.embeddings import ImageProjection
from torch import Tensor

from ..errors import InputError
from ..models.checkpoint import weights_in
from ..tensorfile import read_header, read_tensors
from .backbones import SPECS, BackboneSpec
from .layouts import Shapes, network_expected, network_mismatch, network_of

_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
PROJECTOR = "ip-adapter_sd15.safetensors"

# IP-Adapter's names of its image projector -> diffusers' names.
_PROJECTOR_NAMES = {
    "image_proj.proj.weight": "image_embeds.weight",
    "image_proj.proj.bias": "image_embeds.bias",
    "image_proj.norm.weight": "norm.weight",
    "image_proj.norm.bias": "norm.bias",
}


def mismatch_reason(shapes: Shapes, spec: BackboneSpec, called: str = "") -> str:
    """Why tensors of these shapes are not this backbone's, naming the network found; "" if they are.

    called: the file's name, with its folders. It distinguishes trainings of equal networks: an OpenCLIP ViT-B/32 with
    laion2B in its name is not OpenAI's.
    """
    if network_expected(spec) is None:
        if reason := _missing_tensors(shapes, spec):
            return reason
    else:
        network = network_of(shapes)
        if network is None:
            return f"no image encoder in a layout known here, expected {spec.title}"
        if reason := network_mismatch(network, spec):
            return reason
    other = _search(spec.other_trainings, called)
    return "" if other is None else f"by its name ({other[0]}) another training, expected {spec.title}"


def _missing_tensors(shapes: Shapes, spec: BackboneSpec) -> str:
    """Why tensors of these shapes are not the backbone's; "" if they are. For architectures unknown to `layouts`.

    Compares shapes and, where a name is in both, the shape under that name: transformers renames tensors of published
    files between versions, and only its own loader knows all names.
    """
    with torch.device("meta"):
        expected = {name: tuple(like.shape) for name, like in spec.build(spec.config).state_dict().items()}
    absent = [name for name, shape in expected.items() if shapes.get(name, shape) != shape]
    missing = Counter(expected.values()) - Counter(shapes.values())
    if absent:
        return f"another network, expected {spec.title}: {absent[0]} has another shape"
    if missing:
        return f"another network, expected {spec.title}: {missing.total()} tensors are missing"
    return ""


def projector_name(name: str) -> str:
    """diffusers' name of a tensor of IP-Adapter's image projector; "" for IP-Adapter's other tensors."""
    return _PROJECTOR_NAMES.get(name, "")


def projector_mismatch(shapes: Shapes, spec: BackboneSpec) -> str:
    """The first tensor of the backbone's image projector that these shapes lack, as a clause; "" for none."""
    assert spec.projector is not None
    with torch.device("meta"):
        expected = ImageProjection(**spec.projector).state_dict()
    given = {projector_name(n): shape for n, shape in shapes.items()}
    wrong = [n for n, like in expected.items() if given.get(n) != tuple(like.shape)]
    return f"{wrong[0]} is missing or of another shape" if wrong else ""


def choose_projector(name: str, candidates: Iterable[Path]) -> Path | None:
    """The first of these files with the image projector of the named backbone, or None."""
    return next((path for path in candidates if _holds_projector(path, SPECS[name])), None)


def _holds_projector(path: Path, spec: BackboneSpec) -> bool:
    try:
        return not projector_mismatch(_shapes(path), spec)
    except InputError:
        return False


def encoder_in(place: Path, spec: BackboneSpec) -> Path:
    """The encoder's file or folder within `place`: IP-Adapter's repository has it in a subfolder."""
    if spec.projector is None or not place.is_dir():
        return place
    return next((p.parent for p in sorted(place.rglob("image_encoder/config.json"))), place)


def rank(name: str, called: str) -> int:
    """Rank of a file's name, with its folders, for a backbone: 2 its exact name, 1 a usual name, 0 any other."""
    if re.match(rf"{re.escape(name)}(\.safetensors)?(/|$)", called):
        return 2
    return int(_search(SPECS[name].file_names, called) is not None)


def _search(pattern: str, called: str) -> re.Match[str] | None:
    """The first match of a pattern of a BackboneSpec, or None; an empty pattern matches nothing."""
    return re.search(pattern, called, re.IGNORECASE) if pattern else None


def choose(name: str, candidates: Iterable[tuple[Path, str]]) -> tuple[Path | None, list[str]]:
    """The first candidate that is this backbone, or None; and the reasons against others.

    candidates: files or folders of safetensors, each with its name, sorted by `rank` and then as given. Only headers
        are read.
    The reasons are clauses about the candidates with a usual name of this backbone.
    """
    reasons: list[str] = []
    for path, called in sorted(candidates, key=lambda one: -rank(name, one[1])):
        reason = _candidate_mismatch(path, SPECS[name], called)
        if not reason:
            return path, reasons
        if rank(name, called):
            reasons.append(reason)
    return None, reasons


def _candidate_mismatch(path: Path, spec: BackboneSpec, called: str) -> str:
    place = encoder_in(path, spec)
    try:
        reason = mismatch_reason(shapes_in(place), spec, called)
        return f"{path} is {reason}" if reason else activation_mismatch(place, spec)
    except InputError as error:
        return str(error).rstrip(".")


def activation_mismatch(place: Path, spec: BackboneSpec) -> str:
    """A clause where a CLIP's configuration has another activation function than the backbone; "" otherwise.

    CLIP was trained with GELU and with QuickGELU; the weights do not show the difference.
    place: a folder or a file. Beside a file, only the configuration of its own library is read.
    Raises InputError where the configuration cannot be read.
    """
    wanted = getattr(getattr(spec.config, "vision_config", spec.config), "hidden_act", None)
    weights = _weights_in(place)[0] if place.is_dir() else place
    open_clip = weights.name == _OPEN_CLIP_WEIGHTS
    path = weights.with_name(_OPEN_CLIP_CONFIG if open_clip else "config.json")
    if not path.is_file() or not (open_clip or weights.name.startswith("model")):
        return ""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if open_clip:
            used = "quick_gelu" if config["model_cfg"].get("quick_gelu", False) else "gelu"
        else:
            used = config.get("vision_config", config).get("hidden_act", wanted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error!r}); download the backbone again.") from error
    return "" if used == wanted else f"{path} has the activation {used}, expected {wanted} of {spec.title}"


def shapes_in(place: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a file, or of a folder's weights, by name; reads headers only.

    Raises InputError for a file that is not safetensors and a folder without safetensors.
    """
    if not place.is_dir():
        return _shapes(place)
    return {name: shape for path in _weights_in(place) for name, shape in _shapes(path).items()}


def tensors_in(place: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a folder in transformers', OpenCLIP's or timm's layout.

    Raises InputError where the folder has no weights.
    """
    if not place.is_dir():
        return read_tensors(place)
    files = _weights_in(place)
    return read_tensors(files[0]) if len(files) == 1 else weights_in(place)


def _weights_in(folder: Path) -> list[Path]:
    """Weight files of one encoder in a folder. Order: transformers' or timm's, shards, OpenCLIP's, the only file."""
    # In timm's repositories of OpenAI's CLIP, model.safetensors is the image encoder in another layout.
    if (folder / _OPEN_CLIP_WEIGHTS).is_file() and (folder / _OPEN_CLIP_CONFIG).is_file():
        return [folder / _OPEN_CLIP_WEIGHTS]
    for name in ("model.safetensors", "model.fp16.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    files = sorted(p for p in folder.glob("*.safetensors") if p.name != PROJECTOR)
    shards = [p for p in files if re.fullmatch(r"model(\.fp16)?-\d+-of-\d+(\.fp16)?\.safetensors", p.name)]
    if shards:
        return shards
    if (folder / _OPEN_CLIP_WEIGHTS).is_file():
        return [folder / _OPEN_CLIP_WEIGHTS]
    if len(files) != 1:
        weights_in(folder)  # its error names the folder's files
        raise InputError(f"{folder} holds {len(files)} .safetensors files; expected one, named model.safetensors.")
    return files


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); expected a .safetensors file.") from error
    return _shapes_as_of(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _shapes_as_of(path: Path, modified: int, size: int) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in read_header(path).tensors.items()}
