"""Whether student and teacher may sit in each other's socket: by what they predict, and by a trial of both."""

from __future__ import annotations

import logging

import torch

from .kinds import architecture_of, prediction_of
from .sampling import encode, sample, turbo_sigmas
from .sockets import Models

log = logging.getLogger(__name__)
NOISES = 4
SEED = 0
LARGEST_SIDE = 32  # of the latents; larger ones tell no more and take most of a minute on a CPU


def doubt_of_roles(models: Models) -> list[str]:
    """A warning where the two may be swapped, for the user to judge; nothing where all looks right."""
    found = _doubt_by_prediction(models) or _doubt_by_trial(models)
    for text in found:
        log.warning("EchoDistill: %s", text)
    return found


def _doubt_by_prediction(models: Models) -> list[str]:
    predictions = (prediction_of(models.student, "student"), prediction_of(models.teacher, "teacher"))
    if predictions != ("v_prediction", "epsilon"):
        return []
    return [
        "the student predicts velocity as SD 2.1 does, and the teacher noise as SD-Turbo does: are the two swapped?"
    ]


def _doubt_by_trial(models: Models) -> list[str]:
    """From pure noise a model made for one step draws a picture of its own for every noise, while one made for many
    steps answers with nearly the same blur: its guess varies less from noise to noise. In the miniature 2 to 3 times
    less.
    """
    side = min(architecture_of(models.student).unet["sample_size"], LARGEST_SIDE)
    text, empty = encode(models.clip, ""), torch.zeros([NOISES, 4, side, side])
    student, teacher = (
        float(sample(model, text, empty, turbo_sigmas(model, 1, 1.0), SEED).std(0).mean())
        for model in (models.student, models.teacher)
    )
    if teacher <= student:
        return []
    return [
        f"from one noise to another the teacher's one-step guess varies more ({teacher:.3g}) than the student's "
        f"({student:.3g}): are the two swapped?"
    ]
