"""Reads a source of weights (folder, single file, tensors in memory) as state dictionaries in diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from ..diffusion import PREDICTION_TYPES, NoiseSchedule
from ..errors import InputError
from ..files import why_missing
from ..messages import shortened
from ..tensorfile import read_header, read_tensors
from . import layout
from .architectures import ARCHITECTURES, SD1, SD2, Architecture, looks_like, match, shapes_of
from .assemble import StateDict, empty_unet, empty_vae
from .declared import DeclaredPrediction, read_declared, resolve_prediction
from .parts import Names, convert_text_encoder, convert_vae, names_present, used_text_names
from .quantized import dequantized, refuse_quantized_config
from .schedules import schedule_of
from .text import load_tokenizer
from .unused import unused_warnings
from .weightfiles import read_config, weights_in

Source = str | Path | Mapping[str, Any]

__all__ = ["Checkpoint", "Source", "read_checkpoint", "schedule_of", "weights_in"]

# Threshold of the standard deviation that separates SD 2.x v-prediction from epsilon in a file without a declaration:
# the published 768-v checkpoint is above, 512-base and Turbo are below. ComfyUI uses the same tensor and threshold.
V_PREDICTION_TENSOR = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
V_PREDICTION_DEVIATION = 0.09


@dataclass(frozen=True)
class Checkpoint:
    """A source's state dictionaries in diffusers' names. `text_encoder` and `vae` may be empty.

    warnings: sentences about unused tensors and contradictions. names: for each part, diffusers' name -> the source's
    name where they differ, for messages.
    """

    origin: str
    architecture: Architecture
    unet: StateDict
    text_encoder: StateDict
    vae: StateDict
    schedule: NoiseSchedule
    tokenizer: CLIPTokenizer | None = None
    warnings: tuple[str, ...] = ()
    names: Mapping[str, Names] = field(default_factory=dict, repr=False)


def read_checkpoint(
    source: Source, *, prediction: str = "auto", architecture: Architecture | None = None, origin: str = ""
) -> Checkpoint:
    """Read one source. Values are computed only where quantised weights have scales.

    source: a diffusers folder; a `.safetensors` file in the original layout; a mapping of tensors in that layout; or a
        mapping with `unet` and optionally `text_encoder` and `vae`, each a mapping of tensors in diffusers' or the
        original names.
    prediction: "auto", or the UNet's prediction type (diffusion.PREDICTION_TYPES), which overrides the source's.
    architecture: None to find it by the tensors' shapes.
    Raises InputError for any other source, naming its likely kind; for a noise schedule that does not suit the
    prediction type; for quantised weights other than 8-bit floats; for one tensor with two values.
    """
    if prediction != "auto" and prediction not in PREDICTION_TYPES:
        raise InputError(
            f"prediction type {shortened(repr(prediction))} is unknown; expected one of {', '.join(PREDICTION_TYPES)}."
        )
    if isinstance(source, Mapping):
        origin = origin or "the given tensors"
        if "unet" in source:
            return _from_parts(source, architecture, origin, prediction)
        return _from_original(source, {}, architecture, origin, prediction)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, prediction)
    if path.is_file():
        return _from_original(read_tensors(path), read_header(path).metadata, architecture, str(path), prediction)
    raise InputError(f"checkpoint {path} {why_missing(path)}; expected a diffusers folder or a .safetensors file.")


def _schedule(
    architecture: Architecture, declared: DeclaredPrediction, guess: str, requested: str, origin: str
) -> tuple[NoiseSchedule, list[str]]:
    """The noise schedule of a source without a scheduler configuration, and warnings of contradictions."""
    prediction, warnings = resolve_prediction(declared, guess, requested, origin)
    zero_snr = {"rescale_betas_zero_snr": True} if declared.zero_snr else {}
    where = f"{origin} ({declared.where})" if declared.where else origin
    return schedule_of({**architecture.scheduler, **zero_snr}, prediction, where), warnings


def _guess_prediction(unet: StateDict, architecture: Architecture) -> str:
    bias = unet.get(V_PREDICTION_TENSOR)
    if architecture is SD2 and bias is not None and bias.float().std(correction=0) > V_PREDICTION_DEVIATION:
        return "v_prediction"
    return "epsilon"


def _strip(tensors: StateDict, prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _original_architecture(unet: StateDict, everything: StateDict, origin: str) -> Architecture:
    """Find the architecture of a UNet in the original names by the shapes of three tensors."""
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


def _from_original(
    tensors: StateDict, metadata: Mapping[str, str], architecture: Architecture | None, origin: str, requested: str
) -> Checkpoint:
    if not any(n.startswith(layout.UNET_PREFIX) for n in tensors):
        raise InputError(
            f"{origin} is no checkpoint in Stable Diffusion's original layout: it looks like "
            f"{looks_like(shapes_of(tensors))}; expected the single file of a whole Stable Diffusion 1.5, 2.1 or Turbo."
        )
    tensors = dequantized(tensors, metadata, origin)
    architecture = architecture or _original_architecture(_strip(tensors, layout.UNET_PREFIX), tensors, origin)
    unet_names = names_present(
        tensors, layout.unet_names(empty_unet(architecture).state_dict(), architecture), layout.UNET_PREFIX
    )
    vae_names = names_present(
        tensors, layout.vae_names(empty_vae(architecture).state_dict(), architecture), layout.VAE_PREFIX
    )
    text_keys = layout.find_text_tensors(tensors)
    text, text_names = layout.text_tensors(tensors, text_keys, architecture, origin)
    unet = layout.from_original(tensors, unet_names, "")
    marks = {n.removeprefix(layout.UNET_PREFIX) for n in tensors}
    guess = _guess_prediction(unet, architecture)
    schedule, warnings = _schedule(architecture, read_declared(metadata, marks, origin), guess, requested, origin)
    layers = architecture.text_encoder["num_hidden_layers"]
    used = {*unet_names.values(), *vae_names.values(), *used_text_names(text_keys, layers)}
    return Checkpoint(
        origin=origin,
        architecture=architecture,
        unet=unet,
        text_encoder=text,
        vae=layout.from_original(tensors, vae_names, ""),
        schedule=schedule,
        warnings=(*warnings, *unused_warnings(tensors, used, layers, origin)),
        names={"unet": unet_names, "text_encoder": text_names, "vae": vae_names},
    )


def _from_parts(parts: Mapping[str, Any], architecture: Architecture | None, origin: str, requested: str) -> Checkpoint:
    unet: StateDict = dequantized(parts["unet"], {}, origin)
    marks = read_declared({}, unet, origin)
    original = "input_blocks.0.0.weight" in unet
    if architecture is None:
        architecture = _original_architecture(unet, unet, origin) if original else match(shapes_of(unet), origin)
    names: dict[str, Names] = {}
    warnings = []
    layers = architecture.text_encoder["num_hidden_layers"]
    if original:
        names["unet"] = names_present(unet, layout.unet_names(empty_unet(architecture).state_dict(), architecture), "")
        warnings += unused_warnings(unet, set(names["unet"].values()), layers, f"UNet of {origin}")
        unet = layout.from_original(unet, names["unet"], "")
    vae: StateDict = dequantized(parts.get("vae") or {}, {}, origin)
    if any(n.startswith("encoder.down.") for n in vae):
        names["vae"] = names_present(vae, layout.vae_names(empty_vae(architecture).state_dict(), architecture), "")
        warnings += unused_warnings(vae, set(names["vae"].values()), layers, f"VAE of {origin}")
        vae = layout.from_original(vae, names["vae"], "")
    else:
        vae, names["vae"] = convert_vae(vae, origin)
    given = dequantized(parts.get("text_encoder") or {}, {}, origin)
    text, names["text_encoder"], more = convert_text_encoder(given, architecture, f"text encoder of {origin}")
    schedule, schedule_warnings = _schedule(
        architecture, marks, _guess_prediction(unet, architecture), requested, origin
    )
    return Checkpoint(
        origin=origin,
        architecture=architecture,
        unet=unet,
        text_encoder=text,
        vae=vae,
        schedule=schedule,
        warnings=(*schedule_warnings, *warnings, *more),
        names=names,
    )


def _from_folder(folder: Path, requested: str) -> Checkpoint:
    if not (folder / "unet").is_dir():
        raise InputError(
            f"folder {folder} is no diffusers checkpoint: it has no subfolder unet; expected unet, vae, text_encoder "
            "and scheduler, or the path of a single .safetensors file."
        )
    unet_config = _network_config(folder / "unet")
    unet = dequantized(weights_in(folder / "unet"), {}, str(folder / "unet"))
    kind = unet_config.get("_class_name", "UNet2DConditionModel")
    if (
        kind != "UNet2DConditionModel"
        or unet_config.get("addition_embed_type")
        or unet_config.get("in_channels") not in _latent_channels()
    ):
        raise InputError(
            f"{folder} is no SD 1.x or SD 2.x checkpoint: it looks like "
            f"{looks_like(shapes_of(unet))} ({shortened(kind)}); expected Stable Diffusion 1.5, 2.1 or Turbo (not "
            "SDXL)."
        )
    side = _count(unet_config, "sample_size", 64, folder / "unet")
    has_text, has_vae = (folder / "text_encoder").is_dir(), (folder / "vae").is_dir()
    scheduler_path = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_config(scheduler_path)
    tokenizer = load_tokenizer(folder / "tokenizer") if (folder / "tokenizer").is_dir() else None
    text_config = _network_config(folder / "text_encoder") if has_text else {}
    _count(text_config, "num_hidden_layers", 12, folder / "text_encoder")
    if tokenizer is not None:
        pad_with_end = tokenizer.pad_token_id == tokenizer.eos_token_id
    else:
        pad_with_end = unet_config.get("cross_attention_dim") == SD1.text_width
    architecture = Architecture(
        name=folder.name,
        unet=_without_private(unet_config),
        text_encoder={**CLIPTextConfig().to_dict(), **text_config},
        # Keeps _class_name, by which `check_vae` refuses other VAE classes.
        vae=_network_config(folder / "vae") if has_vae else {},
        resolution=side * 8,
        pad_with_end=pad_with_end,
        scheduler=scheduler,
    )
    declared = DeclaredPrediction(scheduler.get("prediction_type", "epsilon"), str(scheduler_path))
    prediction, warnings = resolve_prediction(declared, None, requested, str(folder))
    given = dequantized(weights_in(folder / "text_encoder"), {}, str(folder / "text_encoder")) if has_text else {}
    text, text_names, more = convert_text_encoder(given, architecture, f"text encoder of {folder}")
    vae = dequantized(weights_in(folder / "vae"), {}, str(folder / "vae")) if has_vae else {}
    vae, vae_names = convert_vae(vae, str(folder / "vae"))
    return Checkpoint(
        origin=str(folder),
        architecture=architecture,
        unet=unet,
        text_encoder=text,
        vae=vae,
        schedule=schedule_of(scheduler, prediction, str(scheduler_path)),
        tokenizer=tokenizer,
        warnings=(*warnings, *more),
        names={"text_encoder": text_names, "vae": vae_names},
    )


def _latent_channels() -> set[int]:
    """Input channels of the known UNets: 4 and 8. An inpainting UNet has 9."""
    return {architecture.unet["in_channels"] for architecture in ARCHITECTURES.values()}


def _network_config(folder: Path) -> dict[str, Any]:
    config = read_config(folder / "config.json")
    refuse_quantized_config(config, str(folder / "config.json"))
    return config


def _count(config: Mapping[str, Any], name: str, default: int, folder: Path) -> int:
    value = config.get(name, default)
    if type(value) is not int or value < 1:
        raise InputError(
            f"{folder / 'config.json'}: {name} is {shortened(repr(value))}; expected a whole number of at least 1, "
            f"for instance {default}; correct it."
        )
    return value


def _without_private(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith("_")}
