"""Algorithm 1 of EchoDistill: the teacher's, the student's and the critics' step of one iteration.

    1. teacher_step   update the teacher and the token by Eq. 1, on the photographs
    2. student_step   update the student by Eq. 5 and 6, on images that it generates in one step
    3. critic_step    update the critics' heads by Eq. 7, on the photographs and those images

Symbols: z latents (B, 4, h, w); x images (B, 3, H, W) in [-1, 1]; n unit noise (B, 4, h, w); t timesteps (B,) in
0..T-1; y = tau(prompt) text conditioning; f features (B, d); L losses. The suffix _s means the student's, _t the
teacher's.

Each step computes gradients for the parameters of its own optimiser only (`inputs=` of backward). Random numbers are
drawn for the whole batch, so they do not depend on the size of micro-batches.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..diffusion import guided, timesteps_like
from ..losses.ms_swd import ms_swd_along
from ..losses.objectives import (
    LOSS_TERMS,
    alignment_weight,
    critic_loss,
    generator_loss,
    identity_loss,
    latent_mse,
    masked_mse,
)
from ..models.conditioning import TextConditioning
from ..models.family import Denoiser
from ..settings import TrainSettings
from .batches import Batch
from .compute import Cut
from .schedule import TermWeights, weights_at
from .state import TrainState

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class TeacherTarget:
    """The target of the alignment losses (Eq. 5).

    latents: (B, 4, h, w), the teacher's x0 estimate of the student's latents. weight: c(t), (B,) in [0, 1].
    """

    latents: Tensor
    weight: Tensor

    @staticmethod
    def none(noise: Tensor) -> TeacherTarget:
        """A target without effect: c(t) = 0 for every image of the noise (B, 4, h, w)."""
        return TeacherTarget(noise, noise.new_zeros(len(noise)))


@dataclass(frozen=True)
class StudentOutput:
    """The student's output of an iteration, detached.

    latents: (B, 4, h, w). pixels: decoded images (B, 3, H, W), nominally in [-1, 1]; None if no loss term needs them.
    features: critic -> features (B, d) of the images.
    """

    latents: Tensor
    pixels: Tensor | None
    features: Mapping[str, Tensor]

    @staticmethod
    def cat(parts: Sequence[StudentOutput]) -> StudentOutput:
        """Concatenate the outputs of micro-batches, in order."""
        pixels = [part.pixels for part in parts if part.pixels is not None]
        features = {k: torch.cat([part.features[k] for part in parts]) for k in parts[0].features}
        return StudentOutput(
            torch.cat([part.latents for part in parts]), torch.cat(pixels) if pixels else None, features
        )


def iterate(state: TrainState, batch: Batch) -> Losses:
    """One iteration of Algorithm 1: every player's step. Returns the losses by name, scalars on the device."""
    losses = teacher_step(state, batch)
    student_losses, output = student_step(state, batch)
    return losses | student_losses | critic_step(state, batch, output)


def teacher_step(state: TrainState, batch: Batch) -> Losses:
    """Step 1: update the teacher and the token by Eq. 1. Returns the losses; none if the teacher is frozen."""
    s = state.settings
    if not s.teaches or not state.trainables.parameters("teacher"):
        return {}
    losses = reconstruct(state, "teacher", batch, s.teacher_weight)
    return {**losses, "grad_norm_teacher": state.trainables.step("teacher", s.grad_clip)}


def student_step(state: TrainState, batch: Batch) -> tuple[Losses, StudentOutput | None]:
    """Step 2: update the student by Eq. 5 (alignment with the teacher) and Eq. 6 (adversarial).

        n ~ N(0, I)              z_s = one_step(student, n, y)          z_t = teacher_target(z_s)
        x_s = D(z_s)             x_t = D(z_t)
        L = lambda_align mean_B[c(t) (w_id L_id + w_mse L_mse + w_swd L_swd)] + lambda_adv sum_k w_k L_adv,k

    Registered loss terms are further summands of the alignment. With student_reconstruction_weight, Eq. 1 is added.

    Losses run backward to x_s or z_s only (compute.Cut). Each network's backward pass therefore ends before the next
    network runs, and the activations of one network exist at a time.
    Returns the losses by name and the student's output; None for the output if the iteration has no term of Eq. 5 or 6.
    """
    s, w, run, family = state.settings, weights_at(state.settings, state.step), state.compute, state.family
    losses = Losses()
    if s.student_reconstruction_weight > 0:
        losses |= reconstruct(state, "student", batch, s.student_reconstruction_weight)
    if not (w.align or w.critics):
        return _student_update(state, losses), None

    def aligned(c: Tensor, w_k: float, L_k: Tensor) -> Tensor:
        return s.alignment_weight * (c * w_k * L_k).mean()

    n = state.draw_noise(batch)
    y = state.condition(batch.student_prompts, "student")
    z = Cut(run.generate(partial(one_step, family.student), n, y))
    target = teacher_target(state, batch, z.leaf.detach(), n, y) if w.align else TeacherTarget.none(n)
    directions = state.draw_directions(batch) if w.swd else []
    outputs = []
    for part, weight in run.microbatches(len(batch)):
        z_s, z_t, c = z.leaf[part], target.latents[part], target.weight[part]
        L: Losses = {}
        features: Losses = {}
        if w.needs_images:
            x_t, f_t = _teacher_image(state, z_t, w)
            x = Cut(run.decode(family, z_s))
            for k in w.backbones:
                f, loss = extract_features(state, k, x.leaf), n.new_zeros(())
                if k == "clip" and w.identity:
                    L["identity"] = identity_loss(*(state.backbones[k].tokens(each) for each in (f, f_t)))
                    loss = loss + aligned(c, w.identity, L["identity"])
                if k in w.critics:
                    L[f"adv_{k}"] = generator_loss(state.trainables.critics[k](f))
                    loss = loss + s.adversarial_weight * w.critics[k] * L[f"adv_{k}"]
                    features[k] = f.detach()
                x.backward(weight * loss)
            if w.swd:
                L["swd"] = ms_swd_along(_as_swd_input(s, x.leaf), _as_swd_input(s, x_t), directions)
                x.backward(weight * aligned(c, w.swd, L["swd"]))
            for k, w_k in w.images.items():
                L[k] = LOSS_TERMS[k].function(x.leaf, x_t)
                x.backward(weight * aligned(c, w_k, L[k]))
        if w.mse:
            L["mse"] = latent_mse(z_s, z_t)
            z.backward(weight * aligned(c, w.mse, L["mse"]))
        for k, w_k in w.latents.items():
            L[k] = LOSS_TERMS[k].function(z_s, z_t)
            z.backward(weight * aligned(c, w_k, L[k]))
        if w.needs_images:
            x.flush([z.leaf])
        outputs.append(StudentOutput(z_s.detach(), x.leaf.detach() if w.needs_images else None, features))
        _accumulate(losses, L, w, c, weight)
    z.flush(state.trainables.grad_inputs("student"))
    return _student_update(state, losses), StudentOutput.cat(outputs)


def critic_step(state: TrainState, batch: Batch, output: StudentOutput | None) -> Losses:
    """Step 3: update the critics' heads by Eq. 7. Returns the losses; none in iterations without adversarial losses.

    output: of `student_step` in the same iteration.
    """
    critics = weights_at(state.settings, state.step).critics
    if output is None or not critics:
        return {}
    losses = Losses()
    for k in critics:
        real = state.compute.map(partial(_real_features, state, k), batch.real_views, batch.real)
        head = state.trainables.critics[k]
        loss = critic_loss(head(real), head(output.features[k]))
        loss.backward(inputs=list(head.parameters()))
        losses[f"critic_{k}"] = loss.detach()
    losses["grad_norm_critics"] = state.trainables.step("critics", state.settings.critic_grad_clip)
    return losses


def one_step(denoiser: Denoiser, noise: Tensor, text: TextConditioning) -> Tensor:
    """Latents (B, 4, h, w) of noise n (B, 4, h, w), generated in one step: the x0 estimate at T-1 of z_{T-1} = n.

    z = (n - sqrt(1 - abar_{T-1}) eps(n, T-1, y)) / sqrt(abar_{T-1}) for a denoiser that predicts epsilon.
    """
    t = timesteps_like(denoiser.schedule.timesteps - 1, noise)
    return denoiser.schedule.to_x0(denoiser.predict(noise, t, text), noise, t)


@torch.no_grad()
def teacher_target(state: TrainState, batch: Batch, z_s: Tensor, n: Tensor, y_s: TextConditioning) -> TeacherTarget:
    """The teacher's x0 estimate of the student's latents, with classifier-free guidance s:

        t ~ U{0..T-1}                       z = sqrt(abar_t) z_s + sqrt(1 - abar_t) n
        e = e(z, t, "") + s (e(z, t, y) - e(z, t, ""))              z_t = to_x0(e, z, t)

    z_s: (B, 4, h, w), detached. n: the noise (B, 4, h, w) from which the student generated z_s. y_s: the student's
    conditioning. The teacher uses it too if both share the token, and otherwise its own conditioning of the prompts.
    """
    s, teacher, schedule = state.settings, state.denoiser("teacher"), state.denoiser("teacher").schedule
    t = state.draw_timesteps(schedule, len(batch))
    y = y_s.detach() if state.shares_token else state.condition(batch.student_prompts, "teacher")

    def estimate(z: Tensor, n: Tensor, t: Tensor, y: TextConditioning) -> Tensor:
        z_noisy = schedule.add_noise(z, n, t)
        both = TextConditioning.cat([state.unconditional(len(z)), y])
        without, with_text = teacher.predict(z_noisy.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        return schedule.to_x0(guided(with_text, without, s.guidance_scale), z_noisy, t)

    z_t = state.compute.map(estimate, z_s, n, t, y)
    return TeacherTarget(z_t, alignment_weight(schedule.table(t.device), t, s.alignment_by_t))


def extract_features(state: TrainState, backbone: str, images: Tensor) -> Tensor:
    """Features (B, d) of images (B, 3, H, W) in [-1, 1]; `backbone_normalisation` decides on the input's range."""
    return state.backbones[backbone](images, normalise=state.settings.backbone_normalisation)


def reconstruct(state: TrainState, role: str, batch: Batch, weight: float) -> Losses:
    """Add the gradient of weight * (L_rec + prior_weight * L_prior) to the role's parameters. Returns both losses.

    L_rec is Eq. 1 on the photographs. L_prior is Eq. 1 on class images (prior preservation, Ruiz et al. 2023); it is
    present for the roles in `settings.prior_roles`.
    """
    s = state.settings
    losses = {f"recon_{role}": _reconstruction_backward(state, role, batch, weight)}
    if role in s.prior_roles:
        images = state.prior[role].draw(state.step, state.random["prior"]).to(state.device)
        losses[f"prior_{role}"] = _reconstruction_backward(state, role, images, weight * s.prior_weight, prior=True)
    return losses


def _reconstruction_backward(
    state: TrainState, role: str, batch: Batch, loss_weight: float, *, prior: bool = False
) -> Tensor:
    """Add the gradient of loss_weight * L to the role's parameters, and return L of Eq. 1, a scalar without a graph:

        L = mean |target(z, n, t) - UNet(sqrt(abar_t) z + sqrt(1 - abar_t) n, t, y)|^2     over the mask's valid region

    z: a sample of the VAE's posterior of the images. n ~ N(0, I), t ~ U{0..T-1}. target: the UNet's prediction target,
    epsilon or v.
    prior: the batch holds class images. Their captions lack the placeholder, so the token gets no gradient. Their
    noise and timesteps come from the generator "prior".
    """
    denoiser, schedule = state.denoiser(role), state.denoiser(role).schedule
    inputs = state.trainables.grad_inputs(role)
    stream = "prior" if prior else "noise"
    n = state.draw_noise(batch, stream)
    t = state.draw_timesteps(schedule, len(batch), stream)
    total = torch.zeros((), device=state.device)
    for part, weight in state.compute.microbatches(len(batch)):
        with torch.no_grad():
            posterior = state.cached_by_view("vae", batch.views[part], batch.pixels[part], state.family.posterior)
        z = state.family.scaled(posterior, batch.posterior_noise[role][part])
        z_noisy = schedule.add_noise(z, n[part], t[part])
        y = state.condition(batch.prompts[part], role, learns=not prior)
        prediction = denoiser.predict(z_noisy, t[part], y)
        loss = masked_mse(prediction, schedule.target(z, n[part], t[part]), batch.mask[part])
        if inputs:
            (loss_weight * weight * loss).backward(inputs=inputs)
        total += weight * loss.detach()
    return total


@torch.no_grad()
def _teacher_image(state: TrainState, z_t: Tensor, w: TermWeights) -> tuple[Tensor, Tensor]:
    """The teacher's decoded images (B, 3, H, W) and their CLIP features (B, d); empty tensors if no term uses them."""
    x_t = state.compute.decode(state.family, z_t) if w.align_images else z_t.new_empty(0)
    return x_t, extract_features(state, "clip", x_t) if w.identity else z_t.new_empty(0)


@torch.no_grad()
def _real_features(state: TrainState, critic: str, views: tuple[Hashable, ...], real: Tensor) -> Tensor:
    """A critic's features (B, d) of real images (B, 3, H, W); cached for views that recur (TrainState)."""
    return state.cached_by_view(critic, views, real, partial(extract_features, state, critic))


def _as_swd_input(settings: TrainSettings, images: Tensor) -> Tensor:
    """Map images from [-1, 1] to [0, 1] if swd_unit_range is on. The reference implementation passes [-1, 1]."""
    return (images + 1) / 2 if settings.swd_unit_range else images


def _student_update(state: TrainState, losses: Losses) -> Losses:
    """Step the student's optimiser if there are losses. Returns the losses and the gradient norm before clipping."""
    if not losses or not state.trainables.parameters("student"):
        return losses
    return {**losses, "grad_norm_student": state.trainables.step("student", state.settings.grad_clip)}


def _accumulate(losses: Losses, L: Losses, w: TermWeights, c: Tensor, weight: float) -> None:
    """Add the terms L of a micro-batch to the iteration's losses, times its weight in the batch.

    Iterations that compute every term of Eq. 5 also get their weighted sum, as "alignment".
    """
    eq_5 = {k: w_k for k, w_k in w.alignment.items() if k in L}
    logged = {k: L[k].mean() for k in eq_5}
    if w.is_complete and eq_5:
        logged["alignment"] = torch.stack([(c * w_k * L[k]).mean() for k, w_k in eq_5.items()]).sum()
    logged |= {k: L_k for k, L_k in L.items() if k not in eq_5}
    for k, value in logged.items():
        losses[k] = losses.get(k, torch.zeros_like(value)) + weight * value.detach()
