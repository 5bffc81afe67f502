"""Sampling in one to four steps, bit-identical to ComfyUI's own nodes, with a cache of encoded prompts."""

from __future__ import annotations

import weakref
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

STEPS = (1, 2, 4)
# SD-Turbo's distillation timesteps. SDTurboScheduler takes its steps from this list, in this order.
TURBO_TIMESTEPS = tuple(range(999, 0, -100))
_PROMPTS_KEPT = 8

# CLIP -> prompt -> conditioning, newest last. A CLIP with another placeholder is another object.
_encoded: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def encode(clip: Any, prompt: str) -> Any:
    """CONDITIONING of a prompt, as from CLIPTextEncode; cached for the last few prompts of each CLIP."""
    known = _encoded.setdefault(clip, {})
    key = (prompt, clip.layer_idx)
    if key not in known:
        known[key] = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        while len(known) > _PROMPTS_KEPT:
            del known[next(iter(known))]
    known[key] = known.pop(key)
    return known[key]


def turbo_sigmas(model: Any, steps: int, denoise: float) -> Tensor:
    """SDTurboScheduler's noise levels, (steps + 1,) or fewer: a lower denoise starts later in TURBO_TIMESTEPS."""
    first = len(TURBO_TIMESTEPS) - int(len(TURBO_TIMESTEPS) * denoise)
    timesteps = torch.tensor(TURBO_TIMESTEPS[first : first + steps])
    sigmas = model.get_model_object("model_sampling").sigma(timesteps)
    return torch.cat([sigmas, sigmas.new_zeros([1])])


def sample(model: Any, positive: Any, latent: Tensor, sigmas: Tensor, seed: int) -> Tensor:
    """Sample a latent (B, C, h, w) with the seed's noise, by ancestral Euler steps without guidance.

    The last step returns the model's prediction of the clean latent. Without guidance the negative prompt is not
    evaluated, so each step is one forward pass of the UNet.
    """
    latent = comfy.sample.fix_empty_latent_channels(model, latent)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample_custom(
        model,
        noise,
        1.0,
        comfy.samplers.sampler_object("euler_ancestral"),
        sigmas,
        positive,
        positive,
        latent,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
