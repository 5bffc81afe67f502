"""Prior preservation (Ruiz et al. 2023): images of the class, made by the very model that is going to learn."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..sampling import TEACHER_STEPS
from .batches import TrainingImages
from .events import Listener
from .pools import class_prompts, kept_pool
from .run import Run
from .samples import images_of
from .state import TrainState

PRIOR_SEED = 3_000_000  # far from the seeds of previews, of the other pools and of a user's first samples


def add_prior(state: TrainState, run: Run, listen: Listener) -> None:
    """Give the state the class images of every role that learns with prior preservation; nothing where it is off.

    state: at step 0, before a checkpoint is loaded: images that are missing are made by the models as they are there,
    the student in 1 step and the teacher in 25 with guidance, one from noise of each seed. They lie in the run's folder
    prior/<role>, where a later call finds them; captions are the training templates without the placeholder.
    Raises InputError where they were changed since.
    """
    settings = state.settings
    prompts = class_prompts(settings.class_noun, settings.prior_images)
    for role in settings.prior_roles:

        def draw(i: int, role: str = role) -> Tensor:
            steps = TEACHER_STEPS if role == "teacher" else 1
            return images_of(state, role, [prompts[i]], settings.seed + PRIOR_SEED + i, run.resolution, steps)[0]

        images = kept_pool(run.folder / "prior" / role, prompts, draw, listen, name=f"{role}'s class images")
        # Neither grey canvas nor zoom, as in the works this is from: the class is to stay what it was.
        plain = replace(settings, augment=False, critic_canvas=True)
        state.prior[role] = TrainingImages(
            images, plain, state.family.latent_factor, channels=state.family.latent_channels, roles=(role,)
        )
