"""CLIP-T, CLIP-I and DINO of images against photographs and a prompt, as far as their encoders are available."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..concept.augment import to_unit
from ..concept.images import square_images
from ..concept.photographs import Photograph
from ..concept.prompts import without_placeholder
from ..miniature.judges import load_judges
from ..models.text import clip_tokenizer, warn_truncated
from ..perception.backbones import Backbone, normalised, resized
from ..perception.load import BackboneFiles, load_backbone
from . import metrics


@torch.inference_mode(False)
@torch.no_grad()
def score_pictures(
    images: Tensor,
    photographs: Sequence[Photograph],
    prompt: str,
    placeholder: str,
    protocol: metrics.Protocol,
    backbone_files: Mapping[str, BackboneFiles],
) -> dict[str, float]:
    """The scores "clip_t", "clip_i" and "dino" whose encoders are in `backbone_files`.

    images (B, 3, H, W) in [-1, 1], all generated from `prompt`. placeholder: the token that CLIP-T's caption omits.
    backbone_files: encoder name -> its files; the miniature's judges are package data and need none.
    """
    crop = "squash" if protocol.squash else "center"
    side = protocol.squash or max(protocol.clip_size, protocol.dino_size)
    references = to_unit(square_images(photographs, side, crop).pixels)
    caption = without_placeholder(prompt, placeholder)
    images = images.float()
    if protocol.squash:
        images = resized(images, protocol.squash)
    if protocol.name == "miniature":
        judges = load_judges()
        pictured = judges.image_text_image(images)
        text = judges.image_text_text([caption]).expand(len(images), -1)
        return {
            "clip_t": metrics.clip_t(pictured, text),
            "clip_i": metrics.clip_i(pictured, judges.image_text_image(references)),
            "dino": metrics.dino(judges.identity(images), judges.identity(references)),
        }
    result: dict[str, float] = {}
    if protocol.clip in backbone_files:
        backbone = load_backbone(protocol.clip, backbone_files[protocol.clip].encoder).float()
        pictured, real = (_features(backbone, x, protocol.clip_size) for x in (images, references))
        clip = backbone.encoder
        text = clip.text_projection(clip.text_model(_caption_ids(caption)).pooler_output)  # type: ignore[operator]
        result["clip_t"] = metrics.clip_t(pictured, text.expand(len(images), -1))
        result["clip_i"] = metrics.clip_i(pictured, real)
    if protocol.dino in backbone_files:
        backbone = load_backbone(protocol.dino, backbone_files[protocol.dino].encoder).float()
        seen, real = (_features(backbone, x, protocol.dino_size) for x in (images, references))
        result["dino"] = metrics.dino(seen, real)
    return result


def _caption_ids(caption: str) -> Tensor:
    """Token ids (1, 77) of a caption. Warns where a longer caption is truncated."""
    tokenizer = clip_tokenizer(pad_with_end=True)
    warn_truncated(caption, tokenizer.model_max_length - 2, lambda text: len(tokenizer.tokenize(text)))
    ids: Tensor = tokenizer([caption], padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


def _features(backbone: Backbone, images: Tensor, size: int) -> Tensor:
    """Features at the protocol's input size, which may differ from the encoder's training resolution."""
    spec = backbone.spec
    return spec.features(backbone.encoder, normalised(images, size, (spec.mean, spec.std))).float()
