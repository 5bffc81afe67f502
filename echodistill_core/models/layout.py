"""Tensor names in diffusers' layout and in Stable Diffusion's original ("single file") layout, in both directions.

Written here because diffusers converts from the original layout only, and adapters and checkpoints are also written in
it. Renaming copies no data, except OpenCLIP's fused attention weights, which are split or joined along the first axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, cat, equal

from ..errors import InputError
from ..messages import shortened
from .architectures import Architecture

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
OPEN_CLIP_PREFIX = "cond_stage_model.model."
# The prefix of Stability's later trainer (sgm, also SDXL's), as in the published sd_turbo.safetensors.
SGM_OPEN_CLIP_PREFIX = "conditioner.embedders.0.model."
CLIP_PREFIX = "cond_stage_model.transformer.text_model."

# Parts of a ResNet block of the UNet: diffusers' name -> the original's.
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_blocks(unet: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Pairs (diffusers' module, original module) for every block of a UNet with this configuration."""
    widths = unet["block_out_channels"]
    assert isinstance(widths, (tuple, list))
    levels, layers = len(widths), unet["layers_per_block"]
    assert isinstance(layers, int)
    yield from _UNET_ENDS.items()
    for level in range(levels):
        start = 1 + level * (layers + 1)
        for layer in range(layers):
            yield f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{start + layer}.0"
            yield f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{start + layer}.1"
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{start + layers}.0.op"
        for layer in range(layers + 1):
            n = level * (layers + 1) + layer
            yield f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{n}.0"
            yield f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{n}.1"
        # The upsampler's index is 2 after an attention block, else 1.
        kinds = unet["up_block_types"]
        assert isinstance(kinds, (tuple, list))
        place = 2 if "CrossAttn" in kinds[level] else 1
        yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{(level + 1) * (layers + 1) - 1}.{place}.conv"
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"


def unet_names(names: Iterable[str], architecture: Architecture) -> dict[str, str]:
    """Map diffusers' UNet names to the original's (without the `model.diffusion_model.` prefix)."""
    blocks = sorted(unet_blocks(architecture.unet), key=lambda pair: -len(pair[0]))
    result = {}
    for name in names:
        here, there = next((a, b) for a, b in blocks if name.startswith(a + "."))
        rest = name[len(here) + 1 :]
        if ".resnets." in here:
            part, _, leaf = rest.rpartition(".")
            rest = f"{_UNET_RESNET[part]}.{leaf}"
        result[name] = f"{there}.{rest}"
    return result


_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_names(names: Iterable[str], architecture: Architecture) -> dict[str, str]:
    """Map diffusers' VAE names to the original's (without the `first_stage_model.` prefix)."""
    levels = len(architecture.vae["block_out_channels"])
    result = {}
    for name in names:
        side, _, rest = name.partition(".")
        p = rest.split(".")
        leaf = p[-1]
        if p[0] == "conv_norm_out":
            new = f"norm_out.{leaf}"
        elif p[0] == "mid_block" and p[1] == "resnets":
            new = f"mid.block_{int(p[2]) + 1}." + ".".join(p[3:])
        elif p[0] == "mid_block":
            new = f"mid.attn_1.{_VAE_ATTENTION['.'.join(p[3:-1])]}.{leaf}"
        elif p[0] == "down_blocks" and p[2] == "resnets":
            new = f"down.{p[1]}.block.{p[3]}." + ".".join(p[4:])
        elif p[0] == "down_blocks":
            new = f"down.{p[1]}.downsample.conv.{leaf}"
        elif p[0] == "up_blocks" and p[2] == "resnets":
            new = f"up.{levels - 1 - int(p[1])}.block.{p[3]}." + ".".join(p[4:])
        elif p[0] == "up_blocks":
            new = f"up.{levels - 1 - int(p[1])}.upsample.conv.{leaf}"
        else:
            new = rest
        result[name] = f"{side}.{new}".replace("conv_shortcut", "nin_shortcut") if rest else name
    return result


def _is_vae_attention(name: str) -> bool:
    return "mid.attn_1." in name and name.endswith(("q.weight", "k.weight", "v.weight", "proj_out.weight"))


_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def text_to_original(text: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """transformers' CLIP text tensors under their names in an original checkpoint, with the prefix."""
    if architecture.pad_with_end:  # SD 1.x checkpoints hold transformers' own names
        return {CLIP_PREFIX + name: tensor for name, tensor in text.items()}
    result = {OPEN_CLIP_PREFIX + there: text[here] for here, there in _OPEN_CLIP_ENDS.items()}
    for layer in range(architecture.text_encoder["num_hidden_layers"]):
        here, there = f"encoder.layers.{layer}.", f"{OPEN_CLIP_PREFIX}transformer.resblocks.{layer}."
        for a, b in _OPEN_CLIP_LAYER.items():
            for leaf in ("weight", "bias"):
                result[f"{there}{b}.{leaf}"] = text[f"{here}{a}.{leaf}"]
        for leaf in ("weight", "bias"):
            parts = [text[f"{here}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            result[f"{there}attn.in_proj_{leaf}"] = cat(parts)
    return result


# Prefixes of the text encoder in single files: Stability's trainers, ComfyUI, diffusers.
TEXT_ROOTS = (
    "cond_stage_model.",
    "conditioner.embedders.0.",
    "text_encoders.clip_h.",
    "text_encoders.clip_l.",
    "text_encoder.",
)
_OPEN_CLIP_PARTS = {there: here for here, there in (_OPEN_CLIP_LAYER | _OPEN_CLIP_ENDS).items()}


def find_text_tensors(checkpoint: Mapping[str, Tensor]) -> dict[str, str]:
    """The tensors under `TEXT_ROOTS`: name in the checkpoint -> name without prefixes."""
    result = {}
    for name in checkpoint:
        root = next((r for r in TEXT_ROOTS if name.startswith(r)), "" if name.startswith("text_model.") else None)
        if root is not None:
            result[name] = strip_text_modules(name.removeprefix(root))
    return result


def strip_text_modules(name: str) -> str:
    """A tensor name without the modules that enclose the text encoder, in transformers' names or OpenCLIP's."""
    bare = name.removeprefix("model.")
    if not bare.startswith("transformer.resblocks."):
        bare = bare.removeprefix("transformer.")
    return bare.removeprefix("text_model.")


def text_tensors(
    given: Mapping[str, Tensor], bare: Mapping[str, str], architecture: Architecture, origin: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A text encoder's tensors in transformers' names, and their names in `given`.

    bare: name in `given` -> name without prefixes, in transformers' names or OpenCLIP's.
    Layers after the architecture's last (OpenCLIP's last, which SD 2.x does not use) are left out.
    Raises InputError for one tensor under two names with different values.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, short in bare.items():
        here = transformers_text_name(short, architecture.text_encoder["num_hidden_layers"])
        if here.endswith((".in_proj_weight", ".in_proj_bias")):
            head, _, leaf = here.rpartition(".in_proj_")
            if given[name].ndim == 0 or given[name].shape[0] % 3:
                raise InputError(
                    f"{origin}: tensor {shortened(name)} has shape {shortened(tuple(given[name].shape))}; expected "
                    "queries, keys and values below each other, three equal parts; download the checkpoint again."
                )
            found = {f"{head}.{q}_proj.{leaf}": t for q, t in zip("qkv", given[name].chunk(3), strict=True)}
        else:
            found = {here: given[name]} if here else {}
        for key, tensor in found.items():
            set_once(tensors, names, key, tensor, name, origin)
    return tensors, names


def set_once(
    tensors: dict[str, Tensor], names: dict[str, str], key: str, tensor: Tensor, name: str, origin: str
) -> None:
    """Set tensors[key] and names[key]. Raises InputError where tensors[key] already has another value.

    name: the tensor's name in the source.
    """
    if key in tensors and (tensors[key].shape != tensor.shape or not equal(tensors[key], tensor)):
        raise InputError(
            f"{origin} gives one tensor twice with different values, as {shortened(names[key])} and as "
            f"{shortened(name)}; expected one of them; take away the one that is not wanted."
        )
    if key not in tensors:
        tensors[key], names[key] = tensor, name


def transformers_text_name(bare: str, layers: int) -> str:
    """transformers' name, or "" for an unused tensor. OpenCLIP's fused in_proj_* keep their last part."""
    parts = bare.split(".")
    open_clip = bare.startswith("transformer.resblocks.")
    if (open_clip or bare.startswith("encoder.layers.")) and len(parts) > 3:
        if not parts[2].isdecimal() or int(parts[2]) >= layers:
            return ""
        here, rest, leaf = f"encoder.layers.{parts[2]}.", ".".join(parts[3:-1]), parts[-1]
        if open_clip and rest == "attn" and leaf in ("in_proj_weight", "in_proj_bias"):
            return f"{here}self_attn.{leaf}"
        if open_clip:
            return f"{here}{_OPEN_CLIP_PARTS[rest]}.{leaf}" if rest in _OPEN_CLIP_LAYER.values() else ""
        known = rest in _OPEN_CLIP_LAYER or rest in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return bare if known and leaf in ("weight", "bias") else ""
    if bare in _OPEN_CLIP_ENDS.values():
        return _OPEN_CLIP_PARTS[bare]
    return bare if bare in _OPEN_CLIP_ENDS else ""


def to_original(
    unet: Mapping[str, Tensor], text: Mapping[str, Tensor], vae: Mapping[str, Tensor], architecture: Architecture
) -> dict[str, Tensor]:
    """A checkpoint in the original layout, from the three networks' state dictionaries in diffusers' layout."""
    result = {UNET_PREFIX + there: unet[here] for here, there in unet_names(unet, architecture).items()}
    result.update(text_to_original(text, architecture))
    for here, there in vae_names(vae, architecture).items():
        tensor = vae[here]
        # The original's attention layers are 1x1 convolutions, diffusers' are linear.
        result[VAE_PREFIX + there] = tensor[:, :, None, None] if _is_vae_attention(there) else tensor
    return result


def from_original(checkpoint: Mapping[str, Tensor], names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    """Tensors of one network in diffusers' layout.

    names: as `unet_names` or `vae_names` return them. Names absent from the checkpoint are left out.
    """
    result = {}
    for here, there in names.items():
        tensor = checkpoint.get(prefix + there)
        if tensor is not None:
            result[here] = tensor[:, :, 0, 0] if _is_vae_attention(there) and tensor.ndim == 4 else tensor
    return result
