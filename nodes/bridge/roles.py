"""Whether student and teacher may sit in each other's socket, found by a trial of both."""

from __future__ import annotations

import logging

import torch

from .kinds import architecture_of
from .sampling import encode, sample, turbo_sigmas
from .sockets import Models

log = logging.getLogger(__name__)
NOISES = 4
SEED = 0


def doubt_of_roles(models: Models) -> list[str]:
    """A warning where the teacher answers noise as a one-step model does, and the student does not; else nothing.

    From pure noise a model made for one step draws a picture of its own for every noise, while one made for many steps
    answers with nearly the same blur: its guess varies less from noise to noise. In the miniature 2 to 3 times less.
    """
    side = architecture_of(models.student).unet["sample_size"]
    empty = torch.zeros([NOISES, 4, side, side])
    text = encode(models.clip, "")
    spread = {
        name: float(sample(model, text, empty, turbo_sigmas(model, 1, 1.0), SEED).std(0).mean())
        for name, model in (("student", models.student), ("teacher", models.teacher))
    }
    if spread["teacher"] <= spread["student"]:
        return []
    text_of_doubt = (
        f"from one noise to another the teacher's one-step guess varies more ({spread['teacher']:.3g}) than the "
        f"student's ({spread['student']:.3g}): are the two swapped?"
    )
    log.warning("EchoDistill: %s", text_of_doubt)
    return [text_of_doubt]
