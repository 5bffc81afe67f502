"""Trains the miniature's teacher: a latent diffusion model of captioned scenes, with its text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ...diffusion import NoiseSchedule
from ...files import replacing
from ...models.architectures import MINIATURE
from ...models.assemble import empty_text_encoder
from ...models.checkpoint import schedule_of
from ...models.text import TextEncoder, clip_tokenizer
from .data import CaptionedImages
from .stage import Losses, adam, optimizer_step, precision, train

UNCONDITIONAL_SHARE = 0.1  # of the captions are dropped, for classifier-free guidance
SEED = 21
PREDICTION = "v_prediction"  # as SD 2.1; at t = 999 an epsilon UNet's error in x0 is 14.6 times as large


@dataclass(frozen=True)
class Cycle:
    """One cycle of the learning rate, from its maximum to zero.

    seed: of all random values in the cycle.
    """

    name: str
    learning_rate: float
    batch: int
    seed: int


# Warm restarts (Loshchilov & Hutter 2017). The larger last batch takes two thirds of the CPU time per sample and gives
# sharper outlines.
CYCLES = (Cycle("first", 1.5e-3, 64, 36), Cycle("second", 1e-3, 64, 31), Cycle("third", 1.2e-3, 128, 33))


class CaptionedDenoiser(nn.Module):
    """UNet and text encoder, trained jointly: noisy latents, timesteps and token ids to the prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**MINIATURE.unet)
        self.text = CLIPTextModel(CLIPTextConfig.from_dict(MINIATURE.text_encoder))

    def forward(self, zt: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """(B, 8, 8, 8), (B,), (B, 77) to (B, 8, 8, 8)."""
        return self.unet(zt, t, encoder_hidden_states=self.text(ids).last_hidden_state).sample


def plain_attention(model: CaptionedDenoiser) -> None:
    """Use unfused attention: with 64 positions and small heads, fused kernels are slower on a CPU."""
    model.unet.set_attn_processor(AttnProcessor())
    model.text.set_attn_implementation("eager")


def schedule() -> NoiseSchedule:
    """The noise schedule of teacher and student."""
    return schedule_of(MINIATURE.scheduler, PREDICTION)


@torch.no_grad()
def encode_all(path: Path, vae: AutoencoderKL, data: CaptionedImages, device: torch.device) -> Tensor:
    """Latents (N, 8, 8, 8), float32, of all images: the posterior's mean, unscaled; cached in `path`."""
    if not path.is_file():
        parts = []
        for index in torch.arange(len(data.captions)).split(256):
            with precision(device):
                parts.append(vae.encode(data.batch(index, device)).latent_dist.mean.float().cpu())
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, torch.cat(parts).half().numpy(), allow_pickle=False)
    return torch.from_numpy(np.load(path, allow_pickle=False)).float()


def tokenize(captions: list[str]) -> Tensor:
    """Token ids (N, 77) of the family's tokenizer."""
    return TextEncoder(empty_text_encoder(MINIATURE), clip_tokenizer(MINIATURE.pad_with_end)).tokenize(captions)


def train_teacher(
    path: Path, latents: Tensor, ids: Tensor, empty: Tensor, steps: Sequence[int], device: torch.device
) -> CaptionedDenoiser:
    """Train teacher and text encoder on v-prediction; see `train`.

    latents: (N, 8, 8, 8) of unit variance. ids: token ids of the captions (N, 77). empty: token ids of "", (1, 77).
    steps: for each of CYCLES.
    """
    torch.manual_seed(SEED)
    model = CaptionedDenoiser().to(device)
    plain_attention(model)
    for cycle, count in zip(CYCLES, steps, strict=True):
        model = train_cycle(path, model, latents, ids, empty, cycle, count, device)
    return model


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Timesteps (count,), four fifths of them logit-normal around the middle (Esser et al. 2024), the rest uniform.

    Shapes are determined at intermediate noise levels, so these are sampled more often.
    """
    middle = (torch.sigmoid(torch.randn(count, generator=generator) - 0.2) * 1000).long().clamp(0, 999)
    anywhere = torch.randint(1000, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.8, middle, anywhere)


def train_cycle(
    path: Path,
    model: CaptionedDenoiser,
    latents: Tensor,
    ids: Tensor,
    empty: Tensor,
    cycle: Cycle,
    steps: int,
    device: torch.device,
) -> CaptionedDenoiser:
    """One cycle of `train_teacher`: trains `model` in place, returns its average. path: without the cycle's name."""
    path, batch = path.with_stem(f"{path.stem}-{cycle.name}"), cycle.batch
    noise_schedule = schedule()
    model = model.train().requires_grad_(True)
    optimizer = adam([model], cycle.learning_rate)

    def step(number: int, generator: torch.Generator) -> Losses:
        index = torch.randint(len(latents), (batch,), generator=generator)
        t = draw_timesteps(batch, generator).to(device)
        z = latents[index].to(device)
        noise = torch.randn(z.shape, generator=generator).to(device)
        drop = torch.rand(batch, 1, generator=generator) < UNCONDITIONAL_SHARE
        tokens = torch.where(drop, empty, ids[index]).to(device)
        with precision(device):
            prediction = model(noise_schedule.add_noise(z, noise, t), t, tokens)
        loss = F.mse_loss(prediction.float(), noise_schedule.target(z, noise, t))
        optimizer_step(loss, optimizer)
        return {"loss": loss.detach()}

    average = train(path, model, {"teacher": optimizer}, step, steps=steps, seed=cycle.seed)
    assert isinstance(average, CaptionedDenoiser)
    return average
