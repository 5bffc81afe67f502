"""Converts tensors from OpenCLIP's, timm's and Meta's layouts to transformers' names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .layouts import OPEN_CLIP, TIMM, Network, normalised_name


def in_transformers_names(tensors: Mapping[str, Tensor], network: Network, with_text: bool) -> dict[str, Tensor]:
    """The network's tensors under the names of transformers' published files, which all its versions read.

    tensors: the file's tensors; those of other networks are left out. network: from `network_of`.
    with_text: keep CLIP's text encoder.
    Fused queries, keys and values are split into views; OpenCLIP's projections are transposed.
    """
    prefix = network.prefix
    own = {normalised_name(n, prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if network.layout == OPEN_CLIP:
        own = _from_open_clip(own)
    elif network.layout == TIMM:
        own = _from_timm(own, network)
    return own if with_text else {n: t for n, t in own.items() if not n.startswith(("text_", "logit_scale"))}


_OPEN_CLIP_WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_OPEN_CLIP_PARTS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # transformers' spelling
    "visual.ln_post.": "vision_model.post_layernorm.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
}
_OPEN_CLIP_LAYER = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def _from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix("text.")
        if bare in _OPEN_CLIP_WHOLE:
            # A matrix for x @ W; a linear layer stores W.T.
            turned = bare in ("visual.proj", "text_projection") and tensor.ndim == 2
            result[_OPEN_CLIP_WHOLE[bare]] = tensor.T.contiguous() if turned else tensor
            continue
        part = next((p for p in _OPEN_CLIP_PARTS if bare.startswith(p)), None)
        if part is None:
            continue
        renamed = _replaced(_OPEN_CLIP_PARTS[part] + bare.removeprefix(part), _OPEN_CLIP_LAYER)
        head, fused, leaf = renamed.partition(".attn.in_proj_")
        if fused:
            result.update(
                {f"{head}.self_attn.{p}_proj.{leaf}": t for p, t in zip("qkv", _thirds(tensor), strict=False)}
            )
        else:
            result[renamed] = tensor
    return result


_TIMM_WHOLE = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_VIT_LAYER = {
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
_DINOV2_LAYER = {
    ".attn.proj.": ".attention.output.dense.",
    ".ls1.gamma": ".layer_scale1.lambda1",
    ".ls2.gamma": ".layer_scale2.lambda1",
}


def _from_timm(tensors: Mapping[str, Tensor], network: Network) -> dict[str, Tensor]:
    dinov2 = network.kind == "DINO v2"
    layer = _DINOV2_LAYER if dinov2 else _VIT_LAYER
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _TIMM_WHOLE:
            result[_TIMM_WHOLE[name]] = tensor
        elif name.startswith("blocks."):
            renamed = _replaced(f"encoder.layer.{name.removeprefix('blocks.')}", layer)
            head, fused, leaf = renamed.partition(".attn.qkv.")
            if fused:
                parts = zip(("query", "key", "value"), _thirds(tensor), strict=False)
                result.update({f"{head}.attention.attention.{part}.{leaf}": t for part, t in parts})
            else:
                result[renamed] = tensor
    token = result.get("embeddings.cls_token")
    if dinov2 and token is not None:
        # Only used in training; timm leaves it out.
        result.setdefault("embeddings.mask_token", token.new_zeros(1, network.width))
    elif not dinov2:
        result.pop("embeddings.mask_token", None)
    return result


def _thirds(tensor: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values; empty for another shape, so that they are reported as missing."""
    return tensor.chunk(3) if tensor.ndim and tensor.shape[0] % 3 == 0 else ()


def _replaced(name: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        name = name.replace(old, new)
    return name
