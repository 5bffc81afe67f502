"""Detects swapped student and teacher sockets, by prediction type and by a trial of both models."""

from __future__ import annotations

import torch

from ...echodistill_core.errors import InputError
from .kinds import architecture_of, prediction_of
from .node_text import note
from .sampling import encode, sample, turbo_sigmas
from .sockets import Models

NOISES = 4
SEED = 0
MARGIN = 1.3  # ratio; similar models differ by chance, swapped ones by a factor of 2 to 3 for the miniature
LARGEST_SIDE = 32  # of the latents; larger latents give the same answer but take most of a minute on a CPU


def check_roles(models: Models, *, stop: bool) -> None:
    """Raise InputError if student and teacher seem to be swapped; without `stop`, only show a note."""
    doubt = _doubt_by_prediction(models) or _doubt_by_trial(models)
    if doubt and stop:
        raise InputError(
            f"student and teacher seem to be swapped: {doubt}. Connect SD-Turbo to student and SD 2.1 to teacher, or "
            "switch check_roles off to train all the same."
        )
    if doubt:
        note(f"student and teacher seem to be swapped: {doubt}")


def _doubt_by_prediction(models: Models) -> str:
    predictions = (prediction_of(models.student, "student"), prediction_of(models.teacher, "teacher"))
    if predictions != ("v_prediction", "epsilon"):
        return ""
    return "the student predicts velocity as SD 2.1 does, and the teacher noise as SD-Turbo does"


def _doubt_by_trial(models: Models) -> str:
    """Compare how much the one-step predictions from pure noise vary between noise samples.

    A one-step model predicts a different picture for each noise sample. A multi-step model predicts nearly the same
    blur for all: for the miniature its standard deviation is 2 to 3 times smaller.
    """
    side = min(architecture_of(models.student).unet["sample_size"], LARGEST_SIDE)
    text, empty = encode(models.clip, ""), torch.zeros([NOISES, 4, side, side])
    student, teacher = (
        float(sample(model, text, empty, turbo_sigmas(model, 1, 1.0), SEED).std(0).mean())
        for model in (models.student, models.teacher)
    )
    if teacher <= MARGIN * student:
        return ""
    return (
        f"from one noise to another the teacher's one-step guess varies more ({teacher:.3g}) than the student's "
        f"({student:.3g})"
    )
