"""Shared parts of the two training nodes: the family to train, and the results of a finished stage."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
from torch import Tensor

from ...echodistill_core.models.family import Family
from ...echodistill_core.models.sources import ModelSources
from ...echodistill_core.perception.load import BackboneFiles
from ...echodistill_core.settings import TrainSettings
from ...echodistill_core.training.build import needed_backbones
from ...echodistill_core.training.run import Run
from .backbones import find_backbones
from .family import build_family
from .memory import free_memory_for, least_bytes
from .node_text import note, set_status
from .paths import RUNS
from .pictures import image_of_files
from .progress import figures
from .sockets import AdapterFiles, Models

log = logging.getLogger(__name__)


def backbone_files_of(settings: TrainSettings, sources: ModelSources) -> dict[str, BackboneFiles] | None:
    """The files of the backbones that these settings need; None for the miniature, which has its own."""
    if sources.family == "miniature":
        return None
    return find_backbones(needed_backbones(settings).values())


@contextmanager
def family_on_device(
    models: Models,
    settings: TrainSettings,
    resolution: int,
    backbone_files: dict[str, BackboneFiles] | None,
    node: str | None,
) -> Iterator[Family]:
    """The models as a family to train, with enough device memory freed for it. The memory is released afterwards.

    resolution: side of the training images in pixels. node: id of the node that shows status and notes.
    Raises InputError if the models do not fit each other or the memory.
    """
    device = mm.get_torch_device()
    needed = least_bytes(
        [models.student, models.teacher, models.clip.patcher, models.vae.patcher],
        _trainable(models, settings),
        (backbone_files or {}).values(),
        settings,
        device,
    )
    with free_memory_for(needed, device, settings, resolution) as memory:
        log.info("EchoDistill: training needs %s", memory)
        set_status(node, f"training needs {memory}")
        family, notes = build_family(models)
        for text in notes:
            note(text)
        try:
            yield family
        except mm.OOM_EXCEPTION as error:
            # Re-raised, because ComfyUI then frees all models; the last checkpoint is on disk.
            set_status(node, str(error))
            raise


def _trainable(models: Models, settings: TrainSettings) -> int:
    """Number of trainable UNet parameters over both roles: cross-attention keys and values, all, or (nearly) none."""
    kind = settings.trainable.removesuffix("+token")
    parts = {"kv": (".attn2.to_k.", ".attn2.to_v."), "full": ("",)}.get(kind, ())
    return sum(
        p.numel()
        for patcher in (models.student, models.teacher)
        for name, p in patcher.model.named_parameters()
        if any(part in name for part in parts)
    )


def adapters_of(run: Run, stage: str) -> AdapterFiles:
    """The adapter files of a finished stage."""
    paths = {role: run.path(stage, f"{role}.safetensors") for role in ("student", "teacher")}
    return AdapterFiles({role: path for role, path in paths.items() if path.is_file()})


def samples_of(run: Run, stage: str) -> Tensor:
    """The stage's contact sheets, in order, as an IMAGE."""
    return image_of_files(sorted(run.path(stage, "samples").glob("step_*.png")))


def losses_of(run: Run, stage: str) -> Tensor:
    """The stage's loss plot as an IMAGE."""
    return image_of_files([run.path(stage, "losses.png")])


def summary(run: Run, stage: str) -> str:
    """A finished stage in two lines."""
    finished: dict[str, Any] = run.record["finished"][stage]
    return f"{finished['iterations']} iterations, kept in {RUNS}/{run.folder.name}\n{figures(finished['losses'])}"
