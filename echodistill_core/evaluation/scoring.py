"""The miniature's scores of one concept: metrics of the judges' features on samples of every prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..adapter.apply import Personalised
from ..concept.augment import to_unit
from ..concept.images import square_images
from ..concept.photographs import Photograph
from ..concept.prompts import without_placeholder
from ..miniature.concepts import Concept, photographs, prompts
from ..miniature.judges import ATTRIBUTES, Judges, indices
from ..miniature.render import SIDE, render_all
from ..miniature.world import random_scene
from ..sampling import sample
from . import metrics


@dataclass(frozen=True)
class Samples:
    """images (P * S, 3, 64, 64) in [-1, 1]: S seeds of P prompts, prompt by prompt. contexts: of each prompt."""

    images: Tensor
    prompts: list[str]
    contexts: list[str]
    seeds: int


def sample_prompts(
    model: Personalised,
    concept: Concept,
    placeholder: str,
    *,
    seeds: int,
    steps: int = 1,
    guidance: float = 1.0,
    count: int = 0,
) -> Samples:
    """`seeds` samples of each of the first `count` prompts (0: all). The noise depends on prompt and seed alone.

    steps, guidance: of sampling. placeholder: the concept's token, "" for the plain class noun.
    """
    chosen = prompts(concept, placeholder)[: count or None]
    # One batch: with small batches, overhead dominates the miniature's sampling time.
    texts = [text for text, _ in chosen for _ in range(seeds)]
    noises = [1000 * (i + 1) + k for i in range(len(chosen)) for k in range(seeds)]
    images = sample(model, texts, seed=noises, steps=steps, guidance=guidance).cpu()
    return Samples(images, [text for text, _ in chosen], [name for _, name in chosen], seeds)


def reference_samples(concept: Concept, seeds: int, count: int = 0) -> Samples:
    """Ground-truth samples: the concept rendered in every prompt's context with new poses."""
    chosen = prompts(concept, "")[: count or None]
    rng = np.random.default_rng((97, concept.seed))
    scenes = [random_scene(concept.subject, context, rng) for _, context in chosen for _ in range(seeds)]
    images = to_unit(torch.from_numpy(render_all(scenes)))
    return Samples(images, [text for text, _ in chosen], [name for _, name in chosen], seeds)


def score(samples: Samples, concept: Concept, placeholder: str, judges: Judges) -> dict[str, float]:
    """Metrics by name: clip_t, clip_i, dino, attributes, context and, with two or more seeds, diversity."""
    images, references = samples.images, pixels(photographs(concept))
    captions = [without_placeholder(p, placeholder) for p in samples.prompts for _ in range(samples.seeds)]
    contexts = [context for context in samples.contexts for _ in range(samples.seeds)]
    identity, seen, truth = judges.identity(images), judges.attributes(images), indices(concept.attributes)
    pictured = judges.image_text_image(images)
    result = {
        "clip_t": metrics.clip_t(pictured, judges.image_text_text(captions)),
        "clip_i": metrics.clip_i(pictured, judges.image_text_image(references)),
        "dino": metrics.dino(identity, judges.identity(references)),
        "attributes": metrics.attribute_accuracy(seen, truth, list(truth)),
        "context": context_accuracy(seen, contexts),
    }
    if samples.seeds > 1:
        result["diversity"] = metrics.diversity(identity.unflatten(0, (len(samples.prompts), samples.seeds)))
    return result


def context_accuracy(seen: Mapping[str, Tensor], contexts: Sequence[str]) -> float:
    """Share in [0, 1] of images that the classifier assigns to the context of their prompt.

    seen: output of Judges.attributes. contexts: of each image.
    """
    wanted = torch.tensor([ATTRIBUTES["context"][0].index(context) for context in contexts])
    return float((seen["context"].cpu() == wanted).double().mean())


def pixels(pictures: list[Photograph]) -> Tensor:
    """Photographs as (N, 3, 64, 64) in [-1, 1]."""
    return to_unit(square_images(pictures, SIDE, "center").pixels)
