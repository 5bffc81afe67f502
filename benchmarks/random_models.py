"""Random weights for the benchmarks, tiny or of full size: a family, backbones, training states and batches."""

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
from .literal import LiteralImplementation

PHOTOGRAPHS = 5
# Published full-size checkpoints are fp16. At tiny scale fp16 saves nothing.
CHECKPOINT_DTYPES = {"full": torch.float16, "tiny": torch.float32}


class RandomModels:
    """Checkpoints, backbones and photographs of random numbers, and the training states made from them.

    scale: "full" for the sizes of SD 2.1, SD-Turbo and the published backbones, "tiny" for tests and CPUs.
    resolution: side of the images in pixels; 0 takes the family's own. photographs: the number of training images.
    """

    def __init__(self, scale: str, device: torch.device, resolution: int = 0, photographs: int = PHOTOGRAPHS) -> None:
        self.scale, self.device = scale, device
        self.architecture = rc.SCALES[scale]
        self.checkpoints = {
            role: rc.random_checkpoint(role, self.architecture, CHECKPOINT_DTYPES[scale], device) for role in rc.ROLES
        }
        self._backbones: dict[str, Backbone] = {}
        self._set_images(resolution, photographs)

    def with_images(self, resolution: int = 0, photographs: int = PHOTOGRAPHS) -> RandomModels:
        """A copy with the same weights and other images."""
        other = copy.copy(self)
        other._set_images(resolution, photographs)
        return other

    def _set_images(self, resolution: int, photographs: int) -> None:
        self.resolution = resolution or self.architecture.resolution
        generator = torch.Generator().manual_seed(0)
        shape = (photographs, 3, self.resolution, self.resolution)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self.images = ImageSet(pixels, tuple(f"{i}.png" for i in range(photographs)))

    def release_weights(self) -> None:
        """Drop the references to checkpoints and backbones. No new network can be made afterwards."""
        self.checkpoints.clear()
        self._backbones.clear()

    def settings(self, **options: Any) -> TrainSettings:
        """The paper's settings with these changes."""
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
        """New backbones for these settings by role. The weights are the same at each call."""
        names = needed_backbones(settings)
        if self.scale == "tiny":
            return load_backbones(names, "tiny")
        # Drawing half a billion numbers takes longer than most measurements, so each backbone is drawn once.
        for name in sorted({*names.values()} - {*self._backbones}):
            with torch.random.fork_rng(), self.device:
                torch.manual_seed(0)
                self._backbones[name] = new_backbone(SPECS[name]).cpu()
        return {role: copy.deepcopy(self._backbones[name]) for role, name in names.items()}

    def state(self, settings: TrainSettings) -> TrainState:
        """A training state with these settings at step 0, on their device."""
        family = self.family()
        family.text = family.text.with_placeholders({settings.placeholder: settings.vectors})
        return new_state(family, self.backbones(settings), settings)

    def adapter(self) -> Adapter:
        """The student's adapter at step 0: of full size, with all weight differences 0."""
        state = self.state(self.settings(device="cpu"))
        adapter = adapters_of(state, "distil", 0)["student"]
        state.family.restore()
        return adapter

    def literal(self, settings: TrainSettings) -> LiteralImplementation:
        """The literal implementation, initialised like a new state with these settings."""
        state = self.state(replace(settings, device="cpu"))  # only its tokenizer and critic heads are used
        text, heads = state.family.text, dict(state.trainables.critics.items())
        return LiteralImplementation(
            settings,
            self.architecture,
            self.checkpoints,
            self.backbones(settings),
            lambda prompt: [int(i) for i in text.tokenize([prompt])[0]],
            heads,
            self.device,
        )

    def training_images(self, settings: TrainSettings) -> TrainingImages:
        """The source of batches for these settings."""
        return TrainingImages(self.images, settings, 2 ** (len(self.architecture.vae["block_out_channels"]) - 1))

    def batch(self, settings: TrainSettings, generator: torch.Generator, step: int = 0) -> Batch:
        """The batch of a step, on the device."""
        return self.training_images(settings).draw(step, generator).to(self.device)
