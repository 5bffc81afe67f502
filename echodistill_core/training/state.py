"""Everything that changes while a run trains, and how it is made at the start."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import DTYPES, ONE_MEMORY, computes_bf16, pick_device, to_device
from ..errors import DivergedError, InputError, Notice
from ..losses.adversarial import CriticHead
from ..models.family import Denoiser, Family
from ..perception.backbones import Backbone
from ..settings import TrainSettings
from .batches import Batch, TrainingImages
from .offload import ModelOffloader
from .start import Start, apply_deltas
from .trainable import TrainedWeights

ROLES = ("teacher", "student")
CRITICS = ("clip", "dino", "dinov2")


def needed_backbones(settings: TrainSettings) -> dict[str, str]:
    """The backbones these settings use: role ("dino", "dinov2", "clip") -> name in perception's tables."""
    roles = set(settings.critic_weights)
    if settings.aligns and settings.identity_weight > 0:
        roles.add("clip")
    return {role: settings.dinov2_backbone if role == "dinov2" else role for role in sorted(roles)}


@dataclass
class TrainState:
    """One run in memory.

    rows: the placeholder's embeddings (vectors, width) as each role reads them; one and the same tensor where shared.
    critics: heads by backbone role. generators: "data" draws batches, "noise" all else; both on the CPU,
    so that a run draws the same numbers on every device. prior: images of the class by the role that they keep from
    drifting (training.prior), with the generator "prior". given: the roles that began from an adapter (training.start).
    one_unet: in memory_mode low, what keeps one UNet at a time on a device that has memory of its own.
    """

    settings: TrainSettings
    family: Family
    backbones: dict[str, Backbone]
    weights: dict[str, TrainedWeights]
    token_embeddings: dict[str, nn.Parameter]
    critics: nn.ModuleDict
    optimizers: dict[str, torch.optim.AdamW]
    generators: dict[str, torch.Generator]
    prior: dict[str, TrainingImages] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    offloader: ModelOffloader | None = None
    stage: str = "distil"
    step: int = 0
    _unconditional: Tensor | None = field(default=None, repr=False)
    _kept: dict[Hashable, Tensor] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.family.device

    @property
    def is_low(self) -> bool:
        """Whether memory counts for more than time: one image at a time, and activations made again when needed."""
        return self.settings.memory_mode == "low"

    @property
    def token_learns_from(self) -> str:
        """The role whose loss the student's token learns from; a teacher that does not learn leaves it as it is."""
        return _token_learns_from(self.settings, self.given)

    def denoiser(self, role: str) -> Denoiser:
        """The role's UNet with its schedule."""
        found = self.family.student if role == "student" else self.family.teacher
        assert found is not None
        return found

    def text(self, prompts: Sequence[str], role: str) -> Tensor:
        """tau(y) as this role reads it: (B, 77, width). Gradients reach its rows where gradients are on."""
        return self.family.text(prompts, self.token_embeddings[role])

    def read(self, prompts: Sequence[str], role: str, *, learning: bool = True) -> Tensor:
        """tau(y) as in `text`, with gradients only where they are on and the role's own loss is what its rows learn
        from: where the token learns from the teacher, the student reads it and may not change it.
        """
        owned = learning and any(self.token_embeddings[role] is leaf for leaf in self.leaves(role))
        with torch.set_grad_enabled(owned and torch.is_grad_enabled()):
            return self.text(prompts, role)

    def unconditional(self, count: int) -> Tensor:
        """Text features of the empty prompt, (count, 77, width); made once, since nothing in them learns."""
        if self._unconditional is None:
            with torch.no_grad():
                self._unconditional = self.family.text([""])
        return self._unconditional.expand(count, -1, -1)

    def learned(self, optimizer: str) -> list[nn.Parameter]:
        """The parameters that this optimiser steps."""
        return [p for group in self.optimizers[optimizer].param_groups for p in group["params"]]

    def leaves(self, optimizer: str) -> list[nn.Parameter]:
        """What a loss is differentiated with respect to before `optimizer` steps: see TrainedWeights.working."""
        weights = self.weights.get(optimizer)
        if weights is None:
            return self.learned(optimizer)
        token_embeddings = [p for p in self.learned(optimizer) if any(p is r for r in self.token_embeddings.values())]
        return [*weights.working.values(), *token_embeddings]

    def parts(self, count: int) -> Iterator[tuple[slice, float]]:
        """The parts of a batch of `count` images that are computed at once, each with its share of the batch."""
        size = 1 if self.is_low else count
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            yield part, (part.stop - part.start) / count

    def draw_noise(self, batch: Batch, generator: str) -> Tensor:
        """Unit noise for a batch's latents, (B, 4, h, w)."""
        shape = (len(batch), self.family.latent_channels, *batch.mask.shape[-2:])
        return to_device(torch.randn(shape, generator=self.generators[generator]), self.device)

    def draw_timesteps(self, denoiser: Denoiser, count: int, generator: str) -> Tensor:
        """t ~ U{0..T-1} for each of `count` images, (B,)."""
        t = torch.randint(denoiser.schedule.timesteps, (count,), generator=self.generators[generator])
        return to_device(t, self.device)

    def kept_by_view(
        self, kind: str, views: Sequence[Hashable], pixels: Tensor, make: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """make(pixels), (B, ...); where every view has a name, so that it comes again, made once for each and kept.

        One image at a time then, so that what is kept does not depend on the batch that it was first seen in.
        """
        if None in views:
            return make(pixels)
        for view, image in zip(views, pixels, strict=True):
            if (kind, view) not in self._kept:
                self._kept[kind, view] = make(image[None])
        return torch.cat([self._kept[kind, view] for view in views])

    def trained_tensors(self) -> dict[str, Tensor]:
        """Every tensor that learns, by a name that a checkpoint uses. Shared rows stand there once."""
        tensors: dict[str, Tensor] = {}
        for role, weights in self.weights.items():
            tensors.update({f"{role}/{n}": p.detach() for n, p in weights.parameters.items()})
        for role, token_embeddings in self.token_embeddings.items():
            if (
                role == "student"
                and "teacher" in self.token_embeddings
                and token_embeddings is self.token_embeddings["teacher"]
            ):
                continue
            tensors[f"rows/{role}"] = token_embeddings.detach()
        tensors.update({f"critics/{n}": p.detach() for n, p in self.critics.named_parameters()})
        return tensors

    def check_finite(self) -> None:
        """Raise DivergedError naming the first trained tensor that is not finite."""
        trained = self.trained_tensors()
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in trained.values()]).tolist()
        for name, is_finite in zip(trained, finite, strict=True):
            if not is_finite:
                raise DivergedError(f"{name} is not finite after step {self.step}; lower the learning rates.")


def _token_learns_from(settings: TrainSettings, given: Collection[str]) -> str:
    # The teacher's, where the token is shared and the teacher learns or came with it: what a personalised teacher says
    # of another token would be of no use. Otherwise no loss but the student's reaches it.
    owned = settings.teaches or "teacher" in given
    return "teacher" if owned and settings.share_text_encoder else "student"


def needs_teacher(settings: TrainSettings, given: Collection[str] = ()) -> bool:
    """Whether a run has a use for the teacher. given: the roles that begin from an adapter."""
    return settings.teaches or settings.aligns or "teacher" in given


def check_learns(settings: TrainSettings, family: Family, given: Collection[str] = ()) -> None:
    """Raise InputError where these settings need a teacher that is not there, or no loss would change anything.

    given: the roles that begin from an adapter.
    """
    if needs_teacher(settings, given) and family.teacher is None:
        raise InputError("these settings need a teacher and none was given; give one, or set its weights to 0.")
    has_weights = settings.trainable != "token"
    own_token = settings.trainable.endswith("token") and _token_learns_from(settings, given) == "student"
    student_learns = settings.generates or settings.student_reconstruction_weight > 0
    if not settings.teaches and not (student_learns and (has_weights or own_token)):
        raise InputError(
            f"nothing would learn with trainable {settings.trainable} and these weights of the losses; raise one of "
            "teacher_weight, alignment_weight, adversarial_weight."
        )


def new_state(
    family: Family, backbones: dict[str, Backbone], settings: TrainSettings, start: Mapping[str, Start] | None = None
) -> TrainState:
    """A run at step 0. The family moves to the settings' device and precision, with the trained weights installed.

    family: with the placeholder declared in its text encoder (`with_placeholders`).
    start: what each role begins from, where it is not the base model.
    Raises InputError where the settings need a teacher or backbone that is not there, or nothing would learn.
    """
    start = start or {}
    check_learns(settings, family, start)
    for role, name in needed_backbones(settings).items():
        if role not in backbones:
            raise InputError(f"these settings need the backbone {name}; load it, or set the weights of its terms to 0.")
    device = pick_device(settings.device)
    init = torch.Generator().manual_seed(settings.seed)
    denoisers = {"student": family.student}
    if family.teacher is not None and settings.teaches:
        denoisers["teacher"] = family.teacher
    weights = {
        role: TrainedWeights(denoisers[role].unet, settings.trainable, settings.lora_rank, init)
        for role in ROLES
        if role in denoisers
    }
    noun = family.text.noun_embeddings(settings.class_noun, settings.vectors)
    token_embeddings = {role: start[role].token_embeddings if role in start else noun for role in ROLES}
    if settings.share_text_encoder and "teacher" not in start:
        token_embeddings["teacher"] = token_embeddings["student"]
    for role, begun in start.items():
        if role in weights:
            weights[role].begin_at(begun.deltas, begun.factors)
        elif family.teacher is not None:
            apply_deltas(family.teacher.unet, begun.deltas)
    offloader = _settle(family, weights, backbones, settings, device)
    shared = nn.Parameter(token_embeddings["teacher"].clone().to(device))
    own = shared if settings.share_text_encoder else nn.Parameter(token_embeddings["student"].clone().to(device))
    # A generator for each head: taking one critic away must not start the others differently.
    heads = {
        role: CriticHead(backbones[role].width, torch.Generator().manual_seed(settings.seed + 100 + place))
        for place, role in enumerate(CRITICS)
        if role in settings.critic_weights
    }
    critics = nn.ModuleDict(heads).to(device)
    state = TrainState(
        settings=settings,
        family=family,
        backbones=backbones,
        weights=weights,
        token_embeddings={"teacher": shared, "student": own},
        critics=critics,
        optimizers={},
        # The prior's last and only where it is on, so that all else draws what it draws without.
        generators={
            name: torch.Generator().manual_seed(settings.seed + i)
            for i, name in enumerate(("data", "noise", *(("prior",) if settings.prior_roles else ())), 1)
        },
        given=frozenset(start),
        offloader=offloader,
    )
    state.optimizers = new_optimizers(state)
    return state


def _settle(
    family: Family,
    weights: Mapping[str, TrainedWeights],
    backbones: Mapping[str, Backbone],
    settings: TrainSettings,
    device: torch.device,
) -> ModelOffloader | None:
    """Bring every network to the device in its precision, with what learns. Returns what keeps one UNet there."""
    dtype = DTYPES[settings.precision]
    if settings.precision == "bf16" and not computes_bf16(device):
        text = f"{device} has no instructions for bfloat16: precision bf16 halves memory there, but fp32 is faster."
        warnings.warn(text, category=Notice, stacklevel=3)
    family.to(device, dtype)
    for trained in weights.values():
        trained.install(device, dtype)
    offloader = None
    if settings.memory_mode == "low" and device.type not in ONE_MEMORY and family.teacher is not None:
        offloader = ModelOffloader([family.student.unet, family.teacher.unet], device)
        family.on_restore.append(offloader.end)
    for backbone in backbones.values():  # after a UNet has left
        backbone.to(device=device, dtype=dtype)
    return offloader


def parameter_groups(state: TrainState) -> dict[str, list[dict[str, Any]]]:
    """Parameters with their full learning rates, by the optimiser "teacher", "student" or "critics" that steps them.

    The rows learn in the group of the role whose loss reaches them.
    """
    s = state.settings
    learns_token = s.trainable.endswith("token")
    groups: dict[str, list[dict[str, Any]]] = {"teacher": [], "student": [], "critics": []}
    for role, lr in (("teacher", s.teacher_lr), ("student", s.student_lr)):
        if role in state.weights and state.weights[role].parameters:
            groups[role].append({"params": list(state.weights[role].parameters.values()), "lr": lr})
    if learns_token:
        if s.teaches:
            groups["teacher"].append({"params": [state.token_embeddings["teacher"]], "lr": s.token_lr})
        if state.token_learns_from == "student":
            groups["student"].append({"params": [state.token_embeddings["student"]], "lr": s.token_lr})
    if len(state.critics):
        groups["critics"].append({"params": list(state.critics.parameters()), "lr": s.critic_lr})
    # An empty optimiser still has one empty group, so that every role has one to ask.
    return {name: group or [{"params": [], "lr": 0.0}] for name, group in groups.items()}


def new_optimizers(state: TrainState) -> dict[str, torch.optim.AdamW]:
    """AdamW of teacher, student and critics."""
    common: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": state.settings.weight_decay, "fused": True}
    return {name: torch.optim.AdamW(groups, **common) for name, groups in parameter_groups(state).items()}
