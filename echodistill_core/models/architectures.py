"""Configurations of the supported architectures, and a guess at the kind of other checkpoints, for error messages.

The configurations equal the published checkpoints' `config.json` files: a single-file checkpoint needs no download.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..messages import shortened
from ..registry import Registry

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """Configurations of one family's networks, in diffusers' and transformers' keywords.

    resolution: side of the square training images, in pixels.
    pad_with_end: whether prompts are padded with the end token (SD 1.x) or with token 0 (SD 2.x).
    """

    name: str
    unet: dict[str, Any]
    text_encoder: dict[str, Any]
    vae: dict[str, Any]
    resolution: int
    pad_with_end: bool
    scheduler: dict[str, Any]

    @property
    def text_width(self) -> int:
        """Width of the text features in the UNet's cross-attention."""
        return int(self.unet["cross_attention_dim"])


# DDPM, 1000 steps, "scaled_linear": the noise schedule of every Stable Diffusion 1.x and 2.x checkpoint.
STABLE_DIFFUSION_NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}

_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}

_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}

_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "layer_norm_eps": 1e-5,
}

SD2 = Architecture(
    name="SD 2.x",
    unet={
        **_UNET,
        "attention_head_dim": (5, 10, 20, 20),  # diffusers' historical name for the number of heads; each is 64 wide
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    # OpenCLIP ViT-H has 24 layers; SD 2.x uses the output of the 23rd, so the last is left out.
    text_encoder={
        **_TEXT,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
    },
    vae=_VAE,
    resolution=512,
    pad_with_end=False,
    scheduler=STABLE_DIFFUSION_NOISE,
)

SD1 = Architecture(
    name="SD 1.x",
    unet={**_UNET, "attention_head_dim": 8, "cross_attention_dim": 768},
    text_encoder={
        **_TEXT,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
    vae=_VAE,
    resolution=512,
    pad_with_end=True,
    scheduler=STABLE_DIFFUSION_NOISE,
)

# A small SD 2.x for tests: the same kinds of layers, one level without attention.
TINY = Architecture(
    name="tiny",
    unet={
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 32,
        "use_linear_projection": True,
    },
    text_encoder={
        **_TEXT,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "projection_dim": 32,
    },
    vae={**_VAE, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "sample_size": 64},
    resolution=64,
    pad_with_end=False,
    scheduler=STABLE_DIFFUSION_NOISE,
)

# The embedded family: a small SD 2.x with the capacity for its 64 x 64 image domain.
MINIATURE = Architecture(
    name="miniature",
    unet={
        "sample_size": 8,
        "in_channels": 8,
        "out_channels": 8,
        "block_out_channels": (96, 96),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (3, 3),
        "cross_attention_dim": 48,
        "use_linear_projection": True,
    },
    text_encoder={
        **_TEXT,
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "projection_dim": 48,
    },
    vae={
        **_VAE,
        "latent_channels": 8,
        "block_out_channels": (32, 32, 64, 96),
        "layers_per_block": 1,
        "sample_size": 64,
    },
    resolution=64,
    pad_with_end=False,
    scheduler=STABLE_DIFFUSION_NOISE,
)

# Architectures by which the weights of a single file, or tensors in memory, are recognised.
ARCHITECTURES: Registry[Architecture] = Registry("architecture", {a.name: a for a in (SD2, SD1, TINY, MINIATURE)})


def match(unet_shapes: Shapes, origin: str) -> Architecture:
    """The registered architecture of a UNet in diffusers' names, by its widths.

    Raises InputError where none fits, naming the likely kind of model.
    """
    found = unet_widths(unet_shapes)
    for architecture in ARCHITECTURES.values():
        u = architecture.unet
        linear = bool(u.get("use_linear_projection"))
        if found == (u["block_out_channels"][0], u["cross_attention_dim"], u["in_channels"], linear):
            return architecture
    raise InputError(
        f"{origin} is no SD 1.x or SD 2.x UNet: it looks like {looks_like(unet_shapes)}; "
        "expected a Stable Diffusion 1.5, 2.1 or Turbo (not SDXL) checkpoint."
    )


def unet_widths(shapes: Shapes) -> tuple[int, int, int, bool] | None:
    """(first width, text width, input channels, linear projections) of a UNet in diffusers' names, or None."""
    conv_in = shapes.get("conv_in.weight")
    to_k = next((s for n, s in shapes.items() if n.endswith("transformer_blocks.0.attn2.to_k.weight")), None)
    proj = next((s for n, s in shapes.items() if n.endswith("attentions.0.proj_in.weight")), None)
    if conv_in is None or to_k is None or proj is None or len(conv_in) != 4 or len(to_k) != 2:
        return None
    return conv_in[0], to_k[1], conv_in[1], len(proj) == 2


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a state dictionary, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def looks_like(shapes: Shapes) -> str:
    """The likely kind of model of a state dictionary, by names that only this kind has."""
    names = list(shapes)

    def has(part: str) -> bool:
        return any(part in n for n in names)

    for part, kind in (
        ("double_blocks.", "a Flux transformer"),
        ("joint_blocks.", "an SD 3 transformer"),
        ("single_transformer_blocks.", "a Flux transformer in diffusers' layout"),
        ("blocks.0.cross_attn.", "a video transformer"),
        ("input_hint_block.", "a ControlNet"),
        ("controlnet_cond_embedding.", "a ControlNet"),
        ("lora_down", "a LoRA"),
        ("lora_A", "a LoRA"),
        ("lora_up", "a LoRA"),
        (".attn2.to_k.diff", "an EchoDistill adapter"),
        ("image_proj.", "an IP-Adapter"),
        ("conditioner.embedders.", "an SDXL checkpoint"),
        ("add_embedding.", "an SDXL UNet"),
        ("label_emb.", "an SDXL UNet"),
        ("motion_modules.", "an AnimateDiff motion module"),
    ):
        if has(part):
            return kind
    widths = unet_widths(shapes)
    if widths is not None:
        width, text, channels, _ = widths
        if channels == 9:
            return "an inpainting UNet (9 input channels)"
        return f"a UNet of width {width} with text features of width {text} and {channels} input channels"
    if has("vision_model.") or has("visual."):
        return "a CLIP image encoder"
    if has("token_embedding"):
        return "a text encoder alone"
    if has("decoder.conv_in") or has("decoder.mid"):
        return "a VAE alone"
    return (
        f"no model known here ({len(names)} tensors, the first named {shortened(repr(names[0]))})"
        if names
        else "an empty file"
    )
