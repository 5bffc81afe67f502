"""From settings and photographs to a trained run, and from a run to an echoed one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..concept.images import square_images
from ..concept.photographs import Photograph
from ..concept.prompts import TEMPLATES, caption
from ..devices import pick_device
from ..errors import DamagedRunError, InputError
from ..models.family import Family
from ..models.fingerprint import sampled_fingerprint
from ..models.sources import ModelSources, backbone_source
from ..models.text import check_class_noun, check_placeholder, clip_tokenizer
from ..perception.backbones import Backbone
from ..perception.load import BackboneFiles, load_backbones
from ..settings import EchoSettings, TrainSettings
from .batches import TrainingImages
from .build import check_learns, needed_backbones, new_optimizers, new_state
from .checkpoint import load_checkpoint
from .echo import make_pool, pool_prompts
from .events import Listener
from .loop import train_stage
from .memory import explaining_out_of_memory
from .prior import add_prior
from .resume import check_new_folder, create_or_resume
from .run import CHECKPOINT, Run, open_run
from .start import Start, read_start
from .state import TrainState


def train(
    photographs: Sequence[Photograph],
    family: Family,
    settings: TrainSettings,
    sources: ModelSources,
    folder: str | Path,
    listen: Listener,
    start: Mapping[str, Path] | None = None,
    backbone_files: Mapping[str, BackboneFiles] | None = None,
) -> Run:
    """The distillation stage into a run folder: begun, resumed at its last checkpoint, or found finished.

    start: role -> adapter file that the role begins from (training.start); its content is part of the run's identity.
        A teacher that begins from one and has teacher_weight 0 stays the personalised teacher that it is, and so does
        the token where it is shared: teacher-first.
    places: backbone -> where a caller found its files; None looks where the sources say.
    The family is borrowed: however training ends, it is given back as it was loaded.
    Raises InputError before anything is computed or written where an input does not fit, DivergedError where a loss
    does not stay finite, OutOfMemoryError with what to change where memory runs out.
    """
    check_concept(settings)
    start = start or {}
    check_learns(settings, family, start)
    begun = read_start(start, family, settings)
    pick_device(settings.device)
    family.text.with_placeholders({settings.placeholder: settings.vectors})  # raises for a word that cannot be one
    size = training_size(settings, family)
    images = square_images(photographs[: settings.max_photographs or None], size, settings.crop)
    if (Path(folder) / "run.json").is_file():
        run = create_or_resume(folder, settings, sources, images, family, start)
        if run.is_finished("distil"):
            return run
    # Looked for before a new folder is made, so that a failed start leaves nothing behind.
    backbones = _backbones(settings, sources, backbone_files)
    run = create_or_resume(folder, settings, sources, images, family, start)
    run.check_backbones(_fingerprints(backbones))
    with _training(family, backbones, settings, begun) as state:
        longest = max(TEMPLATES, key=len)
        family.text.warn_of_unread([caption(longest, settings.placeholder, settings.class_noun)])
        add_prior(state, run, listen)
        _resume(state, run, "distil")
        source = TrainingImages(images, settings, family.latent_factor, channels=family.latent_channels)
        train_stage(state, run, "distil", source, settings.iterations, listen)
    return run


def echo(
    run: Run,
    family: Family,
    settings: EchoSettings,
    listen: Listener,
    backbone_files: Mapping[str, BackboneFiles] | None = None,
) -> Run:
    """The echoing stage of a finished run: begun, resumed, or found finished. The adapters of before stay beside it.

    The family is borrowed, and backbones are found, as in `train`.
    Raises InputError where the run is not trained to its end, was echoed with other settings, or has other models.
    """
    distil = run.settings
    pool_prompts(distil, settings)
    run.check_family(family)
    pick_device(distil.device)
    begun = read_start(run.start_files(), family, distil)
    run.declare_echo(settings)
    if run.is_finished("echo"):
        return run
    backbones = _backbones(distil, run.sources, backbone_files)
    run.check_backbones(_fingerprints(backbones))
    with _training(family, backbones, distil, begun) as state:
        add_prior(state, run, listen)
        fresh_critics = {n: p.detach().clone() for n, p in state.trainables.critics.named_parameters()}
        _resume(state, run, "distil", required=True)
        family.text.warn_of_unread(pool_prompts(distil, settings))
        pool = make_pool(state, run, settings, listen)
        if not _resume(state, run, "echo"):
            state.step = 0
            if not settings.carry_critics:
                state.trainables.critics.load_state_dict(fresh_critics)
                # The moments of heads that are gone would mislead the new ones.
                state.trainables.optimizers["critics"] = new_optimizers(state)["critics"]
            if not settings.carry_optimizers:
                state.trainables.optimizers = new_optimizers(state)
        photographs = run.photographs() if settings.real_share > 0 else None
        source = TrainingImages(
            pool, distil, family.latent_factor, photographs, settings.real_share, family.latent_channels
        )
        train_stage(state, run, "echo", source, settings.iterations, listen)
    return run


def check_folder(
    folder: Path, photographs: Sequence[Photograph], settings: TrainSettings, echo: EchoSettings | None = None
) -> None:
    """Raise InputError where `train`, or `echo` after it, would refuse the folder, for reasons that need no models."""
    if not (folder / "run.json").is_file():
        check_new_folder(folder)
        return
    try:
        run = open_run(folder)
    except DamagedRunError:
        return  # `train` writes run.json anew, or says why it cannot
    chosen = photographs[: settings.max_photographs or None]
    run.check_inputs(settings, square_images(chosen, settings.resolution or run.resolution, settings.crop))
    if echo is not None:
        run.check_echo(echo)


def check_concept(settings: TrainSettings) -> None:
    """Raise InputError where placeholder and class noun cannot name a concept."""
    check_placeholder(clip_tokenizer(pad_with_end=False), settings.placeholder)
    check_class_noun(settings.class_noun, settings.placeholder)


def training_size(settings: TrainSettings, family: Family) -> int:
    """Side of the training images in pixels. Raises InputError for one that the family cannot make."""
    size = settings.resolution or family.architecture.resolution
    if size < 64 or size % family.latent_factor:
        raise InputError(f"setting resolution is {size}; expected 64 or more and a multiple of {family.latent_factor}.")
    return size


def _backbones(
    settings: TrainSettings, sources: ModelSources, backbone_files: Mapping[str, BackboneFiles] | None
) -> dict[str, Backbone]:
    return load_backbones(
        needed_backbones(settings), backbone_source(sources) if backbone_files is None else backbone_files
    )


def _fingerprints(backbones: Mapping[str, Backbone]) -> dict[str, str]:
    return {role: sampled_fingerprint(backbone.state_dict()) for role, backbone in backbones.items()}


@contextmanager
def _training(
    family: Family, backbones: dict[str, Backbone], settings: TrainSettings, start: Mapping[str, Start]
) -> Iterator[TrainState]:
    """A new state for the block; afterwards, and where making it fails, the family is as it was loaded.

    ComfyUI runs its nodes in inference mode, in which nothing can learn.
    """
    with torch.inference_mode(False), torch.enable_grad():
        try:
            family.text = family.text.with_placeholders({settings.placeholder: settings.vectors})
            with explaining_out_of_memory(settings):
                yield new_state(family, backbones, settings, start)
        finally:
            family.restore()


def _resume(state: TrainState, run: Run, stage: str, required: bool = False) -> bool:
    """Load the stage's checkpoint if there is one, and forget what was logged after it."""
    path = run.path(stage, CHECKPOINT)
    found = path.is_file()
    if required and not found:
        raise InputError(f"{path} is missing, so nothing can carry on from this run; train it again into a new folder.")
    if found:
        load_checkpoint(path, state, run.fingerprint(stage))
    if not required:
        run.rewind_log(stage, state.step if found else 0)
    return found
