"""From settings and photographs to a trained run, and from a run to an echoed one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..concept.images import ImageSet
from ..concept.photographs import Photograph, to_square
from ..errors import InputError
from ..models.family import Family
from ..models.sources import ModelSources, backbone_source
from ..perception.backbones import Backbone
from ..perception.load import load_backbones
from ..settings import EchoSettings, TrainSettings
from .batches import TrainingImages
from .checkpoint import load_checkpoint
from .echo import make_pool, pool_prompts
from .events import Listener
from .loop import train_stage
from .run import Run, create_or_resume
from .state import TrainState, needed_backbones, new_optimizers, new_state


def square_images(photographs: Sequence[Photograph], settings: TrainSettings, family: Family) -> ImageSet:
    """The photographs as training sees them. Raises InputError for a resolution that the family cannot make."""
    size = settings.resolution or family.architecture.resolution
    if size < 64 or size % family.latent_factor:
        raise InputError(f"setting resolution is {size}; expected 64 or more and a multiple of {family.latent_factor}.")
    used = photographs[: settings.max_photographs or None]
    return ImageSet(torch.stack([to_square(p.image, size, settings.crop) for p in used]), tuple(p.name for p in used))


def train(
    photographs: Sequence[Photograph],
    family: Family,
    settings: TrainSettings,
    sources: ModelSources,
    folder: str | Path,
    listen: Listener,
) -> Run:
    """The distillation stage into a run folder: begun, resumed at its last checkpoint, or found finished.

    The family is in use afterwards only if the run was finished already; otherwise its UNets have their own weights
    back, but its precision and device are the settings'.
    Raises InputError before anything is computed where an input does not fit, DivergedError where a loss does.
    """
    check_concept(settings)
    family.text.with_placeholders({settings.placeholder: settings.vectors})
    images = square_images(photographs, settings, family)
    # What a run needs is looked for before its folder is made, so that a failed start leaves nothing behind.
    backbones = load_backbones(needed_backbones(settings), backbone_source(sources))
    run = create_or_resume(folder, settings, sources, images, family)
    if run.is_finished("distil"):
        return run
    state = _state(family, backbones, settings)
    try:
        _resume(state, run, "distil")
        train_stage(state, run, "distil", _source(state, images), settings.iterations, listen)
    finally:
        state.release()
    return run


def echo(run: Run, family: Family, settings: EchoSettings, listen: Listener) -> Run:
    """The echoing stage of a finished run: begun, resumed, or found finished. The adapters of before stay beside it.

    Raises InputError where the run is not trained to its end or was echoed with other settings.
    """
    distil = run.settings
    pool_prompts(distil, settings)
    run.check_family(family)
    run.declare_echo(settings)
    if run.is_finished("echo"):
        return run
    backbones = load_backbones(needed_backbones(distil), backbone_source(run.sources))
    state = _state(family, backbones, distil)
    try:
        fresh_critics = {n: p.detach().clone() for n, p in state.critics.named_parameters()}
        _resume(state, run, "distil", required=True)
        pool = make_pool(state, run, settings, listen)
        if not _resume(state, run, "echo"):
            state.step = 0
            if not settings.carry_critics:
                state.critics.load_state_dict(fresh_critics)
            if not settings.carry_optimizers:
                state.optimizers = new_optimizers(state)
        photographs = run.photographs() if settings.real_share > 0 else None
        source = _source(state, pool, photographs, settings.real_share)
        train_stage(state, run, "echo", source, settings.iterations, listen)
    finally:
        state.release()
    return run


def check_concept(settings: TrainSettings) -> None:
    """Raise InputError where the class noun is empty; everything else has a default."""
    if not settings.class_noun.strip():
        raise InputError("class_noun is empty; expected what the photographs show, for instance --class-noun dog.")


def _state(family: Family, backbones: dict[str, Backbone], settings: TrainSettings) -> TrainState:
    family.text = family.text.with_placeholders({settings.placeholder: settings.vectors})
    return new_state(family, backbones, settings)


def _resume(state: TrainState, run: Run, stage: str, required: bool = False) -> bool:
    """Load the stage's checkpoint if there is one, and forget what was logged after it."""
    path = run.path(stage, "checkpoint.safetensors")
    found = path.is_file()
    if required and not found:
        raise InputError(f"{path} is missing, so nothing can carry on from this run; train it again into a new folder.")
    if found:
        load_checkpoint(path, state, run.fingerprint(stage))
    if not required:
        run.rewind_log(stage, state.step if found else 0)
    return found


def _source(
    state: TrainState, main: ImageSet, second: ImageSet | None = None, second_share: float = 0.0
) -> TrainingImages:
    return TrainingImages(main, state.settings, state.family.latent_factor, second, second_share)
