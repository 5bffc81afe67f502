"""Writes the recipe's models as the package's folders: half precision, standard layouts, checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ...files import write_json
from ...models.architectures import MINIATURE
from ...models.embedded import MANIFEST, sha256
from ...perception.backbones import Backbone
from ..judges import Judges
from .teacher import PREDICTION, CaptionedDenoiser


def write_family(folder: Path, teacher: CaptionedDenoiser, student: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    """Write diffusers folders `teacher` (with the text encoder) and `student` (with the VAE), each with a scheduler."""
    teacher.text.half().save_pretrained(folder / "teacher" / "text_encoder")
    vae.half().save_pretrained(folder / "student" / "vae")
    for role, unet in (("teacher", teacher.unet), ("student", student)):
        unet.half().save_pretrained(folder / role / "unet")
        scheduler = DDPMScheduler(**MINIATURE.scheduler, prediction_type=PREDICTION, clip_sample=False)
        scheduler.save_pretrained(folder / role / "scheduler")


def write_backbone(folder: Path, backbone: Backbone) -> None:
    """Write a backbone for perception.load: a transformers folder, with IP-Adapter's projector if it has one."""
    encoder = folder / "image_encoder" if backbone.projector is not None else folder
    network = backbone.encoder.half()
    assert isinstance(network, PreTrainedModel)
    network.save_pretrained(encoder)
    if backbone.projector is not None:
        weights = backbone.projector.half().state_dict()
        names = {"image_embeds": "image_proj.proj", "norm": "image_proj.norm"}
        renamed = {f"{names[head]}.{leaf}": weights[f"{head}.{leaf}"] for head in names for leaf in ("weight", "bias")}
        save_file({n: t.contiguous() for n, t in renamed.items()}, folder / "ip-adapter_sd15.safetensors")


def write_judges(folder: Path, judges: Judges) -> None:
    """Write the judges, each as a transformers folder."""
    write_backbone(folder / "identity", judges.identity_encoder)
    judges.clip.half().save_pretrained(folder / "image_text")
    judges.classifier.half().save_pretrained(folder / "attributes")


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write manifest.json: these facts and the SHA-256 of every other file in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    checksums = {p.relative_to(folder).as_posix(): sha256(p) for p in files}
    write_json(folder / MANIFEST, {**facts, "files": checksums})
