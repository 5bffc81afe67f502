"""Batches: augmented training images with masks and captions, in a new random order for every epoch."""

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
    """The images of one iteration, of S x S pixels and s x s latents.

    pixels: (B, 3, S, S) in [-1, 1], the images of the reconstruction loss (Eq. 1). prompts: their B captions.
    mask: (B, 1, s, s), 1 where pixels show the photograph and 0 on the grey canvas around it.
    real: (B, 3, S, S) in [-1, 1], the critics' real images (Eq. 7). student_prompts: their B captions, from which the
    student generates its images.
    views, real_views: cache keys of the images in `pixels` and `real`, equal for equal images; None for an image with
    random augmentation, which never recurs.
    posterior_noise: role -> unit noise (B, 4, s, s) for sampling the latents of `pixels` from the VAE's posterior.
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
        """The same batch in page-locked memory if CUDA is available; copies to the GPU are then asynchronous."""
        return self._each(Tensor.pin_memory) if torch.cuda.is_available() else self

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        noise = {role: change(drawn) for role, drawn in self.posterior_noise.items()}
        pixels, mask, real = (change(x) for x in (self.pixels, self.mask, self.real))
        return replace(self, pixels=pixels, mask=mask, real=real, posterior_noise=noise)


@dataclass(frozen=True)
class TrainingImages:
    """Draws batches from a main set of images and, with probability second_share in [0, 1], from a second set.

    In the echoing stage the main set is the pool and the second set the photographs.
    factor: pixels per latent along a side. channels: of the latents. roles: the roles with a reconstruction loss; None
    takes them from the settings.
    """

    main: ImageSet
    settings: TrainSettings
    factor: int
    second: ImageSet | None = None
    second_share: float = 0.0
    channels: int = 4
    roles: tuple[str, ...] | None = None

    def draw(self, step: int, generator: torch.Generator) -> Batch:
        """The batch of a step, counted from 0. The order of images is a function of step and seed.

        generator: on the CPU; draws the choice of set, augmentation, mirroring and posterior noise.
        """
        views, real, captions, keys = [], [], [], []
        for i in range(self.settings.batch_size):
            from_second = torch.rand((), generator=generator).item() < self.second_share
            images = self.second if from_second and self.second is not None else self.main
            index, text = self._item(images, step * self.settings.batch_size + i)
            image = images.pixels[index]
            view = draw_view(image, self.factor, generator, flip=self.settings.flip, resize=self.settings.augment)
            mirror = self.settings.flip and torch.rand((), generator=generator).item() < 0.5
            views.append(view)
            real.append(view if self.settings.critic_canvas else plain_view(image, self.factor, mirror))
            captions.append(text)
            keys.append((id(images), index))
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
            views=tuple(v.name(key) for v, key in zip(views, keys, strict=True)),
            real_views=tuple(v.name(key) for v, key in zip(real, keys, strict=True)),
        )

    def _item(self, images: ImageSet, number: int) -> tuple[int, str]:
        """Image index and caption of the draw with this number, counted from 0.

        An epoch contains each image with its own caption once, or, without captions, each pair of image and template.
        """
        templates = 1 if images.captions is not None else len(TEMPLATES)
        size = len(images) * templates
        item = epoch_order(size, number // size, self.settings.seed)[number % size]
        if images.captions is not None:
            return item, images.captions[item]
        text = caption(TEMPLATES[item % templates], self.settings.placeholder, self.settings.class_noun)
        return item // templates, text


def batches(
    images: TrainingImages, steps: range, generator: torch.Generator, device: torch.device, *, prefetch: bool
) -> Iterator[Batch]:
    """The batch of each step, on the device.

    prefetch: draw the next batch in a thread while the current one is used. Resizing two photographs of 512 pixels
    takes about 40 ms, half the time of an iteration on a large GPU.
    Either way, `generator` is left as of the yielded batch, so checkpoints ignore prefetched batches.
    """
    if not prefetch:
        for step in steps:
            yield images.draw(step, generator).to(device)
        return
    own = torch.Generator().set_state(generator.get_state())

    def draw(step: int) -> tuple[Batch, Tensor]:
        return images.draw(step, own).pinned(), own.get_state()

    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = thread.submit(draw, steps.start) if steps else None
        for step in steps:
            assert pending is not None
            batch, state_after = pending.result()
            pending = thread.submit(draw, step + 1) if step + 1 in steps else None
            generator.set_state(state_after)
            yield batch.to(device)
