"""Everything that changes while a run trains, by what it is for: what learns, the random numbers, how it computes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..devices import to_device
from ..diffusion import NoiseSchedule
from ..errors import DivergedError
from ..losses.ms_swd import draw_directions
from ..models.conditioning import TextConditioning
from ..models.family import Denoiser, Family
from ..perception.backbones import Backbone
from ..settings import TrainSettings
from .batches import Batch, TrainingImages
from .compute import Compute
from .trainable import TrainedWeights


@dataclass
class Trainables:
    """What the optimisers step. A player is "teacher", "student" or "critics", each with an optimiser of its own.

    weights: of the UNets that learn, by role. token_embeddings: the placeholder's (vectors, width) as each role reads
    them; one and the same parameter where the text encoder is shared. critics: heads by backbone.
    """

    weights: dict[str, TrainedWeights]
    token_embeddings: dict[str, nn.Parameter]
    critics: nn.ModuleDict
    optimizers: dict[str, torch.optim.AdamW]

    def parameters(self, player: str) -> list[nn.Parameter]:
        """The parameters that the player's optimiser steps: float32 masters."""
        return [p for group in self.optimizers[player].param_groups for p in group["params"]]

    def grad_inputs(self, player: str) -> list[nn.Parameter]:
        """The tensors that the player's losses are differentiated with respect to: see TrainedWeights.working."""
        weights = self.weights.get(player)
        if weights is None:
            return self.parameters(player)
        embeddings = [p for p in self.parameters(player) if any(p is e for e in self.token_embeddings.values())]
        return [*weights.working.values(), *embeddings]

    def step(self, player: str, max_norm: float) -> Tensor:
        """Clip the player's gradients to this norm (0 does not clip) and step. Returns the norm before clipping."""
        weights, optimizer = self.weights.get(player), self.optimizers[player]
        if weights is not None:
            weights.grads_to_master()
        norm = nn.utils.clip_grad_norm_(self.parameters(player), max_norm if max_norm > 0 else float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if weights is not None:
            weights.sync_from_master()
        return norm.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that learns, by its name in a checkpoint. Shared embeddings are listed once."""
        tensors: dict[str, Tensor] = {}
        for role, weights in self.weights.items():
            tensors.update({f"{role}/{n}": p.detach() for n, p in weights.parameters.items()})
        for role, embeddings in self.token_embeddings.items():
            if role == "student" and embeddings is self.token_embeddings.get("teacher"):
                continue
            tensors[f"rows/{role}"] = embeddings.detach()
        tensors.update({f"critics/{n}": p.detach() for n, p in self.critics.named_parameters()})
        return tensors

    def check_finite(self, step: int) -> None:
        """Raise DivergedError naming the first tensor that is not finite after `step`."""
        tensors = self.tensors()
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
        for name, is_finite in zip(tensors, finite, strict=True):
            if not is_finite:
                raise DivergedError(f"{name} is not finite after step {step}; lower the learning rates.")


@dataclass
class RandomStreams:
    """A run's random numbers. All generators are on the CPU, so that a seed draws the same numbers on every device.

    data    drawn by batches.TrainingImages: which set, view, mirroring, and the noise of the VAE's posterior
    noise   drawn by an iteration in this order, each where its term is on:
              teacher: n and t of Eq. 1; student: n and t of Eq. 1; n of its one-step image; t of the teacher's target;
              directions of MS-SWD
    prior   n and t of Eq. 1 on class images, and those images' views; present where prior preservation is on

    Initial values (low-rank updates, critic heads), previews, samples and pools use generators of their own seeds
    (build.new_state, samples, echo, prior) and do not change these three. The order of images is a function of seed
    and step (concept.prompts.epoch_order).
    """

    generators: dict[str, torch.Generator]

    def __getitem__(self, stream: str) -> torch.Generator:
        return self.generators[stream]

    def normal(self, shape: Sequence[int], stream: str = "noise") -> Tensor:
        """Unit noise of this shape, float32 on the CPU."""
        return torch.randn(*shape, generator=self[stream])

    def timesteps(self, total: int, count: int, stream: str = "noise") -> Tensor:
        """t ~ U{0..total-1}, int64 (count,) on the CPU."""
        return torch.randint(total, (count,), generator=self[stream])


@dataclass
class TrainState:
    """One run in memory.

    prior: class images by the role that they are for (training.prior). started: the roles that began from an adapter
    (training.start).
    """

    settings: TrainSettings
    family: Family
    backbones: dict[str, Backbone]
    trainables: Trainables
    random: RandomStreams
    compute: Compute
    prior: dict[str, TrainingImages] = field(default_factory=dict)
    started: frozenset[str] = frozenset()
    stage: str = "distil"
    step: int = 0
    _unconditional: TextConditioning | None = field(default=None, repr=False)
    _by_view: dict[Hashable, Tensor] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """The device of all networks."""
        return self.family.device

    @property
    def shares_token(self) -> bool:
        """Whether teacher and student read one and the same token."""
        return self.trainables.token_embeddings["student"] is self.trainables.token_embeddings["teacher"]

    def denoiser(self, role: str) -> Denoiser:
        """The role's UNet with its schedule."""
        found = self.family.student if role == "student" else self.family.teacher
        assert found is not None
        return found

    def condition(self, prompts: Sequence[str], role: str, *, learns: bool = True) -> TextConditioning:
        """tau(y) of B prompts as this role reads them.

        Gradients reach the role's token embeddings where they are on, `learns` holds, and the role's own loss trains
        them: where the token learns from the teacher, the student reads it and may not change it.
        """
        embeddings = self.trainables.token_embeddings[role]
        trains = learns and any(embeddings is parameter for parameter in self.trainables.grad_inputs(role))
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return self.compute.map(lambda part: self.family.condition(part, embeddings), prompts)

    def unconditional(self, count: int) -> TextConditioning:
        """The conditioning of `count` empty prompts; computed once, since nothing in it learns."""
        if self._unconditional is None:
            with torch.no_grad():
                self._unconditional = self.family.condition([""])
        return self._unconditional.expand(count)

    def draw_noise(self, batch: Batch, stream: str = "noise") -> Tensor:
        """Unit noise of a batch's latents, (B, 4, h, w), on the device."""
        shape = (len(batch), self.family.latent_channels, *batch.mask.shape[-2:])
        return to_device(self.random.normal(shape, stream), self.device)

    def draw_timesteps(self, schedule: NoiseSchedule, count: int, stream: str = "noise") -> Tensor:
        """t ~ U{0..T-1} for `count` images, int64 (count,), on the device."""
        return to_device(self.random.timesteps(schedule.timesteps, count, stream), self.device)

    def draw_directions(self, batch: Batch) -> list[Tensor]:
        """MS-SWD's random directions for a batch's images, one tensor a level, on the device."""
        s, side = self.settings, batch.pixels.shape[-1]
        drawn = draw_directions(side, side, self.random["noise"], levels=s.swd_levels, projections=s.swd_projections)
        return [to_device(directions, self.device) for directions in drawn]

    def by_view(
        self, kind: str, views: Sequence[Hashable], pixels: Tensor, function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """function(pixels), (B, ...). Where every view has a name, each view is computed once, alone, and kept.

        Alone, so that the result does not depend on the batch in which a view came first.
        """
        if None in views:
            return function(pixels)
        for view, image in zip(views, pixels, strict=True):
            if (kind, view) not in self._by_view:
                self._by_view[kind, view] = function(image[None])
        return torch.cat([self._by_view[kind, view] for view in views])
