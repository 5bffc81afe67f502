"""OneStepSample: generates a picture from a prompt in one step."""

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
    """Encodes the prompt, samples and decodes in one node."""

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
                "in one node, with the same result. With Run (On Change), every changed prompt generates a picture."
            ),
            inputs=_inputs(),
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
        """Return the pictures and their latents."""
        check_vae(vae, model)
        check_vae_finite(vae)
        _note_missing_placeholder(clip, prompt)
        sigmas = turbo_sigmas(model, int(steps), denoise)
        if len(sigmas) < 2:
            raise InputError(f"denoise is {denoise}, which draws nothing anew; expected 0.1 or more.")
        latent = _initial_latent(vae, image, width, height, batch_size)
        samples = sample(model, encode(clip, prompt), latent, sigmas, seed)
        _check_finite(samples, "the model or an adapter on it")
        images = vae.decode(samples)
        _check_finite(images, "the VAE")
        return io.NodeOutput(images, {"samples": samples})


def _inputs() -> list[io.Input]:
    """Sockets and widgets, in the order in which workflows store them."""
    return [
        io.Model.Input("model", tooltip="SD-Turbo, usually with an adapter on it."),
        io.Clip.Input("clip", tooltip="The CLIP with the placeholder added."),
        io.Vae.Input("vae", tooltip="The VAE; a TAESD decodes faster."),
        io.String.Input(
            "prompt",
            multiline=True,
            dynamic_prompts=True,
            default="photo of a <new1> dog on the beach",
            tooltip="The prompt; the placeholder stands for the learned subject.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Seed of the initial noise.",
        ),
        io.Int.Input("width", default=512, min=64, max=MAX_SIDE, step=8, tooltip="In pixels; 64 for the miniature."),
        io.Int.Input("height", default=512, min=64, max=MAX_SIDE, step=8, tooltip="In pixels; 64 for the miniature."),
        io.Combo.Input(
            "steps",
            options=[str(n) for n in STEPS],
            default="1",
            tooltip="The student is distilled for 1 step; for the miniature, more steps score lower.",
        ),
        io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Number of pictures."),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Denoising strength for a given image, in steps of 0.1; use 1 without an image.",
        ),
        io.Image.Input(
            "image",
            optional=True,
            tooltip="Starting image for image-to-image; resized to width and height.",
        ),
    ]


def _check_finite(values: torch.Tensor, source: str) -> None:
    """Raise InputError for NaN and infinity, which would be saved as black and white pictures."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise InputError(
            f"there is no picture: {source} gave NaN or infinity ({bad} of {values.numel()} values); expected finite "
            "numbers. Its file is damaged, or it computes with too little precision: load another file, or start "
            "ComfyUI with --force-fp32 or --fp32-vae."
        )


def _initial_latent(vae: Any, image: Any, width: int, height: int, batch_size: int) -> torch.Tensor:
    """The encoded image, (B, C, h, w); without an image, zeros with four channels as from EmptyLatentImage."""
    if image is None:
        return torch.zeros([batch_size, 4, height // 8, width // 8], device=mm.intermediate_device())
    pixels = image
    if image.shape[1:3] != (height, width):  # Lanczos rounds to 8 bits even without a change of size
        pixels = comfy.utils.common_upscale(image.movedim(-1, 1), width, height, "lanczos", "center").movedim(1, -1)
    return comfy.utils.repeat_to_batch_size(vae.encode(pixels[:, :, :, :3]), max(batch_size, len(pixels)))


def _note_missing_placeholder(clip: Any, prompt: str) -> None:
    """Show a note with a corrected prompt if the CLIP has placeholders and the prompt contains none of them."""
    known = known_placeholders(clip)
    if not known or placeholders_read(clip, prompt):
        return
    word, noun = next(iter(known.items()))
    better = (
        prompt.replace(noun, subject(word, noun), 1) if noun in prompt else f"{prompt.rstrip()} {word} {noun}".strip()
    )
    note(f"no learned subject ({', '.join(known)}) in the prompt; try: {shortened(better)}")
