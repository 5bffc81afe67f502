"""Where a run begins: at the base models, or at adapters that were trained before (teacher-first)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter.apply import check_fit, fitting_deltas
from ..adapter.file import Adapter, read_adapter
from ..errors import InputError
from ..messages import quoted
from ..models import layout
from ..models.family import Denoiser, Family
from ..settings import TrainSettings
from .run import STAGES, open_run
from .trainable import trained_names


@dataclass(frozen=True)
class Start:
    """What one role begins from, in diffusers' names.

    rows: the placeholder's embeddings (vectors, width). deltas: parameter -> difference to the base, float32; factors:
    parameter -> (up, down), in place of deltas where low-rank updates go on as such.
    """

    token_embeddings: Tensor
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def start_files(places: Sequence[str | Path]) -> dict[str, Path]:
    """The adapter file of each role that run folders (their latest finished stage) and adapter files name.

    Raises InputError for what is neither, a run that is not finished, and a role that is named twice.
    """
    files: dict[str, Path] = {}
    for place in map(Path, places):
        found = _files_of_run(place) if place.is_dir() else [place]
        for path in found:
            role = read_adapter(path).role
            if role in files:
                raise InputError(f"both {files[role]} and {path} are for the {role} to begin from; give one of them.")
            files[role] = path
    return files


def _files_of_run(folder: Path) -> list[Path]:
    run = open_run(folder)
    stage = next((s for s in reversed(STAGES) if run.is_finished(s)), None)
    if stage is None:
        raise InputError(
            f"the run {folder} has no finished stage to begin from; finish its training with the same command first."
        )
    return [run.path(stage, f"{role}.safetensors") for role in run.record["finished"][stage]["roles"]]


def read_start(files: Mapping[str, Path], family: Family, settings: TrainSettings) -> dict[str, Start]:
    """What the roles begin from, checked against the run that is to begin there. files: role -> adapter file.

    Where a role learns, its file may change no other weights than `trainable` lets learn, and a low-rank run goes on
    with low-rank updates of its own rank; a teacher with teacher_weight 0 wears whatever its file holds.
    Raises InputError naming the file and what does not fit: role, base model, concept, weights.
    """
    start = {role: _read(path, role, family, settings) for role, path in files.items()}
    if settings.share_text_encoder and len(start) == 2:
        teacher, student = start["teacher"].token_embeddings, start["student"].token_embeddings
        if not torch.equal(teacher, student):
            raise InputError(
                f"{files['teacher']} and {files['student']} hold different tokens, but the run is to share one; "
                "begin from the teacher's alone, or give each its own with --no-share-text-encoder."
            )
    return start


def apply_deltas(unet: nn.Module, deltas: Mapping[str, Tensor]) -> None:
    """Add differences to a frozen UNet for good; Family.restore takes them off again."""
    for name, delta in deltas.items():
        path, _, leaf = name.rpartition(".")
        # In float32, to be cast with the rest: differences can be finer than the precision of the model.
        value = unet.get_parameter(name).detach().float()
        setattr(unet.get_submodule(path), leaf, nn.Parameter(value + delta.to(value), requires_grad=False))


def _read(path: Path, role: str, family: Family, settings: TrainSettings) -> Start:
    denoiser = family.student if role == "student" else family.teacher
    if denoiser is None:
        raise InputError(
            f"{path} is what the teacher is to begin from, but no teacher was loaded; give its checkpoint."
        )
    adapter = read_adapter(path)
    check_fit(adapter, family, denoiser, role, remedy="begin from an adapter of these models, or choose its own")
    for name, found in (("placeholder", adapter.placeholder), ("class_noun", adapter.class_noun)):
        if found != getattr(settings, name):
            raise InputError(
                f"{path} was trained with {name} {quoted(found)}, but this run has {getattr(settings, name)!r}; a run "
                "that begins from an adapter goes on with its concept: use the same."
            )
    if len(adapter.token_embeddings) != settings.vectors:
        raise InputError(
            f"{path} has {len(adapter.token_embeddings)} token rows, but setting vectors is "
            f"{settings.vectors}; use the same."
        )
    deltas = fitting_deltas(adapter, family, denoiser.unet.state_dict())
    if role == "teacher" and not settings.teaches:
        return Start(adapter.token_embeddings, deltas)
    return _for_learning(path, adapter, deltas, denoiser, family, settings)


def _for_learning(
    path: Path, adapter: Adapter, deltas: dict[str, Tensor], denoiser: Denoiser, family: Family, settings: TrainSettings
) -> Start:
    trained = trained_names(denoiser.unet, settings.trainable)
    others = sorted(deltas.keys() - set(trained))
    if others:
        raise InputError(
            f"{path} changes {others[0]}, which does not learn with trainable {settings.trainable}; use the setting it "
            "was trained with, or full."
        )
    if not settings.trainable.startswith("lora") or not deltas:
        return Start(adapter.token_embeddings, deltas)
    here = {there: name for name, there in layout.unet_names(trained, family.architecture).items()}
    factors = {here[there]: pair for there, pair in adapter.factors.items()}
    for name, delta in deltas.items():
        rank = min(settings.lora_rank, *delta.shape)
        if name not in factors or factors[name][0].shape[1] != rank:
            found = f"updates of rank {factors[name][0].shape[1]}" if name in factors else "a full difference"
            raise InputError(
                f"{path} holds {found} for {name}, but this run learns low-rank updates of rank {rank}; use the same "
                "lora_rank, or another trainable."
            )
    return Start(adapter.token_embeddings, factors=factors)
