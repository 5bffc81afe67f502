"""Trains the miniature's VAE: 8 pixels per latent, 8 channels, unit variance after scaling."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from ...models.architectures import MINIATURE
from .data import CaptionedImages
from .stage import Losses, adam, optimizer_step, precision, train

BATCH = 24
LEARNING_RATE = 1e-3
KL_WEIGHT = 1e-4  # on the mean over latents; keeps their variance near 1 at little loss of sharpness
SEED = 11


def train_vae(path: Path, data: CaptionedImages, steps: int, device: torch.device) -> AutoencoderKL:
    """Train the VAE on mean squared error (reported as PSNR) with a small KL term; see `train`."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(**MINIATURE.vae).to(device)
    optimizer = adam([vae], LEARNING_RATE, weight_decay=0.0)

    def step(number: int, generator: torch.Generator) -> Losses:
        x = data.batch(torch.randint(len(data.captions), (BATCH,), generator=generator), device)
        with precision(device):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        mse = F.mse_loss(decoded.float(), x)
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        optimizer_step(mse + KL_WEIGHT * kl, optimizer)
        return {"psnr": psnr(mse.detach()), "kl": kl.detach()}

    average = train(path, vae, {"vae": optimizer}, step, steps=steps, seed=SEED, ema=0.0)
    assert isinstance(average, AutoencoderKL)
    return average


def psnr(mse: Tensor) -> Tensor:
    """PSNR in dB of images in [-1, 1] with this mean squared error: 10 log10(4 / mse)."""
    return 10 * torch.log10(4 / mse)


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: Tensor, factor: float) -> None:
    """Fold an affine map into the VAE so that each channel of factor * z has mean 0 and variance 1.

    latents: (N, C, h, w), unscaled encoder outputs. The decoder inverts the map, so images do not change.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    scale = 1 / (std * factor)
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    assert encode is not None
    assert decode is not None
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= (1 / scale)[None, :, None, None]
    encode.weight[:channels] *= scale[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) * scale
    encode.bias[channels:] += 2 * scale.log()  # the posterior's log variance
