"""Checkpoints of random weights, as diffusers folders and as single files, and the hash of every tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

from echodistill_core.models import layout
from echodistill_core.models.architectures import SD2, TINY, Architecture
from echodistill_core.models.assemble import empty_text_encoder, empty_unet, empty_vae
from echodistill_core.models.checkpoint import V_PREDICTION_DEVIATION, V_PREDICTION_TENSOR
from echodistill_core.models.text import clip_tokenizer
from echodistill_core.tensorfile import write_tensors

SCALES: dict[str, Architecture] = {"full": SD2, "tiny": TINY}
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}

StateDict = dict[str, Tensor]
Networks = dict[str, StateDict]


@dataclass(frozen=True)
class Role:
    """A published checkpoint that a random one has the format of.

    sgm: whether its single file names the text encoder as Stability's generative-models repository does.
    """

    name: str
    prediction: str
    unet_seed: int
    scheduler: type
    scheduler_options: dict[str, Any]
    sgm: bool


# Both checkpoints have the same text encoder and VAE, as the published ones do.
SHARED_SEED = 3
ROLES = {
    "teacher": Role("SD 2.1", "v_prediction", 1, DDIMScheduler, {"clip_sample": False}, sgm=False),
    "student": Role("SD-Turbo", "epsilon", 2, EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, sgm=True),
}


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hashes(networks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """The hash of every tensor, as `<network>.<name>`."""
    return {f"{part}.{name}": tensor_hash(t) for part, tensors in networks.items() for name, t in tensors.items()}


def empty_networks(architecture: Architecture) -> Networks:
    """unet, text_encoder and vae on the meta device, under the names of diffusers and transformers 5."""
    text = empty_text_encoder(architecture).state_dict()
    return {
        "unet": dict(empty_unet(architecture).state_dict()),
        "text_encoder": {name.removeprefix("text_model."): tensor for name, tensor in text.items()},
        "vae": dict(empty_vae(architecture).state_dict()),
    }


def random_tensors(
    shapes: Mapping[str, Tensor], seed: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> StateDict:
    """Random tensors of these shapes, drawn on this device and returned on the CPU.

    Matrices are drawn from N(0, 1/fan_in), norm scales from N(1, 0.02^2), biases from N(0, 0.02^2). No two tensors are
    equal, so a comparison detects swapped names.
    """
    generator = torch.Generator(device).manual_seed(seed)
    result = {}
    for name, like in shapes.items():
        noise = torch.randn(like.shape, generator=generator, device=device)
        if like.ndim >= 2:
            noise *= (like.shape[-1] if "embedding" in name else like[0].numel()) ** -0.5
        else:
            noise = 0.02 * noise + (0.0 if name.endswith("bias") else 1.0)
        result[name] = noise.to(dtype).cpu()
    return result


def random_checkpoint(
    role: str, architecture: Architecture, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Networks:
    """unet, text_encoder and vae of one checkpoint, drawn on `device` and returned on the CPU.

    The loader recognises v-prediction in a single file by the standard deviation of one bias, V_PREDICTION_TENSOR. The
    bias is scaled to twice the loader's threshold for v-prediction and to half of it for epsilon.
    """
    empty = empty_networks(architecture)
    unet = random_tensors(empty["unet"], ROLES[role].unet_seed, dtype, device)
    if V_PREDICTION_TENSOR in unet:
        bias = unet[V_PREDICTION_TENSOR].float()
        factor = 2.0 if ROLES[role].prediction == "v_prediction" else 0.5
        unet[V_PREDICTION_TENSOR] = (bias / bias.std() * factor * V_PREDICTION_DEVIATION).to(dtype)
    shared = {part: random_tensors(empty[part], SHARED_SEED, dtype, device) for part in ("text_encoder", "vae")}
    return {"unet": unet, **shared}


def write_folder(folder: Path, role: str, networks: Networks, architecture: Architecture) -> None:
    """Write a diffusers folder, with the older names of text encoder and VAE that the published folders have."""
    published = ROLES[role]
    empty_unet(architecture).save_config(folder / "unet")
    empty_vae(architecture).save_config(folder / "vae")
    empty_text_encoder(architecture).config.save_pretrained(folder / "text_encoder")
    published.scheduler(
        **architecture.scheduler, prediction_type=published.prediction, steps_offset=1, **published.scheduler_options
    ).save_pretrained(folder / "scheduler")
    clip_tokenizer(architecture.pad_with_end).save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", published.scheduler.__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    variant = ".fp16" if networks["unet"]["conv_in.weight"].dtype == torch.float16 else ""
    positions = torch.arange(architecture.text_encoder["max_position_embeddings"])[None]
    text = {f"text_model.{name}": tensor for name, tensor in networks["text_encoder"].items()}
    text["text_model.embeddings.position_ids"] = positions
    write_tensors(folder / "unet" / f"diffusion_pytorch_model{variant}.safetensors", networks["unet"], {})
    write_tensors(folder / "text_encoder" / f"model{variant}.safetensors", text, {})
    write_tensors(
        folder / "vae" / f"diffusion_pytorch_model{variant}.safetensors",
        {_published_vae_name(name): tensor for name, tensor in networks["vae"].items()},
        {},
    )


# The layers of the VAE's attention: diffusers' current names and those of the published files.
_VAE_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def _published_vae_name(name: str) -> str:
    if ".attentions." not in name:
        return name
    for current, published in _VAE_ATTENTION.items():
        name = name.replace(current, published)
    return name


def write_file(path: Path, role: str, networks: Networks, architecture: Architecture) -> dict[str, int]:
    """Write a single file in the original layout, with the additional tensors of the published files.

    Returns the number of parameters of the file's text encoder. It includes OpenCLIP's last layer, projection and
    temperature, which SD 2.x does not use.
    """
    tensors = layout.to_original(networks["unet"], networks["text_encoder"], networks["vae"], architecture)
    prefix = layout.OPEN_CLIP_PREFIX
    layers, width = architecture.text_encoder["num_hidden_layers"], architecture.text_width
    unused = {
        name.replace(f"resblocks.{layers - 1}.", f"resblocks.{layers}."): like
        for name, like in tensors.items()
        if f"{prefix}transformer.resblocks.{layers - 1}." in name
    }
    unused[f"{prefix}text_projection"] = torch.empty(width, width)
    unused[f"{prefix}logit_scale"] = torch.empty(())
    tensors.update(random_tensors(unused, SHARED_SEED + 1, networks["unet"]["conv_in.weight"].dtype))
    numbers = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(prefix))
    if ROLES[role].sgm:
        tensors = {
            name.replace(prefix, layout.SGM_OPEN_CLIP_PREFIX) if name.startswith(prefix) else name: tensor
            for name, tensor in tensors.items()
        }
    else:
        scheduler = ROLES[role].scheduler(**architecture.scheduler)
        tensors["betas"], tensors["alphas_cumprod"] = scheduler.betas, scheduler.alphas_cumprod
    write_tensors(path, tensors, {})
    return {"text_encoder_in_file": numbers}


def folder_bytes(path: Path) -> int:
    """The size in bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
