"""The echoing stage's images: a pool that the student makes once and that replaces the photographs."""

from __future__ import annotations

from torch import Tensor

from ..concept.images import ImageSet
from ..concept.prompts import TEMPLATES, caption
from ..models.text import check_prompt
from ..settings import EchoSettings, TrainSettings
from .events import Listener
from .pools import kept_pool
from .run import Run
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

    Each image is one step from noise of its own seed.
    """
    prompts = pool_prompts(state.settings, echo)

    def draw(i: int) -> Tensor:
        return one_step_images(state, [prompts[i]], state.settings.seed + POOL_SEED + i, run.resolution)[0]

    return kept_pool(run.path("echo", "pool"), prompts, draw, listen)
