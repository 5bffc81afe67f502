"""diffusers' pipeline around a family's networks, and the one-step map, for tests of exports."""

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from echodistill_core.adapter.apply import personalised
from echodistill_core.sampling import denoise

PROMPT = "a photo of a <new1> dog"
# diffusers' one step of DDIM from t = 999 is the one-step map: it starts from unit noise and ends at abar = 1. (Its
# Euler scheduler would start from noise of standard deviation 0.9977, because it divides by sqrt(sigma^2 + 1).)
TRAILING = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,  # what diffusers expects; trailing spacing does not read it
}


def names_of(family):
    return family.student.unet.state_dict()


def pipeline_of(family, **changes):
    """diffusers' own pipeline around the family's networks."""
    parts = {
        "vae": family.vae,
        "text_encoder": family.text.model,
        "tokenizer": family.text.tokenizer,
        "unet": family.student.unet,
        "scheduler": DDIMScheduler(**TRAILING),
        **changes,
    }
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def one_step(pipeline, noise, prompt=PROMPT, **options):
    options = {"output_type": "latent", "height": 64, "width": 64, **options}
    return pipeline(prompt, num_inference_steps=1, guidance_scale=0.0, latents=noise.clone(), **options).images


def our_step(family, adapter, noise, prompt=PROMPT):
    with personalised(family, [adapter], role=adapter.role) as model:
        return denoise(model.denoiser, noise, model.condition([prompt]), 1)


def singular_cut(delta, rank):
    """The best approximation of this rank and its relative error, by numpy (Eckart & Young)."""
    u, s, vh = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return torch.from_numpy(cut).float(), float(np.sqrt((s[rank:] ** 2).sum()) / np.sqrt((s**2).sum()))
