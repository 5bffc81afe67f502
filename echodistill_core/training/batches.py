"""What one iteration sees: augmented images with their masks and captions, drawn in shuffled passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..concept.augment import draw_view, plain_view
from ..concept.images import ImageSet
from ..concept.prompts import TEMPLATES, caption, epoch_order
from ..devices import to_device
from ..settings import TrainSettings


@dataclass(frozen=True)
class Batch:
    """One iteration's images.

    pixels: (B, 3, S, S) in [-1, 1] and mask: (B, 1, s, s), what the teacher learns from. prompts: their captions.
    real: (B, 3, S, S) in [-1, 1], what the critics take for real. student_prompts: captions of those.
    views, real_views: names of the views in `pixels` and `real`, the same whenever a view comes again; None for one
    that was augmented and never will. posterior_noise: role -> unit noise (B, 4, s, s) with which the latents of
    `pixels` are drawn from the VAE's posterior for that role's reconstruction.
    """

    pixels: Tensor
    mask: Tensor
    prompts: tuple[str, ...]
    real: Tensor
    student_prompts: tuple[str, ...]
    views: tuple[Hashable, ...]
    real_views: tuple[Hashable, ...]
    posterior_noise: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return self._each(lambda x: to_device(x, device))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, where there is a GPU to copy from it."""
        return self._each(Tensor.pin_memory) if torch.cuda.is_available() else self

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        noise = {role: change(drawn) for role, drawn in self.posterior_noise.items()}
        pixels, mask, real = (change(x) for x in (self.pixels, self.mask, self.real))
        return replace(self, pixels=pixels, mask=mask, real=real, posterior_noise=noise)


@dataclass(frozen=True)
class TrainingImages:
    """Where batches come from: a main set, and a share of draws from a second (the photographs, while echoing).

    factor: pixels per latent. channels: of the latents. roles: who learns by reconstruction; None is as settings say.
    """

    main: ImageSet
    settings: TrainSettings
    factor: int
    second: ImageSet | None = None
    second_share: float = 0.0
    channels: int = 4
    roles: tuple[str, ...] | None = None

    def draw(self, step: int, generator: torch.Generator) -> Batch:
        """The batch of this step. The order is a function of step and seed; the views come from `generator`."""
        views, real, captions, places = [], [], [], []
        for i in range(self.settings.batch_size):
            from_second = torch.rand((), generator=generator).item() < self.second_share
            images = self.second if from_second and self.second is not None else self.main
            place, text = self._item(images, step * self.settings.batch_size + i)
            image = images.pixels[place]
            view = draw_view(image, self.factor, generator, flip=self.settings.flip, resize=self.settings.augment)
            mirror = self.settings.flip and torch.rand((), generator=generator).item() < 0.5
            views.append(view)
            real.append(view if self.settings.critic_canvas else plain_view(image, self.factor, mirror))
            captions.append(text)
            places.append((id(images), place))
        mask = torch.stack([v.mask for v in views])
        roles = self.settings.reconstructing_roles if self.roles is None else self.roles
        shape = (len(views), self.channels, *mask.shape[-2:])
        return Batch(
            posterior_noise={role: torch.randn(shape, generator=generator) for role in roles},
            pixels=torch.stack([v.pixels for v in views]),
            mask=mask,
            prompts=tuple(f"{v.words} {text}".strip() for v, text in zip(views, captions, strict=True)),
            real=torch.stack([v.pixels for v in real]),
            student_prompts=tuple(f"{v.words} {text}".strip() for v, text in zip(real, captions, strict=True)),
            views=tuple(v.name(place) for v, place in zip(views, places, strict=True)),
            real_views=tuple(v.name(place) for v, place in zip(real, places, strict=True)),
        )

    def _item(self, images: ImageSet, index: int) -> tuple[int, str]:
        """Which image and its caption, at this place of endless, shuffled passes over images x templates."""
        templates = 1 if images.captions is not None else len(TEMPLATES)
        size = len(images) * templates
        place = epoch_order(size, index // size, self.settings.seed)[index % size]
        if images.captions is not None:
            return place, images.captions[place]
        text = caption(TEMPLATES[place % templates], self.settings.placeholder, self.settings.class_noun)
        return place // templates, text


def batches(
    images: TrainingImages, steps: range, generator: torch.Generator, device: torch.device, *, ahead: bool
) -> Iterator[Batch]:
    """The batch of each step, on the device.

    ahead: draw each in a thread while the one before is computed with; resizing two photographs of 512 pixels takes
    some 40 ms, half of what a large GPU takes for the whole iteration. Whether or not, `generator` is then where
    drawing this very batch leaves it, so that a checkpoint knows nothing of what was drawn ahead.
    """
    if not ahead:
        for step in steps:
            yield images.draw(step, generator).to(device)
        return
    own = torch.Generator().set_state(generator.get_state())

    def draw(step: int) -> tuple[Batch, Tensor]:
        return images.draw(step, own).pinned(), own.get_state()

    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = thread.submit(draw, steps.start) if steps else None
        for step in steps:
            assert waiting is not None
            batch, after = waiting.result()
            waiting = thread.submit(draw, step + 1) if step + 1 in steps else None
            generator.set_state(after)
            yield batch.to(device)
