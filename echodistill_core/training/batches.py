"""What one iteration sees: augmented images with their masks and captions, drawn in shuffled passes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..concept.augment import draw_view, plain_view
from ..concept.images import ImageSet
from ..concept.prompts import TEMPLATES, caption, epoch_order
from ..settings import TrainSettings


@dataclass(frozen=True)
class Batch:
    """One iteration's images.

    pixels: (B, 3, S, S) in [-1, 1] and mask: (B, 1, s, s), what the teacher learns from. prompts: their captions.
    real: (B, 3, S, S) in [-1, 1], what the critics take for real. student_prompts: captions of those.
    """

    pixels: Tensor
    mask: Tensor
    prompts: tuple[str, ...]
    real: Tensor
    student_prompts: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return replace(self, pixels=self.pixels.to(device), mask=self.mask.to(device), real=self.real.to(device))


@dataclass(frozen=True)
class TrainingImages:
    """Where batches come from: a main set, and a share of draws from a second (the photographs, while echoing)."""

    main: ImageSet
    settings: TrainSettings
    factor: int
    second: ImageSet | None = None
    second_share: float = 0.0

    def draw(self, step: int, generator: torch.Generator) -> Batch:
        """The batch of this step. The order is a function of step and seed; the views come from `generator`."""
        views, real, captions = [], [], []
        for i in range(self.settings.batch_size):
            from_second = torch.rand((), generator=generator).item() < self.second_share
            images = self.second if from_second and self.second is not None else self.main
            image, text = self._item(images, step * self.settings.batch_size + i)
            view = draw_view(image, self.factor, generator, flip=self.settings.flip, resize=self.settings.augment)
            mirror = self.settings.flip and torch.rand((), generator=generator).item() < 0.5
            views.append(view)
            real.append(view if self.settings.critic_canvas else plain_view(image, self.factor, mirror))
            captions.append(text)
        return Batch(
            pixels=torch.stack([v.pixels for v in views]),
            mask=torch.stack([v.mask for v in views]),
            prompts=tuple(f"{v.words} {text}".strip() for v, text in zip(views, captions, strict=True)),
            real=torch.stack([v.pixels for v in real]),
            student_prompts=tuple(f"{v.words} {text}".strip() for v, text in zip(real, captions, strict=True)),
        )

    def _item(self, images: ImageSet, index: int) -> tuple[Tensor, str]:
        """Image and caption at this place of an endless, shuffled sequence of passes over images x templates."""
        templates = 1 if images.captions is not None else len(TEMPLATES)
        size = len(images) * templates
        place = epoch_order(size, index // size, self.settings.seed)[index % size]
        image = images.pixels[place // templates]
        if images.captions is not None:
            return image, images.captions[place]
        text = caption(TEMPLATES[place % templates], self.settings.placeholder, self.settings.class_noun)
        return image, text
