"""Sampling in one to four steps, to the last bit what ComfyUI's own nodes give, without encoding a prompt twice."""

from __future__ import annotations

import weakref
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

STEPS = (1, 2, 4)
# SD-Turbo was distilled at these; ComfyUI's SDTurboScheduler takes its steps from them in this order.
TURBO_TIMESTEPS = tuple(range(999, 0, -100))
_PROMPTS_KEPT = 8

# CLIP -> prompt -> conditioning, newest last. A CLIP that learned another word is another object.
_encoded: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def encode(clip: Any, prompt: str) -> Any:
    """CONDITIONING of a prompt, as CLIPTextEncode makes it; of a prompt that was seen lately, the one it made then."""
    known = _encoded.setdefault(clip, {})
    key = (prompt, clip.layer_idx)
    if key not in known:
        known[key] = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        while len(known) > _PROMPTS_KEPT:
            del known[next(iter(known))]
    known[key] = known.pop(key)
    return known[key]


def turbo_sigmas(model: Any, steps: int, denoise: float) -> Tensor:
    """SDTurboScheduler's noise levels, (steps + 1,): with less denoise it begins later in the list and ends sooner."""
    first = len(TURBO_TIMESTEPS) - int(len(TURBO_TIMESTEPS) * denoise)
    timesteps = torch.tensor(TURBO_TIMESTEPS[first : first + steps])
    sigmas = model.get_model_object("model_sampling").sigma(timesteps)
    return torch.cat([sigmas, sigmas.new_zeros([1])])


def sample(model: Any, positive: Any, latent: Tensor, sigmas: Tensor, seed: int) -> Tensor:
    """LATENT samples from a latent with the seed's noise, without guidance, by ancestral Euler steps.

    The last of those gives exactly what the model takes the clean latent for. Without guidance the negative prompt is
    not looked at, so that one pass of the UNet is a step.
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
