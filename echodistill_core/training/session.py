"""The two stages of a run: `train` distils a concept from photographs, `echo` trains on images of the student."""

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
from ..logs import logger
from ..messages import shortened
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
from .memory import reraise_out_of_memory
from .prior import add_prior
from .resume import check_new_folder, create_or_resume
from .run import CHECKPOINT, Run, open_run
from .start import Start, read_start
from .state import TrainState

log = logger(__name__)


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
    """Run the distillation stage in a run folder: start it, resume it at its last checkpoint, or return it finished.

    folder: a new or empty folder, or a folder with this same run. listen: receives the events of training.events.
    start: role -> adapter file that the role starts from (training.start); its content is part of the run's identity.
        Teacher-first: with teacher_weight 0, a teacher that starts from an adapter stays unchanged, and so does the
        token if it is shared.
    backbone_files: backbone -> its files; None finds them as the sources say.
    Training changes the family in place; afterwards, and after any exception, `restore` puts the loaded tensors back.
    Raises InputError for inputs that do not fit together, before any file is written; DivergedError if a loss is not
    finite; OutOfMemoryError, with advice, if memory runs out; StorageError if a file cannot be written.
    """
    check_concept(settings)
    start = start or {}
    check_learns(settings, family, start)
    initial = read_start(start, family, settings)
    pick_device(settings.device)
    family.text.with_placeholders({settings.placeholder: settings.vectors})  # raises InputError for an invalid word
    size = training_size(settings, family)
    images = square_images(photographs[: settings.max_photographs or None], size, settings.crop)
    run = None
    if (Path(folder) / "run.json").is_file():
        run = create_or_resume(folder, settings, sources, images, family, start)
        if run.is_finished("distil"):
            return run
    # Before the folder is created, so that missing backbones leave no empty run.
    backbones = _backbones(settings, sources, backbone_files)
    if run is None:
        run = create_or_resume(folder, settings, sources, images, family, start)
    run.check_backbones(_fingerprints(backbones))
    with _training(family, backbones, settings, initial) as state:
        longest = max(TEMPLATES, key=len)
        family.text.warn_truncated([caption(longest, settings.placeholder, settings.class_noun)])
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
    """Run the echoing stage of a run: start it, resume it, or return it finished. The first stage's adapters are kept.

    run: its distillation stage must be finished. family, listen, backbone_files: as for `train`.
    Raises InputError if the distillation stage is not finished, if the run has an echoing stage with other settings,
    or if these are not the run's models; other errors as `train`.
    """
    distil = run.settings
    pool_prompts(distil, settings)
    run.check_family(family)
    pick_device(distil.device)
    initial = read_start(run.start_files(), family, distil)
    check_learns(distil, family, initial)
    run.declare_echo(settings)
    if run.is_finished("echo"):
        return run
    backbones = _backbones(distil, run.sources, backbone_files)
    run.check_backbones(_fingerprints(backbones))
    with _training(family, backbones, distil, initial) as state:
        add_prior(state, run, listen)
        fresh_critics = {n: p.detach().clone() for n, p in state.trainables.critics.named_parameters()}
        _resume(state, run, "distil", required=True)
        family.text.warn_truncated(pool_prompts(distil, settings))
        pool = make_pool(state, run, settings, listen)
        if not _resume(state, run, "echo"):
            state.step = 0
            if not settings.carry_critics:
                state.trainables.critics.load_state_dict(fresh_critics)
                # The moments belong to the previous heads.
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
    """Raise InputError if `train`, or a following `echo`, would refuse the folder. Does not need the models.

    echo: settings of the echoing stage; None if only `train` follows.
    """
    if not (folder / "run.json").is_file():
        check_new_folder(folder)
        return
    try:
        run = open_run(folder)
    except DamagedRunError:
        return  # `train` writes run.json again, or raises an error with the reason
    chosen = photographs[: settings.max_photographs or None]
    run.check_inputs(settings, square_images(chosen, settings.resolution or run.resolution, settings.crop))
    if echo is not None:
        run.check_echo(echo)


def check_concept(settings: TrainSettings) -> None:
    """Raise InputError if the placeholder is not a possible new word, or if the class noun is empty or contains it."""
    check_placeholder(clip_tokenizer(pad_with_end=False), settings.placeholder)
    check_class_noun(settings.class_noun, settings.placeholder)


def training_size(settings: TrainSettings, family: Family) -> int:
    """Side of the training images in pixels: the setting, or the family's resolution if the setting is 0.

    Raises InputError unless it is 64 or more and a multiple of the VAE's factor.
    """
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
    """A new state for the block. Afterwards, and if creating it fails, the family is restored.

    Turns inference mode off, in which ComfyUI runs its nodes: tensors made in it cannot be trained.
    """
    with torch.inference_mode(False), torch.enable_grad():
        try:
            family.text = family.text.with_placeholders({settings.placeholder: settings.vectors})
            with reraise_out_of_memory(settings):
                yield new_state(family, backbones, settings, start)
        finally:
            family.restore()


def _resume(state: TrainState, run: Run, stage: str, required: bool = False) -> bool:
    """Load the stage's checkpoint, if it exists, and remove later rows from its log. Returns whether it exists.

    required: raise InputError if the checkpoint is missing, and leave the log unchanged.
    """
    path = run.path(stage, CHECKPOINT)
    found = path.is_file()
    if required and not found:
        raise InputError(f"checkpoint {path} is missing, so the run cannot go on; train it again in a new folder.")
    if found:
        load_checkpoint(path, state, run.fingerprint(stage))
        log.info("loaded checkpoint %s: stage %s, step %d", shortened(path), state.stage, state.step)
    if not required:
        run.rewind_log(stage, state.step if found else 0)
    return found
