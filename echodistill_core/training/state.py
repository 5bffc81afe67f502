"""The state of a run in memory: trained parameters with their optimisers, random generators, and compute options."""

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
    """The trained parameters and their optimisers.

    A player is "teacher", "student" or "critics"; each has its own optimiser. A role is "teacher" or "student".

    weights: role -> trained parameters of its UNet; roles that do not learn are absent.
    token_embeddings: role -> embeddings (vectors, width) of the placeholder; one shared parameter for both roles if
    the text encoder is shared.
    critics: backbone -> trained head. optimizers: player -> optimiser.
    """

    weights: dict[str, TrainedWeights]
    token_embeddings: dict[str, nn.Parameter]
    critics: nn.ModuleDict
    optimizers: dict[str, torch.optim.AdamW]

    def parameters(self, player: str) -> list[nn.Parameter]:
        """The float32 parameters that the player's optimiser updates."""
        return [p for group in self.optimizers[player].param_groups for p in group["params"]]

    def grad_inputs(self, player: str) -> list[nn.Parameter]:
        """The tensors for which backward computes the player's gradients: working copies (TrainedWeights.working) of
        the UNet's parameters, and token embeddings.
        """
        weights = self.weights.get(player)
        if weights is None:
            return self.parameters(player)
        embeddings = [p for p in self.parameters(player) if any(p is e for e in self.token_embeddings.values())]
        return [*weights.working.values(), *embeddings]

    def step(self, player: str, max_norm: float) -> Tensor:
        """One optimiser step of a player; its gradients are clipped to max_norm (L2; 0 turns clipping off) and reset.

        Returns the gradient norm before clipping, a scalar on the device.
        """
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
        """Checkpoint name -> trained tensor, detached, sharing memory. Shared token embeddings are listed once."""
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
        """Raise DivergedError, naming tensor and step, if a trained tensor holds NaN or infinity."""
        tensors = self.tensors()
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
        for name, is_finite in zip(tensors, finite, strict=True):
            if not is_finite:
                raise DivergedError(f"{name} is not finite after step {step}; lower the learning rates.")


@dataclass
class RandomStreams:
    """A run's random generators. All are on the CPU, so that a seed gives the same numbers on every device.

    data    batches.TrainingImages: choice of image set, augmentation, mirroring, noise of the VAE's posterior
    noise   steps.iterate, in this order, each only if its term is active:
              1. teacher: n, t of Eq. 1              4. student: t of the teacher's target
              2. student: n, t of Eq. 1              5. student: projection directions of MS-SWD
              3. student: n of its one-step image
    prior   n and t of Eq. 1 on class images, and their augmentation; absent without prior preservation

    Initial values (low-rank updates, critic heads), previews and pools use separate generators and do not perturb
    these three. The order of images is a function of seed and step (concept.prompts.epoch_order).
    """

    generators: dict[str, torch.Generator]

    def __getitem__(self, stream: str) -> torch.Generator:
        return self.generators[stream]

    def normal(self, shape: Sequence[int], stream: str = "noise") -> Tensor:
        """Standard normal numbers of this shape, float32 on the CPU."""
        return torch.randn(*shape, generator=self[stream])

    def timesteps(self, total: int, count: int, stream: str = "noise") -> Tensor:
        """t ~ U{0..total-1}, int64 (count,) on the CPU."""
        return torch.randint(total, (count,), generator=self[stream])


@dataclass
class TrainState:
    """One run in memory.

    prior: role -> its class images (training.prior); empty without prior preservation.
    started: the roles that start from an adapter (training.start).
    stage: "distil" or "echo". step: iterations of the stage that are done.
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
        """The device on which the networks run."""
        return self.family.device

    @property
    def shares_token(self) -> bool:
        """Whether teacher and student share the token embeddings."""
        return self.trainables.token_embeddings["student"] is self.trainables.token_embeddings["teacher"]

    def denoiser(self, role: str) -> Denoiser:
        """The UNet of a role with its noise schedule. The family must have it."""
        found = self.family.student if role == "student" else self.family.teacher
        assert found is not None
        return found

    def condition(self, prompts: Sequence[str], role: str, *, learns: bool = True) -> TextConditioning:
        """tau(prompt) of B prompts, with the token embeddings of this role.

        learns: whether gradients may reach the token embeddings. They do so only if gradients are enabled and the
        role's own optimiser updates the embeddings. A shared token that the teacher trains gets no gradient from the
        student's losses.
        """
        embeddings = self.trainables.token_embeddings[role]
        trains = learns and any(embeddings is parameter for parameter in self.trainables.grad_inputs(role))
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return self.compute.map(lambda part: self.family.condition(part, embeddings), prompts)

    def unconditional(self, count: int) -> TextConditioning:
        """The conditioning of `count` empty prompts. It has no trained part and is computed once."""
        if self._unconditional is None:
            with torch.no_grad():
                self._unconditional = self.family.condition([""])
        return self._unconditional.expand(count)

    def draw_noise(self, batch: Batch, stream: str = "noise") -> Tensor:
        """Unit noise in the shape of a batch's latents, (B, 4, h, w), float32 on the device."""
        shape = (len(batch), self.family.latent_channels, *batch.mask.shape[-2:])
        return to_device(self.random.normal(shape, stream), self.device)

    def draw_timesteps(self, schedule: NoiseSchedule, count: int, stream: str = "noise") -> Tensor:
        """t ~ U{0..T-1} for `count` images, int64 (count,), on the device."""
        return to_device(self.random.timesteps(schedule.timesteps, count, stream), self.device)

    def draw_directions(self, batch: Batch) -> list[Tensor]:
        """Random projection directions of MS-SWD: a tensor (P, 3, patch, patch) per pyramid level, on the device."""
        s, side = self.settings, batch.pixels.shape[-1]
        drawn = draw_directions(side, side, self.random["noise"], levels=s.swd_levels, projections=s.swd_projections)
        return [to_device(directions, self.device) for directions in drawn]

    def cached_by_view(
        self, kind: str, views: Sequence[Hashable], pixels: Tensor, function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """function(pixels), (B, ...), with a cache over views that recur.

        kind: name of the function in the cache's key. views: a key for each image; None for an augmented
        image that never recurs. If any is None, the batch is computed as a whole and nothing is cached. Otherwise each
        view is computed once, in a batch of one, so that the result does not depend on the batch it first appears in.
        """
        if None in views:
            return function(pixels)
        for view, image in zip(views, pixels, strict=True):
            if (kind, view) not in self._by_view:
                self._by_view[kind, view] = function(image[None])
        return torch.cat([self._by_view[kind, view] for view in views])
