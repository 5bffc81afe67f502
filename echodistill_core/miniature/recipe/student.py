"""Trains the miniature's one-step student: distillation from the teacher, then with an adversarial loss.

Pairs of noise and the teacher's guided multi-step sample are the training data (knowledge distillation, Luhman & Luhman
2021). The student is initialised from the teacher and maps noise to sample in one step. Squared error alone gives
blurred means, so a critic on latents, with real latents as positives, is added.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ...diffusion import guided, timesteps_like, trailing_timesteps
from ...files import replacing
from .stage import Losses, adam, optimizer_step, precision, step_generator, train
from .teacher import CaptionedDenoiser, schedule

GUIDANCE = 3.0
TEACHER_STEPS = 16
BATCH = 64
LEARNING_RATE = 6e-4
CRITIC_LEARNING_RATE = 4e-4
ADVERSARIAL_WEIGHT = 0.05
CRITIC_FROM = 0.3  # share of the steps before the adversarial loss starts
SEED = 22


@torch.no_grad()
def teacher_samples(
    model: CaptionedDenoiser, noise: Tensor, ids: Tensor, empty: Tensor, steps: int, guidance: float
) -> Tensor:
    """The teacher's samples from noise (B, 8, 8, 8) by guided DDIM, as in `sampling.denoise`."""
    noise_schedule = schedule()
    timesteps = trailing_timesteps(steps)
    z = clean = noise
    with precision(noise.device):
        text = torch.cat(
            [model.text(empty).last_hidden_state.expand(len(ids), -1, -1), model.text(ids).last_hidden_state]
        )
    for i, moment in enumerate(timesteps):
        t = timesteps_like(moment, z)
        with precision(noise.device):
            both = model.unet(z.repeat(2, 1, 1, 1), t.repeat(2), encoder_hidden_states=text).sample.float()
        without, with_text = both.chunk(2)
        prediction = guided(with_text, without, guidance)
        clean = noise_schedule.to_x0(prediction, z, t)
        if i + 1 < len(timesteps):
            epsilon = noise_schedule.to_epsilon(prediction, z, t)
            z = noise_schedule.add_noise(clean, epsilon, timesteps_like(timesteps[i + 1], z))
    return clean


def pair_noise(start: int, count: int) -> Tensor:
    """Noise of the pairs start..start + count - 1: (count, 8, 8, 8). start: a multiple of 256, the chunk size."""
    return torch.randn(count, 8, 8, 8, generator=step_generator(SEED + 1, start))


def make_pairs(folder: Path, model: CaptionedDenoiser, ids: Tensor, empty: Tensor, device: torch.device) -> Tensor:
    """The teacher's samples for all captions in `ids` (N, 77): float32 (N, 8, 8, 8), cached in the folder in chunks."""
    parts = []
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(ids), 256):
        path = folder / f"{start:06d}.npy"
        if not path.is_file():
            chunk = ids[start : start + 256].to(device)
            noise = pair_noise(start, len(chunk)).to(device)
            made = teacher_samples(model, noise, chunk, empty.to(device), TEACHER_STEPS, GUIDANCE)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, made.cpu().half().numpy(), allow_pickle=False)
        parts.append(torch.from_numpy(np.load(path, allow_pickle=False)).float())
    return torch.cat(parts)


class LatentCritic(nn.Module):
    """Discriminator of real and generated latents (B, 8, 8, 8), given the caption: a logit (B,). Recipe only."""

    def __init__(self, text_width: int, width: int = 96) -> None:
        super().__init__()
        self.body = nn.Sequential(
            spectral_norm(nn.Conv2d(8, width, 3, padding=1)),
            nn.SiLU(),
            spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
            nn.SiLU(),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            nn.SiLU(),
            spectral_norm(nn.Conv2d(2 * width, 2 * width, 3, padding=1)),
            nn.SiLU(),
        )
        self.verdict = spectral_norm(nn.Linear(2 * width, 1))
        self.match = spectral_norm(nn.Linear(text_width, 2 * width))

    def forward(self, z: Tensor, text: Tensor) -> Tensor:
        """text: (B, 77, width). Projection discriminator (Miyato & Koyama 2018) on spatially averaged features."""
        features = self.body(z).mean((2, 3))
        return self.verdict(features)[:, 0] + (self.match(text.mean(1)) * features).mean(1)


def train_student(
    path: Path,
    model: CaptionedDenoiser,
    pairs: Tensor,
    pair_ids: Tensor,
    real: Tensor,
    real_ids: Tensor,
    steps: int,
    device: torch.device,
) -> UNet2DConditionModel:
    """Train the student; see `train`.

    pairs: the teacher's samples from `pair_noise`, (N, 8, 8, 8), for the captions pair_ids (N, 77).
    real: latents of rendered images (M, 8, 8, 8) with captions real_ids (M, 77), the critic's positives.
    """
    torch.manual_seed(SEED)
    student = copy.deepcopy(model.unet).train().requires_grad_(True)
    critic = LatentCritic(model.unet.config["cross_attention_dim"]).to(device)
    optimizers = {"student": adam([student], LEARNING_RATE), "critic": adam([critic], CRITIC_LEARNING_RATE)}
    noise_schedule = schedule()
    noises = torch.cat([pair_noise(s, min(256, len(pairs) - s)) for s in range(0, len(pairs), 256)])

    def read(ids: Tensor) -> Tensor:
        """Text features of token ids; the text encoder is frozen."""
        with torch.no_grad():
            return model.text(ids.to(device)).last_hidden_state

    def step(number: int, generator: torch.Generator) -> Losses:
        """One student step (MSE, after CRITIC_FROM also adversarial), then one critic step."""
        index = torch.randint(len(pairs), (BATCH,), generator=generator)
        noise, target = noises[index].to(device), pairs[index].to(device)
        t = timesteps_like(999, noise)
        with precision(device):
            text = read(pair_ids[index])
            prediction = student(noise, t, encoder_hidden_states=text).sample
            z = noise_schedule.to_x0(prediction.float(), noise, t)
            mse = F.mse_loss(z, target)
            if number < CRITIC_FROM * steps:
                optimizer_step(mse, optimizers["student"])
                return {"mse": mse.detach()}
            adversarial = -critic(z, text).float().mean()
        optimizer_step(mse + ADVERSARIAL_WEIGHT * adversarial, optimizers["student"])
        return {
            "mse": mse.detach(),
            "adversarial": adversarial.detach(),
            "critic": critic_step(z.detach(), text, generator),
        }

    def critic_step(made: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
        """One critic step on generated and equally many real latents; returns the hinge loss."""
        index = torch.randint(len(real), (BATCH,), generator=generator)
        with precision(device):
            hinge = F.relu(1 - critic(real[index].to(device), read(real_ids[index])).float()).mean()
            hinge = hinge + F.relu(1 + critic(made, text).float()).mean()
        optimizer_step(hinge, optimizers["critic"])
        return hinge.detach()

    average = train(path, student, optimizers, step, steps=steps, seed=SEED, others={"critic": critic})
    assert isinstance(average, UNet2DConditionModel)
    return average
