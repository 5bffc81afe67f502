"""Unused tensors of a checkpoint: the harmless ones, and a warning about all others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ..messages import listed
from .declared import MARKS

# Names of unused tensors in published checkpoints that change no result, each with the reason.
HARMLESS = (
    (r"^model_ema\.", "EMA weights and their counters; the weights themselves are used"),
    (r"\.model_ema\.", "EMA weights of the VAE"),
    (
        r"^(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights|logvar|scale_factor)$",
        "tables of the noise schedule, which is made from the scheduler's configuration",
    ),
    (r"^denoiser\.", "tables of the noise levels in Stability's later trainer"),
    (r"(^|\.)position_ids$", "0, 1, 2, ...; made anew"),
    (r"(^|\.)logit_scale$", "temperature of CLIP's loss, for comparing texts with images"),
    (r"(^|\.)text_projection(\.weight|\.bias)?$", "projection into CLIP's joint space; a UNet uses the hidden states"),
    (r"(^|\.)attn_mask$", "OpenCLIP's causal mask; made anew"),
    (r"(^|\.)(visual|vision_model|visual_projection)\.", "CLIP's image encoder"),
    (r"^first_stage_model\.loss\.", "the VAE's discriminator and perceptual loss, from its training"),
    (r"^loss\.", "the same in the file of a VAE"),
    (r"^(global_step|epoch|step|lr|learning_rate)$", "counters of the training"),
    (r"^(optimizer|optimizer_states|lr_schedulers?)\.", "state of the training"),
    (rf"^(model\.diffusion_model\.)?({'|'.join(MARKS)})$", "marker tensors without values, read by declared.py"),
)
_HARMLESS = re.compile("|".join(pattern for pattern, _ in HARMLESS))
_LAYER = re.compile(r"(?:resblocks|encoder\.layers)\.(\d+)\.")


def unused(names: Iterable[str], used: Collection[str], layers: int) -> list[str]:
    """The names that are neither used nor harmless.

    layers: number of text-encoder layers in use; later layers (OpenCLIP's last for SD 2.x) are harmless.
    """
    result = []
    for name in names:
        if name in used or _HARMLESS.search(name):
            continue
        layer = _LAYER.search(name)
        if layer is None or int(layer[1]) < layers:
            result.append(name)
    return result


def unused_warnings(names: Iterable[str], used: Collection[str], layers: int, origin: str) -> list[str]:
    """A warning that names the unused tensors, or an empty list."""
    found = unused(names, used, layers)
    if not found:
        return []
    return [
        f"{origin}: {len(found)} tensors are not read by anything ({listed(found)}); if they are an adapter or added "
        "blocks, they have no effect: merge them into the weights first."
    ]
