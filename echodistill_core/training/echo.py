"""The echoing stage's images: a pool that the student makes once and that replaces the photographs."""

from __future__ import annotations

from pathlib import Path

import torch

from ..concept.images import ImageSet
from ..concept.prompts import TEMPLATES, caption, check_prompt
from ..errors import InputError
from ..files import write_json
from ..settings import EchoSettings, TrainSettings
from .events import Listener, PoolProgress
from .run import Run, read_pngs, write_png
from .samples import one_step_images
from .state import TrainState

POOL_SEED = 1_000_000  # far from the seeds of previews and of a user's first samples


def pool_prompts(settings: TrainSettings, echo: EchoSettings) -> tuple[str, ...]:
    """The prompt of every image of the pool: the given ones or the training captions, in turn.

    Raises InputError for a prompt without the placeholder.
    """
    given = [p.strip() for p in echo.prompts.split("|") if p.strip()]
    for prompt in given:
        check_prompt(prompt, {settings.placeholder: settings.class_noun})
    prompts = given or [caption(t, settings.placeholder, settings.class_noun) for t in TEMPLATES]
    return tuple(prompts[i % len(prompts)] for i in range(echo.pool_size))


def make_pool(state: TrainState, run: Run, echo: EchoSettings, listen: Listener) -> ImageSet:
    """The pool of this run's echoing stage: read where it is whole on disk, otherwise made by the student.

    Each image is one step from noise of its own seed. Training reads the stored 8-bit pictures, so that a run that is
    killed and resumed sees the same pixels as one that was not.
    """
    folder, prompts = run.path("echo", "pool"), pool_prompts(state.settings, echo)
    if not (folder / "pool.json").is_file():
        for i in range(len(prompts)):
            # One at a time: what a picture looks like must not depend on the batch it was made in.
            x = one_step_images(state, [prompts[i]], state.settings.seed + POOL_SEED + i, run.resolution)[0]
            write_png(folder / f"{i:03d}.png", ((x + 1) * 127.5).round().to("cpu", torch.uint8))
            listen(PoolProgress(i + 1, len(prompts)))
        write_json(folder / "pool.json", {"fingerprint": _read(folder, prompts).fingerprint, "prompts": prompts})
    pool = _read(folder, prompts)
    if pool.fingerprint not in (folder / "pool.json").read_text(encoding="utf-8"):
        raise InputError(f"{folder} was changed since it was made; remove the folder to have it made again.")
    return pool


def _read(folder: Path, prompts: tuple[str, ...]) -> ImageSet:
    return ImageSet(read_pngs(folder, len(prompts)), tuple(f"{i:03d}.png" for i in range(len(prompts))), prompts)
