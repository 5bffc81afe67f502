"""Scores of a demo's pictures by the miniature's judges."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..evaluation.metrics import attribute_accuracy, clip_i, clip_t, dino
from ..evaluation.scoring import context_accuracy
from ..miniature.judges import Judges, indices
from .task import DemoTask


def score(
    judges: Judges, task: DemoTask, images: Tensor, prompts: Sequence[str], references: Tensor
) -> dict[str, float]:
    """Scores by name in the page's SCORES; attributes and context only for concepts with known attributes.

    images: (B, 3, 64, 64) in [-1, 1], one for each prompt. prompts: the task's, without the placeholder. references:
    the photographs, (N, 3, 64, 64) in [-1, 1]. All on the CPU.
    """
    result = {
        "clip_t": clip_t(judges.image_text_image(images), judges.image_text_text(prompts)),
        "clip_i": clip_i(judges.image_text_image(images), judges.image_text_image(references)),
        "dino": dino(judges.identity(images), judges.identity(references)),
    }
    if task.attributes is not None:
        seen, truth = judges.attributes(images), indices(task.attributes)
        result["attributes"] = attribute_accuracy(seen, truth, list(truth))
        result["context"] = context_accuracy(seen, task.contexts)
    return result
