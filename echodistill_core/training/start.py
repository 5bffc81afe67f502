"""The initial values of a run's roles: the base models, or adapters of an earlier training (teacher-first)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter.apply import check_fit, checked_unet_deltas
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
    """The initial values of one role, under diffusers' parameter names.

    token_embeddings: of the placeholder, (vectors, width), float32.
    deltas: parameter -> weight difference to the base model, float32.
    factors: parameter -> (up (out, rank), down (rank, in)) of low-rank updates that are trained further; deltas is
    then empty.
    """

    token_embeddings: Tensor
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def start_files(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Role -> adapter file to start from. paths: adapter files, or run folders, whose latest finished stage counts.

    Raises InputError for a path that is neither, for a run without a finished stage, and for two files of one role.
    """
    files: dict[str, Path] = {}
    for given in map(Path, paths):
        for path in _files_of_run(given) if given.is_dir() else [given]:
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
    """Role -> initial values, read from adapter files and checked against the run. files: role -> adapter file.

    A role that learns accepts an adapter only of the parameters that `trainable` trains; with trainable lora, only
    low-rank updates of rank lora_rank. A teacher with teacher_weight 0 accepts any adapter of its model.
    Raises InputError, naming file and mismatch, if role, base model, concept or parameters do not fit the run.
    """
    start = {role: _read(path, role, family, settings) for role, path in files.items()}
    if settings.share_text_encoder and len(start) == 2:
        teacher, student = start["teacher"].token_embeddings, start["student"].token_embeddings
        if not torch.equal(teacher, student):
            raise InputError(
                f"{files['teacher']} and {files['student']} hold different tokens, but the run is to share one; "
                "begin from the teacher's alone, or turn sharing off with --no-share-text-encoder."
            )
    return start


def apply_deltas(unet: nn.Module, deltas: Mapping[str, Tensor]) -> None:
    """Add weight differences to the parameters of a frozen UNet, which become float32. Family.restore undoes it."""
    for name, delta in deltas.items():
        path, _, leaf = name.rpartition(".")
        # Added before the UNet is cast down: a difference can be below the resolution of its precision.
        value = unet.get_parameter(name).detach().float()
        setattr(unet.get_submodule(path), leaf, nn.Parameter(value + delta.to(value), requires_grad=False))


def _read(path: Path, role: str, family: Family, settings: TrainSettings) -> Start:
    denoiser = family.student if role == "student" else family.teacher
    if denoiser is None:
        raise InputError(
            f"{path} is an adapter for the teacher to begin from, but no teacher was loaded; give its checkpoint."
        )
    adapter = read_adapter(path)
    check_fit(adapter, family, denoiser, role, remedy="begin from an adapter of these models, or choose its own")
    for name, found in (("placeholder", adapter.placeholder), ("class_noun", adapter.class_noun)):
        if found != getattr(settings, name):
            raise InputError(
                f"{path} was trained with {name} {quoted(found)}, but this run has {getattr(settings, name)!r}; a run "
                "that begins from an adapter must have the adapter's concept: use the same value."
            )
    if len(adapter.token_embeddings) != settings.vectors:
        raise InputError(
            f"{path} has {len(adapter.token_embeddings)} token embeddings, but setting vectors is "
            f"{settings.vectors}; use the same number."
        )
    deltas = checked_unet_deltas(adapter, family, denoiser.unet.state_dict())
    if role == "teacher" and not settings.teaches:
        return Start(adapter.token_embeddings, deltas)
    return _trainable_start(path, adapter, deltas, denoiser, family, settings)


def _trainable_start(
    path: Path, adapter: Adapter, deltas: dict[str, Tensor], denoiser: Denoiser, family: Family, settings: TrainSettings
) -> Start:
    """The initial values of a role that learns. Raises InputError if the adapter does not fit `trainable`."""
    trained = trained_names(denoiser.unet, settings.trainable)
    frozen = sorted(deltas.keys() - set(trained))
    if frozen:
        raise InputError(
            f"{path} changes {frozen[0]}, which does not learn with trainable {settings.trainable}; use the setting it "
            "was trained with, or full."
        )
    if not settings.trainable.startswith("lora") or not deltas:
        return Start(adapter.token_embeddings, deltas)
    diffusers_names = {in_file: name for name, in_file in layout.unet_names(trained, family.architecture).items()}
    factors = {diffusers_names[name]: pair for name, pair in adapter.factors.items()}
    for name, delta in deltas.items():
        rank = min(settings.lora_rank, *delta.shape)
        if name not in factors or factors[name][0].shape[1] != rank:
            found = f"updates of rank {factors[name][0].shape[1]}" if name in factors else "a full difference"
            raise InputError(
                f"{path} holds {found} for {name}, but this run learns low-rank updates of rank {rank}; use the same "
                "lora_rank, or another trainable."
            )
    return Start(adapter.token_embeddings, factors=factors)
