"""What the benchmarks work on: a family and backbones of random weights, tiny or of full size, and batches for them."""

from __future__ import annotations

from typing import Any

import torch

from echodistill_core.concept.images import ImageSet
from echodistill_core.models.family import Family
from echodistill_core.models.load import load_family
from echodistill_core.perception.backbones import SPECS, Backbone, new_backbone
from echodistill_core.perception.load import load_backbones
from echodistill_core.settings import TrainSettings, from_options
from echodistill_core.training.batches import Batch, TrainingImages
from echodistill_core.training.state import TrainState, needed_backbones, new_state

from . import random_checkpoint as rc
from .plain import Plain

PHOTOGRAPHS = 5
# Files hold half precision at full size; at tiny size nothing is gained by it.
FILES = {"full": torch.float16, "tiny": torch.float32}


class Workbench:
    """scale: "full" for SD 2.1 and SD-Turbo with the published backbones' sizes, "tiny" for tests and CPUs.

    resolution: of the images in pixels; 0 takes the family's own.
    """

    def __init__(self, scale: str, device: torch.device, resolution: int = 0, photographs: int = PHOTOGRAPHS) -> None:
        self.scale, self.device = scale, device
        self.architecture = rc.SCALES[scale]
        self.checkpoints = {role: rc.random_checkpoint(role, self.architecture, FILES[scale]) for role in rc.ROLES}
        self.resolution = resolution or self.architecture.resolution
        generator = torch.Generator().manual_seed(0)
        shape = (photographs, 3, self.resolution, self.resolution)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self.images = ImageSet(pixels, tuple(f"{i}.png" for i in range(photographs)))

    def settings(self, **options: Any) -> TrainSettings:
        """The paper's settings, but for these."""
        given = {"class_noun": "dog", "device": str(self.device), "resolution": self.resolution, **options}
        return from_options(TrainSettings, given)

    def family(self) -> Family:
        """A new family on the CPU that shares the checkpoints' tensors."""
        return load_family(
            {k: dict(v) for k, v in self.checkpoints["student"].items()},
            {k: dict(v) for k, v in self.checkpoints["teacher"].items()},
            name="custom",
            student_prediction="epsilon",
            teacher_prediction="v_prediction",
            architecture=self.architecture,
        )

    def backbones(self, settings: TrainSettings) -> dict[str, Backbone]:
        """New backbones for these settings, always of the same weights."""
        wanted = needed_backbones(settings)
        if self.scale == "tiny":
            return load_backbones(wanted, "tiny")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return {role: new_backbone(SPECS[name]) for role, name in wanted.items()}

    def state(self, settings: TrainSettings) -> TrainState:
        """A run of these settings at step 0, on the device."""
        family = self.family()
        family.text = family.text.with_placeholders({settings.placeholder: settings.vectors})
        return new_state(family, self.backbones(settings), settings)

    def plain(self, state: TrainState) -> Plain:
        """The method read literally, starting where a new state does."""
        return Plain(
            state.settings,
            self.architecture,
            self.checkpoints,
            self.backbones(state.settings),
            lambda prompt: [int(i) for i in state.family.text.tokenize([prompt])[0]],
            dict(state.critics.items()),
            self.device,
        )

    def batch(self, settings: TrainSettings, generator: torch.Generator, step: int = 0) -> Batch:
        """The batch of a step, on the device."""
        factor = 2 ** (len(self.architecture.vae["block_out_channels"]) - 1)
        return TrainingImages(self.images, settings, factor).draw(step, generator).to(self.device)
