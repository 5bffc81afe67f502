"""The student's image of one step, what it is compared with (Eq. 2 to 6), and its gradient at the student's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..devices import to_device
from ..diffusion import guided, timesteps_like
from ..losses.adversarial import generator_loss
from ..losses.alignment import alignment_weight, identity_loss, latent_mse
from ..losses.ms_swd import draw_directions, ms_swd_along
from ..models.family import Denoiser
from .batches import Batch
from .offload import Layers
from .state import TrainState

Losses = dict[str, Tensor]
_ALIGNMENT = ("identity", "mse", "swd", "alignment")


@dataclass(frozen=True)
class Made:
    """The student's images of an iteration, without their graph: latents, and features by the critics' roles.

    pixels: None where no term looks at them, so that they need not be decoded.
    """

    latents: Tensor
    pixels: Tensor | None
    features: dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """The teacher's estimate that the student is to follow: latents (B, 4, h, w) and c(t) of the timesteps drawn, (B,).

    pixels, tokens: its image and that image's CLIP tokens, where a term compares them.
    """

    latents: Tensor
    weight: Tensor
    pixels: Tensor | None = None
    tokens: Tensor | None = None


def make_and_compare(state: TrainState, batch: Batch) -> tuple[Losses, Made]:
    """Differentiate Eq. 5 and Eq. 6. Returns the losses and what was made.

    By the chain rule, one network after the other: a loss is differentiated to the image that it looks at, and the
    activations of its network are gone before the next one looks; the image's gradient then goes to the latents, and
    theirs to the student's parameters.
    """
    student, leaves, parts = state.family.student, state.leaves("student"), list(state.parts(len(batch)))
    noise = state.draw_noise(batch, "noise")
    with torch.set_grad_enabled(bool(leaves)):
        texts = [state.read(batch.student_prompts[part], "student") for part, _ in parts]
        with torch.set_grad_enabled(bool(leaves) and not state.is_low):
            latents = [one_step(student, noise[part], text) for (part, _), text in zip(parts, texts, strict=True)]
        targets: list[Target | None] = [None] * len(parts)
        if state.settings.aligns:
            t = state.draw_timesteps(state.denoiser("teacher"), len(batch), "noise")
            targets = [
                ask_teacher(state, z.detach(), noise[part], t[part], _teachers_text(state, batch, part, text))
                for (part, _), z, text in zip(parts, latents, texts, strict=True)
            ]
        directions = _draw_directions(state, batch)
        if state.offloader is not None:
            state.offloader.leave()
        compared = [
            Comparison(state, z, target, share).run(directions)
            for z, target, (_, share) in zip(latents, targets, parts, strict=True)
        ]
    if leaves:
        for (part, _), text, z, comparison in zip(parts, texts, latents, compared, strict=True):
            if comparison.z.grad is not None:  # it is None where it is no critic's turn and nothing is aligned
                again = one_step(student, noise[part], text) if state.is_low else z
                again.backward(comparison.z.grad, inputs=leaves)
    return _summed([c.losses for c in compared]), _joined([c.made for c in compared])


def critics_of(state: TrainState) -> dict[str, float]:
    """The critics whose turn it is in this iteration, with their shares in Eq. 6."""
    return state.settings.critic_weights if state.step % state.settings.period == 0 else {}


def sees_images(state: TrainState) -> bool:
    """Whether images are compared in this iteration, and not latents alone."""
    return state.step % state.settings.image_every == 0


def one_step(denoiser: Denoiser, noise: Tensor, text: Tensor) -> Tensor:
    """The one-step map: z = (n - sqrt(1 - abar) eps(n, T-1, y)) / sqrt(abar) of noise (B, 4, h, w)."""
    t = timesteps_like(denoiser.schedule.timesteps - 1, noise)
    return denoiser.schedule.to_x0(denoiser.predict(noise, t, text), noise, t)


@torch.no_grad()
def ask_teacher(state: TrainState, latents: Tensor, noise: Tensor, t: Tensor, text: Tensor) -> Target:
    """What the teacher takes the student's latents for, re-noised to t with the very noise they were made from.

    It is asked once, with guidance. text: the prompts' features as the teacher reads them.
    """
    s, teacher = state.settings, state.denoiser("teacher")
    zt = teacher.schedule.add_noise(latents, noise, t)
    both = torch.cat([state.unconditional(len(zt)), text])
    without, with_text = teacher.predict(zt.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
    clean = teacher.schedule.to_x0(guided(with_text, without, s.guidance_scale), zt, t)
    return Target(clean, alignment_weight(teacher.schedule.table(t.device), t, s.alignment_by_t))


@torch.no_grad()
def with_image(state: TrainState, target: Target) -> Target:
    """The target with its image and what Eq. 2 sees of it, for the terms that compare images."""
    pixels = state.family.decode(target.latents)
    wanted = state.settings.identity_weight > 0
    tokens = state.backbones["clip"].tokens(look(state, "clip", pixels)) if wanted else None
    return replace(target, pixels=pixels, tokens=tokens)


def look(state: TrainState, role: str, pixels: Tensor) -> Tensor:
    """A backbone's features (B, d) of images (B, 3, H, W) in [-1, 1], normalised as the settings say."""
    return state.backbones[role](pixels, normalise=state.settings.backbone_normalisation)


@dataclass
class Comparison:
    """Eq. 5 and Eq. 6 of a part of a batch.

    latents: what the student made, (B, 4, h, w). share: of the batch's images in this part, with which losses and
    gradients count. z: the latents again, without what they were made of; afterwards z.grad is the gradient there,
    where gradients are on. pixels: likewise their image, None where no term looks at it.
    """

    state: TrainState
    latents: Tensor
    target: Target | None
    share: float
    losses: Losses = field(default_factory=Losses)
    features: dict[str, Tensor] = field(default_factory=dict)
    z: Tensor = field(init=False)
    pixels: Tensor | None = field(init=False, default=None)

    def run(self, directions: Sequence[Tensor]) -> Comparison:
        """Compare. directions: of MS-SWD, by level."""
        s, critics = self.state.settings, critics_of(self.state)
        graded = torch.is_grad_enabled()
        aligns_images = s.aligns and sees_images(self.state)
        identity, swd = aligns_images and s.identity_weight > 0, aligns_images and s.swd_weight > 0
        if self.target is not None and (identity or swd):
            self.target = with_image(self.state, self.target)
        roles = {*critics, *(("clip",) if identity else ())}
        self.z = self.latents.detach().requires_grad_(graded)
        to_latents = self._decode() if roles or swd else None
        for role in sorted(roles):
            self._see(role, critics.get(role, 0.0), identity and role == "clip")
        if swd:
            self._differentiate(self._swd(directions), self.pixels)
        if s.aligns and s.mse_weight > 0:
            assert self.target is not None
            loss = self._aligned("mse", s.mse_weight, latent_mse(self.z, self.target.latents))
            self._differentiate(loss, self.z)
        if to_latents is not None and self.pixels is not None and self.pixels.grad is not None:
            self.z.backward(to_latents(self.pixels.grad))
        return self

    @property
    def made(self) -> Made:
        """What was compared."""
        pixels = None if self.pixels is None else self.pixels.detach()
        return Made(self.z.detach(), pixels, self.features)

    def _decode(self) -> Callable[[Tensor], Tensor]:
        """Make the image. Returns what takes a gradient there to one at the latents."""
        family, z = self.state.family, self.z
        if self.state.is_low:
            layers = Layers(family.decoding())
            self.pixels = layers.forward(z).requires_grad_(z.requires_grad)
            return layers.backward
        image = family.decode(z)
        self.pixels = image.detach().requires_grad_(z.requires_grad)
        return lambda gradient: torch.autograd.grad(image, z, gradient)[0]

    def _see(self, role: str, critic: float, identity: bool) -> None:
        """What one backbone's features are for: its critic's share of Eq. 6, and Eq. 2."""
        s = self.state.settings
        assert self.pixels is not None
        seen = look(self.state, role, self.pixels)
        loss = torch.zeros((), device=seen.device)
        if identity:
            assert self.target is not None
            assert self.target.tokens is not None
            term = identity_loss(self.state.backbones[role].tokens(seen), self.target.tokens)
            loss = loss + self._aligned("identity", s.identity_weight, term)
        if critic:
            fooled = generator_loss(self.state.critics[role](seen))
            loss = loss + s.adversarial_weight * critic * fooled
            self.losses[f"fool_{role}"] = self.share * fooled.detach()
            self.features[role] = seen.detach()
        self._differentiate(loss, self.pixels)

    def _swd(self, directions: Sequence[Tensor]) -> Tensor:
        s, target = self.state.settings, self.target
        assert self.pixels is not None
        assert target is not None
        assert target.pixels is not None
        a, b = self.pixels, target.pixels
        if s.swd_unit_range:
            a, b = (a + 1) / 2, (b + 1) / 2
        return self._aligned("swd", s.swd_weight, ms_swd_along(a, b, directions))

    def _aligned(self, name: str, weight: float, term: Tensor) -> Tensor:
        """A term's share of Eq. 5, c(t) * weight * term (B,), as a scalar; its value is noted."""
        assert self.target is not None
        loss = (self.target.weight * weight * term).mean()
        self.losses[name] = self.share * term.detach().mean()
        if sees_images(self.state):  # so that the name means all of Eq. 5
            self.losses["alignment"] = self.losses.get("alignment", 0) + self.share * loss.detach()
        return self.state.settings.alignment_weight * loss

    def _differentiate(self, loss: Tensor, leaf: Tensor | None) -> None:
        if leaf is not None and leaf.requires_grad:
            (self.share * loss).backward(inputs=[leaf])


@torch.no_grad()
def _teachers_text(state: TrainState, batch: Batch, part: slice, students: Tensor) -> Tensor:
    """The prompts as the teacher reads them: as the student does, unless each has a token of its own."""
    if state.token_embeddings["student"] is state.token_embeddings["teacher"]:
        return students.detach()
    return state.read(batch.student_prompts[part], "teacher")


def _draw_directions(state: TrainState, batch: Batch) -> list[Tensor]:
    """MS-SWD's directions of this iteration, one tensor a level; none where the term is off."""
    s = state.settings
    if not s.aligns or s.swd_weight == 0 or not sees_images(state):
        return []
    side = batch.pixels.shape[-1]
    drawn = draw_directions(side, side, state.generators["noise"], levels=s.swd_levels, projections=s.swd_projections)
    return [to_device(directions, state.device) for directions in drawn]


def _summed(parts: Sequence[Losses]) -> Losses:
    """The losses of all parts of a batch, Eq. 5 and its terms first."""
    names = [*(n for n in _ALIGNMENT if n in parts[0]), *(n for n in parts[0] if n not in _ALIGNMENT)]
    return {name: torch.stack([part[name] for part in parts]).sum() for name in names}


def _joined(parts: Sequence[Made]) -> Made:
    pixels = [part.pixels for part in parts if part.pixels is not None]
    return Made(
        torch.cat([part.latents for part in parts]),
        torch.cat(pixels) if pixels else None,
        {role: torch.cat([part.features[role] for part in parts]) for role in parts[0].features},
    )
