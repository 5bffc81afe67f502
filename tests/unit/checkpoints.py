"""Small checkpoints for tests that change something in one: given tensors, single files, diffusers folders.

checkpoint_parts() -> dict        the tiny family's student as `unet`, `vae` and `text_encoder` in diffusers' names
single_file(parts, architecture=TINY) -> dict      the same in the original layout
write_folder(folder, parts, scheduler={}, vae={}) -> Path    a diffusers folder; dictionaries change its configurations
refused(source, *args, **options) -> str          the sentence with which load_family refuses it
"""

import json

import pytest

from echodistill_core.errors import InputError
from echodistill_core.models import layout
from echodistill_core.models.architectures import TINY
from echodistill_core.models.load import load_family
from echodistill_core.models.tiny import tiny_checkpoint
from echodistill_core.tensorfile import write_tensors

UNET, VAE, TEXT = layout.UNET_PREFIX, layout.VAE_PREFIX, layout.OPEN_CLIP_PREFIX
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def checkpoint_parts():
    return tiny_checkpoint("student")


def single_file(parts, architecture=TINY):
    return layout.to_original(parts["unet"], parts["text_encoder"], parts["vae"], architecture)


def write_folder(folder, parts, scheduler=None, vae=None, unet=None):
    configurations = {
        "unet": {**TINY.unet, "_class_name": "UNet2DConditionModel", **(unet or {})},
        "vae": {**TINY.vae, "_class_name": "AutoencoderKL", **(vae or {})},
        "text_encoder": TINY.text_encoder,
        "scheduler": {**TINY.scheduler, "_class_name": "DDPMScheduler", **(scheduler or {})},
    }
    for name, configuration in configurations.items():
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(configuration))
    for name, stem in STEMS.items():
        write_tensors(folder / name / f"{stem}.safetensors", parts[name], {})
    return folder


def refused(source, *args, **options):
    with pytest.raises(InputError) as caught:
        load_family(source, *args, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message
