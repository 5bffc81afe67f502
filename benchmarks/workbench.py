"""What the benchmarks work on: a family and backbones of random weights, tiny or of full size, and batches for them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from echodistill_core.adapter.file import Adapter
from echodistill_core.concept.images import ImageSet
from echodistill_core.models.family import Family
from echodistill_core.models.load import load_family
from echodistill_core.perception.backbones import SPECS, Backbone, new_backbone
from echodistill_core.perception.load import load_backbones
from echodistill_core.settings import TrainSettings, from_options
from echodistill_core.training.batches import Batch, TrainingImages
from echodistill_core.training.build import needed_backbones, new_state
from echodistill_core.training.loop import adapters_of
from echodistill_core.training.state import TrainState

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
        self.checkpoints = {
            role: rc.random_checkpoint(role, self.architecture, FILES[scale], device) for role in rc.ROLES
        }
        self._backbones: dict[str, Backbone] = {}
        self._take_images(resolution, photographs)

    def of_images(self, resolution: int = 0, photographs: int = PHOTOGRAPHS) -> Workbench:
        """The same networks with other images."""
        other = copy.copy(self)
        other._take_images(resolution, photographs)
        return other

    def _take_images(self, resolution: int, photographs: int) -> None:
        self.resolution = resolution or self.architecture.resolution
        generator = torch.Generator().manual_seed(0)
        shape = (photographs, 3, self.resolution, self.resolution)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self.images = ImageSet(pixels, tuple(f"{i}.png" for i in range(photographs)))

    def forget(self) -> None:
        """Let go of what new networks are made from, where there will be none."""
        self.checkpoints.clear()
        self._backbones.clear()

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
        # Drawing half a billion numbers takes longer than most that is measured, so it is done once.
        for name in sorted({*wanted.values()} - {*self._backbones}):
            with torch.random.fork_rng(), self.device:
                torch.manual_seed(0)
                self._backbones[name] = new_backbone(SPECS[name]).cpu()
        return {role: copy.deepcopy(self._backbones[name]) for role, name in wanted.items()}

    def state(self, settings: TrainSettings) -> TrainState:
        """A run of these settings at step 0, on the device."""
        family = self.family()
        family.text = family.text.with_placeholders({settings.placeholder: settings.vectors})
        return new_state(family, self.backbones(settings), settings)

    def adapter(self) -> Adapter:
        """A student's adapter from before the first iteration: of full size, and all differences 0."""
        state = self.state(self.settings(device="cpu"))
        made = adapters_of(state, "distil", 0)["student"]
        state.family.restore()
        return made

    def plain(self, settings: TrainSettings) -> Plain:
        """The method read literally, starting where a new state of these settings does."""
        state = self.state(replace(settings, device="cpu"))  # of which only words and heads are taken
        text, heads = state.family.text, dict(state.trainables.critics.items())
        return Plain(
            settings,
            self.architecture,
            self.checkpoints,
            self.backbones(settings),
            lambda prompt: [int(i) for i in text.tokenize([prompt])[0]],
            heads,
            self.device,
        )

    def training_images(self, settings: TrainSettings) -> TrainingImages:
        """Where the batches of a run of these settings come from."""
        return TrainingImages(self.images, settings, 2 ** (len(self.architecture.vae["block_out_channels"]) - 1))

    def batch(self, settings: TrainSettings, generator: torch.Generator, step: int = 0) -> Batch:
        """The batch of a step, on the device."""
        return self.training_images(settings).draw(step, generator).to(self.device)
