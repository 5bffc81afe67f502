"""Builders of prompts in ComfyUI's API form, and readers of their results."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

Link = list[Any]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """One node of a prompt."""
    return {"class_type": kind, "inputs": inputs}


MINIATURE = node("LoadMiniature", toy="dotted-mug")


def unset(info: dict[str, Any], kind: str) -> dict[str, Any]:
    """Every widget of a node at its default, as the front end would send it."""
    required = info[kind]["input"]["required"]
    values = {}
    for name, (type_, *options) in required.items():
        given = options[0] if options else {}
        if isinstance(type_, list):
            values[name] = given.get("default", type_[0])
        elif "default" in given:
            values[name] = given["default"]
    return values


def concept(info: dict[str, Any], folder: str = "none", noun: str = "mug", **options: Any) -> dict[str, Any]:
    """LoadReferenceImages on a folder of the input folder."""
    values = {**unset(info, "LoadReferenceImages"), "folder": folder, "class_noun": noun, **options}
    return node("LoadReferenceImages", **values)


def load_adapter(info: dict[str, Any], model: Link, clip: Link, **options: Any) -> dict[str, Any]:
    """LoadEchoAdapter. options: from_training, adapter_name and other widgets."""
    values = {**unset(info, "LoadEchoAdapter"), **options}
    return node("LoadEchoAdapter", base_model=model, base_clip=clip, **values)


def one_step(info: dict[str, Any], model: Link, clip: Link, vae: Link, prompt: str, **options: Any) -> dict[str, Any]:
    """OneStepSample at 64 x 64 pixels."""
    values = {**unset(info, "OneStepSample"), "prompt": prompt, "width": 64, "height": 64, **options}
    return node("OneStepSample", model=model, clip=clip, vae=vae, **values)


def save_adapter(prefix: str, role: str = "student") -> dict[str, Any]:
    """SaveEchoAdapter of node "train"."""
    return node("SaveEchoAdapter", from_training=["train", 1], filename_prefix=prefix, role=role)


def training(info: dict[str, Any], folder: str = "mug", noun: str = "mug", **options: Any) -> dict[str, Any]:
    """LoadMiniature, LoadReferenceImages and EchoDistillTrain, as nodes "models", "concept", "train"."""
    return {
        "models": MINIATURE,
        "concept": concept(info, folder, noun),
        "train": node(
            "EchoDistillTrain",
            student=["models", 0],
            teacher=["models", 1],
            clip=["models", 2],
            vae=["models", 3],
            concept=["concept", 0],
            **{**unset(info, "EchoDistillTrain"), "iterations": 6, "preview_every": 2, **options},
        ),
    }


def sampled(
    info: dict[str, Any], adapter: Link, prompt: str = "photo of a <new1> mug", **options: Any
) -> dict[str, Any]:
    """LoadEchoAdapter, OneStepSample and PreviewImage, as nodes "adapter", "sample", "show"."""
    return {
        "adapter": load_adapter(info, ["models", 0], ["models", 2], from_training=adapter),
        "sample": one_step(info, ["adapter", 0], ["adapter", 1], ["models", 3], prompt, **options),
        "show": node("PreviewImage", images=["sample", 0]),
    }


def stock_chain(
    model: Link,
    clip: Link,
    prompt: str,
    steps: int,
    *,
    prefix: str = "stock",
    seed: int = 0,
    denoise: float = 1.0,
    batch: int = 1,
    latent: Link | None = None,
    side: int = 64,
) -> dict[str, Any]:
    """ComfyUI's own nodes from prompt to latent on disk: CLIPTextEncode, SDTurboScheduler, SamplerCustom."""
    return {
        "positive": node("CLIPTextEncode", clip=clip, text=prompt),
        "latent": node("EmptyLatentImage", width=side, height=side, batch_size=batch),
        "sigmas": node("SDTurboScheduler", model=model, steps=steps, denoise=denoise),
        "sampler": node("KSamplerSelect", sampler_name="euler_ancestral"),
        "custom": node(
            "SamplerCustom",
            model=model,
            add_noise=True,
            noise_seed=seed,
            cfg=1.0,
            positive=["positive", 0],
            negative=["positive", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=latent or ["latent", 0],
        ),
        "save": node("SaveLatent", samples=["custom", 0], filename_prefix=prefix),
    }


def saved_latent(base: Path, prefix: str) -> Tensor:
    """The newest file that SaveLatent wrote under this prefix to the output folder of `base`."""
    return load_file(max((base / "output").glob(f"{prefix}_*.latent")))["latent_tensor"]


def pixels(png: bytes) -> bytes:
    """A picture file's pixels, without its metadata."""
    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()
