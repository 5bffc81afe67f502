"""What a source of weights holds, as state dictionaries in diffusers' names: folders, single files, given tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from ..diffusion import NoiseSchedule
from ..errors import InputError
from ..tensorfile import read_tensors
from . import layout
from .architectures import SD1, SD2, Architecture, looks_like, match, shapes_of
from .assemble import StateDict, empty_unet, empty_vae
from .text import load_tokenizer

Source = str | Path | Mapping[str, Any]

# Standard deviation that tells SD 2.x v-prediction from epsilon in a file that does not say: the published 768-v
# checkpoint is above, the 512-base and Turbo ones below. ComfyUI decides by the same tensor and number.
V_PREDICTION_TENSOR = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
V_PREDICTION_DEVIATION = 0.09
# Stable Diffusion's and the embedded family's; 9 would be an inpainting UNet.
LATENT_CHANNELS = (4, 8)


@dataclass(frozen=True)
class Checkpoint:
    """A source's tensors in diffusers' names, not yet networks. `text_encoder` and `vae` may be empty."""

    origin: str
    architecture: Architecture
    unet: StateDict
    text_encoder: StateDict
    vae: StateDict
    schedule: NoiseSchedule
    tokenizer: CLIPTokenizer | None = None


def read_checkpoint(
    source: Source, *, prediction: str = "auto", architecture: Architecture | None = None, origin: str = ""
) -> Checkpoint:
    """Read one source.

    source: a diffusers folder; a `.safetensors` file in the original layout; a mapping of tensors in that layout; or a
        mapping with `unet` and, as far as they are there, `text_encoder` and `vae`, each a mapping of tensors in
        diffusers' or the original names.
    prediction: "auto", or what the UNet predicts (diffusion.PREDICTION_TYPES) where the source is known to be wrong.
    architecture: for tensors of sizes of one's own; otherwise found by the tensors' shapes.
    Raises InputError for anything else, saying what it looks like.
    """
    if isinstance(source, Mapping):
        if "unet" in source:
            checkpoint = _from_parts(source, architecture, origin or "the given tensors")
        else:
            checkpoint = _from_original(source, architecture, origin or "the given tensors")
    else:
        path = Path(source)
        if path.is_dir():
            checkpoint = _from_folder(path)
        elif path.is_file():
            checkpoint = _from_original(read_tensors(path), architecture, str(path))
        else:
            raise InputError(f"checkpoint {path} does not exist; expected a diffusers folder or a .safetensors file.")
    if prediction != "auto":
        schedule = NoiseSchedule(checkpoint.schedule.alphas_cumprod, prediction)
        checkpoint = replace(checkpoint, schedule=schedule)
    return checkpoint


def schedule_of(scheduler: Mapping[str, Any], prediction: str) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler's configuration, under which a UNet predicts `prediction`."""
    return NoiseSchedule(DDPMScheduler.from_config(dict(scheduler)).alphas_cumprod, prediction)


def _guess_prediction(unet: StateDict, architecture: Architecture) -> str:
    bias = unet.get(V_PREDICTION_TENSOR)
    if architecture is SD2 and bias is not None and bias.float().std(correction=0) > V_PREDICTION_DEVIATION:
        return "v_prediction"
    return "epsilon"


def _strip(tensors: StateDict, prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _original_architecture(unet: StateDict, everything: StateDict, origin: str) -> Architecture:
    """Find the architecture of a UNet in the original names by the three tensors that tell it."""
    tell = {
        "conv_in.weight": "input_blocks.0.0.weight",
        "down_blocks.0.attentions.0.proj_in.weight": "input_blocks.1.1.proj_in.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        ),
    }
    shapes = {here: tuple(unet[there].shape) for here, there in tell.items() if there in unet}
    if len(shapes) < len(tell) or any("label_emb." in n for n in unet):
        shapes = shapes_of(everything)
    return match(shapes, origin)


def _from_original(tensors: StateDict, architecture: Architecture | None, origin: str) -> Checkpoint:
    own = _strip(tensors, layout.UNET_PREFIX)
    if not own:
        raise InputError(
            f"{origin} is no checkpoint in Stable Diffusion's original layout: it looks like "
            f"{looks_like(shapes_of(tensors))}; expected the single file of a whole Stable Diffusion 1.5, 2.1 or Turbo."
        )
    architecture = architecture or _original_architecture(own, tensors, origin)
    unet_map = layout.unet_names(empty_unet(architecture).state_dict(), architecture)
    vae_map = layout.vae_names(empty_vae(architecture).state_dict(), architecture)
    unet = layout.from_original(tensors, unet_map, layout.UNET_PREFIX)
    return Checkpoint(
        origin=origin,
        architecture=architecture,
        unet=unet,
        text_encoder=layout.text_from_original(tensors, architecture),
        vae=layout.from_original(tensors, vae_map, layout.VAE_PREFIX),
        schedule=schedule_of(architecture.scheduler, _guess_prediction(unet, architecture)),
    )


def _from_parts(parts: Mapping[str, Any], architecture: Architecture | None, origin: str) -> Checkpoint:
    unet = dict(parts["unet"])
    original = "input_blocks.0.0.weight" in unet
    if architecture is None:
        architecture = _original_architecture(unet, unet, origin) if original else match(shapes_of(unet), origin)
    if original:
        unet = layout.from_original(unet, layout.unet_names(empty_unet(architecture).state_dict(), architecture), "")
    vae = dict(parts.get("vae") or {})
    if any(n.startswith("encoder.down.") for n in vae):
        vae = layout.from_original(vae, layout.vae_names(empty_vae(architecture).state_dict(), architecture), "")
    else:
        vae = _modern_vae(vae)
    return Checkpoint(
        origin=origin,
        architecture=architecture,
        unet=unet,
        text_encoder=_clean_text(dict(parts.get("text_encoder") or {}), architecture),
        vae=vae,
        schedule=schedule_of(architecture.scheduler, _guess_prediction(unet, architecture)),
    )


def _clean_text(text: StateDict, architecture: Architecture) -> dict[str, Tensor]:
    """Text tensors under transformers 5's names, without the layers and heads that the UNet does not read."""
    if any(n.startswith("transformer.resblocks.") for n in text):
        return layout.text_from_original({layout.OPEN_CLIP_PREFIX + n: t for n, t in text.items()}, architecture)
    layers = architecture.text_encoder["num_hidden_layers"]
    result = {}
    for name, tensor in text.items():
        bare = name.removeprefix("text_model.")
        if bare.startswith("encoder.layers.") and int(bare.split(".")[2]) >= layers:
            continue
        if bare.startswith(("embeddings.", "encoder.", "final_layer_norm.")) and not bare.endswith("position_ids"):
            result[bare] = tensor
    return result


# What diffusers called the VAE's attention when the published folders were written.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _modern_vae(vae: StateDict) -> dict[str, Tensor]:
    """VAE tensors under diffusers' present names; the published folders' attention has its names of 2022."""
    result = {}
    for name, tensor in vae.items():
        head, _, leaf = name.rpartition(".")
        head, _, last = head.rpartition(".")
        modern = _OLD_VAE_ATTENTION.get(last) if ".attentions." in name else None
        if modern is None:
            result[name] = tensor
        else:
            result[f"{head}.{modern}.{leaf}"] = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
    return result


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; expected a whole diffusers folder, download it again.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); download it again.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object; download it again.")
    return config


def weights_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of one network's folder: one safetensors file, its fp16 variant, or shards with an index.

    Raises InputError where there is none, or pickles only.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            if (folder / f"{stem}{variant}.safetensors").is_file():
                return read_tensors(folder / f"{stem}{variant}.safetensors")
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                try:
                    shards = sorted({str(shard) for shard in _read_config(index)["weight_map"].values()})
                except (KeyError, AttributeError):
                    raise InputError(f"{index} names no shards (weight_map); download the checkpoint again.") from None
                return {n: t for shard in shards for n, t in read_tensors(folder / Path(shard).name).items()}
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    if pickles:
        raise InputError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when opened; convert them to "
            ".safetensors, for instance with save_pretrained(safe_serialization=True) on a machine you can spare."
        )
    raise InputError(f"{folder} holds no .safetensors weights; download the checkpoint again.")


def _from_folder(folder: Path) -> Checkpoint:
    if not (folder / "unet").is_dir():
        raise InputError(
            f"folder {folder} is no diffusers checkpoint: it has no subfolder unet; expected unet, vae, text_encoder "
            "and scheduler, or the path of a single .safetensors file."
        )
    unet_config = _read_config(folder / "unet" / "config.json")
    unet = weights_in(folder / "unet")
    kind = unet_config.get("_class_name", "UNet2DConditionModel")
    if (
        kind != "UNet2DConditionModel"
        or unet_config.get("addition_embed_type")
        or unet_config.get("in_channels") not in LATENT_CHANNELS
    ):
        raise InputError(
            f"{folder} is no SD 1.x or SD 2.x checkpoint: it looks like "
            f"{looks_like(shapes_of(unet))} ({kind}); expected Stable Diffusion 1.5, 2.1 or Turbo (not SDXL)."
        )
    has_text, has_vae = (folder / "text_encoder").is_dir(), (folder / "vae").is_dir()
    scheduler = _read_config(folder / "scheduler" / "scheduler_config.json")
    tokenizer = load_tokenizer(folder / "tokenizer") if (folder / "tokenizer").is_dir() else None
    text_config = _read_config(folder / "text_encoder" / "config.json") if has_text else {}
    if tokenizer is not None:
        pad_with_end = tokenizer.pad_token_id == tokenizer.eos_token_id
    else:
        pad_with_end = unet_config.get("cross_attention_dim") == SD1.text_width
    architecture = Architecture(
        name=folder.name,
        unet=_without_private(unet_config),
        text_encoder={**CLIPTextConfig().to_dict(), **text_config},
        vae=_without_private(_read_config(folder / "vae" / "config.json")) if has_vae else {},
        resolution=int(unet_config.get("sample_size", 64)) * 8,
        pad_with_end=pad_with_end,
        scheduler=scheduler,
    )
    return Checkpoint(
        origin=str(folder),
        architecture=architecture,
        unet=unet,
        text_encoder=_clean_text(weights_in(folder / "text_encoder"), architecture) if has_text else {},
        vae=_modern_vae(weights_in(folder / "vae")) if has_vae else {},
        schedule=schedule_of(scheduler, scheduler.get("prediction_type", "epsilon")),
        tokenizer=tokenizer,
    )


def _without_private(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith("_")}
