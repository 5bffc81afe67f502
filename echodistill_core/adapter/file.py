"""The adapter file: weight differences and token embeddings in one safetensors file, fully checked when read.

Keys: `diffusion_model.<module>.diff` (and `.diff_b` for biases) in the original layout's names, which ComfyUI's Load
LoRA node reads directly; low-rank updates as `.lora_up.weight`, `.lora_down.weight`; token embeddings as `clip_h`
(SD 2.x) or `clip_l` (SD 1.x), the keys of ComfyUI's `embedding:name`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..errors import InputError
from ..files import why_missing
from ..messages import quoted, shortened
from ..models import layout
from ..models.architectures import Architecture
from ..models.family import Family
from ..tensorfile import read_header, read_tensors, write_tensors

FORMAT = "echodistill-adapter"
FORMAT_VERSION = "1"
PREFIX = "diffusion_model."
SUFFIXES = (".diff", ".diff_b", ".lora_up.weight", ".lora_down.weight")
TOKEN_KEYS = ("clip_h", "clip_l")
MAX_CHARACTERS = 1000  # of a placeholder or a class noun
FLOAT_TYPES = ("F32", "F16", "BF16")
NOTICE = (
    "Trained on someone's photographs of a particular subject; share it only if you have the right to. It is a "
    "derivative of its base models, whose licences apply."
)
REQUIRED = ("format", "format_version", "role", "placeholder", "class_noun", "base_fingerprint", "text_fingerprint")


@dataclass(frozen=True)
class Adapter:
    """The trained difference of one model from its base.

    deltas: original name of a parameter -> effective minus original value, float32.
    factors: original name of a parameter -> (up, down) of a low-rank update; exclusive with `deltas`.
    token_embeddings: the placeholder's embeddings (vectors, width). metadata: as in the file, all strings.
    """

    token_embeddings: Tensor
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    origin: str = "adapter"

    @property
    def placeholder(self) -> str:
        """The word for the concept in prompts."""
        return self.metadata["placeholder"]

    @property
    def class_noun(self) -> str:
        """The class noun of the concept."""
        return self.metadata["class_noun"]

    @property
    def role(self) -> str:
        """The model that it changes: "student" or "teacher"."""
        return self.metadata["role"]

    @property
    def base_model(self) -> str:
        """Name of the base checkpoint, for messages."""
        return shortened(self.metadata.get("base_model", "unknown"))

    @property
    def base_blocks(self) -> dict[str, str]:
        """Fingerprint of each block of the base UNet; empty where the file has none."""
        try:
            blocks = json.loads(self.metadata.get("base_blocks", "{}"))
        except (ValueError, RecursionError):
            return {}
        return blocks if isinstance(blocks, dict) else {}

    def all_deltas(self) -> dict[str, Tensor]:
        """Every update as a full difference, by original parameter name."""
        return {**self.deltas, **{n: up.float() @ down.float() for n, (up, down) in self.factors.items()}}

    def unet_deltas(self, architecture: Architecture, names: Mapping[str, Any]) -> dict[str, Tensor]:
        """The differences by diffusers' names.

        names: the UNet's state dictionary, or a mapping with its names.
        Raises InputError for a tensor whose parameter this UNet does not have.
        """
        to_diffusers = {there: here for here, there in layout.unet_names(names, architecture).items()}
        deltas = self.all_deltas()
        unknown = [n for n in deltas if n not in to_diffusers]
        if unknown:
            raise InputError(
                f"{self.origin} has {len(unknown)} tensors without a place in this model, the first is "
                f"{shortened(unknown[0])}; it was trained on another base model ({self.base_model})."
            )
        return {to_diffusers[n]: d for n, d in deltas.items()}


def run_metadata(family: Family, role: str, settings: Mapping[str, Any], stage: str, iterations: int) -> dict[str, str]:
    """Metadata of an adapter of this run; without times and paths, so that equal runs give equal files."""
    denoiser = family.student if role == "student" else family.teacher
    assert denoiser is not None
    licences = {"student": family.student.licence}
    other = family.teacher if role == "student" else family.student
    if family.teacher is not None:
        licences["teacher"] = family.teacher.licence
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "echodistill_version": __version__,
        "role": role,
        "stage": stage,
        "iterations": str(iterations),
        "seed": str(settings["seed"]),
        "placeholder": str(settings["placeholder"]),
        "class_noun": str(settings["class_noun"]),
        "vectors": str(settings["vectors"]),
        "family": family.name,
        "base_model": _model_name(denoiser.origin, f"{family.name} {role}"),
        "base_prediction": denoiser.schedule.prediction_type,
        "base_fingerprint": denoiser.fingerprint,
        "text_fingerprint": family.text_fingerprint,
        "other_fingerprint": "" if other is None else other.fingerprint,
        "base_blocks": json.dumps(family.blocks(role), sort_keys=True),
        "base_licences": json.dumps(licences, sort_keys=True),
        "notice": NOTICE,
        "settings": json.dumps(settings, sort_keys=True),
    }


def _model_name(origin: str, otherwise: str) -> str:
    """A checkpoint's file or folder name; `otherwise` where it was not read from a file."""
    path = Path(origin)
    # The hub cache's path of a model: models--owner--name/snapshots/<commit>.
    repository = next((p.name for p in path.parents if p.name.startswith("models--")), "")
    if repository:
        return repository.removeprefix("models--").replace("--", "/", 1)
    return path.name if path.exists() else otherwise


def write_adapter(path: Path, adapter: Adapter, architecture: Architecture) -> None:
    """Write an adapter atomically. Raises StorageError where it cannot be written; an earlier file is kept."""
    tensors: dict[str, Tensor] = {}
    for name, delta in adapter.deltas.items():
        module, _, leaf = name.rpartition(".")
        tensors[f"{PREFIX}{module}.{'diff' if leaf == 'weight' else 'diff_b'}"] = delta
    for name, (up, down) in adapter.factors.items():
        module = name.removesuffix(".weight")
        tensors[f"{PREFIX}{module}.lora_up.weight"] = up
        tensors[f"{PREFIX}{module}.lora_down.weight"] = down
    tensors["clip_l" if architecture.pad_with_end else "clip_h"] = adapter.token_embeddings
    write_tensors(path, tensors, adapter.metadata)


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter file.

    Raises InputError for a file that is not an adapter, another format version, unknown or unpaired names, wrong shapes
    or dtypes, and values that are not finite. The match with a base model is checked when the adapter is applied.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else why_missing(path)
        raise InputError(f"adapter {path} {found}; expected a .safetensors file written by training.")
    header = read_header(path)
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path} is no EchoDistill adapter (its metadata has no format {FORMAT!r}); load LoRAs elsewhere."
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {quoted(metadata.get('format_version'))}; this program reads version "
            f"{FORMAT_VERSION}. Update EchoDistill."
        )
    absent = [key for key in REQUIRED if not metadata.get(key)]
    if absent:
        raise InputError(f"{path} lacks the metadata {', '.join(absent)}; save it again with the program that made it.")
    if metadata["role"] not in ("student", "teacher"):
        raise InputError(f"{path} is for the role {quoted(metadata['role'])}; expected student or teacher.")
    for key in ("placeholder", "class_noun"):
        if len(metadata[key]) > MAX_CHARACTERS:
            raise InputError(
                f"{path}: its {key} has {len(metadata[key])} characters; expected at most {MAX_CHARACTERS}; save it "
                "again with the program that made it."
            )
    for name, info in header.tensors.items():
        if name not in TOKEN_KEYS and not (name.startswith(PREFIX) and name.endswith(SUFFIXES)):
            raise InputError(
                f"{path} has a tensor {quoted(name)} that no adapter has; expected {PREFIX}….diff or clip_h."
            )
        if info.dtype not in FLOAT_TYPES:
            raise InputError(
                f"{path}: tensor {shortened(name)} is of type {info.dtype}; expected one of {', '.join(FLOAT_TYPES)}."
            )
    tokens = [name for name in TOKEN_KEYS if name in header.tensors]
    if len(tokens) != 1:
        raise InputError(
            f"{path} has {len(tokens)} token tensors; expected one, clip_h or clip_l, with the learned rows."
        )
    rows_shape = header.tensors[tokens[0]].shape
    vectors = metadata.get("vectors", "1")
    if len(rows_shape) != 2 or str(rows_shape[0]) != vectors:
        raise InputError(f"{path}: {tokens[0]} has shape {rows_shape}; expected ({shortened(vectors)}, text width).")
    tensors = {n: t.float() for n, t in read_tensors(path, check_finite=True).items()}
    token_embeddings = tensors.pop(tokens[0])
    deltas = {_parameter(n): t for n, t in tensors.items() if n.endswith((".diff", ".diff_b"))}
    factors = _factors(path, tensors)
    twice = sorted(deltas.keys() & factors.keys())
    if twice:
        raise InputError(
            f"{path} changes {shortened(twice[0])} twice, by a difference and by a low-rank pair; expected one."
        )
    return Adapter(
        token_embeddings=token_embeddings,
        deltas=deltas,
        factors=factors,
        metadata=metadata,
        origin=str(path),
    )


def _parameter(key: str) -> str:
    """The original parameter name of a .diff or .diff_b key."""
    module, _, kind = key.removeprefix(PREFIX).rpartition(".")
    return f"{module}.{'weight' if kind == 'diff' else 'bias'}"


def _factors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    result = {}
    for name, up in tensors.items():
        if name.endswith(".lora_down.weight") and name.replace("lora_down", "lora_up") not in tensors:
            raise InputError(f"{path}: {shortened(name)} has no lora_up beside it; the file is incomplete.")
        if not name.endswith(".lora_up.weight"):
            continue
        module = name.removesuffix(".lora_up.weight")
        down = tensors.get(f"{module}.lora_down.weight")
        if down is None or up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise InputError(
                f"{path}: {shortened(module)} has no matching pair of lora_up and lora_down; the file is incomplete."
            )
        result[module.removeprefix(PREFIX) + ".weight"] = (up, down)
    return result
