"""OneStepSample: prompt to picture in one step."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io

from ..echodistill_core.concept.prompts import subject
from ..echodistill_core.errors import InputError
from ..echodistill_core.messages import shortened
from .bridge.kinds import check_vae, check_vae_finite
from .bridge.node_text import note, shown_on_node
from .bridge.placeholders import known_placeholders, placeholders_read
from .bridge.sampling import STEPS, encode, sample, turbo_sigmas
from .bridge.widgets import schema

MAX_SIDE = 16384  # as in ComfyUI's own nodes


class OneStepSample(io.ComfyNode):
    """Encode, sample and decode in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's sockets and widgets."""
        return schema(
            node_id="OneStepSample",
            display_name="One-Step Sample",
            search_aliases=(
                "turbo",
                "sd-turbo",
                "sdturbo",
                "one step",
                "single step",
                "ksampler",
                "real time",
                "live",
                "txt2img",
                "img2img",
            ),
            description=(
                "Prompt to picture in one step: CLIPTextEncode, SDTurboScheduler, SamplerCustom at cfg 1 and VAEDecode "
                "in one node, with the same result. With Run (On Change), a picture for every changed prompt."
            ),
            inputs=[
                io.Model.Input("model", tooltip="SD-Turbo, usually with an adapter on it."),
                io.Clip.Input("clip", tooltip="The CLIP that knows the placeholder."),
                io.Vae.Input("vae", tooltip="The VAE; a TAESD makes it faster still."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="photo of a <new1> dog on the beach",
                    tooltip="What to draw; the placeholder stands for the learned subject.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise that the picture is made of.",
                ),
                io.Int.Input(
                    "width", default=512, min=64, max=MAX_SIDE, step=8, tooltip="In pixels; 64 for the miniature."
                ),
                io.Int.Input(
                    "height", default=512, min=64, max=MAX_SIDE, step=8, tooltip="In pixels; 64 for the miniature."
                ),
                io.Combo.Input(
                    "steps",
                    options=[str(n) for n in STEPS],
                    default="1",
                    tooltip="The student was made for 1; in the miniature's tables more steps make it worse.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Pictures at once."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of a given image is drawn anew, in steps of 0.1; 1 without an image.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="To begin from in place of noise alone; resized to width and height.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The pictures."),
                io.Latent.Output(display_name="latent", tooltip="Their latents."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @shown_on_node
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        prompt: str,
        seed: int,
        width: int,
        height: int,
        steps: str,
        batch_size: int,
        denoise: float,
        image: Any = None,
    ) -> io.NodeOutput:
        """The pictures and their latents."""
        check_vae(vae, model)
        check_vae_finite(vae)
        _remind_of_placeholder(clip, prompt)
        sigmas = turbo_sigmas(model, int(steps), denoise)
        if len(sigmas) < 2:
            raise InputError(f"denoise is {denoise}, which draws nothing anew; expected 0.1 or more.")
        latent = _start(vae, image, width, height, batch_size)
        samples = sample(model, encode(clip, prompt), latent, sigmas, seed)
        _check_finite(samples, "the model or an adapter on it")
        images = vae.decode(samples)
        _check_finite(images, "the VAE")
        return io.NodeOutput(images, {"samples": samples})


def _check_finite(values: torch.Tensor, whose: str) -> None:
    """Raise InputError for NaN and infinity, which would be saved as black and white pictures."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise InputError(
            f"there is no picture: {whose} gave NaN or infinity ({bad} of {values.numel()} values); expected finite "
            "numbers. Its file is damaged, or it computes with too little precision: load another file, or start "
            "ComfyUI with --force-fp32 or --fp32-vae."
        )


def _start(vae: Any, image: Any, width: int, height: int, batch_size: int) -> torch.Tensor:
    """The latent to begin from: of the image, or zeros of Stable Diffusion's four channels, as EmptyLatentImage's."""
    if image is None:
        return torch.zeros([batch_size, 4, height // 8, width // 8], device=mm.intermediate_device())
    pixels = image
    if image.shape[1:3] != (height, width):  # Lanczos rounds to 8 bits even where nothing is to be resized
        pixels = comfy.utils.common_upscale(image.movedim(-1, 1), width, height, "lanczos", "center").movedim(1, -1)
    return comfy.utils.repeat_to_batch_size(vae.encode(pixels[:, :, :, :3]), max(batch_size, len(pixels)))


def _remind_of_placeholder(clip: Any, prompt: str) -> None:
    """Note it where a CLIP has learned subjects and the prompt names none of them, and how it would."""
    words = known_placeholders(clip)
    if not words or placeholders_read(clip, prompt):
        return
    word, noun = next(iter(words.items()))
    better = (
        prompt.replace(noun, subject(word, noun), 1) if noun in prompt else f"{prompt.rstrip()} {word} {noun}".strip()
    )
    note(f"no learned subject ({', '.join(words)}) in the prompt; try: {shortened(better)}")
